"""What a model's own mask allows, for some queries and keys at a time.

The mask is known, in order of preference, as intervals, as an expression, or as the model's own
tensor. The first two never build a tensor of all pairs.

Shapes: B batch, H query heads, T tokens of the prompt, which are both queries and keys; r rows and
c columns of a block; Hm is 1, or H where the mask differs from head to head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from blindsight.attention.base_mask import Expression, Fact, Form, evaluate_expression, map_tensors
from blindsight.attention.element_masks import allowed_and_bias
from blindsight.attention.form_intervals import base_mask_of, facts_hold
from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.intervals import groups_of_keys
from blindsight.attention.packing import first_span_of, is_packed


class Visibility(Protocol):
    """One mask, asked for what it allows."""

    def of(self, b: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return whether rows may see columns ``[Hm, *]``, and what is added to the scores, if any.

        Args:
            b: Which prompt of the batch.
            rows, columns: int64, tokens in any order, of shapes that broadcast to ``[*]``; for a
                block, ``[r, 1]`` and ``[c]``.
        """
        ...

    def extent(self, b: int, begin: int, end: int) -> tuple[int, int]:
        """Return the first and last column that any of the rows ``begin..end - 1`` may see."""
        ...

    def first_span(self, b: int) -> Tensor | None:
        """Return which rows are in a first span of a packed sequence, ``[T]``; None for span 1."""
        ...

    def intervals(self) -> BaseMask | None:
        """Return the mask as intervals, or None if it is not known to be intervals."""
        ...


class IntervalVisibility:
    """A mask in interval form.

    Args:
        base: The intervals.
        first_span: ``[B, T]`` bool, see :meth:`Visibility.first_span`.
        groups: ``[B, 3, T]`` bool, the groups of tokens that ``base`` has intervals of; None if
            its intervals are of all tokens.
    """

    def __init__(
        self, base: BaseMask, first_span: Tensor | None = None, groups: Tensor | None = None
    ) -> None:
        self._base = base
        self._first_span = first_span
        self._groups = torch.ones_like(base.valid)[:, None] if groups is None else groups
        # read on the host, block by block
        self._bounds = [(x.lower.cpu(), x.upper.cpu()) for x in base.of_groups()]

    def of(self, b: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, None]:
        inside = torch.zeros((), dtype=torch.bool, device=columns.device)
        for base, group in zip(self._base.of_groups(), self._groups[b], strict=True):
            lower, upper = base.lower[b, rows], base.upper[b, rows]
            inside = inside | ((lower <= columns) & (columns <= upper) & group[columns])
        return (inside & self._base.valid[b, columns])[None], None

    def extent(self, b: int, begin: int, end: int) -> tuple[int, int]:
        bounds = [(lower[b, begin:end], upper[b, begin:end]) for lower, upper in self._bounds]
        return min(int(x.min()) for x, _ in bounds), max(int(y.max()) for _, y in bounds)

    def first_span(self, b: int) -> Tensor | None:
        return None if self._first_span is None else self._first_span[b]

    def intervals(self) -> BaseMask | None:
        return self._base


class ElementVisibility:
    """A mask that is read or computed element by element.

    Args:
        elements: ``(b, rows, columns) -> [Hm, *]``, see :meth:`Visibility.of`; bool, or float that
            is added to the scores.
        num_tokens: T.
    """

    def __init__(self, elements: Any, num_tokens: int) -> None:
        self._elements = elements
        self._num_tokens = num_tokens

    def of(self, b: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        return _split(self._elements(b, rows, columns))

    def extent(self, b: int, begin: int, end: int) -> tuple[int, int]:
        return 0, self._num_tokens - 1

    def first_span(self, b: int) -> Tensor | None:
        return None

    def intervals(self) -> BaseMask | None:
        return None


def _split(elements: Tensor) -> tuple[Tensor, Tensor | None]:
    allowed, bias = allowed_and_bias(elements)
    if bias is not None:
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return allowed, bias


def visibility_of_form(
    form: Form, facts: tuple[Fact, ...], span_id: Tensor, is_sink: Tensor
) -> Visibility | None:
    """Return a mask that was proven to be intervals, or None if a fact does not hold."""
    batch, num_tokens = span_id.shape
    sizes: dict[str, Any] = {
        "batch": batch,
        "num_queries": num_tokens,
        "num_keys": num_tokens,
        "device": span_id.device,
    }
    if facts and not bool(facts_hold(facts, **sizes)):
        groups = groups_of_keys(span_id, is_sink, num_tokens)
        if is_packed(form) or not bool(facts_hold(facts, **sizes, groups=groups)):
            return None
        return IntervalVisibility(base_mask_of(form, **sizes, groups=groups), None, groups)
    base = base_mask_of(form, **sizes)
    return IntervalVisibility(base, first_span_of(form, span_id, num_tokens, num_tokens))


def visibility_of_expression(expression: Expression, span_id: Tensor) -> Visibility:
    """Return a mask that was proven to be an expression.

    The tensors that it reads are copied, as the model may overwrite them.
    """
    kept = map_tensors(expression, Tensor.clone)

    def elements(b: int, rows: Tensor, columns: Tensor) -> Tensor:
        number = torch.full((), b, device=columns.device)
        allowed = evaluate_expression(kept, number, rows, columns)
        allowed = torch.as_tensor(allowed, dtype=torch.bool, device=columns.device)
        return (allowed | (rows < 0) | (columns < 0))[None]  # of their full shape

    return ElementVisibility(elements, span_id.shape[1])


def visibility_of_tensor(attn_mask: Tensor, span_id: Tensor) -> Visibility:
    """Return a mask that is the tensor the model made, broadcastable to ``[B, H, T, T]``."""
    while attn_mask.dim() < 4:
        attn_mask = attn_mask[None]
    num_tokens = span_id.shape[1]
    mask = attn_mask.expand(span_id.shape[0], -1, num_tokens, num_tokens)

    def elements(b: int, rows: Tensor, columns: Tensor) -> Tensor:
        found: Tensor = mask[b][:, rows, columns]
        return found

    return ElementVisibility(elements, num_tokens)


def visibility_or_given(
    known: Visibility | None, attn_mask: Tensor | None, span_id: Tensor
) -> Visibility:
    """Return what is known of a mask, or else the mask as the model made it."""
    if known is not None:
        return known
    assert attn_mask is not None, "a call without a mask rests on no facts"
    return visibility_of_tensor(attn_mask, span_id)
