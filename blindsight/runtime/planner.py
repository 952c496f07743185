"""What to rewrite of a graph, decided once, when Dynamo hands it over.

Shapes: B batch, H query heads, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from blindsight.categories import summarize_categories
from blindsight.configs import forgets
from blindsight.families import DECODER_ATTENTION_CLASSES
from blindsight.passes.find_attention import (
    Attention,
    find_attention,
    has_attention,
    problem_of_eager_attention,
)
from blindsight.passes.find_inputs import (
    embeds_other_tokens,
    find_axis_positions,
    find_input_ids,
    find_video_grid,
)
from blindsight.passes.find_key_cache import find_key_cache
from blindsight.passes.find_shard import is_distributed_tensor, shard_of_call, sharded_weights
from blindsight.passes.graph import (
    copy_graph_module,
    fake_tensor,
    placeholders,
    size_symbols,
    source_name,
)
from blindsight.passes.inline_regions import has_regions, inline_regions
from blindsight.passes.lift_mask import Lifted, lift_masks
from blindsight.report import Verdict
from blindsight.runtime.inner import Inner
from blindsight.runtime.plan import DENSE_HEADS, CacheInputs, Plan, PlannedCall
from blindsight.runtime.state import BackendState
from blindsight.text_tables import compact


def plan_graph(state: BackendState, gm: fx.GraphModule, number: int, inner: Inner) -> Plan:
    """Decide what to rewrite of a graph, and add its attention to the verdicts.

    Args:
        state: The verdicts, and what they depend on.
        gm: The graph.
        number: Of the graph.
        inner: What will compile it.
    """
    return _Planner(state, gm, number, inner).plan


class _Planner:
    def __init__(self, state: BackendState, gm: fx.GraphModule, number: int, inner: Inner) -> None:
        self._state = state
        self._inner = inner
        self._profile = state.profile
        self._inputs = placeholders(gm)
        self._number = number
        self._head_dims = {state.profile.head_dim(layer) for layer in state.profile.layers}
        self._shards: list[tuple[int, int] | None] = []
        # Without attention the graph goes on as it is.
        copied = copy_graph_module(gm) if has_attention(gm) else gm
        if copied is not gm and has_regions(copied):
            copied = inline_regions(copied)
        symbols = {size: self._inputs.index(node) for size, node in size_symbols(gm).items()}
        self.plan = Plan(copied, state.profile, input_ids_at=find_input_ids(gm), symbols=symbols)
        if (at := self.plan.input_ids_at) is not None:
            self.plan.embeds_other_tokens = embeds_other_tokens(copied, at)
        if self._profile.rule.video_token_ids:
            self.plan.video_grid_at = find_video_grid(gm)
            self.plan.position_ids_at = find_axis_positions(gm)
        self.plan.numbers = _numbers(gm)
        self.plan.runs_head = any(source_name(x).endswith("lm_head.weight") for x in self._inputs)
        pattern = self._profile.rule.layer_pattern
        calls = find_attention(copied, layer_pattern=pattern)
        for attention, lifted in zip(calls, lift_masks(copied, calls), strict=True):
            self._add(attention, lifted)
        if problem := problem_of_eager_attention(copied, layer_pattern=pattern):
            self._refuse(problem)
        if self.plan.calls:
            self.plan.caches = self._find_caches()

    def _add(self, attention: Attention, lifted: Lifted) -> None:
        layer, reason = self._place(attention)
        verdict = Verdict(
            graph=self._number,
            path=attention.path,
            layer=layer,
            tier=lifted.tier,
            mask=lifted.reason,
            categories="",
            rewritten=False,
            reason=reason or "each head keeps what its category keeps",
            runs_of_graph=self.plan.runs,
        )
        self._state.verdicts.append(verdict)
        if reason is not None:
            return
        verdict.rewritten = True
        if layer is None:
            verdict.categories = "as the layer's"
        else:
            heads = self.plan.profile.categories[layer].tolist()
            verdict.categories = summarize_categories(heads)
            if not any(heads):
                verdict.rewritten, verdict.reason = False, DENSE_HEADS
        self.plan.calls.append(PlannedCall(attention, layer, lifted, verdict))

    def _place(self, attention: Attention) -> tuple[int | None, str | None]:
        """Return the layer of a call, if it is the graph that tells it, or why it stays dense."""
        layer, reason = self._layer_of(attention)
        if reason is None and (problem := self._problem_of(attention, layer)):
            reason = self._refuse(problem)
        return (layer, None) if reason is None else (None, reason)

    def _layer_of(self, attention: Attention) -> tuple[int | None, str | None]:
        """Return the layer of a call, if it is the graph that tells it, or why it is not ours."""
        layer = attention.layer
        layer_map = self._state.models.layer_map
        known_class = attention.module_class in DECODER_ATTENTION_CLASSES
        models = self._state.models
        if models.problem is not None and not layer_map.models:
            is_ours = layer is not None or known_class
            # Where no parameters tell layers (weights that are buffers), the path may.
            if (models.is_of_another and is_ours) or (
                layer is None and self._has_its_shape(attention)
            ):
                return None, self._refuse(models.problem)
        if layer is None and layer_map.models:
            examples = [_example(self._inputs[at]) for at in attention.parameters]
            if not known_class and layer_map.layer_of(examples) is None:
                if not self._resembles_decoder(attention) or layer_map.has_any(examples):
                    return None, "not the decoder's"
                return None, self._refuse(
                    f"the weights of attention at {attention.where} must be parameters of the "
                    "model, whose layers they tell, and are other tensors. Call it without "
                    "output_attentions; where accelerate offloads weights to a CPU or disk, give "
                    "the model less memory to be spread over, or more GPUs"
                )
        elif layer is None:
            if not known_class and not self._resembles_decoder(attention):
                return None, "not the decoder's"
            return None, self._refuse(
                f"the layer of attention at {attention.where} must be known, but its compiled "
                "frame begins inside the decoder and may serve several layers. Give the model: "
                "blindsight_backend(profile, model=model)"
            )
        return layer, None

    def _problem_of(self, attention: Attention, layer: int | None) -> str | None:
        """Return why a call of the decoder cannot be rewritten, if it cannot."""
        where = attention.where
        if layer is not None and layer not in self._profile.layers:
            return (
                f"attention at {where} is layer {layer}, but the profile is of layers "
                f"{compact(self._profile.layers)}. Use the profile of this model, or of this stage "
                "of a pipeline: profile.stage(first, stop, keeps_numbers=...)"
            )
        head_dims = self._head_dims if layer is None else {self._profile.head_dim(layer)}
        if attention.head_dim is not None and attention.head_dim not in head_dims:
            return (
                f"head dim of attention at {where} must be "
                f"{' or '.join(map(str, sorted(head_dims)))} as in the profile, got "
                f"{attention.head_dim}. Use the profile of this model"
            )
        query = fake_tensor(attention.query)
        if self.plan.calls and query is not None and query.device != self.plan.device:
            return (
                f"attention at {where} must be on one device with the others of its graph, "
                f"{self.plan.device}, got {query.device}. Compile the layers one by one, or load "
                "the model with device_map, whose hooks end a graph at each layer"
            )
        if query is not None and not self._inner.has_attention_in(query.dtype, query.device):
            return (
                f"attention at {where} must be in float32, bfloat16 or float16, which Inductor's "
                f"FlexAttention has kernels for on a CPU, got {query.dtype}. Load the model in one "
                "of them, or give another compiler: inner='aot_eager'"
            )
        if problem := self._take_shard(attention):
            return problem
        if attention.dropout_p:
            return (
                f"dropout of attention at {where} must be 0, got {attention.dropout_p}. "
                "FlexAttention has none: call model.eval()"
            )
        return None

    def _take_shard(self, attention: Attention) -> str | None:
        """Take the rows of the heads that this process computes; return what is wrong, if any."""
        if is_distributed_tensor(fake_tensor(attention.query)):
            return (
                f"attention at {attention.where} must be of local tensors, "
                "got DTensors. Give each process whole sequences (context parallelism is not "
                "supported), and the modules around attention local outputs (to_local)"
            )
        models = self._state.models.layer_map.models
        weights = sharded_weights(models, self._profile.rule.layer_pattern)
        try:
            shard = shard_of_call(self._profile, attention, placeholders(self.plan.gm), weights)
            if self._shards and shard not in self._shards:
                raise ValueError(
                    f"the layers of a graph must be sharded alike, got heads of {self._shards[0]} "
                    f"and of {shard} (rank, ranks). Shard all of them, or none"
                )
        except ValueError as error:
            return str(error)
        if shard is not None and not self._shards:
            self.plan.profile = self._profile.shard(*shard)
        self._shards.append(shard)
        return None

    def _resembles_decoder(self, attention: Attention) -> bool:
        """Whether a call in a frame of unknown origin could be the decoder's."""
        inside_another_stack = any(part.isdigit() for part in attention.path.split("."))
        return self._has_its_shape(attention) and not inside_another_stack

    def _has_its_shape(self, attention: Attention) -> bool:
        """Whether a call has a mask, and heads like the decoder's."""
        masked = attention.is_causal or attention.attn_mask is not None
        ours, found = self._profile.num_heads, attention.num_heads
        # A tensor-parallel rank has a part of the heads.
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        fits = found == ours or bool(is_parallel and found and ours % found == 0)
        return masked and fits and attention.head_dim in self._head_dims

    def _find_caches(self) -> tuple[CacheInputs, ...]:
        gm, inputs = self.plan.gm, placeholders(self.plan.gm)
        outputs = gm.graph.output_node().args[0]
        types = self._profile.layer_types
        # A cache that slides forgets its first tokens, so any other says more.
        by_use = sorted(
            enumerate(self.plan.calls),
            key=lambda each: each[1].layer is not None and forgets(types[each[1].layer]),
        )
        caches: dict[CacheInputs, None] = {}  # layers may share one
        for number, call in by_use:
            found = find_key_cache(gm, call.attention)
            after = tuple(at for at, node in enumerate(outputs) if node in found.after)  # type: ignore[arg-type]
            if found.before is None and not after:
                continue
            if call.layer is None:
                self._check_recompile_limit()
            cache = CacheInputs(
                before=None if found.before is None else inputs.index(found.before),
                has_new=found.has_new,
                after=after,
                length=None if found.length is None else inputs.index(found.length),
                in_place=found.in_place,
                is_read=found.is_read,
                call=number,
            )
            caches.setdefault(cache)
        return tuple(caches)

    def _check_recompile_limit(self) -> None:
        limit, num_layers = torch._dynamo.config.recompile_limit, len(self._profile.layers)
        if num_layers > limit:
            self._refuse(
                "torch._dynamo.config.recompile_limit must be at least the number of layers, "
                f"{num_layers}, for a decoder that is compiled layer by layer with "
                f"a cache, got {limit}: the layers beyond it would run uncompiled, and dense. "
                f"Set it to {4 * num_layers}"
            )

    def _refuse(self, problem: str) -> str:
        """Make a problem an error of every call (strict), or warn of it; return it."""
        if self._state.strict:
            self.plan.problem = f"{problem}, or leave such attention dense with strict=False."
        else:
            self._state.forwards.warn_once(f"left dense: {problem}.")
        return problem


def _numbers(gm: fx.GraphModule) -> dict[str, int]:
    inputs = placeholders(gm)
    return {
        node.name: inputs.index(node.args[0])
        for node in gm.graph.nodes
        if node.op == "call_method" and node.target == "item" and node.args[0] in inputs
    }


def _example(placeholder: fx.Node) -> Tensor | None:
    """Return the real tensor that an input was traced with, where Dynamo still has it."""
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, Tensor) else None
