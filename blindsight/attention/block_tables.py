"""Which blocks of a mask a FlexAttention kernel visits, found without looking at an element.

Shapes: B batch, C categories (or heads), Q and K lengths in tokens, N and M numbers of query
and key blocks, S segments of a block row.

A block may be listed without need, and called partial where it is full: that costs time. No
block that holds an allowed pair is left out, and none is called full that holds a masked one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.attention.interval_masks import BaseMask, Keep
from blindsight.attention.intervals import NUM_KEY_GROUPS, SortedBounds

BlockSize = int | tuple[int, int]  # queries, keys
Number = TypeVar("Number", int, Tensor)

_MAX_SAMPLED_BLOCKS = 64  # query blocks that stand for all of a prompt, to choose an order


def block_size_of(device: torch.device) -> int:
    """Return the block size, in tokens, that suits a device's kernels.

    Triton's tiles are up to 128 wide, and a block is a whole number of them. The C++ kernel's tile
    is the block: one of 64 stays in a core's cache, and visits less (bench/blocks.py).
    """
    return 64 if device.type == "cpu" else 128


def ceil_div(x: Number, divisor: int) -> Number:
    """Return a quotient rounded up.

    Not ``-(-x // divisor)``: of symbolic sizes torch may simplify that to something else
    (bench/upstream/ceiling_of_ceilings.py).
    """
    return (x + (divisor - 1)) // divisor


class BlockTables(NamedTuple):
    """Key blocks to visit for each query block: first ``num`` entries of each row of indices.

    Attributes:
        num_partial, num_full: ``[B, C, N]`` int32.
        partial, full: ``[B, C, N, M]`` int32; a full block has no masked element.
    """

    num_partial: Tensor
    partial: Tensor
    num_full: Tensor
    full: Tensor

    def of_heads(self, categories: Tensor) -> BlockTables:
        """Return the tables of heads ``[B, H, ...]`` with the given category codes ``[H]``."""
        return BlockTables(*(table.index_select(1, categories) for table in self))


class BlockRuns(NamedTuple):
    """The blocks of each block row as a few runs, ``begin <= block < end``: O(N), not O(N * M).

    Attributes:
        listed: Begins and ends ``[B, C, N, 3]`` int32 of disjoint runs in increasing order.
        full: Begins and ends of what is full in each.
    """

    listed: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]

    def num_listed(self) -> Tensor:
        """Return how many key blocks each query block visits, ``[B, C, N]`` int32."""
        begin, end = self.listed
        return (end - begin).sum(-1, dtype=torch.int32)

    def tables(self, num_blocks: int) -> BlockTables:
        """Write the runs out as tables of ``num_blocks`` columns, M."""
        (begin, end), (full_begin, full_end) = self
        # What is partial lies on either side of what is full.
        partial = torch.stack([begin, full_end], -1), torch.stack([full_begin, end], -1)
        return BlockTables(
            *_write_segments(partial[0].flatten(-2), partial[1].flatten(-2), num_blocks),
            *_write_segments(full_begin, full_end, num_blocks),
        )


def runs_of_sorted(bounds: SortedBounds, block_size: BlockSize) -> BlockRuns:
    """Return the blocks of a mask in sorted order."""
    query_size, key_size = _sizes(block_size)
    lower, upper = bounds
    nobody = torch.iinfo(torch.int32).max
    some = lower < upper
    # Rows beyond the last are padded with empty intervals: they list nothing, and let nothing
    # be full. The smallest and largest bounds of a block are those of rows that see something.
    hull_begin = _reduce(torch.where(some, lower, nobody), query_size, nobody, torch.amin)
    hull_end = _reduce(torch.where(some, upper, 0), query_size, 0, torch.amax)
    core_begin = _reduce(lower, query_size, 0, torch.amax)
    core_end = _reduce(upper, query_size, 0, torch.amin)

    # Parts in increasing order of keys: a block on the edge of two groups belongs to the first.
    begins, ends = [], []
    previous = torch.zeros_like(hull_begin[:, :, 0])
    for part in range(NUM_KEY_GROUPS):
        end = torch.maximum(ceil_div(hull_end[:, :, part], key_size), previous)
        begins.append((hull_begin[:, :, part] // key_size).clamp(previous, end))
        ends.append(end)
        previous = end
    listed = torch.stack(begins, -1), torch.stack(ends, -1)

    # Where all rows see the end of one group and the start of the next, a block across the edge
    # may be full: join what they see in common.
    run_begin, run_end = list(core_begin.unbind(2)), list(core_end.unbind(2))
    for part in range(1, NUM_KEY_GROUPS):
        joins = core_end[:, :, part - 1] == core_begin[:, :, part]
        run_begin[part] = torch.where(joins, run_begin[part - 1], run_begin[part])
    for part in reversed(range(1, NUM_KEY_GROUPS)):
        joins = core_end[:, :, part - 1] == core_begin[:, :, part]
        run_end[part - 1] = torch.where(joins, run_end[part], run_end[part - 1])
    full_begin = ceil_div(torch.stack(run_begin, -1), key_size).clamp(*listed)
    full_end = (torch.stack(run_end, -1) // key_size).clamp(full_begin, listed[1])
    return BlockRuns(listed, (full_begin, full_end))


def tables_of_sorted(
    bounds: SortedBounds,
    num_keys: int,
    block_size: BlockSize,
) -> BlockTables:
    """Return the tables of a mask in sorted order.

    Args:
        bounds: The mask.
        num_keys: K.
        block_size: Of queries and keys alike, or of each.
    """
    num_blocks = ceil_div(num_keys, _sizes(block_size)[1])
    return runs_of_sorted(bounds, block_size).tables(num_blocks)


def tables_of_prompt_order(
    base: BaseMask,
    keep: Keep,
    num_keys: int,
    block_size: BlockSize,
) -> BlockTables:
    """Return the tables of a mask in prompt order.

    Args:
        base: What the model's own mask allows.
        keep: What the categories keep.
        num_keys: K.
        block_size: Of queries and keys alike, or of each.
    """
    ranges = _Ranges(base, keep, num_keys, block_size)
    listed = ranges.listed()
    full = listed & ranges.full()
    return BlockTables(*_list_blocks(listed & ~full), *_list_blocks(full))


def tables_of_mask(mask: Tensor, block_size: BlockSize) -> BlockTables:
    """Return the tables of an explicit mask ``[B, C, Q, K]``, by looking at every element."""
    query_size, key_size = _sizes(block_size)
    ragged = -mask.shape[2] % query_size, -mask.shape[3] % key_size
    padded = pad(mask, (0, ragged[1], 0, ragged[0]))
    num_blocks = padded.shape[2] // query_size, padded.shape[3] // key_size
    blocks = padded.reshape(*mask.shape[:2], num_blocks[0], query_size, num_blocks[1], key_size)
    counts = blocks.sum(dim=(3, 5), dtype=torch.int32)
    is_full = counts == query_size * key_size
    return BlockTables(*_list_blocks((counts > 0) & ~is_full), *_list_blocks(is_full))


def listed_share(
    tables: BlockTables,
    num_pairs: Tensor | int,
    block_size: BlockSize,
) -> Tensor:
    """Return the pairs that the listed blocks hold, as a share of ``num_pairs``: ``[B, C]``.

    Args:
        tables: Of one mask.
        num_pairs: What to compare with: the pairs of the causal mask, for example.
        block_size: The tables'.
    """
    query_size, key_size = _sizes(block_size)
    num_listed = (tables.num_partial + tables.num_full).sum(-1, dtype=torch.int64)
    return num_listed * (query_size * key_size) / num_pairs


def prompt_order_lists_less(
    base: BaseMask,
    keep: Keep,
    num_sorted: Tensor,
    num_heads: Sequence[int],
    block_size: BlockSize,
    *,
    keys_per_move: float,
) -> bool:
    """Whether attention is cheaper in prompt order than with its tokens sorted.

    Without text between the images, or if most heads are dense, there may be nothing to gain
    from sorting. In prompt order the blocks of at most 64 query blocks, evenly spread, stand for
    all. Reads the result: give it tensors on the CPU.

    Args:
        base, keep: The mask in prompt order.
        num_sorted: ``[B, C, N]``, the blocks that it lists in sorted order, see
            :meth:`BlockRuns.num_listed`.
        num_heads: Heads of each category that go through the tables.
        block_size: Of queries and keys alike, or of each.
        keys_per_move: Keys that a query attends to in the time that it takes to move a token of
            query, key, value and output (of one head).
    """
    used = [category for category, heads in enumerate(num_heads) if heads]
    if not used:
        return True
    query_size, key_size = _sizes(block_size)
    weights = torch.tensor([num_heads[category] for category in used], device="cpu")
    keep = Keep(*(part[:, used] for part in keep))
    batch, num_queries, num_keys = *base.lower.shape, base.valid.shape[1]
    num_blocks = ceil_div(num_queries, query_size)
    step = ceil_div(num_blocks, _MAX_SAMPLED_BLOCKS)
    if step > 1:
        sampled = torch.arange(num_queries, device="cpu") // query_size % step == step // 2
        base = base._replace(lower=base.lower[:, sampled], upper=base.upper[:, sampled])
        keep = keep._replace(lower=keep.lower[..., sampled], upper=keep.upper[..., sampled])
    listed = _Ranges(base, keep, num_keys, block_size).listed()
    in_order = listed.sum((0, 2, 3)) * (num_blocks / listed.shape[2])
    saved = ((in_order - num_sorted[:, used].sum((0, 2))) * weights).sum()
    moved = batch * num_queries * keys_per_move * weights.sum()
    return bool(saved * (query_size * key_size) <= moved)


class _Ranges:
    """A mask in prompt order as half-open ranges of keys, ``[B, 1, Q]`` and ``[B, C, Q]``."""

    def __init__(self, base: BaseMask, keep: Keep, num_keys: int, block_size: BlockSize) -> None:
        self.num_keys = num_keys
        self.query_size, self.key_size = _sizes(block_size)
        self.visible, self.valid = keep.visible, base.valid[:, None]
        self.base_begin = base.lower[:, None].clamp(0, num_keys)
        end = (base.upper[:, None] + 1).clamp(0, num_keys)
        self.base_end = torch.maximum(end, self.base_begin)
        self.own_begin = keep.lower.clamp(0, num_keys)
        self.own_end = (keep.upper + 1).clamp(0, num_keys)

    def listed(self) -> Tensor:
        """Return which blocks hold an allowed key: ``[B, C, N, M]`` bool."""
        begin = torch.maximum(self.own_begin, self.base_begin)
        end = torch.maximum(torch.minimum(self.own_end, self.base_end), begin)
        own = self._touches(begin, end, self.valid)
        return own | self._touches(self.base_begin, self.base_end, self.visible & self.valid)

    def full(self) -> Tensor:
        """Return in which blocks every key is allowed, if they are listed."""
        device = self.valid.device
        num_blocks = ceil_div(self.num_keys, self.key_size)
        first = self.key_size * torch.arange(num_blocks, dtype=torch.int32, device=device)
        num_valid = _at_block_edges(_num_before(self.valid), self.key_size).diff(dim=-1)
        begin, end = self._common(self.base_begin, self.base_end)
        base_is_full = (begin <= first) & (first + self.key_size <= end)
        base_is_full = base_is_full & (num_valid == self.key_size)[..., None, :]
        # All of a block is kept if a row's own range holds all the keys that not every query sees.
        num_hidden = _num_before(~self.visible)
        edges = _at_block_edges(num_hidden, self.key_size)
        begin, end = self._common(
            _gather_rows(num_hidden, self.own_begin), _gather_rows(num_hidden, self.own_end)
        )
        own_is_full = (begin <= edges[..., None, :-1]) & (edges[..., None, 1:] <= end)
        own_is_full = own_is_full | (edges.diff(dim=-1) == 0)[..., None, :]
        return base_is_full & own_is_full

    def _touches(self, begin: Tensor, end: Tensor, flags: Tensor) -> Tensor:
        """Whether the rows' ranges, and what lies between them, hold a flagged key of a block."""
        num_before = _num_before(flags)
        begin, end = _gather_rows(num_before, begin), _gather_rows(num_before, end)
        some = begin < end
        begin = _reduce(
            torch.where(some, begin, self.num_keys), self.query_size, self.num_keys, torch.amin
        )
        end = _reduce(torch.where(some, end, 0), self.query_size, 0, torch.amax)
        edges = _at_block_edges(num_before, self.key_size)
        first = torch.maximum(edges[..., None, :-1], begin[..., None])
        return first < torch.minimum(edges[..., None, 1:], end[..., None])

    def _common(self, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The range that all rows of a query block have in common, ``[B, C, N, 1]``."""
        begin = _reduce(begin, self.query_size, 0, torch.amax)[..., None]
        return begin, _reduce(end, self.query_size, 0, torch.amin)[..., None]


def _sizes(block_size: BlockSize) -> tuple[int, int]:
    return (block_size, block_size) if isinstance(block_size, int) else block_size


def _reduce(
    x: Tensor, block_size: int, fill: int, reduction: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Reduce ``[..., Q]`` by blocks to ``[..., N]``; the last is filled up."""
    x = pad(x, (0, -x.shape[-1] % block_size), value=fill)
    return reduction(x.reshape(*x.shape[:-1], -1, block_size), -1)


def _num_before(flags: Tensor) -> Tensor:
    """Return how many flags are set before each position and the end, ``[..., K + 1]`` int32."""
    return pad(flags.cumsum(-1, dtype=torch.int32), (1, 0))


def _gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return ``values [B, C, K + 1]`` at ``index [B, C, Q]``, either with one C for all."""
    num_rows = max(values.shape[1], index.shape[1])
    return values.expand(-1, num_rows, -1).gather(2, index.expand(-1, num_rows, -1).long())


def _at_block_edges(values: Tensor, block_size: int) -> Tensor:
    """Return ``values [..., K + 1]`` where blocks begin and where the last one ends."""
    inner = values[..., :-1:block_size]
    return torch.cat([inner, values[..., -1:]], dim=-1)


def _write_segments(begin: Tensor, end: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the lengths of rows of segments ``[..., N, S]``, and their blocks ``[..., N, M]``.

    Along a row of the table the index goes up by one, and at the start of each segment by what
    lies between it and the one before: so the table is one running sum.
    """
    length = end - begin
    stop = length.cumsum(-1, dtype=torch.int32)
    start = stop - length
    shift = begin - start  # from the position in the row to the block
    jump = shift.diff(dim=-1, prepend=torch.zeros_like(shift[..., :1]))
    jump = torch.where(start < num_blocks, jump, 0)
    blocks = torch.ones(*length.shape[:-1], num_blocks, dtype=torch.int32, device=begin.device)
    blocks[..., 0] = 0
    # In place: at 300,000 tokens every copy of a table is 90 MB.
    blocks.scatter_add_(-1, start.clamp(max=num_blocks - 1).long(), jump)
    blocks.cumsum_(-1)
    # Kernels read ahead: the entries that no one visits must be blocks, too.
    return stop[..., -1].contiguous(), blocks.clamp_(0, num_blocks - 1)


def _list_blocks(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks ``[..., N, M]`` each row lists, and all blocks, those first."""
    rank = listed.cumsum(-1, dtype=torch.int32)
    num_listed = rank[..., -1:]
    block = torch.arange(listed.shape[-1], dtype=torch.int32, device=listed.device)
    position = torch.where(listed, rank - 1, num_listed + block - rank).long()
    blocks = torch.empty_like(rank).scatter_(-1, position, block.expand_as(rank))
    return num_listed[..., 0].contiguous(), blocks.contiguous()
