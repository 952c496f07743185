"""Summaries of the answers under one masking, and Markdown tables.

A summary has the accuracy by task with intervals, the paired difference from dense, the answers
that changed, the divergence of the next token, and exact counts of operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blindsight.cost import FLOPS_PER_PAIR
from blindsight.evaluation.bootstrap import (
    Differences,
    Estimate,
    mean_over_tasks,
    paired_differences,
    share,
)
from blindsight.evaluation.outcomes import Outcome
from blindsight.evaluation.prefill import Decoder


@dataclass(frozen=True)
class Summary:
    """What the answers under one masking amount to, compared with those of the dense model.

    Attributes:
        accuracy: The accuracy of each task.
        mean: The mean of these accuracies.
        difference: From dense, by the paired bootstrap.
        worst_task: The task with the lowest difference.
        num_changed: Answers that differ from those of the dense model.
        num_samples: All answers.
        kl_mean, kl_p95, kl_max: KL(dense || this) of the next token after the prompt, in nats.
        attention_flops, decoder_flops: Operations of all prefills together: the two matrix
            products of attention, and these with the decoder's linear layers.
    """

    accuracy: dict[str, Estimate]
    mean: Estimate
    difference: Differences
    worst_task: str
    num_changed: int
    num_samples: int
    kl_mean: float
    kl_p95: float
    kl_max: float
    attention_flops: int
    decoder_flops: int

    @property
    def changed(self) -> float:
        """Share of the answers that differ from those of the dense model."""
        return self.num_changed / self.num_samples

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Summary:
        """Return a summary from what ``dataclasses.asdict`` made of it, through JSON too."""

        def estimates(found: Mapping[str, Any]) -> dict[str, Estimate]:
            return {task: Estimate(*numbers) for task, numbers in found.items()}

        tasks, mean, worst = data["difference"]
        difference = Differences(estimates(tasks), Estimate(*mean), Estimate(*worst))
        return cls(
            **{
                **data,
                "accuracy": estimates(data["accuracy"]),
                "mean": Estimate(*data["mean"]),
                "difference": difference,
            }
        )


def by_task(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each task, with tasks in alphabetical order."""
    tasks: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        tasks.setdefault(outcome.task, []).append(outcome)
    return {task: tasks[task] for task in sorted(tasks)}


def summarize(
    decoder: Decoder,
    dense: Sequence[Outcome],
    outcomes: Sequence[Outcome],
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Summary:
    """Return the summary of some outcomes, given the dense model's on the same questions."""
    draws = {"num_resamples": num_resamples, "seed": seed}
    before, after = (
        {task: [float(row.is_right) for row in rows] for task, rows in by_task(run).items()}
        for run in (dense, outcomes)
    )
    difference = paired_differences(before, after, **draws)
    accuracy = {task: share(int(sum(right)), len(right)) for task, right in after.items()}
    kl = torch.tensor([outcome.kl for outcome in outcomes], dtype=torch.float64)
    attention = FLOPS_PER_PAIR * decoder.head_dim * sum(outcome.pairs for outcome in outcomes)
    linear = 2 * sum(outcome.rows for outcome in outcomes) * decoder.weights_per_layer
    return Summary(
        accuracy=accuracy,
        mean=mean_over_tasks(list(accuracy.values())),
        difference=difference,
        worst_task=min(difference.tasks, key=lambda task: difference.tasks[task].value),
        num_changed=sum(a.answer != b.answer for a, b in zip(dense, outcomes, strict=True)),
        num_samples=len(outcomes),
        kl_mean=float(kl.mean()),
        kl_p95=float(kl.quantile(0.95)),
        kl_max=float(kl.max()),
        attention_flops=attention,
        decoder_flops=attention + linear,
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head, numbers are on the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    dashes = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(rows[0]), line(dashes), *map(line, rows[1:])]


def percent(estimate: Estimate, *, sign: bool = False) -> str:
    """Return a share with its interval in percent, or a difference in percentage points."""
    form = "+.1f" if sign else ".1f"
    value, low, high = (format(100 * x + 0.0, form) for x in estimate)
    return f"{value} [{low}, {high}]"
