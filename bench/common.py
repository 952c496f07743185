"""What the benches share: prompts, the conditions of a run, tables."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blindsight.cost_model import cpu_model
from blindsight.template import find_sinks

DELIMITERS = 2  # of each image: it begins and ends with one, and both are in its span
TAIL = 64  # tokens of text after the last image


@dataclass(frozen=True)
class Config:
    """A prompt: so many images of so many tokens, each followed by text.

    Attributes:
        num_images, image_tokens, text_tokens: The prompt; delimiters come on top.
        block_size: Of queries and keys, in tokens.
    """

    num_images: int
    image_tokens: int
    text_tokens: int
    block_size: int = 128

    @property
    def name(self) -> str:
        return f"{self.num_images} x {self.image_tokens:,} + {self.text_tokens}"

    @property
    def num_tokens(self) -> int:
        return self.num_images * (self.image_tokens + DELIMITERS + self.text_tokens) + TAIL

    def template(self) -> tuple[Tensor, Tensor]:
        """Return span_id and is_sink, ``[1, T]``."""
        ids: list[int] = []
        for number in range(1, self.num_images + 1):
            ids += [number] * (self.image_tokens + DELIMITERS) + [0] * self.text_tokens
        span_id = torch.tensor([ids + [0] * TAIL], dtype=torch.int32)
        return span_id, find_sinks(span_id, (0,))


def conditions() -> dict[str, Any]:
    """Return what a number depends on besides the code: commit, versions, hardware, command."""

    def git(*args: str) -> str:
        command = ["git", *args]
        root = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
