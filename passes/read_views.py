"""Operations of a mask's graph that only show a tensor in another way: views, casts, indices, vmap.

Each function returns the expression of a node's dimensions, or raises that it cannot.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from blindsight.attention.base_mask import Expression
from blindsight.passes.expressions import arithmetic, axes_of, is_op, substitute
from blindsight.passes.graph import fake_tensor, same_size, traced_value
from blindsight.passes.mask_values import (
    CannotReadError,
    NotUnderstoodError,
    Reader,
    Shape,
    Value,
    aligned,
    cast_to,
)

INDICES = ("getitem", "index", "slice", "select")
SAME_VALUES = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy")
CASTS = (
    *("to", "_to_copy", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16"),
    "double",
)
RESHAPES = (
    *("unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "view", "reshape"),
    *("transpose", "swapaxes", "permute", "t"),
)
# Of these the memory is that of another tensor.
VIEWS = {"getitem", "slice", "select", *RESHAPES}


def read_view(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read what leaves all elements, in another shape or dtype."""
    value = reader.operand(node.args[0])
    if not isinstance(value, Value) or _moves(node):
        raise CannotReadError
    if dtype != value.dtype:
        if name not in CASTS:
            raise CannotReadError
        return cast_to(value.expression, value.kind, dtype)
    if name in CASTS or name in SAME_VALUES:
        return value.expression
    rank = len(value.shape)
    if name in ("expand", "expand_as", "broadcast_to"):
        return aligned(value, shape)
    if name in ("transpose", "swapaxes", "permute", "t"):
        order = _order(node, name, rank)
        axes = {old: ("index", new) for new, old in enumerate(order)}
        return substitute(value.expression, axes)
    # The others only add and drop dimensions of size one, or are not understood.
    old = [axis for axis in range(rank) if not same_size(value.shape[axis], 1)]
    new = [axis for axis in range(len(shape)) if not same_size(shape[axis], 1)]
    if len(old) != len(new) or not all(
        same_size(value.shape[a], shape[b]) for a, b in zip(old, new, strict=True)
    ):
        raise CannotReadError
    return substitute(value.expression, {a: ("index", b) for a, b in zip(old, new, strict=True)})


