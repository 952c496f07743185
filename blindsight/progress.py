"""What a user sees while work goes on: a progress bar, but no messages of other libraries."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from blindsight.ranks import current_ranks
from blindsight.runtime.context import BlindsightWarning
from blindsight.timer import wait_for


def progress_bar(progress: bool | None = None, **options: Any) -> Any:
    """Return a bar on standard error. All ``progress`` arguments of the package have this meaning.

    Args:
        progress: True shows the bar, False does not. None shows it if standard error is a
            terminal. Of the processes of a :func:`~blindsight.ranks.shared_run`, only the first
            shows a bar.
        options: Options of ``tqdm``.
    """
    is_hidden = None if progress is None else not progress
    return tqdm(disable=is_hidden if current_ranks().is_first else True, **options)


class Progress:
    """A bar that names the current step on a device, and times it."""

    def __init__(self, bar: Any, device: torch.device | str) -> None:
        self._bar = bar
        self._device = device

    def __call__(self, description: str, function: Callable[[], Any]) -> tuple[Any, float]:
        """Call a function as one step; return its result, and the seconds it took."""
        self._bar.set_description(description)
        wait_for(self._device)
        start = time.perf_counter()
        result = function()
        wait_for(self._device)
        elapsed = time.perf_counter() - start
        self._bar.update()
        return result, elapsed


# Where Dynamo says at length, once a process, that Tensor.item() ends a graph. That a limit was hit
# is said elsewhere, and is left to be seen.
_GRAPH_BREAKS = "torch._dynamo.variables.tensor"
_breaks_lock = threading.Lock()
_breaks_hidden: list[int] = []  # the level before, once for each call under way


@contextmanager
def graph_breaks_hidden() -> Iterator[None]:
    """Hide that a graph breaks where any model of its family does; also decorates a function.

    All else is shown: other messages of torch's, and warnings, the user's own among them. So are
    graph breaks where the user has asked for more logs than there are by default.
    """
    logger = logging.getLogger(_GRAPH_BREAKS)
    with _breaks_lock:
        _breaks_hidden.append(_breaks_hidden[0] if _breaks_hidden else logger.level)
        if logger.getEffectiveLevel() == logging.WARNING:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _breaks_lock:
            level = _breaks_hidden.pop()
            if not _breaks_hidden:
                logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of other libraries; our own warnings are shown as plain lines."""
    import transformers

    transformers_logging: Any = transformers.logging
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Appended, so that filters somebody has set before take precedence.
            warnings.filterwarnings("default", category=BlindsightWarning, append=True)
            warnings.filterwarnings("ignore", append=True)
            shown = warnings.showwarning

            def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
                if issubclass(category, BlindsightWarning):
                    print(f"blindsight: warning: {message}", file=sys.stderr)
                else:
                    shown(message, category, *where, **options)

            warnings.showwarning = show
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
