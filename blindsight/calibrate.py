"""Calibrate a profile: measure a model on prompts, and choose a category for every head.

How much a category changes a head's own output says little about the answer. That depends on what
later layers read from the output: in the last layer, nothing reads the rows of image tokens. So
the budget limits the effect on the token after the prompt, to first order: the change of each
head's output times the gradient of the log-probabilities of the likeliest tokens. The error of the
output and the attention mass that is hidden are measured as well; either can be the criterion
instead.

Shapes: N prompts, L layers, H query heads, C categories, R regions.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.calibration.measure import measure
from blindsight.calibration.measurements import Measurements
from blindsight.calibration.probe_layout import NUM_OFFSETS
from blindsight.calibration.selection import ALLOCATIONS, CRITERIA, check_budget, select_categories
from blindsight.callable_modules import make_callable
from blindsight.categories import HeadCategory
from blindsight.configs import check_has_vision, config_of
from blindsight.data.samples import load_samples
from blindsight.error_text import check_choice
from blindsight.fingerprints import fingerprint, widths_of
from blindsight.profile import Profile
from blindsight.progress import graph_breaks_hidden
from blindsight.runtime.context import BlindsightWarning
from blindsight.template import TemplateRule

__all__ = [
    "calibrate",
    "evidence_of",
    "few_prompts",
    "find_sink_offsets",
    "flops_cut",
    "profile_of",
    "rule_of",
    "select_categories",
]

AGGREGATES = ("quantile", "mean")
CRITERION, QUANTILE = "next_token", 0.95
BUDGETS = {"next_token": 0.005, "output_error": 0.1, "attention_mass": 0.1}  # defaults

_LAST_OFFSET = 2**20  # longer than any span: offsets are clipped, so this is the last token
_SINK_PROMPTS = 8  # prompts that suffice to see where the sinks are
_MAX_SINKS = 2


@graph_breaks_hidden()
def calibrate(
    model: nn.Module,
    processor: Any,
    samples: Any,
    *,
    budget: float | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    batch_size: int = 1,
    criterion: str = CRITERION,
    aggregate: str = "quantile",
    quantile: float = QUANTILE,
    allocation: str = "per_head",
    sink_offsets: tuple[int, ...] | str | None = None,
    rule: TemplateRule | None = None,
    padding_side: str = "left",
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Profile:
    """Measure a model on prompts with several images or videos, and return a profile for it.

    Every head gets the cheapest category that moves the next token by no more than the budget.
    The model itself is not changed.

    Args:
        model: A transformers model that reads images, with ``attn_implementation="sdpa"``.
        processor: Its processor, see :func:`~blindsight.data.processors.load_processor`.
        samples: The prompts: anything that :func:`~blindsight.data.samples.load_samples` takes or
            returns.
        budget: The most that any one head may lose; the one setting to tune. 0 allows only what
            changes nothing, infinity gives the sparsest profile. By default, the square root of
            the KL divergence of the next token after the prompt, in nats; with
            ``criterion="output_error"``, the change of the head's own output in the rows of all
            images but the first, relative to its norm.
        num_samples: How many samples to use at most; by default all of them.
        seed: Seed that draws the samples in random order; by default the first ones are taken, in
            their order.
        batch_size: Prompts that run together; results differ by rounding only.
        criterion, allocation: See :func:`~blindsight.calibration.selection.select_categories`.
            ``"next_token"`` takes gradients: see :func:`~blindsight.calibration.measure.measure`.
        aggregate: How the losses on all prompts become one number: ``"quantile"``, the loss that
            this share of the prompts does not exceed, so that a rare prompt that needs attention
            between images counts; or ``"mean"``.
        quantile: The share of the prompts, 0..1.
        sink_offsets: Which tokens of an image are sinks, counted from its first token; or
            ``"measure"``: those that other images attend to most. By default those of the rule.
        rule: How images are found; by default what the model's family needs.
        padding_side: Where the shorter prompts of a batch are padded.
        progress: See :func:`~blindsight.progress.progress_bar`.
        checkpoint: A file for what has been measured so far. An interrupted calibration that is
            started again with the same arguments resumes from it, and ends in the same profile.

    Raises:
        ValueError: An argument is malformed, a sample cannot be read, no prompt has two images, or
            the model's attention cannot be measured; the message says which.

    Warns:
        BlindsightWarning: There are fewer prompts with several images than ``quantile`` can tell
            apart: 20 for 0.95.
    """
    _check_options(budget, criterion, aggregate, quantile, allocation, sink_offsets)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    rule = rule_of(model, processor) if rule is None else rule
    samples = load_samples(samples, limit=num_samples, seed=seed)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "padding_side": padding_side,
        "progress": progress,
    }
    if isinstance(sink_offsets, str):
        place = None if checkpoint is None else f"{os.fspath(checkpoint)}.sinks"
        few = samples[:_SINK_PROMPTS]
        found = measure(model, processor, few, rule=rule, checkpoint=place, **options)
        rule = replace(rule, sink_offsets=find_sink_offsets(found))
    elif sink_offsets is not None:
        rule = replace(rule, sink_offsets=sink_offsets)
    options["next_token"] = criterion == "next_token"
    measurements = measure(model, processor, samples, rule=rule, checkpoint=checkpoint, **options)
    profile = profile_of(
        model,
        measurements,
        rule=rule,
        budget=budget,
        criterion=criterion,
        aggregate=aggregate,
        quantile=quantile,
        allocation=allocation,
        calibration={"dataset": samples.name, "seed": str(seed)},
    )
    if what := few_prompts(profile.calibration):
        warnings.warn(what, BlindsightWarning, stacklevel=2)
    return profile


def profile_of(
    model: Any,
    measurements: Measurements,
    *,
    rule: TemplateRule,
    budget: float | None = None,
    criterion: str = CRITERION,
    aggregate: str = "quantile",
    quantile: float = QUANTILE,
    allocation: str = "per_head",
    calibration: Mapping[str, str] | None = None,
) -> Profile:
    """Return the profile that measurements lead to; see :func:`calibrate`.

    Args:
        model: The model, or its config.
        measurements: From :func:`~blindsight.calibration.measure.measure`.
        rule: The rule that the measurements were made with.
        budget, criterion, aggregate, quantile, allocation: See :func:`calibrate`.
        calibration: Notes to keep in the profile, such as where the measurements are from.
    """
    _check_options(budget, criterion, aggregate, quantile, allocation, None)
    budget = BUDGETS[criterion] if budget is None else budget
    evidence = evidence_of(measurements, aggregate=aggregate, quantile=quantile)
    _, widths = widths_of(fingerprint(model))
    # A pair of a wider head costs more.
    evidence["pairs"] = evidence["pairs"] * torch.tensor(widths)[:, None, None]
    categories = select_categories(evidence, budget, criterion=criterion, allocation=allocation)
    evidence["margin"] = budget - evidence[CRITERIA[criterion]]
    noted = {
        **(calibration or {}),
        "num_samples": str(len(measurements)),
        "num_samples_used": str(int((measurements.num_rows > 0).sum())),
        "budget": repr(float(budget)),
        "criterion": criterion,
        "aggregate": aggregate,
        "quantile": repr(float(quantile)) if aggregate == "quantile" else "none",
        "allocation": allocation,
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    profile = Profile.for_model(model, categories, rule=rule)
    return replace(profile, evidence=evidence, calibration=noted)


def evidence_of(
    measurements: Measurements, *, aggregate: str = "quantile", quantile: float = QUANTILE
) -> dict[str, Tensor]:
    """Return the evidence that a profile keeps of its measurements.

    Returns:
        Tensors float32, by name. ``error``, ``lost_mass`` and, where it was measured, ``effect``,
        each ``[L, H, C]``, are aggregated over prompts; ``error_spread``, ``[L, H, C]``, is the
        standard deviation over prompts; ``pairs``, ``[L, H, C]``, ``mass``, ``[L, H, R]``, and
        ``offset_mass``, ``[L, H, NUM_OFFSETS + 1]``, are means over prompts.

    Raises:
        ValueError: No prompt has two images.
    """
    used = measurements.num_rows > 0
    if not bool(used.any()):
        raise ValueError(
            "prompts must have at least two images, or frames of a video, got fewer in all of "
            f"{len(measurements)} samples. With one every category is dense: calibrate on other "
            "prompts."
        )
    error, lost = measurements.error[used], measurements.lost_mass[used]
    num_heads = error.shape[2]
    pairs = measurements.pairs[used].double().mean(0)[:, None].expand(-1, num_heads, -1)
    effect = measurements.effect[used]
    evidence = {
        "error": _aggregate(error, aggregate, quantile),
        "error_spread": error.double().std(0, correction=0),
        "lost_mass": _aggregate(lost, aggregate, quantile),
        "mass": measurements.mass[used].double().mean(0),
        "offset_mass": measurements.offset_mass[used].double().mean(0),
        "pairs": pairs,
    }
    if not bool(effect.isnan().any()):
        evidence["effect"] = _aggregate(effect, aggregate, quantile)
    return {name: tensor.float().contiguous() for name, tensor in evidence.items()}


def _aggregate(values: Tensor, aggregate: str, quantile: float) -> Tensor:
    """Return one value for the N of ``[N, ...]``; a quantile is the value of one of them."""
    if aggregate == "mean":
        return values.double().mean(0)
    return values.sort(dim=0).values[math.ceil(quantile * (len(values) - 1))]


def find_sink_offsets(measurements: Measurements) -> tuple[int, ...]:
    """Return the offsets of the tokens of an image that other images attend to most.

    These are the token with the most attention, and another one if it gets at least half as much.

    Raises:
        ValueError: No prompt has two images.
    """
    used = measurements.num_rows > 0
    if not bool(used.any()):
        raise ValueError(
            "sink_offsets='measure' must find a prompt with two images, or frames of a video, "
            f"among the first {len(used)}, got none. Put some first, choose others by seed, or "
            "give the offsets."
        )
    mass = measurements.offset_mass[used].double().mean((0, 1, 2))
    by_mass = mass.sort(descending=True, stable=True).indices.tolist()[:_MAX_SINKS]
    chosen = [at for at in by_mass if mass[at] >= mass[by_mass[0]] / 2]
    return tuple(sorted(_LAST_OFFSET if at == NUM_OFFSETS else at for at in chosen))


def few_prompts(calibration: Mapping[str, str]) -> str:
    """Return a warning if a profile rests on fewer prompts than its quantile can tell; else "".

    Args:
        calibration: The notes of a profile on its calibration.
    """
    noted = calibration.get("quantile", "none")
    if noted == "none" or "num_samples_used" not in calibration or float(noted) == 1:
        return ""
    used, needed = int(calibration["num_samples_used"]), 1 / (1 - float(noted))
    if used > needed - 1e-6:
        return ""
    return (
        f"Only {used} prompt{'s' * (used != 1)} with several images counted, and what "
        f"{float(noted):.0%} of all prompts stay within takes {math.ceil(needed - 1e-6)} to tell: "
        "others may lose more than the budget. Calibrate on more."
    )


def flops_cut(profile: Profile) -> float:
    """Return the share of attention's pairs that a calibrated profile leaves out, 0..1."""
    pairs = profile.evidence["pairs"].double()
    chosen = pairs.gather(2, profile.categories.long()[..., None])
    return 1 - float(chosen.sum() / pairs[..., HeadCategory.DENSE].sum())


def rule_of(model: nn.Module, processor: Any = None) -> TemplateRule:
    """Return the rule that finds the images in a model's prompts.

    Args:
        model: The model.
        processor: Its processor or tokenizer; see :meth:`~blindsight.TemplateRule.from_config`.

    Raises:
        ValueError: The model reads no images, or its family is not known.
    """
    check_has_vision(model)
    return TemplateRule.from_config(config_of(model), processor)


def _check_options(
    budget: object,
    criterion: str,
    aggregate: str,
    quantile: float,
    allocation: str,
    sink_offsets: tuple[int, ...] | str | None,
) -> None:
    check_choice("criterion", criterion, CRITERIA)
    check_choice("aggregate", aggregate, AGGREGATES)
    check_choice("allocation", allocation, ALLOCATIONS)
    if budget is not None:
        check_budget(budget)
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in 0..1, got {quantile}.")
    if isinstance(sink_offsets, str) and sink_offsets != "measure":
        raise ValueError(f"sink_offsets must be ints or 'measure', got {sink_offsets!r}.")


make_callable(__name__)
