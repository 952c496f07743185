"""Find modules of a model, tell models apart by their weights, and record or switch modules."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blindsight.configs import CACHE_ARGUMENTS


def plain_name(name: str) -> str:
    """Return the name of a module without the wrappers of ``torch.compile``."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.")


def unwrapped(model: Any) -> Any:
    """Return a model without what ``torch.compile`` wrapped around it."""
    return getattr(model, "_orig_mod", model)


def find_decoder(model: nn.Module, layer_pattern: str) -> nn.Module:
    """Return the module that holds the list of decoder layers.

    Raises:
        ValueError: No module matches ``layer_pattern``.
    """
    for name, _ in model.named_modules():
        plain = plain_name(name)
        if (matched := re.search(f"{layer_pattern}$", plain)) is not None:
            layers = name.removesuffix(plain[matched.start(1) :]).removesuffix(".")
            return model.get_submodule(layers.rpartition(".")[0])
    raise ValueError(
        f"model must have decoder layers at {layer_pattern!r}, got {type(model).__name__}, which "
        "has none. Give a rule whose layer_pattern matches the names of its layers."
    )


class _Recorded(Exception):
    """Ends a forward when the module is called."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


def record_call(model: nn.Module, module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Run a model's forward, uncompiled, until it calls one of its modules.

    Returns:
        The keyword arguments of that call, without those of a cache.

    Raises:
        ValueError: The forward does not call the module.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Recorded(kwargs)

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model(**inputs, use_cache=False)
    except _Recorded as recorded:
        unwanted = ("use_cache", *CACHE_ARGUMENTS)
        return {name: x for name, x in recorded.inputs.items() if name not in unwanted}
    finally:
        hook.remove()
    raise ValueError(
        f"{type(model).__name__} must call its {type(module).__name__} in a forward, and does not."
    )


_AT_ONCE = 2**22  # words, so that copies of them take little memory


def digest_of_model(model: nn.Module) -> str:
    """Return a digest that tells a model from others, by its config and all values of its weights.

    Of weights that are elsewhere (offloaded), or not simply numbers in memory, only the shapes.
    """
    digest = hashlib.sha256()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(config.to_json_string().encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {_sums_of(tensor)}".encode())
    return digest.hexdigest()


def _sums_of(tensor: Tensor) -> list[object]:
    """Return weighted sums of the bits of a tensor, as ints: whatever order they are added in."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass, such as torchao's
        names, context = tensor.__tensor_flatten__()
        return [str(context), *(_sums_of(getattr(tensor, name)) for name in names)]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    is_plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
    if not is_plain:
        return []
    octets = tensor.contiguous().flatten().view(torch.uint8)
    octets, rest = octets[: len(octets) // 8 * 8], octets[len(octets) // 8 * 8 :]
    if octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets.view(torch.int64)
    odd = torch.arange(1, 2 * min(len(words), _AT_ONCE) + 1, 2, device=words.device)
    # An odd factor loses no bit of a word.
    sums = [int((part * odd[: len(part)]).sum()) for part in torch.split(words, _AT_ONCE)]
    return [*sums, rest.tolist()]


@contextmanager
def as_they_are(*modules: nn.Module) -> Iterator[None]:
    """Let modules run as they are in this context, whatever they were compiled with in place."""
    kept = []
    for module in modules:
        compiled, forward = module._compiled_call_impl, vars(module).get("forward")
        original = getattr(forward, "_torchdynamo_orig_callable", None)
        if compiled is not None:
            module._compiled_call_impl = None
        if original is not None:
            module.forward = original
        if compiled is not None or original is not None:
            kept.append((module, compiled, forward))
    try:
        yield
    finally:
        for module, compiled, forward in kept:
            module._compiled_call_impl = compiled
            if forward is not None:
                module.forward = forward


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch off what only training does, such as dropout; afterwards restore each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
