"""Measure what attention costs on a device, for :mod:`blindsight.runtime.cost_model`.

Shapes: B batch, H query heads, L tokens, D head dim.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from blindsight.attention.attend import attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.block_tables import block_size_of, ceil_div
from blindsight.attention.mask_forms import sorted_mask
from blindsight.categories import HeadCategory
from blindsight.runtime.cost_model import HEAD_DIM, Costs, causal_skew
from blindsight.timer import Timer

_NUM_HEADS = 8
_MOVES = 4  # of query, key, value and output


def measure_costs(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int | None = None,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Costs:
    """Return the times of attention's parts, the shortest of calls in turn (A B C A B C).

    Args:
        device: Where to measure.
        dtype: Of queries, keys and values.
        num_tokens: L; by default 4,096 on a CPU and 16,384 elsewhere.
        repeats: How often each part is timed.
        progress: Called with what comes next, "timing" when everything is compiled.
    """
    length = num_tokens or (4096 if device.type == "cpu" else 16384)
    block_size = block_size_of(device)
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    timer = Timer(device)
    runs: dict[str, Callable[[], object]] = {}

    def add(
        name: str,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        num_outputs: int | None = None,
    ) -> None:
        progress(f"compiling: {name}")
        runs[name] = partial(compile_alone(function, inputs, num_outputs), *inputs)

    for name, size in (("long", length), ("short", 2 * block_size)):
        query, key, value = (
            torch.randn(1, _NUM_HEADS, size, HEAD_DIM, device=device, dtype=dtype) for _ in range(3)
        )
        # One image of all tokens: dense, whatever the category.
        span_id = torch.ones((1, size), device=device, dtype=torch.int32)
        is_sink = torch.arange(size, device=device)[None] == 0
        heads = torch.arange(_NUM_HEADS, device=device)
        codes = torch.full_like(heads, HeadCategory.DENSE, dtype=torch.int32)
        add(name, _flex(size, num_threads), [query, key, value, span_id, is_sink, heads, codes])
        if timer.on_gpu:
            mask, read = _mask_alone(size), (span_id, is_sink)
            add(f"{name}, mask", mask, read, len(mask(*read)))
        if name == "long":
            order = torch.arange(size, device=device).roll(size // 2)[None]  # runs, as sorted ones
            add("moves", _moves, [query, key, value, torch.empty_like(query), order], _MOVES)
            allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()[None, None]
            runs["causal"] = partial(_causal, query, key, value)
            runs["masked"] = partial(_masked, query, key, value, allowed)
    times = _time(runs, timer, repeats, lambda: progress("timing"))
    # All layers of a prompt share a mask. On a CPU it stays part of a call: what surrounds the call
    # takes as long there, and small savings come to nothing.
    long, call = (times[name] - times.get(f"{name}, mask", 0.0) for name in ("long", "short"))
    blocks = ceil_div(length, block_size)
    listed = _NUM_HEADS * blocks * (blocks + 1) / 2 * block_size**2
    pairs = _NUM_HEADS * length**2
    call = max(call, 0.0)
    return Costs(
        causal=times["causal"] / (pairs / 2) / causal_skew(_NUM_HEADS, length, num_threads),
        masked=times["masked"] / pairs,
        flex=max(long - times["moves"] - call, 0.0) / listed,
        move=times["moves"] / (_MOVES * _NUM_HEADS * length * HEAD_DIM),
        call=call,
    )


def _flex(size: int, num_threads: int) -> Callable[..., Tensor]:
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span_id: Tensor,
        is_sink: Tensor,
        heads: Tensor,
        codes: Tensor,
    ) -> Tensor:
        sizes: dict[str, Any] = {"batch": 1, "num_queries": size, "num_keys": size}
        mask = sorted_mask(CAUSAL, span_id, is_sink, num_threads=num_threads, **sizes)
        return attend(query, key, value, mask, heads, codes, (("all", _NUM_HEADS),))

    return run


def _moves(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Move the tokens of query, key, value and output ``[1, H, L, D]`` to an order ``[1, L]``."""
    *moved, order = inputs
    return tuple(x.gather(2, order[:, None, :, None].expand_as(x)) for x in moved)


def _mask_alone(size: int) -> Callable[..., Any]:
    """Return what computes all that a mask is made of."""

    def run(span_id: Tensor, is_sink: Tensor) -> Any:
        mask = sorted_mask(CAUSAL, span_id, is_sink, batch=1, num_queries=size, num_keys=size)
        return tuple(x for x in tree_leaves(mask) if isinstance(x, Tensor))

    return run


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _masked(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def compile_alone(
    function: Callable[..., Any], inputs: Sequence[Tensor], num_outputs: int | None = None
) -> Callable[..., object]:
    """Compile a function of tensors with Inductor, without Dynamo, for exactly these sizes.

    It returns a tensor; or so many, in a tuple.
    """
    from torch._inductor.compile_fx import compile_fx

    graph = fx.Graph()
    names = [graph.placeholder(f"x{at}") for at in range(len(inputs))]
    result = graph.call_function(function, tuple(names))
    if num_outputs is None:
        graph.output((result,))
    else:
        parts = range(num_outputs)
        graph.output(tuple(graph.call_function(operator.getitem, (result, at)) for at in parts))
    return cast(Callable[..., object], compile_fx(fx.GraphModule({}, graph), list(inputs)))


def _time(
    runs: Mapping[str, Callable[[], object]],
    timer: Timer,
    repeats: int,
    begin: Callable[[], object],
) -> dict[str, float]:
    """Return the fewest nanoseconds of each, called in turn: what else runs only adds to them."""
    begin()
    prepared = {}
    for name, run in runs.items():
        run()  # a warm-up
        prepared[name] = timer.prepare(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, milliseconds in prepared.items():
            times[name].append(1e6 * milliseconds())
    return {name: min(values) for name, values in times.items()}
