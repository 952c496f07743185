"""The curve: accuracy over cost, from nothing sparse to everything, and what it is compared with.

The knob is the budget of calibration. Every point answers the same questions, and no point is
ever calibrated on them: what a budget selects follows from the evidence in the profile.

Shapes: L layers, H query heads, C categories.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.categories import HeadCategory
from blindsight.data.samples import as_samples
from blindsight.evaluate import conditions, decoder_of, run_header
from blindsight.evaluation.masked_model import Masking, ProfileMasking
from blindsight.evaluation.outcomes import Checkpoint, Outcome, Point, answer_samples, write_text
from blindsight.evaluation.summary import Summary, by_task, percent, summarize, table
from blindsight.evaluation.sweep_points import (
    BY_HEAD,
    MEANINGS,
    RANDOM,
    Plan,
    Select,
    category_plans,
    selection_of,
    spread_budgets,
    token_plans,
)
from blindsight.evaluation.timing import Timing, longest_prompt, time_prefill
from blindsight.modules import in_eval_mode
from blindsight.profile import Profile
from blindsight.runtime.inner import name_of


@dataclass(frozen=True)
class SweepPoint:
    """One masking of one series.

    Attributes:
        series: One of :data:`MEANINGS`.
        knob: The budget; for ``window`` and ``pruning`` the share of dense attention asked for.
        key: Of the masking; equal maskings have equal keys.
        heads: How many heads have which category, by name; empty where there are none.
        seed: Of a random point.
        summary: What the answers amount to.
        timing: Prefill, where it was measured.
    """

    series: str
    knob: float
    key: str
    heads: dict[str, int]
    seed: int | None
    summary: Summary
    timing: Timing | None = None


@dataclass(frozen=True)
class Sweep:
    """The curve; ``to_markdown()`` is its tables, ``plot()`` its picture.

    Attributes:
        dense: The model as it is.
        points: By series, from the most to the least costly.
        num_questions: By task.
        conditions: What the numbers depend on.
    """

    dense: Summary
    points: tuple[SweepPoint, ...]
    num_questions: dict[str, int]
    conditions: dict[str, str]

    def series(self, name: str) -> list[SweepPoint]:
        return [point for point in self.points if point.series == name]

    def attention_share(self, point: SweepPoint) -> float:
        """Attention FLOPs, as a share of dense."""
        return point.summary.attention_flops / self.dense.attention_flops

    def decoder_share(self, point: SweepPoint) -> float:
        """FLOPs of the decoder, linear layers included, as a share of dense."""
        return point.summary.decoder_flops / self.dense.decoder_flops

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """Inverse of :meth:`to_json`."""
        data = json.loads(text)
        points = []
        for point in data["points"]:
            timing = point["timing"]
            parts = {
                "summary": Summary.from_dict(point["summary"]),
                "timing": None if timing is None else Timing.from_dict(timing),
            }
            points.append(SweepPoint(**{**point, **parts}))
        return cls(
            dense=Summary.from_dict(data["dense"]),
            points=tuple(points),
            num_questions=data["num_questions"],
            conditions=data["conditions"],
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``sweep.json`` and ``sweep.md``, each whole or not at all."""
        write_text(Path(folder) / "sweep.json", self.to_json())
        write_text(Path(folder) / "sweep.md", self.to_markdown())

    def to_markdown(self) -> str:
        lines = []
        for series, meaning in MEANINGS.items():
            if points := self.series(series):
                rows = self._random_table() if series == RANDOM else self._table(points)
                lines += [f"**{series}**: {meaning}", "", *rows, ""]
        number, tasks = sum(self.num_questions.values()), len(self.num_questions)
        notes = [
            f"{number} questions, {tasks} tasks. Accuracy in percent, mean of the tasks; in "
            "brackets 95 % intervals: of the difference from dense by the paired bootstrap, in "
            "percentage points. The task that loses most is the lowest of several noisy numbers, "
            "so it is below zero by chance alone.",
            "FLOPs are exact, of all prefills together, as shares of dense: attention's two matrix "
            "products, and those with the decoder's weights. Dropping tokens saves their linear "
            "layers too, masking does not.",
            ", ".join(f"{name} {value}" for name, value in self.conditions.items()) + ".",
        ]
        return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"

    def _table(self, points: Sequence[SweepPoint]) -> list[str]:
        timed = any(point.timing is not None for point in points)
        head = [
            "knob",
            "attention",
            "decoder",
            "accuracy",
            "difference",
            "worst task",
            "",
            "changed",
        ]
        rows = [[*head, "KL, nats", *(["prefill"] if timed else [])]]
        rows.append(
            ["dense", "100.0%", "100.0%", f"{100 * self.dense.mean.value:.1f}", "", "", "", "", ""]
            + ([""] if timed else [])
        )
        for point in points:
            found = point.summary
            row = [
                f"{point.knob:.4g}",
                f"{self.attention_share(point):.1%}",
                f"{self.decoder_share(point):.1%}",
                f"{100 * found.mean.value:.1f}",
                percent(found.difference.mean, sign=True),
                percent(found.difference.worst, sign=True),
                found.worst_task if found.difference.worst.value < 0 else "",
                f"{found.changed:.1%}",
                f"{found.kl_mean:.1e}",
            ]
            rows.append([*row, *([_ratio(point.timing)] if timed else [])])
        return table(rows)

    def _random_table(self) -> list[str]:
        """One row for all draws at a budget: their mean, and in brackets their range."""
        groups: dict[float, list[SweepPoint]] = {}
        for point in self.series(RANDOM):
            groups.setdefault(point.knob, []).append(point)
        rows = [["knob", "attention", "draws", "accuracy", "worst task", "changed", "KL, nats"]]
        for knob, group in groups.items():
            found = [point.summary for point in group]
            rows.append(
                [
                    f"{knob:.4g}",
                    f"{statistics.fmean(map(self.attention_share, group)):.1%}",
                    str(len(group)),
                    _range([summary.mean.value for summary in found]),
                    _range([summary.difference.worst.value for summary in found]),
                    f"{statistics.fmean(summary.changed for summary in found):.1%}",
                    f"{statistics.fmean(summary.kl_mean for summary in found):.1e}",
                ]
            )
        return table(rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the curve, as PNG, PDF or SVG by the path's ending.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from blindsight.evaluation.sweep_plot import plot_sweep

        plot_sweep(self, path)


def sweep(
    model: nn.Module,
    processor: Any,
    samples: Any,
    profile: Profile | str | os.PathLike[str],
    *,
    budgets: Sequence[float] | None = None,
    num_points: int = 12,
    baselines: bool = True,
    num_seeds: int = 3,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    repeats: int = 0,
    inner: str | Callable[..., Any] = "inductor",
    checkpoint: str | os.PathLike[str] | None = None,
    select: Select | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    progress: bool = False,
) -> Sweep:
    """Answer every sample under every point of the curve.

    Args:
        model: A transformers model that reads images.
        processor: Its processor.
        samples: Questions with answers, others than those of calibration.
        profile: With evidence; its own categories are not looked at.
        budgets: Of the error; by default ``num_points`` whose costs spread evenly.
        num_points: Of the curve, about: budgets that select the same are one.
        baselines: Whether to answer under the other series too.
        num_seeds: Random points for each point of the curve.
        batch_size: Prompts at once.
        max_new_tokens: Of an answer; by default as many tokens as the expected one has.
        repeats: Prefills that are timed of each kind, for each point by head; each compiles.
        inner: The backend that compiles the graphs that are timed.
        checkpoint: File of what is answered already; an interrupted run goes on from it.
        select: What a budget selects; by default what calibration selects.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        progress: Whether to show a bar.

    Raises:
        ValueError: The profile has no evidence or is another model's, the model has no vision
            part, a sample has no image or no answer, or the checkpoint is of another run.
    """
    profile, samples = Profile.of(profile), as_samples(samples)
    decoder = decoder_of(model, profile)
    select = selection_of(profile) if select is None else select
    if budgets is None:
        budgets = spread_budgets(profile.evidence, select, num_points)
    plans = category_plans(profile, budgets, select, num_seeds if baselines else 0, baselines)
    known = Checkpoint(checkpoint, run_header(decoder, samples, max_new_tokens))
    dense_point = _point(ProfileMasking(torch.zeros_like(profile.categories)))

    def answer(wanted: Sequence[Plan]) -> dict[str, list[Outcome]]:
        points = {point.key: point for point in (dense_point, *(_point(p.masking) for p in wanted))}
        return answer_samples(
            decoder,
            processor,
            samples,
            list(points.values()),
            checkpoint=known,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )

    with in_eval_mode(model):
        outcomes = answer(plans)
        dense = outcomes[dense_point.key]
        if baselines:
            # At the costs that the curve turned out to have.
            costs = {
                _cost(outcomes[_point(plan.masking).key]) / _cost(dense)
                for plan in plans
                if plan.series == BY_HEAD
            }
            more = token_plans(sorted(costs, reverse=True), decoder.widths)
            outcomes.update(answer(more))
            plans = [*plans, *more]
        timings: dict[str, Timing] = {}
        if repeats:
            batch = longest_prompt(decoder, processor, samples, dense)
            for plan in plans:
                if plan.series == BY_HEAD and plan.categories is not None:
                    key = f"prefill at {plan.masking.key} by {name_of(inner)}, {repeats} times"
                    if key not in known.notes:
                        chosen = profile.with_categories(plan.categories)
                        found = time_prefill(decoder, batch, chosen, inner=inner, repeats=repeats)
                        known.note(key, asdict(found))
                    timings[plan.masking.key] = Timing.from_dict(known.notes[key])
    draws = {"num_resamples": num_resamples, "seed": seed}
    points = [
        SweepPoint(
            series=plan.series,
            knob=plan.knob,
            key=plan.masking.key,
            heads=_heads(plan.categories),
            seed=plan.seed,
            summary=summarize(decoder, dense, outcomes[_point(plan.masking).key], **draws),
            timing=timings.get(plan.masking.key) if plan.series == BY_HEAD else None,
        )
        for plan in plans
    ]
    order = list(MEANINGS)
    points.sort(key=lambda p: (order.index(p.series), -p.summary.attention_flops, p.knob))
    return Sweep(
        dense=summarize(decoder, dense, dense, **draws),
        points=tuple(points),
        num_questions={task: len(rows) for task, rows in by_task(dense).items()},
        conditions={**conditions(model, samples, seed), "evidence of profile": profile.digest[:12]},
    )


def _point(masking: Masking) -> Point:
    return Point(f"reference: {masking.key}", masking)


def _cost(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.pairs for outcome in outcomes)


def _heads(categories: Tensor | None) -> dict[str, int]:
    if categories is None:
        return {}
    codes = categories.flatten().tolist()
    return {category.name: codes.count(category) for category in HeadCategory}


def _range(values: Sequence[float]) -> str:
    mean, low, high = (100 * x + 0.0 for x in (statistics.fmean(values), min(values), max(values)))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _ratio(timing: Timing | None) -> str:
    if timing is None:
        return ""
    dense, sparse = (statistics.median(x) for x in (timing.dense, timing.sparse))
    return f"{sparse / dense:.1%}"
