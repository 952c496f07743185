"""Refine a profile by trial: run the model with a category in one head, or one layer, at a time.

Calibration estimates, to first order, how far a category moves the next token after the prompt.
Refinement measures it, as the KL divergence of the next token between the dense model and the
trial. That is exact for a single head or layer, but takes one forward of the decoder per trial.

Shapes: L layers, H query heads, C categories.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.calibration.selection import check_evidence
from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.data.processors import model_inputs
from blindsight.data.samples import Samples, load_samples
from blindsight.error_text import check_choice
from blindsight.evaluation.answering import divergence
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.prefill import Decoder
from blindsight.modules import in_eval_mode
from blindsight.profile import Profile
from blindsight.progress import progress_bar

CRITERION = "next_token"  # its evidence is called "effect"
UNITS = ("head", "layer")


def refine(
    model: nn.Module,
    processor: Any,
    samples: Any,
    profile: Profile | str | os.PathLike[str],
    *,
    budget: float,
    by: str = "head",
    batch_size: int = 8,
    progress: bool | None = None,
) -> Profile:
    """Return a calibrated profile whose categories are chosen by their measured effect.

    Args:
        model: A transformers model that reads images.
        processor: Its processor.
        samples: Prompts to try categories on, such as those of the calibration: anything that
            :func:`~blindsight.data.samples.load_samples` takes or returns. Answers are not used.
        profile: A profile, or its file, with the evidence ``error`` and ``pairs``.
        budget: The most that any one head may change the next token, as the square root of the
            mean KL divergence in nats; see
            :func:`~blindsight.calibration.selection.select_categories`.
        by: ``"head"`` tries every category of every head: L * H * (C - 1) prefills per prompt.
            ``"layer"`` tries SINK in all heads of a layer, L prefills per prompt, and distributes
            the layer's divergence over its heads and their categories by their squared errors.
        batch_size: Prompts that run together.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: The profile has no evidence or is for another model, or an argument is
            malformed.
    """
    profile, samples = Profile.of(profile), load_samples(samples)
    check_choice("by", by, UNITS)
    check_evidence(profile.evidence)
    profile.validate(model)
    decoder = Decoder(model, profile)
    trials = _trials(profile, by)
    with in_eval_mode(model):
        found = mean_divergence(
            decoder, processor, samples, trials, batch_size=batch_size, progress=progress
        )
    effect = _by_head(found, profile) if by == "head" else _by_layer(found, profile)
    noted = {
        **profile.calibration,
        "effect": f"by {by}, {len(samples)} prompts",
        "refinement_dataset": samples.name,
    }
    for name in ("aggregate", "quantile"):
        noted.pop(name, None)  # they describe the error, which no longer decides
    evidence = {**profile.evidence, "effect": effect}
    return reselect(replace(profile, evidence=evidence, calibration=noted), budget)


def reselect(profile: Profile, budget: float) -> Profile:
    """Return a refined profile with the categories that another budget selects.

    Nothing is measured again.

    Raises:
        ValueError: The profile was not refined, or the budget is negative.
    """
    noted = {**profile.calibration, "criterion": CRITERION}
    return replace(profile, calibration=noted).at_budget(budget)


def mean_divergence(
    decoder: Decoder,
    processor: Any,
    samples: Samples,
    trials: Sequence[Tensor],
    *,
    batch_size: int = 8,
    progress: bool | None = None,
) -> Tensor:
    """Return KL(dense || trial) of the next token, its mean over the samples, ``[len(trials)]``.

    Args:
        decoder: The model.
        processor: Its processor.
        samples: Prompts.
        trials: The category codes ``[L, H]`` of each trial.
        batch_size: Prompts that run together.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    total = torch.zeros(len(trials), dtype=torch.float64)
    with progress_bar(progress, total=len(samples) * len(trials), unit="trial") as bar:
        for begin in range(0, len(samples), batch_size):
            chosen = [samples[at] for at in range(begin, min(begin + batch_size, len(samples)))]
            batch = decoder.prepare(model_inputs(processor, chosen))
            dense = decoder.prefill(batch, None).logits
            for at, categories in enumerate(trials):
                masks = ProfileMasking(categories).masks(batch.prompt)
                total[at] += divergence(dense, decoder.prefill(batch, masks).logits).sum().cpu()
                bar.update(len(chosen))
    return total / len(samples)


def _trials(profile: Profile, by: str) -> list[Tensor]:
    trials = []
    for layer in profile.layers:
        if by == "layer":
            tried = torch.zeros_like(profile.categories)
            tried[layer] = HeadCategory.SINK
            trials.append(tried)
            continue
        for head in range(profile.num_heads):
            for code in range(1, NUM_CATEGORIES):
                tried = torch.zeros_like(profile.categories)
                tried[layer, head] = code
                trials.append(tried)
    return trials


def _by_head(found: Tensor, profile: Profile) -> Tensor:
    tried = found.view(len(profile.layers), profile.num_heads, NUM_CATEGORIES - 1)
    effect = torch.zeros(*profile.categories.shape, NUM_CATEGORIES)
    effect[list(profile.layers), :, 1:] = tried.sqrt().float()
    return effect


def _by_layer(found: Tensor, profile: Profile) -> Tensor:
    squares = profile.evidence["error"].double() ** 2
    of_layer = squares[:, :, HeadCategory.SINK].sum(1)
    # If the heads of a layer lose nothing, there is nothing to distribute.
    of_trial = torch.zeros_like(of_layer)
    of_trial[list(profile.layers)] = found
    weight = torch.where(of_layer > 0, of_trial / of_layer.clamp(min=1e-300), 0.0)
    effect = (squares * weight[:, None, None]).sqrt().float()
    effect[:, :, HeadCategory.DENSE] = 0.0
    return effect
