"""What is the fastest way to compute the attention of a prompt; every way is exact.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from math import gcd, inf

import torch
from torch import Tensor

from blindsight.attention.block_tables import (
    block_size_of,
    ceil_div,
    prompt_order_lists_less,
    runs_of_sorted,
    tables_of_prompt_order,
)
from blindsight.attention.chunks import num_chunks_on_cpu
from blindsight.attention.interval_masks import BaseMask, Keep, causal_base, keep_intervals
from blindsight.attention.intervals import sorted_bounds
from blindsight.attention.lowering import Layout, Lowering, fused_layout, split_layout
from blindsight.attention.mask_forms import MaskForm
from blindsight.categories import NUM_CATEGORIES
from blindsight.runtime.cost_model import (
    CallSize,
    Costs,
    costs_of,
    time_of_groups,
    time_of_own,
)
from blindsight.runtime.history import History

# Estimates are rough: sparse attention must promise at least this to be worth its compile time.
_MIN_GAIN = 1.03
# And each call must save at least the time of so many empty ones. On two cores of a CPU, a saving
# of 3.7 ms a layer that was estimated at 512 tokens was a loss of 5 ms.
_MIN_CALLS_SAVED = 4
# Masks and tables, once per prompt, take about as long as so many empty calls: 3.3 ms on two
# cores of a CPU, 60 microseconds on a GPU.
_CALLS_OF_MASKS = 3
# Block tables of a fused call are per head: 1.2 GB a layer of 28 heads at 300,000 tokens. Beyond
# this, there is a call per category, whose heads share one.
MAX_TABLE_BYTES = 256 * 2**20

# The layouts of a model's layers are the same for every prompt.
_fused_layout = lru_cache(maxsize=4096)(fused_layout)
_split_layout = lru_cache(maxsize=4096)(split_layout)


@dataclass(frozen=True)
class Device:
    """What attention runs on.

    Attributes:
        costs: What its operations take.
        block_size: Of its block tables, in tokens.
        num_threads: Among how many threads a CPU's kernels deal out their work, else 1.
    """

    costs: Costs
    block_size: int
    num_threads: int

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Device:
        num_threads = torch.get_num_threads() if device.type == "cpu" else 1
        return cls(costs_of(device, dtype), block_size_of(device), num_threads)


@dataclass(frozen=True)
class ChoosableCall:
    """An attention call of a graph, for this prompt.

    Attributes:
        categories: ``[H]`` codes of its heads.
        form: Of its mask.
        is_causal: Whether the model's own mask is plain causal.
        size: What it computes on.
    """

    categories: tuple[int, ...]
    form: MaskForm
    is_causal: bool
    size: CallSize


class Fastest(Enum):
    """How a graph is estimated to run the fastest."""

    SPARSE = "sparse"
    CAUSAL = "is_causal"
    """All heads dense, without the mask that the model builds."""
    OWN_GRAPH = "the model's own graph"


@dataclass(frozen=True)
class Choice:
    """How to compute the calls of a graph.

    Attributes:
        layouts: One per call, if it runs sparse.
        reasons: What was estimated of each call, for the report; "" where nothing was.
        fastest: How to run the graph.
    """

    layouts: tuple[Layout, ...]
    reasons: tuple[str, ...]
    fastest: Fastest


@dataclass(frozen=True)
class _Estimate:
    """What a call takes, in ns.

    Attributes:
        layouts: Ways to run it sparse.
        sparse: Times of these.
        own: In the model's own graph.
        causal: Dense on ``is_causal``; infinite where the mask is another.
        note: What was not among the ways, and why.
    """

    layouts: tuple[Layout, ...]
    sparse: tuple[float, ...]
    own: float
    causal: float
    note: str

    @property
    def best_layout(self) -> Layout:
        return self.layouts[self.sparse.index(min(self.sparse))]

    def __str__(self) -> str:
        pairs = zip(self.layouts, self.sparse, strict=True)
        told = ", ".join(f"{ns / 1e6:.3g} ms {layout.name}" for layout, ns in pairs)
        told += f"{self.note}, {self.own / 1e6:.3g} ms dense"
        if self.causal not in (self.own, inf):
            told += f", {self.causal / 1e6:.3g} ms with is_causal"
        return told


def best_mask_form(
    history: History, num_queries: int, categories: Tensor, device: Device
) -> MaskForm:
    """Return the token order that lists fewer blocks for heads of these categories.

    Judged for a causal base mask, once per prompt.

    Args:
        history: The whole sequence.
        num_queries: Q, the last tokens of it.
        categories: Codes of all heads that run.
        device: What they run on.
    """
    num_heads = torch.bincount(categories.flatten().long(), minlength=NUM_CATEGORIES).tolist()

    def find() -> MaskForm:
        less = prompt_order_lists_less(
            *_prompt_order(history, num_queries),
            _num_sorted(history, num_queries, device.block_size),
            num_heads,
            device.block_size,
            keys_per_move=device.costs.keys_per_move,
        )
        return MaskForm.ORDERED if less else MaskForm.SORTED

    return history.once(("form", num_queries, tuple(num_heads), device.block_size), find)


def choose_layouts(
    calls: Sequence[ChoosableCall],
    history: History,
    *,
    lowering: Lowering,
    device: Device,
) -> Choice:
    """Return how to compute each call, and why.

    Args:
        calls: Of one graph, rewritten together or not at all.
        history: The whole sequence.
        lowering: What was asked for.
        device: What they run on.
    """
    ways = [_ways(call, lowering, device) for call in calls]
    if lowering is not Lowering.AUTO:
        layouts = tuple(of_call[0] for of_call, _ in ways)
        return Choice(layouts, ("",) * len(calls), Fastest.SPARSE)
    estimates = [
        _estimate(call, of_call, note, history, device)
        for call, (of_call, note) in zip(calls, ways, strict=True)
    ]
    return Choice(
        layouts=tuple(each.best_layout for each in estimates),
        reasons=tuple(map(str, estimates)),
        fastest=_fastest(estimates, device.costs),
    )


def _ways(
    call: ChoosableCall, lowering: Lowering, device: Device
) -> tuple[tuple[Layout, ...], str]:
    """Return the layouts that a call may have, what was asked for first, and what is left out."""
    threads = device.num_threads
    if call.form.is_sorted:  # each chunk of queries has so many threads
        threads //= num_chunks_on_cpu(call.size.query_rows, threads)
    parts = threads // gcd(threads, call.size.batch)
    split = _split_layout(call.categories, parts, is_causal=call.is_causal)
    if _table_bytes(split, call.size, device.block_size) > MAX_TABLE_BYTES:
        split = _split_layout(call.categories, is_causal=call.is_causal, per_category=True)
    # A layer of dense heads alone needs no FlexAttention, where is_causal says it all.
    is_plain = call.is_causal and not any(call.categories)
    if lowering is Lowering.SPLIT or is_plain:
        return (split,), ""
    fused = _fused_layout(call.categories, parts)
    if lowering is Lowering.FUSED or split == fused:
        return (fused,), ""
    table_bytes = _table_bytes(fused, call.size, device.block_size)
    if table_bytes > MAX_TABLE_BYTES:
        return (split,), f" (tables of fused: {table_bytes / 2**30:.2g} GiB, too large)"
    return (fused, split), ""


def _estimate(
    call: ChoosableCall,
    layouts: tuple[Layout, ...],
    note: str,
    history: History,
    device: Device,
) -> _Estimate:
    costs, threads = device.costs, device.num_threads
    listed = _listed_pairs(history, call.size.num_queries, call.form, device.block_size)
    sparse = tuple(
        time_of_groups(
            costs,
            call.size,
            layout.groups,
            [call.categories[head] for head in layout.heads],
            listed,
            is_sorted=call.form.is_sorted,
            num_threads=threads,
        )
        for layout in layouts
    )
    unmasked = time_of_own(costs, replace(call.size, is_masked=False), threads)
    causal = unmasked if call.is_causal else inf
    return _Estimate(layouts, sparse, time_of_own(costs, call.size, threads), causal, note)


def _fastest(estimates: Sequence[_Estimate], costs: Costs) -> Fastest:
    """Return how to run a graph: as the model does, unless there is enough to be gained."""
    sparse = _CALLS_OF_MASKS * costs.call + sum(min(each.sparse) for each in estimates)
    own = sum(each.own for each in estimates)
    causal = sum(each.causal for each in estimates)
    too_little = _MIN_CALLS_SAVED * costs.call * len(estimates)

    def is_worth(time: float, other: float) -> bool:
        return max(time * _MIN_GAIN, time + too_little) <= other

    dense, time = (Fastest.CAUSAL, causal) if is_worth(causal, own) else (Fastest.OWN_GRAPH, own)
    return Fastest.SPARSE if is_worth(sparse, time) else dense


def _table_bytes(layout: Layout, size: CallSize, block_size: int) -> int:
    """Return the memory of the block tables per head of a layout, at most."""
    rows, columns = (ceil_div(tokens, block_size) for tokens in (size.query_rows, size.key_rows))
    num_heads = sum(number for kind, number in layout.groups if kind in ("all", "mixed"))
    return 2 * 4 * size.batch * num_heads * rows * columns  # partial and full, int32


def _listed_pairs(history: History, num_queries: int, form: MaskForm, block_size: int) -> list[int]:
    """Return the pairs in the blocks that a head of each category visits, over a causal mask."""

    def find() -> list[int]:
        if form.is_sorted:
            listed = _num_sorted(history, num_queries, block_size)
        else:
            masks = _prompt_order(history, num_queries)
            tables = tables_of_prompt_order(*masks, history.num_tokens, block_size)
            listed = tables.num_partial + tables.num_full
        pairs: list[int] = (listed.sum((0, 2), dtype=torch.int64) * block_size**2).tolist()
        return pairs

    return history.once(("listed", num_queries, form.is_sorted, block_size), find)


def _prompt_order(history: History, num_queries: int) -> tuple[BaseMask, Keep]:
    """Return a causal base mask, and what the categories keep of it; on the CPU."""

    def find() -> tuple[BaseMask, Keep]:
        span_id, is_sink = history.template.tensors()
        keep = keep_intervals(span_id, is_sink, num_queries, history.num_tokens)
        return _causal(history, num_queries), keep

    return history.once(("prompt order", num_queries), find)


def _num_sorted(history: History, num_queries: int, block_size: int) -> Tensor:
    """Return the blocks that categories list of a causal mask in sorted order, ``[B, C, N]``."""

    def find() -> Tensor:
        base = _causal(history, num_queries)
        tokens = history.template.tensors()
        bounds, _ = sorted_bounds(base, *tokens, num_queries, history.num_tokens)
        return runs_of_sorted(bounds, block_size).num_listed()

    return history.once(("sorted", num_queries, block_size), find)


def _causal(history: History, num_queries: int) -> BaseMask:
    return causal_base(history.batch, num_queries, history.num_tokens, history.num_tokens, "cpu")
