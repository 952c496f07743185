"""Time calls on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_SHORT = 3.0  # milliseconds: of a call that is captured before it is timed
_BURST = 50.0  # milliseconds that calls in a row take, about: the host is ahead of the device then
_LONGEST_BURST = 100  # calls


def wait_for(*devices: torch.device | str) -> None:
    """Wait until devices have finished all work given to them; for a CPU that is at once."""
    for device in map(torch.device, devices):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class Timer:
    """Times calls: on a CPU by the wall clock, on a GPU by events.

    On a GPU, a timing spans enough calls in a row to take some milliseconds. Short calls are
    captured as a CUDA graph first: launching them from Python would take longer than running them.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.on_gpu = self._device.type != "cpu"

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the wall-clock time of one call, until the device has finished."""
        wait_for(self._device)
        begin = time.perf_counter()
        run()
        wait_for(self._device)
        return time.perf_counter() - begin

    def prepare(self, run: Callable[[], object]) -> Callable[[], float]:
        """Return a function that times a call, in milliseconds; ``run`` has run before."""
        if not self.on_gpu:
            return lambda: self.seconds(run) * 1e3
        estimate = self._of_burst(run, 1)
        if estimate < _SHORT:
            try:
                run = _Replay.of(run)
            except RuntimeError:  # it waits for the device, or copies from the host
                wait_for(self._device)
            estimate = min(self._of_burst(run, 1) for _ in range(2))
        number = max(1, min(_LONGEST_BURST, round(_BURST / estimate)))
        return lambda: self._of_burst(run, number)

    def _of_burst(self, run: Callable[[], object], number: int) -> float:
        make_event: Any = torch.cuda.Event
        begin, end = (make_event(enable_timing=True) for _ in range(2))
        wait_for(self._device)
        begin.record()
        for _ in range(number):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / number


@dataclass(frozen=True)
class _Replay:
    """The CUDA graph of a call; ``run`` keeps the tensors alive that it reads."""

    graph: torch.cuda.CUDAGraph
    run: Callable[[], object]

    @classmethod
    def of(cls, run: Callable[[], object]) -> _Replay:
        beside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return cls(graph, run)

    def __call__(self) -> None:
        self.graph.replay()
