"""Answer questions under many maskings.

Every batch of prompts is prepared once, and answered under every masking.

Shapes: B batch, T tokens of the prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blindsight.data.processors import model_inputs
from blindsight.data.rows import Sample, check_answer
from blindsight.data.samples import Samples
from blindsight.evaluation.masked_model import Masking, Masks, Prompt
from blindsight.evaluation.outcomes import Outcome, OutcomeFile
from blindsight.evaluation.prefill import Batch, Decoder, Output
from blindsight.progress import progress_bar
from blindsight.ranks import current_ranks

NO_TASK = "all"
UNKNOWN_LENGTH = 32  # tokens of an answer where none is expected
_FIRST = 64  # samples, of which one at least has images
_BATCHES_AT_ONCE = 8  # opened together and sorted by length, so that little is padding


class Point(NamedTuple):
    """A masking, and its name in the file of answers."""

    key: str
    masking: Masking


Prefill = Callable[[Batch, Point, Masks, bool], Output]
Judge = Callable[[str, Sample], bool]


def answer_samples(
    decoder: Decoder,
    processor: Any,
    samples: Samples,
    points: Sequence[Point],
    *,
    known: OutcomeFile,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    prefill: Prefill | None = None,
    answered: bool = True,
    is_right: Judge | None = None,
    progress: bool | None = None,
) -> dict[str, list[Outcome]]:
    """Answer all samples under all maskings; return the outcomes of each point, by sample.

    Answers are decoded greedily. Where the expected answer is a single token, it is read from the
    logits of the prefill, and nothing is decoded.

    Args:
        decoder: The model.
        processor: Its processor.
        samples: Questions. A sample that is answered at all points already is not
            opened.
        points: The maskings; the others are compared with the first.
        known: The file of what is answered already, to which the rest is written.
        batch_size: Prompts that run together, padded on the left.
        max_new_tokens: The longest answer; by default as many tokens as the expected answer has,
            and what would follow is ignored; ``UNKNOWN_LENGTH`` where none is expected.
        prefill: How a batch is run under a masking; by default with explicit masks.
        answered: Whether every sample has an answer, or none.
        is_right: Whether an answer, given as it was decoded, is right; by default if it equals the
            expected one after :func:`normalise`.
        progress: See :func:`~blindsight.progress.progress_bar`.

    Raises:
        ValueError: A sample has no answer, or none of the first samples has an image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    samples.check(answers=answered)
    run = prefill or (lambda b, _, masks, use_cache: decoder.prefill(b, masks, use_cache=use_cache))

    def work() -> None:
        total = len(samples) * len(points)
        options = {"desc": "answering", "unit": "answer", "leave": False}
        with progress_bar(progress, total=total, **options) as bar:
            for questions, missing in _batches_left(
                samples, points, known, batch_size, answered, bar
            ):
                for outcomes in _answer_batch(
                    decoder,
                    processor,
                    questions,
                    missing,
                    dense=points[0],
                    run=run,
                    max_new_tokens=max_new_tokens,
                    is_right=is_right,
                ):
                    known.add(outcomes)
                    bar.update(len(outcomes))

    current_ranks().gather(work)
    known.merge()
    return {
        point.key: [known.outcomes(point.key)[at] for at in range(len(samples))] for point in points
    }


