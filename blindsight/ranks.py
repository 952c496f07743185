"""Several processes that share the samples of one run, each with a whole model.

Which batch runs where is fixed by its number, every batch is what it is in one process, and results
come back in the order of the samples: so the outcome is that of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from blindsight.error_text import first_line

T = TypeVar("T")

_PATIENCE = timedelta(days=30)  # a rank that is done waits for the slowest


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that share a run; alone, 0 of 1.

    Attributes:
        rank: Which process this is.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints, and writes what there is one of."""
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"{self.rank} of {self.size}"

    def has(self, batch: int) -> bool:
        """Whether this process runs the batch of that number."""
        return batch % self.size == self.rank

    def positions(self, num_samples: int, batch_size: int) -> list[int]:
        """Return which samples this process runs, in order; batches are those of one process."""
        return [at for at in range(num_samples) if self.has(at // batch_size)]

    def own(self, path: str | os.PathLike[str]) -> Path:
        """Return the path of this process's part of a file; alone, the file itself."""
        path = Path(path)
        return path if self.size == 1 else path.with_name(f"{path.name}.{self.rank}-of-{self.size}")

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return what the work of every process returns, by rank, in every process.

        Raises:
            ValueError, RuntimeError: The work of a process failed. Every process raises then, the
                one whose work it was its own error: none waits for a result that will not come.
        """
        if self.size == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        kind = None if error is None else (str(error), isinstance(error, ValueError))
        everyone: list[Any] = [None] * self.size
        distributed.all_gather_object(everyone, (result, kind))
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(everyone):
            if failed is not None:
                message = f"process {rank} of {self.size} failed: {failed[0]}"
                raise ValueError(message) if failed[1] else RuntimeError(message)
        return [result for result, _ in everyone]

    def on_first(self, work: Callable[[], T]) -> T:
        """Let the first process do the work; return the result in every process."""
        return self.gather(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]


_ALONE = Ranks()
_ranks: ContextVar[Ranks] = ContextVar("blindsight_ranks", default=_ALONE)


def current_ranks() -> Ranks:
    """Return who shares the run: this process alone, outside of :func:`shared_run`."""
    return _ranks.get()


@contextmanager
def shared_run() -> Iterator[Ranks]:
    """Let the processes of ``torchrun`` share the samples of calibrations and evaluations inside.

    All of them have to enter, and do the same. The default process group is used, or made (gloo)
    and destroyed again. In a process alone nothing changes.
    """
    launched = distributed.is_available() and distributed.is_torchelastic_launched()
    made = launched and not distributed.is_initialized() and is_launched_with_others()
    if made:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    is_together = distributed.is_available() and distributed.is_initialized()
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size()) if is_together else _ALONE
    token = _ranks.set(ranks)
    try:
        yield ranks
    finally:
        _ranks.reset(token)
        if made:
            distributed.destroy_process_group()


def is_launched_with_others() -> bool:
    """Whether ``torchrun`` started this process and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def check_is_alone(command: str) -> None:
    """Check that a command runs in one process.

    Raises:
        ValueError: ``torchrun`` started several.
    """
    if is_launched_with_others():
        raise ValueError(
            f"{command} must run in one process, got {os.environ['WORLD_SIZE']} of torchrun's. "
            "Only calibrate and evaluate share their samples among processes."
        )


def local_device(name: str | None = None) -> str:
    """Return the device of this process: of several on a host, each its own GPU.

    None is a GPU where there is one, else the CPU.

    A GPU becomes the current one: streams, events and synchronisation are of that.

    Raises:
        ValueError: There is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_launched_with_others():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.empty(0, device=name)
        if name.startswith("cuda:"):
            torch.cuda.set_device(name)
    except (AssertionError, RuntimeError) as error:
        what = first_line(error)
        raise ValueError(
            f"device must be one that torch {torch.__version__} finds here, got {name!r}: {what}"
        ) from None
    return name
