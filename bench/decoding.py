"""What a decoded token costs on the host: plain torch.compile, and with a profile.

    python bench/decoding.py [--families qwen2_5_vl qwen3_vl] [--layers 36] [--caches static]

A model of a real one's number of layers and so narrow that what is computed takes no time: what is
left are hooks, guards, and the backend's own calls. A prompt of two images is prefilled, then text
is decoded token by token. Qwen2.5-VL's decoder is one graph, of Qwen3-VL each layer is a frame of
its own. All forms in turn, A B A B, medians over all tokens; caches and models are apart. Appends
a row for each measurement to bench/results/decoding.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import conditions, print_table
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
from blindsight.timer import Timer

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

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._times: list[float] = []

    def put(self, value: Tensor) -> None:
        self._timer.wait()
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def milliseconds(self) -> list[float]:
        """Return what each token took but the first, before which all of the prompt ran."""
        _, *times = self._times  # the prompt itself
        return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def decode(model: Any, inputs: dict[str, Tensor], kind: str, number: int) -> list[float]:
    """Return the milliseconds of each of so many tokens, in :meth:`generate`."""
    clock = Clock(Timer(inputs["input_ids"].device))
    model.generate(
        **inputs,
        max_new_tokens=number + 1,
        do_sample=False,
        suppress_tokens=list(range(TEXT)),
        cache_implementation="static" if kind == "static" else None,
        streamer=clock,
    )
    return clock.milliseconds()


def measure(family: str, kind: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    device = arguments.device
    inputs = prompt_of(2, device)
    runs: dict[str, Any] = {}
    for name in ("torch.compile", "blindsight"):
        model = model_of(family, arguments.layers, device)
        codes = [[0, 1, 2, 3]] * arguments.layers
        options: dict[str, Any] = {"backend": arguments.inner}
        if name == "blindsight":
            profile = Profile.for_model(model, codes)
            options["backend"] = blindsight_backend(
                profile, inner=arguments.inner, lowering="fused"
            )
        model.compile(**options)
        runs[name] = model
        decode(model, inputs, kind, 8)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            times[name] += decode(run, inputs, kind, arguments.tokens)
    plain = statistics.median(times["torch.compile"])
    return [
        {
            "family": family,
            "num_layers": arguments.layers,
            "inner": arguments.inner,
            "cache": kind,
            "form": name,
            "n": len(values),
            "median_ms": statistics.median(values),
            "p80_ms": sorted(values)[int(0.8 * len(values))],
            "more_us": 1e3 * (statistics.median(values) - plain),
        }
        for name, values in times.items()
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
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        for row in rows:
            file.write(json.dumps({**told, **row}) + "\n")
    table = [
        [
            row["family"],
            row["cache"],
            row["form"],
            f"{row['median_ms']:.3g}",
            f"{row['p80_ms']:.3g}",
            f"{row['more_us']:+.0f}",
        ]
        for row in rows
    ]
    print_table(["family", "cache", "form", "ms a token", "80th percentile", "more, us"], table)


if __name__ == "__main__":
    with torch.no_grad():
        main()
