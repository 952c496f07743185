"""Check, at each call, what the proof of a mask assumes of the data.

The tensors in question are computed from a graph's inputs as the graph does, without the rest of
it: they are ids, positions and paddings, O(T).

Shapes: B batch, Q and K lengths of queries and keys, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from blindsight.attention.base_mask import CAUSAL, Tier
from blindsight.attention.form_intervals import base_mask_of, facts_hold
from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.intervals import groups_of_keys
from blindsight.attention.packing import is_packed
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import ancestors, placeholders
from blindsight.passes.memory import MemoryGroups, overwritten
from blindsight.runtime.history import History
from blindsight.runtime.plan import Plan, PlannedCall


class DataCheck:
    """Looks at the data of the masks of one graph.

    Args:
        plan: Of the graph.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._keys = [_key(call.attention) for call in plan.calls]
        # Calls with the same mask are looked at once.
        self._calls: dict[object, PlannedCall] = {}
        for key, call in zip(self._keys, plan.calls, strict=True):
            if call.lifted.tier is Tier.INTERVALS:
                self._calls.setdefault(key, call)
        self._of_facts = _Extract(plan.gm, [call.lifted.facts for call in self._calls.values()])
        self._of_forms = _Extract(plan.gm, [call.lifted.form for call in self._calls.values()])

    @property
    def names(self) -> str:
        """The kinds of facts that the graph's proofs rest on."""
        facts = {fact[0] for call in self._calls.values() for fact in call.lifted.facts}
        return ", ".join(sorted(facts))

    def facts_hold(self, args: Sequence[Any], *, by_groups_of: History | None = None) -> bool:
        """Whether all facts hold for these inputs of the graph.

        Args:
            args: The graph's inputs.
            by_groups_of: If given, of each group of keys (text, sinks, other tokens of spans) of
                this sequence alone.
        """
        if not any(call.lifted.facts for call in self._calls.values()):
            return True
        forms = [call.lifted.form for call in self._calls.values()]
        if by_groups_of is not None and any(form and is_packed(form) for form in forms):
            return False
        size_of, device = self._plan.size_of(args), self._plan.device
        values = self._of_facts(args)
        for facts, call in zip(values, self._calls.values(), strict=True):
            if not facts:
                continue
            sizes, groups = call.attention.sizes(size_of), None
            if by_groups_of is not None:
                tokens = by_groups_of.on(device).tensors()
                groups = groups_of_keys(*tokens, sizes["num_keys"])
            if not bool(facts_hold(facts, **sizes, device=device, groups=groups)):
                return False
        return True

    def plain_causal(self, args: Sequence[Any], given: Mapping[str, BaseMask]) -> list[bool]:
        """Return which of the graph's calls mean ``is_causal``, for these inputs.

        Args:
            args: The graph's inputs, for which the facts hold.
            given: Masks that are inputs of the graph and turned out to be intervals, by name.
        """
        size_of = self._plan.size_of(args)
        values = self._of_forms(args)
        answers: dict[object, bool] = {}
        for (key, call), form in zip(self._calls.items(), values, strict=True):
            sizes = call.attention.sizes(size_of)
            if form == CAUSAL and sizes["num_keys"] >= sizes["num_queries"]:
                answers[key] = True  # without looking at data
                continue
            base = base_mask_of(form, device=self._plan.device, groups=None, **sizes)
            answers[key] = means_is_causal(base)
        for key, call in zip(self._keys, self._plan.calls, strict=True):
            node = call.lifted.given
            if node is not None and node.name in given:
                answers[key] = means_is_causal(given[node.name])
        return [answers.get(key, False) for key in self._keys]


def means_is_causal(base: BaseMask) -> bool:
    """Whether query row i sees key columns 0..i, all of them."""
    num_queries = base.lower.shape[1]
    if base.valid.shape[1] < num_queries:
        return False
    row = torch.arange(num_queries, device=base.lower.device)
    # A given mask's intervals begin at the first column that is seen.
    is_causal = (base.lower <= 0).all() & (base.upper == row).all()
    return bool(is_causal & base.valid[:, :num_queries].all())


def _key(attention: Attention) -> object:
    return attention.attn_mask, attention.is_causal, *map(str, attention.lengths)


class _Extract:
    """Computes the nodes in some values (nested tuples) from the inputs of their graph."""

    def __init__(self, gm: fx.GraphModule, values: Sequence[Any]) -> None:
        self._values = values
        self._nodes: list[fx.Node] = []
        map_arg(tuple(values), self._nodes.append)
        self._module = _extract(gm, self._nodes) if self._nodes else None

    def __call__(self, args: Sequence[Any]) -> list[Any]:
        """Return the values with tensors for nodes."""
        if self._module is None:
            return list(self._values)
        tensors: dict[fx.Node, Tensor] = dict(zip(self._nodes, self._module(*args), strict=True))
        return [map_arg(value, tensors.__getitem__) for value in self._values]


def _extract(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a module of the graph's inputs that computes these nodes only.

    What the graph writes in place is written, too, and never into an input.
    """
    whole = list(gm.graph.nodes)
    before = whole[: max(map(whole.index, nodes)) + 1]
    memory = MemoryGroups(whole)
    needed = {node for wanted in nodes for node in ancestors(wanted)}
    read = {memory.find(node) for node in needed}
    # Nobody may read what a write returns, and what it has written all the same.
    while writers := [
        node
        for node in before
        if node not in needed and any(memory.find(x) in read for x in overwritten(node))
    ]:
        needed |= {node for writer in writers for node in ancestors(writer)}
        read = {memory.find(node) for node in needed}
    written = {memory.find(x) for node in needed for x in overwritten(node)}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inputs = placeholders(gm)
    for node in inputs:
        copied[node] = graph.node_copy(node)
    for node in inputs:
        if node in needed and memory.find(node) in written:
            copied[node] = graph.call_method("clone", (copied[node],))
    for node in whole:
        if node in needed and node.op != "placeholder":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in nodes))
    return fx.GraphModule(gm, graph)
