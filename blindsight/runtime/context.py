"""What a caller says around a call: where the images are, or that it shall run dense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from blindsight.runtime.history import History
from blindsight.template import Template, find_order_problem

_T = TypeVar("_T")


class BlindsightWarning(UserWarning):
    """Attention ran dense, more slowly, or on other images than the profile says; and why."""


class HasForwards(Protocol):
    """A backend's forwards, as far as a template given by hand is concerned."""

    def check_explicit(self, forward: ForwardUnder) -> None:
        """Complain of sparse layers that did not run under the template."""


@dataclass
class ForwardUnder:
    """What a backend did under a template given by hand."""

    history: History
    served: set[int] = field(default_factory=set)
    is_sparse: bool = False  # whether any graph was to restrict a query


@dataclass
class ExplicitTemplate:
    """A template given by hand, and what each backend did under it."""

    template: Template
    forwards: dict[HasForwards, ForwardUnder] = field(default_factory=dict)


_explicit: ContextVar[ExplicitTemplate | None] = ContextVar("blindsight_template", default=None)
_disabled: ContextVar[bool] = ContextVar("blindsight_disabled", default=False)


@contextmanager
def _set(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Give a variable a value inside this context."""
    before = variable.get()
    token = variable.set(value)
    try:
        yield
    finally:
        try:
            variable.reset(token)
        except ValueError:  # a generator that goes on in another context, which had none of this
            variable.set(before)


@contextmanager
def use_template(span_id: Tensor | Template, is_sink: Tensor | None = None) -> Iterator[None]:
    """Say where the images are, for models that never show ``input_ids`` to a compiled graph.

    Args:
        span_id: ``[B, T]`` ints over past and present tokens: 1..n for the tokens of each image
            in prompt order, 0 for text and padding. Or a template that a rule made, alone:
            ``use_template(profile.rule.template(input_ids))``.
        is_sink: ``[B, T]`` bool, the tokens kept visible across images.

    Raises:
        ValueError: The tensors do not describe spans; the message says where. Or, at the end, a
            strict backend has run some layers of its profile under this template, and not all.
    """
    if isinstance(span_id, Template):
        if is_sink is not None:
            raise ValueError("is_sink must be left out with a template, which has one, got both.")
        span_id, is_sink = span_id.tensors()
    explicit = ExplicitTemplate(_checked(span_id, is_sink))
    with _set(_explicit, explicit):
        yield
    for forwards, forward in explicit.forwards.items():
        forwards.check_explicit(forward)


def explicit_template() -> ExplicitTemplate | None:
    """Return the template given by hand that holds here, if any does."""
    return _explicit.get()


@contextmanager
def disabled() -> Iterator[None]:
    """Run the model's own graphs inside this context, for comparison."""
    with _set(_disabled, True):
        yield


def is_disabled() -> bool:
    return _disabled.get()


def _checked(span_id: Tensor, is_sink: Tensor | None) -> Template:
    for name, tensor in (("span_id", span_id), ("is_sink", is_sink)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a tensor [B, T], got {found}.")
    assert is_sink is not None
    if span_id.shape != is_sink.shape:
        raise ValueError(
            "span_id and is_sink must have the same shape, got "
            f"{tuple(span_id.shape)} and {tuple(is_sink.shape)}."
        )
    if span_id.dtype.is_floating_point or span_id.dtype == torch.bool:
        raise ValueError(f"span_id must hold ints, got {span_id.dtype}.")
    if is_sink.dtype != torch.bool:
        raise ValueError(f"is_sink must be bool, got {is_sink.dtype}.")
    span_id = span_id.detach().to("cpu", torch.int32).contiguous()
    problem = find_order_problem(span_id)
    if problem:
        raise ValueError(
            f"span_id must number spans 1..n in prompt order, {problem}. Take both tensors from a "
            "rule: use_template(profile.rule.template(input_ids))."
        )
    return Template(span_id, is_sink.detach().cpu().contiguous())
