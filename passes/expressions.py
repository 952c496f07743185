"""The expressions that a mask is read as, simplified as they are made.

Their language is that of :mod:`blindsight.attention.base_mask`, with nodes in place of tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from blindsight.attention.base_mask import Expression

MAX_LEAVES = 64  # of a nest of constants
NEGATED = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt", "eq": "ne", "ne": "eq"}
MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt"}  # the same with its sides exchanged
ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "min", "max"}
FOLD: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in (*NEGATED, "add", "sub", "mul")},
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
}


def is_constant(expression: Expression) -> bool:
    return isinstance(expression, bool | int | float)


def is_op(expression: Expression, *names: str) -> bool:
    return isinstance(expression, tuple) and expression[0] in names


def and_(a: Expression, b: Expression) -> Expression:
    if a is True or b is False:
        return b
    if b is True or a is False:
        return a
    return a if a == b else ("and", a, b)


def or_(a: Expression, b: Expression) -> Expression:
    if a is False or b is True:
        return b
    if b is False or a is True:
        return a
    return a if a == b else ("or", a, b)


def not_(a: Expression) -> Expression:
    if isinstance(a, bool):
        return not a
    return a[1] if is_op(a, "not") else ("not", a)


def where(condition: Expression, a: Expression, b: Expression) -> Expression:
    """Choose between two numbers."""
    if isinstance(condition, bool):
        return a if condition else b
    return ("where", condition, a, b)


def choose(condition: Expression, a: Expression, b: Expression) -> Expression:
    """Choose between two booleans."""
    return or_(and_(condition, a), and_(not_(condition), b))


def flatten(name: str, expression: Expression) -> list[Expression]:
    """Return the parts that a nest of one operation joins, such as those of an ``and``."""
    if not is_op(expression, name):
        return [expression]
    return [leaf for part in expression[1:] for leaf in flatten(name, part)]


def assuming(condition: Expression, known: Collection[Expression]) -> Expression:
    """Return what is left of a condition where others are known to hold."""
    if condition in known:
        return True
    if not_(condition) in known:
        return False
    if not is_op(condition, "and", "or"):
        return condition
    join = and_ if condition[0] == "and" else or_
    return join(*(assuming(part, known) for part in condition[1:]))


def leaves_of(expression: Expression) -> list[Any] | None:
    """Return the numbers that a nest of ``where`` chooses from, or None where there is more."""
    if is_constant(expression):
        return [expression]
    if not is_op(expression, "where"):
        return None
    a, b = leaves_of(expression[2]), leaves_of(expression[3])
    return None if a is None or b is None or len(a) + len(b) > MAX_LEAVES else a + b


def on_leaves(expression: Expression, function: Callable[[Any], Expression]) -> Expression:
    if is_constant(expression):
        return function(expression)
    _, condition, a, b = expression
    return where(condition, on_leaves(a, function), on_leaves(b, function))


def choose_on_leaves(expression: Expression, function: Callable[[Any], Expression]) -> Expression:
    """Return the boolean that a function of the chosen number gives."""
    if is_constant(expression):
        return function(expression)
    _, condition, a, b = expression
    return choose(condition, choose_on_leaves(a, function), choose_on_leaves(b, function))


def substitute(expression: Expression, axes: Mapping[Any, Expression]) -> Expression:
    """Return an expression with other indices in place of some axes."""
    done: dict[int, Expression] = {}

    def walk(node: Expression) -> Expression:
        if not isinstance(node, tuple):
            return node
        if id(node) not in done:
            if node[0] == "index":
                done[id(node)] = axes.get(node[1], node)
            elif node[0] == "load":
                done[id(node)] = ("load", node[1], tuple(walk(index) for index in node[2]))
            else:
                done[id(node)] = (node[0], *(walk(part) for part in node[1:]))
        return done[id(node)]

    return walk(expression)


def parts_of(expression: Expression) -> Iterator[tuple[Any, ...]]:
    """Yield all operations in an expression, each object once."""
    waiting, seen = [expression], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, tuple) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node[0], str):
            yield node
        waiting.extend(node[2] if node[0] == "load" else node[1:])


def axes_of(expression: Expression) -> frozenset[Any]:
    return frozenset(part[1] for part in parts_of(expression) if part[0] == "index")


def bare_axes_of(expression: Expression) -> frozenset[Any]:
    """Return the axes that are used as numbers, not only to load from a tensor."""
    if not isinstance(expression, tuple) or expression[0] == "load":
        return frozenset()
    if expression[0] == "index":
        return frozenset((expression[1],))
    return frozenset().union(*(bare_axes_of(part) for part in expression[1:]))


def loads_of(expression: Expression) -> list[tuple[Any, ...]]:
    return [part for part in parts_of(expression) if part[0] == "load"]


def arithmetic(name: str, a: Expression, b: Expression) -> Expression:
    """Compute with integers."""
    if type(a) is int and type(b) is int:
        return FOLD[name](a, b)
    if (name in ("add", "sub") and b == 0) or (name in ("mul", "floordiv") and b == 1):
        return a
    if name == "add" and a == 0:
        return b
    return (name, a, b)
