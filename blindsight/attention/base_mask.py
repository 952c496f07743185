"""The language in which a model's own mask is written, once it is proven what it is.

A *form* says which keys a query row may see, as intervals; an *expression* says it element by
element. Both are nested tuples of strings, numbers and tensors, so that either can be an argument
of a node in a graph, which puts its tensors in. :mod:`blindsight.passes.lift_mask` writes them,
and :mod:`blindsight.attention.form_intervals` evaluates forms and facts.

Expressions, over query row i and key column j (both count from 0, whatever a cache holds):

    ("index", axis)              b, i or j, for axis "b", "q" or "k"
    ("load", tensor, indices)    tensor[indices], indexed as PyTorch does
    ("add" | "sub" | "mul" | "floordiv" | "mod" | "min" | "max", x, y), ("abs" | "neg", x)
    ("le" | "lt" | "ge" | "gt" | "eq" | "ne", x, y), ("and" | "or", x, y), ("not", x)
    ("where", condition, x, y)
    ("place", x)                 x, noted to say where a token is, not of which packed sequence

Forms, where e is an expression of the row, and x one of the column:

    ("nothing",)                 every key is seen
    ("upper", e), ("lower", e)   j <= e, j >= e
    ("row", e)                   all keys if e, else none
    ("valid", x)                 keys with x; at the top only, not inside a union
    ("same", es, xs, is_sorted)  keys with xs == es, all of several values; is_sorted: xs ascends
    ("and" | "or", form, ...)    intersection; union, which must be one interval again
    ("by group", form, ...)      of each group of keys its own

What only the data can tell is a *fact*, to be checked on every call:

    ("contiguous", row, es, xs)  the keys with xs == es are neighbours, in every row with ``row``
    ("connected", row, forms)    the union of the forms is one interval, in every row with ``row``
    ("consecutive", positions, ids)  positions grow by one from token to token, wherever ids
                                 (None: one sequence) stay the same; and ids never decrease.
                                 Either: a tensor, or one and the indices that choose of it

What is no interval of all keys may be one of each *group* of them: where all images see each
other (Molmo 2), a query in one sees text up to itself, and every token of an image. A fact may
hold of the keys of each group that does not hold of them all; one that holds of all holds of each.

Shapes: B batch, Q query rows, K key columns, G groups of keys, T tokens of the whole sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Tier(IntEnum):
    """How much is known of a model's own mask."""

    INTERVALS = 1
    """It is a form: intervals of keys, of all or of each group."""
    EXPRESSION = 2
    """It is an expression that can be evaluated for each element."""
    OPAQUE = 3
    """It is a tensor whose elements have to be read."""


Expression = Any  # a number, a tensor (in a graph its node), or a tuple as above
Form = tuple[Any, ...]
Fact = tuple[Any, ...]

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("le", "lt", "ge", "gt", "eq", "ne")
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **_COMPARISONS,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
}

_NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)

# What is_causal=True means: row i sees columns 0..i, no padding.
CAUSAL: Form = ("upper", ("index", "q"))


def evaluate_expression(
    expression: Expression, b: Tensor, q: Tensor | None, k: Tensor | None
) -> Any:
    """Return the value of an expression for batch rows, query rows and key columns.

    Plain operations on tensors that broadcast, so it may serve as a ``mask_mod`` (scalar tensors)
    as well as for all elements at once.

    Args:
        expression: As above, with tensors.
        b, q, k: Integer tensors that broadcast; None for an axis that is not used.
    """
    axes = {"b": b, "q": q, "k": k}
    done: dict[int, Any] = {}

    def as_tensor(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        zero = b * 0
        return (zero != 0) | value if isinstance(value, bool) else zero + value

    def evaluate(node: Expression) -> Any:
        if not isinstance(node, tuple):
            return node
        if id(node) not in done:
            done[id(node)] = compute(node)
        return done[id(node)]

    def compute(node: tuple[Any, ...]) -> Any:
        name, *args = node
        if name == "index":
            return axes[args[0]]
        if name == "load":
            tensor, indices = args
            # A number among the indices would make a view, which mask_mods may not take.
            values = [as_tensor(evaluate(index)) for index in indices]
            loaded = tensor[tuple(values)] if values else tensor
            return loaded.to(torch.int64) if loaded.dtype in _NARROW_INTEGERS else loaded
        values = [evaluate(arg) for arg in args]
        if not any(isinstance(value, Tensor) for value in values):
            values[0] = as_tensor(values[0])
        if name in _BINARY:
            return _BINARY[name](*values)
        if name == "not":
            return torch.logical_not(values[0])
        if name == "place":
            return values[0]
        if name == "abs":
            return abs(values[0])
        if name == "neg":
            return -values[0]
        if name == "where":
            return torch.where(*values)
        assert name in ("min", "max"), f"unknown operation {name}"
        first, second = (as_tensor(value) for value in values)
        return torch.minimum(first, second) if name == "min" else torch.maximum(first, second)

    return evaluate(expression)


def conjuncts(form: Form) -> tuple[Form, ...]:
    """Return the forms that all must allow a key."""
    return form[1:] if form[0] == "and" else (form,)


def map_tensors(expression: Expression, function: Callable[[Tensor], Tensor]) -> Expression:
    """Return an expression, or a form, with ``function`` applied to its tensors."""
    if isinstance(expression, Tensor):
        return function(expression)
    if not isinstance(expression, tuple):
        return expression
    return tuple(map_tensors(part, function) for part in expression)
