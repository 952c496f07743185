"""Every category's mask as intervals of keys per query row, with tokens sorted to suit.

Shapes: B batch, C categories, Q and K lengths of queries and keys in tokens, T tokens of the
whole sequence, L any of them. Rows and columns are numbered as in ``interval_masks``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.attention.interval_masks import BaseMask, is_unrestricted, key_offset, to_columns
from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.template import span_edges

NUM_KEY_GROUPS = 3  # of a row: text, sinks, other tokens of spans


class TokenOrder(NamedTuple):
    """A token order that groups the tokens a sparse mask treats alike.

    ``[text | sinks | other tokens of spans | padding]``, each by position. Text tokens lie
    between all images, and are dense rows and columns: in prompt order nearly every block holds
    one. Sorted, they fill a few blocks of their own.

    Attributes:
        query: ``[B, Q]`` int64, the query row at each sorted position.
        key: ``[B, K]`` int64, the key column at each sorted position.
        inverse_query: ``[B, Q]`` int64, the sorted position of each query row.
    """

    query: Tensor
    key: Tensor
    inverse_query: Tensor


class SortedBounds(NamedTuple):
    """The mask of every category in sorted order: one interval for each group of keys.

    ``allowed(c, b, q, k) = any(lower[b, c, p, q] <= k < upper[b, c, p, q] for p in 0, 1, 2)``
    where q and k are sorted positions, and p is text, sinks, other tokens of spans.

    Attributes:
        lower, upper: ``[B, C, 3, Q]`` int32, half-open; ``lower == upper`` where empty. The
            intervals of a part never leave its group.
    """

    lower: Tensor
    upper: Tensor

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return both as ``[B, 3 * C, Q]``, the form that :func:`allowed_sorted` loads from."""
        return self.lower.flatten(1, 2), self.upper.flatten(1, 2)

    def num_pairs(self) -> Tensor:
        """Return the number of pairs that each category allows, ``[B, C]`` int64."""
        return (self.upper - self.lower).sum((2, 3))


def sorted_bounds(
    base: BaseMask,
    span_id: Tensor,
    is_sink: Tensor,
    num_queries: int,
    num_keys: int,
    *,
    first_span: Tensor | None = None,
) -> tuple[SortedBounds, TokenOrder]:
    """Intersect a base mask with what each category keeps, and sort the tokens.

    Every bound is a number of valid keys of a group, so a few prefix sums give them all: time
    and memory are O(Q + K).

    Args:
        base: What the model's own mask allows.
        span_id: ``[B, T]``, spans numbered 1..n in prompt order, 0 for text.
        is_sink: ``[B, T]`` bool.
        num_queries: Q, at most T.
        num_keys: K.
        first_span: ``[B, Q]`` bool, the queries in the first span of their sequence, where
            several sequences are packed into a row; by default those of span 1.
    """
    num_tokens = span_id.shape[1]
    past = num_tokens - num_queries
    offset = key_offset(num_tokens, num_keys)

    filled = min(num_tokens, num_keys)
    valid = pad(base.valid[:, :filled], (0, num_keys - filled))
    groups = groups_of_keys(span_id, is_sink, num_keys) & valid[:, None]
    ranks, key_rank = _rank_in_groups(groups)
    key_order = _inverse(key_rank)
    if num_queries == num_keys == num_tokens:
        query_order, inverse_query = key_order, key_rank
    else:
        missing = max(offset - past, 0)  # queries that the keys no longer cover
        query_valid = pad(valid[:, past + missing - offset : filled], (missing, 0), value=True)
        of_queries = _groups(span_id[:, past:], is_sink[:, past:])
        _, inverse_query = _rank_in_groups(of_queries & query_valid[:, None])
        query_order = _inverse(inverse_query)

    ranges = [
        _column_ranges(each, span_id, num_queries, num_keys, first_span)
        for each in base.of_groups()
    ]
    ranges = [part.gather(2, query_order[:, None].expand_as(part)) for part in ranges]
    if len(ranges) == 1:  # the same columns of every group
        ranges = ranges * NUM_KEY_GROUPS
    # Of text only what the model's mask allows is asked for, of sinks a span's own as well, of
    # other tokens also the query's: pairs of first and last.
    text, sink, span = (
        ranks[:, at, None].expand(-1, number, -1).gather(2, columns[:, :number])
        for at, (columns, number) in enumerate(zip(ranges, (2, 4, 6), strict=True))
    )

    def of_categories(side: int) -> Tensor:
        every_text = text[:, side]
        every_sink, own_sink = sink[:, side], sink[:, side + 2]
        every_token, own_token, itself = (span[:, side + 2 * i] for i in range(3))
        parts = {
            HeadCategory.DENSE: (every_text, every_sink, every_token),
            HeadCategory.SINK: (every_text, every_sink, itself),
            HeadCategory.DOCUMENT: (every_text, own_sink, own_token),
            HeadCategory.DOCUMENT_SINK: (every_text, every_sink, own_token),
        }
        rows = [row for category in HeadCategory for row in parts[category]]
        return torch.stack(rows, dim=1).reshape(-1, NUM_CATEGORIES, NUM_KEY_GROUPS, num_queries)

    return SortedBounds(of_categories(0), of_categories(1)), TokenOrder(
        query_order, key_order, inverse_query
    )


