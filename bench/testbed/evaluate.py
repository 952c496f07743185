"""Accuracy of the shipped model, by the Auto classes, on a file of make_dataset.py.

    python bench/testbed/evaluate.py DATA/data.jsonl [--model DIR] [--split-images 4] [--out FILE]

Greedy: the answer is the most likely next token after the generation prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

MODEL = Path(__file__).parent / "model"


def load(path: Path = MODEL, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype).eval(), (
        AutoProcessor.from_pretrained(path)
    )


@torch.inference_mode()
def answer(model: Any, processor: Any, images: list[Image.Image], messages: list[Any]) -> str:
    """The next word after the messages."""
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[images], return_tensors="pt").to(model.device)
    logits = model(**inputs, logits_to_keep=1).logits
    return str(processor.tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax())))


def evaluate(data: Path, model: Any, processor: Any, split_images: int) -> list[dict[str, Any]]:
    """One row for each task and group of prompts: up to ``split_images`` images, and more."""
    groups: dict[tuple[str, bool], list[tuple[bool, float, int]]] = defaultdict(list)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in tqdm(lines, mininterval=2):
        images = [Image.open(data.parent / path) for path in line["images"]]
        said = answer(model, processor, images, line["messages"][:-1])
        key = (line["task"], len(images) > split_images)
        groups[key].append((said == line["answer"], line["chance"], len(images)))
    rows = []
    for (task, _), found in sorted(groups.items()):
        right, chances, counts = (
            torch.tensor(x, dtype=torch.float64) for x in zip(*found, strict=True)
        )
        accuracy = float(right.mean())
        rows.append(
            {
                "task": task,
                "images": f"{int(counts.min())}-{int(counts.max())}",
                "n": len(found),
                "accuracy": round(accuracy, 4),
                "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(found)), 4),
                "chance": round(float(chances.mean()), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--split-images", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write the rows here, as JSON lines")
    args = parser.parse_args()
    model, processor = load(args.model)
    rows = evaluate(args.data, model, processor, args.split_images)
    print("| task | images | n | accuracy | +- | chance |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    print(f"mean of the rows: {mean:.4f}")
    if args.out:
        temporary = args.out.with_name(args.out.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
