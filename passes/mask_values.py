"""What the nodes that build a mask hold, as expressions.

Each becomes an expression of its node's own dimensions, ``("index", 0)`` and so on, in the language
of :mod:`blindsight.attention.base_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


# With indices of less than 2**20 tokens, which 32 bits hold.
_LARGEST_FACTOR, _LARGEST_TERM = 2**10, 2**30


class NotUnderstoodError(Exception):
    """The mask is opaque; the message says why."""


class CannotReadError(Exception):
    """An operation is not understood; elements of its result may still be loaded."""


@dataclass(frozen=True)
class Value:
    """What a node holds: an expression of its dimensions, ``("index", 0)`` and so on.

    No dimension of size one appears in the expression. Inside a vmap the shape is the one that the
    mapped function sees, and the axes that vmap hides have names of their own.
    """

    expression: Expression
    shape: Shape
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        return kind_of_dtype(self.dtype)


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


def kind_of_dtype(dtype: torch.dtype) -> str:
    """Return ``"bool"``, ``"int"``, ``"float"`` or ``"complex"``."""
    if dtype == torch.bool:
        return "bool"
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "int"


def kind_of(operand: Operand) -> str:
    """Return ``"bool"``, ``"int"``, ``"float"`` or ``"complex"``."""
    if isinstance(operand, Value):
        return operand.kind
    return "int" if isinstance(operand, fx.Node) else type(operand).__name__


def never_overflows(name: str, dtype: torch.dtype, operands: Sequence[Expression]) -> bool:
    """Whether an operation may compute with integers of a dtype as if they had no limits."""
    if dtype == torch.int64:
        return True
    # Positions fit in 32 bits, and so do their sums and small multiples; data may not.
    largest = _LARGEST_FACTOR if name == "mul" else _LARGEST_TERM
    numbers = [operand for operand in operands if type(operand) is int]
    has_data = any(loads_of(operand) for operand in operands)
    return dtype == torch.int32 and not has_data and all(abs(x) <= largest for x in numbers)


def number(value: Any, dtype: torch.dtype) -> Any:
    """Return a number as a tensor of this dtype would hold it."""
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
    if kind == "int" and never_overflows("to", dtype, [expression]):
        return expression
    raise CannotReadError
