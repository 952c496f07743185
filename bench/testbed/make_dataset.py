"""Writes prompts of the testbed as JSON lines and PNG files.

    python bench/testbed/make_dataset.py OUT --num-samples 200 --images 2-12 --split test --seed 0

OUT/data.jsonl gets one object a line: ``images`` (paths relative to the file), ``messages`` (chat
messages of transformers; the last is the assistant's answer), ``task``, ``answer``, and ``chance``
(of guessing that answer, knowing the task and the number of images). With --questions 8 several
turns follow about the same images; ``task`` and ``answer`` are then the last turn's. Tasks take
turns, and answers are balanced as far as the images allow.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from collages import GRIDS, MAX_COUNT, TASKS, Bank, Collages, ask, load_bank, make_collages, words
from collages import render as render_image
from vocabulary import LABELS


def chance(task: str, num_images: int) -> float:
    """The accuracy of guessing evenly among a task's answers."""
    return {
        "first_digit": 1 / 10,
        "most_frequent": 1 / 10,
        "count": 1 / (MAX_COUNT + 1),
        "find": 1 / num_images,
        "same_first": 1 / 2,
        "repeat": 1 / (num_images - 1),
    }[task]


def sample_prompts(
    *,
    num_samples: int,
    images: tuple[int, int],
    questions: int = 1,
    split: str = "test",
    seed: int = 0,
    tasks: tuple[str, ...] = TASKS,
    grids: tuple[tuple[int, int], ...] = GRIDS[:4],
) -> Iterator[tuple[Bank, Collages, list[tuple[str, str, str]]]]:
    """Prompts one by one: the bank, the collages (B = 1), and task, question, answer of each turn.

    Each prompt has its own seed, so the first of many are the same however many are asked for.
    """
    low, high = images
    for task in tasks:
        if task not in TASKS:
            raise ValueError(
                f"tasks must be of {', '.join(TASKS)}, got {task!r}. Name some of these."
            )
    if not 2 <= low <= high <= len(LABELS):
        raise ValueError(
            f"images must be a range within 2 to {len(LABELS)}, got {low}-{high}. "
            "Give it as LOW-HIGH."
        )
    if tasks == ("repeat",) and low < 3:
        raise ValueError(f"images must be 3 or more for the task repeat, got {low}. Raise it.")
    bank = load_bank(split)
    for sample in range(num_samples):
        rng = np.random.default_rng((seed, sample, 0 if split == "test" else 1))
        n = int(rng.integers(low, high + 1))
        first = tasks[sample % len(tasks)]
        n = max(n, 3) if first == "repeat" else n
        while True:  # until every question has exactly one right answer
            two = [grids[k] for k in rng.integers(len(grids), size=2)]
            layout = tuple(two[k] for k in rng.integers(2, size=n) * (rng.random() < 0.5))
            rare = 1 if n < 4 else 2
            pairs = 0 if n == 2 else 1
            collages = make_collages(
                rng, bank, batch=1, grids=layout, num_rare=rare, num_pairs=pairs
            )
            rest = [task for task in tasks if task != "repeat" or n > 2]
            later = [str(rng.choice(rest)) for _ in range(questions - 1)]
            asked = [ask(rng, collages, task) for task in (*later, first)]
            if all(question.valid[0] for question in asked):
                break
        yield bank, collages, [(question.task, *words(question, 0)) for question in asked]


def to_messages(num_images: int, turns: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """The chat: every image named by the text before it, then question and answer in turns."""
    content: list[dict[str, str]] = []
    for label in LABELS[:num_images]:
        content += [{"type": "text", "text": f"image {label} :"}, {"type": "image"}]
    messages: list[dict[str, Any]] = []
    for _, question, answer in turns:
        content = [*content, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        content = []
    return messages


def write_dataset(out: Path, **options: Any) -> Path:
    """Writes OUT/data.jsonl and OUT/img/; options as of ``sample_prompts``."""
    from PIL import Image

    (out / "img").mkdir(parents=True, exist_ok=True)
    temporary, final = out / "data.jsonl.tmp", out / "data.jsonl"
    with temporary.open("w") as file:
        for sample, (bank, collages, turns) in enumerate(sample_prompts(**options)):
            n = len(collages.grids)
            paths = [f"img/{sample:05d}_{LABELS[k]}.png" for k in range(n)]
            for k, path in enumerate(paths):
                Image.fromarray(render_image(bank, collages, 0, k)).save(out / path)
            task, _, answer = turns[-1]
            line = {
                "images": paths,
                "messages": to_messages(n, turns),
                "task": task,
                "answer": answer,
                "chance": round(chance(task, n), 4),
            }
            file.write(json.dumps(line) + "\n")
    os.replace(temporary, final)
    return final


def parse_grid(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    grid = (int(rows), int(columns)) if rows.isdigit() and columns.isdigit() else None
    if grid not in GRIDS:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in GRIDS)
        raise ValueError(f"grids must be of {known}, got {text!r}. Name some of these.")
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-samples", type=int, default=200)
    parser.add_argument("--images", default="2-12", help="LOW-HIGH, or one number")
    parser.add_argument("--questions", type=int, default=1, help="turns a prompt")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--grids", default="2x2,2x3,3x2,3x3", help="rows x columns of digits")
    args = parser.parse_args()
    low, _, high = args.images.partition("-")
    path = write_dataset(
        args.out,
        num_samples=args.num_samples,
        images=(int(low), int(high or low)),
        questions=args.questions,
        split=args.split,
        seed=args.seed,
        tasks=tuple(args.tasks.split(",")),
        grids=tuple(parse_grid(grid) for grid in args.grids.split(",")),
    )
    print(path)


if __name__ == "__main__":
    main()
