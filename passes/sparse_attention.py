"""The whole rewriting as one pass, for graphs that do not go through the backend.

The backend decides for each call which variant of a graph runs, and whether the facts that its
masks rest on hold for the data at hand. A pass alone decides once. So a mask whose intervals rest
on the data is evaluated element by element here, and the rewritten attention runs for every prompt.

Shapes: B batch, H query heads, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from blindsight.attention.base_mask import CAUSAL, Tier
from blindsight.attention.flex import constant_rows
from blindsight.attention.lowering import Layout, Lowering, fused_layout, split_layout
from blindsight.cache_keys import source_digest
from blindsight.families import DECODER_ATTENTION_CLASSES
from blindsight.passes.find_attention import (
    Attention,
    find_attention,
    problem_of_eager_attention,
)
from blindsight.passes.find_inputs import find_input_ids
from blindsight.passes.find_shard import shard_of_call
from blindsight.passes.graph import add_placeholder, fake_tensor, input_name, placeholders
from blindsight.passes.lift_mask import Lifted, lift_masks
from blindsight.passes.names import name_of
from blindsight.passes.replace_attention import TOKEN_INPUTS, replace_attention_pass
from blindsight.profile import Profile
from blindsight.template import template_of_ids
from blindsight.text_tables import compact


def sparse_attention_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[torch.Tensor] | None = None,
    *,
    profile: Profile,
    lowering: str = "fused",
    add_inputs: bool = False,
) -> fx.GraphModule:
    """Make the decoder's attention in a graph sparse, as the profile says.

    The template comes from inputs of the graph called ``span_id [B, T]`` (ints) and
    ``is_sink [B, T]`` (bool), or from one called ``input_ids [B, Q]``. Attention of one query
    (decoding), of layers whose heads are all dense, and of anything but the decoder is left alone.

    Args:
        gm: A graph of fixed sizes, as Dynamo or ``torch.export`` traced it. Edited in place.
        example_inputs: Not read; the usual signature of a pass.
        profile: The model's.
        lowering: ``"fused"`` or ``"split"``, see :func:`~blindsight.blindsight_backend`.
        add_inputs: Append ``span_id`` and ``is_sink`` to the graph's inputs if it has neither them
            nor ``input_ids``. Dynamo's own graph takes no more inputs: give a copy.

    Raises:
        ValueError: The profile does not fit the graph, its sizes are symbolic, or it does not tell
            where the images are; nothing has been changed.
    """
    del example_inputs
    rewrite(gm, profile, _lowering_of(lowering), add_inputs=add_inputs)
    return gm


class SparseAttention(PassBase, CustomGraphPass):
    """:func:`sparse_attention_pass` as an object, for pass managers and for Inductor.

    It is a ``PassBase`` of ``torch.fx.passes.infra``, and may be the value of Inductor's
    ``pre_grad_custom_pass``: ``torch.compile(model, options={"pre_grad_custom_pass":
    SparseAttention(profile)})``. Its ``uuid`` covers the profile, the options and the sources.

    Args:
        profile, lowering, add_inputs: As for :func:`sparse_attention_pass`. Inductor takes no
            further inputs: there the graph must have ``input_ids`` or the template as inputs.
    """

    def __init__(
        self, profile: Profile, *, lowering: str = "fused", add_inputs: bool = False
    ) -> None:
        self._profile = profile
        self._lowering = _lowering_of(lowering)
        self._add_inputs = add_inputs

    def __call__(self, graph: fx.GraphModule | fx.Graph) -> PassResult:  # type: ignore[override]
        """Rewrite a graph in place; Inductor gives the graph alone, pass managers its module."""
        gm = graph.owning_module if isinstance(graph, fx.Graph) else graph
        if gm is None:
            raise ValueError("graph must belong to a GraphModule, got one that does not.")
        return self.call(gm)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a graph in place, as ``PassBase`` asks for it."""
        layers = rewrite(graph_module, self._profile, self._lowering, add_inputs=self._add_inputs)
        return PassResult(graph_module, bool(layers))

    def uuid(self) -> str:
        """Return the hex sha256 of all that decides what the pass does."""
        parts = (self._profile.digest, self._lowering.value, str(self._add_inputs), source_digest())
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _lowering_of(name: str) -> Lowering:
    lowering = Lowering.of(name)
    if lowering is Lowering.AUTO:
        raise ValueError(
            "lowering must be 'fused' or 'split' for a pass alone, got 'auto', which chooses for "
            "each prompt. Use the backend for that."
        )
    return lowering


