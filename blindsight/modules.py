"""Modules of a model: found by their names, told by their weights, switched for a while."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def plain_name(name: str) -> str:
    """Return the name of a part of a model without what ``torch.compile`` wraps in it."""
    return name.replace("._orig_mod", "").removeprefix("_orig_mod.")


def find_decoder(model: nn.Module, layer_pattern: str) -> nn.Module:
    """Return the module that has the list of decoder layers.

    Raises:
        ValueError: None has layers at ``layer_pattern``.
    """
    for name, _ in model.named_modules():
        plain = plain_name(name)
        if (matched := re.search(f"{layer_pattern}$", plain)) is not None:
            layers = name.removesuffix(plain[matched.start(1) :]).removesuffix(".")
            return model.get_submodule(layers.rpartition(".")[0])
    raise ValueError(
        f"model must have decoder layers at {layer_pattern!r}, got {type(model).__name__}, which "
        "has none."
    )


def digest_of_weights(model: nn.Module) -> str:
    """Return a digest that tells a model's weights from others, from a few numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        few = torch.cat([flat[:8], flat[flat.numel() // 2 :][:8], flat[-8:]]).double().cpu()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(few.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch off what only training does (dropout), and give each part its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
