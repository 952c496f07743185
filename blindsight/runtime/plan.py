"""What to rewrite of a graph, decided once, when Dynamo hands it over.

Shapes: B batch, H query heads, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from blindsight.categories import summarize_categories
from blindsight.families import DECODER_ATTENTION_CLASSES, forgets
from blindsight.passes.find_attention import (
    Attention,
    find_attention,
    find_axis_positions,
    find_eager_attention,
    find_input_ids,
    find_key_cache,
    find_video_grid,
    has_attention,
)
from blindsight.passes.graph import (
    copy_graph_module,
    fake_tensor,
    has_regions,
    inline_regions,
    placeholders,
    source_name,
)
from blindsight.passes.lift_mask import Lifted, lift_mask
from blindsight.profile import Profile
from blindsight.report import Verdict
from blindsight.runtime.layers import compact, layer_of_path
from blindsight.runtime.shards import is_distributed_tensor, shard_of_call, sharded_weights
from blindsight.runtime.sizes import compiled_sizes, expression_of
from blindsight.runtime.state import BackendState

DENSE_HEADS = "all its heads are dense"


@dataclass(frozen=True)
class PlannedCall:
    """An attention call of the decoder, what its mask is, and its row of the report."""

    attention: Attention
    layer: int | None  # None: told per call by the parameters
    lifted: Lifted
    verdict: Verdict


@dataclass(frozen=True)
class CacheInputs:
    """Where a graph finds and leaves the keys of one cache (see ``KeyCache``), by position.

    ``has_new`` says that what is found holds the call's own keys already: a frame that Dynamo
    resumed after the cache was updated. ``call`` is the number of a call that attends to them,
    or, if they are not ``is_read``, to those that it writes there.
    """

    before: int | None = None
    has_new: bool = False
    after: tuple[int, ...] = ()
    length: int | None = None
    in_place: bool = False
    is_read: bool = True
    call: int = field(default=0, compare=False)


class KeptKeys(NamedTuple):
    """Where the keys of a graph's caches are when it has run, by position.

    Attributes:
        left: Outputs that hold them.
        written: Inputs that hold them, then.
        calls: For both in turn: a call that attends to them.
        befores: For both in turn: the input that held what was in the cache before, or None.
        found: Inputs that hold keys of the graph's own tokens when it begins.
    """

    left: tuple[int, ...]
    written: tuple[int, ...]
    calls: tuple[int, ...]
    befores: tuple[int | None, ...]
    found: tuple[int, ...]


@dataclass
class Plan:
    """What is known of a graph before it runs.

    Attributes:
        gm: A copy of the graph, to be copied again for each form that is compiled.
        profile: The user's; of a tensor-parallel rank, the rows of its heads.
        calls: The decoder's attention that may be rewritten.
        problem: Why the profile cannot be applied (strict), or None.
        input_ids: Position of the input that shows the prompt's tokens, or None.
        video_grid, positions: Positions of inputs that show the frames of its videos, or None.
        runs_head: Whether the graph computes logits: when it runs, the decoder has run.
        caches: Those of its layers. The first tells the sequence's history.
        symbols: Positions of the inputs that are symbolic sizes, by symbol.
        runs: How often all calls ran dense, by reason.
        numbers: Positions of the inputs that are floats in the shape of 0-d tensors, by the name
            of the node that reads them: what Dynamo makes of a float that varies.
    """

    gm: fx.GraphModule
    profile: Profile
    calls: list[PlannedCall] = field(default_factory=list)
    problem: str | None = None
    input_ids: int | None = None
    video_grid: int | None = None
    positions: int | None = None
    runs_head: bool = False
    caches: tuple[CacheInputs, ...] = ()
    symbols: dict[object, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    _functions: dict[object, Callable[..., int]] = field(default_factory=dict, repr=False)

    @property
    def shows_prompt(self) -> bool:
        """Whether an input says something of the prompt's images."""
        return any(at is not None for at in (self.input_ids, self.video_grid, self.positions))

    @property
    def cache(self) -> CacheInputs:
        """The cache that stands for all."""
        return self.caches[0] if self.caches else CacheInputs()

    @cached_property
    def kept_keys(self) -> KeptKeys:
        left = [(at, cache) for cache in self.caches for at in cache.after]
        inputs = [(cache.before, cache) for cache in self.caches if cache.before is not None]
        written = [(at, cache) for at, cache in inputs if cache.in_place]
        return KeptKeys(
            left=tuple(at for at, _ in left),
            written=tuple(at for at, _ in written),
            calls=tuple(cache.call for _, cache in (*left, *written)),
            befores=tuple(cache.before for _, cache in (*left, *written)),
            found=tuple(at for at, cache in inputs if cache.has_new),
        )

    @property
    def device(self) -> torch.device:
        query = fake_tensor(self.calls[0].attention.query)
        return torch.device("cpu") if query is None else query.device

    @property
    def dtype(self) -> torch.dtype:
        query = fake_tensor(self.calls[0].attention.query)
        return torch.float32 if query is None else query.dtype

    def size_of(self, args: Sequence[Any]) -> Callable[[int | torch.SymInt], int]:
        """Return the function that gives the graph's sizes their values for these inputs."""
        values = [args[at] for at in self.symbols.values()]
        return lambda size: self._function_of(size)(*values)

    @property
    def query_sizes(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """B and Q of the graph's first attention call, as the graph knows them."""
        batch, _, num_queries, _ = _shape(self.calls[0].attention.query)
        return batch, num_queries

    def sizes(self, args: Sequence[Any]) -> tuple[int, int, int]:
        """Return B, Q and the largest K of the graph's attention, for these inputs."""
        batch, num_queries, *keys = self._sizes(*[args[at] for at in self.symbols.values()])
        return batch, num_queries, max(keys)

    @cached_property
    def _sizes(self) -> Callable[..., Sequence[int]]:
        """A function of the symbols' values: B, Q, and every K that there is, once."""
        keys = {expression_of(_shape(call.attention.key)[2]): None for call in self.calls}
        return compiled_sizes([*map(expression_of, self.query_sizes), *keys], list(self.symbols))

    def _function_of(self, size: int | torch.SymInt) -> Callable[..., int]:
        """Return a size as a function of the symbols' values; substituting takes long."""
        expression = expression_of(size)
        if expression not in self._functions:
            sizes = compiled_sizes([expression], list(self.symbols))
            self._functions[expression] = lambda *values: sizes(*values)[0]
        return self._functions[expression]


def plan_graph(state: BackendState, gm: fx.GraphModule, number: int) -> Plan:
    """Decide what to rewrite of a graph, and add its attention to the verdicts."""
    return _Planner(state, gm, number).plan


class _Planner:
    def __init__(self, state: BackendState, gm: fx.GraphModule, number: int) -> None:
        self._state = state
        self._profile = state.profile
        self._inputs = placeholders(gm)
        self._number = number
        self._head_dims = {state.profile.head_dim(layer) for layer in state.profile.layers}
        self._shards: list[tuple[int, int] | None] = []
        # Without attention the graph goes on as it is.
        copied = copy_graph_module(gm) if has_attention(gm) else gm
        if copied is not gm and has_regions(copied):
            copied = inline_regions(copied)
        self.plan = Plan(copied, state.profile, input_ids=find_input_ids(gm), symbols=_symbols(gm))
        if self._profile.rule.video_token_ids:
            self.plan.video_grid = find_video_grid(gm)
            self.plan.positions = find_axis_positions(gm)
        self.plan.numbers = _numbers(gm)
        self.plan.runs_head = any(source_name(x).endswith("lm_head.weight") for x in self._inputs)
        pattern = self._profile.rule.layer_pattern
        for attention in find_attention(copied, layer_pattern=pattern):
            self._add(attention)
        written_out = find_eager_attention(
            copied, layer_pattern=pattern, module_classes=DECODER_ATTENTION_CLASSES
        )
        if written_out:
            self._refuse(
                f"attention of {written_out[0]} must be one call of scaled_dot_product_attention, "
                "got one that is written out. Load the model with attn_implementation='sdpa'"
            )
        if self.plan.calls:
            self.plan.caches = self._find_caches()

    def _add(self, attention: Attention) -> None:
        layer, reason = self._place(attention)
        lifted = lift_mask(self.plan.gm, attention)
        verdict = Verdict(
            graph=self._number,
            path=attention.path,
            layer=layer,
            tier=lifted.tier,
            mask=lifted.reason,
            categories="",
            rewritten=False,
            reason=reason or "its heads keep what their categories keep",
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
        """Return the layer of a call, if it is the graph that tells it, or why it is not ours."""
        where = attention.path or "a frame of its own"
        layer = layer_of_path(attention)
        layer_map = self._state.models.layer_map
        known_class = attention.module_class in DECODER_ATTENTION_CLASSES
        if layer is None and layer_map.models:
            examples = [_example(self._inputs[at]) for at in attention.parameters]
            if not known_class and layer_map.layer_of(examples) is None:
                if not self._resembles_decoder(attention) or layer_map.has_any(examples):
                    return None, "not the decoder's"
                return None, self._refuse(
                    f"the weights of attention at {where} must be parameters of the model, whose "
                    "layers they tell, and are other tensors. Where accelerate offloads weights "
                    "to a CPU or disk, give the model less memory to be spread over, or more GPUs"
                )
        elif layer is None:
            if not known_class and not self._resembles_decoder(attention):
                return None, "not the decoder's"
            return None, self._refuse(
                f"the layer of attention at {where} must be known, but its compiled frame "
                "begins inside the decoder and may serve several layers. Give the model: "
                "blindsight_backend(profile, model=model)"
            )
        if layer is not None and layer not in self._profile.layers:
            return None, self._refuse(
                f"attention at {where} is layer {layer}, but the profile is of layers "
                f"{compact(self._profile.layers)}. Use the profile of this model, or of this stage "
                "of a pipeline: profile.stage(first, stop, keeps_numbers=...)"
            )
        head_dims = self._head_dims if layer is None else {self._profile.head_dim(layer)}
        if attention.head_dim is not None and attention.head_dim not in head_dims:
            return None, self._refuse(
                f"head dim of attention at {where} must be "
                f"{' or '.join(map(str, sorted(head_dims)))} as in the profile, got "
                f"{attention.head_dim}. Use the profile of this model"
            )
        query = fake_tensor(attention.query)
        if self.plan.calls and query is not None and query.device != self.plan.device:
            return None, self._refuse(
                f"attention at {where} must be on one device with the others of its graph, "
                f"{self.plan.device}, got {query.device}. Compile the layers one by one, or load "
                "the model with device_map, whose hooks end a graph at each layer"
            )
        if problem := self._take_shard(attention):
            return None, self._refuse(problem)
        if attention.dropout_p:
            return None, self._refuse(
                f"dropout of attention at {where} must be 0, got {attention.dropout_p}. "
                "FlexAttention has none: call model.eval()"
            )
        return layer, None

    def _take_shard(self, attention: Attention) -> str | None:
        """Take the rows of the heads that this process computes; return what is wrong, if any."""
        if is_distributed_tensor(fake_tensor(attention.query)):
            return (
                f"attention at {attention.path or 'a frame of its own'} must be of local tensors, "
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
        masked = attention.is_causal or attention.attn_mask is not None
        ours, found = self._profile.num_heads, attention.num_heads
        # A tensor-parallel rank has a part of the heads.
        is_parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        fits = found == ours or bool(is_parallel and found and ours % found == 0)
        same_dim = attention.head_dim in self._head_dims
        inside_another_stack = any(part.isdigit() for part in attention.path.split("."))
        return masked and fits and same_dim and not inside_another_stack

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
            sentence = problem[0].upper() + problem[1:]
            self.plan.problem = f"{sentence}, or leave such attention dense with strict=False."
        else:
            self._state.runtime.warn_once(f"left dense: {problem}.")
        return problem


def _symbols(gm: fx.GraphModule) -> dict[object, int]:
    return {
        node.meta["example_value"].node.expr: position
        for position, node in enumerate(placeholders(gm))
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    }


def _numbers(gm: fx.GraphModule) -> dict[str, int]:
    inputs = placeholders(gm)
    return {
        node.name: inputs.index(node.args[0])
        for node in gm.graph.nodes
        if node.op == "call_method" and node.target == "item" and node.args[0] in inputs
    }


def _shape(node: fx.Node) -> Sequence[int | torch.SymInt]:
    tensor = fake_tensor(node)
    if tensor is None:
        raise ValueError(f"node {node} must be a tensor with a known shape, and Dynamo gave none.")
    return tensor.shape


def _example(placeholder: fx.Node) -> Tensor | None:
    """Return the real tensor that an input was traced with, where Dynamo still has it."""
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, Tensor) else None
