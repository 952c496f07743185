"""Replace attention calls by FlexAttention with a mask for each category of head.

Shapes: B batch, H query heads, T tokens of the whole sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from blindsight.attention.attend import Group, attend, attend_in_region
from blindsight.attention.base_mask import Tier
from blindsight.attention.element_masks import expressed_mask, materialised_mask
from blindsight.attention.flex import constant_rows
from blindsight.attention.mask_forms import (
    MaskForm,
    ordered_mask,
    sorted_mask,
)
from blindsight.attention.mask_operator import ordered_mask_by_operator, sorted_mask_by_operator
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import add_placeholder, fake_tensor, node_of_size
from blindsight.passes.lift_mask import Lifted
from blindsight.passes.memory import acts
from blindsight.passes.names import name_of
from blindsight.template import template_of_ids

logger = logging.getLogger(__name__)

# The inputs that rewritten graphs get, in this order; graphs that measure get the first two.
TOKEN_INPUTS = ("blindsight_span_id", "blindsight_is_sink")
HEAD_INPUTS = ("blindsight_heads", "blindsight_categories")

# Up to how many queries and keys attention is compiled for, the sizes being symbolic; None: for
# any number of them, or for that of the graph, which is fixed.
Capacity = tuple[int | None, int | None]


_MAKE_MASK: dict[MaskForm, Callable[..., object]] = {
    MaskForm.SORTED: sorted_mask,
    MaskForm.GROUPED: sorted_mask,
    MaskForm.ORDERED: ordered_mask,
    MaskForm.EXPRESSED: expressed_mask,
    MaskForm.MATERIALISED: materialised_mask,
}

_BY_OPERATOR: dict[MaskForm, Callable[..., object]] = {
    MaskForm.SORTED: sorted_mask_by_operator,
    MaskForm.GROUPED: sorted_mask_by_operator,
    MaskForm.ORDERED: ordered_mask_by_operator,
}

# What a rewritten graph calls: compile caches have to know these functions.
GRAPH_FUNCTIONS: tuple[Callable[..., object], ...] = (
    attend,
    attend_in_region,
    constant_rows,
    template_of_ids,
    *_MAKE_MASK.values(),
    *_BY_OPERATOR.values(),
)


def replace_attention_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    attention: Sequence[Attention],
    lifted: Sequence[Lifted] | None = None,
    form: MaskForm = MaskForm.SORTED,
    groups: Sequence[Sequence[Group]] | None = None,
    size_of: Callable[[int | torch.SymInt], int] = int,
    capacities: Sequence[Capacity] | None = None,
    inputs: Sequence[fx.Node] | None = None,
    in_region: bool = False,
    by_operator: bool = False,
    num_threads: int = 1,
) -> fx.GraphModule:
    """Replace the given attention calls; every other node keeps its meaning.

    Without ``inputs`` the graph gets four more: ``span_id [B, T]`` int32 and ``is_sink [B, T]``
    bool, the template, and ``heads`` int64 and ``categories`` int32, ``[len(attention), H]``: one
    row per replaced call, see :func:`~blindsight.attention.attend.attend`.

    Args:
        gm: Edited in place; give a copy where somebody else still uses it.
        example_inputs: Not read; the usual signature of a pass.
        attention: Calls in ``gm``, from :func:`~blindsight.passes.find_attention.find_attention`,
            in graph order.
        lifted: What each call's mask was proven to be, from
            :func:`~blindsight.passes.lift_mask.lift_mask`; without it all masks are read as the
            model made them. The facts that intervals rest on must hold, unless the form is
            ``EXPRESSED``.
        form: For masks that are known as intervals. One that is known as an expression is
            evaluated per element, the others are read as the model made them.
        groups: The groups of each call's heads, see :mod:`blindsight.attention.attend`; by default
            one call of FlexAttention for all heads.
        size_of: Returns the value of a symbolic size; the graph is then for these sizes alone.
        capacities: Up to how many queries and keys each call may have, in a graph for every
            length; all masks must be known as intervals, and the form must be a sorted one. None:
            the graph is for the sizes at hand.
        inputs: Nodes to use for the four inputs; only placeholders, and what these nodes are
            computed from, may come before them.
        in_region: Make the attention a region that layers alike share, so that a compiler compiles
            it once.
        by_operator: Make masks in interval form by an operator, see
            :mod:`blindsight.attention.mask_operator`.
        num_threads: Of a CPU, to which attention is dealt out, see
            :mod:`blindsight.attention.chunks`.
    """
    del example_inputs
    if not attention:
        return gm
    if inputs is None:
        inputs = [add_placeholder(gm, name) for name in (*TOKEN_INPUTS, *HEAD_INPUTS)]
    span_id, is_sink, heads, categories = inputs
    masks: dict[object, fx.Node] = {}
    outputs: dict[fx.Node, fx.Node] = {}
    for row, call in enumerate(attention):
        # Layers with the same base mask and numbers of queries and keys share one mask.
        to_number: Callable[..., object] = size_of if capacities is None else str
        shared = (call.attn_mask, call.is_causal, *map(to_number, call.lengths))
        if shared not in masks:
            masks[shared] = _make_mask(
                gm,
                call,
                None if lifted is None else lifted[row],
                form,
                template=(span_id, is_sink),
                size_of=size_of,
                capacity=None if capacities is None else capacities[row],
                by_operator=by_operator,
                num_threads=num_threads,
            )
        with gm.graph.inserting_before(call.node):
            rows = tuple(
                gm.graph.call_function(torch.select, (x, 0, row)) for x in (heads, categories)
            )
            its_groups = (("all", call.num_heads),) if groups is None else tuple(groups[row])
            tensors = (outputs.get(x, x) for x in (call.query, call.key, call.value))
            args = (*tensors, masks[shared], *rows, its_groups, call.scale)
            output = _call(gm, call, attend_in_region if in_region else attend, args)
            output.meta["example_value"] = fake_tensor(call.node)
        call.node.replace_all_uses_with(output)
        _copy_before_views(gm, output)
        outputs[call.node] = output
    # Not before: the masks of later calls are put before nodes that earlier calls may have needed.
    _erase_unused(gm, [call.node for call in attention])
    gm.graph.lint()
    gm.recompile()
    logger.info("replaced %d attention calls, %d masks", len(attention), len(masks))
    return gm


def _copy_before_views(gm: fx.GraphModule, output: fx.Node) -> None:
    """Make views of an output copies: its strides need not be those that the model's own has."""
    for user in list(output.users):
        name = name_of(user)
        if name == "view":
            with gm.graph.inserting_before(user):
                format: dict[str, Any] = {"memory_format": torch.contiguous_format}
                copy = gm.graph.call_function(torch.ops.aten.clone.default, (output,), format)
            copy.meta["example_value"] = fake_tensor(output)
            user.replace_input_with(output, copy)
        elif name in ("transpose", "permute", "swapaxes", "movedim"):
            _copy_before_views(gm, user)


