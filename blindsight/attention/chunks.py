"""FlexAttention with the longest rows of all heads first.

Inductor's kernel on a GPU launches its programs head by head: its grid is blocks of queries, batch,
heads, from the fastest to the slowest. With tokens sorted, each head begins with its rows of text,
which see every image and take many times as long as those of an image: those of the last head would
run alone in the end, on a part of the device. So queries are cut into chunks, and the axes of a
call are used for something else: its batch are key heads, its heads are the chunks of their query
heads. Then the first chunk of every head is launched before any second one.

Shapes: B batch, H query heads, G key heads, R query heads of each, N chunks, Q and K lengths in
tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blindsight.attention.block_tables import BlockTables
from blindsight.attention.flex import Rule, flex_attention, realize
from blindsight.attention.intervals import TokenOrder

_MAX_CHUNKS = 8  # more gain nothing: text is a tenth of a prompt of images, or less
_MIN_BLOCKS = 8  # of a chunk, where a last one that is not full would cost something


def num_chunks_of(device: torch.device, num_queries: int | torch.SymInt, block_size: int) -> int:
    """Return N, into how many chunks so many queries are cut on a device.

    On a CPU 1: its threads get runs of neighbours, see
    :func:`blindsight.runtime.lowering.fused_layout`.
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
    order: TokenOrder,
    tables: BlockTables,
    block_size: int,
    rule: Rule,
    scale: float | None,
    num_chunks: int,
) -> Tensor:
    """Call FlexAttention with tokens in another order, their queries in chunks.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, tokens sorted.
        order: Of queries, of which the sorted ones are a multiple of ``num_chunks * block_size``.
        tables: ``[B, H, ...]``, or ``[1, 1, ...]`` where every head has keys of its own.
        block_size: Of those, in tokens.
        rule: Of sorted tokens, without a ``score_mod``.
        scale: See :func:`blindsight.attention.flex.flex_attention`.
        num_chunks: N.

    Returns:
        ``[B, H, Q, D]``, tokens in the order of ``query``.
    """
    batch, num_heads, _, head_dim = query.shape
    num_key_heads = key.shape[1]
    per_key_head = num_heads // num_key_heads
    length = order.query.shape[1] // num_chunks
    positions = _in_chunks(num_chunks, length, query.device)
    begin = realize(positions[:, 0].to(torch.int32))

    def allowed(
        b: Tensor, h: Tensor, q: Tensor, k: Tensor, begin: Tensor, *captures: Tensor
    ) -> Tensor:
        head = b % num_key_heads * per_key_head + h % per_key_head
        return rule.mask_mod(b // num_key_heads, head, begin[h // per_key_head] + q, k, *captures)

    tokens = order.query[:, None, positions, None].expand(-1, num_heads, -1, -1, head_dim)
    query = query[:, :, None].expand(-1, -1, num_chunks, -1, -1).gather(3, tokens)
    blocks = _in_chunks(num_chunks, tables.partial.shape[2] // num_chunks, query.device)
    table_heads = min(num_key_heads, tables.partial.shape[1])
    output = flex_attention(
        realize(_fold(query, num_key_heads)),
        key.flatten(0, 1)[:, None],
        value.flatten(0, 1)[:, None],
        BlockTables(*(_fold(table[:, :, blocks], table_heads) for table in tables)),
        block_size,
        Rule(allowed, (begin, *rule.captures)),
        scale,
    )

    # [B, G, 1, N * R * L, D] of chunks of length L, and where in that each token is, for R heads
    output = torch.unflatten(output.flatten(1, 2), 0, (batch, num_key_heads))[:, :, None]
    chunk, position = order.inverse_query // length, order.inverse_query % length
    head = torch.arange(per_key_head, device=query.device)[:, None]
    places = (chunk[:, None] * per_key_head + head) * length + position[:, None]
    places = places[:, None, :, :, None].expand(-1, num_key_heads, -1, -1, value.shape[3])
    return output.expand(-1, -1, per_key_head, -1, -1).gather(3, places).flatten(1, 2)


# Sizes that are symbolic are indexed, and never split: torch would assume something of them.
def _in_chunks(num_chunks: int, size: int, device: torch.device) -> Tensor:
    """Return the positions in each chunk of so many, ``[N, size]``."""
    chunk, position = (torch.arange(number, device=device) for number in (num_chunks, size))
    return chunk[:, None] * size + position


def _fold(x: Tensor, key_heads: int) -> Tensor:
    """Return ``x [B, H, N, ...]`` as ``[B * G, N * R, ...]``."""
    x = torch.unflatten(x, 1, (key_heads, x.shape[1] // key_heads)).transpose(2, 3)
    return x.flatten(2, 3).flatten(0, 1)
