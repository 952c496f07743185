"""The backend that compiles what the passes leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


class Inner:
    """An inner backend, by name or as a callable, with its options.

    Raises:
        ValueError: No backend has that name.
    """

    def __init__(self, backend: str | Callable[..., Any], options: dict[str, Any]) -> None:
        if isinstance(backend, str):
            known = torch._dynamo.list_backends(None)
            if backend not in known or backend == "blindsight":
                raise ValueError(
                    f"inner must be a callable or one of {', '.join(known)}, got {backend!r}."
                )
        elif not callable(backend):
            raise ValueError(f"inner must be a backend's name or a callable, got {backend!r}.")
        self.backend = backend
        self.options = options

    @property
    def name(self) -> str:
        if isinstance(self.backend, str):
            return self.backend
        return getattr(self.backend, "__name__", type(self.backend).__name__)

    def with_options(self, options: dict[str, Any]) -> Inner:
        """Return this backend with options of ``torch.compile`` added."""
        return Inner(self.backend, {**self.options, **options}) if options else self

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        options = dict(self.options)
        compile_graph: Any = self.backend
        if self.backend == "inductor":
            from torch._inductor import list_mode_options
            from torch._inductor.compile_fx import compile_fx as compile_graph

            # As torch.compile itself does: a mode stands for a set of config values.
            patches = dict(list_mode_options(options.pop("mode", None) or "default"))
            patches.update(options.pop("options", None) or {})
            options["config_patches"] = {**patches, **(options.get("config_patches") or {})}
        elif isinstance(self.backend, str):
            compile_graph = torch._dynamo.lookup_backend(self.backend)
        compiled: Callable[..., Any] = compile_graph(gm, list(example_inputs), **options)
        return compiled
