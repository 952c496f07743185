"""Answers of one model under many maskings, question by question, in a file that grows.

Every batch of prompts is prepared once and answered under every masking. What was answered is
written at once, so that a run which ends early goes on where it was.

Shapes: B batch, T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blindsight.data.processors import model_inputs
from blindsight.data.rows import Sample
from blindsight.data.samples import Samples
from blindsight.evaluation.masked_model import Masking, Masks, Prompt
from blindsight.evaluation.prefill import Batch, Decoder, Output
from blindsight.files import write_text
from blindsight.progress import progress_bar
from blindsight.ranks import current_ranks

FORMAT, VERSION = "blindsight-outcomes", 1
NO_TASK = "all"
_BATCHES_AT_ONCE = 8  # opened together and sorted by length, so that little is padding


@dataclass(frozen=True)
class Outcome:
    """The answer to one question.

    Attributes:
        point: Key of the masking.
        sample: Position among the samples.
        task: The kind of question.
        answer: What was decoded, normalised.
        is_right: Whether it equals the expected answer, normalised.
        kl: Of the next token after the prompt, KL(dense || this) in nats.
        num_tokens: Of the prompt.
        num_spans: Of the prompt, its images.
        pairs: Of a query and a key, that the prefill computed, all layers and heads.
        rows: Tokens that the layers computed, all layers.
    """

    point: str
    sample: int
    task: str
    answer: str
    is_right: bool
    kl: float
    num_tokens: int
    num_spans: int
    pairs: int
    rows: int


class Point(NamedTuple):
    """A masking, and what it is called."""

    key: str
    masking: Masking


Prefill = Callable[[Batch, Point, Masks, bool], Output]


class Checkpoint:
    """A file of JSON lines: what the run is of, then an outcome a line.

    Args:
        path: The file, made where it is missing; None keeps everything in memory. In a
            :func:`~blindsight.ranks.shared_run` each process has a part, named after it.
        header: What must be the same for a run to go on: the model, the questions.

    Raises:
        ValueError: The file is of another run, or no such file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, str]) -> None:
        self._path = self._whole = None if path is None else Path(path)
        self._header = {"format": FORMAT, "version": VERSION, **header}
        self._outcomes: dict[str, dict[int, Outcome]] = {}
        self.notes: dict[str, Any] = {}
        ranks = current_ranks()
        if ranks.size == 1 or path is None:
            self._open(self._header)
        else:
            # What was finished together before, and what this process has done of this run.
            for line in self._known_lines(self._header) or ():
                self._take(line)
            self._path = ranks.own(path)
            self._open({**self._header, "process": ranks.name})

    def merge(self) -> None:
        """Bring together what the processes of a shared run have found, in the order of samples.

        Every process knows all then. The first one writes the file, and goes on writing it; the
        parts are removed.
        """
        ranks = current_ranks()
        if ranks.size == 1:
            return
        for outcomes, notes in ranks.gather(lambda: (self._outcomes, self.notes)):
            for key, found in outcomes.items():
                self._outcomes.setdefault(key, {}).update(found)
            self.notes.update(notes)
        rows: list[dict[str, Any]] = [self._header]
        for key in self._outcomes:
            by_sample = sorted(self._outcomes[key].items())
            self._outcomes[key] = dict(by_sample)
            rows += [asdict(outcome) for _, outcome in by_sample]
        rows += [{"note": name, "value": value} for name, value in self.notes.items()]
        part, whole = self._path, self._whole
        self._path = whole if ranks.is_first else None
        if whole is not None and part is not None:
            target = whole
            ranks.on_first(lambda: write_text(target, _lines(rows)))
            part.unlink(missing_ok=True)  # only now that the whole is on the disk

    def _open(self, header: Mapping[str, Any]) -> None:
        known = self._known_lines(header)
        if known is None:
            self._write([header])
        for line in known or ():
            self._take(line)

    def _known_lines(self, header: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Return what a file of this run holds, or None where there is none."""
        lines = self._read()
        if not lines:
            return None
        self._check(lines[0], header)
        return lines[1:]

    def outcomes(self, key: str) -> dict[int, Outcome]:
        """Return what is known of a point, by sample."""
        return self._outcomes.get(key, {})

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write the answers to a batch of questions."""
        self._write([asdict(outcome) for outcome in outcomes])
        for outcome in outcomes:
            self._outcomes.setdefault(outcome.point, {})[outcome.sample] = outcome

    def note(self, name: str, value: Any) -> None:
        """Write something else that is not to be measured again."""
        self._write([{"note": name, "value": value}])
        self.notes[name] = value

    def _take(self, line: dict[str, Any]) -> None:
        if "note" in line:
            self.notes[line["note"]] = line["value"]
        else:
            outcome = Outcome(**line)
            self._outcomes.setdefault(outcome.point, {})[outcome.sample] = outcome

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last line was cut off in the middle
            with open(self._path, "r+b") as file:
                file.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self._path} must be a file of outcomes, got {error}. Give another, or remove it."
            ) from None

    def _check(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        different = [
            f"{name}={found.get(name)!r} and not {value!r}"
            for name, value in expected.items()
            if found.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{self._path} must be of the run that is to go on, got {', '.join(different)}. "
                "Give another folder, or remove the file to begin anew."
            )

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())


