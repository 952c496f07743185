"""What every category of head may see, as key intervals per query row.

Shapes: B batch, C categories, Q and K lengths of queries and keys in tokens, T tokens of the
whole sequence. Query row i is token ``T - Q + i``. Key column j is token ``j + offset``, where
the offset is 0, or ``T - K`` for a cache that keeps only the last K tokens. Key columns at or
beyond T are the unfilled slots of a static cache.

For a query in an image other than the first of its sequence

    keep(c, b, q, k) = lower[b, c, q] <= k <= upper[b, c, q]  or  visible[b, c, k]

and every other query sees everything. A row depends on nothing that comes after it, so a prompt
prefilled whole, in chunks or turn by turn gives the same numbers. What the model's own mask
allows is an interval per query too, see :class:`BaseMask`; ``intervals`` joins both in an order of
tokens where nothing is left but intervals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.template import span_edges


class BaseMask(NamedTuple):
    """What the model itself lets a query see: a range of key columns, less the invalid ones.

    ``base(b, q, k) = valid[b, k] and lower[b, q] <= k <= upper[b, q]``. Causal masks, sliding
    windows, images that see all of themselves, chunks and packed sequences are of this form, with
    padding on any side, and so is what several of them allow together. Key columns at or beyond
    T must be hidden, by either condition.

    Attributes:
        lower, upper: ``[B, Q]`` int32, first and last key column; ``lower > upper`` if none. Or
            ``[B, 3, Q]``, for text, sinks and other tokens of spans each: only columns of such a
            group are meant then.
        valid: ``[B, K]`` bool, False for padding.
    """

    lower: Tensor
    upper: Tensor
    valid: Tensor

    @property
    def is_by_group(self) -> bool:
        """Whether it is intervals of each group of columns, and not of all."""
        return self.lower.dim() == 3

    def of_groups(self) -> list[BaseMask]:
        """Return the mask of each group of keys, ``[B, Q]`` all, or the one of them all."""
        if not self.is_by_group:
            return [self]
        bounds = zip(self.lower.unbind(1), self.upper.unbind(1), strict=True)
        return [BaseMask(lower, upper, self.valid) for lower, upper in bounds]


class Keep(NamedTuple):
    """What each category keeps, in key columns.

    Attributes:
        lower, upper: ``[B, C, Q]`` int32, the first and last key of a query's own interval.
        visible: ``[B, C, K]`` bool, keys that every query of the category sees.
    """

    lower: Tensor
    upper: Tensor
    visible: Tensor


def key_offset(num_tokens: int, num_keys: int) -> int:
    """Return which token key column 0 is."""
    return max(num_tokens - num_keys, 0)


def causal_base(
    batch: int,
    num_queries: int,
    num_keys: int,
    num_tokens: int,
    device: torch.device | str | None = None,
) -> BaseMask:
    """Return the causal mask of the last ``num_queries`` tokens, without padding."""
    begin = num_tokens - num_queries - key_offset(num_tokens, num_keys)
    itself = torch.arange(begin, begin + num_queries, dtype=torch.int32, device=device)
    return BaseMask(
        torch.zeros_like(itself).expand(batch, -1),
        itself.expand(batch, -1),
        torch.ones(batch, num_keys, dtype=torch.bool, device=device),
    )


def keep_intervals(
    span_id: Tensor,
    is_sink: Tensor,
    num_queries: int,
    num_keys: int,
    *,
    first_span: Tensor | None = None,
) -> Keep:
    """Return what each category keeps, for the last ``num_queries`` tokens of the sequence.

    Args:
        span_id: ``[B, T]`` int32, spans numbered 1..n in prompt order, 0 for text.
        is_sink: ``[B, T]`` bool.
        num_queries: Q, at most T.
        num_keys: K.
        first_span: ``[B, Q]`` bool, the queries in the first span of their sequence, where
            several sequences are packed into a row; by default those of span 1.
    """
    batch, num_tokens = span_id.shape
    past = num_tokens - num_queries
    offset = key_offset(num_tokens, num_keys)

    def per_category(dense: Tensor, sink: Tensor, document: Tensor) -> Tensor:
        rows = [dense] * NUM_CATEGORIES
        rows[HeadCategory.SINK] = sink
        rows[HeadCategory.DOCUMENT] = rows[HeadCategory.DOCUMENT_SINK] = document
        return torch.stack(rows, dim=1)

    first, last = span_edges(span_id)
    itself = torch.arange(past, num_tokens, device=span_id.device) - offset
    free = is_unrestricted(span_id[:, past:], first_span)
    everything = torch.zeros_like(free, dtype=torch.int64)
    lower = per_category(everything, itself.expand(batch, -1), first[:, past:] - offset)
    upper = per_category(
        everything + (num_keys - 1), itself.expand(batch, -1), last[:, past:] - offset
    )
    lower = torch.where(free[:, None], 0, lower)
    upper = torch.where(free[:, None], num_keys - 1, upper)

    is_text = to_columns(span_id == 0, offset, num_keys, fill=True)
    is_anchor = is_text | to_columns(is_sink, offset, num_keys, fill=False)
    visible = torch.stack([torch.ones_like(is_text), is_anchor, is_text, is_anchor], dim=1)
    return Keep(lower.to(torch.int32), upper.to(torch.int32), visible)


def is_kept(
    b: Tensor,
    h: Tensor,
    q: Tensor,
    k: Tensor,
    categories: Tensor,
    lower: Tensor,
    upper: Tensor,
    visible: Tensor,
) -> Tensor:
    """Whether a head of its category keeps an element, prompt order."""
    category = categories[h]
    inside = (lower[b, category, q] <= k) & (k <= upper[b, category, q])
    return inside | visible[b, category, k]


def keep_elements(keep: Keep, num_keys: int) -> Tensor:
    """Return what the categories keep, element by element: ``[B, C, Q, K]`` bool."""
    column = torch.arange(num_keys, device=keep.visible.device)
    inside = (keep.lower[..., None] <= column) & (column <= keep.upper[..., None])
    return inside | keep.visible[:, :, None, :]


def is_unrestricted(query_span: Tensor, first_span: Tensor | None = None) -> Tensor:
    """Whether a query ``[B, Q]`` sees all that the base mask allows, whatever the category."""
    return (query_span == 0) | (query_span == 1 if first_span is None else first_span)


def to_columns(values: Tensor, offset: int, num_keys: int, *, fill: bool = False) -> Tensor:
    """Map values of tokens ``[B, T]`` to key columns ``[B, K]``; unfilled slots get ``fill``."""
    values = values[:, offset:]
    missing = num_keys - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing), value=fill) if missing > 0 else values
