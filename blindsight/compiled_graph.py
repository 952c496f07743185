"""One graph of a compiled model: its own form and the rewritten one, each compiled when needed.

Shapes: B batch, H query heads, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from blindsight.categories import summarize_categories
from blindsight.families import DECODER_ATTENTION_CLASSES
from blindsight.inner import Inner
from blindsight.layers import layer_of_path
from blindsight.passes.find_attention import (
    Attention,
    find_attention,
    find_eager_attention,
    find_input_ids,
    find_key_cache,
)
from blindsight.passes.graph import copy_graph_module, fake_tensor, placeholders, source_name
from blindsight.passes.replace_attention import replace_attention_pass
from blindsight.report import Verdict
from blindsight.runtime import History, explicit_template, is_disabled

if TYPE_CHECKING:
    from blindsight.backend import BlindsightBackend

_MAX_VARIANTS = 64  # compiled forms of one graph, the least recently used are dropped

_NO_IMAGE_QUERY = "no query in a second image"


@dataclass(frozen=True)
class _Call:
    """An attention call of the decoder, and its row of the report."""

    attention: Attention
    layer: int | None  # None: told per call by the parameters
    verdict: Verdict


@dataclass(frozen=True)
class _KeyCache:
    """Where a graph finds and leaves the keys of one cache (see ``KeyCache``), by position."""

    before: int | None = None
    after: tuple[int, ...] = ()
    length: int | None = None
    in_place: bool = False


class CompiledGraph:
    """What the backend returns to Dynamo for a graph."""

    def __init__(
        self,
        backend: BlindsightBackend,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        number: int,
        inner: Inner,
    ) -> None:
        self._backend = backend
        self._runtime = backend.runtime
        self._profile = backend.profile
        self._inner = inner
        self._number = number
        self._error: str | None = None
        self._input_ids_at = find_input_ids(gm)
        self._runs_head = _runs_head(gm)
        self._variants: OrderedDict[object, Callable[..., Any]] = OrderedDict()
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self._calls = self._plan(gm)
        self._gm = gm
        self._own: Callable[..., Any] | None = None
        if not self._calls:
            self._own = inner(gm, example_inputs)
            return
        self._gm = copy_graph_module(gm)
        self._symbols = _symbols(gm)
        self._cache = self._find_cache(gm)
        if self._symbols:
            # Whatever is assumed of symbolic shapes while compiling must become a guard, which
            # is only possible now. A graph of fixed shapes is compiled when first needed.
            self._own = inner(copy_graph_module(gm), example_inputs)

    def as_callable(self) -> Callable[..., Any]:
        """Return the function that Dynamo shall call for this graph."""
        watches = self._input_ids_at is not None or self._runs_head
        plain = not self._calls and not watches and self._error is None
        if plain and self._own is not None:
            return self._own
        # Dynamo asks for a function's name and attributes; a bound method has them.
        return self._run

    def _run(self, *args: Any) -> Any:
        if self._input_ids_at is not None:
            self._runtime.observe(args[self._input_ids_at])
        if self._error is not None and not is_disabled():
            raise ValueError(self._error)
        if not self._calls:
            if self._runs_head:
                self._runtime.finish()
            return self._own(*args)  # type: ignore[misc]
        layers = self._layers_of(args)
        self._runtime.met.update(layers)
        history, dense_because = self._decide(args, layers)
        if dense_because is None and history is not None:
            outputs = self._run_rewritten(args, layers, history)
        else:
            outputs = self._run_own(args)
        for call in self._calls:
            call.verdict.runs["sparse" if dense_because is None else f"dense: {dense_because}"] += 1
        self._runtime.serve(layers)
        self._remember(args, outputs, history)
        return outputs

    # What to rewrite: decided once, when the graph is compiled.

    def _plan(self, gm: fx.GraphModule) -> list[_Call]:
        pattern = self._profile.rule.layer_pattern
        calls = []
        for attention in find_attention(gm, layer_pattern=pattern):
            layer, reason = self._place(gm, attention)
            verdict = Verdict(
                graph=self._number,
                path=attention.path,
                layer=layer,
                tier=_tier(attention),
                categories="",
                rewritten=False,
                reason=reason or "its heads keep what their categories keep",
            )
            self._backend.verdicts.append(verdict)
            if reason is None:
                verdict.rewritten = True
                if layer is None:
                    verdict.categories = "as the layer's"
                else:
                    heads = self._profile.categories[layer].tolist()
                    verdict.categories = summarize_categories(heads)
                    if not any(heads):
                        verdict.rewritten, verdict.reason = False, "all its heads are dense"
                calls.append(_Call(attention, layer, verdict))
        eager = find_eager_attention(
            gm, layer_pattern=pattern, module_classes=DECODER_ATTENTION_CLASSES
        )
        if eager:
            self._refuse(
                f"attention of {eager[0]} must be one call of scaled_dot_product_attention, got "
                "one that is written out. Load the model with attn_implementation='sdpa'"
            )
        return calls

    def _place(self, gm: fx.GraphModule, attention: Attention) -> tuple[int | None, str | None]:
        """Return the layer of a call, if it is the graph that tells it, or why it is not ours."""
        where = attention.path or "a frame of its own"
        layer = layer_of_path(attention)
        layer_map = self._backend.layer_map
        known_class = attention.module_class in DECODER_ATTENTION_CLASSES
        if layer is None and layer_map is not None:
            examples = [_example(placeholders(gm)[at]) for at in attention.parameters]
            if not known_class and layer_map.layer_of(examples) is None:
                return None, "not the decoder's"
        elif layer is None:
            if not known_class and not self._resembles_decoder(attention):
                return None, "not the decoder's"
            return None, self._refuse(
                f"the layer of attention at {where} must be known, but its compiled frame "
                "begins inside the decoder and may serve several layers. Give the model: "
                "blindsight_backend(profile, model=model)"
            )
        fingerprint = self._profile.fingerprint
        if layer is not None and layer >= self._profile.num_layers:
            return None, self._refuse(
                f"attention at {where} is layer {layer}, but the profile has "
                f"{self._profile.num_layers} layers. Use the profile of this model"
            )
        for name, found, expected in (
            ("heads", attention.num_heads, self._profile.num_heads),
            ("head dim", attention.head_dim, int(fingerprint["head_dim"])),
        ):
            if found is not None and found != expected:
                return None, self._refuse(
                    f"{name} of attention at {where} must be {expected} as in the profile, got "
                    f"{found}. Use the profile of this model"
                )
        if attention.dropout_p:
            return None, self._refuse(
                f"dropout of attention at {where} must be 0, got {attention.dropout_p}. "
                "FlexAttention has none: call model.eval()"
            )
        return layer, None

    def _resembles_decoder(self, attention: Attention) -> bool:
        """Whether a call in a frame of unknown origin could be the decoder's."""
        masked = attention.is_causal or attention.attn_mask is not None
        shape = (attention.num_heads, attention.head_dim)
        ours = (self._profile.num_heads, int(self._profile.fingerprint["head_dim"]))
        inside_another_stack = any(part.isdigit() for part in attention.path.split("."))
        return masked and shape == ours and not inside_another_stack

    def _find_cache(self, gm: fx.GraphModule) -> _KeyCache:
        """Return the cache that tells the sequence's history: one layer's stands for all."""
        inputs = placeholders(gm)
        outputs = gm.graph.output_node().args[0]
        types = self._profile.fingerprint["layer_types"].split(",")
        # A cache that slides forgets its first tokens, so any other says more.
        by_use = sorted(
            self._calls, key=lambda call: call.layer is not None and "sliding" in types[call.layer]
        )
        for call in by_use:
            found = find_key_cache(gm, call.attention)
            after = tuple(at for at, node in enumerate(outputs) if node in found.after)  # type: ignore[arg-type]
            if found.before is not None or after:
                if call.layer is None:
                    self._check_recompile_limit()
                return _KeyCache(
                    before=None if found.before is None else inputs.index(found.before),
                    after=after,
                    length=None if found.length is None else inputs.index(found.length),
                    in_place=found.in_place,
                )
        return _KeyCache()

    def _check_recompile_limit(self) -> None:
        limit = torch._dynamo.config.recompile_limit
        if self._profile.num_layers > limit:
            self._refuse(
                "torch._dynamo.config.recompile_limit must be at least the number of layers, "
                f"{self._profile.num_layers}, for a decoder that is compiled layer by layer with "
                f"a cache, got {limit}: the layers beyond it would run uncompiled, and dense. "
                f"Set it to {4 * self._profile.num_layers}"
            )

    def _refuse(self, problem: str) -> str:
        """Make a problem an error of every call (strict), or warn of it; return it."""
        if self._backend.strict:
            sentence = problem[0].upper() + problem[1:]
            self._error = f"{sentence}, or leave such attention dense with strict=False."
        else:
            self._runtime.warn_once(f"left dense: {problem}.")
        return problem

    # What to run: decided per call.

    def _layers_of(self, args: Sequence[Any]) -> tuple[int, ...]:
        layers = []
        for call in self._calls:
            layer = call.layer
            if layer is None and self._backend.layer_map is not None:
                parameters = (args[at] for at in call.attention.parameters)
                layer = self._backend.layer_map.layer_of(parameters)
            if layer is None:
                raise ValueError(
                    f"the parameters of attention at {call.attention.path or 'the frame'} must "
                    "belong to one layer of the model that the backend was given, and belong to "
                    "none. Give the backend the model that is compiled, after changing its weights."
                )
            layers.append(layer)
        return tuple(layers)

    def _decide(
        self, args: Sequence[Any], layers: tuple[int, ...]
    ) -> tuple[History | None, str | None]:
        """Return what is known of the sequence, and why the call runs dense (None: sparse)."""
        batch, num_queries, num_keys = self._sizes(args)
        past, past_is_known = self._past(args, num_queries, num_keys)
        pending = self._runtime.pending
        history: History | None
        if (template := explicit_template()) is not None:
            history = History(self._profile.rule, template=template)
            expected = self._num_tokens(args, past, past_is_known, num_queries, num_keys)
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
            history = self._runtime.history(pending, past) if past_is_known else None
            unknown = "the tokens already in the cache are not known"
        if history is None:
            if pending is not None and pending.is_text:
                return None, _NO_IMAGE_QUERY
            if is_disabled():
                return None, "disabled"
            self._runtime.warn_once(
                f"prefill ran dense: {unknown}. Give the template of the whole sequence: "
                "blindsight.use_template(span_id, is_sink)."
            )
            return None, unknown
        if is_disabled():
            return history, "disabled"
        if template is None and pending is not None and pending.is_text:
            return history, _NO_IMAGE_QUERY
        if not history.restricts_queries_from(history.num_tokens - num_queries):
            return history, _NO_IMAGE_QUERY
        if not any(self._profile.categories[layer].any() for layer in layers):
            return history, "all its heads are dense"
        return history, None

    def _sizes(self, args: Sequence[Any]) -> tuple[int, int, int]:
        """Return B, Q and the largest K of the graph's attention."""
        values = {symbol: args[at] for symbol, at in self._symbols.items()}
        query = _shape(self._calls[0].attention.query)
        keys = [_shape(call.attention.key)[2] for call in self._calls]
        return (
            _evaluate(query[0], values),
            _evaluate(query[2], values),
            max(_evaluate(size, values) for size in keys),
        )

    def _past(
        self, args: Sequence[Any], num_queries: int, num_keys: int
    ) -> tuple[History | None, bool]:
        """Return the tokens in the cache before the call (None: none), and if that is known."""
        cache = self._cache
        pending = self._runtime.pending
        # Reading a counter on a device waits for it: not for a decoded token.
        decodes = pending is not None and pending.is_text and num_queries == 1
        matters = explicit_template() is not None or not decodes
        length = int(args[cache.length]) if cache.length is not None and matters else None
        if cache.before is None:
            return None, length == 0 or (length is None and num_keys == num_queries)
        keys: Tensor = args[cache.before]
        history = self._runtime.caches.get(keys)
        if length is not None and history is not None and length != history.num_tokens:
            history = None
        if history is not None:
            return history, True
        return None, length == 0 or keys.numel() == 0

    def _num_tokens(
        self,
        args: Sequence[Any],
        past: History | None,
        past_is_known: bool,
        num_queries: int,
        num_keys: int,
    ) -> int | None:
        """Return T, or None where only the user knows how much is in the cache."""
        if past_is_known:
            return num_queries + (0 if past is None else past.num_tokens)
        if self._cache.length is not None:
            return num_queries + int(args[self._cache.length])
        types = self._profile.fingerprint["layer_types"].split(",")
        grows = self._cache.before is not None and num_keys > args[self._cache.before].shape[2]
        slides = "sliding_attention" in types and len(self._calls) < len(types)
        return num_keys if grows and not slides else None

    def _remember(self, args: Sequence[Any], outputs: Any, history: History | None) -> None:
        """Attach what is known of the sequence to the tensors that hold its keys."""
        caches = self._runtime.caches
        holders = [outputs[at] for at in self._cache.after]
        if self._cache.before is not None and self._cache.in_place:
            holders.append(args[self._cache.before])
        for keys in holders:
            if history is None:
                caches.drop(keys)
            else:
                caches.put(keys, history)

    def _run_own(self, args: Sequence[Any]) -> Any:
        if self._own is None:
            self._own = self._compile(copy_graph_module(self._gm), args)
        return self._own(*args)

    def _run_rewritten(self, args: Sequence[Any], layers: tuple[int, ...], history: History) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            raise ValueError(
                "sparse attention must run without gradients, got grad enabled. Call the model "
                "under torch.inference_mode() or torch.no_grad(), or under blindsight.disabled() "
                "to run it dense."
            )
        query = fake_tensor(self._calls[0].attention.query)
        device = torch.device("cpu") if query is None else query.device
        # A call whose layer is dense stays the model's own, where the graph itself tells the layer.
        chosen = tuple(
            at
            for at, call in enumerate(self._calls)
            if call.layer is None or bool(self._profile.categories[call.layer].any())
        )
        rows = tuple(layers[at] for at in chosen)
        if rows not in self._rows:
            self._rows[rows] = self._profile.categories[list(rows)].to(device, torch.int32)
        template = history.on(device)
        inputs = (*args, template.span_id, template.is_sink, self._rows[rows])
        sizes = tuple(args[at] for at in self._symbols.values())
        key = (chosen, sizes, template.num_tokens)
        if key not in self._variants:
            gm = copy_graph_module(self._gm)
            attention = find_attention(gm, layer_pattern=self._profile.rule.layer_pattern)
            positions = {call.attention.node.name for call in self._calls}
            ours = [one for one in attention if one.node.name in positions]
            replace_attention_pass(gm, attention=[ours[at] for at in chosen])
            self._variants[key] = self._compile(gm, inputs)
            while len(self._variants) > _MAX_VARIANTS:
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        return self._variants[key](*inputs)

    def _compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile for exactly these sizes, outside of Dynamo, which has long left the graph."""
        from torch._dynamo.convert_frame import compile_lock

        with compile_lock:
            return self._inner(gm, list(inputs))


def _tier(attention: Attention) -> str:
    if attention.attn_mask is not None:
        return "materialised"
    return "causal" if attention.is_causal else "none"


def _symbols(gm: fx.GraphModule) -> dict[object, int]:
    """Return the positions of the inputs that are symbolic sizes, by symbol."""
    return {
        node.meta["example_value"].node.expr: position
        for position, node in enumerate(placeholders(gm))
        if isinstance(node.meta.get("example_value"), torch.SymInt)
    }


def _shape(node: fx.Node) -> Sequence[int | torch.SymInt]:
    tensor = fake_tensor(node)
    if tensor is None:
        raise ValueError(f"node {node} must be a tensor with a known shape, and Dynamo gave none.")
    return tensor.shape


def _evaluate(size: int | torch.SymInt, values: dict[object, int]) -> int:
    """Return a size of the graph for the present values of its symbols."""
    return size if isinstance(size, int) else int(size.node.expr.subs(values))


def _example(placeholder: fx.Node) -> object:
    """Return the real tensor that an input was traced with, where Dynamo still has it."""
    return getattr(placeholder.meta.get("grapharg"), "example", None)


def _runs_head(gm: fx.GraphModule) -> bool:
    """Whether a graph computes logits: when it runs, the decoder has run."""
    return any(source_name(node).endswith("lm_head.weight") for node in placeholders(gm))
