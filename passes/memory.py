"""Which nodes of a graph may share memory, and which write into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from blindsight.passes.expressions import ARITHMETIC, NEGATED
from blindsight.passes.graph import fake_tensor, traced_value
from blindsight.passes.names import FILLS, name_of

# Names in the operator module that write into their first argument.
_IN_PLACE_OPERATORS = {
    *("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "imatmul", "iconcat"),
}
_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)
# Results that never share memory with an argument but an ``out``; what is in no table may.
_FRESH = {
    *("and", "or", "xor", "not", "abs", "neg", "where", "masked_fill", "arange", "full"),
    *("new_full", "full_like", "tril", "triu", "scalar_tensor", "tensor", "rsub", "cumsum"),
    *("diff", "sum", "pad", "roll", "embedding", "linear", "matmul", "cat", "stack", "rand"),
    *("index", "scaled_dot_product_attention"),
    *NEGATED,
    *ARITHMETIC,
    *FILLS,
}


class MemoryGroups:
    """Which nodes may share memory; errs on the side of sharing."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._leader = {node: node for node in nodes}
        for node in nodes:
            written = overwritten(node)
            if name_of(node) in _FRESH and not written:
                continue
            # What writes into an argument returns that.
            for parent in written or node.all_input_nodes:
                if written or _may_share(node, parent):
                    self._leader[self.find(parent)] = self.find(node)

    def find(self, node: fx.Node) -> fx.Node:
        while self._leader[node] is not node:
            self._leader[node] = self._leader[self._leader[node]]
            node = self._leader[node]
        return node


def _may_share(node: fx.Node, parent: fx.Node) -> bool:
    """Whether a result may be a view of an argument."""
    result, argument = fake_tensor(node), fake_tensor(parent)
    if argument is None:
        # An element of what a split returned, say, or a size.
        return isinstance(traced_value(parent), tuple | list)
    if result is None:
        return node.op != "output"
    return result.dtype == argument.dtype or name_of(node).startswith("view")


def overwritten(node: fx.Node) -> list[fx.Node]:
    """Return the tensors that a node writes into."""
    if not _writes(node):
        return []
    if isinstance(_operator(node), _OPERATORS):
        return node.all_input_nodes
    found = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    if _is_in_place(node):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if all(isinstance(written, fx.Node) for written in found):
        return cast(list[fx.Node], found)
    return node.all_input_nodes


def acts(node: fx.Node) -> bool:
    """Whether a node may have an effect other than its result."""
    # Those that enter and leave a vmap are there for their effect alone.
    return _writes(node) or "nesting" in getattr(node.target, "__name__", "")


def _writes(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    target = _operator(node)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "mutation" in name_of(node)
    return node.kwargs.get("out") is not None or _is_in_place(node)


def _is_in_place(node: fx.Node) -> bool:
    """Whether a function or method that is no operator of ATen's writes into its first argument."""
    name = name_of(node)
    by_name = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    return by_name or bool(node.kwargs.get("inplace"))


def _operator(node: fx.Node) -> object:
    """Return what a node calls: of several overloads the default one."""
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return getattr(node.target, "default", node.target)
    return node.target


def storage_of(node: object) -> int | None:
    """Return a number that tells the memory of a node's tensor from others', as it was traced.

    None where the node has no tensor, or one that does not show its memory, as in a vmap.
    """
    tensor = fake_tensor(node)
    try:
        return None if tensor is None else int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None
