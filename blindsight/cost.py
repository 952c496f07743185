"""What attention costs, exactly: how many pairs of a query and a key each category computes.

Counted with prefix sums, in time and memory linear in the number of tokens.

Shapes: B batch, C categories, L layers, H query heads, Q queries, T tokens of the whole
sequence. Query row i is token ``T - Q + i``; key k is token k.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.template import Template, span_edges

FLOPS_PER_PAIR = 4  # and per element of a head: two products, each a multiply and an add


class AttentionFlops(NamedTuple):
    """Floating-point operations of attention: its two matrix products, the softmax left out.

    Attributes:
        dense: If every head saw all that the model's own mask allows.
        sparse: If every head sees what its category keeps of that.
    """

    dense: int
    sparse: int


def count_visible(
    template: Template,
    *,
    num_queries: int | None = None,
    base_lower: Tensor | None = None,
    base_upper: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Return the number of pairs (q, k) that a head of each category computes: ``[B, C]`` int64.

    Rows of padding queries are not counted: nobody reads them.

    Args:
        template: Where the images are, ``[B, T]``.
        num_queries: Q, the last tokens of the sequence; by default all of them.
        base_lower, base_upper: ``[B, Q]`` ints, the first and last token that the model's own
            mask lets a query see; ``[B, 3, Q]`` of text, sinks and other tokens of spans each. By
            default causal: 0, and the query's own token.
        key_valid: ``[B, T]`` bool, False for padding; by default there is none.

    Raises:
        ValueError: A tensor does not fit the template; the message says which.
    """
    span_id, is_sink = template.tensors()
    batch, num_tokens = span_id.shape
    num_queries = num_tokens if num_queries is None else num_queries
    if not 0 <= num_queries <= num_tokens:
        raise ValueError(
            f"num_queries must be 0..{num_tokens}, the tokens of the template, got {num_queries}."
        )
    for name, tensor, length in (
        ("base_lower", base_lower, num_queries),
        ("base_upper", base_upper, num_queries),
        ("key_valid", key_valid, num_tokens),
    ):
        shapes = [(batch, length), *([(batch, 3, length)] if name != "key_valid" else [])]
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"{name} must have the shape [{batch}, {length}], got {list(tensor.shape)}."
            )
    past = num_tokens - num_queries
    itself = torch.arange(past, num_tokens, device=span_id.device).expand(batch, -1)
    valid = torch.ones_like(is_sink) if key_valid is None else key_valid.to(span_id.device).bool()
    lower = torch.zeros_like(itself) if base_lower is None else base_lower.to(itself)
    upper = itself if base_upper is None else base_upper.to(itself)
    lower, upper = lower.clamp(min=0), upper.clamp(max=num_tokens - 1)
    lowers, uppers = (side.unbind(1) if side.dim() == 3 else [side] * 3 for side in (lower, upper))

    first, last = (edge[:, past:] for edge in span_edges(span_id))
    is_text = span_id == 0
    flags = (valid & is_text, valid & ~is_text & is_sink, valid & ~is_text & ~is_sink)
    groups = list(zip(map(Counter, flags), lowers, uppers, strict=True))
    text, sinks, others = (counter.between(begin, end) for counter, begin, end in groups)
    own_sinks, own_others = (
        counter.between(torch.maximum(begin, first), torch.minimum(end, last))
        for counter, begin, end in groups[1:]
    )
    everything, own = text + sinks + others, own_sinks + own_others
    sees_itself = (lowers[2] <= itself) & (itself <= uppers[2]) & ~is_sink[:, past:]

    rows = [everything] * NUM_CATEGORIES
    rows[HeadCategory.SINK] = text + sinks + sees_itself
    rows[HeadCategory.DOCUMENT] = text + own
    rows[HeadCategory.DOCUMENT_SINK] = text + sinks + own_others
    free = span_id[:, past:] <= 1
    per_row = torch.where(free[:, None], everything[:, None], torch.stack(rows, dim=1))
    return (per_row * valid[:, None, past:]).sum(-1)


def attention_flops(
    template: Template,
    categories: Any,
    *,
    head_dim: int,
    num_queries: int | None = None,
    base_lower: Tensor | None = None,
    base_upper: Tensor | None = None,
    key_valid: Tensor | None = None,
) -> AttentionFlops:
    """Return the operations of one forward's attention, dense and sparse.

    Layers that share one mask of the model are counted together; where they differ (sliding
    windows), add up calls with the rows of ``categories`` that belong to each mask.

    Args:
        template: Where the images are, ``[B, T]``.
        categories: ``[L, H]`` codes, such as ``profile.categories``.
        head_dim: Elements of a head.
        num_queries, base_lower, base_upper, key_valid: See :func:`count_visible`.

    Raises:
        ValueError: An argument is malformed; the message says which.
    """
    codes = torch.as_tensor(categories).long().flatten()
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < NUM_CATEGORIES:
        raise ValueError(
            f"categories must be codes 0..{NUM_CATEGORIES - 1}, got {int(codes.min())} to "
            f"{int(codes.max())}."
        )
    visible = count_visible(
        template,
        num_queries=num_queries,
        base_lower=base_lower,
        base_upper=base_upper,
        key_valid=key_valid,
    )
    # Python's integers: a long video is beyond 2**63 operations.
    pairs = [int(count) for count in visible.sum(0)]
    heads = [int(count) for count in torch.bincount(codes, minlength=NUM_CATEGORIES)]
    cost = FLOPS_PER_PAIR * head_dim
    return AttentionFlops(
        dense=cost * pairs[HeadCategory.DENSE] * sum(heads),
        sparse=cost * sum(n * count for n, count in zip(heads, pairs, strict=True)),
    )


class Counter:
    """How many flags ``[B, T]`` are set in an interval."""

    def __init__(self, flags: Tensor) -> None:
        self._before = torch.nn.functional.pad(flags.cumsum(1), (1, 0))  # [B, T + 1]

    def between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the count in ``lower..upper``, both inclusive, ``[B, Q]``; 0 where empty."""
        end = torch.maximum(upper + 1, lower).clamp(max=self._before.shape[1] - 1)
        begin = torch.minimum(lower, end)
        return self._before.gather(1, end) - self._before.gather(1, begin)
