"""Sizes of a graph as functions of what its symbols are in a call: substituting takes long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch


def compiled_sizes(
    expressions: Sequence[Any], symbols: Sequence[Any]
) -> Callable[..., Sequence[int]]:
    """Return sizes as a function of the values that symbols have, or what became of them."""
    # An input may have become a number since, or be composed.
    names = [each if isinstance(each, sympy.Symbol) else sympy.Dummy() for each in symbols]
    plain = [each if _is_plain(each, symbols) else 0 for each in expressions]
    function: Callable[..., list[int]] = sympy.lambdify(names, plain)
    others = [at for at, each in enumerate(expressions) if not _is_plain(each, symbols)]
    if not others:
        return function

    def substituted(*values: int) -> list[int]:
        sizes, known = function(*values), dict(zip(symbols, values, strict=True))
        for at in others:
            sizes[at] = int(expressions[at].subs(known))
        return sizes

    return substituted


def _is_plain(expression: Any, symbols: Sequence[Any]) -> bool:
    """Whether a size is sums and products of symbols that are known: Python computes it."""
    if isinstance(expression, int):
        return True
    plain = (sympy.Symbol, sympy.Integer, sympy.Add, sympy.Mul)
    parts_are = all(isinstance(part, plain) for part in sympy.preorder_traversal(expression))
    return parts_are and expression.free_symbols <= set(symbols)


def expression_of(size: int | torch.SymInt) -> Any:
    """Return a size as sympy has it, or the number that it is."""
    return size if isinstance(size, int) else size.node.expr
