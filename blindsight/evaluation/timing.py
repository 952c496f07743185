"""Time prefill by the compiled model, and check that it computes what the masks define."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blindsight.data.processors import model_inputs
from blindsight.data.samples import Samples
from blindsight.error_text import in_short
from blindsight.evaluation.compiled_decoder import CompiledDecoder
from blindsight.evaluation.outcomes import Outcome, OutcomeFile
from blindsight.evaluation.prefill import Batch, Decoder
from blindsight.profile import Profile
from blindsight.progress import progress_bar
from blindsight.ranks import current_ranks
from blindsight.runtime.inner import name_for_files
from blindsight.timer import wait_for


@dataclass(frozen=True)
class Timing:
    """Times of the prefill of one prompt, compiled, dense and sparse in turn, in seconds.

    Attributes:
        num_tokens: Length of the prompt, the longest of the questions.
        compiled: What was compiled: ``"decoder"``, or ``"whole model"`` with images included.
        inner: What compiled the graphs.
        dense, sparse: The time of each run.
        runs: How attention ran in the sparse runs, for example ``"sparse, sorted, split"``.
        distance: Largest difference of the last logits between compiled and explicit masks.
        rounding: The same for the dense model, where it is rounding alone.
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
        """The median time of sparse prefill, divided by that of dense prefill."""
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
    progress: bool | None = None,
) -> Timing:
    """Compile the decoder for one batch, check it, and time it, dense and sparse in turn.

    Args:
        decoder: The model.
        batch: The prompt.
        profile: The profile.
        inner: The backend that compiles the graphs.
        repeats: How often it runs dense, and sparse.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: Compiled logits differ from those with explicit masks by more than rounding.
    """
    compiled = CompiledDecoder(decoder, profile, inner=inner)
    # Compiling takes as long as all the rest, and cannot be told beforehand: one step of its own.
    options = {"total": 1 + 2 * repeats, "desc": "compiling to time prefill", "leave": False}
    bar = progress_bar(progress, unit="run", **options)
    try:
        distance, rounding = compiled.check(batch, profile)
        bar.update()
        bar.set_description("timing prefill")
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
            bar.update()
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
        bar.close()
        compiled.close()


class NotTimedError(Exception):
    """Prefill could not be compiled or run, and so it was not timed; the message says why."""


def time_prefill_once(
    known: OutcomeFile,
    decoder: Decoder,
    batch: Callable[[], Batch],
    profile: Profile,
    *,
    inner: str | Callable[..., Any],
    repeats: int,
    progress: bool | None = None,
) -> Timing:
    """Return the result of :func:`time_prefill`, unless the file of this run has it already.

    Of the processes that share a run, the first one measures; the others wait, and leave the
    machine to it.

    Args:
        known: The file where the timing is looked up and noted.
        batch: Returns the prompt; called only if it has to be measured.
        decoder, profile, inner, repeats, progress: See :func:`time_prefill`.

    Raises:
        ValueError: See :func:`time_prefill`.
        NotTimedError: The prompt could not be compiled or run: without a compiler, for example.
    """
    name = f"prefill of {profile.digest} by {name_for_files(inner)}, {repeats} times"
    if name not in known.notes:

        def measure() -> Timing:
            options: dict[str, Any] = {"inner": inner, "repeats": repeats, "progress": progress}
            return time_prefill(decoder, batch(), profile, **options)

        try:
            found = current_ranks().on_first(measure)
        except RuntimeError as error:  # of Dynamo, Inductor, compilers, and of a device's memory
            raise NotTimedError(
                f"Prefill was not timed, as it failed: {in_short(error).rstrip('.')}. With "
                "repeats=0 (--repeats 0) it is not tried."
            ) from error
        known.note(name, asdict(found))
    return Timing.from_dict(known.notes[name])


def longest_prompt(
    decoder: Decoder, processor: Any, samples: Samples, outcomes: Sequence[Outcome]
) -> Batch:
    """Return the longest of the answered prompts, alone, without padding or a mask for it."""
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
