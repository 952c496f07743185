"""FlexAttention with its work dealt out as a device's cores get it.

A dense head takes many times as long as a sparse one, and with tokens sorted each head begins with
its rows of text, which see every image and take many times as long as those of an image. So queries
are cut into chunks, and the axes of a call are used for something else.

On a GPU, Inductor's kernel launches its programs head by head: its grid is blocks of queries,
batch, heads, from the fastest to the slowest. The rows of text of the last head would run alone in
the end, on a part of the device. There the batch of a call are key heads, and its heads the chunks
of their query heads: the first chunk of every head is launched before any second one.

On a CPU, each thread gets a run of neighbours: blocks of queries, heads, batch, from the fastest to
the slowest. There the batch of a call are threads, of which each gets a chunk of every head. Blocks
are dealt out to chunks (:func:`~blindsight.attention.intervals.dealt`), so that all take as long.

Shapes: B batch, H query heads, G key heads, R query heads of each, N chunks, L sorted queries of
each, Q and K lengths in tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blindsight.attention.block_tables import BlockTables, ceil_div
from blindsight.attention.flex import Mods, flex_attention, realize
from blindsight.attention.intervals import TokenOrder

_MAX_CHUNKS = 8  # more gain nothing: text is a tenth of a prompt of images, or less
_MIN_BLOCKS = 8  # of a chunk, where a last one that is not full would cost something
_MIN_QUERIES_TO_PACK = 4  # for each thread and row of a batch: need_pack in Inductor's kernel


def num_chunks_of(
    device: torch.device,
    num_queries: int | torch.SymInt,
    block_size: int,
    num_threads: int = 1,
) -> int:
    """Return N, into how many chunks so many queries are cut on a device.

    ``num_threads`` are a CPU's, which deals out none with a symbolic number of queries.
    """
    if device.type == "cpu":
        return num_chunks_on_cpu(num_queries, num_threads) if isinstance(num_queries, int) else 1
    if not isinstance(num_queries, int):
        return _MAX_CHUNKS
    chunks = max(1, num_queries // (block_size * _MIN_BLOCKS))
    return min(_MAX_CHUNKS, 1 << (chunks.bit_length() - 1))


def num_chunks_on_cpu(num_queries: int, num_threads: int) -> int:
    """Return N on a CPU: a chunk for each thread, or for each two of them, or three, and so on.

    Inductor's kernel packs keys for the matrix units of a CPU that has them (AMX) if its batch
    times its threads are few for the queries that there are: here the batch are the chunks.
    """
    most = num_queries // (_MIN_QUERIES_TO_PACK * num_threads)
    return max(n for n in range(1, num_threads + 1) if num_threads % n == 0 and n <= max(most, 1))


def num_rows_of(num_queries: Any, num_chunks: int, block_size: int) -> Any:
    """Return how many sorted queries there are, every chunk a whole number of blocks."""
    step = num_chunks * block_size
    return num_queries if num_chunks == 1 else ceil_div(num_queries, step) * step


def flex_attention_by_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: TokenOrder,
    tables: BlockTables,
    block_size: int,
    mods: Mods,
    scale: float | None,
    num_chunks: int,
) -> Tensor:
    """Call FlexAttention with tokens in another order, their queries in chunks.

    Args:
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, K, D]``, tokens sorted.
        order: Of queries, of which the sorted ones are a multiple of ``num_chunks * block_size``;
            on a CPU dealt out to the chunks.
        tables: ``[B, H, ...]``, or ``[1, 1, ...]`` where every head has keys of its own.
        block_size: Of those, in tokens.
        mods: Of sorted tokens, without a ``score_mod``.
        scale: See :func:`blindsight.attention.flex.flex_attention`.
        num_chunks: N.

    Returns:
        ``[B, H, Q, D]``, tokens in the order of ``query``.
    """
    call = _chunks_as_batch if query.device.type == "cpu" else _chunks_as_heads
    return call(query, key, value, order, tables, block_size, mods, scale, num_chunks)


def _chunks_as_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: TokenOrder,
    tables: BlockTables,
    block_size: int,
    mods: Mods,
    scale: float | None,
    num_chunks: int,
) -> Tensor:
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
        return mods.mask_mod(b // num_key_heads, head, begin[h // per_key_head] + q, k, *captures)

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
        Mods(allowed, (begin, *mods.captures)),
        scale,
    )

    # [B, G, 1, N * R * L, D] of chunks of length L, and where in that each token is, for R heads
    output = torch.unflatten(output.flatten(1, 2), 0, (batch, num_key_heads))[:, :, None]
    chunk, position = order.inverse_query // length, order.inverse_query % length
    head = torch.arange(per_key_head, device=query.device)[:, None]
    places = (chunk[:, None] * per_key_head + head) * length + position[:, None]
    places = places[:, None, :, :, None].expand(-1, num_key_heads, -1, -1, value.shape[3])
    return output.expand(-1, -1, per_key_head, -1, -1).gather(3, places).flatten(1, 2)


def _chunks_as_batch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    order: TokenOrder,
    tables: BlockTables,
    block_size: int,
    mods: Mods,
    scale: float | None,
    num_chunks: int,
) -> Tensor:
    batch, num_heads, _, head_dim = query.shape
    length = order.query.shape[1] // num_chunks
    thread = torch.arange(num_chunks, device=query.device)
    head = torch.arange(batch * num_heads, device=query.device)
    # Of every head another chunk: some have a block more than others, and threads have not then.
    is_alike = tables.partial.shape[:2] == (1, 1)
    chunk = (thread[:, None] + (torch.zeros_like(head) if is_alike else head)) % num_chunks
    begin = realize((chunk * length).to(torch.int32))

    def allowed(
        b: Tensor, h: Tensor, q: Tensor, k: Tensor, begin: Tensor, *captures: Tensor
    ) -> Tensor:
        row, head = (torch.zeros_like(h), h) if batch == 1 else (h // num_heads, h % num_heads)
        return mods.mask_mod(row, head, begin[b, h] + q, k, *captures)

    # Indices are realized: else they are computed for every few elements of what they move.
    tokens = torch.unflatten(order.query, 1, (num_chunks, length))
    tokens = realize(tokens[head // num_heads, chunk])
    query = query.flatten(0, 1)[None].expand(num_chunks, -1, -1, -1)
    query = query.gather(2, tokens[..., None].expand(-1, -1, -1, head_dim))

    def fold(table: Tensor) -> Tensor:
        """Return ``[B, H, M, ...]`` as ``[N, B * H, M / N, ...]``; one table for all stays one."""
        table = torch.unflatten(table.flatten(0, 1), 1, (num_chunks, -1))
        return table[0][:, None] if is_alike else table[head, chunk]

    output = flex_attention(
        realize(query),
        key.flatten(0, 1)[None],
        value.flatten(0, 1)[None],
        BlockTables(*map(fold, tables)),
        block_size,
        Mods(allowed, (begin, *mods.captures)),
        scale,
    )

    # [N, B * H, L, D], and where in that each token of each head is, [B, Q, H]
    head = head.view(batch, 1, num_heads)
    place = order.inverse_query[:, :, None]
    thread = (place // length - (0 if is_alike else head)) % num_chunks
    places = (thread * batch * num_heads + head) * length + place % length
    rows = output.flatten(0, 2).index_select(0, realize(places).flatten())
    return torch.unflatten(rows, 0, places.shape).transpose(1, 2)


# Sizes that are symbolic are indexed, and never split: torch would assume something of them.
def _in_chunks(num_chunks: int, size: int, device: torch.device) -> Tensor:
    """Return the positions in each chunk of so many, ``[N, size]``."""
    chunk, position = (torch.arange(number, device=device) for number in (num_chunks, size))
    return chunk[:, None] * size + position


def _fold(x: Tensor, key_heads: int) -> Tensor:
    """Return ``x [B, H, N, ...]`` as ``[B * G, N * R, ...]``."""
    x = torch.unflatten(x, 1, (key_heads, x.shape[1] // key_heads)).transpose(2, 3)
    return x.flatten(2, 3).flatten(0, 1)
