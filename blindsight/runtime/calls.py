"""The calls of modules that are running in this thread, as Python's frames tell them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn


def module_calls() -> list[tuple[FrameType, nn.Module]]:
    """Return the calls of modules that are running in this thread, the outermost first."""
    return list(inner_calls())[::-1]


def inner_calls() -> Iterator[tuple[FrameType, nn.Module]]:
    """Yield the calls of modules that are running in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            yield frame, frame.f_locals["self"]
        frame = frame.f_back


def has_returned(call: FrameType | None) -> bool:
    """Whether a call is over, if it is known; lets go of what it held."""
    if call is None:
        return False
    try:
        call.clear()
    except RuntimeError:  # it is running
        return False
    return True
