"""Which form the masks of a prompt take: what may be used, and what lists the fewest blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from blindsight.base_mask import facts_hold
from blindsight.block_tables import prompt_order_lists_less
from blindsight.categories import NUM_CATEGORIES
from blindsight.intervals import sorted_bounds
from blindsight.masks import causal_base, keep_intervals
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import ancestors, fake_tensor
from blindsight.passes.replace_attention import MaskForm
from blindsight.plan import Plan
from blindsight.runtime import History


class FactCheck:
    """What the interval forms of a graph's masks rest on, checked on the inputs of every call.

    The tensors in question are computed from the graph's inputs as the graph does, without the
    rest of it: they are ids and positions, O(T).
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._checks: dict[object, tuple[tuple[Any, ...], Attention]] = {}
        for call in plan.calls:
            if call.lifted.facts:
                key = (call.attention.attn_mask, str(_num_keys(call.attention)))
                self._checks.setdefault(key, (call.lifted.facts, call.attention))
        self._nodes: list[fx.Node] = []
        for facts, _ in self._checks.values():
            _map_nodes(facts, self._nodes.append)
        self._module = _extract(plan.gm, self._nodes) if self._nodes else None

    @property
    def names(self) -> str:
        return ", ".join(sorted({fact[0] for facts, _ in self._checks.values() for fact in facts}))

    def hold(self, args: Sequence[Any]) -> bool:
        """Whether all facts hold for these inputs of the graph."""
        if not self._checks:
            return True
        values: dict[fx.Node, Any] = {}
        if self._module is not None:
            values = dict(zip(self._nodes, self._module(*args), strict=True))
        size_of = self._plan.size_of(args)
        for facts, attention in self._checks.values():
            held = facts_hold(
                _map_nodes(facts, values.__getitem__),
                **attention.sizes(size_of),
                device=self._plan.device,
            )
            if not bool(held):
                return False
        return True


def best_form(history: History, num_queries: int, categories: Tensor) -> MaskForm:
    """Return the token order that lists fewer blocks for heads of these categories.

    Judged for a causal base mask, once per prompt. Either is exact.

    Args:
        history: The whole sequence.
        num_queries: Q, the last tokens of it.
        categories: Codes of all heads that run.
    """
    num_heads = torch.bincount(categories.flatten().long(), minlength=NUM_CATEGORIES).tolist()
    key = ("form", num_queries, tuple(num_heads))
    if key not in history.memo:
        span_id, is_sink = history.template.tensors()
        batch, num_tokens = span_id.shape
        base = causal_base(batch, num_queries, num_tokens, num_tokens)
        keep = keep_intervals(span_id, is_sink, num_queries, num_tokens)
        bounds, _ = sorted_bounds(base, span_id, is_sink, num_queries, num_tokens)
        less = prompt_order_lists_less(base, keep, bounds, num_heads)
        history.memo[key] = MaskForm.ORDERED if less else MaskForm.SORTED
    form: MaskForm = history.memo[key]
    return form


def _num_keys(attention: Attention) -> object:
    key = fake_tensor(attention.key)
    return None if key is None else key.shape[2]


def _map_nodes(value: Any, function: Any) -> Any:
    """Return nested tuples with ``function`` applied to their nodes."""
    if isinstance(value, fx.Node):
        return function(value)
    return (
        tuple(_map_nodes(item, function) for item in value) if isinstance(value, tuple) else value
    )


def _extract(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a module of the graph's inputs that computes these nodes only."""
    needed = {node for wanted in nodes for node in ancestors(wanted)}
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].meta = copy.copy(node.meta)
    graph.output(tuple(copied[node] for node in nodes))
    return fx.GraphModule(gm, graph)
