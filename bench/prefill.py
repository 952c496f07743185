"""Prefill of a whole decoder: eager, plain torch.compile, and with a profile.

    python bench/prefill.py [--device cuda] [--dtype bfloat16] [--tokens 512 4096 16384] [...]
    python bench/prefill.py --device cuda --dtype bfloat16 --shape qwen2.5-vl-7b --any-length \
        --tokens 4096 16384 36864 --lowering auto split fused

A Qwen2.5-VL decoder with random weights, of a real model's widths, fewer layers on a CPU; prompts
of 256-token images with 16 text tokens between, given as embeddings. Times are of whole forwards:
MLPs, projections, masks, block tables. "torch.compile, is_causal" is given no mask at all, which is
as fast as dense heads get. All in turn, A B C A B C, medians; the first call of each, which
compiles, is told apart. With ``--any-length`` everything is compiled for any length, once. A prompt
that does not fit in memory is a row, too. Appends a row for each measurement to
bench/results/prefill.jsonl.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import head_mix
from common import (
    Config,
    Spread,
    alone_on_device,
    append_rows,
    conditions,
    print_kernels,
    print_table,
)
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from blindsight import Profile, TemplateRule, blindsight_backend, use_template
from blindsight.ranks import local_device
from blindsight.timer import Timer

RESULTS = Path(__file__).parent / "results" / "prefill.jsonl"
SHAPES = {  # hidden, intermediate, heads, key heads, layers
    "qwen2.5-vl-3b": (2048, 11008, 16, 2, 36),
    "qwen2.5-vl-7b": (3584, 18944, 28, 4, 28),
}

IS_CAUSAL = "torch.compile, is_causal"
NO_MASK = {"attention_mask": {"full_attention": None}}


@dataclass(frozen=True)
class Result:
    """Milliseconds of ``n`` forwards; the first call's seconds, compiling included."""

    shape: str
    num_layers: int
    dtype: str
    tokens: int
    sparse_heads: float
    form: str
    n: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    first_s: float
    ran: str
    any_length: bool = False
    peak_mib: float | None = None
    problem: str = ""


@dataclass
class Case:
    """A prompt in every form, and how its first calls went."""

    length: int
    backends: dict[str, Any]
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    peaks_mib: dict[str, float] = field(default_factory=dict)
    ran: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, run: Callable[[], object], timer: Timer) -> None:
        """Call a form for the first time, which compiles it."""
        before = self._counts(name)
        if timer.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            self.first_s[name] = timer.seconds(run)
            self.runs[name] = run
        except torch.OutOfMemoryError as error:
            self.first_s[name] = 0.0
            self.problems[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if timer.on_gpu:
            self.peaks_mib[name] = torch.cuda.max_memory_allocated() / 2**20
        self.ran[name] = ", ".join(sorted(set(self._counts(name) - before)))

    def _counts(self, name: str) -> Counter[str]:
        """How often attention ran in which way."""
        backend = self.backends.get(name)
        rows = [] if backend is None else backend.report().rows
        return sum((Counter(row.runs) for row in rows), Counter())


def decoder(shape: str, num_layers: int, dtype: torch.dtype, device: str) -> nn.Module:
    hidden, intermediate, heads, key_heads, _ = SHAPES[shape]
    config = Qwen2_5_VLTextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_hidden_layers=num_layers,
        vocab_size=1000,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24]},
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2_5_VLTextModel(config).to(dtype).eval()


