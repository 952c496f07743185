"""Evaluation: ask a model the same questions as it is, and with a profile.

Accuracy is measured with explicit masks (engine ``reference``): they are the definition of a
profile, need no compiler, and work for prompts of any length. The longest prompt also runs through
``torch.compile``, to check that the result is the same, and to time prefill. Engine ``compiled``
runs every prompt through the compiled decoder, and compiles for every shape of a batch.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blindsight
from blindsight.callable_modules import make_callable
from blindsight.configs import check_has_vision
from blindsight.data.processors import digest_of_processor
from blindsight.data.samples import Samples, load_samples
from blindsight.error_text import check_choice
from blindsight.evaluation.answering import UNKNOWN_LENGTH, Judge, Point, answer_samples
from blindsight.evaluation.bootstrap import LEVEL
from blindsight.evaluation.compiled_decoder import CompiledDecoder
from blindsight.evaluation.masked_model import Masking, ProfileMasking
from blindsight.evaluation.outcomes import OutcomeFile, set_aside_finished
from blindsight.evaluation.prefill import Batch, Decoder
from blindsight.evaluation.summary import (
    Summary,
    by_task,
    note_on_accuracy,
    percent,
    summarize,
    table,
)
from blindsight.evaluation.timing import (
    NotTimedError,
    Timing,
    longest_prompt,
    time_prefill_once,
)
from blindsight.files import check_can_be_made, write_text
from blindsight.modules import digest_of_model, in_eval_mode, unwrapped
from blindsight.passes.find_shard import check_is_whole
from blindsight.profile import Profile
from blindsight.progress import graph_breaks_hidden
from blindsight.ranks import current_ranks
from blindsight.runtime.cost_model import cpu_model
from blindsight.runtime.inner import name_for_files

ENGINES = ("reference", "compiled")


@dataclass(frozen=True, repr=False)
class Evaluation:
    """A model with a profile, compared with the dense model; printed, it is its tables in Markdown.

    Attributes:
        dense, sparse: The two summaries.
        num_questions: The number of questions of each task.
        num_restricted: The number of prompts with at least two images (or frames of videos); the
            others are dense under any profile.
        timing: The time of prefill, if it was measured.
        conditions: What the numbers depend on: model, profile, dataset, versions, hardware.
        remarks: What else a reader must know, in sentences; printed below the tables.
    """

    dense: Summary
    sparse: Summary
    num_questions: dict[str, int]
    num_restricted: int
    timing: Timing | None
    conditions: dict[str, str]
    remarks: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Return the evaluation that :meth:`to_json` wrote."""
        data = json.loads(text)
        timing = data["timing"]
        return cls(
            dense=Summary.from_dict(data["dense"]),
            sparse=Summary.from_dict(data["sparse"]),
            num_questions=data["num_questions"],
            num_restricted=data["num_restricted"],
            timing=None if timing is None else Timing.from_dict(timing),
            conditions=data["conditions"],
            remarks=tuple(data.get("remarks", ())),  # earlier versions made none
        )

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        flops = self.sparse.attention_flops / self.dense.attention_flops
        accuracy = ""
        if self.dense.mean is not None and self.sparse.mean is not None:
            dense, sparse = self.dense.mean.value, self.sparse.mean.value
            accuracy = f"mean accuracy {dense:.1%} dense, {sparse:.1%} sparse, "
        return (
            f"Evaluation({sum(self.num_questions.values())} questions: {accuracy}"
            f"{self.sparse.num_changed} answers changed, {1 - flops:.1%} less attention FLOPs)"
        )

    def _repr_markdown_(self) -> str:  # what a notebook shows
        return self.to_markdown()

    def to_markdown(self) -> str:
        return "\n".join([*self._accuracy_rows(), *self._cost_rows(), "", *self._notes()]) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, or Markdown if the path ends in ``.md``, completely or not at all."""
        text = self.to_markdown() if Path(path).suffix == ".md" else self.to_json()
        write_text(path, text)

    def _accuracy_rows(self) -> list[str]:
        dense, sparse = self.dense, self.sparse
        if not sparse.accuracy:
            return []
        (dense_mean, _), (mean, difference) = dense.scores, sparse.scores
        rows = [["task", "questions", "dense", "profile", "difference"]]
        for task, number in self.num_questions.items():
            changes = difference.tasks[task]
            is_worst = task == sparse.worst_task and changes.value < 0
            name = f"{task} (worst)" if is_worst else task
            rows.append(
                [
                    name,
                    str(number),
                    percent(dense.accuracy[task]),
                    percent(sparse.accuracy[task]),
                    percent(changes, sign=True),
                ]
            )
        number = sum(self.num_questions.values())
        rows.append(
            [
                "**mean of the tasks**",
                str(number),
                percent(dense_mean),
                percent(mean),
                percent(difference.mean, sign=True),
            ]
        )
        return [*table(rows), ""]

    def _cost_rows(self) -> list[str]:
        dense, sparse = self.dense, self.sparse
        rows = [["measure", "dense", "profile", "profile / dense"]]
        for name, a, b in (
            ("attention FLOPs", dense.attention_flops, sparse.attention_flops),
            ("decoder FLOPs", dense.decoder_flops, sparse.decoder_flops),
        ):
            rows.append([name, f"{a:,}", f"{b:,}", f"{b / a:.1%}"])
        if self.timing is not None:
            before, after = map(statistics.median, (self.timing.dense, self.timing.sparse))
            name = f"prefill of {self.timing.num_tokens:,} tokens, ms"
            rows.append(
                [name, f"{1e3 * before:.1f}", f"{1e3 * after:.1f}", f"{self.timing.ratio:.1%}"]
            )
        rows.append(["answers changed", "", f"{sparse.num_changed:,}", f"{sparse.changed:.1%}"])
        kl = f"{sparse.kl_mean:.2e} (95th percentile {sparse.kl_p95:.2e}, max {sparse.kl_max:.2e})"
        rows.append(["KL of the next token, mean, nats", "0", kl, ""])
        return table(rows)

    def _rule(self) -> str:
        if not self.sparse.accuracy:
            return "The samples have no answers, so accuracy is left out."
        judged = self.conditions.get("is_right")
        rule = (
            f"{judged}() says so" if judged else "equal to what is expected but for case and spaces"
        )
        return (
            f"Accuracy in percent (right: {rule}), with 95 % intervals: Wilson's for shares, the "
            "paired bootstrap for differences."
        )

    def _notes(self) -> list[str]:
        number = sum(self.num_questions.values())
        notes = [
            f"{self._rule()} FLOPs are exact, of all prefills together.",
            f"{self.num_restricted} of {number} prompts have two images or more, frames of videos "
            "included; the others are dense under any profile.",
        ]
        notes += note_on_accuracy(self.dense)
        if self.sparse.num_changed == 0:
            # At a higher rate, at least one of these answers would have changed in LEVEL of cases.
            bound = 1 - (1 - LEVEL) ** (1 / number)
            notes.append(f"No answer changed; at 95 % fewer than {bound:.2%} would.")
        if self.timing is not None:
            found = self.timing
            notes.append(
                f"Prefill of the {found.compiled} compiled by {found.inner}, one prompt, median of "
                f"{len(found.dense)} and {len(found.sparse)} in turn; the sparse runs ran "
                f"{' and '.join(found.runs)}, whatever the length: the default lowering, 'auto', "
                "runs prompts dense that it estimates to be faster so. Compiled logits differ from "
                f"explicit masks by {found.distance:.1e}, dense by {found.rounding:.1e} (rounding)."
            )
        notes += self.remarks
        notes.append(", ".join(f"{name} {value}" for name, value in self.conditions.items()) + ".")
        return [f"- {note}" for note in notes]


@graph_breaks_hidden()
def evaluate(
    model: nn.Module,
    processor: Any,
    samples: Any,
    profile: Profile | str | os.PathLike[str],
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    engine: str = "reference",
    inner: str | Callable[..., Any] = "inductor",
    repeats: int = 5,
    checkpoint: str | os.PathLike[str] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    is_right: Judge | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Answer every sample with the dense model and with a profile, and compare.

    An answer is right if it equals the expected one, but for case and spaces. By default only as
    many tokens are decoded as the expected answer has, so what a model would add is ignored.
    Samples without answers are compared all the same: all but accuracy needs none.

    Args:
        model: A transformers model that reads images.
        processor: Its processor, see :func:`blindsight.data.processors.load_processor`.
        samples: Questions, with answers or all without: anything that
            :func:`~blindsight.data.samples.load_samples` takes or returns.
        profile: The profile to evaluate, or its file.
        batch_size: Prompts that run together.
        max_new_tokens: The longest answer; by default as many tokens as the expected answer, and
            32 without one.
        engine: ``"reference"`` or ``"compiled"``, see the top of this module.
        inner: The backend that compiles the graphs.
        repeats: How often prefill is timed, dense and sparse in turn; 0 compiles nothing. Where it
            cannot be compiled, the evaluation has no timing, and a remark says why.
        checkpoint: A file for the answers so far; an interrupted run resumes from it. If it is of
            another run that was finished, it is kept under another name.
        num_resamples: Of the bootstrap.
        seed: Of the bootstrap.
        is_right: Whether an answer to a sample is right, instead of the rule above: called with
            what was decoded and the :class:`~blindsight.data.rows.Sample`. Give it
            ``max_new_tokens`` to see more than the length of the expected answer.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: The model has no vision part, the profile is for another model, a sample has no
            image, only some have an answer, the checkpoint is of another run, or compiled and
            explicit masks disagree.
    """
    check_choice("engine", engine, ENGINES)
    if repeats < 0:
        raise ValueError(f"repeats must be at least 0, got {repeats}.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}.")
    profile, samples = Profile.of(profile), load_samples(samples)
    decoder = decoder_of(model, profile)
    answered = samples.has_answers()
    if max_new_tokens is None and not answered:
        max_new_tokens = UNKNOWN_LENGTH
    known = open_outcomes(checkpoint, decoder, processor, samples, max_new_tokens, is_right)
    tried = (torch.zeros_like(profile.categories), profile.categories)
    points = [point_of(ProfileMasking(categories), engine) for categories in tried]
    compiled = CompiledDecoder(decoder, profile, inner=inner) if engine == "compiled" else None

    checked: set[bool] = set()

    def run_compiled(batch: Batch, point: Point, masks: Any, use_cache: bool) -> Any:
        assert compiled is not None
        # One graph leaves a cache, and the other does not.
        if use_cache not in checked and batch.prompt.template.restricts_queries_from(0):
            compiled.check(batch, profile, use_cache=use_cache)
            checked.add(use_cache)
        return compiled.prefill(batch, dense=point.key == points[0].key, use_cache=use_cache)

    with in_eval_mode(model), ExitStack() as stack:
        if compiled is not None:
            stack.callback(compiled.close)
        outcomes = answer_samples(
            decoder,
            processor,
            samples,
            points if points[0].key != points[1].key else points[:1],
            known=known,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prefill=None if compiled is None else run_compiled,
            answered=answered,
            is_right=is_right,
            progress=progress,
        )
        dense = outcomes[points[0].key]
        timing, remarks = None, remarks_on(profile, samples)
        if repeats:
            try:
                timing = time_prefill_once(
                    known,
                    decoder,
                    lambda: longest_prompt(decoder, processor, samples, dense),
                    profile,
                    inner=inner,
                    repeats=repeats,
                    progress=progress,
                )
            except NotTimedError as error:
                remarks.append(str(error))
    known.finish()
    draws = {"num_resamples": num_resamples, "seed": seed}
    return Evaluation(
        dense=summarize(decoder, dense, dense, **draws),
        sparse=summarize(decoder, dense, outcomes[points[1].key], **draws),
        num_questions={task: len(rows) for task, rows in by_task(dense).items()},
        num_restricted=sum(outcome.num_spans > 1 for outcome in dense),
        timing=timing,
        conditions={
            **conditions(model, samples, seed),
            "profile": profile.digest[:12],
            "engine": engine,
            **({} if is_right is None else {"is_right": _name_of(is_right)}),
        },
        remarks=tuple(remarks),
    )


