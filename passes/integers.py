"""Comparisons of integers, as bounds on the key column.

The language is that of :mod:`blindsight.attention.base_mask`, with nodes in place of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from blindsight.attention.base_mask import Expression, Form
from blindsight.passes.expressions import (
    ARITHMETIC,
    FOLD,
    MIRRORED,
    NEGATED,
    and_,
    arithmetic,
    axes_of,
    is_op,
    loads_of,
    not_,
    or_,
)
from blindsight.passes.graph import fake_tensor
from blindsight.passes.mask_values import Value

_MAX_BOUND = 2**60  # beyond any column, and safe to add to


def normalized(expression: Expression, *, negate: bool = False) -> Expression:
    """Return a boolean expression with its negations at the leaves and ``abs`` written out.

    Args:
        expression: A boolean expression.
        negate: Return its negation instead.
    """
    if isinstance(expression, bool):
        return expression != negate
    name = expression[0] if isinstance(expression, tuple) else ""
    if name == "not":
        return normalized(expression[1], negate=not negate)
    if name in ("and", "or"):
        join = and_ if (name == "and") != negate else or_
        a, b = expression[1:]
        return join(normalized(a, negate=negate), normalized(b, negate=negate))
    if name not in NEGATED or not is_integer_comparison(expression):
        return not_(expression) if negate else expression
    if negate:
        name = NEGATED[name]
    a, b = expression[1:]
    if is_op(b, "abs") and not is_op(a, "abs"):
        a, b = b, a
        name = MIRRORED.get(name, name)
    if is_op(a, "abs") and not is_op(b, "abs") and name in MIRRORED:
        join = and_ if name in ("le", "lt") else or_
        return join((name, a[1], b), (MIRRORED[name], a[1], ("neg", b)))
    constant = _constant_comparison(name, a, b)
    return (name, a, b) if constant is None else constant


def _constant_comparison(name: str, a: Expression, b: Expression) -> bool | None:
    """Return the value of a comparison that is the same for every token, else None."""
    difference = linear_terms(("sub", a, b))
    constant = difference.pop(None, 0)
    if not difference:
        return bool(FOLD[name](constant, 0))
    natural = all(is_op(term, "index") and factor > 0 for term, factor in difference.items())
    if natural and ((name == "ge" and constant >= 0) or (name == "gt" and constant > 0)):
        return True
    if natural and ((name == "lt" and constant >= 0) or (name == "le" and constant > 0)):
        return False
    return None


def _is_integer(expression: Expression) -> bool:
    if type(expression) is int or isinstance(expression, fx.Node):
        return True
    if not isinstance(expression, tuple):
        return False
    if expression[0] == "load":
        fake = fake_tensor(expression[1])
        return fake is not None and Value(0, (), fake.dtype).kind == "int"
    if expression[0] == "where":
        return all(_is_integer(part) for part in expression[2:])
    return expression[0] == "index" or (
        expression[0] in (*ARITHMETIC, "neg", "abs")
        and all(_is_integer(part) for part in expression[1:])
    )


def is_integer_comparison(expression: Expression) -> bool:
    """Whether an expression compares two integers."""
    return is_op(expression, *NEGATED) and all(_is_integer(part) for part in expression[1:])


def linear_terms(expression: Expression) -> dict[Expression | None, int]:
    """Return the factor of each term of a sum; the factor of None is the constant."""
    if type(expression) is int:
        return {None: expression}
    terms: dict[Expression | None, int] = {}
    if is_op(expression, "add", "sub", "neg"):
        parts = [linear_terms(part) for part in expression[1:]]
        signs = {"add": (1, 1), "sub": (1, -1), "neg": (-1,)}[expression[0]]
        for sign, part in zip(signs, parts, strict=True):
            for term, factor in part.items():
                terms[term] = terms.get(term, 0) + sign * factor
        return {term: factor for term, factor in terms.items() if factor}
    if is_op(expression, "mul"):
        a, b = (linear_terms(part) for part in expression[1:])
        if set(a) - {None}:
            a, b = b, a
        if not set(a) - {None}:
            scale = a.get(None, 0)
            return {term: scale * factor for term, factor in b.items() if scale * factor}
    return {expression: 1}


def _sum(terms: Mapping[Expression | None, int]) -> Expression:
    """Return the expression of a sum; its data is clamped, so that adding to it is safe."""
    result: Expression = 0
    for term, factor in terms.items():
        if term is None:
            continue
        if (len(terms) > 1 or factor != 1) and loads_of(term):
            term = ("max", ("min", term, _MAX_BOUND), -_MAX_BOUND)
        if factor < 0:
            scaled = term if factor == -1 else ("mul", term, -factor)
            result = ("neg", scaled) if result == 0 else ("sub", result, scaled)
        else:
            scaled = term if factor == 1 else ("mul", term, factor)
            result = arithmetic("add", result, scaled)
    return arithmetic("add", result, terms.get(None, 0))


def column_bounds(part: Expression) -> list[Form] | None:
    """Return the bounds that a comparison sets on the key column, or None if it sets none."""
    if not is_integer_comparison(part) or part[0] == "ne":
        return None
    difference = linear_terms(("sub", part[1], part[2]))
    column = ("index", "k")
    slope = difference.pop(column, 0)
    if slope == 0 or any("k" in axes_of(term) for term in difference):
        return None
    name = part[0]
    if slope < 0:
        difference = {term: -factor for term, factor in difference.items()}
        name = MIRRORED.get(name, name)
        slope = -slope
    if slope != 1:
        return None
    # From here: column + difference <name> 0.
    limit = {term: -factor for term, factor in difference.items()}
    if name in ("lt", "gt"):
        limit[None] = limit.get(None, 0) + (-1 if name == "lt" else 1)
    edge = _sum({term: factor for term, factor in limit.items() if factor})
    forms: list[Form] = []
    if name in ("le", "lt", "eq"):
        forms.append(("upper", edge))
    if name in ("ge", "gt", "eq"):
        forms.append(("lower", edge))
    return forms


def direction(expression: Expression) -> int:
    """Return how a value changes with the column: 1 never down, -1 never up, 0 is not known."""
    if "k" not in axes_of(expression):
        return 1
    name = expression[0]
    if name == "index":
        return 1
    if name == "neg":
        return -direction(expression[1])
    if name in ("add", "sub"):
        first, second = (direction(part) for part in expression[1:])
        if name == "sub":
            second = -second
        if "k" not in axes_of(expression[1]):
            return second
        if "k" not in axes_of(expression[2]):
            return first
        return first if first == second else 0
    if name in ("mul", "floordiv") and type(expression[2]) is int and expression[2] > 0:
        return direction(expression[1])
    return 0
