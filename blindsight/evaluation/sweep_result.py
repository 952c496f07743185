"""The result of a sweep: its points, and its tables."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from blindsight.evaluation.summary import Summary, note_on_accuracy, percent, table
from blindsight.evaluation.sweep_points import MEANINGS, OWN, PRUNING, RANDOM, WINDOW
from blindsight.evaluation.timing import Timing
from blindsight.files import write_text

_KNOBS = {WINDOW: "share asked for", PRUNING: "share asked for", OWN: "profile"}


@dataclass(frozen=True)
class SweepPoint:
    """One masking of one series.

    Attributes:
        series: One of :data:`MEANINGS`.
        knob: The budget; for ``window`` and ``pruning``, the share of dense attention asked for;
            for ``this profile``, which has no knob, 0.
        key: Key of the masking; equal maskings have equal keys.
        heads: The number of heads of each category, by name; empty for maskings without
            categories.
        seed: The seed of a random point.
        summary: What the answers amount to.
        timing: The time of prefill, if it was measured.
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
    """Accuracy over cost; printed, it is its tables in Markdown.

    :func:`blindsight.evaluation.sweep_plot.plot_sweep` draws it.

    Attributes:
        dense: The model as it is.
        points: By series, from the most to the least costly.
        num_questions: The number of questions of each task.
        conditions: What the numbers depend on.
        remarks: What else a reader must know, in sentences.
    """

    dense: Summary
    points: tuple[SweepPoint, ...]
    num_questions: dict[str, int]
    conditions: dict[str, str]
    remarks: tuple[str, ...] = ()

    def series(self, name: str) -> list[SweepPoint]:
        return [point for point in self.points if point.series == name]

    def attention_share(self, point: SweepPoint) -> float:
        """A point's attention FLOPs, as a share of dense."""
        return point.summary.attention_flops / self.dense.attention_flops

    def decoder_share(self, point: SweepPoint) -> float:
        """A point's decoder FLOPs, linear layers included, as a share of dense."""
        return point.summary.decoder_flops / self.dense.decoder_flops

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Sweep:
        """Return the sweep that :meth:`to_json` wrote."""
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
            remarks=tuple(data.get("remarks", ())),  # earlier versions made none
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``sweep.json`` and ``sweep.md``; each is written completely or not at all."""
        write_text(Path(folder) / "sweep.json", self.to_json())
        write_text(Path(folder) / "sweep.md", self.to_markdown())

    def __str__(self) -> str:
        return self.to_markdown()

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
            *note_on_accuracy(self.dense),
            *self.remarks,
            ", ".join(f"{name} {value}" for name, value in self.conditions.items()) + ".",
        ]
        return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"

    def _table(self, points: Sequence[SweepPoint]) -> list[str]:
        timed = any(point.timing is not None for point in points)
        head = [
            _KNOBS.get(points[0].series, "budget"),
            "attention",
            "decoder",
            "accuracy",
            "difference",
            "worst difference",
            "of task",
            "changed",
        ]
        rows = [[*head, "KL, nats", *(["prefill"] if timed else [])]]
        rows.append(
            [
                "dense",
                "100.0%",
                "100.0%",
                f"{100 * self.dense.scores[0].value:.1f}",
                "",
                "",
                "",
                "",
                "",
            ]
            + ([""] if timed else [])
        )
        for point in points:
            found = point.summary
            mean, difference = found.scores
            row = [
                "as given" if point.series == OWN else f"{point.knob:.4g}",
                f"{self.attention_share(point):.1%}",
                f"{self.decoder_share(point):.1%}",
                f"{100 * mean.value:.1f}",
                percent(difference.mean, sign=True),
                percent(difference.worst, sign=True),
                (found.worst_task or "") if difference.worst.value < 0 else "",
                f"{found.changed:.1%}",
                f"{found.kl_mean:.1e}",
            ]
            if timed:
                row.append("" if point.timing is None else f"{point.timing.ratio:.1%}")
            rows.append(row)
        return table(rows)

    def _random_table(self) -> list[str]:
        """Return one row for all draws at a budget: the mean, and the range in brackets."""
        groups: dict[float, list[SweepPoint]] = {}
        for point in self.series(RANDOM):
            groups.setdefault(point.knob, []).append(point)
        head = ["budget", "attention", "draws", "accuracy", "worst difference", "changed"]
        rows = [[*head, "KL, nats"]]
        for knob, group in groups.items():
            found = [point.summary for point in group]
            rows.append(
                [
                    f"{knob:.4g}",
                    f"{statistics.fmean(map(self.attention_share, group)):.1%}",
                    str(len(group)),
                    _range([summary.scores[0].value for summary in found]),
                    _range([summary.scores[1].worst.value for summary in found]),
                    f"{statistics.fmean(summary.changed for summary in found):.1%}",
                    f"{statistics.fmean(summary.kl_mean for summary in found):.1e}",
                ]
            )
        return table(rows)


def _range(values: Sequence[float]) -> str:
    mean, low, high = (100 * x + 0.0 for x in (statistics.fmean(values), min(values), max(values)))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
