"""Replace attention calls by FlexAttention with a mask per category of head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import fx

from blindsight.attention import (
    materialised_attention,
    materialised_mask,
    ordered_attention,
    ordered_mask,
    sorted_attention,
    sorted_mask,
)
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import add_placeholder, erase_unused, fake_tensor
from blindsight.passes.lift_mask import Lifted

logger = logging.getLogger(__name__)

# The inputs that the pass appends, in this order.
TEMPLATE_INPUTS = ("blindsight_span_id", "blindsight_is_sink", "blindsight_categories")


class MaskForm(Enum):
    """How a replaced call is masked; see :mod:`blindsight.attention`."""

    SORTED = (sorted_mask, sorted_attention)
    ORDERED = (ordered_mask, ordered_attention)
    MATERIALISED = (materialised_mask, materialised_attention)


def replace_attention_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    attention: Sequence[Attention],
    lifted: Sequence[Lifted] | None = None,
    form: MaskForm = MaskForm.SORTED,
    size_of: Callable[[int | torch.SymInt], int] = int,
) -> fx.GraphModule:
    """Replace the given calls; every other node keeps its meaning.

    The graph gets three more inputs: ``span_id [B, T]`` int32 and ``is_sink [B, T]`` bool, the
    template, and ``categories [len(attention), H]`` int32, one row per replaced call.

    Args:
        gm: Edited in place; give a copy where somebody else still uses it.
        example_inputs: Not read; the usual signature of a pass.
        attention: Calls in ``gm``, from :func:`~blindsight.passes.find_attention.find_attention`,
            in graph order.
        lifted: What each call's mask was proven to be, from
            :func:`~blindsight.passes.lift_mask.lift_mask`; without it all masks are read as the
            model made them. The facts that it rests on must hold.
        form: For masks that are known as intervals; the others are read as the model made them.
        size_of: The value of a symbolic size; the graph is then for these sizes alone.
    """
    del example_inputs
    if not attention:
        return gm
    span_id, is_sink, categories = (add_placeholder(gm, name) for name in TEMPLATE_INPUTS)
    masks: dict[object, fx.Node] = {}
    for row, call in enumerate(attention):
        proof = None if lifted is None or lifted[row].tier != 1 else lifted[row]
        make_mask, attend = (MaskForm.MATERIALISED if proof is None else form).value
        sizes = call.sizes(size_of)
        # Layers with the same base mask and number of keys share one mask and its tables.
        shared = (call.attn_mask, call.is_causal, sizes["num_keys"])
        if shared not in masks:
            base = call.attn_mask if proof is None else proof.form
            options = {"is_causal": call.is_causal} if proof is None else {}
            with gm.graph.inserting_before(call.node if proof is None else proof.before):
                template = (base, span_id, is_sink)
                masks[shared] = _call(gm, call, make_mask, template, {**sizes, **options})
        with gm.graph.inserting_before(call.node):
            heads = gm.graph.call_method("select", (categories, 0, row))
            args = (call.query, call.key, call.value, masks[shared], heads, call.scale)
            output = _call(gm, call, attend, args)
            output.meta["example_value"] = fake_tensor(call.node)
        call.node.replace_all_uses_with(output)
        unused = call.node.all_input_nodes
        gm.graph.erase_node(call.node)
        erase_unused(gm, list(unused))
    gm.graph.lint()
    gm.recompile()
    logger.info("replaced %d attention calls, %d masks", len(attention), len(masks))
    return gm


def _call(
    gm: fx.GraphModule,
    origin: Attention,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object] | None = None,
) -> fx.Node:
    """Call ``function`` in the graph, saying where in the model it comes from."""
    node = gm.graph.call_function(function, args, kwargs)  # type: ignore[arg-type]
    for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if name in origin.node.meta:
            node.meta[name] = origin.node.meta[name]
    node.meta["blindsight"] = f"{function.__name__} of {origin.path or 'the frame'}"
    return node
