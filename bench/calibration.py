"""What calibration costs: memory and time of the probe, and of a whole calibration.

    python bench/calibration.py [--lengths 2000 4000 8000] [--repeats 5]
    python bench/calibration.py --layers 2 4 [--lengths 4000]
    python bench/calibration.py --model DIR --dataset DIR [--num-samples 64]

The first form measures one layer's probe alone, each length in a process of its own: the peak of
resident memory over what the inputs take, the peak of live tensors, and the time, beside that of
the dense attention that it stands next to (`scaled_dot_product_attention` with a boolean mask, what
the models run, and with `is_causal`). The second measures one prompt on decoders of so many layers
of Qwen2.5-VL-3B's widths, with gradients: as it is, and with all kept that layers compute. The
third runs `blindsight calibrate`. All append rows to bench/results/calibration.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Config, Spread, append_rows, conditions, print_table
from prefill import SHAPES
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from blindsight.attention.base_mask import CAUSAL
from blindsight.calibration.probe import ProbedCall, measure_losses
from blindsight.calibration.visibility import visibility_of_form

RESULTS = Path(__file__).parent / "results" / "calibration.jsonl"
TESTBED = Path(__file__).parent / "testbed" / "model"
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
IMAGE_TOKENS, TEXT_TOKENS = 256, 16


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._seen:
            return
        self._seen.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)

        def drop() -> None:
            self.now -= size
            self._seen.discard(number)

        weakref.finalize(storage, drop)


def resident_peak(reset: bool = False) -> int:
    """Return the peak of resident memory, in bytes, since it was last reset (on Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def times(function: Callable[[], object], repeats: int) -> dict[str, float]:
    function()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - begin))
    return {f"{name}_ms": value or 0.0 for name, value in Spread.of(found)._asdict().items()}


def measure_length(length: int, repeats: int) -> list[dict[str, Any]]:
    """Return the rows of one prompt length."""
    torch.manual_seed(0)
    per_image = Config(1, IMAGE_TOKENS, TEXT_TOKENS).num_tokens - Config(0, 1, 0).num_tokens
    prompt = Config(round(length / per_image), IMAGE_TOKENS, TEXT_TOKENS)
    span_id, is_sink = prompt.template()
    size = prompt.num_tokens
    query = torch.randn(1, NUM_HEADS, size, HEAD_DIM)
    key, value = (torch.randn(1, NUM_KV_HEADS, size, HEAD_DIM) for _ in range(2))

    def probe() -> object:
        visibility = visibility_of_form(CAUSAL, (), span_id, is_sink)
        assert visibility is not None
        call = ProbedCall(query, key, value, query, visibility, span_id, is_sink)
        return measure_losses(call)

    before = resident_peak(reset=True)
    probe()
    resident = resident_peak() - before
    tracker = LiveTensors()
    with tracker:
        probe()
    mask = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
    dense = {
        "SDPA, boolean mask": lambda: scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=True
        ),
        "SDPA is_causal": lambda: scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ),
    }
    common = {
        "question": "probe",
        "num_tokens": size,
        "num_images": prompt.num_images,
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "n": repeats,
        "warmup": 1,
        "seed": 0,
    }
    peak = {"resident_bytes": resident, "tensor_bytes": tracker.peak}
    rows = [{**common, "what": "probe", **peak, **times(probe, repeats)}]
    for name, function in dense.items():
        rows.append({**common, "what": name, **times(function, repeats)})
    return rows