def _make_mask(
    gm: fx.GraphModule,
    call: Attention,
    proof: Lifted | None,
    form: MaskForm,
    *,
    template: tuple[fx.Node, fx.Node],
    size_of: Callable[[int | torch.SymInt], int],
    capacity: Capacity | None,
    by_operator: bool,
    num_threads: int,
) -> fx.Node:
    """Add what makes the mask of a call; arguments as for :func:`replace_attention_pass`."""
    form = form.for_tier(Tier.OPAQUE if proof is None else proof.tier)
    options: dict[str, object] = {**call.sizes(size_of)}
    if proof is None or form is MaskForm.MATERIALISED:
        base: object = call.attn_mask
        before = call.node
        options["is_causal"] = call.is_causal
    else:
        base = proof.expression if form is MaskForm.EXPRESSED else proof.form
        before = proof.before
    if form is MaskForm.GROUPED:
        options["by_group"] = True
    if form.is_sorted and num_threads > 1:
        options["num_threads"] = num_threads
    functions = {**_MAKE_MASK, **_BY_OPERATOR} if by_operator else _MAKE_MASK
    with gm.graph.inserting_before(before):
        if capacity is not None:
            options["num_queries"], options["num_keys"] = (
                node_of_size(gm, length) for length in call.lengths
            )
            options["query_capacity"], options["key_capacity"] = capacity
        return _call(gm, call, functions[form], (base, *template), options)


def _call(
    gm: fx.GraphModule,
    origin: Attention,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object] | None = None,
) -> fx.Node:
    """Add a call of ``function`` to the graph, and note where in the model it comes from."""
    node = gm.graph.call_function(function, args, kwargs)  # type: ignore[arg-type]
    for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if name in origin.node.meta:
            node.meta[name] = origin.node.meta[name]
    node.meta["blindsight"] = f"{function.__name__} of {origin.where}"
    return node


def _erase_unused(gm: fx.GraphModule, candidates: list[fx.Node]) -> None:
    """Erase the candidates that nobody reads any more, and what only they used.

    Never a sweep over the whole graph: ``eliminate_dead_code`` also deletes calls that are there
    for their effect, such as those which enter and leave a vmap.
    """
    erased: set[fx.Node] = set()
    while candidates:
        node = candidates.pop()
        is_call = node.op in ("call_function", "call_method") and node not in erased
        if is_call and not node.users and not acts(node):
            candidates.extend(node.all_input_nodes)
            gm.graph.erase_node(node)
            erased.add(node)
