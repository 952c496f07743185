"""The attention that a rewritten graph calls: heads in groups, each computed by one operator.

Plain functions of tensors; in a graph they are one node each, which AOTAutograd traces through.
Run eagerly, FlexAttention's own reference (materialised scores) computes them.

Shapes: B batch, H query heads, G key/value heads, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blindsight.attention.chunks import flex_attention_by_chunks
from blindsight.attention.flex import as_buffer, flex_attention
from blindsight.attention.mask_forms import Mask
from blindsight.attention.region import call_in_region

# How the heads of a group are computed, and how many there are.
#   "all": one call of FlexAttention, block tables per head, all heads in their own order
#   "mixed": one call of FlexAttention, block tables per head
#   "alike": one call of FlexAttention, one block table for all, which are of one category
#   "causal": scaled_dot_product_attention with is_causal; dense heads whose mask is just that
Group = tuple[Literal["all", "mixed", "alike", "causal"], int]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    heads: Tensor,
    categories: Tensor,
    groups: Sequence[Group],
    scale: float | None = None,
    *,
    are_buffers: bool = False,
) -> Tensor:
    """Return the attention ``[B, H, Q, D]`` of heads, each under the mask of its category.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, H a multiple of G.
        mask: Of every category, see :mod:`blindsight.attention.mask_forms`.
        heads: ``[H]`` int64, the heads group by group.
        categories: ``[H]`` int32 codes of :class:`~blindsight.HeadCategory`, in that order.
        groups: Their sizes sum up to H. An "all" group must be the only one, and keeps key heads
            shared by their query heads; other groups repeat them.
        scale: Factor on the scores; default ``D ** -0.5``.
        are_buffers: Whether queries and keys are results of their own, and views of nothing.
    """
    if groups[0][0] == "all":
        # Other groups, and sorted tokens, are gathered, which makes buffers.
        if mask.order is None and query.device.type == "cpu" and not are_buffers:
            query, key = (as_buffer(x, categories) for x in (query, key))
        return _masked(query, key, value, mask, heads, categories, categories, scale)
    per_key_head = query.shape[1] // key.shape[1]
    if groups[0] == ("causal", query.shape[1]):
        return _causal(query, key, value, scale, enable_gqa=per_key_head > 1)
    outputs, begin = [], 0
    for kind, size in groups:
        chosen, codes = (x[begin : begin + size] for x in (heads, categories))
        begin += size
        of_group = query.index_select(1, chosen)
        keys, values = (x.index_select(1, chosen // per_key_head) for x in (key, value))
        if kind == "causal":
            outputs.append(_causal(of_group, keys, values, scale))
        else:
            for_tables = codes[:1] if kind == "alike" else codes
            outputs.append(_masked(of_group, keys, values, mask, chosen, codes, for_tables, scale))
    return torch.cat(outputs, dim=1).index_select(1, heads.argsort())


def attend_in_region(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    heads: Tensor,
    categories: Tensor,
    groups: Sequence[Group],
    scale: float | None = None,
) -> Tensor:
    """As :func:`attend`, compiled once for all layers that are alike."""
    args = (query, key, value, mask, heads, categories, list(groups), scale)
    return call_in_region("attend", _attend_alone, *args)[0]


def _attend_alone(*args: Any) -> tuple[Tensor]:
    return (attend(*args, are_buffers=True),)  # as all that enters a region


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    heads: Tensor,
    categories: Tensor,
    for_tables: Tensor,
    scale: float | None,
) -> Tensor:
    tables, mods = mask.tables_of(heads, for_tables), mask.mods_of(heads, categories)
    order = mask.order
    if order is None:
        return flex_attention(query, key, value, tables, mask.block_size, mods, scale)
    key, value = _take_tokens(key, order.key), _take_tokens(value, order.key)
    # One table for several rows of a batch cannot be folded: it would have to be written for each.
    if mask.num_chunks > 1 and (len(for_tables) == query.shape[1] or query.shape[0] == 1):
        return flex_attention_by_chunks(
            query, key, value, order, tables, mask.block_size, mods, scale, mask.num_chunks
        )
    query = _take_tokens(query, order.query)
    output = flex_attention(query, key, value, tables, mask.block_size, mods, scale)
    return _take_tokens(output, order.inverse_query)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, *, enable_gqa: bool = False
) -> Tensor:
    # Keys beyond the queries belong to no token yet: a static cache is longer than the prompt.
    key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa
    )


def _take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x [B, H, L, D]`` with the tokens of each row in another order ``[B, L]``."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
