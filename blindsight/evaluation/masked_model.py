"""Run a model as it is, uncompiled, with any mask for any head: what evaluation measures with.

The masks are explicit and dense, so the result follows directly from their definition; that is
practical for prompts of a few thousand tokens. Everything else is the model's own code.

Shapes: B batch, H query heads, G key/value heads, Q and K lengths in tokens (the queries are the
last Q of the K tokens), P groups of tokens, D head dim, C categories, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.cost import Counter
from blindsight.reference import check_is_plain, kept_pairs, replaced_attention
from blindsight.runtime.context import disabled
from blindsight.template import Template

NAME = "blindsight_masked"


@dataclass(frozen=True)
class Prompt:
    """What masks may depend on: the tokens of a batch of prompts, padded.

    Attributes:
        template: Where the images are, ``[B, T]``.
        is_image: ``[B, T]`` bool, the placeholders of images, without their delimiters.
        valid: ``[B, T]`` bool, False for padding, which is on the left.
        groups: ``[B, P, T]`` bool, groups of tokens: one of all tokens, or three of text, sinks
            and other tokens of spans.
        lower, upper: ``[L, B, P, T]`` ints, the first and last token of each group that the
            model's own mask lets a query see.
        widths: ``[L]`` int64, the head dim of each layer, as a multiple of the decoder's; 0 for a
            layer without attention.
        visible: ``[L, B, C]`` int64, the pairs that one head of each layer and category computes,
            times the layer's width.
        num_heads: H.
    """

    template: Template
    is_image: Tensor
    valid: Tensor
    groups: Tensor
    lower: Tensor
    upper: Tensor
    widths: Tensor
    visible: Tensor
    num_heads: int

    def count_visible(self, kept: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return how many keys a dense head sees, by layer and row, ``[L, B, T]``.

        Args:
            kept: ``[B, T]`` bool, the keys that exist.
            lower, upper: Ints that broadcast to ``[B, T]``, the first and last key that is counted.
        """
        shape = self.lower[:, :, 0].shape
        counts = torch.zeros(shape, dtype=torch.int64, device=kept.device)
        for group, flags in enumerate(self.groups.unbind(1)):
            counter = Counter(kept & flags)
            for layer in range(len(counts)):
                counts[layer] += counter.between(
                    torch.maximum(self.lower[layer, :, group], lower),
                    torch.minimum(self.upper[layer, :, group], upper),
                )
        return counts

    @property
    def num_tokens(self) -> Tensor:
        """The number of tokens without padding, ``[B]``."""
        return self.valid.sum(1)


