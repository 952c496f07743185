"""The mask of every category of head, in the form that a rewritten graph works with.

There are four. Each has a function that makes it, once for all layers with the same base mask:

- sorted: intervals of keys, tokens sorted so that every mask is a few blocks; where the model's own
  mask is intervals of each sorted group of keys only, it is called grouped;
- ordered: the same intervals in prompt order, for prompts that it lists less of;
- expressed: the model's own mask is an expression that is evaluated for each element;
- materialised: the model's own mask is read, element by element, where it could not be lifted.

These are plain functions of tensors. In a graph they are one node each, which AOTAutograd traces
through.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens, T tokens of the whole
sequence.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blindsight.attention.base_mask import (
    Expression,
    Form,
    Tier,
    base_mask_of,
    evaluate_expression,
    map_tensors,
)
from blindsight.attention.block_tables import (
    BlockTables,
    block_size_of,
    ceil_div,
    tables_of_mask,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.attention.chunks import num_chunks_of
from blindsight.attention.flex import Rule, realize
from blindsight.attention.interval_masks import BaseMask, Keep, keep_intervals
from blindsight.attention.intervals import (
    TokenOrder,
    allowed_sorted,
    groups_of_keys,
    sorted_bounds,
    stretched,
)
from blindsight.attention.packing import first_span_of


class MaskForm(Enum):
    """In which form a call is masked, as above."""

    SORTED = "sorted"
    GROUPED = "grouped"
    ORDERED = "ordered"
    EXPRESSED = "expressed"
    MATERIALISED = "materialised"

    @property
    def is_sorted(self) -> bool:
        """Whether tokens are put in another order."""
        return self in (MaskForm.SORTED, MaskForm.GROUPED)

    def for_tier(self, tier: Tier) -> MaskForm:
        """Return the form of a mask of which so much is known, if intervals take this one."""
        if tier is Tier.INTERVALS:
            return self
        return MaskForm.EXPRESSED if tier is Tier.EXPRESSION else MaskForm.MATERIALISED


class Mask(Protocol):
    """What :func:`blindsight.attention.attend.attend` asks of a mask."""

    @property
    def order(self) -> TokenOrder | None:
        """The order of tokens that the mask is in, None for prompt order."""

    @property
    def block_size(self) -> int:
        """Block size of the tables, in tokens."""

    @property
    def num_chunks(self) -> int:
        """Into how many chunks the queries are cut, see :mod:`blindsight.attention.chunks`."""

    def tables_of(self, heads: Tensor, categories: Tensor) -> BlockTables:
        """Return the blocks to visit.

        Args:
            heads: ``[H]`` int64, which of the layer's heads.
            categories: ``[H]`` int32, theirs; or ``[1]``, the one of them all.
        """

    def rule_of(self, heads: Tensor, categories: Tensor) -> Rule:
        """Return what decides of an element; heads and categories ``[H]``."""


class SortedMask(NamedTuple):
    """The mask of every category, tokens sorted.

    Attributes:
        order: Of queries and keys. There may be more sorted ones than tokens.
        lower, upper: ``[B, 3 * C, Q]`` int32, the intervals of each sorted query.
        tables: Blocks per category.
        block_size: Of the tables, in tokens.
        num_chunks: Of sorted queries, which are a whole number of blocks each if there are several.
    """

    order: TokenOrder
    lower: Tensor
    upper: Tensor
    tables: BlockTables
    block_size: int
    num_chunks: int = 1

    def tables_of(self, heads: Tensor, categories: Tensor) -> BlockTables:
        return self.tables.of_heads(categories)

    def rule_of(self, heads: Tensor, categories: Tensor) -> Rule:
        return Rule(allowed_sorted, (categories, self.lower, self.upper))


class OrderedMask(NamedTuple):
    """The mask of every category in prompt order, as intervals."""

    base: BaseMask
    keep: Keep
    tables: BlockTables
    block_size: int
    order: None = None
    num_chunks: int = 1

    def tables_of(self, heads: Tensor, categories: Tensor) -> BlockTables:
        return self.tables.of_heads(categories)

    def rule_of(self, heads: Tensor, categories: Tensor) -> Rule:
        def allowed_in_prompt_order(
            b: Tensor,
            h: Tensor,
            q: Tensor,
            k: Tensor,
            base_lower: Tensor,
            base_upper: Tensor,
            valid: Tensor,
            *kept: Tensor,
        ) -> Tensor:
            allowed = valid[b, k] & (base_lower[b, q] <= k) & (k <= base_upper[b, q])
            return allowed & _is_kept(b, h, q, k, *kept)

        return Rule(allowed_in_prompt_order, (*self.base, categories, *self.keep))


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

    def rule_of(self, heads: Tensor, categories: Tensor) -> Rule:
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
            kept = _is_kept(b, h, q, k, categories, lower, upper, visible)
            allowed: Tensor = kept & evaluate_expression(base, b, q, k)
            return allowed

        return Rule(allowed_by_expression, (categories, *self.keep, *tensors.values()))


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
        kept = _keep_elements(self.keep, self.base.shape[3]).index_select(1, categories)
        return tables_of_mask(self.base.index_select(1, heads) & kept, self.block_size)

    def rule_of(self, heads: Tensor, categories: Tensor) -> Rule:
        # Which row of the base mask a head reads: all the same one, or each its own.
        row = realize((heads % self.base.shape[1]).to(torch.int32))

        def allowed_by_elements(
            b: Tensor, h: Tensor, q: Tensor, k: Tensor, row: Tensor, base: Tensor, *kept: Tensor
        ) -> Tensor:
            return base[b, row[h], q, k] & _is_kept(b, h, q, k, *kept)

        def add_bias(
            score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, row: Tensor, bias: Tensor
        ) -> Tensor:
            return score + bias[b, row[h], q, k]

        captures = (row, self.base, categories, *self.keep)
        if self.bias is None:
            return Rule(allowed_by_elements, captures)
        return Rule(allowed_by_elements, captures, add_bias, (row, self.bias))


def sorted_mask(
    form: Form,
    span_id: Tensor,
    is_sink: Tensor,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    by_group: bool = False,
) -> SortedMask:
    """Intersect a base mask in interval form with what each category keeps, tokens sorted.

    Args:
        form: The model's own mask, see :mod:`blindsight.attention.base_mask`.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
        query_capacity, key_capacity: If given, of so many sorted positions the mask is, whatever
            Q and K are when a graph runs: those beyond hold a token that is already there, and see
            and show nothing. Then FlexAttention computes on fixed sizes (its C++ kernel cannot do
            with symbolic ones) inside a graph that does not. On a GPU there are so many sorted
            queries more that every chunk is a whole number of blocks.
        by_group: Whether the form is intervals of each group of keys alone: of text, sinks and
            other tokens of spans. No sequences are packed then.
    """
    groups = groups_of_keys(span_id, is_sink, num_keys) if by_group else None
    base, first_span = _lifted_base(form, span_id, batch, num_queries, num_keys, groups)
    bounds, order = sorted_bounds(
        base, span_id, is_sink, num_queries, num_keys, first_span=first_span
    )
    block_size = block_size_of(span_id.device)
    capacity = num_queries if query_capacity is None else query_capacity
    num_chunks = num_chunks_of(span_id.device, capacity, block_size)
    if num_chunks > 1:
        step = num_chunks * block_size
        query_capacity = ceil_div(capacity, step) * step
    bounds, order = stretched(bounds, order, query_capacity, key_capacity)
    num_keys = order.key.shape[1]
    lower, upper = (realize(rows, span_id) for rows in bounds.rows())
    tables = tables_of_sorted(bounds, num_keys, block_size)
    order = TokenOrder(*map(realize, order))
    return SortedMask(order, lower, upper, tables, block_size, num_chunks)


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
    # Before the tables: they gather by the bounds, and where those are computed from the position
    # alone Inductor puts a formula in place of the gather that it cannot always compile.
    base = BaseMask(*(realize(part, span_id) for part in base))
    keep = Keep(*(realize(part, span_id) for part in keep))
    block_size = block_size_of(span_id.device)
    tables = tables_of_prompt_order(base, keep, num_keys, block_size)
    return OrderedMask(base, keep, tables, block_size)


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
    tables = tables_of_mask(_keep_elements(keep, num_keys) & allowed, block_size)
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
        tables = tables_of_mask(base & _keep_elements(keep, num_keys), block_size)
    return MaterialisedMask(
        Keep(*(realize(part, span_id) for part in keep)),
        realize(base, span_id),
        None if bias is None else realize(bias),
        tables,
        block_size,
    )


def _is_kept(
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


def _keep_elements(keep: Keep, num_keys: int) -> Tensor:
    """Return what the categories keep, element by element: ``[B, C, Q, K]`` bool."""
    column = torch.arange(num_keys, device=keep.visible.device)
    inside = (keep.lower[..., None] <= column) & (column <= keep.upper[..., None])
    return inside | keep.visible[:, :, None, :]


def _lifted_base(
    form: Form,
    span_id: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
    groups: Tensor | None = None,
) -> tuple[BaseMask, Tensor | None]:
    """Return the model's own mask, and the queries in the first span of a packed sequence.

    groups ``[B, 3, K]``: of which the mask is intervals each, with nothing packed.
    """
    base = base_mask_of(
        form,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        device=span_id.device,
        groups=groups,
    )
    if groups is not None:
        return base, None
    return base, first_span_of(form, span_id, num_queries, num_keys)


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
