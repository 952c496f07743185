"""How evenly an attention call's work is dealt out among many threads of a CPU.

    python bench/threads.py [--threads 2 4 8 16 32] [--tokens 8192] [--shape qwen2.5-vl-7b]

Needs no machine of so many cores: a call is run by as many threads on whatever cores there are, and
the processor time of each thread is read from Linux. The longest is what the call would take on as
many cores; the mean is what it would take were all threads to work alike. That leaves out what
cores share, caches and memory. Heads in the shape of a model, a share of them sparse as in
attention.py. "Heads dealt out" gives threads whole heads, in runs that are as alike as can be;
"rows dealt out" gives each a part of every head, which is how it is done. Variables of the
environment that tell glibc how to keep memory (MALLOC_...) are noted. Appends a row for each
measurement to bench/results/threads.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from attention import SHAPES, head_mix
from common import Config, append_rows, conditions, print_table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from blindsight.attention.attend import attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.lowering import fused_layout, split_layout
from blindsight.attention.mask_forms import sorted_mask
from blindsight.tune import compile_alone

RESULTS = Path(__file__).parent / "results" / "threads.jsonl"
PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
HEADS, ROWS = "heads dealt out", "rows dealt out"


@dataclass(frozen=True)
class Result:
    """Milliseconds of processor time, median of ``n`` calls."""

    shape: str
    dtype: str
    tokens: int
    sparse_heads: float
    threads: int
    form: str
    n: int
    longest_ms: float
    mean_ms: float


def times_of_threads() -> dict[str, int]:
    """The processor time of each thread of this process until now, in ns."""
    return {
        task.name: int((task / "schedstat").read_text().split()[0])
        for task in Path("/proc/self/task").iterdir()
    }


def measure(run: Callable[[], object], num_threads: int, repeats: int) -> tuple[float, float]:
    """The longest of the threads, and the mean of them all, in ms: medians."""
    run()  # compiles, and starts the threads
    longest, mean = [], []
    for _ in range(repeats):
        before = times_of_threads()
        run()
        spent = [(ns - before.get(name, 0)) / 1e6 for name, ns in times_of_threads().items()]
        longest.append(max(spent))
        mean.append(sum(spent) / num_threads)
    return statistics.median(longest), statistics.median(mean)


def forms(
    shape: str, mix: float, config: Config, dtype: torch.dtype, num_threads: int
) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    num_heads, num_key_heads, head_dim = SHAPES[shape]
    size, codes = config.num_tokens, head_mix(num_heads, mix)
    query = torch.randn(1, num_heads, size, head_dim, dtype=dtype)
    key, value = (torch.randn(1, num_key_heads, size, head_dim, dtype=dtype) for _ in range(2))
    template = config.template()

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def sparse(chosen: list[int], how: str) -> Callable[[], object]:
        dealt = num_threads if how == HEADS else 1
        layout = fused_layout([codes[head] for head in chosen], dealt)
        heads = torch.tensor(layout.heads)
        categories = torch.tensor([codes[chosen[at]] for at in layout.heads], dtype=torch.int32)
        of_key = torch.tensor(chosen) * num_key_heads // num_heads
        is_all = len(chosen) == num_heads
        keys = [x if is_all else x[:, of_key] for x in (key, value)]
        inputs = [query[:, chosen], *keys, *template, heads, categories]

        def function(*inputs: Tensor) -> Tensor:
            *qkv, span_id, is_sink, heads, categories = inputs
            sizes = {"batch": 1, "num_queries": size, "num_keys": size}
            threads = 1 if how == HEADS else num_threads
            mask = sorted_mask(CAUSAL, span_id, is_sink, num_threads=threads, **sizes)
            return attend(*qkv, mask, heads, categories, layout.groups)

        run = compile_alone(function, inputs)
        return lambda: run(*inputs)

    every = list(range(num_heads))
    parts = {kind: [head for head in every if bool(codes[head]) == kind] for kind in (False, True)}
    assert split_layout(codes, is_causal=True).groups[0] == ("causal", len(parts[False]))
    dense = [query[:, parts[False]]]
    dense += [x[:, torch.tensor(parts[False]) * num_key_heads // num_heads] for x in (key, value)]
    return {
        "SDPA is_causal, all heads": lambda: causal(query, key, value),
        "SDPA is_causal, dense heads": lambda: causal(*dense),
        **{f"sparse heads, {how}": sparse(parts[True], how) for how in (HEADS, ROWS)},
        **{f"fused, {how}": sparse(every, how) for how in (HEADS, ROWS)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="qwen2.5-vl-7b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sparse", type=float, default=0.75)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in PASSIVE.items()):
        # A thread that waits must not look as if it worked.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PASSIVE})
    told = conditions()
    told["malloc"] = {name: os.environ[name] for name in os.environ if name.startswith("MALLOC_")}
    config = Config(round(options.tokens / 274), 256, 16)
    dtype = getattr(torch, options.dtype)
    rows = []
    with torch.inference_mode(), tqdm(options.threads) as bar:
        for number in bar:
            torch.set_num_threads(number)
            runs = forms(options.shape, options.sparse, config, dtype, number)
            spent: dict[str, float] = {}
            for name, run in runs.items():
                bar.set_postfix_str(f"{number} threads: {name}")
                longest, mean = measure(run, number, options.repeats)
                spent[name] = longest
                result = Result(
                    options.shape,
                    options.dtype,
                    config.num_tokens,
                    options.sparse,
                    number,
                    name,
                    options.repeats,
                    longest,
                    mean,
                )
                append_rows(RESULTS, [asdict(result)], told)
                rows.append(
                    [str(number), name, f"{longest:.4g}", f"{mean:.4g}", f"{longest / mean:.2f}"]
                )
            whole, dense = list(spent.values())[:2]
            for how in (HEADS, ROWS):
                split = dense + spent[f"sparse heads, {how}"]
                fused = spent[f"fused, {how}"]
                rows.append(
                    [
                        str(number),
                        f"faster than is_causal, {how}",
                        f"split {whole / split:.2f}, fused {whole / fused:.2f}",
                        "",
                        "",
                    ]
                )
    print_table(["threads", "", "longest, ms", "mean, ms", "longest / mean"], rows)


if __name__ == "__main__":
    main()
