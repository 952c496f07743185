"""The backend that compiles what the passes leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from blindsight.cache_keys import cacheable_functions

OPTIONS_OF_INDUCTOR = ("mode", "options", "config_patches")
_CACHEABLE = "unsafe_marked_cacheable_functions"  # of Inductor's config


class Inner:
    """An inner backend, by name or as a callable, with its options.

    Args:
        backend: A name, or a callable ``(gm, example_inputs, **options)``.
        options: For it.
        identities: What else shall be in the keys of Inductor's caches, by name.

    Raises:
        ValueError: No backend has that name.
    """

    def __init__(
        self,
        backend: str | Callable[..., Any],
        options: dict[str, Any],
        identities: Mapping[str, str] | None = None,
    ) -> None:
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
        self.identities = identities

    @property
    def name(self) -> str:
        if isinstance(self.backend, str):
            return self.backend
        return getattr(self.backend, "__name__", type(self.backend).__name__)

    @property
    def takes_regions(self) -> bool:
        """Whether it compiles a region of a graph once for all who call it."""
        # The C++ wrapper has no code for regions, and there is no telling of other backends.
        return self.backend == "inductor" and not self._patches().get(
            "cpp_wrapper", torch._inductor.config.cpp_wrapper
        )

    def has_attention_in(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it can compile FlexAttention of queries of a dtype, as far as is known."""
        # Those of torch._inductor.kernel.flex.flex_cpu.
        kernels = (torch.float32, torch.bfloat16, torch.float16)
        return self.backend != "inductor" or device.type != "cpu" or dtype in kernels

    def with_options(self, options: dict[str, Any]) -> Inner:
        """Return this backend with options of ``torch.compile`` added."""
        if not options:
            return self
        return Inner(self.backend, {**self.options, **options}, self.identities)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.backend == "inductor":
            return self._compile_with_inductor(gm, example_inputs)
        compile_graph: Any = self.backend
        if isinstance(self.backend, str):
            compile_graph = torch._dynamo.lookup_backend(self.backend)
        compiled: Callable[..., Any] = compile_graph(gm, list(example_inputs), **self.options)
        return compiled

    def _compile_with_inductor(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        options = {
            name: value for name, value in self.options.items() if name not in OPTIONS_OF_INDUCTOR
        }
        patches = self._patches()
        known = patches.get(_CACHEABLE, getattr(config, _CACHEABLE, None))
        if known is not None:
            patches[_CACHEABLE] = {**known, **cacheable_functions(self.identities)}
        options["config_patches"] = patches
        if detect_fake_mode(example_inputs) is not None:  # Dynamo's, or that of symbolic sizes
            return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), **options))
        # Outside of Dynamo, for these sizes alone. Inductor caches a graph only where there is an
        # environment for symbolic sizes, even if it has none.
        sizes = ShapeEnv(allow_dynamic_output_shape_ops=True)  # Dynamo has decided on that
        with tracing(TracingContext(FakeTensorMode(shape_env=sizes))):
            compiled = compile_fx(gm, list(example_inputs), ignore_shape_env=True, **options)
        return cast(Callable[..., Any], compiled)

    def _patches(self) -> dict[str, Any]:
        """Return what of Inductor's config the options change."""
        from torch._inductor import list_mode_options

        # As torch.compile itself does: a mode stands for a set of config values.
        patches = dict(list_mode_options(self.options.get("mode") or "default"))
        patches.update(self.options.get("options") or {})
        patches.update(self.options.get("config_patches") or {})
        return patches


def name_for_files(backend: str | Callable[..., Any]) -> str:
    """Return what tells a backend from others in a file that outlives the process.

    Of what has no name of its own (lambdas, partials) that is nothing that another process has.
    """
    if isinstance(backend, str):
        return backend
    name = f"{getattr(backend, '__module__', '')}.{getattr(backend, '__qualname__', '<')}"
    return repr(backend) if "<" in name else name