def stretched(
    bounds: SortedBounds, order: TokenOrder, num_queries: int | None, num_keys: int | None
) -> tuple[SortedBounds, TokenOrder]:
    """Pad bounds and order to these numbers of sorted queries and keys (None: leave as is).

    A position beyond the last has a token all the same, so that a gather fills it: the last one.
    Its row is empty, and no interval reaches its column.
    """
    query, key, inverse_query = order
    if num_queries is not None:
        inside, nearest = _positions(query, num_queries)
        bounds = SortedBounds(*(torch.where(inside, side[..., nearest], 0) for side in bounds))
        query = query[:, nearest]
    if num_keys is not None:
        key = key[:, _positions(key, num_keys)[1]]
    return bounds, TokenOrder(query, key, inverse_query)


def dealt(
    bounds: SortedBounds, order: TokenOrder, num_chunks: int, block_size: int
) -> tuple[SortedBounds, TokenOrder]:
    """Deal the blocks of sorted queries out to equal parts, in snake order, and join the parts.

    Text, early and late images are then in each part alike.

    Args:
        bounds, order: Of sorted queries, a multiple of ``num_chunks * block_size``.
        num_chunks: How many.
        block_size: In tokens.
    """
    query, key, inverse_query = order
    device = query.device
    part = torch.arange(num_chunks, device=device)[:, None]
    lap = torch.arange(query.shape[1] // (num_chunks * block_size), device=device)
    block = lap * num_chunks + torch.where(lap % 2 == 0, part, num_chunks - 1 - part)
    source = block[:, :, None] * block_size + torch.arange(block_size, device=device)
    source = source.flatten()
    place = _inverse(source[None])[0]
    bounds = SortedBounds(*(side[..., source] for side in bounds))
    return bounds, TokenOrder(query[:, source], key, place[inverse_query])


def allowed_sorted(
    b: Tensor,
    h: Tensor,
    q: Tensor,
    k: Tensor,
    categories: Tensor,
    lower: Tensor,
    upper: Tensor,
) -> Tensor:
    """Whether head h may see sorted key k from sorted query q: the ``mask_mod`` of the bounds.

    Nothing is loaded by k, so a kernel loads the bounds once for each tile of queries.

    Args:
        b, h, q, k: Indices, of any shapes that broadcast.
        categories: ``[H]`` int32 codes.
        lower, upper: ``[B, 3 * C, Q]``, from :meth:`SortedBounds.rows`.
    """
    text = NUM_KEY_GROUPS * categories[h]
    sink, span = text + 1, text + 2
    # Integers among the indices would be a view of the captured tensor, which export refuses.
    return (
        ((lower[b, text, q] <= k) & (k < upper[b, text, q]))
        | ((lower[b, sink, q] <= k) & (k < upper[b, sink, q]))
        | ((lower[b, span, q] <= k) & (k < upper[b, span, q]))
    )


def _positions(tokens: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return for positions ``[number]`` whether ``tokens [B, L]`` has them, and the nearest."""
    length = tokens.shape[1]
    position = torch.arange(number, device=tokens.device)
    return position < length, position.clamp(max=length - 1)


def groups_of_keys(span_id: Tensor, is_sink: Tensor, num_keys: int) -> Tensor:
    """Return which key columns are text, sinks and other tokens of spans: ``[B, 3, K]`` bool.

    Args:
        span_id, is_sink: ``[B, T]``, the template.
        num_keys: K.
    """
    offset = key_offset(span_id.shape[1], num_keys)
    return _groups(*(to_columns(each, offset, num_keys) for each in (span_id, is_sink)))


def _groups(span_id: Tensor, is_sink: Tensor) -> Tensor:
    """Return the flags of text, sinks and other tokens of spans ``[B, 3, L]``."""
    in_span = span_id > 0
    return torch.stack([~in_span, in_span & is_sink, in_span & ~is_sink], dim=1)


def _rank_in_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the groups put tokens in sorted order.

    Returns:
        ranks: ``[B, 3, L + 1]`` int32, the sorted position that a token of group p would have
            at each position: the start of the group, plus its tokens before.
        rank: ``[B, L]`` int64, the sorted position of each token.
    """
    length = groups.shape[2]
    ranks = pad(groups.cumsum(2, dtype=torch.int32), (1, 0))
    sizes = ranks[:, :, -1:]
    position = torch.arange(length, dtype=torch.int32, device=groups.device)
    before = ranks[:, :, :-1]
    padding = position + (sizes - before).sum(1, dtype=torch.int32)
    ranks = ranks + pad(sizes.cumsum(1, dtype=torch.int32)[:, :-1], (0, 0, 1, 0))
    before = ranks[:, :, :-1]
    rank = torch.where(groups[:, 2], before[:, 2], padding)
    rank = torch.where(groups[:, 1], before[:, 1], rank)
    rank = torch.where(groups[:, 0], before[:, 0], rank)
    return ranks, rank.to(torch.int64)


def _inverse(permutation: Tensor) -> Tensor:
    """Return the inverse of permutations ``[B, L]``."""
    position = torch.arange(permutation.shape[1], device=permutation.device)
    return torch.empty_like(permutation).scatter(1, permutation, position.expand_as(permutation))


def _column_ranges(
    base: BaseMask,
    span_id: Tensor,
    num_queries: int,
    num_keys: int,
    first_span: Tensor | None,
) -> Tensor:
    """Return half-open ranges of key columns per query row, inside the base mask's.

    Returns:
        ``[B, 6, Q]`` int64: begin and end of all that base allows, of the query's own span in
        that, and of the query itself in that. The last two are everything where the row is
        dense: in text, and in a first span.
    """
    num_tokens = span_id.shape[1]
    past = num_tokens - num_queries
    offset = key_offset(num_tokens, num_keys)
    first, last = (edge[:, past:] - offset for edge in span_edges(span_id))
    itself = torch.arange(past - offset, num_tokens - offset, device=span_id.device)
    free = is_unrestricted(span_id[:, past:], first_span)

    begin = base.lower.to(torch.int64).clamp(0, num_keys)
    end = (base.upper.to(torch.int64) + 1).clamp(0, num_keys)
    end = torch.maximum(end, begin)
    own_begin = torch.where(free, begin, first).clamp(begin, end)
    own_end = torch.where(free, end, last + 1).clamp(own_begin, end)
    self_begin = torch.where(free, begin, itself).clamp(begin, end)
    self_end = torch.where(free, end, itself + 1).clamp(self_begin, end)
    return torch.stack([begin, end, own_begin, own_end, self_begin, self_end], dim=1)
