"""Read the nodes that build a mask as one expression of batch row, query row and key column.

Every node becomes an expression of its own dimensions; views, broadcasting and vmap rename them.
What is not understood is a load from the tensor as it is: nothing here is a guess.

Shapes: B batch, H heads, Q query rows, K key columns, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from blindsight.attention.base_mask import Expression
from blindsight.passes.expressions import (
    FLIPPED,
    FOLD,
    MAX_LEAVES,
    and_,
    arithmetic,
    axes_of,
    bare_axes_of,
    choose,
    choose_on_leaves,
    is_constant,
    is_op,
    leaves_of,
    loads_of,
    not_,
    on_leaves,
    or_,
    substitute,
    where,
)
from blindsight.passes.graph import fake_tensor, same_size
from blindsight.passes.memory import MemoryGroups, overwritten
from blindsight.passes.names import FILLS, name_of

_Axis = int | str  # a dimension of a node, a level of vmap, or "b", "h", "q", "k"

_SAME_VALUES = {"contiguous", "clone", "detach", "alias", "lift_fresh_copy"}
_CASTS = {
    *("to", "_to_copy", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16"),
    "double",
}
_VIEWS = {
    *("getitem", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "view", "reshape"),
    *("transpose", "swapaxes", "permute", "t", "slice", "select"),
}


class NotUnderstoodError(Exception):
    """The mask is opaque; says why."""


@dataclass(frozen=True)
class Value:
    """What a node holds: an expression of its dimensions, ``("index", 0)`` and so on.

    No dimension of size one appears in it. Inside a vmap the shape is what a function sees, and
    the axes that vmap hides have names of their own.
    """

    expression: Expression
    shape: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        if self.dtype == torch.bool:
            return "bool"
        if self.dtype.is_floating_point:
            return "float"
        return "complex" if self.dtype.is_complex else "int"


_Operand = Value | bool | int | float | fx.Node  # a node is a symbolic size


class _CannotReadError(Exception):
    """An operation is not understood; its result may still be loaded from."""


class MaskReader:
    """Reads nodes as expressions."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._nodes = list(gm.graph.nodes)
        self._position = {node: position for position, node in enumerate(self._nodes)}
        self._nesting = _nesting(self._nodes)
        self._values: dict[fx.Node, Value] = {}
        self._uses: dict[fx.Node, set[fx.Node]] = {}
        self._reading: set[fx.Node] = set()  # what the value in hand rests on
        self._sizes: dict[str, fx.Node] = {}

    def made_by(self, node: fx.Node) -> fx.Node:
        """Return the node that computes what a chain of views shows."""
        while name_of(node) in _VIEWS:
            source, *others = node.all_input_nodes
            if any(fake_tensor(other) is not None for other in others):
                break
            node = source
        return node

    def first_after(self, node: fx.Node) -> fx.Node:
        """Return the first node after another that is outside of any vmap and of the inputs."""
        position = self._position[node] + 1
        after: fx.Node = self._nodes[position]
        while self._nesting[after] or after.op in ("placeholder", "get_attr"):
            position += 1
            after = self._nodes[position]
        return after

    def check_not_overwritten(self, mask: fx.Node, before: fx.Node, call: fx.Node) -> None:
        """Raise where a tensor changes between where the graph reads it and where we would."""
        groups = MemoryGroups(self._nodes)
        ours = {groups.find(node) for node in self._uses[mask]}
        # The mask may also be changed after it was made, until it is used.
        masks = groups.find(mask)
        for node in self._nodes[: self._position[call]]:
            for target in overwritten(node):
                group = groups.find(target)
                early = self._position[node] < self._position[before]
                if group == masks or (early and group in ours):
                    raise NotUnderstoodError(
                        f"{name_of(node)} writes into a tensor that the mask uses"
                    )

    def read(self, node: fx.Node) -> Value:
        if node not in self._values:
            outer, self._reading = self._reading, {node}
            self._values[node] = self._compute(node)
            self._uses[node], self._reading = self._reading, outer
        self._reading |= self._uses[node]
        return self._values[node]

    def _compute(self, node: fx.Node) -> Value:
        fake = fake_tensor(node)
        if fake is None or fake.layout != torch.strided:
            raise NotUnderstoodError(f"{name_of(node)} gives no dense tensor")
        shape, dtype = tuple(fake.shape), fake.dtype
        try:
            expression = self._expression(node, shape, dtype)
        except _CannotReadError:
            return self._leaf(node, shape, dtype)
        ones = {axis: 0 for axis, size in enumerate(shape) if same_size(size, 1)}
        value = Value(substitute(expression, ones), shape, dtype)
        return self._leaf(node, shape, dtype) if self._is_plain_data(node, value) else value

    def _leaf(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> Value:
        if self._is_hidden(node):
            raise NotUnderstoodError(f"{name_of(node)} inside a vmap is not understood")
        self._reading = {node}  # and not on what the graph computes it from
        indices = tuple(
            0 if same_size(size, 1) else ("index", axis) for axis, size in enumerate(shape)
        )
        return Value(("load", node, indices), shape, dtype)

    def _is_hidden(self, node: fx.Node) -> bool:
        """Whether a node inside a vmap depends on what vmap hides."""
        if not self._nesting[node]:
            return False
        if name_of(node) == "_add_batch_dim":
            return True
        hidden = set(self._nesting[node])
        return any(
            self._is_hidden(parent)
            if fake_tensor(parent) is None
            else bool(axes_of(self.read(parent).expression) & hidden)
            for parent in node.all_input_nodes
        )

    def _is_plain_data(self, node: fx.Node, value: Value) -> bool:
        """Whether an expression only computes with tables of tokens, element by element."""
        expression = value.expression
        is_table = len(value.shape) <= 2 and not bare_axes_of(expression)
        if not is_table or is_op(expression, "load") or name_of(node) in _VIEWS:
            return False
        if leaves_of(expression) is not None:
            return False
        full = {axis for axis, size in enumerate(value.shape) if not same_size(size, 1)}
        loads = loads_of(expression)
        return bool(loads) and all(axes_of(load) == full for load in loads)

    # One operation.

    def _expression(self, node: fx.Node, shape: tuple[Any, ...], dtype: torch.dtype) -> Expression:
        if node.op not in ("call_function", "call_method"):
            raise _CannotReadError
        name = name_of(node)
        if "out" in node.kwargs:
            raise _CannotReadError
        if name in ("_add_batch_dim", "_remove_batch_dim"):
            return self._batch_dim(node, name)
        if name in ("getitem", "index", "slice", "select"):
            return self._getitem(node, name)
        if name in _VIEWS or name in _SAME_VALUES or name in _CASTS:
            return self._view(node, name, shape, dtype)
        if name in FILLS:
            return _number(FILLS[name], dtype)
        if name in ("full", "new_full", "full_like", "tensor", "scalar_tensor"):
            at = {"tensor": 0, "scalar_tensor": 0, "new_full": 2}.get(name, 1)
            fill = node.kwargs.get("fill_value", node.args[at] if len(node.args) > at else None)
            if not is_constant(fill):
                raise _CannotReadError
            return _number(fill, dtype)
        if name == "arange":
            return self._arange(node, dtype)
        if name in ("tril", "triu"):
            return self._triangle(node, name, shape, dtype)
        if name in ("where", "masked_fill"):
            return self._select(node, name, shape, dtype)
        if name in FOLD or name in ("and", "or", "xor", "not", "abs", "neg", "rsub", "div"):
            return self._pointwise(node, name, shape, dtype)
        raise _CannotReadError

    def _operand(self, argument: object) -> _Operand:
        if isinstance(argument, fx.Node):
            is_size = fake_tensor(argument) is None
            return self._size(argument) if is_size else self.read(argument)
        if is_constant(argument):
            return cast("bool | int | float", argument)
        raise _CannotReadError

    def _size(self, node: fx.Node) -> fx.Node:
        """Return one node for all that hold the same symbolic size."""
        value = node.meta.get("example_value", node.meta.get("val"))
        if not isinstance(value, torch.SymInt):
            raise _CannotReadError
        self._reading.add(node)
        return self._sizes.setdefault(str(value), node)

    def _aligned(self, operand: _Operand, shape: tuple[Any, ...]) -> Expression:
        """Return an operand as an expression of the dimensions of a result."""
        if not isinstance(operand, Value):
            return operand
        shift = len(shape) - len(operand.shape)
        if shift == 0:
            return operand.expression
        return substitute(
            operand.expression,
            {axis: ("index", axis + shift) for axis in range(len(operand.shape))},
        )

    def _batch_dim(self, node: fx.Node, name: str) -> Expression:
        """Give the axis that vmap hides a name, or its place in the result."""
        tensor, second, third, *rest = node.args
        value = self._operand(tensor)
        if not isinstance(value, Value) or not isinstance(second, int):
            raise NotUnderstoodError("vmap over something that is no tensor")
        rank = len(value.shape)
        if name == "_add_batch_dim":
            dim, level = second % rank, cast(int, third)
            hidden = self._level(node, level)
            axes: dict[_Axis, Expression] = {
                axis: ("index", axis - 1) for axis in range(dim + 1, rank)
            }
            axes[dim] = ("index", hidden)
        else:
            level, dim = second, cast(int, rest[0]) % (rank + 1)
            axes = {axis: ("index", axis + 1) for axis in range(dim, rank)}
            axes[self._level(node, level)] = ("index", dim)
        return substitute(value.expression, axes)

    def _level(self, node: fx.Node, level: int) -> str:
        nesting = self._nesting[node]
        if not 1 <= level <= len(nesting):
            raise NotUnderstoodError("a level of vmap is not in the graph")
        return nesting[level - 1]

    def _arange(self, node: fx.Node, dtype: torch.dtype) -> Expression:
        args, kwargs = list(node.args), node.kwargs
        if len(args) == 1 and "end" not in kwargs:
            args.insert(0, 0)
        start = self._operand(kwargs.get("start", args[0] if args else 0))
        step = self._operand(kwargs.get("step", args[2] if len(args) > 2 else 1))
        whole = type(step) is int and (type(start) is int or isinstance(start, fx.Node))
        if not whole or dtype not in (torch.int32, torch.int64):
            raise _CannotReadError
        return arithmetic("add", arithmetic("mul", ("index", 0), step), start)

    def _triangle(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        value = self._operand(node.args[0])
        diagonal = node.kwargs.get("diagonal", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(value, Value) or not isinstance(diagonal, int) or len(shape) < 2:
            raise _CannotReadError
        row, column = ("index", len(shape) - 2), ("index", len(shape) - 1)
        edge = arithmetic("add", row, diagonal)
        inside = ("le" if name == "tril" else "ge", column, edge)
        if value.kind == "bool":
            return and_(inside, value.expression)
        if leaves_of(value.expression) is None:
            raise _CannotReadError
        return where(inside, value.expression, _number(0, dtype))

    def _select(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        if len(node.args) != 3 or node.kwargs:
            raise _CannotReadError
        condition, a, b = (self._operand(arg) for arg in node.args)
        if name == "masked_fill":
            condition, a, b = a, b, condition
        elif node.op == "call_method" or node.target is torch.Tensor.where:
            condition, a = a, condition
        if not isinstance(condition, Value) or condition.kind != "bool":
            raise _CannotReadError
        chosen = [self._cast(self._aligned(x, shape), _kind(x), dtype) for x in (a, b)]
        select = choose if dtype == torch.bool else where
        return select(self._aligned(condition, shape), chosen[0], chosen[1])

    def _cast(self, expression: Expression, kind: str, dtype: torch.dtype) -> Expression:
        """Return a value in another dtype."""
        if dtype == torch.bool:
            if kind == "bool":
                return expression
            if leaves_of(expression) is not None:
                return choose_on_leaves(expression, bool)
            return ("ne", expression, 0)
        if kind == "bool":
            return where(expression, _number(1, dtype), _number(0, dtype))
        if leaves_of(expression) is not None:
            return on_leaves(expression, lambda leaf: _number(leaf, dtype))
        # Positions fit in 32 bits; data may not.
        safe = dtype == torch.int64 or (dtype == torch.int32 and not loads_of(expression))
        if kind == "int" and safe:
            return expression
        raise _CannotReadError

    def _pointwise(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        operands = [self._operand(arg) for arg in node.args]
        if name == "div" and node.kwargs == {"rounding_mode": "floor"}:
            name = "floordiv"
        elif node.kwargs or name == "div":
            raise _CannotReadError
        if name == "rsub":
            name, operands = "sub", operands[::-1]
        kinds = {_kind(operand) for operand in operands}
        parts = [self._aligned(operand, shape) for operand in operands]
        if name in ("and", "or", "xor", "not"):
            if name == "not" and kinds == {"bool"}:
                return not_(parts[0])
            # logical_and of numbers asks whether they are zero; bitwise_and does not.
            if len(parts) != 2 or kinds != {"bool"}:
                raise _CannotReadError
            if name == "xor":
                return choose(parts[0], not_(parts[1]), parts[1])
            return (and_ if name == "and" else or_)(parts[0], parts[1])
        if name in ("abs", "neg"):
            if kinds != {"int"} or not _is_safe(dtype, parts):
                raise _CannotReadError
            return (name, parts[0])
        if len(parts) != 2:
            raise _CannotReadError
        constants = [leaves_of(part) for part in parts]
        if constants[0] is not None and constants[1] is not None:
            if len(constants[0]) * len(constants[1]) > MAX_LEAVES:
                raise _CannotReadError
            return self._fold(name, operands, parts, dtype)
        if name in FLIPPED:
            return self._comparison(name, kinds, parts)
        if kinds == {"bool"} and dtype == torch.bool and name == "mul":
            return and_(parts[0], parts[1])
        if kinds != {"int"} or not _is_safe(dtype, parts):
            raise _CannotReadError
        if name in ("floordiv", "mod") and not (type(parts[1]) is int and parts[1] > 0):
            raise _CannotReadError
        return arithmetic(name, parts[0], parts[1])

    def _fold(
        self, name: str, operands: Sequence[_Operand], parts: Sequence[Any], dtype: torch.dtype
    ) -> Expression:
        """Compute with numbers that conditions choose, in the precision of the graph."""
        kinds = {_kind(operand) for operand in operands}
        if "complex" in kinds:
            raise _CannotReadError
        function = FOLD[name]

        def compute(a: Any, b: Any) -> Any:
            if a != a or b != b or (name in ("floordiv", "mod") and b == 0):
                raise _CannotReadError
            return _number(function(a, b), dtype)

        if name not in FLIPPED:
            return on_leaves(parts[0], lambda a: on_leaves(parts[1], lambda b: compute(a, b)))
        narrow = [
            operand.dtype
            for operand in operands
            if isinstance(operand, Value) and operand.kind == "float"
        ]

        def compare(a: Any, b: Any) -> bool:
            # A number may be rounded before it is compared; it must not matter.
            found = {bool(function(_number(a, d), _number(b, d))) for d in narrow}
            if a != a or b != b or found - {function(a, b)}:
                raise _CannotReadError
            return bool(function(a, b))

        return choose_on_leaves(
            parts[0], lambda a: choose_on_leaves(parts[1], lambda b: compare(a, b))
        )

    def _comparison(self, name: str, kinds: set[str], parts: list[Expression]) -> Expression:
        if kinds == {"bool"} and name in ("eq", "ne"):
            same = choose(parts[0], parts[1], not_(parts[1]))
            return same if name == "eq" else not_(same)
        # Mixed with floats, integers are rounded before they are compared.
        if kinds != {"int"} and any(bare_axes_of(part) for part in parts):
            raise _CannotReadError
        return (name, parts[0], parts[1])

    # Views and indices.

    def _view(
        self, node: fx.Node, name: str, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> Expression:
        value = self._operand(node.args[0])
        if not isinstance(value, Value) or _moves(node):
            raise _CannotReadError
        if dtype != value.dtype:
            if name not in _CASTS:
                raise _CannotReadError
            return self._cast(value.expression, value.kind, dtype)
        if name in _CASTS or name in _SAME_VALUES:
            return value.expression
        rank = len(value.shape)
        if name in ("expand", "expand_as", "broadcast_to"):
            return self._aligned(value, shape)
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
            raise _CannotReadError
        return substitute(
            value.expression, {a: ("index", b) for a, b in zip(old, new, strict=True)}
        )

    def _getitem(self, node: fx.Node, name: str) -> Expression:
        value = self._operand(node.args[0])
        if not isinstance(value, Value):
            raise _CannotReadError
        index = _index_of_dim(node, name) if name in ("slice", "select") else node.args[1]
        parts = list(index) if isinstance(index, tuple | list) else [index]
        if isinstance(index, list) and name == "getitem":
            raise _CannotReadError
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
            return self._advanced(node, value, parts, tensors)
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
                raise _CannotReadError
            old += 1
        return substitute(value.expression, axes)

    def _advanced(
        self, node: fx.Node, value: Value, parts: list[Any], tensors: list[bool]
    ) -> Expression:
        """Read ``tensor[indices]`` with tensors among the indices."""
        for part, is_tensor in zip(parts, tensors, strict=True):
            if not is_tensor and part != slice(None) and part is not None:
                raise _CannotReadError
        indices = [self.read(parts[at]) for at, is_tensor in enumerate(tensors) if is_tensor]
        if any(index.kind != "int" for index in indices):
            raise _CannotReadError
        rank = max(len(index.shape) for index in indices)
        places = [place for place, is_tensor in enumerate(tensors) if is_tensor]
        adjacent = places == list(range(places[0], places[-1] + 1))
        start = places[0] if adjacent else 0
        axes: dict[Any, Expression] = {}
        old, new = 0, 0 if adjacent else rank
        counted = False
        aligned = iter(indices)
        for part, is_tensor in zip(parts, tensors, strict=True):
            if is_tensor:
                if adjacent and not counted:
                    new, counted = new + rank, True
                index = next(aligned)
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
        if self._is_hidden(source):
            raise _CannotReadError
        return ("load", source, tuple(axes[axis] for axis in range(len(value.shape))))


def _kind(operand: _Operand) -> str:
    if isinstance(operand, Value):
        return operand.kind
    return "int" if isinstance(operand, fx.Node) else type(operand).__name__


def _number(value: Any, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of a dtype holds it."""
    if dtype.is_complex:
        raise _CannotReadError
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(torch.tensor(float(value), dtype=dtype))
    if not math.isfinite(value) or not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
        raise _CannotReadError
    return int(value)


def _is_safe(dtype: torch.dtype, parts: Sequence[Expression]) -> bool:
    """Whether integers of a dtype may be computed with as if they had no limits."""
    return dtype == torch.int64 or (
        dtype == torch.int32 and not any(loads_of(part) for part in parts)
    )


def _moves(node: fx.Node) -> bool:
    """Whether a node copies its input to another device, where all else of the mask is."""
    before, after = fake_tensor(node.args[0]), fake_tensor(node)
    return before is not None and after is not None and before.device != after.device


def _order(node: fx.Node, name: str, rank: int) -> list[int]:
    """Return which old dimension each new one is."""
    if node.kwargs:
        raise _CannotReadError
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
        raise _CannotReadError
    _, dim, *rest = (*node.args, 0) if len(node.args) == 1 else node.args
    fake = fake_tensor(node.args[0])
    if fake is None or not isinstance(dim, int) or fake_tensor(rest and rest[0]) is not None:
        raise _CannotReadError
    part = rest[0] if name == "select" else slice(*(rest + [None] * 3)[:3])
    return [slice(None)] * (dim % fake.dim()) + [part]


def _slice_start(part: slice, size: Any) -> int:
    if part.step not in (None, 1) or not (part.start is None or type(part.start) is int):
        raise _CannotReadError
    return 0 if part.start is None else _from_start(part.start, size, clip=True)


def _from_start(index: int, size: Any, *, clip: bool = False) -> int:
    if index >= 0:
        return index
    if type(size) is not int:
        raise _CannotReadError
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
        size = expression.meta.get("example_value", expression.meta.get("val"))
        return isinstance(size, torch.SymInt) and bool(size.node.expr.is_nonnegative)
    if is_op(expression, "index"):
        return True
    if is_op(expression, "add", "mul", "floordiv", "min"):
        return all(is_natural(part) for part in expression[1:])
    return is_op(expression, "abs")


def _nesting(nodes: Sequence[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """Return the vmaps around each node, the outermost first."""
    around: dict[fx.Node, tuple[str, ...]] = {}
    stack: tuple[str, ...] = ()
    for node in nodes:
        if name_of(node) == "_vmap_increment_nesting":
            stack = (*stack, f"vmap {node.name}")
        around[node] = stack
        if name_of(node) == "_vmap_decrement_nesting":
            stack = stack[:-1]
    return around


def over_named_axes(value: Value) -> Expression:
    """Return whether (b, q, k) is allowed, from a mask that broadcasts to [B, H, Q, K]."""
    names = ("b", "h", "q", "k")[4 - min(len(value.shape), 4) :]
    if len(value.shape) > 4:
        raise NotUnderstoodError("the mask has more than four dimensions")
    expression = substitute(
        value.expression, {axis: ("index", name) for axis, name in enumerate(names)}
    )
    if value.kind == "float":
        leaves = leaves_of(expression)
        if leaves is None:
            raise NotUnderstoodError("the mask is a bias that is not understood")
        lowest = torch.finfo(value.dtype).min
        if not all(leaf == 0 or leaf <= lowest for leaf in leaves):
            raise NotUnderstoodError("the mask is a bias other than 0 and -inf")
        expression = choose_on_leaves(expression, lambda leaf: bool(leaf == 0))
    elif value.kind != "bool":
        raise NotUnderstoodError("the mask is neither bool nor float")
    if "h" in axes_of(expression):
        raise NotUnderstoodError("the mask differs from head to head")
    return expression


def opaque_part(expression: Expression) -> str | None:
    """Return why an expression still needs a tensor of queries x keys, if it does."""
    for load in loads_of(expression):
        if {"q", "k"} <= axes_of(load):
            node = load[1]
            if node.op == "placeholder":
                return f"the mask is an input of the graph: {node.name}"
            return f"{name_of(node)} is not understood: {node.name}"
    return None
