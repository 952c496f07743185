"""The timing of the demo: one long prompt of photographs, prefilled dense and sparse by one model.

Shapes: B batch (1), T tokens of the prompt, L layers, H query heads, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.backend import blindsight_backend
from blindsight.categories import NUM_CATEGORIES, summarize_categories
from blindsight.configs import cache_argument, cache_of, text_config
from blindsight.cost import AttentionFlops, attention_flops
from blindsight.demo.prompt import DemoOptions, load
from blindsight.modules import find_decoder, unwrapped
from blindsight.profile import Profile
from blindsight.progress import Progress
from blindsight.reference import reference_logits
from blindsight.report import Report
from blindsight.runtime.context import disabled
from blindsight.runtime.warmup import append_text
from blindsight.template import Template, TemplateRule
from blindsight.text_tables import facts


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest absolute differences of logits, and numbers to judge them by.

    Attributes:
        sparse: Between compiled sparse and the reference with dense masks.
        dense: Between compiled dense and the model run eagerly: what compiling alone changes.
        effect: Between compiled sparse and compiled dense: what the profile changes.
        magnitude: The largest logit of the reference.
        same_tokens: How many of the decoded tokens are those of the reference.
    """

    sparse: float
    dense: float
    effect: float
    magnitude: float
    same_tokens: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The measurements of the demo; ``str()`` gives its tables. Times are in seconds."""

    model: str
    num_tokens: int
    image_tokens: tuple[int, ...]
    profile: Profile
    compiled: str
    flops: AttentionFlops
    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]
    compile_seconds: Mapping[str, float]
    num_decoded: int
    difference: Difference | None
    report: Report

    def __str__(self) -> str:
        dense, sparse = (statistics.median(x) for x in (self.dense_seconds, self.sparse_seconds))
        sizes = f"{min(self.image_tokens)} to {max(self.image_tokens)} tokens each"
        heads = summarize_categories(
            self.profile.categories[list(self.profile.layers)].flatten().tolist()
        )
        compiling = ", ".join(f"{name} {x:.1f} s" for name, x in self.compile_seconds.items())
        share = self.flops.sparse / self.flops.dense
        lines = [
            ("model", self.model),
            ("compiled", self.compiled),
            ("prompt", f"{self.num_tokens:,} tokens, {len(self.image_tokens)} images of {sizes}"),
            ("layers x heads", f"{len(self.profile.layers)} x {self.profile.num_heads}: {heads}"),
            ("attention FLOPs, dense", f"{self.flops.dense:,}"),
            ("attention FLOPs, sparse", f"{self.flops.sparse:,} ({share:.1%} of dense)"),
            ("prefill, dense", _seconds(self.dense_seconds)),
            (
                "prefill, sparse",
                f"{_seconds(self.sparse_seconds)}; dense / sparse {dense / sparse:.2f}",
            ),
            ("first calls, which compile", compiling),
        ]
        if self.difference is not None:
            found = self.difference
            equal = f"{found.same_tokens} of {self.num_decoded} tokens as the reference's"
            lines += [
                ("decoded", equal),
                ("largest logit", f"{found.magnitude:.3g}"),
                ("largest difference of logits", ""),
                ("  sparse, from the reference", f"{found.sparse:.2g}"),
                ("  dense, compiled from eager", f"{found.dense:.2g} (rounding alone)"),
                ("  sparse, from dense", f"{found.effect:.2g} (what the profile changes)"),
            ]
        return f"{facts(lines)}\n\n{self.report}"


def _seconds(times: tuple[float, ...]) -> str:
    each = ", ".join(f"{seconds:.3f}" for seconds in times)
    return f"{statistics.median(times):.3f} s (median of {each})"


def num_steps(options: DemoOptions) -> int:
    """Return the number of steps that :func:`measure_speed` reports."""
    return 5 + 2 * options.repeats + options.new_tokens


def measure_speed(options: DemoOptions, progress: Progress) -> Speed:
    """Prefill one prompt dense and sparse in turn, and compare both with a reference."""
    model, inputs, described = load(options)
    profile = _profile_of(model, options)
    return _measure(options, model, inputs, profile, described, progress)


def _measure(
    options: DemoOptions,
    model: nn.Module,
    inputs: dict[str, Any],
    profile: Profile,
    described: str,
    progress: Progress,
) -> Speed:
    eager = None
    if options.check:
        eager, _ = progress("running eagerly", lambda: model(**inputs).logits.cpu())
    # Short prompts too: the point is to show what sparse attention does.
    backend = blindsight_backend(profile, inner=options.inner, model=model, lowering="split")
    compiled, name = model, "the whole model"
    if not options.whole:
        compiled, name = find_decoder(model, profile.rule.layer_pattern), "the decoder"
    compiled.compile(backend=backend)

    def prefill(dense: bool) -> Any:
        with disabled() if dense else nullcontext():
            return model(**inputs, use_cache=True)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        sparse, first_sparse = progress("compiling (sparse)", lambda: prefill(dense=False))
        dense, first_dense = progress("compiling (dense)", lambda: prefill(dense=True))
        sparse_logits, dense_logits = sparse.logits.cpu(), dense.logits.cpu()
        del sparse, dense
        for at in range(2 * options.repeats):
            is_dense = at % 2 == 0
            how = "dense" if is_dense else "sparse"
            output, elapsed = progress(f"timing {how}", partial(prefill, is_dense))
            seconds[is_dense].append(elapsed)
        tokens, decode_logits, decoding = _decode(model, output, options, progress)
        difference = None
        if eager is not None:
            longer = append_text(inputs, tokens[:, :-1])
            if "logits_to_keep" in inputs:
                longer["logits_to_keep"] = inputs["logits_to_keep"] + tokens.shape[1] - 1
            reference, _ = progress(
                "running the reference", lambda: reference_logits(model, longer, profile).cpu()
            )
            whole = torch.cat([sparse_logits, decode_logits], dim=1)
            expected = reference[:, -tokens.shape[1] :].argmax(-1)
            difference = Difference(
                sparse=_distance(whole, reference),
                dense=_distance(dense_logits, eager),
                effect=_distance(sparse_logits, dense_logits),
                magnitude=float(reference.abs().max()),
                same_tokens=int((expected == tokens.cpu()).sum()),
            )
    finally:
        backend.detach()
    template = profile.rule.template_of_inputs(inputs)
    return Speed(
        model=described,
        num_tokens=template.num_tokens,
        image_tokens=tuple(torch.bincount(template.span_id[0])[1:].tolist()),
        profile=profile,
        compiled=f"{name}, by {options.inner}",
        flops=_count_flops(model, profile, template),
        dense_seconds=tuple(seconds[True]),
        sparse_seconds=tuple(seconds[False]),
        compile_seconds={"sparse": first_sparse, "dense": first_dense, "decoding": decoding},
        num_decoded=tokens.shape[1],
        difference=difference,
        report=backend.report(),
    )


def _decode(
    model: nn.Module, output: Any, options: DemoOptions, progress: Progress
) -> tuple[Tensor, Tensor, float]:
    """Decode greedily after a prefill: tokens ``[B, n]``, logits ``[B, n - 1, V]``, seconds."""
    tokens, logits, seconds = [output.logits[:, -1:].argmax(-1)], [], 0.0
    cache = cache_of(output)
    for layer in getattr(cache, "layers", ()):
        # The length grows with every token: compile for any, at once.
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
    forward = unwrapped(model).forward
    its_cache = {cache_argument(forward): cache}
    for _ in range(options.new_tokens - 1):
        token = tokens[-1]
        output, elapsed = progress(
            "decoding",
            partial(model, input_ids=token, use_cache=True, **its_cache),
        )
        seconds += elapsed
        logits.append(output.logits[:, -1:].cpu())
        tokens.append(output.logits[:, -1:].argmax(-1))
    empty = output.logits[:, :0].cpu()
    return torch.cat(tokens, dim=1), torch.cat([empty, *logits], dim=1), seconds


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _count_flops(model: nn.Module, profile: Profile, template: Template) -> AttentionFlops:
    """Return the FLOPs of all layers, each under its causal mask, sliding window or chunks."""
    config = text_config(model.config)
    itself = torch.arange(template.num_tokens)[None]
    dense = sparse = 0
    for layer in profile.layers:
        lower = torch.zeros_like(itself)
        if profile.layer_types[layer] == "sliding_attention":
            lower = itself - config.sliding_window + 1
        elif profile.layer_types[layer] == "chunked_attention":
            lower = itself // config.attention_chunk_size * config.attention_chunk_size
        found = attention_flops(
            template,
            profile.categories[layer],
            head_dim=profile.head_dim(layer),
            base_lower=lower,
        )
        dense, sparse = dense + found.dense, sparse + found.sparse
    return AttentionFlops(dense, sparse)


def _profile_of(model: nn.Module, options: DemoOptions) -> Profile:
    if options.profile is not None:
        return Profile.load(options.profile)
    rule = None
    if options.model is not None:
        from transformers import AutoTokenizer

        rule = TemplateRule.from_config(model.config, AutoTokenizer.from_pretrained(options.model))
    dense = Profile.for_model(model, "dense", rule=rule)
    layer, head = torch.arange(dense.num_layers), torch.arange(dense.num_heads)
    mixed = (layer[:, None] + head) % NUM_CATEGORIES
    categories = torch.zeros_like(dense.categories)
    categories[list(dense.layers)] = mixed[list(dense.layers)].to(categories.dtype)
    return replace(dense, categories=categories)
