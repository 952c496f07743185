"""Which layer of the profile an attention call belongs to.

One compiled frame may serve many layers (a decoder that is compiled layer by layer), so a layer
is known by the identity of its parameters wherever the model is at hand, never by call order.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from blindsight.modules import plain_name


class LayerMap:
    """Layers by the parameters of their attention modules, in a model or in several alike."""

    def __init__(self, layer_pattern: str, *models: nn.Module) -> None:
        self._pattern = layer_pattern
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet(models)
        self._layers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._refresh()

    @property
    def layers(self) -> set[int]:
        """The numbers of all layers."""
        return {layer for _, layer in self._layers.values()}

    @property
    def models(self) -> list[nn.Module]:
        """The models, while somebody keeps them."""
        return list(self._models)

    def add(self, model: nn.Module) -> None:
        """Tell the layers of another model, too."""
        self._models.add(model)
        self._refresh()

    def layer_of(self, parameters: Iterable[Any]) -> int | None:
        """Return the one layer that the given tensors belong to, as far as to any, or None."""
        parameters = list(parameters)
        layer = self._look_up(parameters)
        if layer is None:
            # Parameters may have been replaced since (quantisation, adapters, a new device).
            self._refresh()
            layer = self._look_up(parameters)
        return layer

    def has_any(self, parameters: Iterable[Any]) -> bool:
        """Whether any of the given tensors is a parameter of a model, of its decoder or not."""
        ids = {id(parameter) for model in self._models for parameter in model.parameters()}
        return any(id(parameter) in ids for parameter in parameters)

    def _look_up(self, parameters: list[Any]) -> int | None:
        found = set()
        for parameter in parameters:
            entry = self._layers.get(id(parameter))
            if entry is not None and entry[0]() is parameter:
                found.add(entry[1])
        return found.pop() if len(found) == 1 else None

    def _refresh(self) -> None:
        layers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        shared = set()
        for model in self._models:
            for name, parameter in model.named_parameters(remove_duplicate=False):
                matched = re.search(self._pattern, plain_name(name))
                if matched is None:
                    continue
                layer = int(matched.group(1))
                if layers.get(id(parameter), (None, layer))[1] != layer:
                    shared.add(id(parameter))
                layers[id(parameter)] = (weakref.ref(parameter), layer)
        self._layers = {key: value for key, value in layers.items() if key not in shared}