def read_getitem(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Read ``tensor[...]``, and what ATen makes of it."""
    value = reader.operand(node.args[0])
    if not isinstance(value, Value):
        raise CannotReadError
    index = _index_of_dim(node, name) if name in ("slice", "select") else node.args[1]
    parts = list(index) if isinstance(index, tuple | list) else [index]
    if isinstance(index, list) and name == "getitem":
        raise CannotReadError
    if name == "index":
        parts = [slice(None) if part is None else part for part in parts]
    given = sum(part is not None and part is not Ellipsis for part in parts)
    missing = [slice(None)] * (len(value.shape) - given)
    if Ellipsis in [part for part in parts if not isinstance(part, fx.Node)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = missing
    else:
        parts += missing
    tensors = [isinstance(part, fx.Node) and fake_tensor(part) is not None for part in parts]
    if any(tensors):
        return _advanced(reader, node, value, parts, tensors)
    axes: dict[Any, Expression] = {}
    old = new = 0
    for part in parts:
        if part is None:
            new += 1
            continue
        if isinstance(part, slice):
            axes[old] = arithmetic("add", ("index", new), _slice_start(part, value.shape[old]))
            new += 1
        elif type(part) is int:
            axes[old] = _from_start(part, value.shape[old])
        else:
            raise CannotReadError
        old += 1
    return substitute(value.expression, axes)


def _advanced(
    reader: Reader, node: fx.Node, value: Value, parts: list[Any], tensors: list[bool]
) -> Expression:
    """Read ``tensor[indices]`` with tensors among the indices."""
    for part, is_tensor in zip(parts, tensors, strict=True):
        if not is_tensor and part != slice(None) and part is not None:
            raise CannotReadError
    indices = [reader.read(parts[at]) for at, is_tensor in enumerate(tensors) if is_tensor]
    if any(index.kind != "int" for index in indices):
        raise CannotReadError
    rank = max(len(index.shape) for index in indices)
    places = [place for place, is_tensor in enumerate(tensors) if is_tensor]
    adjacent = places == list(range(places[0], places[-1] + 1))
    start = places[0] if adjacent else 0
    axes: dict[Any, Expression] = {}
    old, new = 0, 0 if adjacent else rank
    counted = False
    remaining = iter(indices)
    for part, is_tensor in zip(parts, tensors, strict=True):
        if is_tensor:
            if adjacent and not counted:
                new, counted = new + rank, True
            index = next(remaining)
            shift = start + rank - len(index.shape)
            axes[old] = substitute(
                index.expression,
                {axis: ("index", axis + shift) for axis in range(len(index.shape))},
            )
            old += 1
            continue
        if part is not None:
            axes[old] = ("index", new)
            old += 1
        new += 1
    # An index below zero counts from the end: the expression of a position knows no end.
    if all(_is_direct(value, axis) or is_natural(index) for axis, index in axes.items()):
        return substitute(value.expression, axes)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if reader.is_hidden(source):
        raise CannotReadError
    return ("load", source, tuple(axes[axis] for axis in range(len(value.shape))))


def read_batch_dim(
    reader: Reader, node: fx.Node, name: str, shape: Shape, dtype: torch.dtype
) -> Expression:
    """Give the axis that vmap hides a name, or its place in the result."""
    tensor, second, third, *rest = node.args
    value = reader.operand(tensor)
    if not isinstance(value, Value) or not isinstance(second, int):
        raise NotUnderstoodError("vmap over something that is no tensor")
    rank = len(value.shape)
    if name == "_add_batch_dim":
        dim, level = second % rank, cast(int, third)
        hidden = reader.level_of(node, level)
        axes: dict[int | str, Expression] = {
            axis: ("index", axis - 1) for axis in range(dim + 1, rank)
        }
        axes[dim] = ("index", hidden)
    else:
        level, dim = second, cast(int, rest[0]) % (rank + 1)
        axes = {axis: ("index", axis + 1) for axis in range(dim, rank)}
        axes[reader.level_of(node, level)] = ("index", dim)
    return substitute(value.expression, axes)


def _moves(node: fx.Node) -> bool:
    """Whether a node copies its input to another device, where all else of the mask is."""
    before, after = fake_tensor(node.args[0]), fake_tensor(node)
    return before is not None and after is not None and before.device != after.device


def _order(node: fx.Node, name: str, rank: int) -> list[int]:
    """Return which old dimension each new one is."""
    if node.kwargs:
        raise CannotReadError
    order = list(range(rank))
    if name == "permute":
        given = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        return [cast(int, dim) % rank for dim in given]
    if name == "t":
        return order[::-1]
    a, b = (cast(int, dim) % rank for dim in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order


def _index_of_dim(node: fx.Node, name: str) -> list[Any]:
    """Return the index that ATen's ``slice`` or ``select`` stands for."""
    if node.kwargs:
        raise CannotReadError
    _, dim, *rest = (*node.args, 0) if len(node.args) == 1 else node.args
    fake = fake_tensor(node.args[0])
    if fake is None or not isinstance(dim, int) or fake_tensor(rest and rest[0]) is not None:
        raise CannotReadError
    part = rest[0] if name == "select" else slice(*(rest + [None] * 3)[:3])
    return [slice(None)] * (dim % fake.dim()) + [part]


def _slice_start(part: slice, size: Any) -> int:
    if part.step not in (None, 1) or not (part.start is None or type(part.start) is int):
        raise CannotReadError
    return 0 if part.start is None else _from_start(part.start, size, clip=True)


def _from_start(index: int, size: Any, *, clip: bool = False) -> int:
    if index >= 0:
        return index
    if type(size) is not int:
        raise CannotReadError
    return max(index + size, 0) if clip else index + size


def _is_direct(value: Value, axis: int) -> bool:
    """Whether a value is a plain load in which a dimension is one of the tensor's own."""
    if same_size(value.shape[axis], 1):
        return True
    if not is_op(value.expression, "load"):
        return False
    _, node, indices = value.expression
    fake = fake_tensor(node)
    return fake is not None and all(
        index == ("index", axis) and same_size(fake.shape[dim], value.shape[axis])
        for dim, index in enumerate(indices)
        if axis in axes_of(index)
    )


def is_natural(expression: Expression) -> bool:
    """Whether an integer is known not to be negative."""
    if type(expression) is int:
        return expression >= 0
    if isinstance(expression, fx.Node):
        size = traced_value(expression)
        return isinstance(size, torch.SymInt) and bool(size.node.expr.is_nonnegative)
    if is_op(expression, "index"):
        return True
    if is_op(expression, "add", "mul", "floordiv", "min"):
        return all(is_natural(part) for part in expression[1:])
    return is_op(expression, "abs")
