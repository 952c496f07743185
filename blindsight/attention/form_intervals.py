"""The intervals that a form allows, and whether what they rest on holds for data.

Forms, facts and expressions are those of :mod:`blindsight.attention.base_mask`.

Shapes: B batch, G groups of keys, Q and K lengths in tokens, T tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from blindsight.attention.base_mask import (
    Expression,
    Fact,
    Form,
    conjuncts,
    evaluate_expression,
)
from blindsight.attention.interval_masks import BaseMask

_Interval = tuple[Tensor, Tensor]  # first and last key column [B or 1, Q or 1], first > last: none

# Pairs of values are compared as one number, which must not overflow.
_MAX_PAIR = 2.0**62


def base_mask_of(
    form: Form,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None = None,
    groups: Tensor | None = None,
) -> BaseMask:
    """Return what a form allows: an interval of key columns per query row, and the valid columns.

    Plain operations in O(Q + K) memory, and time but for one sort; no data is read on the host.

    Args:
        form: With tensors.
        batch, num_queries, num_keys: B, Q and K.
        device: Where the mask is needed.
        groups: ``[B, G, K]`` bool, if there shall be an interval for each of these groups of keys:
            bounds are ``[B, G, Q]`` then.
    """
    grids = _grids(batch, num_queries, num_keys, device, groups)
    bounds = [
        [bound.expand(batch, num_queries).to(torch.int32) for bound in grid.interval(form)]
        for grid in grids
    ]
    lower, upper = (
        side[0] if groups is None else torch.stack(side, dim=1)
        for side in zip(*bounds, strict=True)
    )
    valid = torch.ones((batch, num_keys), dtype=torch.bool, device=device)
    for part in conjuncts(form):
        if part[0] == "valid":
            valid = valid & grids[0].column(part[1])
    return BaseMask(lower, upper, valid)


def facts_hold(
    facts: Iterable[Fact],
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Return whether a form is what the model's mask is on this data: 0-d bool.

    Args:
        facts: With tensors.
        batch, num_queries, num_keys, device, groups: As for :func:`base_mask_of`.
    """
    grids = _grids(batch, num_queries, num_keys, device, groups)
    hold = torch.ones((), dtype=torch.bool, device=device)
    for name, *args in facts:
        if name == "consecutive":
            hold = hold & _are_consecutive(*args)
            continue
        rows, *what = args
        for grid in grids:
            found = grid.is_contiguous(*what) if name == "contiguous" else grid.is_connected(*what)
            hold = hold & (found | ~grid.row(rows)).all()
    return hold


def _grids(
    batch: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str | None,
    groups: Tensor | None,
) -> list[_Grid]:
    """Return one for all keys, or one for each group ``[B, G, K]`` of them."""
    each = [None] if groups is None else groups.unbind(1)
    return [
        _Grid(batch, num_queries, num_keys, device, group, number)
        for number, group in enumerate(each)
    ]


