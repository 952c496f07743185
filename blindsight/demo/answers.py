"""The answers of the demo: real questions about real images, dense and sparse side by side.

The model is the testbed's, trained from scratch on collages of handwritten digits; the profile is
the one that calibration gave it. Both are part of this repository, as are the questions
(``bench/testbed/``).

Shapes: B questions, T tokens of the longest prompt.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindsight.backend import blindsight_backend
from blindsight.categories import summarize_categories
from blindsight.cost import AttentionFlops, attention_flops
from blindsight.data.processors import inputs_on, load_processor, model_inputs
from blindsight.data.rows import Sample
from blindsight.data.samples import load_samples
from blindsight.modules import find_decoder
from blindsight.profile import Profile
from blindsight.progress import Progress
from blindsight.reference import reference_logits
from blindsight.runtime.context import disabled
from blindsight.text_tables import aligned, facts

_ROOT = Path(__file__).resolve().parents[2]
MODEL = _ROOT / "bench" / "testbed" / "model"
QUESTIONS = _ROOT / "bench" / "testbed" / "questions"
PROFILE = _ROOT / "profiles" / "testbed.safetensors"

NUM_STEPS = 4


@dataclass(frozen=True)
class Answer:
    """One question, the expected answer, and the answers of the model dense and sparse."""

    task: str
    question: str
    right: str
    dense: str
    sparse: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The testbed's answers; ``str()`` gives its tables.

    Attributes:
        answers: One for each question.
        num_images: The number of images in each prompt.
        num_tokens: The length of each prompt.
        profile: The testbed's profile.
        flops: FLOPs of attention, for all prompts together.
        difference: Largest difference of the logits of the answers, between compiled sparse and
            the reference with dense masks.
        effect: The same between sparse and dense: what the profile changes.
        magnitude: The largest of the logits.
    """

    answers: tuple[Answer, ...]
    num_images: tuple[int, ...]
    num_tokens: tuple[int, ...]
    profile: Profile
    flops: AttentionFlops
    difference: float
    effect: float
    magnitude: float

    def __str__(self) -> str:
        header = ("task", "question", "right", "dense", "sparse")
        cells = [(x.task, x.question, x.right, x.dense, x.sparse) for x in self.answers]
        num = len(self.answers)
        right = [sum(getattr(x, how) == x.right for x in self.answers) for how in header[3:]]
        heads = summarize_categories(self.profile.categories.flatten().tolist())
        known = (
            ("model", "the testbed: a Qwen2.5-VL trained on collages of handwritten digits"),
            (
                "prompts",
                f"{num}, {_range(self.num_images)} images, {_range(self.num_tokens)} tokens",
            ),
            ("layers x heads", f"{self.profile.num_layers} x {self.profile.num_heads}: {heads}"),
            ("right answers", f"dense {right[0]} of {num}, sparse {right[1]} of {num}"),
            ("attention FLOPs", f"{self.flops.sparse / self.flops.dense:.1%} of dense"),
            (
                "logits, at most",
                f"{self.magnitude:.3g}; sparse from the reference {self.difference:.2g}, "
                f"from dense {self.effect:.2g} (what the profile changes)",
            ),
        )
        return f"{aligned([header, *cells])}\n\n{facts(known)}"


def find_problem() -> str | None:
    """Return why the testbed cannot be shown, or None."""
    missing = [path for path in (MODEL, QUESTIONS, PROFILE) if not path.exists()]
    if not missing:
        return None
    return (
        f"the testbed's answers are left out: {missing[0]} is missing, which comes with the "
        "repository, not with the installed package."
    )


def answer_questions(*, inner: str, device: str, progress: Progress) -> Answers:
    """Answer the questions in one batch, dense and sparse, with one compiled model."""
    from transformers import AutoModelForImageTextToText

    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa")
    model = model.eval().to(device)
    processor = load_processor(MODEL)
    profile = Profile.load(PROFILE)
    samples = list(load_samples(QUESTIONS))
    inputs = model_inputs(processor, samples)
    on_device = inputs_on(model, inputs)
    # "auto" might run prompts this short dense; here they run sparse.
    backend = blindsight_backend(profile, inner=inner, model=model, lowering="fused")
    decoder = find_decoder(model, profile.rule.layer_pattern)
    decoder.compile(backend=backend)

    def last_logits(dense: bool) -> Tensor:
        with disabled() if dense else nullcontext():
            logits: Tensor = model(**on_device, logits_to_keep=1).logits[:, -1]
        return logits

    try:
        sparse, _ = progress("compiling (answers, sparse)", lambda: last_logits(dense=False))
        dense, _ = progress("compiling (answers, dense)", lambda: last_logits(dense=True))
    finally:
        backend.detach()
        decoder._compiled_call_impl = None
    expected, _ = progress(
        "running the reference", lambda: reference_logits(model, on_device, profile)[:, -1]
    )
    said = [processor.tokenizer.batch_decode(x.argmax(-1)[:, None]) for x in (dense, sparse)]
    valid = inputs["attention_mask"].bool()
    template = profile.rule.template_of_inputs(inputs)
    return Answers(
        answers=tuple(
            Answer(
                sample.task or "-", _question(sample), sample.answer or "?", a.strip(), b.strip()
            )
            for sample, a, b in zip(samples, *said, strict=True)
        ),
        num_images=tuple(len(sample.images) for sample in samples),
        num_tokens=tuple(valid.sum(1).tolist()),
        profile=profile,
        flops=attention_flops(
            template,
            profile.categories,
            head_dim=profile.head_dim(0),
            key_valid=valid,
        ),
        difference=float((sparse - expected).abs().max()),
        effect=float((sparse - dense).abs().max()),
        magnitude=float(expected.abs().max()),
    )


def _question(sample: Sample) -> str:
    """Return the last text of the user's turn."""
    texts = [x["text"] for x in sample.prompt[-1]["content"] if x.get("type") == "text"]
    return str(texts[-1])


def _range(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
