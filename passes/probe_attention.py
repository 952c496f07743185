"""Measure, beside each attention call of a graph, what heads of each category would lose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import fx

from blindsight.attention.base_mask import Tier
from blindsight.calibration.probe import Losses, ProbedCall
from blindsight.calibration.visibility import (
    visibility_of_expression,
    visibility_of_form,
    visibility_or_given,
)
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import add_placeholder, fake_tensor, placeholders
from blindsight.passes.lift_mask import Lifted
from blindsight.passes.replace_attention import TOKEN_INPUTS

logger = logging.getLogger(__name__)


def probe_attention_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    attention: Sequence[Attention],
    lifted: Sequence[Lifted],
    measure: Callable[..., Losses | ProbedCall],
) -> fx.GraphModule:
    """Measure the given calls; the graph's own nodes and outputs stay as they are.

    The graph gets two more inputs, the template: ``span_id [B, T]`` ints and ``is_sink [B, T]``
    bool, on any device. After its own outputs it gets one more for each call: what ``measure``
    returns. It is to be run as it is, not compiled: how measuring proceeds depends on the data.

    Args:
        gm: Edited in place; give a copy where somebody else still uses it.
        example_inputs: Not read; the usual signature of a pass.
        attention: Calls in ``gm``, from :func:`~blindsight.passes.find_attention.find_attention`.
        lifted: What each call's mask was proven to be, from
            :func:`~blindsight.passes.lift_mask.lift_mask`.
        measure: Called with the fields of a :class:`~blindsight.calibration.probe.ProbedCall`.
            That class itself, for calls that are measured later, when gradients are known.
    """
    del example_inputs
    if not attention:
        return gm
    inputs = [add_placeholder(gm, name) for name in TOKEN_INPUTS]
    templates: dict[torch.device | None, list[fx.Node]] = {}
    visibilities: dict[object, fx.Node] = {}
    losses = []
    for call, proof in zip(attention, lifted, strict=True):
        query = fake_tensor(call.query)
        device = None if query is None else query.device
        if device not in templates:
            templates[device] = [_on_device(gm, node, device) for node in inputs]
        span_id, is_sink = templates[device]
        shared = (call.attn_mask, call.is_causal, device, *map(str, call.lengths))
        if shared not in visibilities:
            visibilities[shared] = _visibility(gm, call, proof, span_id, is_sink)
        with gm.graph.inserting_after(call.node):
            node = gm.graph.call_function(
                measure,
                (
                    *(call.query, call.key, call.value, call.node),
                    *(visibilities[shared], span_id, is_sink),
                ),
                {"scale": call.scale},
            )
        node.meta["blindsight"] = f"losses of {call.where}"
        losses.append(node)
    output = gm.graph.output_node()
    output.args = ((*output.args[0], *losses),)  # type: ignore[misc]
    gm.graph.lint()
    gm.recompile()
    logger.info("probed %d attention calls, %d masks", len(attention), len(visibilities))
    return gm


def _on_device(gm: fx.GraphModule, node: fx.Node, device: torch.device | None) -> fx.Node:
    """Add a copy of an input on a device: attention may be on several."""
    if device is None:
        return node
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        return gm.graph.call_method("to", (node, device))


def _visibility(
    gm: fx.GraphModule, call: Attention, proof: Lifted, span_id: fx.Node, is_sink: fx.Node
) -> fx.Node:
    """Add what a mask lets queries see, evaluated before what it reads may be overwritten."""
    known = None
    with gm.graph.inserting_before(proof.before):
        if proof.tier is Tier.INTERVALS:
            arguments = (proof.form, proof.facts, span_id, is_sink)
            known = gm.graph.call_function(visibility_of_form, arguments)
        elif proof.tier is Tier.EXPRESSION:
            known = gm.graph.call_function(visibility_of_expression, (proof.expression, span_id))
    with gm.graph.inserting_before(call.node):
        return gm.graph.call_function(visibility_or_given, (known, call.attn_mask, span_id))