def decoder_of(model: nn.Module, profile: Profile) -> Decoder:
    """Return the decoder of a model, to be run under masks of its profile.

    Raises:
        ValueError: The model has no vision part, or the profile is for another model.
    """
    check_has_vision(unwrapped(model))
    profile.validate(model)
    check_is_whole(model, "evaluation")
    return Decoder(model, profile)


def open_outcomes(
    checkpoint: str | os.PathLike[str] | None,
    decoder: Decoder,
    processor: Any,
    samples: Samples,
    max_new_tokens: int | None,
    is_right: Judge | None = None,
) -> OutcomeFile:
    """Return the answers of a run so far: those in a file, if it is of the same run.

    The file of another run that was finished is kept under another name, with a warning.

    Raises:
        ValueError: The file is of another run that was not finished, or of something else.
    """
    if checkpoint is None:
        return OutcomeFile(None, {})
    check_can_be_made(checkpoint, "checkpoint")
    header = {
        "weights": digest_of_model(decoder.model),
        "rule": decoder.rule.to_json(),
        "samples": samples.digest(),
        "processor": digest_of_processor(processor),
        "max_new_tokens": str(max_new_tokens),
    }
    if is_right is not None:
        header["is_right"] = name_for_files(is_right)
    current_ranks().on_first(lambda: set_aside_finished(checkpoint, header))
    return OutcomeFile(checkpoint, header)


