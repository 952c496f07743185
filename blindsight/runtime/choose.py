"""What is the fastest way to compute the attention of a prompt; every way is exact.

Shapes: B batch, H query heads, C categories, Q and K lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, inf

import torch
from torch import Tensor

from blindsight.attention.block_tables import (
    ceil_div,
    prompt_order_lists_less,
    runs_of_sorted,
    tables_of_prompt_order,
)
from blindsight.attention.interval_masks import BaseMask, Keep, causal_base, keep_intervals
from blindsight.attention.intervals import sorted_bounds
from blindsight.categories import NUM_CATEGORIES
from blindsight.passes.replace_attention import MaskForm
from blindsight.runtime.cost_model import CallSize, Costs, time_of_groups, time_of_own
from blindsight.runtime.history import History
from blindsight.runtime.lowering import Layout, Lowering, fused_layout, split_layout

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


@dataclass(frozen=True)
class Choice:
    """How to compute the calls of a graph.

    Attributes:
        layouts: One per call.
        reasons: What was estimated of each call, for the report; "" where nothing was.
        dense_is_faster: Whether dense heads alone are estimated to be.
        own_is_faster: Whether the model's own graph is the fastest way to compute those, and not
            ``is_causal`` without the mask that the model builds.
    """

    layouts: tuple[Layout, ...]
    reasons: tuple[str, ...]
    dense_is_faster: bool
    own_is_faster: bool


def best_form(
    history: History, num_queries: int, categories: Tensor, *, costs: Costs, block_size: int
) -> MaskForm:
    """Return the token order that lists fewer blocks for heads of these categories.

    Judged for a causal base mask, once per prompt.

    Args:
        history: The whole sequence.
        num_queries: Q, the last tokens of it.
        categories: Codes of all heads that run.
        costs, block_size: Of the device.
    """
    num_heads = torch.bincount(categories.flatten().long(), minlength=NUM_CATEGORIES).tolist()
    key = ("form", num_queries, tuple(num_heads), block_size)
    if key not in history.memo:
        less = prompt_order_lists_less(
            *_prompt_order(history, num_queries),
            _num_sorted(history, num_queries, block_size),
            num_heads,
            block_size,
            keys_per_move=costs.keys_per_move,
        )
        history.memo[key] = MaskForm.ORDERED if less else MaskForm.SORTED
    form: MaskForm = history.memo[key]
    return form


def choose_layouts(
    calls: Sequence[ChoosableCall],
    history: History,
    *,
    lowering: Lowering,
    costs: Costs,
    block_size: int,
    num_threads: int,
) -> Choice:
    """Return how to compute each call, and why.

    Args:
        calls: Of one graph, rewritten together or not at all.
        history: The whole sequence.
        lowering: What was asked for.
        costs, block_size: Of the device.
        num_threads: Among how many threads a CPU's kernels deal out their work, else 1.
    """
    layouts: list[Layout] = []
    reasons: list[str] = []
    time, own, causal = _CALLS_OF_MASKS * costs.call, 0.0, 0.0
    for call in calls:
        parts = num_threads // gcd(num_threads, call.size.batch)
        split = _split_layout(call.categories, parts, is_causal=call.is_causal)
        if _table_bytes(split, call.size, block_size) > MAX_TABLE_BYTES:
            split = _split_layout(call.categories, is_causal=call.is_causal, per_category=True)
        # A layer of dense heads alone needs no FlexAttention, where is_causal says it all.
        is_plain = call.is_causal and not any(call.categories)
        splits = lowering is Lowering.SPLIT or is_plain
        asked = split if splits else _fused_layout(call.categories, parts)
        if lowering is not Lowering.AUTO:
            layouts.append(asked)
            reasons.append("")
            continue
        table_bytes = _table_bytes(asked, call.size, block_size)
        too_large = table_bytes > MAX_TABLE_BYTES
        options = [split] if too_large or split == asked else [asked, split]
        listed = _listed_pairs(history, call.size.num_queries, call.form, block_size)
        times = [
            time_of_groups(
                costs,
                call.size,
                layout.groups,
                [call.categories[head] for head in layout.heads],
                listed,
                is_sorted=call.form.is_sorted,
            )
            for layout in options
        ]
        fastest, dense = min(times), time_of_own(costs, call.size)
        unmasked = time_of_own(costs, replace(call.size, is_masked=False))
        layouts.append(options[times.index(fastest)])
        time += fastest
        own += dense
        causal += unmasked if call.is_causal else inf
        estimates = dict(zip((layout.name for layout in options), times, strict=True))
        told = ", ".join(f"{ns / 1e6:.3g} ms {name}" for name, ns in estimates.items())
        if too_large:
            told += f" (tables of fused: {table_bytes / 2**30:.2g} GiB, too large)"
        told_dense = f"{dense / 1e6:.3g} ms dense"
        if call.is_causal and call.size.is_masked:
            told_dense += f", {unmasked / 1e6:.3g} ms with is_causal"
        reasons.append(f"{told}, {told_dense}")
    too_little = _MIN_CALLS_SAVED * costs.call * len(calls)

    def is_worth(time: float, other: float) -> bool:
        return max(time * _MIN_GAIN, time + too_little) <= other

    is_auto = lowering is Lowering.AUTO
    own_is_faster = not is_worth(causal, own)
    dense_is_faster = is_auto and not is_worth(time, own if own_is_faster else causal)
    return Choice(tuple(layouts), tuple(reasons), dense_is_faster, own_is_faster)


def _table_bytes(layout: Layout, size: CallSize, block_size: int) -> int:
    """Return the memory of the block tables per head of a layout, at most."""
    rows, columns = (ceil_div(tokens, block_size) for tokens in (size.query_rows, size.key_rows))
    num_heads = sum(number for kind, number in layout.groups if kind in ("all", "mixed"))
    return 2 * 4 * size.batch * num_heads * rows * columns  # partial and full, int32


def _listed_pairs(history: History, num_queries: int, form: MaskForm, block_size: int) -> list[int]:
    """Return the pairs in the blocks that a head of each category visits, over a causal mask."""
    key = ("listed", num_queries, form.is_sorted, block_size)
    if key not in history.memo:
        if form.is_sorted:
            listed = _num_sorted(history, num_queries, block_size)
        else:
            masks = _prompt_order(history, num_queries)
            tables = tables_of_prompt_order(*masks, history.num_tokens, block_size)
            listed = tables.num_partial + tables.num_full
        history.memo[key] = (listed.sum((0, 2), dtype=torch.int64) * block_size**2).tolist()
    pairs: list[int] = history.memo[key]
    return pairs


def _prompt_order(history: History, num_queries: int) -> tuple[BaseMask, Keep]:
    """Return a causal base mask, and what the categories keep of it; on the CPU."""
    key = ("prompt order", num_queries)
    if key not in history.memo:
        span_id, is_sink = history.template.tensors()
        keep = keep_intervals(span_id, is_sink, num_queries, history.num_tokens)
        history.memo[key] = _causal(history, num_queries), keep
    masks: tuple[BaseMask, Keep] = history.memo[key]
    return masks


def _num_sorted(history: History, num_queries: int, block_size: int) -> Tensor:
    """Return the blocks that categories list of a causal mask in sorted order, ``[B, C, N]``."""
    key = ("sorted", num_queries, block_size)
    if key not in history.memo:
        base = _causal(history, num_queries)
        tokens = history.template.tensors()
        bounds, _ = sorted_bounds(base, *tokens, num_queries, history.num_tokens)
        history.memo[key] = runs_of_sorted(bounds, block_size).num_listed()
    listed: Tensor = history.memo[key]
    return listed


def _causal(history: History, num_queries: int) -> BaseMask:
    return causal_base(history.batch, num_queries, history.num_tokens, history.num_tokens, "cpu")
