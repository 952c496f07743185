"""Replace attention calls by FlexAttention with a mask per category of head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import fx

from blindsight.attention import category_attention, category_mask
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import add_placeholder, erase_unused, fake_tensor

logger = logging.getLogger(__name__)

# The inputs that the pass appends, in this order.
TEMPLATE_INPUTS = ("blindsight_span_id", "blindsight_is_sink", "blindsight_categories")


def replace_attention_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    attention: Sequence[Attention],
) -> fx.GraphModule:
    """Replace the given calls; every other node keeps its meaning.

    The graph gets three more inputs: ``span_id [B, T]`` int32 and ``is_sink [B, T]`` bool, the
    template, and ``categories [len(attention), H]`` int32, one row per replaced call.

    Args:
        gm: Edited in place; give a copy where somebody else still uses it.
        example_inputs: Not read; the usual signature of a pass.
        attention: Calls in ``gm``, from :func:`~blindsight.passes.find_attention.find_attention`,
            in graph order.
    """
    del example_inputs
    if not attention:
        return gm
    span_id, is_sink, categories = (add_placeholder(gm, name) for name in TEMPLATE_INPUTS)
    masks: dict[object, fx.Node] = {}
    for row, call in enumerate(attention):
        with gm.graph.inserting_before(call.node):
            # Layers with the same base mask and number of keys share one mask and its tables.
            shared = (call.attn_mask, call.is_causal, _num_keys(call))
            if shared not in masks:
                masks[shared] = _call(
                    gm,
                    call,
                    category_mask,
                    (call.query, call.key, call.attn_mask, span_id, is_sink),
                    {"is_causal": call.is_causal},
                )
            heads = gm.graph.call_method("select", (categories, 0, row))
            output = _call(
                gm,
                call,
                category_attention,
                (call.query, call.key, call.value, masks[shared], heads, call.scale),
            )
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


def _num_keys(call: Attention) -> str | None:
    """Return the number of keys as text: symbolic sizes cannot be hashed."""
    key = fake_tensor(call.key)
    return None if key is None else str(key.shape[2])
