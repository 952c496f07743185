"""Prefill of a whole decoder: eager, plain torch.compile, and with a profile.

    python bench/prefill.py [--device cuda] [--dtype bfloat16] [--tokens 512 4096 16384] [...]

A Qwen2.5-VL decoder with random weights, of a real model's widths, fewer layers on a CPU; prompts
of 256-token images with 16 text tokens between, given as embeddings. Times are of whole forwards:
MLPs, projections, masks, block tables. All in turn, A B C A B C, medians; the first call of each,
which compiles, is told apart. Appends a row for each measurement to bench/results/prefill.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import head_mix
from common import Config, conditions, print_table
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from blindsight import Profile, TemplateRule, blindsight_backend, use_template

RESULTS = Path(__file__).parent / "results" / "prefill.jsonl"
SHAPES = {  # hidden, intermediate, heads, key heads, layers
    "qwen2.5-vl-3b": (2048, 11008, 16, 2, 36),
    "qwen2.5-vl-7b": (3584, 18944, 28, 4, 28),
}


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
    median_ms: float
    p20_ms: float
    p80_ms: float
    first_s: float
    ran: str


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
    module: Callable[..., object], inputs: dict[str, Any], template: list[torch.Tensor]
) -> object:
    with use_template(*template):
        return module(**inputs, use_cache=False)


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
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    num_layers = arguments.layers or (
        1 if arguments.device == "cpu" else SHAPES[arguments.shape][4]
    )
    told = {**conditions(), "device": arguments.device}
    if arguments.device != "cpu":
        told["gpu"] = torch.cuda.get_device_name()
    RESULTS.parent.mkdir(exist_ok=True)

    model = decoder(arguments.shape, num_layers, dtype, arguments.device)
    rule = TemplateRule(image_token_ids=(1,))
    codes = [head_mix(SHAPES[arguments.shape][2], arguments.sparse)] * num_layers
    profile = Profile.for_model(model, codes, rule=rule)

    def wait() -> None:
        if arguments.device != "cpu":
            torch.accelerator.synchronize()

    table: list[list[str]] = []
    with tqdm(arguments.tokens) as bar:
        for size in bar:
            torch._dynamo.reset()
            config = prompt_of(size)
            length = config.num_tokens
            inputs, template = inputs_of(model, config)

            runs = (
                {} if arguments.no_eager else {"eager": partial(forward, model, inputs, template)}
            )
            runs["torch.compile"] = partial(
                forward, torch.compile(model, dynamic=False), inputs, template
            )
            backends = {}
            for lowering in arguments.lowering:
                backend = backends[lowering] = blindsight_backend(profile, lowering=lowering)
                compiled = torch.compile(model, backend=backend, dynamic=False)
                runs[lowering] = partial(forward, compiled, inputs, template)
            first = {}
            for name, run in runs.items():
                bar.set_postfix_str(f"{length:,} tokens: compiling {name}")
                begin = time.perf_counter()
                run()
                wait()
                first[name] = time.perf_counter() - begin
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(arguments.repeats):
                for name, run in runs.items():
                    bar.set_postfix_str(f"{length:,} tokens: turn {turn + 1}, {name}")
                    wait()
                    begin = time.perf_counter()
                    run()
                    wait()
                    times[name].append(1e3 * (time.perf_counter() - begin))
            plain = statistics.median(times["torch.compile"])
            with RESULTS.open("a") as file:
                for name, values in times.items():
                    ran = ""
                    if name in backends:
                        rows = backends[name].report().rows
                        ran = ", ".join(sorted({how for row in rows for how in row.runs}))
                    result = Result(
                        arguments.shape,
                        num_layers,
                        arguments.dtype,
                        length,
                        arguments.sparse,
                        name,
                        len(values),
                        statistics.median(values),
                        sorted(values)[int(0.2 * len(values))],
                        sorted(values)[int(0.8 * len(values))],
                        first[name],
                        ran,
                    )
                    file.write(json.dumps({**told, **asdict(result)}) + "\n")
                    ratio = f"{plain / result.median_ms:.2f}"
                    row = [f"{length:,}", name, f"{result.median_ms:.4g}", ratio]
                    table.append([*row, f"{result.first_s:.1f}", ran])
    print(f"{arguments.shape}, {num_layers} layers, {arguments.dtype}, {arguments.device}")
    print_table(["tokens", "form", "ms", "x torch.compile", "first call s", "ran"], table)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
