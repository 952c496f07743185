"""See what the backend does to a model, without waiting for a compiler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from blindsight.backend import blindsight_backend
from blindsight.profile import Profile
from blindsight.progress import graph_breaks_hidden
from blindsight.report import Report


@graph_breaks_hidden()
def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    profile: Profile | str | os.PathLike[str],
    *,
    lowering: str = "auto",
) -> Report:
    """Trace and rewrite a model, run it once uncompiled, and say what became of its attention.

    Args:
        model: A transformers model; left as it is.
        inputs: Keyword arguments of its forward.
        profile: A profile, or the path of one.
        lowering: As for :func:`~blindsight.blindsight_backend`.

    Returns:
        What became of every attention call: ``print`` shows totals and a table.
    """
    backend = blindsight_backend(
        profile, inner="eager", model=model, strict=False, lowering=lowering
    )
    compiled = [(module, module._compiled_call_impl) for module in model.modules()]
    try:
        for module, _ in compiled:  # those that were compiled in place by another backend
            module._compiled_call_impl = None
        with torch.no_grad():
            torch.compile(model, backend=backend)(**inputs)
    finally:
        backend.detach()
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
    return backend.report()
