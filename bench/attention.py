"""One attention call: every dense baseline, and sparse heads fused and split.

    python bench/attention.py [--device cuda] [--dtype bfloat16] [--tokens 8192 16384] [...]
    python bench/attention.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b \
        --tokens 4096 16384 36864 102400 307200 --image-tokens 256 1296 \
        --kernel-options '{"USE_TMA": true}' '{"BLOCK_M": 128, "BLOCK_N": 128, "num_stages": 2}'

Prompts of images with 16 text tokens between; heads in the shape of a model; so many of them
sparse, a third each SINK, DOCUMENT and DOCUMENT_SINK. Times include masks, block tables and the
moving of tokens and heads. "split, heads in order" is split as it would be if the heads of a model
had been ordered by category once: nothing is chosen or put back. All in turn, A B C A B C, medians.
The error is the largest difference of a few rows of each head from float64, by the definitions. The
limit is what the listed blocks would take at the speed of FlexAttention's own dense causal call. A
baseline that does not fit in memory is a row, too. Appends a row for each measurement to
bench/results/attention.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import (
    Config,
    Spread,
    alone_on_device,
    append_rows,
    conditions,
    print_kernels,
    print_table,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from blindsight.attention import flex, mask_forms
from blindsight.attention.attend import _masked, attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.block_tables import block_size_of, runs_of_sorted
from blindsight.attention.chunks import num_chunks_of
from blindsight.attention.interval_masks import causal_base
from blindsight.attention.intervals import sorted_bounds
from blindsight.attention.lowering import Layout, fused_layout, split_layout
from blindsight.attention.mask_forms import SortedMask, sorted_mask
from blindsight.categories import HeadCategory
from blindsight.ranks import local_device
from blindsight.runtime.choose import MAX_TABLE_BYTES
from blindsight.timer import Timer
from blindsight.tune import compile_alone

RESULTS = Path(__file__).parent / "results" / "attention.jsonl"
IN_ORDER = "split, heads in order"
KERNELS_OF = 0.75  # share of sparse heads
LARGEST_ERROR = 1e-2  # several times what half precision rounds off: what is wrong is not timed
DENSE_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
SHAPES = {  # query heads, key heads, head dim
    "8 heads": (8, 2, 128),
    "qwen2.5-vl-3b": (16, 2, 128),
    "qwen2.5-vl-7b": (28, 4, 128),
    "qwen2-vl-2b": (12, 2, 128),
    "gemma-3-12b": (16, 8, 256),
    "internvl3-1b": (14, 2, 64),
}


@dataclass(frozen=True)
class Result:
    """Milliseconds of ``n`` calls; compile time in seconds, memory beside the inputs in MiB."""

    shape: str
    dtype: str
    tokens: int
    image_tokens: int
    sparse_heads: float
    form: str
    n: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    compile_s: float
    peak_mib: float | None
    limit_ms: float | None = None
    error: float | None = None
    problem: str = ""


def head_mix(num_heads: int, sparse: float) -> list[int]:
    """Categories of heads: so many sparse, a third of each kind, all mixed up."""
    num_sparse = round(num_heads * sparse)
    kinds = [HeadCategory.SINK, HeadCategory.DOCUMENT, HeadCategory.DOCUMENT_SINK]
    codes = [0] * (num_heads - num_sparse) + [int(kinds[at % 3]) for at in range(num_sparse)]
    generator = torch.Generator().manual_seed(0)
    return [codes[at] for at in torch.randperm(num_heads, generator=generator).tolist()]


class Bench:
    def __init__(self, config: Config, shape: str, dtype: torch.dtype, device: str) -> None:
        self.config, self.shape, self.dtype, self.device = config, shape, dtype, device
        self.num_heads, self.num_key_heads, head_dim = SHAPES[shape]
        self.num_threads = torch.get_num_threads() if device == "cpu" else 1
        self._programs: dict[object, Callable[..., object]] = {}
        size = config.num_tokens
        generator = torch.Generator(device).manual_seed(0)

        def random(heads: int) -> Tensor:
            return torch.randn(
                1, heads, size, head_dim, dtype=dtype, device=device, generator=generator
            )

        self.dense = [random(self.num_heads), random(self.num_key_heads)]
        self.dense.append(random(self.num_key_heads))
        self.template = [x.to(device) for x in config.template()]
        base = causal_base(1, size, size, size)
        bounds, _ = sorted_bounds(base, *config.template(), size, size)
        block_size = block_size_of(torch.device(device))
        self.listed = runs_of_sorted(bounds, block_size).num_listed().sum((0, 2)).tolist()
        blocks = -(-size // block_size)
        self.causal_blocks = blocks * (blocks + 1) / 2

    def runs(
        self, mixes: Sequence[float], options: Sequence[str], *, baselines: bool
    ) -> dict[tuple[float, str], Any]:
        """What to time, by share of sparse heads and name: a function that prepares a call."""
        found: dict[tuple[float, str], Any] = {}
        if baselines:
            found[0.0, "SDPA is_causal"] = lambda: self._call(_causal)
            if self.device != "cpu":
                for backend in DENSE_KERNELS:
                    name = f"SDPA is_causal, {backend.name.lower()}"
                    found[0.0, name] = lambda backend=backend: self._call(_with(backend))
            found[0.0, "SDPA boolean mask"] = self._masked
            found[0.0, "flex, dense causal"] = lambda: self._flex([0] * self.num_heads)
            found[0.0, "flex, create_block_mask"] = self._block_mask
        for mix in mixes:
            codes = head_mix(self.num_heads, mix)
            fused = fused_layout(codes)
            split = self.split(mix)
            for name, layout in (("fused", fused), ("split", split)):
                found[mix, name] = lambda codes=codes, layout=layout: self._flex(codes, layout)
                for text in options:
                    found[mix, f"{name}, {text}"] = lambda codes=codes, layout=layout, text=text: (
                        self._flex(codes, layout, json.loads(text))
                    )
            found[mix, IN_ORDER] = lambda mix=mix: self._in_order(mix)
        return found

    def split(self, mix: float) -> Layout:
        """How split deals out the heads of a mix."""
        codes = head_mix(self.num_heads, mix)
        num_blocks = -(-self.config.num_tokens // block_size_of(torch.device(self.device)))
        tables = 2 * 4 * (self.num_heads - codes.count(0)) * num_blocks**2
        is_large = tables > MAX_TABLE_BYTES
        return split_layout(codes, is_causal=True, per_category=is_large)

    def limit(self, mix: float, dense_ms: float) -> float:
        """The dense call's time, for the listed blocks alone."""
        codes = head_mix(self.num_heads, mix)
        listed = sum(self.listed[code] for code in codes)
        return dense_ms * listed / (self.num_heads * self.causal_blocks)

    def _call(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: function(*self.dense)

    def _masked(self) -> Callable[[], object]:
        size, groups = self.config.num_tokens, self.num_heads // self.num_key_heads
        query, *key_value = self.dense
        key, value = (x.repeat_interleave(groups, dim=1) for x in key_value)
        allowed = torch.ones(size, size, dtype=torch.bool, device=self.device).tril_()[None, None]
        return lambda: scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    def error(self, mix: float, output: Tensor, num_rows: int = 16) -> float:
        """The largest difference of some rows of each head from what the categories mean."""
        span_id, is_sink = (x[0] for x in self.template)
        column = torch.arange(self.config.num_tokens, device=self.device)
        row = column[-1] - (column[-1] * torch.arange(num_rows, device=self.device)) // num_rows
        mine, itself = span_id[row][:, None], row[:, None] == column
        free = (mine <= 1) | (span_id == 0) | itself
        own = mine == span_id
        keep = {
            HeadCategory.DENSE: free | True,
            HeadCategory.SINK: free | is_sink,
            HeadCategory.DOCUMENT: free | own,
            HeadCategory.DOCUMENT_SINK: free | own | is_sink,
        }
        query, key, value = self.dense
        worst = 0.0
        for head, code in enumerate(head_mix(self.num_heads, mix)):
            of_key = head * self.num_key_heads // self.num_heads
            keys, values = (x[0, of_key].double() for x in (key, value))
            scores = query[0, head, row].double() @ keys.T * keys.shape[1] ** -0.5
            allowed = keep[HeadCategory(code)] & (column <= row[:, None])
            expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values
            worst = max(worst, (output[0, head, row] - expected).abs().max().item())
        return worst

    def _mask(self, span_id: Tensor, is_sink: Tensor) -> SortedMask:
        size = self.config.num_tokens
        sizes = {"batch": 1, "num_queries": size, "num_keys": size}
        return sorted_mask(CAUSAL, span_id, is_sink, num_threads=self.num_threads, **sizes)

    def _flex(
        self,
        codes: list[int],
        layout: Layout | None = None,
        options: dict[str, Any] | None = None,
    ) -> Callable[[], object]:
        layout = layout or fused_layout(codes)

        def function(*inputs: Tensor) -> Tensor:
            *qkv, span_id, is_sink, heads, categories = inputs
            mask = self._mask(span_id, is_sink)
            return attend(*qkv, mask, heads, categories, layout.groups)

        heads = torch.tensor(layout.heads)
        categories = torch.tensor(codes, dtype=torch.int32)[heads]
        rows = [x.to(self.device) for x in (heads, categories)]
        inputs = [*self.dense, *self.template, *rows]
        usual = flex.kernel_options_of
        options = dict(options or {})
        chunks = options.pop("num_chunks", None)

        def options_of(query: Tensor) -> dict[str, Any]:
            return {**usual(query), **options}

        def chunks_of(*args: Any) -> int:
            return num_chunks_of(*args) if chunks is None else chunks

        # Mixes differ in what a program is given, and share it.
        key = layout.groups, chunks, json.dumps(options)
        if key not in self._programs:
            with (
                mock.patch.object(flex, "kernel_options_of", options_of),
                mock.patch.object(mask_forms, "num_chunks_of", chunks_of),
            ):
                self._programs[key] = compile_alone(function, inputs)
        run = self._programs[key]
        return lambda: run(*inputs)

    def _in_order(self, mix: float) -> Callable[[], object]:
        """Split over heads that come in the order of its groups, keys and values, too."""
        codes, layout = head_mix(self.num_heads, mix), self.split(mix)
        per_key_head = self.num_heads // self.num_key_heads

        def function(*inputs: Tensor) -> Tensor:
            *qkv, span_id, is_sink, heads, categories = inputs
            mask = self._mask(span_id, is_sink)
            outputs, begin = [], 0
            for kind, number in layout.groups:
                of_group = [x[:, begin : begin + number] for x in qkv]
                its_heads, its_codes = (x[begin : begin + number] for x in (heads, categories))
                begin += number
                if kind == "causal":
                    outputs.append(scaled_dot_product_attention(*of_group, is_causal=True))
                else:
                    outputs.append(
                        _masked(*of_group, mask, its_heads, its_codes, its_codes, scale=None)
                    )
            return torch.cat(outputs, dim=1)

        order = torch.tensor(layout.heads)
        query, *keys_values = self.dense
        on_device = order.to(self.device)
        qkv = [query[:, on_device], *(x[:, on_device // per_key_head] for x in keys_values)]
        categories = torch.tensor(codes, dtype=torch.int32)[order].to(self.device)
        inputs = [*qkv, *self.template, on_device, categories]
        run = compile_alone(function, inputs)
        return lambda: run(*inputs)

    def _block_mask(self) -> Callable[[], object]:
        """What a user of FlexAttention would write for DOCUMENT_SINK heads, prompt order."""
        span_id, is_sink = self.template
        size = self.config.num_tokens

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            mine, other = span_id[b, q], span_id[b, k]
            keep = (mine <= 1) | (other == 0) | (mine == other) | is_sink[b, k]
            return (k <= q) & keep

        compiled = torch.compile(flex_attention, dynamic=False)
        make = torch.compile(create_block_mask, dynamic=False)

        def run() -> object:
            block_mask = make(allowed, 1, None, size, size, device=self.device)
            return compiled(*self.dense, block_mask=block_mask, enable_gqa=True)

        run()  # compiles
        return run


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _with(backend: SDPBackend) -> Callable[..., Tensor]:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    return run


@dataclass
class Form:
    """A form that is compiled, or why it is not; ``make`` does."""

    make: Callable[[], Callable[[], object]]
    run: Callable[[], object] | None = None
    seconds: float = 0.0
    problem: str = ""
    peak_mib: float | None = None
    error: float | None = None

    def compile(self, timer: Timer) -> None:
        def make() -> None:
            self.run = self.make()

        self.attempt(lambda: timer.seconds(make))

    def attempt(self, what: Callable[[], float]) -> None:
        """Do something that takes seconds; a problem is part of the row."""
        try:
            self.seconds += what()
        except Exception as error:
            self.run = None
            self.problem = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            gc.collect()


Forms = dict[tuple[float, str], Form]


def compile_forms(forms: Forms, timer: Timer, bar: Any) -> None:
    """Compile what is to be compiled; a mask of all pairs is made when it is timed."""
    for (_, name), form in forms.items():
        bar.set_postfix_str(f"compiling {name}")
        if not name.startswith("SDPA"):
            form.compile(timer)


def measure(bench: Bench, forms: Forms, *, repeats: int, bar: Any) -> list[Result]:
    """Run all once, then time them in turn."""
    timer = Timer(bench.device)
    timed: dict[tuple[float, str], Callable[[], float]] = {}
    for key, form in forms.items():
        bar.set_postfix_str(f"{bench.config.num_tokens:,} tokens: first {key[1]}")
        before = torch.cuda.memory_allocated() if timer.on_gpu else 0
        if timer.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if form.run is None and not form.problem:
            form.compile(timer)

        def first(key: Any = key, form: Form = form, before: int = before) -> float:
            assert form.run is not None
            made: list[Any] = []
            seconds = timer.seconds(lambda: made.append(form.run()))  # type: ignore[misc]
            if timer.on_gpu:
                form.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            if not key[1].startswith("flex, create"):
                output = made[0] if isinstance(made[0], Tensor) else made[0][0]
                if key[1] == IN_ORDER:
                    output = output[:, torch.tensor(bench.split(key[0]).heads).argsort()]
                form.error = bench.error(key[0], output)
                if form.error > LARGEST_ERROR:
                    raise ValueError(f"wrong by {form.error:.3g}")
            made.clear()
            timed[key] = timer.prepare(form.run)
            return seconds

        if form.run is not None:
            form.attempt(first)
    times: dict[tuple[float, str], list[float]] = {key: [] for key in forms}
    for turn in range(repeats):
        for key, milliseconds in timed.items():
            bar.set_postfix_str(f"{bench.config.num_tokens:,} tokens: turn {turn + 1}, {key[1]}")
            times[key].append(milliseconds())
    dense = times.get((0.0, "flex, dense causal"))
    results = []
    for (mix, name), values in times.items():
        form = forms[mix, name]
        limit = bench.limit(mix, statistics.median(dense)) if mix and dense else None
        results.append(
            Result(
                bench.shape,
                str(bench.dtype).removeprefix("torch."),
                bench.config.num_tokens,
                bench.config.image_tokens,
                mix,
                name,
                len(values),
                *Spread.of(values),
                form.seconds,
                form.peak_mib,
                limit,
                form.error,
                form.problem,
            )
        )
    return results


def rows_of_table(results: Sequence[Result]) -> list[list[str]]:
    baseline = {result.form: result.median_ms for result in results if not result.sparse_heads}
    causal = min(
        (ms for form, ms in baseline.items() if form.startswith("SDPA is_causal") and ms),
        default=None,
    )

    def ratio(ms: float | None, over: float | None) -> str:
        return f"{over / ms:.2f}" if ms and over else "-"

    return [
        [
            f"{result.tokens:,}",
            f"{result.image_tokens:,}",
            f"{result.sparse_heads:.0%}" if result.sparse_heads else "-",
            result.form,
            f"{result.median_ms:.4g}" if result.median_ms else result.problem,
            ratio(result.median_ms, causal),
            ratio(result.median_ms, baseline.get("SDPA boolean mask")),
            ratio(result.median_ms, result.limit_ms),
            "-" if result.error is None else f"{result.error:.1e}",
        ]
        for result in results
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shape", default="8 heads", choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--sparse", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="print what a GPU spends time in")
    parser.add_argument("--forms", metavar="REGEX", default="", help="only those; default: all")
    parser.add_argument(
        "--kernel-options",
        nargs="+",
        default=[],
        metavar="JSON",
        help="of FlexAttention, to sweep; num_chunks is ours (blindsight/attention/chunks.py)",
    )
    arguments = parser.parse_args()
    arguments.device = local_device(arguments.device)
    told = conditions(arguments.device)
    timer = Timer(arguments.device)
    cases: list[tuple[Bench, Forms]] = []
    with tqdm([(n, m) for n in arguments.tokens for m in arguments.image_tokens]) as bar:
        for size, image in bar:
            config = Config(max(2, round((size - 64) / (image + 18))), image, 16)
            bench = Bench(
                config, arguments.shape, getattr(torch, arguments.dtype), arguments.device
            )
            runs = bench.runs(
                arguments.sparse, arguments.kernel_options, baselines=not arguments.no_baselines
            )
            forms = {
                key: Form(make) for key, make in runs.items() if re.match(arguments.forms, key[1])
            }
            compile_forms(forms, timer, bar)
            cases.append((bench, forms))
    table: list[list[str]] = []
    with alone_on_device(), tqdm(cases) as bar:
        for bench, forms in bar:
            results = measure(bench, forms, repeats=arguments.repeats, bar=bar)
            append_rows(RESULTS, map(asdict, results), told)
            table += rows_of_table(results)
            if arguments.kernels:
                for (mix, name), form in forms.items():
                    if mix == KERNELS_OF and form.run is not None:
                        print_kernels(f"{bench.config.name}, {mix:.0%}, {name}", form.run)
            forms.clear()
    print(f"{arguments.shape}, {arguments.dtype}, {arguments.device}; x: times faster than")
    header = ["tokens", "image", "sparse heads", "form", "ms", "x SDPA is_causal"]
    print_table([*header, "x SDPA boolean mask", "share of the limit", "error"], table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
