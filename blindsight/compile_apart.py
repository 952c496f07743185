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


def forget_compiled() -> None:
    """Drop what was compiled: where torch cannot keep it apart, all that Dynamo has compiled."""
    if not _IS_SEPARATE:
        torch._dynamo.reset()
