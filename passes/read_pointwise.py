"""Read operations that compute element by element, or make tensors of numbers and ranges.

Each function returns what a node holds as an expression of the node's dimensions, or raises
``CannotReadError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from blindsight.attention.base_mask import Expression
from blindsight.passes.expressions import (
    FOLD,
    MAX_LEAVES,
    NEGATED,
    and_,
    arithmetic,
    bare_axes_of,
    choose,
    choose_on_leaves,
    is_constant,
    leaves_of,
    not_,
    on_leaves,
    or_,
    where,
)
from blindsight.passes.mask_values import (
    CannotReadError,
    Operand,
    Reader,
    Shape,
    Value,
    aligned,
    cast_to,
    kind_of,
    kind_of_dtype,
    never_overflows,
    number,
)
from blindsight.passes.names import FILLS
from blindsight.passes.read_views import is_natural

FULLS = ("full", "new_full", "full_like", "tensor", "scalar_tensor")


def read_fill(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read zeros, ones and the like, or a tensor of one given number."""
    if name in FILLS:
        return number(FILLS[name], dtype)
    at = {"tensor": 0, "scalar_tensor": 0, "new_full": 2}.get(name, 1)
    fill = node.kwargs.get("fill_value", node.args[at] if len(node.args) > at else None)
    if not is_constant(fill):
        raise CannotReadError
    return number(fill, dtype)


