"""FX passes: plain functions on a GraphModule, usable with or without the backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["GraphPass", "SparseAttention", "sparse_attention_pass"]

_HOMES = {
    "GraphPass": "blindsight.passes.contract",
    "SparseAttention": "blindsight.passes.sparse_attention",
    "sparse_attention_pass": "blindsight.passes.sparse_attention",
}

if TYPE_CHECKING:
    from blindsight.passes.contract import GraphPass
    from blindsight.passes.sparse_attention import SparseAttention, sparse_attention_pass


def __getattr__(name: str) -> Any:
    # Imported on first use: single passes need neither Inductor nor profiles.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
