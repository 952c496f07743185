"""What a decoded token costs on the host: plain torch.compile, and with a profile.

    python bench/decoding.py [--families qwen2_5_vl qwen3_vl] [--layers 36] [--caches static]

A model of a real one's number of layers and so narrow that what is computed takes no time: what is
left are hooks, guards, and the backend's own calls. A prompt of two images is prefilled, then text
is decoded token by token, in ``generate``. Both forms in turn, A B A B, medians over all tokens;
two models that are compiled alike already differ by 5 %. So what hooks and the backend take before
and after the model's own graphs is timed apart, in turns of their own. Appends a row for each
measurement to bench/results/decoding.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Spread, append_rows, conditions, print_table
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from blindsight import Profile, blindsight_backend
from blindsight.ranks import local_device
from blindsight.runtime import watch
from blindsight.runtime.compiled_graph import CompiledGraph
from blindsight.timer import wait_for

RESULTS = Path(__file__).parent / "results" / "decoding.jsonl"
IMAGE, START, END, TEXT = 3, 1, 2, 8  # ids of tokens
WIDTH, HEADS, HEAD_DIM, MERGE = 64, 4, 16, 2
SIDE = 16  # image tokens

_TEXT = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}
_VISION = {
    "depth": 1,
    "num_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": WIDTH,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 4,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def model_of(family: str, num_layers: int, device: str) -> Any:
    text = {**_TEXT, "num_hidden_layers": num_layers}
    if family == "qwen2_5_vl":
        vision = {**_VISION, "window_size": 16, "fullatt_block_indexes": [0]}
        config: Any = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IDS)
        model_class: Any = Qwen2_5_VLForConditionalGeneration
    else:
        vision = {**_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 1024}
        config = Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS)
        model_class = Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    with torch.device(device):
        return model_class._from_config(config, attn_implementation="sdpa").eval()


def prompt_of(num_images: int, device: str) -> dict[str, Tensor]:
    image = [START, *[IMAGE] * SIDE**2, END]
    ids: list[int] = [TEXT] * 5
    for _ in range(num_images):
        ids += [*image, *[TEXT] * 7]
    input_ids = torch.tensor([ids], device=device)
    patches = num_images * (MERGE * SIDE) ** 2
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).to(torch.int32),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, device=device),
        "image_grid_thw": torch.tensor([[1, MERGE * SIDE, MERGE * SIDE]] * num_images).to(device),
    }


class Clock:
    """A streamer of ``generate``: when each token was there."""

    def __init__(self, device: torch.device, begin: Callable[[], None]) -> None:
        self._device = device
        self._begin = begin
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        wait_for(self._device)
        self._times.append(time.perf_counter())
        if len(self._times) == 2:  # the prompt itself, and what follows it
            self._begin()

    def end(self) -> None:
        pass

    def milliseconds(self) -> list[float]:
        """Return what each token took but the first, before which all of the prompt ran."""
        _, *times = self._times  # the prompt itself
        return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def decode(
    model: Any,
    inputs: dict[str, Tensor],
    kind: str,
    number: int,
    begin: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the milliseconds of each of so many tokens, in ``generate``.

    Args:
        model, inputs, kind, number: What decodes after which prompt on which cache how many tokens.
        begin: Called when the prompt has run.
    """
    clock = Clock(inputs["input_ids"].device, begin)
    model.generate(
        **inputs,
        max_new_tokens=number + 1,
        do_sample=False,
        suppress_tokens=list(range(TEXT)),
        cache_implementation="static" if kind == "static" else None,
        streamer=clock,
        disable_compile=True,  # of its own
    )
    return clock.milliseconds()


class Overhead:
    """Inside, time what a profile adds to a call: hooks, and calls of graphs less the graphs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._patches = contextlib.ExitStack()

    def reset(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Overhead:
        for owner, name, sign in (
            (watch._Before, "_begin", 1),
            (watch._After, "_end", 1),
            (CompiledGraph, "_run", 1),
            (CompiledGraph, "_run_own", -1),
        ):
            timed = self._timed(getattr(owner, name), sign)
            self._patches.enter_context(mock.patch.object(owner, name, timed))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _timed(self, function: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += sign * (time.perf_counter() - begin)

        return call


def compiled(name: str, family: str, arguments: argparse.Namespace) -> Any:
    """Return a model, compiled with a profile or without."""
    model = model_of(family, arguments.layers, arguments.device)
    backend = arguments.inner
    if name == "blindsight":
        profile = Profile.for_model(model, [[0, 1, 2, 3]] * arguments.layers)
        backend = blindsight_backend(profile, inner=arguments.inner, lowering="fused")
    model.compile(backend=backend)
    return model


def measure(family: str, kind: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    inputs = prompt_of(2, arguments.device)
    models = {name: compiled(name, family, arguments) for name in ("torch.compile", "blindsight")}
    for model in models.values():
        decode(model, inputs, kind, arguments.tokens)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.repeats):
        for name, model in models.items():
            times[name] += decode(model, inputs, kind, arguments.tokens)
    with Overhead() as overhead:
        model = compiled("blindsight", family, arguments)
        decode(model, inputs, kind, arguments.tokens)
        added = []
        for _ in range(arguments.repeats):
            number = len(decode(model, inputs, kind, arguments.tokens, overhead.reset))
            added.append(1e6 * overhead.seconds / number)
    return [
        {
            "family": family,
            "num_layers": arguments.layers,
            "inner": arguments.inner,
            "cache": kind,
            "form": name,
            "n": len(values),
            "median_ms": spread.median,
            "p80_ms": spread.p80,
            "added_us": statistics.median(added) if name == "blindsight" else 0.0,
        }
        for name, values in times.items()
        for spread in [Spread.of(values)]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    families = ("qwen2_5_vl", "qwen3_vl")
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--caches", nargs="+", choices=("dynamic", "static"), default=("dynamic",))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tokens", type=int, default=20, help="decoded in a turn")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.device = local_device(arguments.device)
    torch._dynamo.config.recompile_limit = 4 * arguments.layers
    told = conditions(arguments.device)
    rows = []
    for family in arguments.families:
        for kind in tqdm(arguments.caches, desc=family):
            rows += measure(family, kind, arguments)
    append_rows(RESULTS, rows, told)
    table = [
        [
            row["family"],
            row["cache"],
            row["form"],
            f"{row['median_ms']:.3g}",
            f"{row['p80_ms']:.3g}",
            f"{row['added_us']:.0f}",
        ]
        for row in rows
    ]
    print_table(
        ["family", "cache", "form", "ms a token", "80th percentile", "of it ours, us"], table
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
