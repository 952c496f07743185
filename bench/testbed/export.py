"""Writes trained weights as the model directory that the Auto classes load.

python bench/testbed/export.py RUN/best.safetensors [--out bench/testbed/model]
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from network import build_model
from safetensors.torch import load_file
from vocabulary import save_processor

MODEL = Path(__file__).parent / "model"
MAX_BYTES = 10_000_000


def export(weights: Path, out: Path) -> None:
    """Model, tokenizer, processor and chat template; bfloat16.

    Raises:
        ValueError: The weights are not this architecture's, or the file gets too large.
    """
    model = build_model(0)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(
            f"{weights} must hold the weights of network.build_model, got {len(missing)} missing "
            f"and {len(unexpected)} unexpected names. Export with the code that trained them."
        )
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(temporary)
    save_processor(temporary)
    size = (temporary / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise ValueError(
            f"model.safetensors must be at most {MAX_BYTES:,} bytes, got {size:,}. "
            "Make the model smaller."
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(temporary.iterdir()):
        path.chmod(0o644)
        os.replace(path, out / path.name)
    temporary.rmdir()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--out", type=Path, default=MODEL)
    args = parser.parse_args()
    export(args.weights, args.out)
