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
PANELS = {
    "4 x 9": "4 images of 3 x 3 digits",
    "12 x 9": "12 images of 3 x 3 digits",
    "8 x 16": "8 images of 4 x 4 digits",
}


def plot(log: Path, out: Path) -> None:
    """The answer's loss with some auxiliary ones, and held-out accuracy by task."""
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
    figure, (left, *axes) = plt.subplots(1, 4, figsize=(18, 4.5), layout="constrained")
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
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        done = [(line["step"], line["eval"][key]) for line in evals if key in line["eval"]]
        for task in TASKS:
            axis.plot([s for s, _ in done], [x[task] for _, x in done], marker=".", label=task)
        axis.set(
            title=title,
            xlabel="step",
            ylabel="accuracy",
            ylim=(0, 1.02),
            xlim=(0, lines[-1]["step"]),
        )
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    stages = [b["step"] for a, b in pairwise(losses) if b["stage"] > a["stage"]]
    for axis in (left, *axes):
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
