"""The models that a backend serves: found where they are called, told by their parameters."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from blindsight.configs import text_config
from blindsight.modules import unwrapped
from blindsight.profile import Profile
from blindsight.runtime.calls import eager_calls, inner_calls, module_calls
from blindsight.runtime.forwards import Forwards
from blindsight.runtime.layers import LayerMap
from blindsight.runtime.watch import observe_call, tokens_of, watch_forward, watch_head
from blindsight.text_tables import compact


class AttachedModels:
    """The models that a backend is attached to; it keeps none of them alive.

    Args:
        profile: The profile of these models.
        forwards: Takes note of their forwards.
        is_backend: Whether Dynamo's compiler leads to the backend.

    Attributes:
        layer_map: Tells their layers by parameters.
        problem: Why the profile does not fit the model that was called, where it seems meant for
            it; else None.
        is_of_another: Whether that is because it is of another model; else no layers were found.
    """

    def __init__(
        self, profile: Profile, forwards: Forwards, is_backend: Callable[[object], bool]
    ) -> None:
        self.layer_map = LayerMap(profile.rule.layer_pattern)
        self._profile = profile
        self._forwards = forwards
        self._is_backend = is_backend
        self._parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # of the models, and they
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._others: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.problem: str | None = None
        self.is_of_another = False
        self._hooks: list[RemovableHandle] = []
        self._lock = threading.Lock()  # several threads may call a model first

    def attach(self, model: nn.Module) -> None:
        """Tell layers by a model's parameters from now on, and watch its forwards.

        Raises:
            ValueError: The profile is not of this model.
        """
        model = unwrapped(model)
        profile = self._profile
        profile.validate(model, part_is_fine=True)
        layers = self._layers_in(model)
        if layers != set(profile.layers):
            raise ValueError(
                f"model must have attention parameters in layers {compact(profile.layers)} at "
                f"{profile.rule.layer_pattern!r}, found {compact(sorted(layers)) or 'none'}. "
                "Give the whole model, or a rule whose layer_pattern matches its parameter names; "
                "of a pipeline stage, profile.stage(first, stop, keeps_numbers=...)."
            )
        self._watch(model)

    def _layers_in(self, model: nn.Module) -> set[int]:
        return LayerMap(self._profile.rule.layer_pattern, model).layers

    def _watch(self, model: nn.Module) -> None:
        self.layer_map.add(model)
        self._parts.update(model.modules())
        self._watched.add(model)
        self._hooks += watch_forward(model, self._forwards, self._is_backend)

    def attach_to_called(self) -> None:
        """Attach to the model of the profile that is being called, if any is.

        Where modules around it run uncompiled they may give it other tokens than they are given,
        so it is the innermost of those that are given any; else the outermost of all.
        """
        calls = eager_calls()
        for at, (call, module) in enumerate(calls):
            model = unwrapped(module)
            if model in self._watched:
                return
            tokens = tokens_of(call)
            if tokens is not None and self._attach_found(model, call):
                callers = [unwrapped(each) for _, each in calls[at:]]
                head = watch_head(callers, self._forwards, self._is_backend)
                self._hooks += [] if head is None else [head]
                for around, _ in calls[at + 1 :]:
                    given = tokens_of(around)
                    if given is not None and given is not tokens:
                        self._forwards.expect_same_images(given, tokens)
                return
        for call, module in module_calls():
            model = unwrapped(module)
            if model in self._parts or self._attach_found(model, call):
                return
        self._attach_within()

    def _attach_within(self) -> None:
        """Attach to the model in a module that has no config, or to such a module."""
        for _, module in inner_calls():
            if hasattr(module, "config") or module in self._others:
                continue
            for part in module.modules():
                if hasattr(part, "config") and self._has_all_layers(part):
                    if not self._attach_if_fits(part):
                        self._others.add(module)
                    return
            with self._lock:
                if not self._has_all_layers(module):
                    self._others.add(module)
                    continue
                if module not in self._watched:
                    self._watch(module)
            return

    def _has_all_layers(self, module: nn.Module) -> bool:
        return self._layers_in(module) == set(self._profile.layers)

    def _attach_found(self, model: nn.Module, call: FrameType) -> bool:
        """Attach to a model that is being called, if it is the profile's."""
        if not self._attach_if_fits(model):
            return False
        observe_call(self._forwards, call, is_first=True)
        return True

    def _attach_if_fits(self, model: nn.Module) -> bool:
        with self._lock:
            if model in self._others:
                return False
            if model not in self._watched:
                try:
                    self.attach(model)
                except ValueError as error:
                    self._others.add(model)
                    if self.problem is None:
                        self._note_problem(model, str(error).removesuffix("."))
                    return False
                self.problem = None  # what other modules of its are does not matter
        return True

    def _note_problem(self, model: nn.Module, problem: str) -> None:
        """Keep why a profile does not fit a model, if it seems meant for it.

        That is a whole vision-language model, unless the profile is of its text model; or one of
        exactly the profile's shape in which no layers are found.
        """
        config = getattr(model, "config", None)
        if config is None:
            return
        if self._is_of(config):
            if not self._layers_in(model):
                self.problem = problem
            return
        has_vision = getattr(config, "vision_config", None) is not None
        if has_vision and not self._is_of(text_config(config)):
            self.problem, self.is_of_another = problem, True

    def _is_of(self, config: Any) -> bool:
        """Whether the profile is of models with this config."""
        try:
            self._profile.validate(config, part_is_fine=True)
        except ValueError:
            return False
        return True

    def look_for_prompt(self) -> None:
        """Take note of what the model is given whose decoder runs, if no hook has told it."""
        if self._forwards.is_watched:
            return  # not to walk through all calls for each layer
        self.attach_to_called()
        if self._forwards.pending is not None:
            return
        for call, module in inner_calls():
            if module in self._watched:  # called before its hooks were there
                observe_call(self._forwards, call)
                return

    def layer_of(self, parameters: Sequence[Any]) -> int | None:
        """Return the one layer that tensors belong to, if any; a copy of a model may be new."""
        layer = self.layer_map.layer_of(parameters)
        if layer is None:
            self.attach_to_called()
            layer = self.layer_map.layer_of(parameters)
        return layer

    def detach(self) -> None:
        """Remove the hooks from all models."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
