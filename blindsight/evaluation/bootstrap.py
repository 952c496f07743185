"""How certain an accuracy is: intervals of shares, and of paired differences by task.

Two maskings answer the same questions, so they are compared question by question. Tasks have equal
weight, whatever their number of questions, and each is resampled on its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95  # of all intervals
Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value, and its interval at a level of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Differences(NamedTuple):
    """What changed between two runs over the same questions.

    Attributes:
        tasks: The difference of each task.
        mean: The mean over tasks.
        worst: The lowest difference of any task. The lowest of several noisy numbers is below
            zero by chance alone, and its interval shows that.
    """

    tasks: dict[str, Estimate]
    mean: Estimate
    worst: Estimate


def share(num_right: int, num: int) -> Estimate:
    """Return a share and its interval by Wilson's score, which is right near 0 and 1 too.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    if not 0 <= num_right <= num or num == 0:
        raise ValueError(f"num_right must be 0..num of at least 1, got {num_right} of {num}.")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    found = num_right / num
    center = (found + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * np.sqrt(found * (1 - found) / num + z**2 / (4 * num**2))
    return Estimate(found, max(0.0, float(center - half)), min(1.0, float(center + half)))


def mean_over_tasks(shares: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent shares, and its interval from theirs.

    By the method of variance estimates recovery (G. Zou and A. Donner, Construction of confidence
    limits about effect measures, 2008). It is right near 0 and 1, where a bootstrap interval would
    be a single point.
    """
    values, lows, highs = (np.array(column) for column in zip(*shares, strict=True))
    mean, num = float(values.mean()), len(shares)
    low = mean - float(np.sqrt(((values - lows) ** 2).sum())) / num
    high = mean + float(np.sqrt(((highs - values) ** 2).sum())) / num
    return Estimate(mean, max(0.0, low), min(1.0, high))


def paired_differences(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    *,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Differences:
    """Return ``after - before`` by the paired bootstrap, which draws questions with both answers.

    Where no question differs, the interval is a single point, as the bootstrap only knows the
    questions it is given. The true rate of change may still be up to about 3 / n, for n questions.

    Args:
        before, after: The score of every question, by task and in the same order.
        num_resamples: How often the questions are drawn anew.
        seed: Of the draws.

    Raises:
        ValueError: The runs are not of the same questions.
    """
    sizes = [{task: len(scores) for task, scores in run.items()} for run in (before, after)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"both runs must be of the same questions, got {sizes[0]}, {sizes[1]}.")
    values = {
        task: np.asarray(after[task], dtype=float) - np.asarray(before[task], dtype=float)
        for task in before
    }
    if not values or not all(len(scores) for scores in values.values()):
        raise ValueError("every task must have at least one question, got none.")
    random = np.random.default_rng(seed)
    means = [float(np.mean(scores)) for scores in values.values()]
    drawn = np.stack(
        [
            _resampled_means(np.asarray(scores, dtype=float), random, num_resamples)
            for scores in values.values()
        ]
    )  # [tasks, resamples]
    tasks = {
        task: _estimate(value, row) for task, value, row in zip(values, means, drawn, strict=True)
    }
    mean = _estimate(float(np.mean(means)), drawn.mean(0))
    return Differences(tasks, mean, _estimate(min(means), drawn.min(0)))


def _resampled_means(scores: Floats, random: np.random.Generator, num_resamples: int) -> Floats:
    """Return the means of ``num_resamples`` samples of n of the n scores, drawn with replacement.

    Scores take few values, so the counts of each value are drawn, not the scores.
    """
    found, counts = np.unique(scores, return_counts=True)
    drawn = random.multinomial(len(scores), counts / len(scores), size=num_resamples)
    means: Floats = drawn @ found / len(scores)
    return means


def _estimate(value: float, drawn: Floats) -> Estimate:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))
