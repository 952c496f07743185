"""Tensors that say they are on a GPU, on a machine without one: what mixes devices is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "dot", "mv"}
DEVICE = torch.device("meta")  # which every build of torch knows


class OnGpu(torch.Tensor):
    """A tensor of a pretended device, computed on the CPU."""

    data_: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=DEVICE
        )
        made.data_ = data
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.data_!r})"


class _Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, dict(kwargs or {}))


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    name = func.overloadpacket.__name__
    moves = name in ("_to_copy", "copy_")
    # A GPU takes numbers, and indices, from a CPU.
    others = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0]
    indexes = name in ("index", "index_put_") and isinstance(args[0], OnGpu)
    if on_gpu and others and not moves and not indexes:
        raise RuntimeError(f"{name}: all tensors must be on the same device")
    if on_gpu and name in _PRODUCTS and not tensors[0].is_floating_point():
        raise RuntimeError(f"{name}: a GPU has no matrix products of integers")
    if kwargs.get("device") is not None:  # factories like another tensor, and moves
        on_gpu = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = torch.device("cpu")
    plain: Any = tree_map(lambda x: x.data_ if isinstance(x, OnGpu) else x, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if func._schema.is_mutable:
        return args[0] if isinstance(found, torch.Tensor) else found
    if not on_gpu:
        return found
    return tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) else x, found)


def _with_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Make(TorchFunctionMode):
    """Makes and moves tensors, where a build without CUDA would not even dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].data_.tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            # a list would become a tensor of no data, on the device itself
            args = (args[0], _with_tensors(args[1]), *args[2:])
        device = kwargs.get("device")
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            device = args[1]
        if device is None or torch.device(device).type != DEVICE.type:
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return args[0] if isinstance(args[0], OnGpu) else OnGpu(args[0])
        return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))


@contextmanager
def pretending() -> Iterator[None]:
    """Let tensors be moved to the pretended device, and made there."""
    with _Make(), _Pretend():
        yield


def place(module: torch.nn.Module, *, on_gpu: bool) -> None:
    """Put a module on the pretended device, or leave it; it moves what it is given, as hooks of
    accelerate do."""

    def move(value: Any) -> Any:
        if on_gpu and type(value) in (torch.Tensor, torch.nn.Parameter):
            return OnGpu(value.detach())
        return value.data_ if isinstance(value, OnGpu) and not on_gpu else value

    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = move(buffer)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.nn.Parameter(move(parameter), requires_grad=False)
                part._parameters[name] = moved

    def hook(_: Any, args: Any, kwargs: Any) -> Any:
        moved = {name: tree_map(move, value) for name, value in kwargs.items()}
        return tree_map(move, args), moved

    module.register_forward_pre_hook(hook, with_kwargs=True)
