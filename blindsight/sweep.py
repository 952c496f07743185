"""Accuracy over cost, from a dense model to the sparsest profile, beside baselines.

The points of the curve are budgets of calibration. All of them answer the same questions, and none
is calibrated on those: what a budget selects follows from the evidence in the profile.

Shapes: L layers, H query heads, C categories.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.callable_modules import make_callable
from blindsight.categories import HeadCategory
from blindsight.data.samples import load_samples
from blindsight.evaluate import conditions, decoder_of, open_outcomes, point_of, remarks_on
from blindsight.evaluation.answering import answer_samples
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.outcomes import Outcome
from blindsight.evaluation.summary import by_task, summarize
from blindsight.evaluation.sweep_points import (
    BY_HEAD,
    MEANINGS,
    OWN,
    PlannedPoint,
    category_plans,
    selection_of,
    spread_budgets,
    token_plans,
)
from blindsight.evaluation.sweep_result import Sweep, SweepPoint
from blindsight.evaluation.timing import (
    NotTimedError,
    Timing,
    longest_prompt,
    time_prefill_once,
)
from blindsight.modules import in_eval_mode
from blindsight.profile import Profile


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
    num_resamples: int = 10_000,
    seed: int = 0,
    progress: bool | None = None,
) -> Sweep:
    """Answer every sample at every point of the curve.

    Args:
        model: A transformers model that reads images.
        processor: Its processor.
        samples: Questions with answers, other than those of the calibration: anything that
            :func:`~blindsight.data.samples.load_samples` takes or returns.
        profile: A profile, or its file, with the evidence of its calibration; its own categories
            are one more point.
        budgets: Budgets of calibration, in the unit of the profile's criterion; by default
            ``num_points`` of them, with costs that are spread evenly.
        num_points: About how many points the curve has; budgets that select the same are one.
        baselines: Whether to answer under the other series too.
        num_seeds: How many random points there are for each point of the curve.
        batch_size: Prompts that run together.
        max_new_tokens: The longest answer; by default as many tokens as the expected answer.
        repeats: How often prefill is timed at each point by head, dense and sparse in turn; each
            point compiles. From the first that cannot be compiled on, no point is timed, and a
            remark says why.
        inner: The backend that compiles the graphs that are timed.
        checkpoint: A file for the answers so far; an interrupted run resumes from it.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: The profile has no evidence or is for another model, the model has no vision
            part, a sample has no image or no answer, or the checkpoint is of another run.
    """
    profile, samples = Profile.of(profile), load_samples(samples)
    decoder = decoder_of(model, profile)
    select = selection_of(profile)
    if budgets is None:
        budgets = spread_budgets(profile.evidence, select, num_points)
    plans = category_plans(profile, budgets, select, num_seeds if baselines else 0, baselines)
    if bool(profile.categories.any()):
        own = ProfileMasking(profile.categories)  # answered once, if it is on the curve
        plans = [PlannedPoint(OWN, 0.0, own, profile.categories), *plans]
    known = open_outcomes(checkpoint, decoder, processor, samples, max_new_tokens)
    dense_point = point_of(ProfileMasking(torch.zeros_like(profile.categories)))

    def answer(wanted: Sequence[PlannedPoint]) -> dict[str, list[Outcome]]:
        points = {
            point.key: point for point in (dense_point, *(point_of(p.masking) for p in wanted))
        }
        return answer_samples(
            decoder,
            processor,
            samples,
            list(points.values()),
            known=known,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )

    with in_eval_mode(model):
        outcomes = answer(plans)
        dense = outcomes[dense_point.key]
        if baselines:
            # At the costs of the curve, which are known only now.
            costs = {
                _cost(outcomes[point_of(plan.masking).key]) / _cost(dense)
                for plan in plans
                if plan.series == BY_HEAD
            }
            more = token_plans(sorted(costs, reverse=True), decoder.widths)
            outcomes.update(answer(more))
            plans = [*plans, *more]
        timings: dict[str, Timing] = {}
        remarks = remarks_on(profile, samples)
        if repeats:
            batch = cache(lambda: longest_prompt(decoder, processor, samples, dense))
            for plan in plans:
                if plan.series == BY_HEAD and plan.categories is not None:
                    try:
                        timings[plan.masking.key] = time_prefill_once(
                            known,
                            decoder,
                            batch,
                            profile.with_categories(plan.categories),
                            inner=inner,
                            repeats=repeats,
                            progress=progress,
                        )
                    except NotTimedError as error:
                        remarks.append(str(error))
                        break
    known.finish()
    draws = {"num_resamples": num_resamples, "seed": seed}
    points = [
        SweepPoint(
            series=plan.series,
            knob=plan.knob,
            key=plan.masking.key,
            heads=_heads(plan.categories),
            seed=plan.seed,
            summary=summarize(decoder, dense, outcomes[point_of(plan.masking).key], **draws),
            timing=timings.get(plan.masking.key) if plan.series in (BY_HEAD, OWN) else None,
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
        remarks=tuple(remarks),
    )


def _cost(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.pairs for outcome in outcomes)


def _heads(categories: Tensor | None) -> dict[str, int]:
    if categories is None:
        return {}
    codes = categories.flatten().tolist()
    return {category.name: codes.count(category) for category in HeadCategory}


make_callable(__name__)
