"""Read the nodes that build a mask as one expression of batch row, query row and key column.

Every node becomes an expression of its own dimensions; views, broadcasting and vmap rename them.
Nothing here is a guess: a node that is not understood becomes a load from the tensor that it gives.

Shapes: B batch, H heads, Q query rows, K key columns, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import fx

from blindsight.attention.base_mask import Expression
from blindsight.passes.expressions import (
    FOLD,
    axes_of,
    bare_axes_of,
    choose_on_leaves,
    is_constant,
    is_op,
    leaves_of,
    loads_of,
    substitute,
)
from blindsight.passes.graph import fake_tensor, same_size, traced_value
from blindsight.passes.mask_values import (
    CannotReadError,
    NotUnderstoodError,
    Operand,
    Reader,
    Shape,
    Value,
)
from blindsight.passes.memory import MemoryGroups, overwritten
from blindsight.passes.names import FILLS, name_of
from blindsight.passes.read_pointwise import (
    FULLS,
    read_arange,
    read_fill,
    read_pointwise,
    read_select,
    read_triangle,
)
from blindsight.passes.read_views import (
    CASTS,
    INDICES,
    RESHAPES,
    SAME_VALUES,
    VIEWS,
    read_batch_dim,
    read_getitem,
    read_view,
)
from blindsight.passes.sequence_ids import SequenceIds

_OPERATIONS: dict[str, Callable[[Reader, fx.Node, str, Shape, torch.dtype], Expression]] = {
    **dict.fromkeys((*FILLS, *FULLS), read_fill),
    "arange": read_arange,
    **dict.fromkeys(("tril", "triu"), read_triangle),
    **dict.fromkeys(("where", "masked_fill"), read_select),
    **dict.fromkeys(
        (*FOLD, "and", "or", "xor", "not", "abs", "neg", "rsub", "div", "rshift"), read_pointwise
    ),
    **dict.fromkeys((*RESHAPES, *SAME_VALUES, *CASTS), read_view),
    **dict.fromkeys(INDICES, read_getitem),
    **dict.fromkeys(("_add_batch_dim", "_remove_batch_dim"), read_batch_dim),
}


class MaskReader:
    """Reads the nodes of a graph as expressions."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._nodes = list(gm.graph.nodes)
        self._position = {node: position for position, node in enumerate(self._nodes)}
        self._nesting = _nesting(self._nodes)
        self._values: dict[fx.Node, Value] = {}
        self._uses: dict[fx.Node, set[fx.Node]] = {}
        self._reading: set[fx.Node] = set()  # what the value in hand rests on
        self._sizes: dict[str, fx.Node] = {}

    @cached_property
    def _memory(self) -> MemoryGroups:
        return MemoryGroups(self._nodes)

    @cached_property
    def sequence_ids(self) -> SequenceIds:
        """The nodes whose values can be ids of packed sequences."""
        return SequenceIds(self._nodes)

    @cached_property
    def _writers(self) -> list[fx.Node]:
        return [node for node in self._nodes if overwritten(node)]

    def made_by(self, node: fx.Node) -> fx.Node:
        """Return the node that computes what a chain of views shows."""
        while name_of(node) in VIEWS:
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
        """Raise if a tensor may change between where the graph reads it and where we would.

        Args:
            mask: The mask, which has been read.
            before: The node before which what was read is evaluated.
            call: The attention call that uses the mask.

        Raises:
            NotUnderstoodError: Something writes into such a tensor.
        """
        groups = self._memory
        ours = {groups.find(node) for node in self._uses[mask]}
        # The mask may also be changed after it was made, until it is used.
        masks = groups.find(mask)
        for node in self._writers:
            if self._position[node] >= self._position[call]:
                break
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
        except CannotReadError:
            return self._leaf(node, shape, dtype)
        ones = {axis: 0 for axis, size in enumerate(shape) if same_size(size, 1)}
        value = Value(substitute(expression, ones), shape, dtype)
        return self._leaf(node, shape, dtype) if self._is_plain_data(node, value) else value

    def _leaf(self, node: fx.Node, shape: Shape, dtype: torch.dtype) -> Value:
        if self.is_hidden(node):
            raise NotUnderstoodError(f"{name_of(node)} inside a vmap is not understood")
        self._reading = {node}  # and not on what the graph computes it from
        indices = tuple(
            0 if same_size(size, 1) else ("index", axis) for axis, size in enumerate(shape)
        )
        return Value(("load", node, indices), shape, dtype)

    def is_hidden(self, node: fx.Node) -> bool:
        """Whether a node inside a vmap depends on what vmap hides."""
        if not self._nesting[node]:
            return False
        if name_of(node) == "_add_batch_dim":
            return True
        hidden = set(self._nesting[node])
        return any(
            self.is_hidden(parent)
            if fake_tensor(parent) is None
            else bool(axes_of(self.read(parent).expression) & hidden)
            for parent in node.all_input_nodes
        )

    def _is_plain_data(self, node: fx.Node, value: Value) -> bool:
        """Whether an expression only computes with tables of tokens, element by element."""
        expression = value.expression
        is_table = len(value.shape) <= 2 and not bare_axes_of(expression)
        if not is_table or is_op(expression, "load") or name_of(node) in VIEWS:
            return False
        if leaves_of(expression) is not None:
            return False
        full = {axis for axis, size in enumerate(value.shape) if not same_size(size, 1)}
        loads = loads_of(expression)
        return bool(loads) and all(axes_of(load) == full for load in loads)

    # What the reading of one operation asks for.

    def _expression(self, node: fx.Node, shape: Shape, dtype: torch.dtype) -> Expression:
        name = name_of(node)
        is_call = node.op in ("call_function", "call_method")
        if not is_call or "out" in node.kwargs or name not in _OPERATIONS:
            raise CannotReadError
        return _OPERATIONS[name](self, node, name, shape, dtype)

    def operand(self, argument: object) -> Operand:
        if isinstance(argument, fx.Node):
            is_size = fake_tensor(argument) is None
            return self._size(argument) if is_size else self.read(argument)
        if is_constant(argument):
            return cast("bool | int | float", argument)
        raise CannotReadError

    def _size(self, node: fx.Node) -> fx.Node:
        """Return one node for all that hold the same symbolic size."""
        value = traced_value(node)
        if not isinstance(value, torch.SymInt):
            raise CannotReadError
        self._reading.add(node)
        return self._sizes.setdefault(str(value), node)

    def level_of(self, node: fx.Node, level: int) -> str:
        nesting = self._nesting[node]
        if not 1 <= level <= len(nesting):
            raise NotUnderstoodError("a level of vmap is not in the graph")
        return nesting[level - 1]


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
    """Return whether (b, q, k) is allowed, from a mask that broadcasts to [B, H, Q, K].

    Raises:
        NotUnderstoodError: It is a bias other than 0 and -inf, or differs from head to head.
    """
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
    """Return why an expression cannot do without a tensor of queries x keys, or None if it can."""
    for load in loads_of(expression):
        if {"q", "k"} <= axes_of(load):
            node = load[1]
            if node.op == "placeholder":
                return f"the mask is an input of the graph: {node.name}"
            return f"{name_of(node)} is not understood: {node.name}"
    return None
