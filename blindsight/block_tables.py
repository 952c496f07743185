"""Which blocks of a mask a FlexAttention kernel visits.

Shapes: B batch, C categories (or heads), Q and K lengths in tokens, N and M numbers of query
and key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_SIZE = 128


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


def tables_of_mask(mask: Tensor, block_size: int = BLOCK_SIZE) -> BlockTables:
    """Return the tables of an explicit mask ``[B, C, Q, K]``, by looking at every element."""
    ragged = [-size % block_size for size in mask.shape[2:]]
    blocks = pad(mask, (0, ragged[1], 0, ragged[0])).unflatten(3, (-1, block_size))
    counts = blocks.unflatten(2, (-1, block_size)).sum(dim=(3, 5), dtype=torch.int32)
    is_full = counts == block_size * block_size
    num_partial, partial = _list_blocks((counts > 0) & ~is_full)
    num_full, full = _list_blocks(is_full)
    return BlockTables(num_partial, partial, num_full, full)


def _list_blocks(listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks are listed in each row, and their indices, those first."""
    order = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return listed.sum(-1, dtype=torch.int32), order.to(torch.int32)
