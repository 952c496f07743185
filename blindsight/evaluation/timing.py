"""Prefill by the compiled model: how long it takes, and that it is what the masks mean."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from blindsight.data.processors import model_inputs
from blindsight.data.samples import Samples
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.outcomes import Outcome, OutcomeFile
from blindsight.evaluation.prefill import Batch, CompiledDecoder, Decoder
from blindsight.profile import Profile
from blindsight.ranks import current_ranks
from blindsight.runtime.inner import name_for_files
from blindsight.timer import wait_for


@dataclass(frozen=True)
class Timing:
    """Prefill of one prompt, compiled, dense and sparse in turn, in seconds.

    Attributes:
        num_tokens: Of the prompt, the longest of the questions.
        compiled: What was, ``"decoder"`` or ``"whole model"``, images included.
        inner: What compiled the graphs.
        dense, sparse: Each run.
        runs: How the attention of the sparse runs ran, for example ``"sparse, sorted, split"``.
        distance: Largest difference of the last logits between compiled and explicit masks.
        rounding: The same for the dense model: what rounding alone does.
    """

    num_tokens: int
    compiled: str
    inner: str
    dense: tuple[float, ...]
    sparse: tuple[float, ...]
    runs: tuple[str, ...]
    distance: float
    rounding: float

    @property
    def ratio(self) -> float:
        """The median sparse prefill, over the median dense one."""
        return statistics.median(self.sparse) / statistics.median(self.dense)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        tuples = {name: tuple(data[name]) for name in ("dense", "sparse", "runs")}
        return cls(**{**data, **tuples})


def time_prefill(
    decoder: Decoder,
    batch: Batch,
    profile: Profile,
    *,
    inner: str | Callable[..., Any] = "inductor",
    repeats: int = 5,
) -> Timing:
    """Compile the decoder for one batch, check it, and time it, dense and sparse in turn.

    Raises:
        ValueError: Compiled logits differ from those with explicit masks by more than rounding.
    """
    compiled = CompiledDecoder(decoder, profile, inner=inner)
    try:
        found = {dense: compiled.prefill(batch, dense=dense).logits for dense in (True, False)}
        masks = ProfileMasking(profile.categories).masks(batch.prompt)
        explicit = {
            True: decoder.prefill(batch, None).logits,
            False: decoder.prefill(batch, masks).logits,
        }
        rounding, distance = (
            float((found[dense] - explicit[dense]).double().abs().max()) for dense in (True, False)
        )
        check_distance(distance, rounding, explicit[False])
        before = _runs(compiled)
        compiled.prefill(batch, dense=False)
        runs = tuple(
            sorted(how for how, number in _runs(compiled).items() if number > before.get(how, 0))
        )
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for at in range(2 * repeats):
            dense = at % 2 == 0
            wait_for(*decoder.devices)
            begin = time.perf_counter()
            compiled.prefill(batch, dense=dense)
            wait_for(*decoder.devices)
            seconds[dense].append(time.perf_counter() - begin)
        return Timing(
            num_tokens=int(batch.prompt.num_tokens.max()),
            compiled="whole model" if compiled.compiles_whole(batch) else "decoder",
            inner=compiled.backend.inner.name,
            dense=tuple(seconds[True]),
            sparse=tuple(seconds[False]),
            runs=runs,
            distance=distance,
            rounding=rounding,
        )
    finally:
        compiled.close()


def time_prefill_once(
    known: OutcomeFile,
    decoder: Decoder,
    batch: Callable[[], Batch],
    profile: Profile,
    *,
    inner: str | Callable[..., Any],
    repeats: int,
) -> Timing:
    """Return what :func:`time_prefill` does, or what the file of this run knows of it already.

    Where processes share the run, the first measures; the others wait, and leave it the machine.

    Args:
        known: Where the timing is looked up, and noted.
        batch: Returns the prompt; called only to measure.
        decoder, profile, inner, repeats: See :func:`time_prefill`.

    Raises:
        ValueError: See :func:`time_prefill`.
    """
    name = f"prefill of {profile.digest} by {name_for_files(inner)}, {repeats} times"
    if name not in known.notes:

        def measure() -> Timing:
            return time_prefill(decoder, batch(), profile, inner=inner, repeats=repeats)

        known.note(name, asdict(current_ranks().on_first(measure)))
    return Timing.from_dict(known.notes[name])


def check_distance(distance: float, rounding: float, logits: torch.Tensor) -> None:
    """Check that compiled logits are those with explicit masks.

    The masks being equal, both do the same sums in another order, as they do for the dense model,
    whose difference says what that is worth; a few units of the last place for where it is zero.

    Raises:
        ValueError: They differ by more than ten times that.
    """
    unit = torch.finfo(logits.dtype).eps * float(logits.abs().max())
    bound = 10 * max(rounding, 8 * unit)
    if not distance <= bound:
        raise ValueError(
            "compiled logits must be those with explicit masks, but for rounding of "
            f"{bound:.1e}, got a difference of {distance:.1e}. Please report this."
        )


def longest_prompt(
    decoder: Decoder, processor: Any, samples: Samples, outcomes: Sequence[Outcome]
) -> Batch:
    """Return the longest of the answered prompts, alone and so without padding or its mask."""
    longest = max(outcomes, key=lambda outcome: outcome.num_tokens).sample
    inputs = model_inputs(processor, [samples[longest]])
    inputs.pop("attention_mask", None)  # nothing is padded, and dense is at its fastest without
    return decoder.prepare(inputs)


def _runs(compiled: CompiledDecoder) -> dict[str, int]:
    runs: dict[str, int] = {}
    for row in compiled.backend.report().rows:
        for how, number in row.runs.items():
            runs[how] = runs.get(how, 0) + number
    return runs
