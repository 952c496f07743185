"""A model shows its forwards to a backend: where each begins and ends, and what it is given.

Hooks tell what graphs cannot: that a forward is over, whether it failed, and that Dynamo ran all
of it uncompiled. Where a graph has the whole model in it, its hooks trace to nothing.
"""

from __future__ import annotations

import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from blindsight.modules import plain_name
from blindsight.passes.find_inputs import is_axis_positions, is_token_ids, is_video_grid
from blindsight.runtime.calls import dynamo_callback, inner_calls
from blindsight.runtime.context import explicit_template
from blindsight.runtime.forwards import Forwards


class _Hook:
    """Holds a backend's forwards weakly; a model that was pickled drops it."""

    def __init__(self, forwards: Forwards, is_backend: Callable[[object], bool]) -> None:
        self._forwards: Callable[[], Forwards | None] = weakref.ref(forwards)
        self._is_backend = is_backend

    def __deepcopy__(self, memo: object) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _stored, ()


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Not is_compiling(), which is true while any other thread compiles something; and not in
        # a function, which Dynamo would compile as a frame of its own.
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return
        from torch._C._dynamo.eval_frame import get_eval_frame_callback

        self._begin(module, args, kwargs, get_eval_frame_callback())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], callback: object
    ) -> None:
        forwards = self._forwards()
        if forwards is None:
            return
        # False: Dynamo runs what is compiled, and compiles nothing new.
        callbacks = list(_callbacks()) if callback is False else [callback]
        forwards.begin(
            _call_of(module),
            _input_ids(args, kwargs),
            is_compiled=lambda: any(_is_compiled(each, self._is_backend) for each in callbacks),
        )
        _observe_images(forwards, kwargs)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Not is_compiling(), which is true while any other thread compiles something.
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return
        self._end(module, failed=output is None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, model: nn.Module, failed: bool) -> None:
        if (forwards := self._forwards()) is not None:
            pattern = forwards.rule.layer_pattern
            compiles = partial(_compiles_layers, model, pattern, self._is_backend)
            forwards.end(_call_of(model), failed=failed, may_be_compiled=compiles)


class _BeforeHead(_Hook):
    """Tells once, in the thread that made it, that the decoder has run."""

    handle: RemovableHandle

    def __init__(self, forwards: Forwards, is_backend: Callable[[object], bool]) -> None:
        super().__init__(forwards, is_backend)
        self._thread = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return
        self._finish()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self) -> None:
        if threading.get_ident() == self._thread:
            self.handle.remove()
            forwards = self._forwards()
            if forwards is not None and explicit_template() is None:
                forwards.finish()


def observe_call(forwards: Forwards, call: FrameType, *, is_first: bool = False) -> None:
    """Take note of what a model is given, of which a call is already under way.

    Args:
        forwards: What takes note.
        call: As :func:`~blindsight.runtime.calls.module_calls` returns it.
        is_first: Whether nothing was known of the model before.
    """
    args, kwargs = call.f_locals["args"], call.f_locals["kwargs"]
    if (input_ids := _input_ids(args, kwargs)) is not None:
        forwards.observe(input_ids, is_first=is_first)
    _observe_images(forwards, kwargs)


def tokens_of(call: FrameType) -> Tensor | None:
    """Return the ``input_ids`` that a module's call is given, if it is given any."""
    return _input_ids(call.f_locals["args"], call.f_locals["kwargs"])


def watch_forward(
    model: nn.Module, forwards: Forwards, is_backend: Callable[[object], bool]
) -> list[RemovableHandle]:
    """Let a model show its forwards.

    Args:
        model: It keeps neither the forwards nor a backend alive.
        forwards: What takes note.
        is_backend: Whether a compiler is the backend whose forwards it is.
    """
    from torch._dynamo.eval_frame import skip_code

    for hook in (_Before, _After):
        # Compiled as frames of their own they would be told that all is being compiled.
        skip_code(hook.__call__.__code__)
    before, after = _Before(forwards, is_backend), _After(forwards, is_backend)
    return [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]


def watch_head(
    modules: Iterable[nn.Module], forwards: Forwards, is_backend: Callable[[object], bool]
) -> RemovableHandle | None:
    """Let the output embedding of a model tell that the decoder has run, once.

    For a call that is under way as the model is found: hooks on the model itself come too late.

    Args:
        modules: The model, and what calls it: one of them has the embedding.
        forwards, is_backend: As for :func:`watch_forward`.
    """
    from torch._dynamo.eval_frame import skip_code

    skip_code(_BeforeHead.__call__.__code__)
    for module in modules:
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if isinstance(head, nn.Module):
            hook = _BeforeHead(forwards, is_backend)
            hook.handle = head.register_forward_pre_hook(hook)
            return hook.handle
    return None


def _call_of(module: nn.Module) -> FrameType | None:
    """Return the innermost call of a module that is running in this thread."""
    return next((call for call, each in inner_calls() if each is module), None)


def _callbacks() -> Iterator[object]:
    """Yield what Dynamo would call, of each compiled function that is running in this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield dynamo_callback(frame)
        frame = frame.f_back


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = kwargs.get("input_ids", args[0] if args else None)
    return given if isinstance(given, Tensor) and is_token_ids(given) else None


def _observe_images(forwards: Forwards, kwargs: dict[str, Any]) -> None:
    """Take note of what tells the frames of videos apart, and that there are images at all."""
    grid, positions = (kwargs.get(name) for name in ("video_grid_thw", "position_ids"))
    if isinstance(grid, Tensor) and is_video_grid(grid):
        forwards.observe_videos(grid)
    if isinstance(positions, Tensor) and is_axis_positions(positions):
        forwards.observe_positions(positions)
    for name in ("pixel_values", "pixel_values_videos"):
        pixels = kwargs.get(name)
        if isinstance(pixels, Tensor) and pixels.numel() > 0:
            forwards.expect_images()


def _is_compiled(callback: object, is_backend: Callable[[object], bool]) -> bool:
    """Whether what Dynamo calls for the frames to come leads to a backend."""
    from torch._dynamo.eval_frame import innermost_backend

    if not callable(callback):
        return False
    return is_backend(innermost_backend(callback))


def _compiles_layers(
    model: nn.Module, layer_pattern: str, is_backend: Callable[[object], bool]
) -> bool:
    """Whether a part of a model that a backend compiles holds attention of the decoder."""
    from torch._dynamo.eval_frame import _stance

    if _stance.stance == "force_eager":
        return False
    for name, part in model.named_modules():
        if _is_compiled(_callback_of(part), is_backend):
            for below, _ in part.named_modules():
                if re.search(layer_pattern, plain_name(f"{name}.{below}")):
                    return True
    return False


def _callback_of(part: nn.Module) -> object:
    """Return what Dynamo calls for the frames of a module, if that is compiled for itself."""
    context = getattr(part, "dynamo_ctx", None)  # of what torch.compile returns
    # transformers keeps in `_compiled_call` what decodes on a static cache.
    own = vars(part)
    for function in (part._compiled_call_impl, own.get("forward"), own.get("_compiled_call")):
        for cell in getattr(function, "__closure__", None) or ():
            if context is None and hasattr(cell.cell_contents, "callback"):
                context = cell.cell_contents
    return getattr(context, "callback", None)


def _stored() -> Callable[..., None]:
    """Return what is in a hook's place in a model that was stored."""
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