def prompt_of(size: int) -> Config:
    """Images of 256 tokens, or four smaller ones, and about so many tokens in all."""
    if size < 1024:
        return Config(4, (size - 64) // 4 - 18, 16)
    return Config(max(2, round((size - 64) / 274)), 256, 16)


def inputs_of(model: nn.Module, config: Config) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Return what a decoder is called with, and the template."""
    like, length = next(model.parameters()), config.num_tokens
    inputs = {
        "inputs_embeds": torch.randn(
            1, length, model.config.hidden_size, dtype=like.dtype, device=like.device
        ),
        "attention_mask": torch.ones(1, length, dtype=torch.long, device=like.device),
        "position_ids": torch.arange(length, device=like.device).expand(3, 1, -1),
    }
    return inputs, [x.to(like.device) for x in config.template()]


def forward(
    module: Callable[..., object],
    inputs: dict[str, Any],
    template: list[torch.Tensor],
    **more: Any,
) -> object:
    with use_template(*template):
        return module(**{**inputs, **more}, use_cache=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="qwen2.5-vl-3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="default: 1 on a CPU, else all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--sparse", type=float, default=0.75, help="share of sparse heads")
    parser.add_argument("--lowering", nargs="+", default=["auto"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="print what a GPU spends time in")
    parser.add_argument("--any-length", action="store_true", help="compiled for any length")
    parser.add_argument(
        "--longest-mask", type=int, default=10**6, help="tokens; no masks are materialised beyond"
    )
    arguments = parser.parse_args()
    arguments.device = local_device(arguments.device)
    dtype = getattr(torch, arguments.dtype)
    num_layers = arguments.layers or (
        1 if arguments.device == "cpu" else SHAPES[arguments.shape][4]
    )
    told = conditions(arguments.device)

    model = decoder(arguments.shape, num_layers, dtype, arguments.device)
    rule = TemplateRule(image_token_ids=(1,))
    num_heads = SHAPES[arguments.shape][2]
    codes = [head_mix(num_heads, arguments.sparse)] * num_layers
    profile = Profile.for_model(model, codes, rule=rule)
    timer = Timer(arguments.device)
    dynamic = arguments.any_length
    torch._dynamo.config.recompile_limit = 64  # forms and lengths share the model's frames

    def compiled_forms() -> tuple[dict[str, Any], dict[str, Any]]:
        """Return models by the name of their form, and the backends of those that have one."""
        models: dict[str, Any] = {} if arguments.no_eager else {"eager": model}
        models["torch.compile"] = torch.compile(model, dynamic=dynamic)
        models[IS_CAUSAL] = models["torch.compile"]
        backends = {}
        for lowering in arguments.lowering:
            backend = backends[lowering] = blindsight_backend(profile, lowering=lowering)
            models[lowering] = torch.compile(model, backend=backend, dynamic=dynamic)
        return models, backends

    cases: list[Case] = []
    models, backends = compiled_forms()
    with tqdm(arguments.tokens) as bar:
        for at, size in enumerate(bar):
            if not arguments.any_length and at:
                models, backends = compiled_forms()
            config = prompt_of(size)
            inputs, template = inputs_of(model, config)
            case = Case(config.num_tokens, backends)
            for name, module in models.items():
                if size > arguments.longest_mask and name in ("eager", "torch.compile"):
                    continue
                bar.set_postfix_str(f"{case.length:,} tokens: compiling {name}")
                more = NO_MASK if name == IS_CAUSAL else {}
                case.add(name, partial(forward, module, inputs, template, **more), timer)
            cases.append(case)
    table: list[list[str]] = []
    with alone_on_device(), tqdm(cases) as bar:
        for case in bar:
            times: dict[str, list[float]] = {name: [] for name in case.first_s}
            for turn in range(arguments.repeats):
                for name, run in case.runs.items():
                    bar.set_postfix_str(f"{case.length:,} tokens: turn {turn + 1}, {name}")
                    times[name].append(1e3 * timer.seconds(run))
            results = [
                Result(
                    arguments.shape,
                    num_layers,
                    arguments.dtype,
                    case.length,
                    arguments.sparse,
                    name,
                    len(values),
                    *Spread.of(values),
                    case.first_s[name],
                    case.ran.get(name, ""),
                    arguments.any_length,
                    case.peaks_mib.get(name),
                    case.problems.get(name, ""),
                )
                for name, values in times.items()
            ]
            append_rows(RESULTS, map(asdict, results), told)
            table += rows_of_table(results)
            if arguments.kernels:
                for name in (IS_CAUSAL, *backends):
                    if name in case.runs:
                        print_kernels(f"{case.length:,} tokens, {name}", case.runs[name])
    print(f"{arguments.shape}, {num_layers} layers, {arguments.dtype}, {arguments.device}")
    header = ["tokens", "form", "ms", "x torch.compile", "x is_causal", "first call s"]
    print_table([*header, "peak, MiB", "ran"], table)


def rows_of_table(results: list[Result]) -> list[list[str]]:
    medians = {result.form: result.median_ms for result in results}

    def ratio(over: str, ms: float | None) -> str:
        dense = medians.get(over)
        return f"{dense / ms:.2f}" if ms and dense else "-"

    return [
        [
            f"{result.tokens:,}",
            result.form,
            f"{result.median_ms:.4g}" if result.median_ms else result.problem,
            ratio("torch.compile", result.median_ms),
            ratio(IS_CAUSAL, result.median_ms),
            f"{result.first_s:.1f}",
            f"{result.peak_mib:,.0f}" if result.peak_mib else "-",
            result.ran,
        ]
        for result in results
    ]


if __name__ == "__main__":
    with torch.inference_mode():
        main()