def point_of(masking: Masking, engine: str = ENGINES[0]) -> Point:
    """Return a masking, named for the file of answers by the engine that runs it."""
    return Point(f"{engine}: {masking.key}", masking)


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def remarks_on(profile: Profile, samples: Samples) -> list[str]:
    """Return what is to be said of a profile that was made with a dataset of the same name."""
    remarks = []
    for key, what in (("dataset", "calibrated"), ("refinement_dataset", "refined")):
        name = profile.calibration.get(key, "")
        # Rows in memory are only called after their class.
        is_name = "/" in name or os.path.exists(name)
        if is_name and _last_parts(name) == _last_parts(samples.name):
            remarks.append(
                f"The profile was {what} on a dataset of this very name, "
                f"{short_name(samples.name)}: on the same samples, these numbers say nothing "
                "about others. Evaluate on held-out ones."
            )
    return remarks


def _last_parts(name: str) -> tuple[str, ...]:
    return Path(short_name(name)).parts[-2:]


def short_name(name: str) -> str:
    """Return the last two parts of an existing path; a hub id has no more than two."""
    return "/".join(Path(name).resolve().parts[-2:]) if os.path.exists(name) else name


def conditions(model: nn.Module, samples: Samples, seed: int) -> dict[str, str]:
    """Return what the numbers depend on, besides the code."""
    parameter = next(model.parameters())
    config: Any = getattr(model, "config", None)
    device = parameter.device
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else cpu_model()
    import transformers

    return {
        "model": short_name(getattr(config, "_name_or_path", "") or type(model).__name__),
        "dataset": short_name(samples.name),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": f"{device.type} ({hardware}, {torch.get_num_threads()} threads)",
        "blindsight": blindsight.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "bootstrap seed": str(seed),
    }


make_callable(__name__)
