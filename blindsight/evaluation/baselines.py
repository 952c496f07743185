"""Baselines that profiles are compared with; for evaluation only, never compiled.

Shapes: B batch, H query heads, G key/value heads, T tokens of the prompt, Q and K lengths of
queries and keys in tokens, L layers, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blindsight.categories import HeadCategory
from blindsight.evaluation.masked_model import EVERYTHING, HeadMask, MaskedCall, Masks, Prompt


def shuffled_categories(categories: Tensor, layers: Sequence[int], seed: int) -> Tensor:
    """Return the categories of the given layers, dealt anew to their heads: ``[L, H]``."""
    generator = torch.Generator().manual_seed(seed)
    ours = categories[list(layers)]
    order = torch.randperm(ours.numel(), generator=generator)
    shuffled = categories.clone()
    shuffled[list(layers)] = ours.flatten()[order].view_as(ours)
    return shuffled


@dataclass(frozen=True)
class WindowMasking:
    """The mask of StreamingLLM (arXiv 2309.17453): the first tokens, and a window before a query.

    It applies to all rows, text included, in all layers and heads. Tokens keep their positions.
    This compares the mask alone, not the cache eviction that it was designed for.

    Args:
        share: Of the cost of the prompt's dense attention; the window is the longest that costs no
            more.
        num_sinks: The first tokens of the prompt, which stay visible; 4 as in the paper.
    """

    share: float
    num_sinks: int = 4

    @property
    def key(self) -> str:
        return f"window share={self.share!r} sinks={self.num_sinks}"

    def masks(self, prompt: Prompt) -> Masks:
        return _WindowMasks(self, prompt)


class _WindowMasks:
    def __init__(self, masking: WindowMasking, prompt: Prompt) -> None:
        self._prompt = prompt
        self._num_sinks = masking.num_sinks
        self._kept: dict[tuple[int, int, int], Tensor] = {}
        dense = prompt.visible[:, :, HeadCategory.DENSE].sum(0)
        longest = prompt.valid.shape[1]
        self.window = _largest(
            lambda window: self._pairs_of_head(window) <= masking.share * dense,
            torch.ones_like(dense),
            torch.full_like(dense, longest),
        )

    def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
        num_queries, num_keys = call.base.shape[2:]
        sizes = (call.num_tokens, num_queries, num_keys)
        if sizes not in self._kept:
            token = torch.arange(call.num_tokens, device=self.window.device)
            query, key = token[-num_queries:, None], token[-num_keys:]
            is_sink = key < (self._begin + self._num_sinks)[:, None]
            self._kept[sizes] = (query - key < self.window[:, None, None]) | is_sink[:, None]
        return [HeadMask(None, self._kept[sizes])]

    @property
    def _begin(self) -> Tensor:
        """The number of padding tokens before each prompt, ``[B]``."""
        return self._prompt.valid.shape[1] - self._prompt.num_tokens

    def count_pairs(self) -> Tensor:
        return self._pairs_of_head(self.window) * self._prompt.num_heads

    def count_rows(self) -> Tensor:
        return self._prompt.num_tokens * len(self._prompt.lower)

    def _pairs_of_head(self, window: Tensor) -> Tensor:
        """Return the pairs that one head computes in all layers together, ``[B]``."""
        prompt = self._prompt
        longest = prompt.valid.shape[1]
        recent = torch.arange(longest, device=window.device) - window[:, None] + 1
        in_window = prompt.count_visible(prompt.valid, recent, torch.full_like(recent, longest - 1))
        last_sink = torch.minimum(self._begin[:, None] + self._num_sinks, recent) - 1
        in_sinks = prompt.count_visible(prompt.valid, torch.zeros_like(recent), last_sink)
        pairs = in_window + in_sinks
        return (pairs * prompt.valid * prompt.widths[:, None, None]).sum((0, 2))


@dataclass(frozen=True)
class PruningMasking:
    """Image tokens dropped after an early layer: the rule of FastV (arXiv 2403.06764).

    Image tokens are ranked by the attention that the last token of the prompt pays them in layer
    ``num_layers``, averaged over heads. Those with the least are dropped from all later layers:
    their rows are not computed, and no row sees them. Delimiters are kept, and tokens keep their
    positions.

    Args:
        share: Of the cost of the prompt's dense attention; as many tokens are dropped as it takes
            to cost no more. That is not always possible: text is never dropped, nor anything in
            the first layers.
        num_layers: How many layers run in full; 2 as in the paper.
    """

    share: float
    num_layers: int = 2

    @property
    def key(self) -> str:
        return f"pruning share={self.share!r} layers={self.num_layers}"

    def masks(self, prompt: Prompt) -> Masks:
        return _PruningMasks(self, prompt)


class _PruningMasks:
    def __init__(self, masking: PruningMasking, prompt: Prompt) -> None:
        if not 0 < masking.num_layers < len(prompt.lower):
            raise ValueError(
                f"num_layers must be 1..{len(prompt.lower) - 1}, of the model's "
                f"{len(prompt.lower)}, got {masking.num_layers}."
            )
        if not bool(prompt.widths.all()):
            raise ValueError(
                "tokens can be dropped if all layers of the model have attention, got layers "
                f"{(prompt.widths == 0).nonzero().flatten().tolist()} without."
            )
        self._prompt = prompt
        self._num_layers = masking.num_layers
        self._dropped: Tensor | None = None
        num_tokens = prompt.num_tokens
        dense = prompt.visible[:, :, HeadCategory.DENSE]  # [L, B]
        early, late = dense[: masking.num_layers].sum(0), dense[masking.num_layers :].sum(0)
        causal = num_tokens * (num_tokens + 1)

        def is_cheap(num_kept: Tensor) -> Tensor:
            share_of_late = num_kept * (num_kept + 1) / causal
            return early + late * share_of_late <= masking.share * (early + late)

        num_images = prompt.is_image.sum(1)
        num_kept = _largest(is_cheap, num_tokens - num_images, num_tokens)
        self.num_dropped = num_tokens - num_kept

    def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
        if call.layer == self._num_layers - 1 and self._dropped is None:
            self._dropped = self._rank(call)
        if call.layer < self._num_layers:
            return EVERYTHING
        assert self._dropped is not None
        decoded, num_keys = call.num_tokens - self._dropped.shape[1], call.key.shape[2]
        dropped = torch.nn.functional.pad(self._dropped, (0, decoded))[:, -num_keys:]
        return [HeadMask(None, ~dropped[:, None])]

    def count_pairs(self) -> Tensor:
        prompt = self._prompt
        kept = prompt.valid & ~self._dropped_tokens
        first = torch.zeros_like(prompt.valid, dtype=torch.int64)
        pairs = prompt.count_visible(kept, first, first + prompt.valid.shape[1] - 1)
        late = (pairs * kept * prompt.widths[:, None, None])[self._num_layers :].sum((0, 2))
        early = prompt.visible[: self._num_layers, :, HeadCategory.DENSE].sum(0)
        return (early + late) * prompt.num_heads

    def count_rows(self) -> Tensor:
        num_late = len(self._prompt.lower) - self._num_layers
        return self._prompt.num_tokens * len(self._prompt.lower) - self.num_dropped * num_late

    @property
    def _dropped_tokens(self) -> Tensor:
        if self._dropped is None:
            raise ValueError("pairs must be counted after the prefill that ranks the tokens.")
        return self._dropped

    def _rank(self, call: MaskedCall) -> Tensor:
        """Return which tokens are dropped, ``[B, T]`` bool."""
        batch, num_heads, _, head_dim = call.query.shape
        num_kv_heads = call.key.shape[1]
        last = call.query[:, :, -1].reshape(batch, num_kv_heads, -1, head_dim)
        scores = last.float() @ call.key.float().transpose(2, 3) * call.scale  # [B, G, H / G, K]
        scores = scores.masked_fill(~call.base[:, :, -1:], float("-inf"))
        weights = scores.softmax(-1).reshape(batch, num_heads, -1).mean(1)
        is_image = self._prompt.is_image
        weights = weights.to(is_image.device).masked_fill(~is_image, float("inf"))
        rank = weights.argsort(dim=1, stable=True).argsort(dim=1)
        return rank < self.num_dropped[:, None]


def _largest(is_cheap: Callable[[Tensor], Tensor], lowest: Tensor, highest: Tensor) -> Tensor:
    """Return the largest number that is cheap, by bisection; ``lowest`` if none is."""
    lowest, highest = lowest.clone(), highest.clone()
    while bool((lowest < highest).any()):
        middle = (lowest + highest + 1) // 2
        cheap = is_cheap(middle)
        lowest = torch.where(cheap, middle, lowest)
        highest = torch.where(cheap, highest, middle - 1).clamp(min=lowest)
    return lowest
