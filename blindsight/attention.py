"""The attention that a rewritten graph calls: FlexAttention with a mask per category of head.

These are plain functions of tensors. In a graph they are one node each, which AOTAutograd traces
through; run eagerly, FlexAttention's own reference (materialised scores) computes them.

There are three forms of a mask, each with a function that makes it, once for all layers with the
same base mask, and one that attends under it:

- sorted: intervals of keys, tokens sorted so that every mask is a few blocks;
- ordered: the same intervals in prompt order, for prompts that it lists less of;
- materialised: the model's own mask is read, element by element, where it could not be lifted.

Shapes: B batch, H query heads, G key/value heads, C categories, Q and K lengths in tokens, T
tokens of the whole sequence, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_op
from torch.nn.attention.flex_attention import BlockMask

from blindsight.base_mask import Form, base_mask_of
from blindsight.block_tables import (
    BLOCK_SIZE,
    BlockTables,
    tables_of_mask,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.intervals import TokenOrder, allowed_sorted, sorted_bounds
from blindsight.masks import BaseMask, Keep, keep_intervals
from blindsight.packing import first_span_of

# What torch.nn.attention.flex_attention passes for inference without auxiliary outputs.
_KERNEL_OPTIONS: dict[str, Any] = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


class SortedMask(NamedTuple):
    """The mask of every category, tokens sorted.

    Attributes:
        order: Of queries and keys.
        lower, upper: ``[B, 3 * C, Q]`` int32, the intervals of each sorted query.
        tables: Blocks per category.
    """

    order: TokenOrder
    lower: Tensor
    upper: Tensor
    tables: BlockTables


class OrderedMask(NamedTuple):
    """The mask of every category in prompt order, as intervals."""

    base: BaseMask
    keep: Keep
    tables: BlockTables


class MaterialisedMask(NamedTuple):
    """The mask of every category in prompt order, with the model's own as a tensor.

    Attributes:
        keep: What the categories keep.
        base: ``[B, Hm, Q, K]`` bool, the mask that the model asked for; Hm is 1 or H.
        bias: ``[B, Hm, Q, K]`` float that the model adds to the scores, or None.
        tables: Blocks per category, or None where the base mask differs from head to head.
    """

    keep: Keep
    base: Tensor
    bias: Tensor | None
    tables: BlockTables | None


def materialised_mask(
    attn_mask: Tensor | None,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    is_causal: bool = False,
) -> MaterialisedMask:
    """Intersect the model's own mask with what each category keeps.

    Args:
        attn_mask: As for ``scaled_dot_product_attention``: bool or additive float, broadcastable
            to ``[B, H, Q, K]``, or None.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
        is_causal: As for ``scaled_dot_product_attention``: top-left aligned.
    """
    keep = keep_intervals(span_id, is_sink, num_queries, num_keys)
    base, bias = _split_mask(attn_mask, batch, num_queries, num_keys, is_causal, span_id.device)
    tables = None
    if base.shape[1] == 1:
        tables = tables_of_mask(base & _keep_elements(keep, num_keys))
    return MaterialisedMask(
        Keep(*(_realize(part, span_id) for part in keep)),
        _realize(base, span_id),
        None if bias is None else _realize(bias),
        tables,
    )


def materialised_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: MaterialisedMask,
    categories: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return the attention ``[B, H, Q, D]`` of heads with the given categories ``[H]``.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, H a multiple of G.
        mask: From :func:`materialised_mask`.
        categories: ``[H]`` int32 codes of :class:`~blindsight.HeadCategory`.
        scale: Factor on the scores; default ``D ** -0.5``.
    """
    keep, base, bias, tables = mask
    if tables is None:
        kept = _keep_elements(keep, key.shape[2]).index_select(1, categories)
        tables = tables_of_mask(base & kept)
    else:
        tables = tables.of_heads(categories)
    # Which row of the base mask a head reads: all the same one, or each its own.
    mask_head = torch.arange(query.shape[1], device=query.device, dtype=torch.int32)
    mask_head = _realize(mask_head % base.shape[1])

    def mask_mod(
        b: Tensor,
        h: Tensor,
        q: Tensor,
        k: Tensor,
        categories: Tensor,
        mask_head: Tensor,
        base: Tensor,
        lower: Tensor,
        upper: Tensor,
        visible: Tensor,
    ) -> Tensor:
        category = categories[h]
        inside = (lower[b, category, q] <= k) & (k <= upper[b, category, q])
        return base[b, mask_head[h], q, k] & (inside | visible[b, category, k])

    def add_bias(
        score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, mask_head: Tensor, bias: Tensor
    ) -> Tensor:
        return score + bias[b, mask_head[h], q, k]

    captures = (categories, mask_head, base, *keep)
    if bias is None:
        return _flex_attention(query, key, value, tables, mask_mod, captures, scale)
    return _flex_attention(
        query, key, value, tables, mask_mod, captures, scale, add_bias, (mask_head, bias)
    )


