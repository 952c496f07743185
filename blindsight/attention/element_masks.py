"""Masks of which the model's own part is no intervals: evaluated, or read, for each element.

See :mod:`blindsight.attention.mask_forms`.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens, T tokens of the whole
sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.attention.base_mask import Expression, evaluate_expression, map_tensors
from blindsight.attention.block_tables import BlockTables, block_size_of, tables_of_mask
from blindsight.attention.flex import Mods, realize
from blindsight.attention.interval_masks import Keep, is_kept, keep_elements, keep_intervals


class ExpressedMask(NamedTuple):
    """The mask of every category in prompt order, with the model's own as an expression.

    Attributes:
        keep: What the categories keep.
        base: See :mod:`blindsight.attention.base_mask`.
        tables: Blocks per category.
        block_size: Of the tables, in tokens.
    """

    keep: Keep
    base: Expression
    tables: BlockTables
    block_size: int
    order: None = None
    num_chunks: int = 1

    def tables_of(self, heads: Tensor, categories: Tensor) -> BlockTables:
        return self.tables.of_heads(categories)

    def mods_of(self, heads: Tensor, categories: Tensor) -> Mods:
        tensors: dict[int, Tensor] = {}
        map_tensors(self.base, lambda x: tensors.setdefault(id(x), x))

        def allowed_by_expression(
            b: Tensor,
            h: Tensor,
            q: Tensor,
            k: Tensor,
            categories: Tensor,
            lower: Tensor,
            upper: Tensor,
            visible: Tensor,
            *captured: Tensor,
        ) -> Tensor:
            given = dict(zip(tensors, captured, strict=True))
            base = map_tensors(self.base, lambda x: given[id(x)])
            kept = is_kept(b, h, q, k, categories, lower, upper, visible)
            allowed: Tensor = kept & evaluate_expression(base, b, q, k)
            return allowed

        return Mods(allowed_by_expression, (categories, *self.keep, *tensors.values()))


class MaterialisedMask(NamedTuple):
    """The mask of every category in prompt order, with the model's own as a tensor.

    Attributes:
        keep: What the categories keep.
        base: ``[B, Hm, Q, K]`` bool, the mask that the model asked for; Hm is 1 or H.
        bias: ``[B, Hm, Q, K]`` float that the model adds to the scores, or None.
        tables: Blocks per category, or None where the base mask differs from head to head.
        block_size: Of the tables, in tokens.
    """

    keep: Keep
    base: Tensor
    bias: Tensor | None
    tables: BlockTables | None
    block_size: int
    order: None = None
    num_chunks: int = 1

    def tables_of(self, heads: Tensor, categories: Tensor) -> BlockTables:
        if self.tables is not None:
            return self.tables.of_heads(categories)
        kept = keep_elements(self.keep, self.base.shape[3]).index_select(1, categories)
        return tables_of_mask(self.base.index_select(1, heads) & kept, self.block_size)

    def mods_of(self, heads: Tensor, categories: Tensor) -> Mods:
        # Which row of the base mask a head reads: all the same one, or each its own.
        row = realize((heads % self.base.shape[1]).to(torch.int32))

        def allowed_by_elements(
            b: Tensor, h: Tensor, q: Tensor, k: Tensor, row: Tensor, base: Tensor, *kept: Tensor
        ) -> Tensor:
            return base[b, row[h], q, k] & is_kept(b, h, q, k, *kept)

        def add_bias(
            score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, row: Tensor, bias: Tensor
        ) -> Tensor:
            return score + bias[b, row[h], q, k]

        captures = (row, self.base, categories, *self.keep)
        if self.bias is None:
            return Mods(allowed_by_elements, captures)
        return Mods(allowed_by_elements, captures, add_bias, (row, self.bias))


def expressed_mask(
    expression: Expression,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> ExpressedMask:
    """Intersect a base mask that is an expression with what each category keeps.

    Only the block tables look at all elements, in a reduction that Inductor fuses: it writes no
    tensor of queries x keys.

    Args:
        expression: The model's own mask, see :mod:`blindsight.attention.base_mask`.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
    """
    keep = keep_intervals(span_id, is_sink, num_queries, num_keys)
    b, q, k = (torch.arange(size, device=span_id.device) for size in (batch, num_queries, num_keys))
    allowed = evaluate_expression(expression, b[:, None, None, None], q[:, None], k)
    block_size = block_size_of(span_id.device)
    tables = tables_of_mask(keep_elements(keep, num_keys) & allowed, block_size)
    return ExpressedMask(
        Keep(*(realize(part, span_id) for part in keep)),
        map_tensors(expression, lambda x: realize(x, span_id)),
        tables,
        block_size,
    )


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
    """Intersect the model's own mask, element by element, with what each category keeps.

    Args:
        attn_mask: As for ``scaled_dot_product_attention``: bool or additive float, broadcastable
            to ``[B, H, Q, K]``, or None.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
        is_causal: As for ``scaled_dot_product_attention``: top-left aligned.
    """
    keep = keep_intervals(span_id, is_sink, num_queries, num_keys)
    base, bias = _split_mask(attn_mask, batch, num_queries, num_keys, is_causal, span_id.device)
    tables, block_size = None, block_size_of(span_id.device)
    if base.shape[1] == 1:
        tables = tables_of_mask(base & keep_elements(keep, num_keys), block_size)
    return MaterialisedMask(
        Keep(*(realize(part, span_id) for part in keep)),
        realize(base, span_id),
        None if bias is None else realize(bias),
        tables,
        block_size,
    )


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
    return allowed_and_bias(attn_mask)


def allowed_and_bias(attn_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a mask allows, and what it adds to the scores, if anything."""
    if attn_mask.dtype == torch.bool:
        return attn_mask, None
    # Models write "not allowed" as -inf or as the smallest finite number.
    return attn_mask > torch.finfo(attn_mask.dtype).min, attn_mask
