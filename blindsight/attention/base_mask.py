"""Evaluate what a model's own mask was proven to be, without the mask.

A *form* says which keys a query row may see, as intervals; an *expression* says it element by
element. Both are nested tuples of strings, numbers and tensors, so that either can be an argument
of a node in a graph, which puts its tensors in. :mod:`blindsight.passes.lift_mask` writes them.

Expressions, over query row i and key column j (both count from 0, whatever a cache holds):

    ("index", axis)              b, i or j, for axis "b", "q" or "k"
    ("load", tensor, indices)    tensor[indices], indexed as PyTorch does
    ("add" | "sub" | "mul" | "floordiv" | "mod" | "min" | "max", x, y), ("abs" | "neg", x)
    ("le" | "lt" | "ge" | "gt" | "eq" | "ne", x, y), ("and" | "or", x, y), ("not", x)
    ("where", condition, x, y)

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
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.attention.interval_masks import BaseMask


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

_Interval = tuple[Tensor, Tensor]  # first and last key column [B or 1, Q or 1], first > last: none

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

# Pairs of values are compared as one number, which must not overflow.
_MAX_PAIR = 2.0**62


# Row i sees columns 0..i, no padding: what is_causal=True means.
CAUSAL: Form = ("upper", ("index", "q"))


def is_plain_causal(form: Form) -> bool:
    """Whether a form is what ``is_causal=True`` means: row i sees columns 0..i, no padding."""
    return form == CAUSAL


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


def base_mask_of(
    form: Form,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None = None,
    groups: Tensor | None = None,
) -> BaseMask:
    """Return what a form allows: an interval of key columns per query row, and the valid columns.

    Plain operations in O(Q + K) memory, and time but for one sort; no data is read on the host.

    Args:
        form: As above, with tensors.
        batch, num_queries, num_keys: B, Q and K.
        device: Where the mask is needed.
        groups: ``[B, G, K]`` bool, if there shall be an interval for each of these groups of keys:
            bounds are ``[B, G, Q]`` then.
    """
    grids = _grids(batch, num_queries, num_keys, device, groups)
    bounds = [
        [bound.expand(batch, num_queries).to(torch.int32) for bound in grid.interval(form)]
        for grid in grids
    ]
    lower, upper = (
        side[0] if groups is None else torch.stack(side, dim=1)
        for side in zip(*bounds, strict=True)
    )
    valid = torch.ones((batch, num_keys), dtype=torch.bool, device=device)
    for part in conjuncts(form):
        if part[0] == "valid":
            valid = valid & grids[0].column(part[1])
    return BaseMask(lower, upper, valid)


def facts_hold(
    facts: Iterable[Fact],
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Return whether a form is what the model's mask is on this data: 0-d bool.

    Args:
        facts: As above, with tensors.
        batch, num_queries, num_keys, device, groups: As for :func:`base_mask_of`.
    """
    grids = _grids(batch, num_queries, num_keys, device, groups)
    hold = torch.ones((), dtype=torch.bool, device=device)
    for name, *args in facts:
        if name == "consecutive":
            hold = hold & _are_consecutive(*args)
            continue
        rows, *what = args
        for grid in grids:
            found = grid.is_contiguous(*what) if name == "contiguous" else grid.is_connected(*what)
            hold = hold & (found | ~grid.row(rows)).all()
    return hold


def _grids(
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None,
    groups: Tensor | None,
) -> list[_Grid]:
    """Return one for all keys, or one for each group ``[B, G, K]`` of them."""
    each = [None] if groups is None else groups.unbind(1)
    return [
        _Grid(batch, num_queries, num_keys, device, group, number)
        for number, group in enumerate(each)
    ]