def sorted_mask(
    form: Form,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> SortedMask:
    """Intersect a base mask in interval form with what each category keeps, tokens sorted.

    Args:
        form: The model's own mask, see :mod:`blindsight.base_mask`.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
    """
    base, first_span = _lifted_base(form, span_id, batch, num_queries, num_keys)
    bounds, order = sorted_bounds(
        base, span_id, is_sink, num_queries, num_keys, first_span=first_span
    )
    lower, upper = (_realize(rows, span_id) for rows in bounds.rows())
    tables = tables_of_sorted(bounds, num_keys)
    return SortedMask(TokenOrder(*map(_realize, order)), lower, upper, tables)


def sorted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SortedMask,
    categories: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return the attention ``[B, H, Q, D]`` of queries in prompt order.

    Takes what :func:`materialised_attention` takes.
    """
    order = mask.order
    output = _flex_attention(
        _take_tokens(query, order.query),
        _take_tokens(key, order.key),
        _take_tokens(value, order.key),
        mask.tables.of_heads(categories),
        allowed_sorted,
        (categories, mask.lower, mask.upper),
        scale,
    )
    return _take_tokens(output, order.inverse_query)


def ordered_mask(
    form: Form,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> OrderedMask:
    """As :func:`sorted_mask`, in prompt order."""
    base, first_span = _lifted_base(form, span_id, batch, num_queries, num_keys)
    keep = keep_intervals(span_id, is_sink, num_queries, num_keys, first_span=first_span)
    tables = tables_of_prompt_order(base, keep, num_keys)
    parts = [_realize(part, span_id) for part in (*base, *keep)]
    return OrderedMask(BaseMask(*parts[:3]), Keep(*parts[3:]), tables)


def ordered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: OrderedMask,
    categories: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return the attention ``[B, H, Q, D]``; see :func:`materialised_attention`."""

    def mask_mod(
        b: Tensor,
        h: Tensor,
        q: Tensor,
        k: Tensor,
        categories: Tensor,
        base_lower: Tensor,
        base_upper: Tensor,
        valid: Tensor,
        lower: Tensor,
        upper: Tensor,
        visible: Tensor,
    ) -> Tensor:
        category = categories[h]
        allowed = valid[b, k] & (base_lower[b, q] <= k) & (k <= base_upper[b, q])
        inside = (lower[b, category, q] <= k) & (k <= upper[b, category, q])
        return allowed & (inside | visible[b, category, k])

    captures = (categories, *mask.base, *mask.keep)
    tables = mask.tables.of_heads(categories)
    return _flex_attention(query, key, value, tables, mask_mod, captures, scale)


def _lifted_base(
    form: Form, span_id: Tensor, batch: int, num_queries: int, num_keys: int
) -> tuple[BaseMask, Tensor | None]:
    """Return the model's own mask, and the queries in the first span of a packed sequence."""
    base = base_mask_of(
        form,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        device=span_id.device,
    )
    return base, first_span_of(form, span_id, num_queries, num_keys)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    mask_mod: Callable[..., Tensor],
    mask_captures: tuple[Tensor, ...],
    scale: float | None,
    score_mod: Callable[..., Tensor] | None = None,
    score_captures: tuple[Tensor, ...] = (),
) -> Tensor:
    """Call the operator itself: its public function would start a compilation of its own.

    ``mask_mod(b, h, q, k, *mask_captures)`` and ``score_mod(score, b, h, q, k, *score_captures)``
    take what they capture as arguments.
    """
    block_mask = BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=cast(Any, mask_mod),
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    output: Tensor = flex_attention_op(
        query,
        key,
        value,
        _unchanged if score_mod is None else score_mod,
        block_mask.as_tuple(),
        query.shape[-1] ** -0.5 if scale is None else scale,
        _KERNEL_OPTIONS,
        score_captures,
        mask_captures,
    )[0]
    return output


def _unchanged(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score


def _take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x [B, H, L, D]`` with the tokens of each row in another order ``[B, L]``."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _split_mask(
    attn_mask: Tensor | None,
    batch: int,
    num_queries: int,
    num_keys: int,
    is_causal: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Return what a mask allows ``[B, Hm, Q, K]`` and what it adds to the scores, if anything."""
    shape = (batch, -1, num_queries, num_keys)
    if attn_mask is None:
        row = torch.arange(num_queries, device=device)[:, None]
        column = torch.arange(num_keys, device=device)
        allowed = (column <= row) if is_causal else (column >= 0).expand(num_queries, -1)
        return allowed[None, None].expand(batch, 1, num_queries, num_keys), None
    while attn_mask.dim() < 4:
        attn_mask = attn_mask[None]
    attn_mask = attn_mask.expand(shape)
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    # Models write "not allowed" as -inf or as the smallest finite number.
    return attn_mask > torch.finfo(attn_mask.dtype).min, attn_mask


def _keep_elements(keep: Keep, num_keys: int) -> Tensor:
    """Return what the categories keep, element by element: ``[B, C, Q, K]`` bool."""
    column = torch.arange(num_keys, device=keep.visible.device)
    inside = (keep.lower[..., None] <= column) & (column <= keep.upper[..., None])
    return inside | keep.visible[:, :, None, :]


def _realize(x: Tensor, span_id: Tensor | None = None) -> Tensor:
    """Return ``x`` as a buffer of its own: Inductor cannot fuse its producer into a mask.

    The C++ lowering of FlexAttention builds the mask's subgraph before the buffers that it
    captures exist, and fails on one that is still an unfused expression. A uniform tensor would
    be folded back into one: with ``span_id`` the result depends on an input, if in name only.
    """
    if span_id is not None:
        never = (span_id[:1, :1] < 0).view((1,) * x.dim())
        x = (x | never) if x.dtype == torch.bool else x + never.to(x.dtype)
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())