class MaskedCall(NamedTuple):
    """One attention call.

    Attributes:
        layer: The number of its layer.
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``.
        base: ``[B, 1, Q, K]`` bool, what the model's own mask allows.
        scale: Factor on the scores.
        num_tokens: Length of the sequence so far; a cache that slides holds the last K of it.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    base: Tensor
    scale: float
    num_tokens: int


class HeadMask(NamedTuple):
    """A mask, and the heads that share it.

    Attributes:
        heads: Their numbers, or None for all heads.
        keep: Bool, broadcastable to ``[B, Q, K]``, what is kept of the model's own mask; None
            keeps all of it.
    """

    heads: Sequence[int] | None
    keep: Tensor | None


EVERYTHING = (HeadMask(None, None),)


class HeadMasks(Protocol):
    """Decides the masks of each call."""

    def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
        """Return the masks of one call; every head has exactly one."""


class Masks(HeadMasks, Protocol):
    """The masks of one batch, from prefill to the last decoded token."""

    def count_pairs(self) -> Tensor:
        """Return how many pairs of a query and a key the prefill computes, ``[B]``.

        Summed over heads, and over layers times their widths; padding is not counted.
        """

    def count_rows(self) -> Tensor:
        """Return how many tokens the layers compute, all layers together, ``[B]``."""


class Masking(Protocol):
    """A rule for masks; see :class:`ProfileMasking` and :mod:`blindsight.evaluation.baselines`."""

    @property
    def key(self) -> str:
        """A name that tells this rule from others, the same in every process."""

    def masks(self, prompt: Prompt) -> Masks:
        """Return the masks of a batch."""


@dataclass(frozen=True, eq=False)
class ProfileMasking:
    """The masks of the categories of a profile; ``categories`` are codes, ``[L, H]``."""

    categories: Tensor

    @property
    def key(self) -> str:
        digest = hashlib.sha256(str(self.categories.tolist()).encode())
        return f"categories {digest.hexdigest()[:16]}"

    def masks(self, prompt: Prompt) -> Masks:
        return _CategoryMasks(self.categories, prompt)


class _CategoryMasks:
    def __init__(self, categories: Tensor, prompt: Prompt) -> None:
        self._codes: list[list[int]] = categories.tolist()
        self._prompt = prompt
        self._kept: dict[int, Tensor] = {}

    def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
        codes = self._codes[call.layer]
        num_queries, num_keys = call.base.shape[2:]
        if num_queries != num_keys or not any(codes):
            return EVERYTHING  # a decoded token is text, and text sees everything
        found = []
        for code in sorted(set(codes)):
            heads = [head for head, other in enumerate(codes) if other == code]
            found.append(HeadMask(heads, self._keep(code)))
        return found if len(found) > 1 else [HeadMask(None, found[0].keep)]

    def count_pairs(self) -> Tensor:
        visible = self._prompt.visible
        heads = [[row.count(code) for code in range(NUM_CATEGORIES)] for row in self._codes]
        # Not as a matrix product: GPUs have none for integers.
        return (torch.tensor(heads).to(visible)[:, None] * visible).sum((0, 2))

    def count_rows(self) -> Tensor:
        return self._prompt.num_tokens * len(self._codes)

    def _keep(self, code: int) -> Tensor | None:
        if code == HeadCategory.DENSE:
            return None
        if code not in self._kept:
            self._kept[code] = kept_pairs(self._prompt.template, HeadCategory(code), slice(None))
        return self._kept[code]


@dataclass
class MaskedRun:
    """What :func:`masked` runs: the attention modules and their layers, and their masks.

    ``num_tokens`` is the length of the sequence so far, set before each token that is decoded;
    None where all of it is prefilled.
    """

    layers: Mapping[nn.Module, int]
    masks: HeadMasks | None
    num_tokens: int | None = None
    # Layers share masks: each pair of a base mask and a keep is joined once. The tensors are held
    # so that their ids stay theirs.
    joined: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def join(self, base: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return base
        key = (id(base), id(keep))
        if key not in self.joined:
            keep_rows = keep if keep.dim() == 3 else keep[None]
            # The layers of a model may be on several devices.
            self.joined[key] = (base & keep_rows[:, None].to(base.device), base, keep)
        return self.joined[key][0]


_run: ContextVar[MaskedRun | None] = ContextVar("blindsight_masked_run", default=None)


@contextmanager
def masked(
    model: nn.Module, layers: Mapping[nn.Module, int], masks: HeadMasks | None
) -> Iterator[MaskedRun]:
    """Let the decoder of a model attend through ``masks`` inside this context, uncompiled.

    Args:
        model: A transformers model.
        layers: The attention modules of the decoder and their layers, see
            :func:`blindsight.reference.attention_layers`.
        masks: The masks; None for the model's own mask alone.
    """
    run = MaskedRun(layers, masks)
    token = _run.set(run)
    try:
        with (
            replaced_attention(model, NAME, _attention, layers),
            disabled(),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
        ):
            yield run
    finally:
        _run.reset(token)


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
    """Attend, with the signature that transformers wants; returns ``[B, Q, H, D]``.

    Rows that see no key give zeros.
    """
    run = _run.get()
    if run is None or attention_mask is None or module not in run.layers:
        raise ValueError(
            f"{type(module).__name__} must be a decoder's, run inside masked(), and isn't."
        )
    check_is_plain(dropout, kwargs.get("softcap"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_tokens = run.num_tokens or key.shape[2]
    call = MaskedCall(run.layers[module], query, key, value, attention_mask, scale, num_tokens)
    head_masks = EVERYTHING if run.masks is None else run.masks.head_masks(call)
    ratio = query.shape[1] // key.shape[1]
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    for heads, keep in head_masks:
        mask = run.join(attention_mask, keep)
        if heads is None:
            sources = [head // ratio for head in range(query.shape[1])]
            part = query
        else:
            sources = [head // ratio for head in heads]
            part = query[:, heads]
        found = scaled_dot_product_attention(
            part, key[:, sources], value[:, sources], attn_mask=mask, scale=scale
        )
        if heads is None:
            output = found
        else:
            output[:, heads] = found
    return output.transpose(1, 2).contiguous(), None