def rewrite(
    gm: fx.GraphModule, profile: Profile, lowering: Lowering, *, add_inputs: bool = False
) -> list[int]:
    """Rewrite a graph in place, and return the layers whose attention was rewritten."""
    calls = find_attention(gm, layer_pattern=profile.rule.layer_pattern)
    if problem := problem_of_eager_attention(gm, layer_pattern=profile.rule.layer_pattern):
        raise ValueError(f"{problem}, and run the pass before operators are decomposed.")
    profile = _rows_of_rank(gm, calls, profile)
    ours = [(call, at) for call in calls if (at := _layer_of(call, profile)) is not None]
    if not ours:
        _check_tells_layers(gm, calls, profile)
    chosen: list[Attention] = []
    layers: list[int] = []
    for call, layer in ours:
        if profile.categories[layer].any() and _fixed_lengths(call)[0] != 1:
            chosen.append(call)
            layers.append(layer)
    if not chosen:
        return []
    proofs = lift_masks(gm, chosen)
    layouts = [
        _layout(profile.categories[layer].tolist(), proof, lowering)
        for layer, proof in zip(layers, proofs, strict=True)
    ]
    template = _template(gm, chosen, profile, add_inputs=add_inputs)
    heads = [list(layout.heads) for layout in layouts]
    codes = [
        profile.categories[layer, row].tolist() for layer, row in zip(layers, heads, strict=True)
    ]
    last = max(template, key=list(gm.graph.nodes).index)
    with gm.graph.inserting_before(_after_inputs(gm) if last.op == "placeholder" else last.next):
        constants = tuple(
            gm.graph.call_function(constant_rows, (rows, dtype, template[0]))
            for rows, dtype in ((heads, torch.int64), (codes, torch.int32))
        )
    replace_attention_pass(
        gm,
        attention=chosen,
        # Nobody checks facts here: what rests on them is evaluated.
        lifted=[replace(proof, tier=Tier.EXPRESSION) if proof.facts else proof for proof in proofs],
        groups=[layout.groups for layout in layouts],
        inputs=(*template, *constants),
    )
    return layers


