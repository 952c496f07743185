"""What sorting the tokens gains: attention time, gathers, masks and tables included.

    python bench/order.py [--quick] [--images 60 119] [--dtype bfloat16] [--heads DOCUMENT]

One attention call of 8 heads (2 key heads, head dim 128), compiled by Inductor as the rewritten
graphs are, on this machine's CPU. Prompts of 256-token images with 16 text tokens between. The
dense baselines are SDPA with is_causal (the fastest there is on a CPU), and with the boolean mask
that transformers hands it under torch.compile. All in turn, A B C D A B C D. Appends a row for each
measurement to bench/results/order.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Config, Spread, append_rows, conditions, print_table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from blindsight.attention.attend import attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.mask_forms import ordered_mask, sorted_mask
from blindsight.categories import HeadCategory
from blindsight.tune import compile_alone

RESULTS = Path(__file__).parent / "results" / "order.jsonl"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
MIXES = {
    "DOCUMENT": [HeadCategory.DOCUMENT] * 8,
    "DOCUMENT_SINK": [HeadCategory.DOCUMENT_SINK] * 8,
    "2 of each": sorted([*HeadCategory] * 2),
}


@dataclass(frozen=True)
class Result:
    """Median milliseconds of ``n`` calls after a warm-up; compile time in seconds."""

    tokens: int
    dtype: str
    heads: str
    form: str
    n: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    compile_s: float


def masked_attention(form: str) -> Callable[..., Tensor]:
    make_mask: Any = {"sorted": sorted_mask, "prompt order": ordered_mask}[form]

    def run(
        query: Tensor, key: Tensor, value: Tensor, span_id: Tensor, is_sink: Tensor, codes: Tensor
    ) -> Tensor:
        size = query.shape[2]
        mask = make_mask(CAUSAL, span_id, is_sink, batch=1, num_queries=size, num_keys=size)
        heads = torch.arange(NUM_HEADS)
        return attend(query, key, value, mask, heads, codes, (("all", NUM_HEADS),))

    return run


def compiled(
    function: Callable[..., Tensor], inputs: list[Tensor]
) -> tuple[Callable[..., object], float]:
    """Return a function compiled by Inductor alone, and the seconds that took."""
    begin = time.perf_counter()
    run = compile_alone(function, inputs)
    run(*inputs)
    return run, time.perf_counter() - begin


def sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    groups = NUM_HEADS // NUM_KV_HEADS
    size = query.shape[2]
    allowed = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=allowed)


def measure(
    config: Config, dtype: torch.dtype, mixes: Sequence[str], *, repeats: int
) -> list[Result]:
    span_id, is_sink = config.template()
    size = config.num_tokens
    query = torch.randn(1, NUM_HEADS, size, HEAD_DIM, dtype=dtype)
    key, value = (torch.randn(1, NUM_KV_HEADS, size, HEAD_DIM, dtype=dtype) for _ in range(2))
    runs: dict[tuple[str, str], tuple[Callable[..., object], list[Tensor], float]] = {}
    dense = [query, key, value]
    runs["-", "SDPA is_causal"] = sdpa, dense, 0.0
    runs["-", "SDPA boolean mask"] = masked_sdpa, dense, 0.0
    for name in mixes:
        heads = torch.tensor(MIXES[name], dtype=torch.int32)
        inputs = [*dense, span_id, is_sink, heads]
        for form in ("sorted", "prompt order"):
            run, seconds = compiled(masked_attention(form), inputs)
            runs[name, form] = run, inputs, seconds
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(repeats + 1):
        for name, (run, inputs, _) in runs.items():
            begin = time.perf_counter()
            run(*inputs)
            if turn > 0:  # the first is a warm-up
                times[name].append(1e3 * (time.perf_counter() - begin))
    return [
        Result(
            size,
            str(dtype).removeprefix("torch."),
            heads,
            form,
            repeats,
            *Spread.of(values),
            runs[heads, form][2],
        )
        for (heads, form), values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prompts, float32 only")
    parser.add_argument("--images", type=int, nargs="+", default=[7, 15, 30, 60, 119])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--heads", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--repeats", type=int, help="default: 5, fewer for long prompts")
    arguments = parser.parse_args()
    images = (7, 15, 30) if arguments.quick else arguments.images
    names = ["float32"] if arguments.quick else arguments.dtype
    dtypes = [getattr(torch, name) for name in names]
    told = conditions()
    table = []
    for dtype in dtypes:
        for num_images in images:
            usual = 5 if num_images < 60 else 3 if num_images < 119 else 2
            repeats = arguments.repeats or usual
            results = measure(Config(num_images, 256, 16), dtype, arguments.heads, repeats=repeats)
            append_rows(RESULTS, map(asdict, results), told)
            causal = results[0].median_ms
            for result in results:
                table.append(
                    [
                        f"{result.tokens:,}",
                        result.dtype,
                        result.heads,
                        result.form,
                        f"{result.median_ms:.0f}",
                        f"{causal / result.median_ms:.2f}",
                    ]
                )
    print_table(["tokens", "dtype", "heads", "form", "ms", "x faster than SDPA is_causal"], table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
