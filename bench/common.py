"""What the benches share: prompts, the conditions of a run, tables."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blindsight.runtime.cost_model import cpu_model
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


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Return what a number depends on besides the code: commit, versions, hardware, command.

    ``BLINDSIGHT_COMMIT`` tells the commit of a copy without its history, "-dirty" after it if need
    be, as in ``git describe --always --dirty --abbrev=40``.
    """

    def git(*args: str) -> str:
        command = ["git", *args]
        root = Path(__file__).parent
        return subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.strip()

    told = os.environ.get("BLINDSIGHT_COMMIT")
    commit = told.removesuffix("-dirty") if told else git("rev-parse", "HEAD")
    on_gpu = {}
    if device != "cpu":
        on_gpu = {"gpu": torch.cuda.get_device_name(), "triton": version("triton")}
    return {
        "commit": commit,
        "uncommitted_changes": told != commit if told else bool(git("status", "--porcelain")),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        **on_gpu,
    }


@contextmanager
def alone_on_device() -> Iterator[None]:
    """Where benches run side by side (``on_gpu.py``): wait for the turn to measure.

    ``BLINDSIGHT_TURN`` is the path of two files, without their endings: ``.ready`` tells that
    everything is compiled, ``.go`` that the device is this process's alone.
    """
    if turn := os.environ.get("BLINDSIGHT_TURN"):
        Path(f"{turn}.ready").touch()
        while not Path(f"{turn}.go").exists():
            time.sleep(0.05)
    yield


def print_kernels(name: str, run: Callable[[], object], number: int = 12) -> None:
    """Print the kernels of a GPU that a call spends most time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.accelerator.synchronize()
    kernels = sorted(found.key_averages(), key=lambda each: -each.self_device_time_total)
    whole = sum(each.self_device_time_total for each in kernels) / 1e3
    print(f"{name}: {whole:.4g} ms in kernels")
    rows = [
        [each.key[:90], str(each.count), f"{each.self_device_time_total / 1e3:.4g}"]
        for each in kernels[:number]
    ]
    print_table(["kernel", "calls", "ms"], rows)


class Spread(NamedTuple):
    """The median of some times, and the 20th and 80th percentile; None if there are none."""

    median: float | None
    p20: float | None
    p80: float | None

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        if len(times) < 2:
            return cls(*[times[0] if times else None] * 3)
        ranks = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), ranks[0], ranks[-1])


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]], told: Mapping[str, Any]) -> None:
    """Append measurements to a file of results, each with what :func:`conditions` told."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({**told, **row}) + "\n" for row in rows)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