def _batches_left(
    samples: Samples,
    points: Sequence[Point],
    known: OutcomeFile,
    batch_size: int,
    answered: bool,
    bar: Any,
) -> Iterator[tuple[dict[int, Sample], list[Point]]]:
    """Yield batches of questions by position, and for each the points still to be answered here.

    The batches are those of a run in one process. What is answered already, or is the work of
    another process, counts as done on the bar.
    """
    ranks = current_ranks()
    has_images = False
    for window in _chunks(range(len(samples)), batch_size * _BATCHES_AT_ONCE):
        if all(known.has(point.key, window) for point in points):
            bar.update(len(points) * len(window))
            done = known.outcomes(points[0].key)
            has_images |= any(done[at].num_spans > 0 for at in window)
            continue
        opened = {at: check_answer(samples[at], answered=answered) for at in window}
        has_images |= any(sample.images or sample.videos for sample in opened.values())
        if not has_images and window[-1] + 1 >= min(len(samples), _FIRST):
            raise ValueError(
                "samples must have images or videos, got none in the first "
                f"{window[-1] + 1}. A profile changes nothing in prompts without."
            )
        order = sorted(opened, key=lambda at: (_length(opened[at]), at))
        for number, chosen in enumerate(_chunks(order, batch_size), start=window[0] // batch_size):
            missing = [point for point in points if not known.has(point.key, chosen)]
            if not ranks.has(number):
                missing = []
            bar.update((len(points) - len(missing)) * len(chosen))
            if missing:
                yield {at: opened[at] for at in chosen}, missing


def _answer_batch(
    decoder: Decoder,
    processor: Any,
    questions: Mapping[int, Sample],
    points: Sequence[Point],
    *,
    dense: Point,
    run: Prefill,
    max_new_tokens: int | None,
    is_right: Judge | None,
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of one batch under each point; KL divergences are from ``dense``."""
    tokenizer = getattr(processor, "tokenizer", processor)
    stop_ids = _stop_ids(decoder.model, tokenizer)
    batch = decoder.prepare(model_inputs(processor, list(questions.values())))
    limits = [_num_tokens(tokenizer, sample, max_new_tokens) for sample in questions.values()]
    expected = run(batch, dense, dense.masking.masks(batch.prompt), False).logits
    for point in points:
        masks = point.masking.masks(batch.prompt)
        output = run(batch, point, masks, max(limits) > 1)
        tokens = decoder.decode(batch, masks, output, max_new_tokens=max(limits), stop_ids=stop_ids)
        answers = [
            _text(tokenizer, row[:limit], stop_ids)
            for row, limit in zip(tokens.tolist(), limits, strict=True)
        ]
        kl = divergence(expected, output.logits)
        right = [
            _is_right(answer, sample, is_right)
            for answer, sample in zip(answers, questions.values(), strict=True)
        ]
        yield _outcomes(point, questions, answers, right, kl, batch.prompt, masks)


def _outcomes(
    point: Point,
    asked: Mapping[int, Sample],
    answers: Sequence[str],
    right: Sequence[bool | None],
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
                answer=normalise(answers[row]),
                is_right=right[row],
                kl=float(kl[row]),
                num_tokens=num_tokens,
                num_spans=num_spans,
                pairs=pairs,
                rows=rows,
            )
        )
    return outcomes


def _is_right(answer: str, sample: Sample, is_right: Judge | None) -> bool | None:
    """Return whether an answer is right, or None if there is no telling."""
    if is_right is not None:
        return bool(is_right(answer, sample))
    return None if sample.answer is None else normalise(answer) == normalise(sample.answer)


def normalise(answer: str) -> str:
    """Return an answer as it is compared: single spaces, no case."""
    return " ".join(answer.split()).casefold()


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(dense || other) of logits ``[B, V]`` in nats, ``[B]`` float64."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (dense, other))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def _length(sample: Sample) -> tuple[int, int]:
    """Return a key that orders samples roughly by the length of their prompts."""
    text = sum(
        len(str(entry.get("text", ""))) for turn in sample.prompt for entry in turn["content"]
    )
    pixels = sum(image.width * image.height for image in sample.images)
    return pixels + sum(video.size for video in sample.videos), text


def _num_tokens(tokenizer: Any, sample: Sample, max_new_tokens: int | None) -> int:
    if max_new_tokens is not None:
        return max_new_tokens
    if sample.answer is None:
        return UNKNOWN_LENGTH
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
    text: str = tokenizer.decode(tokens[:end], skip_special_tokens=True)
    return text.strip()


def _chunks(positions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (positions[begin : begin + size] for begin in range(0, len(positions), size))
