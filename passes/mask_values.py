"""What a node of a graph that builds a mask holds, as an expression.

Every node becomes an expression of its own dimensions, ``("index", 0)`` and so on; the language is
that of :mod:`blindsight.attention.base_mask`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from blindsight.attention.base_mask import Expression
from blindsight.passes.expressions import (
    choose_on_leaves,
    leaves_of,
    loads_of,
    on_leaves,
    substitute,
    where,
)

Shape = tuple[int | torch.SymInt, ...]


class NotUnderstoodError(Exception):
    """The mask is opaque; says why."""


class CannotReadError(Exception):
    """An operation is not understood; its result may still be loaded from."""


@dataclass(frozen=True)
class Value:
    """What a node holds: an expression of its dimensions, ``("index", 0)`` and so on.

    No dimension of size one appears in it. Inside a vmap the shape is what a function sees, and
    the axes that vmap hides have names of their own.
    """

    expression: Expression
    shape: Shape
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        if self.dtype == torch.bool:
            return "bool"
        if self.dtype.is_floating_point:
            return "float"
        return "complex" if self.dtype.is_complex else "int"


Operand = Value | bool | int | float | fx.Node  # a node is a symbolic size


class Reader(Protocol):
    """What the reading of one operation asks of :class:`blindsight.passes.read_mask.MaskReader`."""

    def read(self, node: fx.Node) -> Value:
        """Return what a node holds."""

    def operand(self, argument: object) -> Operand:
        """Return what an argument of a node stands for."""

    def is_hidden(self, node: fx.Node) -> bool:
        """Whether a node inside a vmap depends on what vmap hides."""

    def level_of(self, node: fx.Node, level: int) -> str:
        """Return the name of the axis that a level of vmap hides at a node."""


def kind_of(operand: Operand) -> str:
    """Return ``"bool"``, ``"int"``, ``"float"`` or ``"complex"``."""
    if isinstance(operand, Value):
        return operand.kind
    return "int" if isinstance(operand, fx.Node) else type(operand).__name__


def number(value: Any, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of a dtype holds it."""
    if dtype.is_complex:
        raise CannotReadError
    if dtype == torch.bool:
        return bool(value)
    if dtype.is_floating_point:
        return float(torch.tensor(float(value), dtype=dtype))
    if not math.isfinite(value) or not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
        raise CannotReadError
    return int(value)


def aligned(operand: Operand, shape: Shape) -> Expression:
    """Return an operand as an expression of the dimensions of a result."""
    if not isinstance(operand, Value):
        return operand
    shift = len(shape) - len(operand.shape)
    if shift == 0:
        return operand.expression
    return substitute(
        operand.expression,
        {axis: ("index", axis + shift) for axis in range(len(operand.shape))},
    )


def cast_to(expression: Expression, kind: str, dtype: torch.dtype) -> Expression:
    """Return a value in another dtype."""
    if dtype == torch.bool:
        if kind == "bool":
            return expression
        if leaves_of(expression) is not None:
            return choose_on_leaves(expression, bool)
        return ("ne", expression, 0)
    if kind == "bool":
        return where(expression, number(1, dtype), number(0, dtype))
    if leaves_of(expression) is not None:
        return on_leaves(expression, lambda leaf: number(leaf, dtype))
    # Positions fit in 32 bits; data may not.
    safe = dtype == torch.int64 or (dtype == torch.int32 and not loads_of(expression))
    if kind == "int" and safe:
        return expression
    raise CannotReadError