class _Grid:
    """Rows and columns of one attention call.

    Args:
        batch, num_queries, num_keys, device: Of the call.
        group: ``[B, K]`` bool, the only columns that there are; by default all.
        number: Of the group.
    """

    def __init__(
        self,
        batch: int,
        num_queries: int,
        num_keys: int,
        device: torch.device | str | None,
        group: Tensor | None = None,
        number: int = 0,
    ) -> None:
        self.num_keys = num_keys
        self.b = torch.arange(batch, device=device)[:, None]
        self.q = torch.arange(num_queries, device=device)[None]
        self.k = torch.arange(num_keys, device=device)[None]
        self._group = group
        self._number = number
        self._ranks = None if group is None else pad(group.cumsum(1), (1, 0))

    def row(self, expression: Expression) -> Tensor:
        """Return an expression of the row, ``[B, Q]``."""
        return self._full(evaluate_expression(expression, self.b, self.q, None), self.q)

    def column(self, expression: Expression) -> Tensor:
        """Return an expression of the column, ``[B, K]``."""
        return self._full(evaluate_expression(expression, self.b, None, self.k), self.k)

    def _full(self, value: Any, along: Tensor) -> Tensor:
        shape = (self.b.shape[0], along.shape[1])
        if not isinstance(value, Tensor):
            dtype = torch.bool if isinstance(value, bool) else torch.int64
            return torch.full(shape, value, dtype=dtype, device=along.device)
        return value.expand(shape)

    def everything(self) -> _Interval:
        zero = self.q * 0
        return zero, zero + (self.num_keys - 1)

    def interval(self, form: Form) -> _Interval:
        """Return the interval of key columns of every row, clipped to 0..K-1."""
        first, last = self.everything()
        name, *args = form
        if name == "upper":
            return first, self.row(args[0]).clamp(-1, self.num_keys - 1)
        if name == "lower":
            return self.row(args[0]).clamp(0, self.num_keys), last
        if name == "row":
            return torch.where(self.row(args[0]), first, self.num_keys), last
        if name == "same":
            found_first, found_last, _ = self._equal(*args)
            return found_first, found_last
        if name == "by group":
            return self.interval(args[self._number])
        if name == "and":
            for part in args:
                lower, upper = self.interval(part)
                first, last = torch.maximum(first, lower), torch.minimum(last, upper)
            return first, last
        if name == "or":
            first, last = first + self.num_keys, last * 0 - 1
            for part in args:
                lower, upper = self.interval(part)
                some = self._size(lower, upper) > 0
                first = torch.where(some, torch.minimum(first, lower), first)
                last = torch.where(some, torch.maximum(last, upper), last)
            return first, last
        assert name in ("nothing", "valid"), f"unknown form {name}"
        return first, last

    def is_contiguous(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...]
    ) -> Tensor:
        """Whether the columns whose values equal a row's are neighbours, ``[B, Q]``."""
        first, last, count = self._equal(of_row, of_column, False)
        fits = _pair_fits(*self._compared(of_row, of_column))
        return fits & ((count == 0) | (self._size(first, last) == count))

    def is_connected(self, forms: tuple[Form, ...]) -> Tensor:
        """Whether the intervals of several forms join to one, ``[B, Q]``."""
        first, last = self.interval(forms[0])
        connected = torch.ones_like(self.b + self.q, dtype=torch.bool)
        for form in forms[1:]:
            lower, upper = self.interval(form)
            empty, other_empty = self._size(first, last) <= 0, self._size(lower, upper) <= 0
            touch = self._size(last.minimum(upper) + 1, first.maximum(lower) - 1) <= 0
            connected = connected & (empty | other_empty | touch)
            first, last = (
                torch.where(empty, lower, torch.where(other_empty, first, first.minimum(lower))),
                torch.where(empty, upper, torch.where(other_empty, last, last.maximum(upper))),
            )
        return connected

    def _size(self, first: Tensor, last: Tensor) -> Tensor:
        """Return how many columns there are from first to last, ``[B or 1, Q]``."""
        if self._ranks is None:
            return last + 1 - first
        begin, end = (edge.expand(len(self.b), self.q.shape[1]) for edge in (first, last + 1))
        return self._ranks.gather(1, end) - self._ranks.gather(1, begin)

    def _compared(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the values of rows and columns that must be equal; columns of the group are."""
        rows = [self.row(value) for value in of_row]
        columns = [self.column(value) for value in of_column]
        if self._group is not None:
            rows.append(self.row(True))
            columns.append(self._group)
        return rows, columns

    def _equal(
        self, of_row: tuple[Expression, ...], of_column: tuple[Expression, ...], is_sorted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first and last column whose values equal a row's, and how many do."""
        row, column = _as_one_number(*self._compared(of_row, of_column))
        if is_sorted and self._group is None:
            order = self.k.expand_as(column)
            values = column.contiguous()
        else:
            values, order = torch.sort(column, dim=-1, stable=True)
        begin = torch.searchsorted(values, row.contiguous())
        end = torch.searchsorted(values, row.contiguous(), right=True)
        some = begin < end
        # The sort is stable: equal values stay in the order of their columns.
        first = order.gather(1, begin.clamp(max=self.num_keys - 1))
        last = order.gather(1, (end - 1).clamp(min=0))
        return torch.where(some, first, self.num_keys), torch.where(some, last, -1), end - begin


def _as_one_number(rows: list[Tensor], columns: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join several integer values of each row, and of each column, in one: equal if all are."""
    row, column = rows[0].to(torch.int64), columns[0].to(torch.int64)
    for next_row, next_column in zip(rows[1:], columns[1:], strict=True):
        next_row, next_column = next_row.to(torch.int64), next_column.to(torch.int64)
        lowest = torch.minimum(next_row.min(), next_column.min())
        size = torch.maximum(next_row.max(), next_column.max()) - lowest + 1
        row = row * size + (next_row - lowest)
        column = column * size + (next_column - lowest)
    return row, column


def _pair_fits(rows: list[Tensor], columns: list[Tensor]) -> Tensor:
    """Whether :func:`_as_one_number` cannot overflow, 0-d."""
    fits = torch.ones((), dtype=torch.bool, device=rows[0].device)
    if len(rows) == 1:
        return fits
    product = torch.ones((), dtype=torch.float64, device=rows[0].device)
    for row, column in zip(rows, columns, strict=True):
        row, column = row.to(torch.float64), column.to(torch.float64)
        product = product * (1 + torch.maximum(row.abs().max(), column.abs().max()) * 2)
    return fits & (product < _MAX_PAIR)


def _are_consecutive(positions: Expression, ids: Expression) -> Tensor:
    """Whether positions ``[B or 1, T]`` grow by one within each run of ids, 0-d."""
    positions = _per_token(positions)
    grows = torch.eq(positions[:, 1:] - positions[:, :-1], 1)
    if ids is None:
        return torch.all(grows)
    ids = _per_token(ids)
    step = torch.sub(ids[:, 1:], ids[:, :-1])
    return ((step > 0) | ((step == 0) & grows)).all()


def _per_token(given: Tensor | tuple[Any, ...]) -> Tensor:
    """Return a tensor, or the one that indices choose of it, as ``[B or 1, T]``."""
    tensor = given[0][given[1:]] if isinstance(given, tuple) else given
    return tensor.reshape(-1, tensor.shape[-1])
