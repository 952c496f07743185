"""Measure what attention costs on a device, for :mod:`blindsight.cost_model`.

Shapes: B batch, H query heads, L tokens, D head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from blindsight.attention import attend
from blindsight.base_mask import CAUSAL
from blindsight.block_tables import block_size_of
from blindsight.categories import HeadCategory
from blindsight.cost_model import HEAD_DIM, Costs
from blindsight.mask_forms import ordered_mask, sorted_mask

_NUM_HEADS = 8


def measure_costs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Return the times of attention's parts, medians of calls in turn (A B C A B C).

    Args:
        device: Where to measure.
        dtype: Of queries, keys and values.
        num_tokens: L; by default 4,096 on a CPU and 16,384 elsewhere.
        repeats: How often each part is timed.
        progress: Called with what comes next.
    """
    length = num_tokens or (4096 if device.type == "cpu" else 16384)
    block_size = block_size_of(device)
    short = 2 * block_size
    runs: dict[str, Callable[[], object]] = {}
    for name, size in (("long", length), ("short", short)):
        query, key, value = (
            torch.randn(1, _NUM_HEADS, size, HEAD_DIM, device=device, dtype=dtype) for _ in range(3)
        )
        # One image of all tokens: dense, whatever the category.
        span_id = torch.ones((1, size), device=device, dtype=torch.int32)
        is_sink = torch.arange(size, device=device)[None] == 0
        heads = torch.arange(_NUM_HEADS, device=device)
        codes = torch.full_like(heads, HeadCategory.DENSE, dtype=torch.int32)
        inputs = [query, key, value, span_id, is_sink, heads, codes]
        for form in ("ordered", "sorted"):
            progress(f"compiling: {form}, {size:,} tokens")
            runs[f"{form} {name}"] = _bind(compile_alone(_flex(form, size), inputs), inputs)
        if name == "long":
            allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]
            runs["causal"] = _bind(_causal, [query, key, value])
            runs["masked"] = _bind(_masked, [query, key, value, allowed])
    progress("timing")
    times = _time(runs, device, repeats)
    blocks = -(-length // block_size)
    listed = _NUM_HEADS * blocks * (blocks + 1) / 2 * block_size**2
    pairs = _NUM_HEADS * length**2
    moved = 4 * _NUM_HEADS * length * HEAD_DIM
    call = times["ordered short"]
    return Costs(
        causal=times["causal"] / (pairs / 2),
        masked=times["masked"] / pairs,
        flex=max(times["ordered long"] - call, 0.0) / listed,
        move=max(times["sorted long"] - times["ordered long"], 0.0) / moved,
        call=call,
    )


def _flex(form: str, size: int) -> Callable[..., Tensor]:
    make_mask: Any = sorted_mask if form == "sorted" else ordered_mask

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span_id: Tensor,
        is_sink: Tensor,
        heads: Tensor,
        codes: Tensor,
    ) -> Tensor:
        mask = make_mask(CAUSAL, span_id, is_sink, batch=1, num_queries=size, num_keys=size)
        return attend(query, key, value, mask, heads, codes, (("all", _NUM_HEADS),))

    return run


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _masked(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def compile_alone(
    function: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> Callable[..., object]:
    """Compile a function of tensors with Inductor, without Dynamo, for exactly these sizes."""
    from torch._inductor.compile_fx import compile_fx

    graph = fx.Graph()
    names = [graph.placeholder(f"x{at}") for at in range(len(inputs))]
    graph.output((graph.call_function(function, tuple(names)),))
    return cast(Callable[..., object], compile_fx(fx.GraphModule({}, graph), list(inputs)))


def _bind(function: Callable[..., object], inputs: Sequence[Tensor]) -> Callable[[], object]:
    return lambda: function(*inputs)


def _time(
    runs: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Return the median nanoseconds of each, called in turn; the first turn is a warm-up."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            wait()
            begin = time.perf_counter_ns()
            run()
            wait()
            if turn > 0:
                times[name].append(time.perf_counter_ns() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
