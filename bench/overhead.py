"""What sparse attention costs besides attention: masks, moves, compiling, and compiling again.

    python bench/overhead.py [--device cuda] [--dtype bfloat16] [--tokens 4096 16384]
                             [--parts work compile recompile turns]

work: bounds and block tables of four categories and choosing how to compute (both once per prompt),
moving tokens into their order and back (once per layer), and one decoder layer, beside each other.
compile: the first call of a plain torch.compile and of each lowering, less a later call; Inductor's
caches are off.
recompile: 30 prompts of random lengths and numbers of images; which of them compile attention
again, and how long they take.
turns: the same of 30 conversations, the last third of the images in a second turn on a cache.

A Qwen2.5-VL decoder of a real model's widths and random weights. Appends a row for each measurement
to bench/results/overhead.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import head_mix
from common import Config, alone_on_device, append_rows, conditions, print_table
from prefill import SHAPES, decoder, forward, inputs_of, prompt_of
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import DynamicCache

from blindsight import Profile, TemplateRule, blindsight_backend, use_template
from blindsight.attention.attend import _take_tokens
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.lowering import Lowering
from blindsight.attention.mask_forms import sorted_mask
from blindsight.ranks import local_device
from blindsight.runtime.choose import ChoosableCall, Device, best_mask_form, choose_layouts
from blindsight.runtime.cost_model import CallSize
from blindsight.runtime.history import ExplicitHistory
from blindsight.runtime.inner import Inner
from blindsight.template import Template
from blindsight.timer import Timer

RESULTS = Path(__file__).parent / "results" / "overhead.jsonl"
HEAD_DIM = 128


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device: str = arguments.device
        self.shape: str = arguments.shape
        self.dtype: torch.dtype = getattr(torch, arguments.dtype)
        self.num_layers: int = arguments.layers
        self.repeats: int = arguments.repeats
        self.timer = Timer(self.device)
        self.model = decoder(self.shape, self.num_layers, self.dtype, self.device)
        codes = [head_mix(SHAPES[self.shape][2], 0.75)] * self.num_layers
        self.profile = Profile.for_model(self.model, codes, rule=TemplateRule(image_token_ids=(1,)))

    def seconds(self, run: Callable[[], object]) -> float:
        return self.timer.seconds(run)

    def medians(self, runs: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Return median seconds, called in turn; they ran before."""
        timed = {name: self.timer.prepare(run) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, milliseconds in timed.items():
                times[name].append(milliseconds() / 1e3)
        return {name: statistics.median(values) for name, values in times.items()}


def measure_work(bench: Bench, sizes: Sequence[int]) -> list[dict[str, Any]]:
    prompts: list[tuple[int, dict[str, Callable[[], object]]]] = []
    heads, key_heads = SHAPES[bench.shape][2:4]
    torch._dynamo.config.recompile_limit = 64
    for size in tqdm(sizes, desc="work"):
        config = prompt_of(size)
        length = config.num_tokens
        inputs, template = inputs_of(bench.model, config)

        def masks(span_id: Tensor, is_sink: Tensor, length: int = length) -> Any:
            mask = sorted_mask(
                CAUSAL, span_id, is_sink, batch=1, num_queries=length, num_keys=length
            )
            return (*mask.order, mask.lower, mask.upper, *mask.tables)

        order = masks(*template)[:3]
        query, key, value = (
            torch.randn(1, number, length, HEAD_DIM, dtype=bench.dtype, device=bench.device)
            for number in (heads, key_heads, key_heads)
        )

        def moves(query: Tensor, key: Tensor, value: Tensor, *order: Tensor) -> Any:
            moved = _take_tokens(query, order[0])
            return (
                _take_tokens(moved, order[2]),
                moved,
                *(_take_tokens(x, order[1]) for x in (key, value)),
            )

        backend = blindsight_backend(bench.profile, lowering="fused")
        compiled = torch.compile(bench.model, backend=backend, dynamic=False)
        runs: dict[str, Callable[[], object]] = {
            "masks": partial(torch.compile(masks, dynamic=False), *template),
            "moves": partial(torch.compile(moves, dynamic=False), query, key, value, *order),
            "prefill": partial(forward, compiled, inputs, template),
            "choosing": partial(choose_alone, bench, config),
        }
        for run in runs.values():
            run()
        prompts.append((length, runs))
    found = []
    with alone_on_device():
        for length, runs in prompts:
            choosing = [bench.seconds(runs["choosing"]) for _ in range(bench.repeats)]
            medians = bench.medians({n: run for n, run in runs.items() if n != "choosing"})
            medians["choosing"] = statistics.median(choosing)
            once = medians["masks"] + medians["choosing"]
            layer = (medians["prefill"] - once) / bench.num_layers
            whole = once + SHAPES[bench.shape][4] * layer
            found.append(
                {
                    "part": "work",
                    "tokens": length,
                    **{f"{name}_ms": 1e3 * taken for name, taken in medians.items()},
                    "once_of_a_whole_prefill": once / whole,
                    "moves_of_a_layer": medians["moves"] / layer,
                }
            )
    return found


def choose_alone(bench: Bench, config: Config) -> None:
    """What is found out of a prompt on the host, before it runs."""
    length, (span_id, is_sink) = config.num_tokens, config.template()
    history = ExplicitHistory(bench.profile.rule, Template(span_id, is_sink))
    device = Device.of(torch.device(bench.device), bench.dtype)
    form = best_mask_form(history, length, bench.profile.categories, device)
    heads, key_heads = SHAPES[bench.shape][2:4]
    size = CallSize(heads, key_heads, HEAD_DIM, 1, length, length, length, length, is_masked=True)
    codes = tuple(bench.profile.categories[0].tolist())
    call = ChoosableCall(codes, form, is_causal=True, size=size)
    calls = [call] * SHAPES[bench.shape][4]
    choose_layouts(calls, history, lowering=Lowering.AUTO, device=device)


def measure_compile(bench: Bench, size: int) -> list[dict[str, Any]]:
    inputs, template = inputs_of(bench.model, prompt_of(size))
    found = []
    with torch._inductor.config.patch(force_disable_caches=True):
        for name in tqdm(("torch.compile", "fused", "split", "torch.compile"), desc="compile"):
            torch._dynamo.reset()
            options: dict[str, Any] = {}
            if name != "torch.compile":
                options["backend"] = blindsight_backend(bench.profile, lowering=name)
            run = partial(
                forward, torch.compile(bench.model, dynamic=False, **options), inputs, template
            )
            first = bench.seconds(run)
            later = min(bench.seconds(run) for _ in range(2))
            found.append(
                {
                    "part": "compile",
                    "tokens": inputs["inputs_embeds"].shape[1],
                    "form": name,
                    "num_layers": bench.num_layers,
                    "compile_s": first - later,
                }
            )
    # The first compiled anything pays for what is shared: the plain one was first, and is last.
    return found[1:]


def measure_recompiles(bench: Bench, part: str, number: int, longest: int) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    draw = random.Random(0)
    counted = Counting()
    backend = blindsight_backend(bench.profile, lowering="fused", inner=counted)
    compiled = torch.compile(bench.model, backend=backend)
    found = []
    for at in tqdm(range(number), desc=part):
        image = draw.choice((64, 128, 256))
        images = draw.randint(2, max(2, longest // (image + 2 + 16)))
        config = Config(images, image, draw.randint(1, 16))
        inputs, template = inputs_of(bench.model, config)
        run = partial(forward if part == "recompile" else converse, compiled, inputs, template)
        before = counted.number
        seconds, again = bench.seconds(run), bench.seconds(run)
        found.append(
            {
                "part": part,
                "prompt": at,
                "tokens": config.num_tokens,
                "num_images": images,
                "compiled": counted.number - before,
                "first_ms": 1e3 * seconds,
                "again_ms": 1e3 * again,
            }
        )
    return found


def converse(module: Any, inputs: dict[str, Any], template: Sequence[Tensor]) -> None:
    """Run a prompt in two turns."""
    cache = DynamicCache(config=module.config)
    span_id = template[0][0]
    begin = int((span_id == 1 + int(span_id.max()) * 2 // 3).nonzero()[0])
    for past, stop in ((0, begin), (begin, len(span_id))):
        with use_template(*(x[:, :stop] for x in template)):
            module(
                inputs_embeds=inputs["inputs_embeds"][:, past:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=inputs["position_ids"][..., past:stop],
                past_key_values=cache,
                use_cache=True,
            )


class Counting:
    """Inductor, counting the graphs with attention that it compiles."""

    def __init__(self) -> None:
        self.number = 0
        self._inner = Inner("inductor", {})

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        own = any(node.target is scaled_dot_product_attention for node in gm.graph.nodes)
        self.number += own or any(name.startswith("blindsight") for name in names)
        return self._inner(gm, example_inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--shape", default="qwen2.5-vl-3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--compile-tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--longest", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parts = ("work", "compile", "recompile", "turns")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    arguments.device = local_device(arguments.device)
    told = conditions(arguments.device)
    bench = Bench(arguments)
    rows: list[dict[str, Any]] = []
    if "work" in arguments.parts:
        rows += measure_work(bench, arguments.tokens)
    if "compile" in arguments.parts:
        rows += measure_compile(bench, arguments.compile_tokens)
    for part in ("recompile", "turns"):
        if part in arguments.parts:
            rows += measure_recompiles(bench, part, arguments.prompts, arguments.longest)
    shape = {"shape": arguments.shape, "dtype": arguments.dtype}
    append_rows(RESULTS, rows, {**told, **shape})
    for part in arguments.parts:
        of_part = [row for row in rows if row["part"] == part]
        header = [name for name in of_part[0] if name != "part"]
        print_table(header, [[_text(row[name]) for name in header] for row in of_part])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
