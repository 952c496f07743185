"""Compile for a while, and leave nothing of it to what else a process compiles.

Dynamo keeps what it compiled of a function with the function's code, whichever backend asked for
it, and gives up on a function that it compiled too often. So a calibration that compiled a model
for many prompts would use up what the model may be compiled for afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

_IS_SEPARATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters
_MOST_LEFT = 128  # graphs; Dynamo gives up on a function that was compiled 256 times by anybody
_left_behind = 0


def compile_apart(model: nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model compiled with code of its own, where torch can keep it apart (2.11 cannot).

    To be called inside of :func:`without_limits`, and ended with :func:`forget_compiled`.
    """
    options: dict[str, Any] = {"isolate_recompiles": True} if _IS_SEPARATE else {}
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, **options)
    return compiled


def without_limits() -> AbstractContextManager[None]:
    """Let Dynamo compile a function as often as it takes, in this context: it is for few calls."""
    limits = {"recompile_limit": 100_000, "accumulated_recompile_limit": 1_000_000}
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(limits)
    return patched


def num_compiled() -> int:
    """Return how many graphs this process has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def forget_compiled(since: int) -> None:
    """Keep what was compiled from spoiling what will be.

    Where torch could not keep it apart, or much has been left behind, all that Dynamo has
    compiled is dropped; it is compiled again when it is needed.

    Args:
        since: :func:`num_compiled` before.
    """
    global _left_behind
    _left_behind += max(num_compiled() - since, 0)
    if not _IS_SEPARATE or _left_behind > _MOST_LEFT:
        torch._dynamo.reset()
        _left_behind = 0
