"""What masks, token order and block tables cost, and how much of the causal area they list.

    python bench/masks.py [--quick] [--skip-time]
    python bench/masks.py --picture bench/results/masks.png

Prints two tables and appends a row for each measurement to bench/results/masks.jsonl.

Density: the share of the causal pairs that the listed blocks hold, and (token level) that the mask
allows. Time: from a template to the tables of all four categories, on this machine's CPU, beside
`torch.nn.attention.flex_attention.create_block_mask` on the same masks.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Config, Spread, append_rows, conditions, print_table
from torch.nn.attention.flex_attention import create_block_mask

from blindsight.attention.block_tables import (
    BlockTables,
    listed_share,
    runs_of_sorted,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.attention.interval_masks import causal_base, keep_intervals
from blindsight.attention.intervals import sorted_bounds
from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.plots import plot_masks
from blindsight.template import Template

RESULTS = Path(__file__).parent / "results" / "masks.jsonl"


@dataclass(frozen=True)
class Density:
    """Shares of the causal pairs, for heads of one category."""

    category: str
    token_level: float
    prompt_order: float
    sorted: float


@dataclass(frozen=True)
class Time:
    """Milliseconds of ``n`` runs after ``warmup`` ones."""

    what: str
    n: int
    warmup: int
    median_ms: float
    p20_ms: float
    p80_ms: float


DENSITY_CONFIGS = [
    Config(16, 64, 8),
    Config(32, 256, 0),
    Config(32, 256, 16),
    Config(16, 256, 50),
    Config(12, 1024, 16),
    Config(8, 1296, 50),
    Config(4, 4096, 16),
]

TIME_CONFIGS = [Config(30, 256, 16), Config(120, 256, 16), Config(1095, 256, 16)]


def measure_density(config: Config) -> Iterator[Density]:
    """Count blocks in both orders, for every category."""
    span_id, is_sink = config.template()
    size = config.num_tokens
    base = causal_base(1, size, size, size)
    keep = keep_intervals(span_id, is_sink, size, size)
    bounds, _ = sorted_bounds(base, span_id, is_sink, size, size)
    num_causal = size * (size + 1) // 2

    def share(tables: BlockTables) -> list[float]:
        return listed_share(tables, num_causal, config.block_size)[0].tolist()

    in_prompt_order = share(tables_of_prompt_order(base, keep, size, config.block_size))
    in_sorted_order = share(tables_of_sorted(bounds, size, config.block_size))
    token_level = (bounds.num_pairs()[0] / num_causal).tolist()
    for category in HeadCategory:
        yield Density(
            category.name,
            round(token_level[category], 4),
            round(in_prompt_order[category], 4),
            round(in_sorted_order[category], 4),
        )


def timed(what: str, run: Callable[[], object], *, n: int, warmup: int) -> Time:
    for _ in range(warmup):
        run()
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return Time(what, n, warmup, *(round(x or 0.0, 3) for x in Spread.of(times)))


def measure_time(config: Config, *, quick: bool) -> Iterator[Time]:
    """Time each step from a template to tables, and torch's own way to the same tables."""
    span_id, is_sink = config.template()
    size = config.num_tokens
    base = causal_base(1, size, size, size)
    keep = keep_intervals(span_id, is_sink, size, size)
    bounds, _ = sorted_bounds(base, span_id, is_sink, size, size)
    n = 50 if size < 100_000 else 10

    def sorted_tables() -> BlockTables:
        bounds, _ = sorted_bounds(base, span_id, is_sink, size, size)
        return tables_of_sorted(bounds, size, config.block_size)

    def prompt_order_tables() -> BlockTables:
        keep = keep_intervals(span_id, is_sink, size, size)
        return tables_of_prompt_order(base, keep, size, config.block_size)

    yield timed("bounds", lambda: sorted_bounds(base, span_id, is_sink, size, size), n=n, warmup=3)
    yield timed("runs of blocks", lambda: runs_of_sorted(bounds, config.block_size), n=n, warmup=3)
    yield timed("bounds and tables, sorted", sorted_tables, n=n, warmup=3)
    if size < 100_000:
        yield timed("bounds and tables, prompt order", prompt_order_tables, n=n, warmup=3)

    if size > 100_000 or (quick and size > 10_000):
        return
    codes = torch.arange(NUM_CATEGORIES)
    # All masks at once would be 4 GB, several times over, from 32,768 tokens on.
    calls = [codes] if size < 10_000 else list(codes.split(1))

    def torch_tables(compiled: bool) -> None:
        for code in calls:
            create_block_mask(
                lambda b, h, q, k, code=code: (
                    (k <= q)
                    & (
                        ((keep.lower[b, code[h], q] <= k) & (k <= keep.upper[b, code[h], q]))
                        | keep.visible[b, code[h], k]
                    )
                ),
                1,
                len(code),
                size,
                size,
                device="cpu",
                BLOCK_SIZE=config.block_size,
                _compile=compiled,
            )

    warnings.filterwarnings("ignore", message="_compile flag", category=DeprecationWarning)
    few = 5 if size < 10_000 else 2
    yield timed("create_block_mask, eager", lambda: torch_tables(False), n=few, warmup=0)
    yield timed("create_block_mask, compiled: the first", lambda: torch_tables(True), n=1, warmup=0)
    yield timed("create_block_mask, compiled", lambda: torch_tables(True), n=few, warmup=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out all that takes minutes")
    parser.add_argument("--skip-time", action="store_true", help="density only")
    parser.add_argument(
        "--threads", type=int, default=1, help="what other work disturbs least is one (default)"
    )
    parser.add_argument("--picture", type=Path, help="draw the masks of a small prompt, no more")
    options = parser.parse_args()
    if options.picture is not None:
        span_id, is_sink = Config(4, 14, 3).template()
        plot_masks(Template(span_id[:, :-56], is_sink[:, :-56]), options.picture)
        return
    torch.set_num_threads(options.threads)
    given = conditions()
    records: list[dict[str, Any]] = []

    rows = []
    for config in DENSITY_CONFIGS:
        densities = {}
        for block_size in (128, 64):
            sized = replace(config, block_size=block_size)
            for density in measure_density(sized):
                densities[density.category, block_size] = density
                records.append({**asdict(sized), **asdict(density), "question": "density"})
        for category in ("DOCUMENT_SINK", "DOCUMENT"):
            coarse, fine = densities[category, 128], densities[category, 64]
            shares = (
                coarse.token_level,
                coarse.prompt_order,
                coarse.sorted,
                fine.prompt_order,
                fine.sorted,
            )
            rows.append(
                [
                    config.name,
                    f"{config.num_tokens:,}",
                    category,
                    *(f"{share:.2f}" for share in shares),
                ]
            )
    print("Share of the causal area that is listed\n")
    print_table(
        [
            "images x tokens + text",
            "tokens",
            "category",
            "token level",
            "block 128, prompt order",
            "block 128, sorted",
            "block 64, prompt order",
            "block 64, sorted",
        ],
        rows,
    )

    if not options.skip_time:
        rows = []
        for config in TIME_CONFIGS[: 2 if options.quick else None]:
            for result in measure_time(config, quick=options.quick):
                records.append(
                    {
                        **asdict(config),
                        "num_tokens": config.num_tokens,
                        **asdict(result),
                        "question": "time",
                    }
                )
                rows.append(
                    [
                        f"{config.num_tokens:,}",
                        result.what,
                        f"{result.median_ms:,.2f}",
                        f"{result.p20_ms:,.2f} - {result.p80_ms:,.2f}",
                        str(result.n),
                    ]
                )
        print(f"Time for all four categories, ms, block 128, CPU, {options.threads} thread(s)\n")
        print_table(["tokens", "what", "median", "p20 - p80", "n"], rows)

    append_rows(RESULTS, records, given)


if __name__ == "__main__":
    main()
