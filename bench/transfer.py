"""Does a profile hold on prompts other than those it was calibrated on?

    python bench/transfer.py bench/testbed/model

Three tables: calibrate on one half of the tasks, and answer both; calibrate on prompts of 2 to 4
images, and answer prompts of 12; calibrate with 4, 16, 64 and 256 prompts. Calibration sees digits
of the training split, the questions are about digits of the test split. What was measured or
answered is kept in --work, where an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from common import conditions, print_table
from compare import compare
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from blindsight.attention.interval_masks import BaseMask
from blindsight.calibrate import profile_of, rule_of
from blindsight.calibration.measurements import Measurements
from blindsight.calibration.probe import Losses, ProbedCall, measure_losses
from blindsight.calibration.prober import measurements_of
from blindsight.calibration.refine import UNITS, refine, reselect
from blindsight.calibration.visibility import IntervalVisibility
from blindsight.cli.models import load_model
from blindsight.data.processors import load_processor, model_inputs
from blindsight.data.samples import Samples, load_samples
from blindsight.evaluation.masked_model import EVERYTHING, HeadMask, MaskedCall, Masks
from blindsight.evaluation.prefill import Decoder
from blindsight.evaluation.summary import Summary
from blindsight.modules import digest_of_model
from blindsight.profile import Profile
from blindsight.progress import quiet

sys.path.insert(0, str(Path(__file__).parent / "testbed"))
from make_dataset import TASKS, parse_grid, write_dataset

HALVES = {"one image": TASKS[:3], "several images": TASKS[3:]}
FEW, MANY, ALL = (2, 4), (12, 12), (2, 12)  # images a prompt


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    calibrated_on: str
    evaluated_on: str
    budget: float
    heads_alike: float
    attention: float
    dense: Summary
    sparse: Summary

    def cells(self) -> list[str]:
        found = self.sparse

        def points(estimate: Sequence[float]) -> str:
            value, low, high = (f"{100 * x + 0.0:+.1f}" for x in estimate)
            return f"{value} [{low}, {high}]"

        return [
            self.calibrated_on,
            self.evaluated_on,
            f"{self.budget:g}",
            f"{self.heads_alike:.0%}",
            f"{self.attention:.1%}",
            f"{100 * self.dense.mean.value:.1f}",
            points(found.difference.mean),
            f"{points(found.difference.worst)} {found.worst_task}",
            f"{found.changed:.1%}",
            f"{found.kl_mean:.1e}",
        ]

    def as_json(self) -> dict[str, Any]:
        found = self.sparse
        return {
            "table": self.table,
            "calibrated_on": self.calibrated_on,
            "evaluated_on": self.evaluated_on,
            "budget": self.budget,
            "heads_alike": self.heads_alike,
            "attention_share": self.attention,
            "dense_accuracy": self.dense.mean,
            "difference": found.difference.mean,
            "worst_difference": found.difference.worst,
            "worst_task": found.worst_task,
            "changed": found.changed,
            "kl_mean": found.kl_mean,
            "num_questions": found.num_samples,
        }


HEADER = [
    "calibrated on", "answered", "budget", "heads alike", "attention", "dense, %",
    "difference", "task that loses most", "changed", "KL, nats",
]  # fmt: skip


class Bench:
    """A model, and what is made of it in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.work: Path = options.work
        self.budgets: list[float] = options.budgets
        self.num_questions: int = options.num_questions
        self.batch_size: int = options.batch_size
        self.by: str = options.by
        self.grids: str = options.grids
        self.model = load_model(str(options.model), "float32")
        self.processor = load_processor(options.model)
        # What was measured of other weights is of no use here.
        self.known = self.work / digest_of_model(self.model)[:12]
        self.known.mkdir(parents=True, exist_ok=True)
        self.rule = rule_of(self.model)
        self.decoder = Decoder(self.model, Profile.for_model(self.model, "dense", rule=self.rule))

    def samples(
        self,
        number: int,
        *,
        split: str,
        seed: int = 0,
        images: tuple[int, int] = ALL,
        tasks: tuple[str, ...] = TASKS,
    ) -> Samples:
        """Return prompts of the testbed, made where they are not at hand."""
        name = f"{split}-{seed}-{images[0]}-{images[1]}-{self.grids}-{'+'.join(tasks)}-{number}"
        folder = self.work / name
        if not (folder / "data.jsonl").exists():
            write_dataset(
                folder,
                num_samples=number,
                images=images,
                split=split,
                seed=seed,
                tasks=tasks,
                grids=tuple(map(parse_grid, self.grids.split(","))),
            )
        return load_samples(folder)

    def measured(self, samples: Samples) -> Measurements:
        """Return what calibration measures on some prompts.

        The same measurement, beside the model run eagerly: these prompts are short, and no two
        have the same images, so tracing each anew would take most of the time.
        """
        path = self.known / f"measured-{samples.digest()[:16]}.pt"
        if not path.exists():
            parts = [self._measure(sample) for sample in tqdm(samples, desc="measuring")]
            torch.save(Measurements.join(parts).tensors(), path)
        return Measurements(**torch.load(path, weights_only=True))

    def _measure(self, sample: Any) -> Measurements:
        batch = self.decoder.prepare(model_inputs(self.processor, [sample]))
        prompt = batch.prompt
        losses: dict[int, Losses] = {}

        class Measuring:
            def head_masks(self, call: MaskedCall) -> Sequence[HeadMask]:
                q, k, v = call.query, call.key, call.value
                output = scaled_dot_product_attention(
                    q, k, v, call.base, scale=call.scale, enable_gqa=True
                )
                bounds = [side[call.layer].int() for side in (prompt.lower, prompt.upper)]
                if prompt.groups.shape[1] == 1:  # of all tokens
                    bounds = [side[:, 0] for side in bounds]
                base = BaseMask(*bounds, prompt.valid)
                visibility = IntervalVisibility(base, groups=prompt.groups)
                template = prompt.template.tensors()
                probed = ProbedCall(q, k, v, output, visibility, *template, scale=call.scale)
                losses[call.layer] = measure_losses(probed)
                return EVERYTHING

        self.decoder.prefill(batch, cast(Masks, Measuring()))
        return measurements_of(losses)

    def refined(self, samples: Samples, *, by: str) -> Profile:
        """Return a profile that is calibrated and refined on some prompts."""
        path = self.known / f"refined-{by}-{samples.digest()[:16]}.safetensors"
        if not path.exists():
            note = {"dataset": f"the testbed's: {Path(samples.name).parent.name}"}
            first = profile_of(
                self.model,
                self.measured(samples),
                rule=self.rule,
                criterion="output_error",  # what follows is what refines it
                calibration=note,
            )
            options = {"budget": self.budgets[0], "by": by, "batch_size": self.batch_size}
            found = refine(self.model, self.processor, samples, first, **options)
            found.save(path)
        return Profile.load(path)

    def profiles(self, samples: Samples) -> dict[float, Profile]:
        """Return the profile of every budget."""
        found = self.refined(samples, by=self.by)
        return {budget: reselect(found, budget) for budget in self.budgets}

    def rows(
        self,
        table: str,
        name: str,
        questions: Samples,
        calibrations: dict[str, dict[float, Profile]],
        native: str,
    ) -> list[Row]:
        """Answer questions with all profiles; ``native`` names the calibration of their kind."""
        profiles = {
            f"{calibration}, {budget}": profile
            for calibration, found in calibrations.items()
            for budget, profile in found.items()
        }
        dense, summaries = compare(
            self.model,
            self.processor,
            questions,
            profiles,
            batch_size=self.batch_size,
            checkpoint=self.known / f"answers-{questions.digest()[:16]}.jsonl",
        )
        rows = []
        for budget in self.budgets:
            own = calibrations[native][budget].categories
            for calibration, found in calibrations.items():
                summary = summaries[f"{calibration}, {budget}"]
                alike = (found[budget].categories == own).double().mean()
                share = summary.attention_flops / dense.attention_flops
                row = Row(table, calibration, name, budget, float(alike), share, dense, summary)
                rows.append(row)
        return rows

    # The tables.

    def tasks(self) -> list[Row]:
        calibrations = {
            half: self.profiles(self.samples(64, split="train", tasks=tasks))
            for half, tasks in HALVES.items()
        }
        rows = []
        for half, tasks in HALVES.items():
            questions = self.samples(self.num_questions, split="test", tasks=tasks)
            rows += self.rows("tasks", half, questions, calibrations, half)
        return rows

    def images(self) -> list[Row]:
        kinds = {"2 to 4": FEW, "2 to 12": ALL, "12": MANY}
        calibrations = {
            kind: self.profiles(self.samples(64, split="train", images=images))
            for kind, images in kinds.items()
        }
        questions = self.samples(self.num_questions, split="test", images=MANY)
        return self.rows("images", "12", questions, calibrations, "12")

    def sizes(self) -> list[Row]:
        questions = self.samples(self.num_questions, split="test")
        prompts = self.samples(256, split="train")
        calibrations = {}
        for number in (4, 16, 64, 256):
            for draw in range(1 if number == 256 else 3):
                part = prompts[draw * number : (draw + 1) * number]
                label = f"{number} prompts" + ("" if number == 256 else f", draw {draw + 1}")
                calibrations[label] = self.profiles(part)
        return self.rows("samples", "all", questions, calibrations, "256 prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.005, 0.02])
    parser.add_argument("--by", choices=UNITS, default="layer", help="how profiles are refined")
    parser.add_argument("--num-questions", type=int, default=300, help="a set (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--grids", default="3x3,3x4,4x3,4x4", help="digits of an image")
    parser.add_argument("--tables", nargs="+", default=["tasks", "images", "sizes"])
    parser.add_argument("--work", type=Path, default=Path("build/transfer"))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "transfer.jsonl"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    with quiet():
        bench = Bench(options)
        tables: dict[str, Callable[[], list[Row]]] = {
            "tasks": bench.tasks,
            "images": bench.images,
            "sizes": bench.sizes,
        }
        for name in options.tables:
            begin = time.perf_counter()
            rows = tables[name]()
            seconds = time.perf_counter() - begin
            print_table(HEADER, [row.cells() for row in rows])
            made = {**conditions(), "model": str(options.model), "seconds": round(seconds, 1)}
            with open(options.out, "a", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps({**row.as_json(), **made}) + "\n")


if __name__ == "__main__":
    main()
