"""What is known of the tensors that hold a cache's keys, and whether it still holds of them.

Shapes: B batch, G key/value heads, K rows of the cache, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.runtime.history import History


class Witness(NamedTuple):
    """What tells later whether a cache still holds the keys that it held.

    Tensors made in inference mode keep no count of what is written to them.
    """

    num_rows: int
    totals: Tensor  # of the bits of those rows, as ints: whatever order they are added in

    @classmethod
    def of(cls, keys: Tensor, history: History, before: Witness | None) -> Witness | None:
        """Return the witness of a cache; None where there is no need, or no way.

        Args:
            keys: ``[B, G, K, D]``.
            history: Of the tokens in it.
            before: Of some of its rows, which will do, unless they moved.
        """
        if not keys.is_inference() or keys.dim() != 4 or keys.itemsize not in _INTS:
            return None
        num_rows = min(history.num_tokens, keys.shape[2])
        it_slid = history.num_tokens > num_rows
        return cls(num_rows, _totals(keys, num_rows)) if it_slid or before is None else before

    def holds(self, keys: Tensor) -> bool:
        return torch.equal(self.totals, _totals(keys, self.num_rows))


_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _totals(keys: Tensor, num_rows: int) -> Tensor:
    """Return one number for each sequence and head, ``[B, G]``: tokens may have changed places."""
    of_tokens = keys[:, :, :num_rows].view(_INTS[keys.itemsize]).sum(-1, dtype=torch.int64)
    weights = torch.arange(1, 2 * num_rows, 2, device=keys.device)  # odd: none loses a bit
    return (of_tokens * weights).sum(-1)


class CacheNote(NamedTuple):
    """What is known of the tensors that hold a cache's keys, of one layer each."""

    history: History
    witness: Witness | None = None
