"""One graph of a compiled model: its own variant and rewritten ones, each compiled when needed.

Shapes: B batch, H query heads, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor, fx

from blindsight.attention.lowering import Layout
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.replace_attention import TOKEN_INPUTS
from blindsight.passes.share_layers import share_layers_pass
from blindsight.runtime.any_length import CompiledForLengths, SymbolicSizes
from blindsight.runtime.context import is_disabled
from blindsight.runtime.given_mask import given_inputs
from blindsight.runtime.history import History
from blindsight.runtime.inner import Inner
from blindsight.runtime.plan import DENSE_HEADS
from blindsight.runtime.planner import plan_graph
from blindsight.runtime.rewriting import Rewriter, Rewriting, tier_of
from blindsight.runtime.sequences import Sequences
from blindsight.runtime.state import BackendState
from blindsight.template import Template

_MAX_VARIANTS = 64  # of one graph; the least recently used are dropped

_FASTER_DENSE = "estimated to be faster than sparse"


class _Variants:
    """Compiled variants of a graph by what tells them apart; several threads may ask."""

    def __init__(self) -> None:
        self._by_key: dict[object, CompiledForLengths] = {}  # the latest used last
        self._lock = Lock()

    def find(self, key: object) -> CompiledForLengths | None:
        with self._lock:
            variant = self._by_key.pop(key, None)
            if variant is not None:
                self._by_key[key] = variant
            return variant

    def keep(self, key: object, variant: CompiledForLengths) -> None:
        with self._lock:
            self._by_key[key] = variant
            while len(self._by_key) > _MAX_VARIANTS:
                del self._by_key[next(iter(self._by_key))]


class CompiledGraph:
    """What the backend returns to Dynamo for a graph."""

    def __init__(
        self,
        state: BackendState,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        number: int,
        inner: Inner,
    ) -> None:
        self._state = state
        self._forwards = state.forwards
        self._inner = inner
        self._passes = state.passes
        if self._passes:
            gm = self._passes.run_before(copy_graph_module(gm))
        self._plan = plan_graph(state, gm, number, inner)
        self._profile = self._plan.profile
        self._calls = self._plan.calls
        self._sequences = Sequences(state, self._plan)
        self._rewriter = Rewriter(state, self._plan)
        self._variants = _Variants()
        self._rows: dict[object, tuple[Tensor, Tensor]] = {}
        known = tuple(call.layer for call in self._calls if call.layer is not None)
        self._layers = known if len(known) == len(self._calls) else None  # None: told per call
        self._own: Callable[..., Any] | None = None
        # What a compiler assumes of symbolic sizes must become a guard of Dynamo's, which is only
        # possible now. A graph of fixed sizes is compiled when first needed.
        if not self._calls or self._plan.symbols or self._plan.numbers:
            own = copy_graph_module(gm) if self._calls else gm
            try:
                self._own = inner(self._passes.run_after(own), example_inputs)
            except Exception:
                # Inductor asks Dynamo to trace a graph again where it wants a number to be fixed.
                state.forget(number)
                raise

    def as_callable(self) -> Callable[..., Any]:
        """Return the function that Dynamo shall call for this graph."""
        watches = self._plan.runs_head or self._plan.shows_prompt
        if self._own is not None and not (self._calls or watches or self._plan.problem):
            return self._own
        # Dynamo asks for a function's name and attributes; a bound method has them.
        return self._run

    def _run(self, *args: Any) -> Any:
        if self._plan.shows_prompt:
            self._observe(args)
        if self._plan.problem is not None and not is_disabled():
            raise ValueError(self._plan.problem)
        if not self._calls:
            if self._plan.runs_head:
                self._forwards.finish()
            return self._run_own(args)
        layers = self._layers_of(args)
        self._forwards.met.update(layers)
        known = self._sequences.find(args, layers)
        history, dense_because = known.history, known.dense_because
        rewriting = None
        if dense_because is None:
            assert history is not None
            self._state.check_unchanged()
            rewriting = self._rewriter.choose(args, layers, history)
            dense_because = None if rewriting else _FASTER_DENSE
        if rewriting is not None:
            assert history is not None
            outputs, runs = self._run_rewritten(args, layers, history, rewriting)
            for call, how in zip(self._calls, runs, strict=True):
                call.verdict.own_runs[how] += 1
        else:
            outputs = self._run_own(args)
            self._plan.runs[f"dense: {dense_because}"] += 1
        self._forwards.serve(layers)
        self._sequences.remember(args, outputs, layers, known)
        return outputs

    def _observe(self, args: Sequence[Any]) -> None:
        if self._plan.input_ids_at is not None:
            self._forwards.observe(args[self._plan.input_ids_at])
        if self._plan.video_grid_at is not None:
            self._forwards.observe_videos(args[self._plan.video_grid_at])
        if self._plan.position_ids_at is not None:
            self._forwards.observe_positions(args[self._plan.position_ids_at])

    def _layers_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        if self._layers is not None:
            return self._layers
        layers = []
        for call in self._calls:
            layer = call.layer
            if layer is None:
                layer = self._state.models.layer_of([args[at] for at in call.attention.parameters])
            if layer is None:
                raise ValueError(
                    f"the parameters of attention at {call.attention.where} must "
                    "belong to one layer of the model that is compiled, and belong to none. If its "
                    "weights were replaced, make a new backend for it: "
                    "blindsight_backend(profile, model=model)."
                )
            layers.append(layer)
        return tuple(layers)

    def _run_own(self, args: Sequence[Any]) -> Any:
        if self._own is None:
            self._own = self._compile(copy_graph_module(self._plan.gm), args)
        return self._own(*args)

    def _run_rewritten(
        self, args: Sequence[Any], layers: tuple[int, ...], history: History, rewriting: Rewriting
    ) -> tuple[Any, list[str]]:
        """Return the outputs, and how each call ran."""
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            raise ValueError(
                "sparse attention must run without gradients, got grad enabled. Call the model "
                "under torch.inference_mode() or torch.no_grad(), or under blindsight.disabled() "
                "to run it dense."
            )
        template = history.on(self._plan.device)
        edges = [part for mask in rewriting.given.values() for part in mask]
        rows = self._rows_of([layers[at] for at in rewriting.calls], rewriting.layouts)
        inputs = (*args, *edges, template.span_id, template.is_sink, *rows)
        variant = self._variant_for(inputs, template, rewriting)
        return variant.run(*inputs), self._how_each_ran(layers, rewriting)

    def _how_each_ran(self, layers: tuple[int, ...], rewriting: Rewriting) -> list[str]:
        """Return for the report how each call runs in a rewritten graph."""
        if rewriting.is_dense:
            return [f"dense: is_causal, {_FASTER_DENSE}"] * len(self._calls)
        runs = [f"dense: {DENSE_HEADS}"] * len(self._calls)
        for at, layout in zip(rewriting.calls, rewriting.layouts, strict=True):
            if self._profile.categories[layers[at]].any():
                form = rewriting.mask_form.for_tier(tier_of(self._calls[at], rewriting.given))
                runs[at] = f"sparse, {form.value}, {layout.name}"
        return runs

    def _variant_for(
        self, inputs: Sequence[Any], template: Template, rewriting: Rewriting
    ) -> CompiledForLengths:
        """Return the compiled variant of the graph for these inputs.

        One for longer prompts that is there and fits; else one for many lengths; else one for
        these sizes alone.
        """
        groups = tuple(layout.groups for layout in rewriting.layouts)
        given = tuple((name, mask.is_by_group) for name, mask in rewriting.given.items())
        numbers = {name: inputs[at].item() for name, at in self._plan.numbers.items()}
        key = (rewriting.mask_form, rewriting.calls, groups, given, tuple(numbers.values()))
        sizes = tuple(inputs[at] for at in self._plan.symbols.values())
        num_tokens = template.num_tokens
        if rewriting.capacities is not None:
            batch = template.span_id.shape[0]
            its_sizes = (batch, str(self._size_of_tokens(inputs, num_tokens)))
            variant = self._variants.find((key, its_sizes, rewriting.longer))
            if variant is None or not variant.fits(sizes, num_tokens):
                of_lengths = (key, its_sizes, rewriting.capacities)
                variant = self._variant(of_lengths, rewriting, inputs, num_tokens, numbers)
            if variant.fits(sizes, num_tokens):
                return variant
        exactly = replace(rewriting, capacities=None)
        return self._variant((key, sizes, num_tokens), exactly, inputs, num_tokens, numbers)

    def _variant(
        self,
        key: object,
        rewriting: Rewriting,
        inputs: Sequence[Any],
        num_tokens: int,
        numbers: Mapping[str, float],
    ) -> CompiledForLengths:
        """Return the rewritten graph of a key, compiled with these inputs if it is new."""
        variant = self._variants.find(key)
        if variant is None:
            size_of = self._plan.size_of(inputs)
            gm = self._rewriter.rewrite(
                rewriting, size_of, numbers, takes_regions=self._inner.takes_regions
            )
            if rewriting.capacities is not None:
                variant = self._compile_for_lengths(gm, inputs, rewriting.given, num_tokens)
            else:
                variant = CompiledForLengths(
                    self._compile(gm, inputs), lambda sizes, num_tokens: True
                )
            self._variants.keep(key, variant)
        return variant

    def _compile_for_lengths(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        given: Iterable[str],
        num_tokens: int,
    ) -> CompiledForLengths:
        batch, _ = self._plan.query_sizes
        fixed = set() if isinstance(batch, int) else batch.node.expr.free_symbols
        values = {symbol: inputs[at] for symbol, at in self._plan.symbols.items()}
        fixed |= {symbol for symbol, value in values.items() if value < 2}
        sizes = SymbolicSizes(values, fixed, self._size_of_tokens(inputs, num_tokens) or num_tokens)
        appended = dict.fromkeys(TOKEN_INPUTS, sizes.num_tokens)
        for name in given:
            lower, upper, valid = given_inputs(name)
            appended[lower], appended[valid] = map(sizes.size, self._rewriter.sizes_of_given(name))
            appended[upper] = appended[lower]
        run = self._compile(gm, sizes.inputs(gm, inputs, appended))
        return CompiledForLengths(run, sizes.check())

    def _size_of_tokens(self, args: Sequence[Any], num_tokens: int) -> torch.SymInt | None:
        """Return which symbolic size of the graph the number of tokens is, if it is one of them."""
        size_of = self._plan.size_of(args)
        for call in self._calls:
            for size in call.attention.lengths:
                if isinstance(size, torch.SymInt) and size_of(size) == num_tokens:
                    return size
        return None

    def _rows_of(self, layers: Sequence[int], layouts: Sequence[Layout]) -> tuple[Tensor, Tensor]:
        """Return the heads of layers in the order of their layouts, and their categories."""
        key = (tuple(layers), tuple(layouts))
        if key not in self._rows:
            heads = torch.tensor([layout.heads for layout in layouts], device="cpu")
            categories = self._profile.categories[list(layers)].gather(1, heads)
            device = self._plan.device
            self._rows[key] = heads.to(device), categories.to(device, torch.int32)
        return self._rows[key]

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile for inputs like these, outside of Dynamo, which has long left the graph."""
        from torch._dynamo.convert_frame import compile_lock

        for node in gm.graph.nodes:
            node.meta.pop("unbacked_bindings", None)  # of Dynamo's symbols; there will be new ones
        gm = self._passes.run_after(gm)
        if self._inner.takes_regions:
            gm = share_layers_pass(gm)
        with compile_lock:
            return self._inner(gm, list(inputs))
