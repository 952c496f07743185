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

_HARDLY_ANY = 0.05  # of the answers


@dataclass(frozen=True)
class Summary:
    """What the answers under one masking amount to, compared with those of the dense model.

    Attributes:
        accuracy: The accuracy of each task; empty where answers are neither right nor wrong, and
            the next three are None then.
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
    mean: Estimate | None
    difference: Differences | None
    worst_task: str | None
    num_changed: int
    num_samples: int
    kl_mean: float
    kl_p95: float
    kl_max: float
    attention_flops: int
    decoder_flops: int

    @property
    def scores(self) -> tuple[Estimate, Differences]:
        """The mean accuracy and the differences, of samples with answers."""
        assert self.mean is not None and self.difference is not None
        return self.mean, self.difference

    @property
    def changed(self) -> float:
        """Share of the answers that differ from those of the dense model."""
        return self.num_changed / self.num_samples

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Summary:
        """Return a summary from what ``dataclasses.asdict`` made of it, through JSON too."""

        def estimates(found: Mapping[str, Any]) -> dict[str, Estimate]:
            return {task: Estimate(*numbers) for task, numbers in found.items()}

        if data["mean"] is None:
            return cls(**data)
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
    accuracy: dict[str, Estimate] = {}
    difference = None
    if all(row.is_right is not None for row in (*dense, *outcomes)):
        before, after = (
            {
                task: [float(bool(row.is_right)) for row in rows]
                for task, rows in by_task(run).items()
            }
            for run in (dense, outcomes)
        )
        difference = paired_differences(before, after, num_resamples=num_resamples, seed=seed)
        accuracy = {task: share(int(sum(right)), len(right)) for task, right in after.items()}
    kl = torch.tensor([outcome.kl for outcome in outcomes], dtype=torch.float64)
    attention = FLOPS_PER_PAIR * decoder.head_dim * sum(outcome.pairs for outcome in outcomes)
    linear = 2 * sum(outcome.rows for outcome in outcomes) * decoder.weights_per_layer
    return Summary(
        accuracy=accuracy,
        mean=mean_over_tasks(list(accuracy.values())) if accuracy else None,
        difference=difference,
        worst_task=None if difference is None else _lowest(difference.tasks),
        num_changed=sum(a.answer != b.answer for a, b in zip(dense, outcomes, strict=True)),
        num_samples=len(outcomes),
        kl_mean=float(kl.mean()),
        kl_p95=float(kl.quantile(0.95)),
        kl_max=float(kl.max()),
        attention_flops=attention,
        decoder_flops=attention + linear,
    )


def note_on_accuracy(dense: Summary) -> list[str]:
    """Return a note where the dense model is so often wrong that differences say nothing."""
    if dense.mean is None or dense.mean.value > _HARDLY_ANY:
        return []
    return [
        f"The dense model is right in {100 * dense.mean.value:.1f} % only: the difference says "
        "nothing then. An answer is right if it equals the expected one, but for case and spaces: "
        "ask for answers in that form, or give evaluate() of Python another is_right."
    ]


def _scores_by_task(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    tasks = by_task(outcomes)
    return {task: [float(bool(row.is_right)) for row in rows] for task, rows in tasks.items()}


def _lowest(tasks: Mapping[str, Estimate]) -> str:
    return min(tasks, key=lambda task: tasks[task].value)


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