def _check_tells_layers(gm: fx.GraphModule, calls: Sequence[Attention], profile: Profile) -> None:
    """Check that the graph has no call of the decoder's, and not only none that can be told."""
    targets = (str(node.target) for node in gm.graph.nodes if node.op == "call_function")
    if decomposed := [name for name in targets if name.startswith("aten._scaled_dot_product")]:
        raise ValueError(
            f"attention must be calls of scaled_dot_product_attention, got {decomposed[0]}. Run "
            "the pass before operators are decomposed: on a graph of Dynamo's or torch.export's."
        )
    told = any(node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    scores = (fake_tensor(node) for node in gm.graph.nodes if "softmax" in name_of(node))
    heads = [call.num_heads for call in calls]
    heads += [fake.shape[1] for fake in scores if fake is not None and fake.dim() == 4]
    if not told and profile.num_heads in heads:
        raise ValueError(
            "the graph must say which module each node is of (nn_module_stack), got none. Trace "
            "with torch.export or Dynamo; make_fx does not note it."
        )


def _rows_of_rank(gm: fx.GraphModule, calls: Sequence[Attention], profile: Profile) -> Profile:
    """Return the profile of those heads that this process computes."""
    ours = [call for call in calls if call.layer is not None]
    try:
        shards = {shard_of_call(profile, call, placeholders(gm)) for call in ours}
    except ValueError as error:
        raise ValueError(f"{error}.") from None
    if len(shards) > 1:
        raise ValueError(
            f"the layers of a graph must be sharded alike, got heads of {shards} (rank, ranks). "
            "Shard all of them, or none."
        )
    shard = shards.pop() if shards else None
    return profile if shard is None else profile.shard(*shard)


def _layer_of(call: Attention, profile: Profile) -> int | None:
    """Return the layer of a call, or None if it is not the decoder's."""
    where = call.where
    layer = call.layer
    if layer is None:
        if call.module_class in DECODER_ATTENTION_CLASSES:
            raise ValueError(
                f"the layer of attention at {where} must be known, but the graph begins inside the "
                "decoder. Give the pass the graph of the whole decoder."
            )
        return None
    if layer not in profile.layers:
        raise ValueError(
            f"attention at {where} is layer {layer}, but the profile is of layers "
            f"{compact(profile.layers)}. Use the profile of this model."
        )
    for name, found, expected in (
        ("head dim", call.head_dim, profile.head_dim(layer)),
        ("dropout", call.dropout_p, 0.0),
    ):
        if found is not None and found != expected:
            raise ValueError(
                f"{name} of attention at {where} must be {expected}, got {found}. Use the profile "
                "of this model, in eval mode."
            )
    return layer


def _fixed_lengths(call: Attention) -> tuple[int, int]:
    """Return Q and K.

    Raises:
        ValueError: They or B are symbolic, or not known.
    """
    num_queries, num_keys = call.lengths
    sizes = {"batch": call.batch_size, "num_queries": num_queries, "num_keys": num_keys}
    if symbolic := [f"{name}={size}" for name, size in sizes.items() if not isinstance(size, int)]:
        raise ValueError(
            f"sizes of attention must be fixed, got {', '.join(symbolic)} at {call.path}. Trace "
            "without dynamic shapes, once for each length."
        )
    return int(num_queries), int(num_keys)


def _layout(categories: list[int], proof: Lifted, lowering: Lowering) -> Layout:
    if lowering is Lowering.FUSED:
        return fused_layout(categories)
    is_proven = proof.tier is Tier.INTERVALS and not proof.facts
    return split_layout(categories, is_causal=is_proven and proof.form == CAUSAL)


def _template(
    gm: fx.GraphModule, calls: Sequence[Attention], profile: Profile, *, add_inputs: bool
) -> tuple[fx.Node, fx.Node]:
    """Return the nodes of span_id and is_sink."""
    # Of several inputs with one name the first counts.
    inputs = {input_name(node): node for node in reversed(placeholders(gm))}
    if "span_id" in inputs and "is_sink" in inputs:
        return inputs["span_id"], inputs["is_sink"]
    at = find_input_ids(gm)
    if at is not None:
        for call in calls:
            num_queries, num_keys = _fixed_lengths(call)
            if num_keys != num_queries:
                raise ValueError(
                    f"attention at {call.path} must have as many keys as queries where the images "
                    f"are told from input_ids, got {num_keys} keys and {num_queries} queries: the "
                    "tokens in a cache are not known. Trace a prefill without a cache, or give the "
                    "graph inputs span_id and is_sink of the whole sequence."
                )
        with gm.graph.inserting_before(_after_inputs(gm)):
            arguments = (placeholders(gm)[at], profile.rule.to_json())
            both = gm.graph.call_function(template_of_ids, arguments)
            span_id, is_sink = (
                gm.graph.call_function(operator.getitem, (both, part)) for part in (0, 1)
            )
        return span_id, is_sink
    if add_inputs:
        span_id, is_sink = (add_placeholder(gm, name) for name in TOKEN_INPUTS)
        return span_id, is_sink
    raise ValueError(
        "the graph must have an input called input_ids, or span_id and is_sink, got inputs "
        f"{', '.join(node.name for node in placeholders(gm))[:200]}. Compile a module that takes "
        "one of these, or say add_inputs=True."
    )


def _after_inputs(gm: fx.GraphModule) -> fx.Node:
    return placeholders(gm)[-1].next
