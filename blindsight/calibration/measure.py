"""Run a model on prompts, and measure what every category of every head would lose on each.

The model runs its own graphs, uncompiled. The losses are measured beside each call of the
decoder's attention, see :mod:`blindsight.calibration.probe`.

Shapes: N prompts, B batch, L layers, H query heads, C categories, R regions, T tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
import transformers
from torch import nn

from blindsight.calibration.measurements import MeasurementFile, Measurements
from blindsight.calibration.prober import Prober
from blindsight.data.processors import digest_of_processor, model_inputs
from blindsight.data.rows import Sample
from blindsight.data.samples import Samples
from blindsight.files import check_target
from blindsight.fingerprints import fingerprint
from blindsight.modules import digest_of_model, in_eval_mode
from blindsight.progress import progress_bar
from blindsight.ranks import current_ranks
from blindsight.template import TemplateRule


def measure(
    model: nn.Module,
    processor: Any,
    samples: Samples,
    *,
    rule: TemplateRule,
    next_token: bool = False,
    batch_size: int = 1,
    padding_side: str = "left",
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Measurements:
    """Measure what the categories of all heads would lose on each sample.

    Args:
        model: A transformers model that reads images, with ``attn_implementation="sdpa"``. The
            model and its outputs stay as they are.
        processor: Its processor.
        samples: From :func:`~blindsight.data.samples.load_samples`.
        rule: How the images of a prompt are found, and which tokens are sinks.
        next_token: Whether to measure the effect on the next token too. This takes gradients:
            every layer is computed once more, and what attention reads and writes is kept in
            memory for all layers.
        batch_size: Prompts that run together.
        padding_side: Where the shorter prompts of a batch are padded.
        progress: See :func:`~blindsight.progress.progress_bar`.
        checkpoint: A file for what has been measured so far. If it exists, the measurement resumes
            from it; it is not removed at the end. In a :func:`~blindsight.ranks.shared_run` each
            process has a file of its own, named after this one.

    Raises:
        ValueError: A sample cannot be read, the model's attention cannot be measured, or the
            checkpoint is of another measurement; the message says which.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if checkpoint is not None:
        check_target(checkpoint, "checkpoint")
    ranks = current_ranks()
    samples.check()
    positions = ranks.positions(len(samples), batch_size)

    def probe_own() -> tuple[list[int], Measurements | None]:
        if not positions:
            return [], None
        own = samples if ranks.size == 1 else samples.take(positions)
        saved = None
        if checkpoint is not None:
            settings = {
                "process": ranks.name,
                "model": json.dumps(fingerprint(model), sort_keys=True),
                "weights": digest_of_model(model),
                "samples": own.digest(),
                "processor": digest_of_processor(processor),
                "num_samples": len(own),
                "rule": rule.to_json(),
                "next_token": next_token,
                "batch_size": batch_size,
                "padding_side": padding_side,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            saved = MeasurementFile(ranks.own(checkpoint), settings)
        prober = Prober(model, rule, next_token=next_token)

        def probe(batch: Sequence[Sample]) -> Measurements:
            return prober(model_inputs(processor, batch, padding_side=padding_side))

        # Gradients are taken, and tensors made in inference mode have none.
        with closing(prober), in_eval_mode(model), torch.inference_mode(False):
            return positions, _probe_all(own, probe, batch_size, saved, progress)

    everyone = ranks.gather(probe_own)
    found = Measurements.join([part for _, part in everyone if part is not None])
    if ranks.size == 1:
        return found
    order = torch.tensor([at for own, _ in everyone for at in own]).argsort()
    return Measurements(**{name: values[order] for name, values in found.tensors().items()})


def _probe_all(
    samples: Samples,
    probe: Callable[[Sequence[Sample]], Measurements],
    batch_size: int,
    saved: MeasurementFile | None,
    progress: bool | None,
) -> Measurements:
    """Measure samples batch by batch, resuming from a file and saving to it now and then."""
    parts = [] if saved is None else saved.load()
    done = sum(map(len, parts))
    bar = progress_bar(
        progress, total=len(samples), initial=done, desc="calibrating", unit="prompt"
    )
    try:
        with bar:
            while done < len(samples):
                batch = list(samples[done : done + batch_size])
                parts.append(probe(batch))
                done += len(batch)
                bar.update(len(batch))
                if saved is not None:
                    saved.save_now_and_then(parts)
    finally:
        if saved is not None and parts:
            saved.save(parts)
    return Measurements.join(parts)
