"""Draws the curves of a training log.

python bench/testbed/plot.py RUN/log.jsonl --out bench/testbed/curves.png
"""

from __future__ import annotations

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from collages import TASKS

SHOWN = ("answer", "early_answer", "mode", "counts", "partner", "look_partner", "look_digit")


def plot(log: Path, out: Path) -> None:
    """Three panels: answer and auxiliary losses, accuracy at 4 images, accuracy at 12."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines: list[dict[str, Any]] = []
    for line in map(json.loads, log.read_text().splitlines()):
        while lines and lines[-1]["step"] > line["step"]:  # a run resumed from its checkpoint
            lines.pop()
        lines.append(line)
    losses = [line for line in lines if "losses" in line]
    evals = [line for line in lines if "eval" in line]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    steps = [line["step"] for line in losses]
    for name in SHOWN:
        values = [line["losses"].get(name, float("nan")) for line in losses]
        is_answer = name == "answer"
        left.plot(
            steps, values, label=name, lw=2 if is_answer else 0.8, zorder=3 if is_answer else 2
        )
    left.set(title="Training losses", xlabel="step", ylabel="cross-entropy (nats)", yscale="log")
    left.set_ylim(0.01, 5)
    left.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower left")
    for axis, images in ((middle, "4"), (right, "12")):
        for task in TASKS:
            axis.plot(
                [line["step"] for line in evals],
                [line["eval"][images][task] for line in evals],
                marker=".",
                label=task,
            )
        axis.set(
            title=f"Held-out digits, {images} images, one question",
            xlabel="step",
            ylabel="accuracy",
            ylim=(0, 1.02),
        )
        axis.grid(alpha=0.3)
    middle.legend(fontsize=8)
    stages = [b["step"] for a, b in pairwise(losses) if b["stage"] > a["stage"]]
    for axis in (left, middle, right):
        for step in stages:
            axis.axvline(step, color="gray", lw=0.8, ls=":")
    temporary = out.with_name("tmp-" + out.name)
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "curves.png")
    args = parser.parse_args()
    plot(args.log, args.out)