class _Grid:
    """Rows and columns of one attention call.

    Args:
        batch, num_queries, num_keys, device: Of the call.
        group: ``[B, K]`` bool, the only columns that there are; by default all.
        number: Of the group.
    """

    def __init__(
        self,
        batch: int,
        num_queries: int,
        num_keys: int,
        device: torch.device | str | None,
        group: Tensor | None = None,
        number: int = 0,
    ) -> None:
        self.num_keys = num_keys
        self.b = torch.arange(batch, device=device)[:, None]
        self.q = torch.arange(num_queries, device=device)[None]
        self.k = torch.arange(num_keys, device=device)[None]
        self._group = group
        self._number = number
        self._ranks = None if group is None else pad(group.cumsum(1), (1, 0))

    def row(self, expression: Expression) -> Tensor:
        """Return an expression of the row, ``[B, Q]``."""
        return self._full(evaluate_expression(expression, self.b, self.q, None), self.q)

    def column(self, expression: Expression) -> Tensor:
        """Return an expression of the column, ``[B, K]``."""
        return self._full(evaluate_expression(expression, self.b, None, self.k), self.k)

    def _full(self, value: Any, along: Tensor) -> Tensor:
        shape = (self.b.shape[0], along.shape[1])
        if not isinstance(value, Tensor):
            dtype = torch.bool if isinstance(value, bool) else torch.int64
            return torch.full(shape, value, dtype=dtype, device=along.device)
        return value.expand(shape)

    def everything(self) -> _Interval:
        zero = self.q * 0
        return zero, zero + (self.num_keys - 1)

    def interval(self, form: Form) -> _Interval:
        """Return the interval of key columns of every row, clipped to 0..K-1."""
        first, last = self.everything()
        name, *args = form
        if name == "upper":
            return first, self.row(args[0]).clamp(-1, self.num_keys - 1)
        if name == "lower":
            return self.row(args[0]).clamp(0, self.num_keys), last
        if name == "row":
            return torch.where(self.row(args[0]), first, self.num_keys), last
        if name == "same":
            found_first, found_last, _ = self._equal(*args)
            return found_first, found_last
        if name == "by group":
            return self.interval(args[self._number])
        if name == "and":
            for part in args:
                lower, upper = self.interval(part)
                first, last = torch.maximum(first, lower), torch.minimum(last, upper)
            return first, last
        if name == "or":
            first, last = first + self.num_keys, last * 0 - 1
            for part in args:
                lower, upper = self.interval(part)
                some = self._size(lower, upper) > 0
                first = torch.where(some, torch.minimum(first, lower), first)
                last = torch.where(some, torch.maximum(last, upper), last)
            return first, last
        assert name in ("nothing", "valid"), f"unknown form {name}"
        return first, last

    def is_contiguous(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...]
    ) -> Tensor:
        """Whether the columns whose values equal a row's are neighbours, ``[B, Q]``."""
        first, last, count = self._equal(of_row, of_column, False)
        fits = _pair_fits(*self._compared(of_row, of_column))
        return fits & ((count == 0) | (self._size(first, last) == count))

    def is_connected(self, forms: tuple[Form, ...]) -> Tensor:
        """Whether the intervals of several forms join to one, ``[B, Q]``."""
        first, last = self.interval(forms[0])
        connected = torch.ones_like(self.b + self.q, dtype=torch.bool)
        for form in forms[1:]:
            lower, upper = self.interval(form)
            empty, other_empty = self._size(first, last) <= 0, self._size(lower, upper) <= 0
            touch = self._size(last.minimum(upper) + 1, first.maximum(lower) - 1) <= 0
            connected = connected & (empty | other_empty | touch)
            first, last = (
                torch.where(empty, lower, torch.where(other_empty, first, first.minimum(lower))),
                torch.where(empty, upper, torch.where(other_empty, last, last.maximum(upper))),
            )
        return connected

    def _size(self, first: Tensor, last: Tensor) -> Tensor:
        """Return how many columns there are from first to last, ``[B or 1, Q]``."""
        if self._ranks is None:
            return last + 1 - first
        begin, end = (edge.expand(len(self.b), self.q.shape[1]) for edge in (first, last + 1))
        return self._ranks.gather(1, end) - self._ranks.gather(1, begin)

    def _compared(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the values of rows and columns that must be equal; columns of the group are."""
        rows = [self.row(value) for value in of_row]
        columns = [self.column(value) for value in of_column]
        if self._group is not None:
            rows.append(self.row(True))
            columns.append(self._group)
        return rows, columns

    def _equal(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...], is_sorted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first and last column whose values equal a row's, and how many do."""
        row, column = _as_one_number(*self._compared(of_row, of_column))
        if is_sorted and self._group is None:
            order = self.k.expand_as(column)
            values = column.contiguous()
        else:
            values, order = torch.sort(column, dim=-1, stable=True)
        begin = torch.searchsorted(values, row.contiguous())
        end = torch.searchsorted(values, row.contiguous(), right=True)
        some = begin < end
        # The sort is stable: equal values stay in the order of their columns.
        first = order.gather(1, begin.clamp(max=self.num_keys - 1))
        last = order.gather(1, (end - 1).clamp(min=0))
        return torch.where(some, first, self.num_keys), torch.where(some, last, -1), end - begin


def conjuncts(form: Form) -> tuple[Form, ...]:
    """Return the forms that all must allow a key."""
    return form[1:] if form[0] == "and" else (form,)


def _as_one_number(rows: list[Tensor], columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join several integer values of each row, and of each column, in one: equal if all are."""
    row, column = rows[0].to(torch.int64), columns[0].to(torch.int64)
    for next_row, next_column in zip(rows[1:], columns[1:], strict=True):
        next_row, next_column = next_row.to(torch.int64), next_column.to(torch.int64)
        lowest = torch.minimum(next_row.min(), next_column.min())
        size = torch.maximum(next_row.max(), next_column.max()) - lowest + 1
        row = row * size + (next_row - lowest)
        column = column * size + (next_column - lowest)
    return row, column


def _pair_fits(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Whether :func:`_as_one_number` cannot overflow, 0-d."""
    fits = torch.ones((), dtype=torch.bool, device=rows[0].device)
    if len(rows) == 1:
        return fits
    product = torch.ones((), dtype=torch.float64, device=rows[0].device)
    for row, column in zip(rows, columns, strict=True):
        row, column = row.to(torch.float64), column.to(torch.float64)
        product = product * (1 + torch.maximum(row.abs().max(), column.abs().max()) * 2)
    return fits & (product < _MAX_PAIR)


def _are_consecutive(positions: Expression, ids: Expression) -> Tensor:
    """Whether positions ``[B or 1, T]`` grow by one within each run of ids, 0-d."""
    positions = _per_token(positions)
    grows = torch.eq(positions[:, 1:] - positions[:, :-1], 1)
    if ids is None:
        return torch.all(grows)
    ids = _per_token(ids)
    step = torch.sub(ids[:, 1:], ids[:, :-1])
    return ((step > 0) | ((step == 0) & grows)).all()


def _per_token(given: Tensor | tuple[Any, ...]) -> Tensor:
    """Return a tensor, or the one that indices choose of it, as ``[B or 1, T]``."""
    tensor = given[0][given[1:]] if isinstance(given, tuple) else given
    return tensor.reshape(-1, tensor.shape[-1])


def map_tensors(expression: Expression, function: Callable[[Tensor], Tensor]) -> Expression:
    """Return an expression, or a form, with ``function`` applied to its tensors."""
    if isinstance(expression, Tensor):
        return function(expression)
    if not isinstance(expression, tuple):
        return expression
    return tuple(map_tensors(part, function) for part in expression)
