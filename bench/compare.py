"""Several profiles on the same questions, for the benches that choose among profiles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from blindsight.data.samples import Samples
from blindsight.evaluate import decoder_of, open_outcomes, point_of
from blindsight.evaluation.answering import answer_samples
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.summary import Summary, summarize
from blindsight.modules import in_eval_mode
from blindsight.profile import Profile


def compare(
    model: nn.Module,
    processor: Any,
    samples: Samples,
    profiles: Mapping[str, Profile],
    *,
    batch_size: int,
    checkpoint: str | os.PathLike[str],
) -> tuple[Summary, dict[str, Summary]]:
    """Answer every sample dense and with several profiles; return the summary of each.

    Args:
        profiles: By name; at least one, and all must find images by the same rule.
        model, processor, samples, batch_size, checkpoint: See
            :func:`blindsight.evaluate.evaluate`.
    """
    # Where the layers are is the model's business; two patterns may find the same.
    rules = {replace(p.rule, layer_pattern=r"(\d+)") for p in profiles.values()}
    if len(rules) != 1:
        raise ValueError(f"profiles must have one rule, got {len(rules)} among {list(profiles)}.")
    first = next(iter(profiles.values()))
    decoder = decoder_of(model, first)
    known = open_outcomes(checkpoint, decoder, processor, samples, None)
    dense = point_of(ProfileMasking(torch.zeros_like(first.categories)))
    points = {}
    for name, profile in profiles.items():
        profile.validate(model)
        points[name] = point_of(ProfileMasking(profile.categories))
    with in_eval_mode(model):
        outcomes = answer_samples(
            decoder,
            processor,
            samples,
            list({point.key: point for point in (dense, *points.values())}.values()),
            known=known,
            batch_size=batch_size,
        )
    before = outcomes[dense.key]
    found = {name: summarize(decoder, before, outcomes[p.key]) for name, p in points.items()}
    return summarize(decoder, before, before), found
