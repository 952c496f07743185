"""Which nodes of a graph may share memory, and which write into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from blindsight.passes.expressions import ARITHMETIC, NEGATED
from blindsight.passes.graph import IN_PLACE_OPERATORS, fake_tensor, traced_value
from blindsight.passes.names import FILLS, name_of

# Results that never share memory with an argument; what is in no table may.
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
            if name_of(node) in _FRESH:
                continue
            # What writes into an argument returns that.
            written = overwritten(node)
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
    if node.op not in ("call_function", "call_method"):
        return []
    name, target = name_of(node), node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", target)
    if isinstance(target, torch._ops.OpOverload):
        return node.all_input_nodes if target._schema.is_mutable else []
    if isinstance(target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes if "mutation" in name else []
    found = [node.kwargs["out"]] if "out" in node.kwargs else []
    writes = name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    if writes or node.kwargs.get("inplace") is True:
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if all(isinstance(written, fx.Node) for written in found):
        return cast(list[fx.Node], found)
    return node.all_input_nodes


def storage_of(node: object) -> int | None:
    """Return a number that tells the memory of a node's tensor from others', as it was traced.

    None where the node has no tensor, or one that does not show its memory, as in a vmap.
    """
    tensor = fake_tensor(node)
    try:
        return None if tensor is None else int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None