def measure_decoder(num_layers: int, length: int, keeps: bool, repeats: int) -> dict[str, Any]:
    """Return the row of one decoder: peak of resident memory over what there is before, and time.

    Args:
        num_layers: Of the decoder.
        length: About so many tokens.
        keeps: Whether all that layers compute is kept, instead of computed again.
        repeats: Of the time.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    from blindsight import TemplateRule
    from blindsight.calibration import prober as probing

    if keeps:
        probing.recompute_layers_pass = lambda gm, *, attention: gm
    hidden, intermediate, heads, key_heads, _ = SHAPES["qwen2.5-vl-3b"]
    config = AutoConfig.from_pretrained(TESTBED)
    config.text_config.update(
        {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "num_hidden_layers": num_layers,
            "layer_types": num_layers * ["full_attention"],
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [16, 24, 24],
                "rope_theta": 1e6,
            },
        }
    )
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    prober = probing.Prober(model, TemplateRule.from_config(config), next_token=True)

    def prompt(num_images: int, side: int) -> dict[str, Any]:
        image = [
            config.vision_start_token_id,
            *(side * side * [config.image_token_id]),
            config.vision_end_token_id,
        ]
        text = torch.randint(10, config.text_config.vocab_size, (num_images, TEXT_TOKENS))
        ids = torch.tensor([[x for row in text.tolist() for x in (*image, *row)]])
        vision = config.vision_config
        patches = (vision.spatial_merge_size * side) ** 2
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = [1, vision.spatial_merge_size * side, vision.spatial_merge_size * side]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(num_images * patches, size),
            "image_grid_thw": torch.tensor(num_images * [grid]),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }

    prober(prompt(2, 2))  # compiles
    inputs = prompt(round(length / (IMAGE_TOKENS + 2 + TEXT_TOKENS)), round(IMAGE_TOKENS**0.5))
    before = resident_peak(reset=True)
    found = times(lambda: prober(inputs), repeats)
    return {
        "question": "gradients",
        "what": "everything kept" if keeps else "layers computed again",
        "num_layers": num_layers,
        "num_tokens": inputs["input_ids"].shape[1],
        "shape": "qwen2.5-vl-3b",
        "dtype": "float32",
        "n": repeats,
        "warmup": 1,
        "seed": 0,
        "resident_bytes": resident_peak() - before,
        **found,
    }


def measure_command(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one ``blindsight calibrate``."""
    from blindsight.profile import Profile

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "profile.safetensors"
        command = [sys.executable, "-m", "blindsight.cli", "calibrate"]
        command += ["--model", arguments.model, "--data", arguments.dataset, "-o", str(output)]
        command += ["--limit", str(arguments.num_samples)]
        command += ["--batch-size", str(arguments.batch_size)]
        begin = time.perf_counter()
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - begin
        profile = Profile.load(output)
    print(found.stdout)
    return {
        "question": "calibration",
        "seconds": seconds,
        "num_samples": arguments.num_samples,
        "batch_size": arguments.batch_size,
        "num_layers": profile.num_layers,
        "num_heads": profile.num_heads,
        "heads": {category.name: count for category, count in profile.counts().items()},
        "budget": profile.calibration["budget"],
        "dtype": "float32",
        "peak_children_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def write(rows: list[dict[str, Any]]) -> None:
    append_rows(RESULTS, rows, conditions())


def in_process(*options: object) -> list[dict[str, Any]]:
    """Return the rows that this file prints with these options."""
    command = [sys.executable, __file__, *map(str, options)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    return rows


def print_decoders(arguments: argparse.Namespace) -> None:
    """Measure decoders with gradients, each in a process of its own, and print the table."""
    rows = []
    for length in arguments.lengths:
        for num_layers in arguments.layers:
            options = ["--layers", num_layers, "--lengths", length, "--repeats", arguments.repeats]
            for keeps in (0, 1):
                rows += in_process(*options, "--keeps", keeps)
    write(rows)
    print_table(
        ["layers", "tokens", "gradients", "resident peak, MiB", "seconds"],
        [
            [
                str(row["num_layers"]),
                f"{row['num_tokens']:,}",
                row["what"],
                f"{row['resident_bytes'] / 2**20:,.0f}",
                f"{row['median_ms'] / 1000:.1f}",
            ]
            for row in rows
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", help="of decoders, with gradients")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--keeps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.keeps is not None:
        (num_layers,), (length,) = arguments.layers, arguments.lengths
        row = measure_decoder(num_layers, length, bool(arguments.keeps), arguments.repeats)
        print(json.dumps([row]))
        return
    if arguments.only is not None:
        print(json.dumps(measure_length(arguments.only, arguments.repeats)))
        return
    if arguments.model is not None:
        row = measure_command(arguments)
        write([row])
        print(f"{row['seconds']:.1f} s, loading included; heads {row['heads']}")
        return
    if arguments.layers is not None:
        print_decoders(arguments)
        return
    rows = []
    for length in arguments.lengths:
        rows += in_process("--only", length, "--repeats", arguments.repeats)
    write(rows)
    table = []
    before = None
    for row, *dense in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        more = "-"
        if before is not None:
            grown = row["tensor_bytes"] - before["tensor_bytes"]
            more = f"{grown / (row['num_tokens'] - before['num_tokens']) / 1024:.1f}"
        before = row
        table.append(
            [
                f"{row['num_tokens']:,}",
                f"{row['resident_bytes'] / 2**20:.0f}",
                f"{row['tensor_bytes'] / 2**20:.0f}",
                more,
                f"{4 * NUM_HEADS * row['num_tokens'] ** 2 / 2**20:,.0f}",
                f"{row['median_ms']:,.0f}",
                *(f"{other['median_ms']:,.0f}" for other in dense),
            ]
        )
    print_table(
        [
            "tokens",
            "resident peak, MiB",
            "tensors' peak, MiB",
            "KiB for each token more",
            "scores of all pairs, MiB",
            "probe, ms",
            "SDPA, boolean mask, ms",
            "SDPA is_causal, ms",
        ],
        table,
    )


if __name__ == "__main__":
    main()
