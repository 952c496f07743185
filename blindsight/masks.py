"""What every category of head may see, as key intervals per query row.

Shapes: B batch, C categories, Q and K lengths of queries and keys in tokens, T tokens of the
whole sequence. Query row i is token ``T - Q + i``. Key column j is token ``j + offset``, where
the offset is 0, or ``T - K`` for a cache that keeps only the last K tokens. Key columns at or
beyond T are the unfilled slots of a static cache.

For a query in an image other than the first of its sequence

    keep(c, b, q, k) = lower[b, c, q] <= k <= upper[b, c, q]  or  visible[b, c, k]

and every other query sees everything. A row depends on nothing that comes after it, so a prompt
prefilled whole, in chunks or turn by turn gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.template import span_edges


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


def keep_intervals(span_id: Tensor, is_sink: Tensor, num_queries: int, num_keys: int) -> Keep:
    """Return what each category keeps, for the last ``num_queries`` tokens of the sequence.

    Args:
        span_id: ``[B, T]`` int32, contiguous runs numbered 1..n, 0 for text.
        is_sink: ``[B, T]`` bool.
        num_queries: Q, at most T.
        num_keys: K.
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
    free = span_id[:, past:] <= 1
    everything = torch.zeros_like(free, dtype=torch.int64)
    lower = per_category(everything, itself.expand(batch, -1), first[:, past:] - offset)
    upper = per_category(
        everything + (num_keys - 1), itself.expand(batch, -1), last[:, past:] - offset
    )
    lower = torch.where(free[:, None], 0, lower)
    upper = torch.where(free[:, None], num_keys - 1, upper)

    is_text = _to_columns(span_id == 0, offset, num_keys, fill=True)
    is_anchor = is_text | _to_columns(is_sink, offset, num_keys, fill=False)
    visible = torch.stack([torch.ones_like(is_text), is_anchor, is_text, is_anchor], dim=1)
    return Keep(lower.to(torch.int32), upper.to(torch.int32), visible)


def _to_columns(flags: Tensor, offset: int, num_keys: int, *, fill: bool) -> Tensor:
    """Return the flags of tokens ``[B, T]`` by key column ``[B, K]``."""
    flags = flags[:, offset:]
    missing = num_keys - flags.shape[1]
    return torch.nn.functional.pad(flags, (0, missing), value=fill) if missing > 0 else flags
