"""The curve on the testbed: what is left of the answers when attention is sparse.

    python bench/curve.py bench/testbed/model

Calibrates on digits of the training split, refines by head, and answers questions about digits of
the test split at every budget, beside the baselines. Writes sweep.json, sweep.md, sweep.png,
heads.png and the profile to --out. What was measured or answered is kept in --work, where an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import conditions
from transfer import Bench

from blindsight.calibration.refine import UNITS, reselect
from blindsight.evaluation.sweep_plot import plot_sweep
from blindsight.plots import plot_profile
from blindsight.progress import quiet
from blindsight.sweep import sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--num-prompts", type=int, default=64, help="of calibration (%(default)s)")
    parser.add_argument("--num-questions", type=int, default=480)
    parser.add_argument("--budget", type=float, default=0.005, help="of the profile (%(default)s)")
    parser.add_argument("--by", choices=UNITS, default="head", help="how it is refined")
    parser.add_argument("--points", type=int, default=14)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--grids", default="4x4", help="digits of an image (%(default)s)")
    parser.add_argument("--images", type=int, default=8, help="of a question (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/transfer"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "curve")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.budgets = [options.budget]
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        bench = Bench(options)
        prompts = bench.samples(options.num_prompts, split="train")
        profile = reselect(bench.refined(prompts, by=options.by), options.budget)
        profile.save(options.out / "profile.safetensors")
        plot_profile(profile, options.out / "heads.png")
        images = options.images, options.images
        questions = bench.samples(options.num_questions, split="test", images=images)
        found = sweep(
            bench.model,
            bench.processor,
            questions,
            profile,
            num_points=options.points,
            num_seeds=options.seeds,
            batch_size=options.batch_size,
            checkpoint=bench.known / f"curve-{questions.digest()[:16]}.jsonl",
        )
    found.save(options.out)
    plot_sweep(found, options.out / "sweep.png")
    made = json.dumps(conditions(), indent=1) + "\n"
    (options.out / "conditions.json").write_text(made, encoding="utf-8")
    print(found.to_markdown())


if __name__ == "__main__":
    main()
