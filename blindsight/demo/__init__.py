"""The demo: answer real questions dense and sparse, then time a long prompt dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blindsight.demo.answers import NUM_STEPS, Answers, answer_questions, find_problem
from blindsight.demo.prompt import DemoOptions, load
from blindsight.demo.speed import Speed, measure_speed, num_steps
from blindsight.progress import Progress, progress_bar, quiet

__all__ = ["DemoOptions", "DemoResult", "load", "run_demo"]


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo; ``str()`` gives its tables.

    Attributes:
        answers: The testbed's answers, or None if it was not asked.
        speed: The timing of the long prompt, or None if it was not timed.
        note: What was left out and why, or an empty string.
    """

    answers: Answers | None
    speed: Speed | None
    note: str

    def __str__(self) -> str:
        parts = []
        if self.answers is not None:
            parts.append(f"Answers, dense and sparse\n\n{self.answers}")
        if self.speed is not None:
            parts.append(f"Speed, on a long prompt and another model\n\n{self.speed}")
        if self.note:
            parts.append(self.note)
        return "\n\n\n".join(parts)


def run_demo(options: DemoOptions) -> DemoResult:
    """Run the demo, and return its result.

    Raises:
        ValueError: An option is malformed, or the profile is for another model.
        ImportError: The sample photographs need scikit-learn, which is not installed.
    """
    # A model, images or a profile of the user's own are only timed; the testbed has its own.
    own = [name for name in ("model", "images", "profile") if getattr(options, name) is not None]
    if own and options.part == "answers":
        raise ValueError(
            f"part 'answers' runs on the testbed only, got {' and '.join(own)} of your own. "
            "Leave them out, or time them: part 'speed'."
        )
    asks = options.part in ("answers", "both") and not own
    problem = find_problem() if asks else None
    steps = num_steps(options) if options.part != "answers" else 0
    steps += NUM_STEPS if asks else 0
    with (
        quiet(),
        torch.no_grad(),
        progress_bar(total=steps, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar,
    ):
        bar.set_description("building the prompts")
        progress = Progress(bar, options.device)
        answers = speed = None
        if asks and problem is None:
            answers = answer_questions(
                inner=options.inner, device=options.device, progress=progress
            )
        # Both models have one class: after the first, Dynamo would generalise the second.
        torch._dynamo.reset()
        if options.part != "answers":
            speed = measure_speed(options, progress)
    return DemoResult(answers, speed, problem or "")
