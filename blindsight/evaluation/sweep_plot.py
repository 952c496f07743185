"""The plot of a sweep."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import replace

from blindsight.evaluation.bootstrap import Estimate
from blindsight.evaluation.sweep_points import (
    BY_ERROR,
    BY_HEAD,
    BY_LAYER,
    OWN,
    PRUNING,
    RANDOM,
    WINDOW,
)
from blindsight.evaluation.sweep_result import Sweep, SweepPoint
from blindsight.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Curve, Panel, plot_curves

_LOOKS = {
    BY_HEAD: ("category by head", BLUE),
    BY_LAYER: ("category by layer", ORANGE),
    BY_ERROR: ("by head, from\nits own error", SKY),
    RANDOM: ("same categories,\nrandom heads", GREY),
    WINDOW: ("sliding window\n+ sink", GREEN),
    PRUNING: ("image tokens\ndropped", PURPLE),
}


def plot_sweep(sweep: Sweep, path: str | os.PathLike[str]) -> None:
    """Draw accuracy, the task that loses most, the KL divergence, and prefill time if measured."""
    dense = 100 * sweep.dense.scores[0].value
    panels = [
        Panel(
            "Accuracy, mean of the tasks (%)",
            _curves(sweep, lambda p: _scaled(p.summary.scores[1].mean, dense), dense),
            dense,
            marks=_own(sweep, lambda p: dense + 100 * p.summary.scores[1].mean.value),
        ),
        Panel(
            "Task that loses most, difference from dense (percentage points)",
            _curves(sweep, lambda p: _scaled(p.summary.scores[1].worst, 0.0), 0.0),
            0.0,
            marks=_own(sweep, lambda p: 100 * p.summary.scores[1].worst.value),
        ),
    ]
    kl = [_positive(curve) for curve in _curves(sweep, _kl, 0.0)]
    if kl := [curve for curve in kl if len(curve.x)]:
        title = "KL of the next token from dense (nats, mean; 0, as of dense, is below the axis)"
        marks = [mark for mark in _own(sweep, lambda p: p.summary.kl_mean) if mark[1] > 0]
        panels.append(Panel(title, kl, is_log=True, marks=marks))
    timed = [point for point in sweep.series(BY_HEAD) if point.timing is not None]
    if timed:
        panels.append(_time_panel(sweep, timed))
    number, tasks = sum(sweep.num_questions.values()), len(sweep.num_questions)
    plot_curves(
        panels,
        path,
        title="What is left of the answers when attention is sparse",
        subtitle=f"{number} questions, {tasks} tasks. Dashed: dense. Blue band: 95 %, paired "
        "bootstrap against dense.\nGrey band: range of the random draws."
        + (" Ring: the profile that was given." if sweep.series(OWN) else ""),
        x_label="attention FLOPs of prefill, share of dense",
    )


def _curves(sweep: Sweep, measure: Callable[[SweepPoint], Estimate], dense: float) -> list[Curve]:
    curves = []
    for series, (label, color) in _LOOKS.items():
        points = sweep.series(series)
        if not points:
            continue
        x, estimates = [100.0], [Estimate(dense, dense, dense)]
        for share, found in _by_cost(sweep, points, measure):
            x.append(100 * share)
            values = [estimate.value for estimate in found]
            if series == RANDOM:
                mean = statistics.fmean(values)
                estimates.append(Estimate(mean, min(values), max(values)))
            else:
                estimates.append(found[0])
        has_band = series in (BY_HEAD, RANDOM)
        value, low, high = (list(column) for column in zip(*estimates, strict=True))
        curves.append(
            Curve(
                label,
                color,
                x,
                value,
                low if has_band else (),
                high if has_band else (),
                is_main=series == BY_HEAD,
            )
        )
    return curves


def _own(sweep: Sweep, measure: Callable[[SweepPoint], float | None]) -> list[tuple[float, float]]:
    """Return where the profile that was given is, if it is not dense."""
    found = [(100 * sweep.attention_share(point), measure(point)) for point in sweep.series(OWN)]
    return [(x, y) for x, y in found if y is not None]


def _by_cost(
    sweep: Sweep, points: list[SweepPoint], measure: Callable[[SweepPoint], Estimate]
) -> list[tuple[float, list[Estimate]]]:
    """Return costs (as shares) and estimates, points of one knob together, most costly first."""
    groups: dict[float, list[SweepPoint]] = {}
    for point in points:
        groups.setdefault(point.knob, []).append(point)
    found = [
        (
            statistics.fmean(sweep.attention_share(point) for point in group),
            [measure(point) for point in group],
        )
        for group in groups.values()
    ]
    return sorted(found, key=lambda pair: -pair[0])


def _time_panel(sweep: Sweep, timed: list[SweepPoint]) -> Panel:
    x, y = [100.0], [1.0]
    num_tokens = 0
    for point in timed:
        assert point.timing is not None
        x.append(100 * sweep.attention_share(point))
        y.append(point.timing.ratio)
        num_tokens = point.timing.num_tokens
    label, color = _LOOKS[BY_HEAD]
    title = f"Prefill time, over dense (one prompt of {num_tokens:,} tokens)"
    marks = _own(sweep, lambda p: None if p.timing is None else p.timing.ratio)
    return Panel(title, [Curve(label, color, x, y, is_main=True)], 1.0, marks=marks)


def _positive(curve: Curve) -> Curve:
    """Return only the points that a logarithmic axis can show."""
    shown = [at for at, value in enumerate(curve.y) if value > 0]
    x, y, high = (
        [values[at] for at in shown if values] for values in (curve.x, curve.y, curve.high)
    )
    # A band may begin at zero, its middle does not.
    low = [max(curve.low[at], 0.1 * curve.y[at]) for at in shown if curve.low]
    return replace(curve, x=x, y=y, low=low, high=high)


def _kl(point: SweepPoint) -> Estimate:
    return Estimate(*[point.summary.kl_mean] * 3)


def _scaled(estimate: Estimate, offset: float) -> Estimate:
    return Estimate(*(offset + 100 * number for number in estimate))
