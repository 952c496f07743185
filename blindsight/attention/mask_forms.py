"""The mask of every category of head, in the form that a rewritten graph works with.

There are four. Each has a function that makes it, once for all layers with the same base mask:

- sorted: intervals of keys, tokens sorted so that every mask is a few blocks; where the model's own
  mask is intervals of each sorted group of keys only, it is called grouped;
- ordered: the same intervals in prompt order, for prompts that it lists less of;
- expressed: the model's own mask is an expression that is evaluated for each element;
- materialised: the model's own mask is read, element by element, where it could not be lifted.

The last two are in :mod:`blindsight.attention.element_masks`. These are plain functions of
tensors. In a graph they are one node each, which AOTAutograd traces through.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens, T tokens of the whole
sequence.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from torch import Tensor

from blindsight.attention.base_mask import Form, Tier
from blindsight.attention.block_tables import (
    BlockTables,
    block_size_of,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.attention.chunks import num_chunks_of, num_rows_of
from blindsight.attention.flex import Mods, realize
from blindsight.attention.form_intervals import base_mask_of
from blindsight.attention.interval_masks import BaseMask, Keep, is_kept, keep_intervals
from blindsight.attention.intervals import (
    TokenOrder,
    allowed_sorted,
    dealt,
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

    def mods_of(self, heads: Tensor, categories: Tensor) -> Mods:
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

    def mods_of(self, heads: Tensor, categories: Tensor) -> Mods:
        return Mods(allowed_sorted, (categories, self.lower, self.upper))


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

    def mods_of(self, heads: Tensor, categories: Tensor) -> Mods:
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
            return allowed & is_kept(b, h, q, k, *kept)

        return Mods(allowed_in_prompt_order, (*self.base, categories, *self.keep))


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
    num_threads: int = 1,
) -> SortedMask:
    """Intersect a base mask in interval form with what each category keeps, tokens sorted.

    Args:
        form: The model's own mask, see :mod:`blindsight.attention.base_mask`.
        span_id, is_sink: ``[B, T]``, the template.
        batch, num_queries, num_keys: B, Q, K.
        query_capacity, key_capacity: If given, of so many sorted positions the mask is, whatever
            Q and K are when a graph runs: those beyond hold a token that is already there, and see
            and show nothing. Then FlexAttention computes on fixed sizes (its C++ kernel cannot do
            with symbolic ones) inside a graph that does not. There are so many sorted queries more
            that every chunk is a whole number of blocks.
        by_group: Whether the form is intervals of each group of keys alone: of text, sinks and
            other tokens of spans. No sequences are packed then.
        num_threads: Of a CPU, to which attention is dealt out.
    """
    groups = groups_of_keys(span_id, is_sink, num_keys) if by_group else None
    base, first_span = _lifted_base(form, span_id, batch, num_queries, num_keys, groups)
    bounds, order = sorted_bounds(
        base, span_id, is_sink, num_queries, num_keys, first_span=first_span
    )
    block_size = block_size_of(span_id.device)
    capacity = num_queries if query_capacity is None else query_capacity
    num_chunks = num_chunks_of(span_id.device, capacity, block_size, num_threads)
    if num_chunks > 1:
        query_capacity = num_rows_of(capacity, num_chunks, block_size)
    bounds, order = stretched(bounds, order, query_capacity, key_capacity)
    if num_chunks > 1 and span_id.device.type == "cpu":
        bounds, order = dealt(bounds, order, num_chunks, block_size)
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
