"""Which block size suits a CPU's FlexAttention kernel, where the tile is the block.

    python bench/blocks.py [--images 30] [--dtype float32 bfloat16] [--blocks 64x64 128x128]

One attention call of 8 heads (2 key heads, head dim 128), tokens sorted, moving them included and
block tables not. Prompts of 256-token images with 16 text tokens between; all heads DENSE, which
measures the kernel, or DOCUMENT, which adds what a block size lists. SDPA with is_causal beside
them, all in turn. Appends a row for each measurement to bench/results/blocks.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import Config, append_rows, conditions, print_table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from blindsight.attention.attend import attend
from blindsight.attention.block_tables import BlockTables, runs_of_sorted, tables_of_sorted
from blindsight.attention.interval_masks import causal_base
from blindsight.attention.intervals import SortedBounds, TokenOrder, sorted_bounds
from blindsight.attention.mask_forms import SortedMask
from blindsight.categories import HeadCategory
from blindsight.tune import compile_alone

RESULTS = Path(__file__).parent / "results" / "blocks.jsonl"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128


@dataclass(frozen=True)
class Result:
    """Median milliseconds of ``n`` calls after a warm-up; pairs listed as a share of causal."""

    tokens: int
    dtype: str
    heads: str
    block_size: str
    n: int
    median_ms: float
    over_sdpa: float
    listed: float


def attention(block_size: tuple[int, int]) -> Callable[..., Tensor]:
    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        codes: Tensor,
        lower: Tensor,
        upper: Tensor,
        *order_and_tables: Tensor,
    ) -> Tensor:
        order, tables = TokenOrder(*order_and_tables[:3]), BlockTables(*order_and_tables[3:])
        mask = SortedMask(order, lower, upper, tables, block_size)
        heads = torch.arange(NUM_HEADS)
        return attend(query, key, value, mask, heads, codes, (("all", NUM_HEADS),))

    return run


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def measure(
    config: Config, dtype: torch.dtype, block_sizes: list[tuple[int, int]], repeats: int
) -> list[Result]:
    size = config.num_tokens
    span_id, is_sink = config.template()
    bounds, order = sorted_bounds(causal_base(1, size, size, size), span_id, is_sink, size, size)
    query = torch.randn(1, NUM_HEADS, size, HEAD_DIM, dtype=dtype)
    key, value = (torch.randn(1, NUM_KV_HEADS, size, HEAD_DIM, dtype=dtype) for _ in range(2))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    listed: dict[tuple[str, str], float] = {("-", "-"): 1.0}
    runs["-", "-"] = lambda: sdpa(query, key, value)
    for category in (HeadCategory.DENSE, HeadCategory.DOCUMENT):
        for block_size in tqdm(block_sizes, desc=f"compiling, {category.name}", leave=False):
            name = category.name, "x".join(map(str, block_size))
            listed[name] = share_listed(bounds, category, block_size, size)
            codes = torch.full((NUM_HEADS,), category, dtype=torch.int32)
            tables = tables_of_sorted(bounds, size, block_size)
            inputs = [query, key, value, codes, *bounds.rows(), *order, *tables]
            run = compile_alone(attention(block_size), inputs)
            runs[name] = lambda run=run, inputs=inputs: run(*inputs)
    times: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn > 0:  # the first is a warm-up
                times[name].append(1e3 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    dtype_name = str(dtype).removeprefix("torch.")
    return [
        Result(size, dtype_name, *name, repeats, ms, ms / medians["-", "-"], listed[name])
        for name, ms in medians.items()
    ]


def share_listed(
    bounds: SortedBounds, category: HeadCategory, block_size: tuple[int, int], size: int
) -> float:
    listed = runs_of_sorted(bounds, block_size).num_listed()[:, category].sum()
    return float(listed) * block_size[0] * block_size[1] / (size * (size + 1) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[30])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=["32x64", "64x32", "64x64", "128x64", "128x128", "256x256"],
        help="queries x keys",
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    block_sizes = [tuple(map(int, text.split("x"))) for text in arguments.blocks]
    told = conditions()
    table = []
    for name in arguments.dtype:
        for num_images in arguments.images:
            config = Config(num_images, 256, 16)
            results = measure(config, getattr(torch, name), block_sizes, arguments.repeats)
            append_rows(RESULTS, map(asdict, results), told)
            table += [
                [
                    f"{result.tokens:,}",
                    result.dtype,
                    result.heads,
                    result.block_size,
                    f"{result.median_ms:.0f}",
                    f"{result.over_sdpa:.2f}",
                    f"{result.listed:.2f}",
                ]
                for result in results
            ]
    header = ["tokens", "dtype", "heads", "block", "ms", "over SDPA is_causal", "listed, of causal"]
    print_table(header, table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