def read_arange(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read a range of whole numbers."""
    args, kwargs = list(node.args), node.kwargs
    if len(args) == 1 and "end" not in kwargs:
        args.insert(0, 0)
    start = reader.operand(kwargs.get("start", args[0] if args else 0))
    step = reader.operand(kwargs.get("step", args[2] if len(args) > 2 else 1))
    whole = type(step) is int and (type(start) is int or isinstance(start, fx.Node))
    if not whole or dtype not in (torch.int32, torch.int64):
        raise CannotReadError
    return arithmetic("add", arithmetic("mul", ("index", 0), step), start)


def read_triangle(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read ``tril`` and ``triu``."""
    value = reader.operand(node.args[0])
    diagonal = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(value, Value) or not isinstance(diagonal, int) or len(shape) < 2:
        raise CannotReadError
    row, column = ("index", len(shape) - 2), ("index", len(shape) - 1)
    edge = arithmetic("add", row, diagonal)
    inside = ("le" if name == "tril" else "ge", column, edge)
    if value.kind == "bool":
        return and_(inside, value.expression)
    if leaves_of(value.expression) is None:
        raise CannotReadError
    return where(inside, value.expression, number(0, dtype))


def read_select(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read ``where`` and ``masked_fill``."""
    if len(node.args) != 3 or node.kwargs:
        raise CannotReadError
    condition, a, b = (reader.operand(arg) for arg in node.args)
    if name == "masked_fill":
        condition, a, b = a, b, condition
    elif node.op == "call_method" or node.target is torch.Tensor.where:
        condition, a = a, condition
    if not isinstance(condition, Value) or condition.kind != "bool":
        raise CannotReadError
    chosen = [cast_to(aligned(x, shape), kind_of(x), dtype) for x in (a, b)]
    select = choose if dtype == torch.bool else where
    return select(aligned(condition, shape), chosen[0], chosen[1])


def read_pointwise(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read arithmetic, comparisons and logic."""
    operands = [reader.operand(arg) for arg in node.args]
    if name == "rsub":
        name, operands = "sub", operands[::-1]
    if name in ("div", "rshift"):
        name, operands = "floordiv", _floored(node, name, operands)
    elif node.kwargs:
        raise CannotReadError
    kinds = {kind_of(operand) for operand in operands}
    parts = [aligned(operand, shape) for operand in operands]
    if name in ("and", "or", "xor", "not"):
        return _logic(name, kinds, parts)
    if name in ("abs", "neg"):
        if kinds != {"int"} or not never_overflows(name, dtype, parts):
            raise CannotReadError
        return (name, parts[0])
    if len(parts) != 2:
        raise CannotReadError
    a, b = parts
    leaves = leaves_of(a), leaves_of(b)
    if leaves[0] is not None and leaves[1] is not None:
        if "complex" in kinds or len(leaves[0]) * len(leaves[1]) > MAX_LEAVES:
            raise CannotReadError
        return _fold(name, operands, parts, dtype)
    if name in NEGATED:
        if any(_may_be_narrowed(operand, _compared_in(operands)) for operand in operands):
            raise CannotReadError
        return _comparison(name, operands, kinds, parts)
    if kinds == {"bool"} and dtype == torch.bool and name == "mul":
        return and_(a, b)
    if kinds != {"int"} or not never_overflows(name, dtype, (a, b)):
        raise CannotReadError
    if name in ("floordiv", "mod") and not (type(b) is int and b > 0):
        raise CannotReadError
    return arithmetic(name, a, b)


def _floored(node: fx.Node, name: str, operands: list[Operand]) -> list[Operand]:
    """Return the operands of the ``floordiv`` that a division or a shift to the right is."""
    rounding = node.kwargs.get("rounding_mode")
    if len(operands) != 2 or set(node.kwargs) - {"rounding_mode"}:
        raise CannotReadError
    a, b = operands
    if name == "rshift":
        # A shift by more bits than there are, or fewer than none, depends on the machine.
        if kind_of(a) != "int" or type(b) is not int or not 0 <= b < 31:
            raise CannotReadError
        return [a, 2**b]
    # Of what is not negative both are the same.
    is_same = isinstance(a, Value) and a.kind == "int" and is_natural(a.expression)
    if rounding != "floor" and not (rounding == "trunc" and is_same):
        raise CannotReadError
    return [a, b]


def _logic(name: str, kinds: set[str], parts: Sequence[Expression]) -> Expression:
    # logical_and of numbers asks whether they are zero; bitwise_and does not.
    if kinds != {"bool"}:
        raise CannotReadError
    if name == "not":
        return not_(parts[0])
    if len(parts) != 2:
        raise CannotReadError
    a, b = parts
    if name == "xor":
        return choose(a, not_(b), b)
    return and_(a, b) if name == "and" else or_(a, b)


def _fold(
    name: str, operands: Sequence[Operand], parts: Sequence[Any], dtype: torch.dtype
) -> Expression:
    """Compute with numbers that conditions choose, in the precision of the graph."""
    function = FOLD[name]

    def compute(a: Any, b: Any) -> Any:
        if a != a or b != b or (name in ("floordiv", "mod") and b == 0):
            raise CannotReadError
        return number(function(a, b), dtype)

    if name not in NEGATED:
        return on_leaves(parts[0], lambda a: on_leaves(parts[1], lambda b: compute(a, b)))
    narrow = [
        operand.dtype
        for operand in operands
        if isinstance(operand, Value) and operand.kind == "float"
    ]

    common = _compared_in(operands)

    def compare(a: Any, b: Any) -> bool:
        if kind_of_dtype(common) == "int":  # or it would wrap
            a, b = number(a, common), number(b, common)
        # A number may be rounded before it is compared; it must not matter.
        found = {bool(function(number(a, d), number(b, d))) for d in narrow}
        if a != a or b != b or found - {function(a, b)}:
            raise CannotReadError
        return bool(function(a, b))

    return choose_on_leaves(parts[0], lambda a: choose_on_leaves(parts[1], lambda b: compare(a, b)))


def _compared_in(operands: Sequence[Operand]) -> torch.dtype:
    """Return the dtype in which two operands are compared: a tensor of one number has no say."""
    a, b = (
        torch.empty((1,) * len(x.shape), dtype=x.dtype, device="meta")
        if isinstance(x, Value)
        else 0
        if isinstance(x, fx.Node)
        else x
        for x in operands
    )
    return torch.result_type(a, b)


def _may_be_narrowed(operand: Operand, common: torch.dtype) -> bool:
    """Whether a dtype may not hold all that a tensor or size of its kind does."""
    kind = kind_of(operand)
    if kind not in ("int", "float") or kind != kind_of_dtype(common):
        return False
    if not isinstance(operand, Value):
        is_size = isinstance(operand, fx.Node)
        return is_size and torch.iinfo(common).max < torch.iinfo(torch.int32).max
    if kind == "float":
        few_bits = torch.finfo(common).bits <= torch.finfo(operand.dtype).bits
        return few_bits and common != operand.dtype
    # A number that is known is looked at instead, whatever its dtype.
    if leaves_of(operand.expression) is not None:
        return any(number(leaf, common) != leaf for leaf in leaves_of(operand.expression) or ())
    ours, its = torch.iinfo(common), torch.iinfo(operand.dtype)
    return ours.min > its.min or ours.max < its.max


def _comparison(
    name: str, operands: Sequence[Operand], kinds: set[str], parts: Sequence[Expression]
) -> Expression:
    a, b = parts
    if kinds == {"bool"} and name in ("eq", "ne"):
        same = choose(a, b, not_(b))
        return same if name == "eq" else not_(same)
    # A number is cast to the integers that it is compared with: it wraps where it does not fit.
    for tensor, other in (operands, operands[::-1]):
        if isinstance(tensor, Value) and tensor.kind == "int" and type(other) is int:
            limits = torch.iinfo(tensor.dtype)
            if not limits.min <= other <= limits.max:
                raise CannotReadError
    # Mixed with floats, integers are rounded before they are compared.
    if kinds != {"int"} and (bare_axes_of(a) or bare_axes_of(b)):
        raise CannotReadError
    return (name, a, b)