def answer_samples(
    decoder: Decoder,
    processor: Any,
    samples: Samples,
    points: Sequence[Point],
    *,
    checkpoint: Checkpoint,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    prefill: Prefill | None = None,
    progress: bool | None = None,
) -> dict[str, list[Outcome]]:
    """Answer all samples under all maskings; return the outcomes of each point, by sample.

    Answers are decoded greedily. Where the expected answer is one token, the prefill's logits
    give it and nothing is decoded.

    Args:
        decoder: The model.
        processor: Its processor.
        samples: With answers; those that are known for all points are not opened.
        points: The first is what the others are compared with.
        checkpoint: What is known already, and where the rest goes.
        batch_size: Prompts at once, padded on the left.
        max_new_tokens: Of an answer; by default as many as the expected answer has, and what would
            follow is not looked at.
        prefill: How a batch is run under a masking; by default with explicit masks.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: A sample has no answer, or none of the first samples has an image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    samples.check()
    current_ranks().gather(
        lambda: _answer_own(
            decoder,
            processor,
            samples,
            points,
            checkpoint,
            batch_size,
            max_new_tokens,
            prefill,
            progress=progress,
        )
    )
    checkpoint.merge()
    return {
        point.key: [checkpoint.outcomes(point.key)[at] for at in range(len(samples))]
        for point in points
    }


def _answer_own(
    decoder: Decoder,
    processor: Any,
    samples: Samples,
    points: Sequence[Point],
    checkpoint: Checkpoint,
    batch_size: int,
    max_new_tokens: int | None,
    prefill: Prefill | None,
    *,
    progress: bool | None,
) -> None:
    """Answer the batches of this process; every one is what it is in a process alone."""
    ranks = current_ranks()
    tokenizer = getattr(processor, "tokenizer", processor)
    stop_ids = _stop_ids(decoder.model, tokenizer)
    run = prefill or (lambda b, _, masks, use_cache: decoder.prefill(b, masks, use_cache=use_cache))
    total = len(samples) * len(points)
    with progress_bar(progress, total=total, unit="answer", leave=False) as bar:
        for positions in _chunks(range(len(samples)), batch_size * _BATCHES_AT_ONCE):
            first_batch = positions[0] // batch_size
            known = [p for p in points if _is_known(checkpoint, p, positions)]
            bar.update(len(known) * len(positions))
            if len(known) == len(points):
                continue
            opened = {at: _checked(samples[at]) for at in positions}
            if positions[0] == 0 and not any(
                sample.images or sample.videos for sample in opened.values()
            ):
                raise ValueError(
                    f"samples must have images or videos, got none in the first {len(opened)}. A "
                    "profile changes nothing in prompts without."
                )
            order = sorted(positions, key=lambda at: (_length(opened[at]), at))
            for number, chosen in enumerate(_chunks(order, batch_size), start=first_batch):
                missing = [p for p in points if not _is_known(checkpoint, p, chosen)]
                if not ranks.has(number):
                    missing = []  # another process does it in the meantime
                bar.update((len(points) - len(known) - len(missing)) * len(chosen))
                if not missing:
                    continue
                batch = decoder.prepare(model_inputs(processor, [opened[at] for at in chosen]))
                asked = {at: opened[at] for at in chosen}
                limits = [_num_tokens(tokenizer, x, max_new_tokens) for x in asked.values()]
                first = points[0]
                dense = run(batch, first, first.masking.masks(batch.prompt), False).logits
                for point in missing:
                    masks = point.masking.masks(batch.prompt)
                    output = run(batch, point, masks, max(limits) > 1)
                    tokens = decoder.decode(
                        batch, masks, output, max_new_tokens=max(limits), stop_ids=stop_ids
                    )
                    answers = [
                        _text(tokenizer, row[:limit], stop_ids)
                        for row, limit in zip(tokens.tolist(), limits, strict=True)
                    ]
                    kl = divergence(dense, output.logits)
                    checkpoint.add(_outcomes(point, asked, answers, kl, batch.prompt, masks))
                    bar.update(len(chosen))


def _outcomes(
    point: Point,
    asked: Mapping[int, Sample],
    answers: Sequence[str],
    kl: Tensor,
    prompt: Prompt,
    masks: Masks,
) -> list[Outcome]:
    spans = prompt.template.span_id.max(1).values
    counts = torch.stack([prompt.num_tokens, spans, masks.count_pairs(), masks.count_rows()], 1)
    outcomes = []
    for row, (at, sample) in enumerate(asked.items()):
        num_tokens, num_spans, pairs, rows = counts[row].tolist()
        outcomes.append(
            Outcome(
                point=point.key,
                sample=at,
                task=NO_TASK if sample.task is None else sample.task,
                answer=answers[row],
                is_right=answers[row] == normalise(sample.answer or ""),
                kl=float(kl[row]),
                num_tokens=num_tokens,
                num_spans=num_spans,
                pairs=pairs,
                rows=rows,
            )
        )
    return outcomes


def normalise(answer: str) -> str:
    """Return what is compared of an answer."""
    return " ".join(answer.split()).casefold()


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(dense || other) of logits ``[B, V]`` in nats, ``[B]`` float64."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (dense, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def _is_known(checkpoint: Checkpoint, point: Point, positions: Sequence[int]) -> bool:
    known = checkpoint.outcomes(point.key)
    return all(at in known for at in positions)


def _checked(sample: Sample) -> Sample:
    if sample.answer is None:
        raise ValueError(
            f"sample {sample.index} must have an answer, got none. Add an 'answer' to the row, or "
            "end its messages with the assistant's."
        )
    return sample


def _length(sample: Sample) -> tuple[int, int]:
    """Order samples about as their prompts' lengths do."""
    text = sum(
        len(str(entry.get("text", ""))) for turn in sample.prompt for entry in turn["content"]
    )
    pixels = sum(image.width * image.height for image in sample.images)
    return pixels + sum(video.size for video in sample.videos), text


def _num_tokens(tokenizer: Any, sample: Sample, max_new_tokens: int | None) -> int:
    if max_new_tokens is not None:
        return max_new_tokens
    return max(1, len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"]))


def _stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    configs = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return sorted(found)


def _text(tokenizer: Any, tokens: list[int], stop_ids: Sequence[int]) -> str:
    end = next((at for at, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return normalise(tokenizer.decode(tokens[:end], skip_special_tokens=True))


def _chunks(positions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (positions[begin : begin + size] for begin in range(0, len(positions), size))
