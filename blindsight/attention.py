"""The attention that a rewritten graph calls: FlexAttention with a mask per category of head.

These are plain functions of tensors. In a graph they are one node each, which AOTAutograd traces
through; run eagerly, FlexAttention's own reference (materialised scores) computes them.

Shapes: B batch, H query heads, G key/value heads, C categories, Q and K lengths in tokens, D
head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_op
from torch.nn.attention.flex_attention import BlockMask

from blindsight.block_tables import BLOCK_SIZE, BlockTables, tables_of_mask
from blindsight.masks import Keep, keep_intervals

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


class CategoryMask(NamedTuple):
    """The mask of every category, in prompt order; shared by all layers with one base mask.

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


def category_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    is_causal: bool = False,
) -> CategoryMask:
    """Intersect the model's own mask with what each category keeps.

    Args:
        query: ``[B, H, Q, D]``; only its shape matters.
        key: ``[B, G, K, D]``; only its shape matters.
        attn_mask: As for ``scaled_dot_product_attention``: bool or additive float, broadcastable
            to ``[B, H, Q, K]``, or None.
        span_id, is_sink: ``[B, T]``, the template.
        is_causal: As for ``scaled_dot_product_attention``: top-left aligned.
    """
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    keep = keep_intervals(span_id, is_sink, num_queries, num_keys)
    base, bias = _split_mask(attn_mask, batch, num_queries, num_keys, is_causal, query.device)
    tables = None
    if base.shape[1] == 1:
        tables = tables_of_mask(base & _keep_elements(keep, num_keys))
    return CategoryMask(
        Keep(*(_realize(part) for part in keep)),
        _realize(base),
        None if bias is None else _realize(bias),
        tables,
    )


def category_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CategoryMask,
    categories: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return the attention ``[B, H, Q, D]`` of heads with the given categories ``[H]``.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, H a multiple of G.
        mask: From :func:`category_mask`.
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

    def score_mod(
        score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *bias_of_head: Tensor
    ) -> Tensor:
        if not bias_of_head:
            return score
        mask_head, bias = bias_of_head
        return score + bias[b, mask_head[h], q, k]

    block_mask = BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=cast(Any, mask_mod),  # it takes what it captures as further arguments
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    output: Tensor = flex_attention_op(
        query,
        key,
        value,
        score_mod,
        block_mask.as_tuple(),
        query.shape[-1] ** -0.5 if scale is None else scale,
        _KERNEL_OPTIONS,
        () if bias is None else (mask_head, bias),
        (categories, mask_head, base, *keep),
    )[0]
    return output


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


def _realize(x: Tensor) -> Tensor:
    """Return ``x`` as a buffer of its own: Inductor cannot fuse its producer into a mask.

    The C++ lowering of FlexAttention builds the mask's subgraph before the buffers that it
    captures exist, and fails on one that is still an unfused expression.
    """
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())
