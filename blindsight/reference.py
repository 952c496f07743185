"""The slow, plain reference: what a profile means, computed with dense masks and softmax.

It shares nothing with the compiled path but the template (where the images are), needs no
compiler, and runs through transformers' own registry of attention functions.

Shapes: B batch, H query heads, G key/value heads, Q and K lengths in tokens (Q = K = T in a
prefill), D head dim, V vocabulary.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.categories import HeadCategory
from blindsight.configs import (
    CACHE_ARGUMENTS,
    check_masks_are_known,
    config_of,
    shares_keys,
    text_config,
)
from blindsight.modules import plain_name, unwrapped
from blindsight.profile import Profile
from blindsight.runtime.context import disabled
from blindsight.template import Template
from blindsight.text_tables import compact

NAME = "blindsight_reference"

_MAX_SCORES = 2**25  # scores held at once, 128 MiB in float32


@dataclass(frozen=True)
class _Run:
    """What the attention function needs to know of the forward under way."""

    template: Template
    profile: Profile
    layers: Mapping[nn.Module, int]
    restarts: Tensor | None = None  # [B, T], where the given positions start again
    met: set[int] = field(default_factory=set)  # layers that called it


_run: ContextVar[_Run | None] = ContextVar("blindsight_reference_run", default=None)


def reference_logits(
    model: nn.Module,
    inputs: Mapping[str, Any],
    profile: Profile | str | os.PathLike[str],
    template: Template | None = None,
) -> Tensor:
    """Run one prefill eagerly with the masks of a profile, and return its logits.

    The model's attention implementation is as before afterwards; vision towers keep theirs.

    Args:
        model: A transformers model, compiled or not.
        inputs: Keyword arguments of its forward, without a cache.
        profile: The category of every head, or its file.
        template: Where the images are, ``[B, T]``; by default found in ``input_ids``.

    Returns:
        ``[B, T, V]``, or the last positions only, if the inputs ask for that.

    Raises:
        ValueError: The profile is another model's, the template does not fit the prompt, or
            the inputs are not a prefill's.
    """
    model = unwrapped(model)
    profile = Profile.of(profile)
    profile.validate(model)
    for name in CACHE_ARGUMENTS:
        if inputs.get(name) is not None:
            raise ValueError(
                f"inputs must be those of a prefill, got {name}. Give the whole sequence."
            )
    if template is None:
        if not isinstance(inputs.get("input_ids"), Tensor):
            raise ValueError(
                f"inputs must have input_ids, or a template be given, got {sorted(inputs)}."
            )
        template = profile.rule.template_of_inputs(inputs)
    layers = attention_layers(model, profile.rule.layer_pattern, profile.layers)
    kept = 0
    if shares_keys(model):  # all rows of all layers are to be computed
        inputs = dict(inputs)
        kept = inputs.pop("logits_to_keep", 0)
    run = _Run(template, profile, layers, _restarts(inputs.get("position_ids")))
    token = _run.set(run)
    try:
        with (
            replaced_attention(model, NAME, _attention, layers),
            disabled(),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            logits: Tensor = model(**{**inputs, "use_cache": False}).logits
            if missing := set(layers.values()) - run.met:
                raise ValueError(
                    f"layers {compact(sorted(missing))} of {type(model).__name__} must attend by "
                    "transformers' attention interface, and did not."
                )
            return logits[:, slice(-kept, None) if isinstance(kept, int) else kept]
    finally:
        _run.reset(token)


def attention_layers(
    model: nn.Module, layer_pattern: str, expected: Sequence[int]
) -> dict[nn.Module, int]:
    """Return which layer each attention module of the decoder is.

    Raises:
        ValueError: The modules at ``layer_pattern`` are not those of the expected layers.
    """
    pattern = layer_pattern + r"$"
    names = (
        (module, plain_name(name))
        for name, module in model.named_modules()
        if "_orig_mod" not in module._modules  # what torch.compile wraps around another
    )
    found = ((module, re.search(pattern, name)) for module, name in names)
    layers = {module: int(match.group(1)) for module, match in found if match is not None}
    if sorted(layers.values()) != list(expected):
        raise ValueError(
            f"model must have the attention of layers {compact(expected)} at {layer_pattern!r}, "
            f"found it of layers {compact(sorted(layers.values())) or 'none'}."
        )
    return layers


@contextmanager
def replaced_attention(
    model: nn.Module,
    name: str,
    attention: Callable[..., tuple[Tensor, None]],
    layers: Iterable[nn.Module],
) -> Iterator[None]:
    """Let the decoder of a model call ``attention`` inside this context, vision towers not.

    It gets the model's own mask as bool ``[B, 1, Q, K]``, whatever it is; never None.

    Args:
        model: A transformers model.
        name: What the function is registered as.
        attention: In the form of transformers' attention functions.
        layers: The attention modules of the decoder. A decoder that was put in, or copied, has a
            config of its own.
    """
    check_masks_are_known(model)
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    # A name without a mask function of its own would get no mask at all.
    AttentionMaskInterface.register(name, _base_mask)
    found: list[Any] = [text_config(config_of(model)), *(config_of(layer) for layer in layers)]
    configs = {id(config): config for config in found}.values()
    implementations = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, implementations, strict=True):
            config._attn_implementation = implementation


def _base_mask(*args: Any, **kwargs: Any) -> Tensor:
    """Return the model's own mask ``[B, 1, Q, K]`` bool, whatever it is; never None."""
    from transformers.masking_utils import sdpa_mask

    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, **{**kwargs, **skips})
    assert mask is not None and mask.dtype == torch.bool
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in the form that transformers wants: ``[B, Q, H, D]``."""
    run = _run.get()
    if run is None or attention_mask is None or module not in run.layers:
        raise ValueError(
            f"{type(module).__name__} must be a decoder's, run by reference_logits, and isn't."
        )
    check_is_plain(dropout, kwargs.get("softcap"))
    run.met.add(run.layers[module])
    num_heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    template = Template(*(tensor.to(query.device) for tensor in run.template.tensors()))
    covered = tuple(template.span_id.shape)
    if covered != (query.shape[0], num_queries) or num_keys != num_queries:
        raise ValueError(
            f"template must cover the prompt of {query.shape[0]} x {num_queries} tokens and "
            f"{num_keys} keys, got {list(covered)}."
        )
    categories = run.profile.categories[run.layers[module]].tolist()
    bias = None
    if attention_mask.dtype != torch.bool:
        bias = attention_mask
        attention_mask = bias > torch.finfo(bias.dtype).min
    first_spans = _first_spans(template, attention_mask, run.restarts)
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Every query head gets its own copy of the key/value head that it reads.
    key, value = (
        x.to(dtype).repeat_interleave(num_heads // x.shape[1], dim=1) for x in (key, value)
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    step = max(1, _MAX_SCORES // (query.shape[0] * num_heads * num_keys))
    outputs = []
    for begin in range(0, num_queries, step):
        rows = slice(begin, begin + step)
        kept = [kept_pairs(template, HeadCategory(code), rows, first_spans) for code in categories]
        allowed = torch.stack(kept, dim=1) & attention_mask[:, :, rows]  # [B, H, rows, K]
        scores = query[:, :, rows].to(dtype) @ key.transpose(2, 3) * scale
        if bias is not None:
            scores = scores + bias[:, :, rows]
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
        outputs.append((weights @ value).to(query.dtype))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def check_is_plain(dropout: float, softcap: object) -> None:
    """Check that attention is the softmax of masked scores, and no more.

    Raises:
        ValueError: It has dropout, or a cap on its scores.
    """
    if dropout or softcap is not None:
        raise ValueError(
            f"attention must be without dropout and softcap, got dropout={dropout}, "
            f"softcap={softcap}."
        )


def _restarts(position_ids: Tensor | None) -> Tensor | None:
    """Return where given positions start again, as in a row of several packed prompts."""
    if position_ids is None:
        return None
    text = position_ids if position_ids.dim() == 2 else position_ids[0]
    return torch.nn.functional.pad(text.diff() < 0, (1, 0))


def _first_spans(template: Template, allowed: Tensor, restarts: Tensor | None) -> Tensor | None:
    """Return the first span of each token's sequence ``[B, T]``, where a row packs several.

    Args:
        template: Of the rows.
        allowed: ``[B or 1, 1, T, T]``, the model's own mask.
        restarts: ``[B or 1, T]``. A sequence begins where no token sees any from before, too.
    """
    if restarts is None or not bool(restarts.any()):
        return None
    firsts = torch.ones_like(template.span_id)
    for b in range(len(firsts)):
        for at in restarts[b % len(restarts)].nonzero().flatten().tolist():
            if not bool(allowed[b % len(allowed), 0, at:, :at].any()):
                later = template.span_id[b, at:]
                firsts[b, at:] = later[later > 0].min() if bool((later > 0).any()) else 0
    return firsts


def kept_pairs(
    template: Template, category: HeadCategory, rows: slice, first_spans: Tensor | None = None
) -> Tensor:
    """Return what a category keeps ``[B, rows, K]``, pair by pair, as it is defined.

    Args:
        template: Where the images are.
        category: Of the head.
        rows: The queries.
        first_spans: ``[B, T]``, the first span of each token's sequence; by default span 1.
    """
    query_span = template.span_id[:, rows, None]
    key_span = template.span_id[:, None, :]
    key_is_sink = template.is_sink[:, None, :]
    position = torch.arange(template.num_tokens, device=key_span.device)
    is_itself = position[rows, None] == position
    same_span = query_span == key_span
    is_text = (query_span == 0) | (key_span == 0)
    is_first = query_span == (1 if first_spans is None else first_spans[:, rows, None])
    always = is_text | is_first
    if category is HeadCategory.DENSE:
        return torch.ones_like(always)
    if category is HeadCategory.SINK:
        return always | key_is_sink | is_itself
    if category is HeadCategory.DOCUMENT:
        return always | same_span
    return always | same_span | key_is_sink
