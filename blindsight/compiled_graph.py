"""One graph of a compiled model: its own form and the rewritten ones, each compiled when needed.

Shapes: B batch, H query heads, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from blindsight.any_length import CompiledForLengths, SymbolicSizes
from blindsight.families import forgets
from blindsight.given_mask import given_inputs
from blindsight.history import CacheNote, History, Pending, Witness
from blindsight.inner import Inner
from blindsight.lowering import Layout
from blindsight.passes.graph import copy_graph_module
from blindsight.passes.replace_attention import TOKEN_INPUTS
from blindsight.passes.share_layers import share_layers_pass
from blindsight.plan import plan_graph
from blindsight.rewriting import Rewriter, Rewriting, tier_of
from blindsight.runtime import is_disabled
from blindsight.state import BackendState

_MAX_VARIANTS = 64  # compiled forms of one graph; the least recently used are dropped

_NO_IMAGE_QUERY = "no query in a second image"
_FASTER_DENSE = "estimated to be faster than sparse"
_DENSE_HEADS = "all its heads are dense"


class _Past(NamedTuple):
    """What is known of the tokens in a cache before a call: None of them, if no history is."""

    history: History | None
    is_known: bool
    decodes: bool = False  # one token of text follows


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
        self._runtime = state.runtime
        self._inner = inner
        self._passes = state.passes
        if self._passes:
            gm = self._passes.run_before(copy_graph_module(gm))
        self._plan = plan_graph(state, gm, number)
        self._profile = self._plan.profile
        self._calls = self._plan.calls
        self._rewriter = Rewriter(state, self._plan)
        self._variants: OrderedDict[object, CompiledForLengths] = OrderedDict()
        self._rows: dict[object, tuple[Tensor, Tensor]] = {}
        known = tuple(call.layer for call in self._calls if call.layer is not None)
        self._layers = known if len(known) == len(self._calls) else None  # None: told per call
        # What a compiler assumes of symbolic sizes must become a guard of Dynamo's, which is only
        # possible now. A graph of fixed sizes is compiled when first needed.
        now = not self._calls or bool(self._plan.symbols or self._plan.numbers)
        own = copy_graph_module(gm) if self._calls else gm
        self._own = None
        if not now:
            return
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
                self._runtime.finish()
            return self._run_own(args)
        layers = self._layers_of(args)
        self._runtime.met.update(layers)
        sizes = self._plan.sizes(args)
        explicit, pending = self._runtime.explicit_history(), self._runtime.pending
        if explicit is None and pending is None:
            self._state.models.look_for_prompt()
            pending = self._runtime.pending
        past = self._past(args, layers, sizes, explicit, pending)
        history, dense_because = self._decide(args, layers, sizes, explicit, pending, past)
        rewriting = None
        if dense_because is None and history is not None:
            rewriting = self._rewriter.choose(args, layers, history)
            dense_because = None if rewriting else _FASTER_DENSE
        if rewriting is not None and history is not None:
            outputs, runs = self._run_rewritten(args, layers, history, rewriting)
            for call, how in zip(self._calls, runs, strict=True):
                call.verdict.own_runs[how] += 1
        else:
            outputs = self._run_own(args)
            self._plan.runs[f"dense: {dense_because}"] += 1
        self._runtime.serve(layers)
        self._remember(args, outputs, layers, history, past)
        return outputs

    def _observe(self, args: Sequence[Any]) -> None:
        if self._plan.input_ids is not None:
            self._runtime.observe(args[self._plan.input_ids])
        if self._plan.video_grid is not None:
            self._runtime.observe_videos(args[self._plan.video_grid])
        if self._plan.positions is not None:
            self._runtime.observe_positions(args[self._plan.positions])

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
                    f"the parameters of attention at {call.attention.path or 'the frame'} must "
                    "belong to one layer of the model that is compiled, and belong to none. Give "
                    "the backend that model, after changing its weights: "
                    "blindsight_backend(profile, model=model)."
                )
            layers.append(layer)
        return tuple(layers)

    def _decide(
        self,
        args: Sequence[Any],
        layers: tuple[int, ...],
        sizes: tuple[int, int, int],
        explicit: History | None,
        pending: Pending | None,
        past: _Past,
    ) -> tuple[History | None, str | None]:
        """Return what is known of the sequence, and why the call runs dense (None: sparse)."""
        batch, num_queries, num_keys = sizes
        history = explicit
        if history is not None:
            expected = self._num_tokens(args, past, num_queries, num_keys)
            if expected is not None and (batch, expected) != (history.batch, history.num_tokens):
                raise ValueError(
                    f"template must be [B, T] = [{batch}, {expected}] for {expected - num_queries} "
                    f"past and {num_queries} new tokens, got [{history.batch}, "
                    f"{history.num_tokens}]. Give use_template the whole sequence."
                )
        elif pending is None:
            history = None
            unknown = "input_ids were not seen and no template was given"
        else:
            if tuple(pending.kinds.shape) != (batch, num_queries):
                raise ValueError(
                    f"input_ids must have the shape of the decoder's queries, {batch} x "
                    f"{num_queries} tokens, got {' x '.join(map(str, pending.kinds.shape))}. Give "
                    "the template of the whole sequence: blindsight.use_template(span_id, is_sink)."
                )
            history = self._runtime.history(pending, past.history) if past.is_known else None
            unknown = "the tokens already in the cache are not known"
        is_text = explicit is None and pending is not None and pending.is_text
        if is_disabled():
            return history, "disabled"
        if is_text:
            return history, _NO_IMAGE_QUERY
        if history is None:
            self._runtime.warn_once(
                f"prefill ran dense: {unknown}. Give the template of the whole sequence: "
                "blindsight.use_template(span_id, is_sink)."
            )
            return None, unknown
        if not history.restricts_queries_from(history.num_tokens - num_queries):
            return history, _NO_IMAGE_QUERY
        self._runtime.expect_all_layers()
        if not any(self._profile.categories[layer].any() for layer in layers):
            return history, _DENSE_HEADS
        return history, None

    def _past(
        self,
        args: Sequence[Any],
        layers: tuple[int, ...],
        sizes: tuple[int, int, int],
        explicit: History | None,
        pending: Pending | None,
    ) -> _Past:
        """Return what is known of the tokens in the cache before the call."""
        _, num_queries, num_keys = sizes
        cache = self._plan.cache
        # Reading a counter on a device waits for it: not for a decoded token.
        decodes = pending is not None and pending.is_text and num_queries == 1
        matters = explicit is not None or not decodes
        length = int(args[cache.length]) if cache.length is not None and matters else None
        if length == 0:
            return _Past(None, True)
        if cache.before is None:
            return _Past(None, length is None and num_keys == num_queries)
        keys: Tensor = args[cache.before]
        note = self._runtime.caches.get(keys)
        if note is None and not decodes:
            # as in a copy of the cache
            note = self._runtime.caches.find_equal(keys, layers[cache.call])
            if note is not None and note.history.num_tokens > keys.shape[2]:
                note = None  # it slid: other sequences may end alike
        if note is not None:
            is_as_noted = length is None or length == note.history.num_tokens
            if is_as_noted and not (matters and note.witness and not note.witness.holds(keys)):
                return _Past(note.history, True, decodes)
        alone = cache.has_new and num_keys == num_queries
        return _Past(None, alone or keys.numel() == 0)

    def _num_tokens(
        self,
        args: Sequence[Any],
        past: _Past,
        num_queries: int,
        num_keys: int,
    ) -> int | None:
        """Return T, or None where only the user knows how much is in the cache."""
        if past.is_known:
            return num_queries + (0 if past.history is None else past.history.num_tokens)
        cache = self._plan.cache
        if cache.length is not None:
            return num_queries + int(args[cache.length])
        all_types = self._profile.layer_types
        types = [all_types[layer] for layer in self._profile.layers]
        grows = cache.before is not None and num_keys > args[cache.before].shape[2]
        slides = any(map(forgets, types)) and len(self._calls) < len(types)
        return num_keys if grows and not slides else None

    def _remember(
        self,
        args: Sequence[Any],
        outputs: Any,
        layers: tuple[int, ...],
        history: History | None,
        past: _Past,
    ) -> None:
        """Attach what is known of the sequence to the tensors that hold its keys.

        Of every layer: other graphs may run some of them in the next call.
        """
        notes, caches = self._runtime.caches, self._plan.kept_keys
        tensors = [*[outputs[at] for at in caches.left], *[args[at] for at in caches.written]]
        labels = [layers[call] for call in caches.calls]
        left: Sequence[CacheNote] = []
        if history is not None and not any(map(Tensor.is_inference, tensors)):
            left = [CacheNote(history)] * len(tensors)
        elif history is not None:
            befores = [
                notes.get(args[at]) if past.decodes and at is not None else None
                for at in caches.befores
            ]
            left = [
                CacheNote(history, Witness.of(keys, history, before=note and note.witness))
                for keys, note in zip(tensors, befores, strict=True)
            ]
        # What was known of these is of an earlier call; what that left there nobody saw.
        unknown = [args[at] for at in caches.found]
        for keys in unknown if history is not None else [*unknown, *tensors]:
            notes.drop(keys)
        if left:
            notes.put(tensors, left, labels)

    def _run_own(self, args: Sequence[Any]) -> Any:
        if self._own is None:
            self._own = self._compile(copy_graph_module(self._plan.gm), args)
        return self._own(*args)

    def _run_rewritten(
        self, args: Sequence[Any], layers: tuple[int, ...], history: History, rewriting: Rewriting
    ) -> tuple[Any, list[str]]:
        """Return the outputs, and in which form each call ran."""
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            raise ValueError(
                "sparse attention must run without gradients, got grad enabled. Call the model "
                "under torch.inference_mode() or torch.no_grad(), or under blindsight.disabled() "
                "to run it dense."
            )
        device = self._plan.device
        template = history.on(device)
        edges = [part for mask in rewriting.given.values() for part in mask]
        rows = self._rows_of([layers[at] for at in rewriting.calls], rewriting.layouts)
        inputs = (*args, *edges, template.span_id, template.is_sink, *rows)
        groups = tuple(layout.groups for layout in rewriting.layouts)
        sizes = tuple(args[at] for at in self._plan.symbols.values())
        numbers = {name: args[at].item() for name, at in self._plan.numbers.items()}
        fixed = tuple(rewriting.given), tuple(numbers.values())
        key = (rewriting.form, rewriting.calls, groups, *fixed)
        num_tokens = template.num_tokens
        variant = None
        if rewriting.capacities is not None:
            its_sizes = (history.batch, str(self._size_of_tokens(args, num_tokens)))
            of_longer = (key, its_sizes, rewriting.longer)
            variant = self._variants.get(of_longer)
            if variant is not None and variant.fits(sizes, num_tokens):
                self._variants.move_to_end(of_longer)
            else:
                of_lengths = (key, its_sizes, rewriting.capacities)
                variant = self._variant(of_lengths, rewriting, inputs, num_tokens, numbers)
        if variant is None or not variant.fits(sizes, num_tokens):
            exactly = replace(rewriting, capacities=None)
            variant = self._variant((key, sizes, num_tokens), exactly, inputs, num_tokens, numbers)
        runs = [f"dense: {_DENSE_HEADS}"] * len(self._calls)
        if rewriting.is_dense:
            runs = [f"dense: is_causal, {_FASTER_DENSE}"] * len(self._calls)
            return variant.run(*inputs), runs
        for at, layout in zip(rewriting.calls, rewriting.layouts, strict=True):
            if self._profile.categories[layers[at]].any():
                its_form = rewriting.form.of(tier_of(self._calls[at], rewriting.given))
                runs[at] = f"sparse, {its_form.value}, {layout.name}"
        return variant.run(*inputs), runs

    def _variant(
        self,
        key: object,
        rewriting: Rewriting,
        inputs: Sequence[Any],
        num_tokens: int,
        numbers: Mapping[str, float],
    ) -> CompiledForLengths:
        """Return the rewritten graph of a key, compiled with these inputs if it is new."""
        if key not in self._variants:
            size_of = self._plan.size_of(inputs)
            gm = self._rewriter.rewrite(
                rewriting, size_of, numbers, takes_regions=self._inner.takes_regions
            )
            if rewriting.capacities is not None:
                variant = self._compile_for_lengths(gm, inputs, rewriting.given, num_tokens)
            else:
                variant = CompiledForLengths(self._compile(gm, inputs), lambda *sizes: True)
            self._variants[key] = variant
            while len(self._variants) > _MAX_VARIANTS:
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        return self._variants[key]

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
            heads = torch.tensor([layout.heads for layout in layouts])
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
