"""What each choice of calibration is worth: accuracy at the same share of attention's FLOPs.

    python bench/ablations.py MODEL CALIBRATION_DATA TEST_DATA [--num-samples 64] [--limit 200]

The model is measured once on the calibration data (once more for sinks at other places). Then each
variant differs from the first in one choice: attention mass, or the effect on the next token, for
output error; the mean over prompts for the quantile; one budget for all heads together for one per
head; sinks found by measurement for sinks at the delimiter. Budgets of different variants do not
compare, so each gets the smallest that saves as much as wanted. Prints a table and appends its rows
to bench/results/ablations.jsonl. What is measured and answered is kept in --out; a second run goes
on from there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import append_rows, conditions, print_table
from compare import compare

from blindsight.calibrate import (
    evidence_of,
    find_sink_offsets,
    flops_cut,
    profile_of,
    rule_of,
    select_categories,
)
from blindsight.calibration.measure import measure
from blindsight.calibration.measurements import Measurements
from blindsight.calibration.selection import CRITERIA
from blindsight.cli.models import load_model
from blindsight.data.processors import load_processor
from blindsight.data.samples import load_samples
from blindsight.evaluation.summary import Summary
from blindsight.profile import Profile
from blindsight.progress import quiet
from blindsight.template import TemplateRule

RESULTS = Path(__file__).parent / "results" / "ablations.jsonl"


@dataclass(frozen=True)
class Variant:
    """One way to calibrate."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sinks: str = "at the delimiter"


VARIANTS = (
    Variant("output error, quantile 0.95, per head, sinks at the delimiter"),
    Variant("attention mass", {"criterion": "attention_mass"}),
    Variant("effect on the next token", {"criterion": "next_token"}),
    Variant(
        "effect, one budget for all heads", {"criterion": "next_token", "allocation": "global"}
    ),
    Variant("mean over prompts", {"aggregate": "mean"}),
    Variant("one budget for all heads", {"allocation": "global"}),
    Variant("sinks by measurement", sinks="measured"),
)


def profile_with_cut(
    model: Any,
    measurements: Measurements,
    rule: TemplateRule,
    cut: float,
    options: dict[str, Any],
) -> Profile | None:
    """Return the profile of the smallest budget that leaves out this share of the pairs."""
    criterion = options.get("criterion", "output_error")
    allocation = options.get("allocation", "per_head")
    evidence = evidence_of(measurements, aggregate=options.get("aggregate", "quantile"))
    loss, pairs = evidence[CRITERIA[criterion]].double(), evidence["pairs"].double()
    if allocation == "global":
        budgets = torch.linspace(0, float(loss.square().mean().sqrt()) * 2, 4001).tolist()
    else:
        budgets = loss.flatten().unique().tolist()

    def saves_enough(budget: float) -> bool:
        chosen = select_categories(evidence, budget, criterion=criterion, allocation=allocation)
        left = pairs.gather(2, chosen.long()[..., None]).sum()
        return bool(1 - left / pairs[..., 0].sum() >= cut)

    if not saves_enough(budgets[-1]):
        return None
    low, high = 0, len(budgets) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saves_enough(budgets[middle]) else (middle + 1, high)
    return profile_of(
        model, measurements, rule=rule, budget=budgets[low], **{"criterion": criterion, **options}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration_data")
    parser.add_argument("test_data")
    parser.add_argument("--num-samples", type=int, default=64, help="for calibration (%(default)s)")
    parser.add_argument("--limit", type=int, help="at most so many questions")
    parser.add_argument("--cuts", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("ablations"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        model, processor = load_model(arguments.model, "float32"), load_processor(arguments.model)
        calibration = load_samples(arguments.calibration_data, limit=arguments.num_samples)
        questions = load_samples(arguments.test_data, limit=arguments.limit)
        rules = {"at the delimiter": rule_of(model)}
        measured: dict[str, Measurements] = {}
        for sinks in ("at the delimiter", "measured"):
            if sinks == "measured":
                offsets = find_sink_offsets(measured["at the delimiter"])
                print(f"sinks by measurement: offsets {offsets}")
                rules[sinks] = replace(rules["at the delimiter"], sink_offsets=offsets)
            measured[sinks] = measure(
                model,
                processor,
                calibration,
                rule=rules[sinks],
                next_token=True,
                checkpoint=arguments.out / f"{sinks.replace(' ', '-')}.safetensors",
            )
        rows = []
        for sinks, rule in rules.items():
            profiles = {}
            for variant in VARIANTS:
                for cut in arguments.cuts if variant.sinks == sinks else ():
                    profile = profile_with_cut(model, measured[sinks], rule, cut, variant.options)
                    if profile is None:
                        print(f"{variant.name}: a cut of {cut:.0%} is out of reach")
                    else:
                        profiles[f"{variant.name}|{cut}"] = profile
            if not profiles:
                continue
            dense, found = compare(
                model,
                processor,
                questions,
                profiles,
                batch_size=arguments.batch_size,
                checkpoint=arguments.out / f"answers-{sinks.replace(' ', '-')}.jsonl",
            )
            for key, summary in found.items():
                rows.append(row_of(key, profiles[key], dense, summary))
    write_and_print(rows, arguments.cuts)


def row_of(key: str, profile: Profile, dense: Summary, found: Summary) -> dict[str, Any]:
    name, _, cut = key.partition("|")
    return {
        "variant": name,
        "wanted_cut": float(cut),
        "cut": flops_cut(profile),
        "test_cut": 1 - found.attention_flops / dense.attention_flops,
        "budget": float(profile.calibration["budget"]),
        "sink_offsets": list(profile.rule.sink_offsets),
        "heads": {category.name: count for category, count in profile.counts().items()},
        "num_calibration": int(profile.calibration["num_samples"]),
        "num_questions": found.num_samples,
        "dense_accuracy": dense.mean.value,
        "accuracy": found.mean.value,
        "by_task": {task: estimate.value for task, estimate in found.accuracy.items()},
        "worst_task": found.worst_task,
        "worst_difference": found.difference.worst.value,
        "changed": found.changed,
        "kl_mean": found.kl_mean,
        "kl_p95": found.kl_p95,
    }


def write_and_print(rows: list[dict[str, Any]], cuts: list[float]) -> None:
    under = {**conditions(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    append_rows(RESULTS, rows, under)
    if rows:
        print(f"\ndense: {rows[0]['dense_accuracy']:.1%} of {rows[0]['num_questions']} questions\n")
    for cut in cuts:
        table = [
            [
                row["variant"],
                f"{row['budget']:.3g}",
                f"{row['cut']:.1%}",
                f"{row['test_cut']:.1%}",
                f"{row['accuracy']:.1%}",
                f"{row['worst_task']} {100 * row['worst_difference']:+.1f}",
                f"{row['changed']:.1%}",
                f"{row['kl_mean']:.4f}",
                f"{row['kl_p95']:.4f}",
            ]
            for row in rows
            if row["wanted_cut"] == cut
        ]
        header = ["variant", "budget", "FLOPs cut", "on test", "accuracy", "worst task, points"]
        print_table([*header, "answers changed", "KL mean", "KL p95"], table)


if __name__ == "__main__":
    main()
