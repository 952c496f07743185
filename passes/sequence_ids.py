"""Tell ids of packed sequences from what only says where a token is, such as chunks do.

Both may be computed from positions: transformers counts where positions start again, and chunked
attention divides them. So what has been done with the data decides. Numbers that were given, and
counts, name sequences; numbers that were divided, or come from no data at all, name places.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import fx

from blindsight.passes.graph import fake_tensor
from blindsight.passes.memory import overwritten
from blindsight.passes.names import name_of

# What gives many neighbours one number. Of bools, "and" is logic.
_DIVIDING = {
    *("floordiv", "mod", "rshift", "div", "true_divide", "divide", "fmod", "divmod", "and"),
    *("floor", "trunc", "round", "ceil", "frac", "fix"),
}
_COUNTING = {"cumsum", "cummax", "cummin", "repeat_interleave"}
_BOUNDARIES = {"bucketize": ("boundaries", 1), "searchsorted": ("sorted_sequence", 0)}


class _Origin(IntEnum):
    """What a tensor is computed from; of several arguments the largest counts."""

    MADE = 0  # constants, and positions that the graph makes
    GIVEN = 1
    DIVIDED = 2
    COUNTED = 3  # even if divided then: two marks a sequence may have been counted


class SequenceIds:
    """Knows of the nodes of a graph whether their values can be ids of packed sequences."""

    def __init__(self, nodes: Iterable[fx.Node]) -> None:
        self._origins: dict[fx.Node, _Origin] = {}
        for node in nodes:
            self._origins[node] = self._origin(node)
            for written in overwritten(node):
                self._origins[written] = max(self._origins[written], self._origins[node])

    def __contains__(self, node: fx.Node) -> bool:
        return self._origins[node] in (_Origin.GIVEN, _Origin.COUNTED)

    def _origin(self, node: fx.Node) -> _Origin:
        if node.op in ("placeholder", "get_attr"):
            return _Origin.GIVEN if fake_tensor(node) is not None else _Origin.MADE
        name = name_of(node).removesuffix("_")
        if name in _BOUNDARIES:
            keyword, at = _BOUNDARIES[name]
            bounds = node.kwargs.get(keyword, node.args[at] if len(node.args) > at else None)
            is_data = isinstance(bounds, fx.Node) and bounds in self
            return _Origin.COUNTED if is_data else _Origin.DIVIDED
        origin = max((self._origins[x] for x in node.all_input_nodes), default=_Origin.MADE)
        if origin is _Origin.GIVEN and name in _COUNTING:
            return _Origin.COUNTED
        if origin is _Origin.GIVEN and _divides(node, name):
            return _Origin.DIVIDED
        return origin


def _divides(node: fx.Node, name: str) -> bool:
    result = fake_tensor(node)
    if name == "mul":
        return any(isinstance(argument, float) for argument in node.args)
    return name in _DIVIDING and (result is None or result.dtype != torch.bool)
