"""FlexAttention with the longest rows of all heads first.

A kernel on a GPU launches its programs head by head. With tokens sorted, each head begins with its
rows of text, which see every image and take a hundred times as long as those of an image: those of
the last head would run alone in the end, on a part of the device. So queries are cut into chunks,
and the axes of a call are used for something else: its batch are key heads, its heads are the
chunks of their query heads. Then the first chunk of every head is launched before any second one.

Shapes: B batch, H query heads, G key heads, R query heads of each, N chunks, Q and K lengths in
tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindsight.block_tables import BlockTables
from blindsight.flex import Rule, flex_attention, realize

_MAX_CHUNKS = 8  # more gain nothing: text is a tenth of a prompt of images, or less
_MIN_BLOCKS = 8  # of a chunk, where a last one that is not full would cost something


def num_chunks_of(device: torch.device, num_queries: int | torch.SymInt, block_size: int) -> int:
    """Return N, into how many chunks so many queries are cut on a device.

    On a CPU 1: its threads get runs of neighbours, see :func:`blindsight.lowering.fused_layout`.
    """
    if device.type == "cpu":
        return 1
    if not isinstance(num_queries, int):
        return _MAX_CHUNKS
    chunks = max(1, num_queries // (block_size * _MIN_BLOCKS))
    return min(_MAX_CHUNKS, 1 << (chunks.bit_length() - 1))


def flex_attention_by_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: BlockTables,
    block_size: int,
    rule: Rule,
    scale: float | None,
    num_chunks: int,
) -> Tensor:
    """As :func:`blindsight.flex.flex_attention`, in another order.

    Args:
        query: ``[B, H, Q, D]``, Q a multiple of ``num_chunks * block_size``.
        key, value, tables, block_size, scale: As there.
        rule: Without a ``score_mod``.
        num_chunks: N.
    """
    assert rule.score_mod is None
    batch, num_heads, num_queries, _ = query.shape
    key_heads = key.shape[1]
    per_key_head = num_heads // key_heads
    begin = torch.arange(num_chunks, dtype=torch.int32, device=query.device)
    begin = realize(begin * (num_queries // num_chunks))

    def allowed(
        b: Tensor, h: Tensor, q: Tensor, k: Tensor, begin: Tensor, *captures: Tensor
    ) -> Tensor:
        head = b % key_heads * per_key_head + h % per_key_head
        return rule.mask_mod(b // key_heads, head, begin[h // per_key_head] + q, k, *captures)

    def folded(x: Tensor, key_heads: int = key_heads) -> Tensor:
        """``[B, H, L, ...]`` as ``[B * G, N * R, L / N, ...]``."""
        heads, length, *rest = x.shape[1:]
        # Sizes in full: what is left for torch to infer is wrong where they are symbolic.
        inside = heads // key_heads, num_chunks, length // num_chunks
        x = x.reshape(x.shape[0], key_heads, *inside, *rest).transpose(2, 3)
        return x.reshape(x.shape[0] * key_heads, num_chunks * inside[0], inside[2], *rest)

    if tables.partial.shape[1] == num_heads:
        tables = BlockTables(*map(folded, tables))
    elif batch == per_key_head == 1:  # one table for all of the call
        tables = BlockTables(*(folded(table, 1) for table in tables))
    else:
        tables = BlockTables(
            *(folded(table.expand(-1, num_heads, *table.shape[2:])) for table in tables)
        )
    output = flex_attention(
        folded(query),
        key.flatten(0, 1)[:, None],
        value.flatten(0, 1)[:, None],
        tables,
        block_size,
        Rule(allowed, (begin, *rule.captures)),
        scale,
    )
    output = output.reshape(
        batch, key_heads, num_chunks, per_key_head, num_queries // num_chunks, value.shape[3]
    )
    return output.transpose(2, 3).reshape(batch, num_heads, num_queries, value.shape[3])
