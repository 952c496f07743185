"""Measure what each category would lose of one attention call, without a tensor of all pairs.

The keys that a query in an image sees fall into five groups: text, the sinks and the other tokens
of its own image, and the sinks and the other tokens of other images. Every category keeps some of
these groups whole (SINK also keeps the query's own token). A softmax over several groups is the
average of the softmaxes over each, weighted by their sums of exponentials. So one pass over the
keys, with a running softmax for each group, gives the output of all categories.

Only the rows that a category restricts are measured: those of images other than the first.

Shapes: B batch, H query heads, G key/value heads, T tokens of the prompt (all of them are both
queries and keys), D head dim, C categories, R regions; r rows and c keys of one block.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.calibration.probe_layout import NUM_OFFSETS, Run, SortedPrompt, layout_of
from blindsight.calibration.visibility import Visibility
from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.cost import count_visible
from blindsight.template import Template

REGIONS = ("own_span", "other_sinks", "text", "other_spans")

# Queries and keys that are computed together: few fit in a core's cache, but few do not keep a GPU
# busy.
_BLOCKS, _BLOCKS_OF_GPU = (256, 512), (512, 4096)

# Groups of keys. The row's own token is in one of the two of its own span.
_TEXT, _OWN_SINKS, _OWN, _OTHER_SINKS, _OTHERS = range(5)
_NUM_GROUPS = 5
_KEPT = {
    HeadCategory.DENSE: (_TEXT, _OWN_SINKS, _OWN, _OTHER_SINKS, _OTHERS),
    HeadCategory.SINK: (_TEXT, _OWN_SINKS, _OTHER_SINKS),  # and itself
    HeadCategory.DOCUMENT: (_TEXT, _OWN_SINKS, _OWN),
    HeadCategory.DOCUMENT_SINK: (_TEXT, _OWN_SINKS, _OWN, _OTHER_SINKS),
}


class Losses(NamedTuple):
    """What the categories of every head would lose, summed over the restricted rows.

    Attributes:
        num_rows: ``[B]`` float64, the number of those rows.
        norm: ``[B, H]`` float64, the squared norm of the dense output.
        error: ``[B, H, C]`` float64, the squared norm of a category's change of that output.
        lost: ``[B, H, C]`` float64, the attention weight that a category hides.
        mass: ``[B, H, R]`` float64, the attention weight in each of :data:`REGIONS`.
        offsets: ``[B, H, NUM_OFFSETS + 1]`` float64, the attention weight on tokens of other
            spans, by their offset from the start of the span. The last entry is for the last token
            of a span, which counts there only.
        pairs: ``[B, C]`` int64, the pairs of a query and a key that a category computes, in all
            rows.
        influence: ``[B, H, C, Y]`` float64, the product of a category's change with each of the
            given gradients: to first order, how much it changes the numbers they belong to.
        deviation: ``[B, H]`` float64, the squared norm of the difference between the model's
            output and the dense output as it was computed here.
    """

    num_rows: Tensor
    norm: Tensor
    error: Tensor
    lost: Tensor
    mass: Tensor
    offsets: Tensor
    pairs: Tensor
    influence: Tensor
    deviation: Tensor


class ProbedCall(NamedTuple):
    """One call of attention in the prefill of whole prompts.

    Attributes:
        query: ``[B, H, T, D]``.
        key, value: ``[B, G, T, D]``, H a multiple of G.
        output: ``[B, H, T, D]``, of the model's own attention.
        visibility: What the model's own mask allows.
        span_id, is_sink: ``[B, T]``, the template.
        scale: Factor on the scores; None is ``D ** -0.5``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    visibility: Visibility
    span_id: Tensor
    is_sink: Tensor
    scale: float | None = None


@torch.no_grad()
def measure_losses(
    call: ProbedCall,
    gradients: Sequence[Tensor] = (),
    *,
    query_block: int | None = None,
    key_block: int | None = None,
) -> Losses:
    """Measure one call of attention; memory is O(T), plus one block of scores.

    Args:
        call: The call.
        gradients: Of Y numbers with respect to the call's output, ``[B, H, T, D]`` each.
        query_block, key_block: Tokens that are computed together; by default what suits the
            device.

    Raises:
        ValueError: The call is not the prefill of a whole prompt.
    """
    batch, num_heads, num_queries, _ = call.query.shape
    blocks = _BLOCKS if call.query.device.type == "cpu" else _BLOCKS_OF_GPU
    query_block, key_block = query_block or blocks[0], key_block or blocks[1]
    template, num_keys = Template(call.span_id, call.is_sink), call.key.shape[2]
    if tuple(call.span_id.shape) != (batch, num_queries) or num_queries != num_keys:
        raise ValueError(
            f"attention must be of a whole prompt of {call.span_id.shape[0]} x "
            f"{call.span_id.shape[1]} tokens, got {batch} x {num_queries} queries and {num_keys} "
            "keys. Calibrate without a cache."
        )
    losses = empty_losses(batch, num_heads, call.query.device, len(gradients))
    losses.pairs.copy_(_count_pairs(template, call.visibility))
    for b in range(batch):
        layout = layout_of(call.span_id[b], call.is_sink[b], call.visibility.first_span(b))
        if not layout.runs:
            continue
        row = _Row(call, b, layout, [gradient[b] for gradient in gradients], key_block)
        for run in layout.runs:
            for begin in range(run.begin, run.end, query_block):
                row.measure(run, begin, min(begin + query_block, run.end), losses)
    return losses


def empty_losses(
    batch: int, num_heads: int, device: torch.device, num_gradients: int = 0
) -> Losses:
    """Return the losses of prompts in which no row is restricted."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=torch.float64, device=device)

    return Losses(
        num_rows=zeros(),
        norm=zeros(num_heads),
        error=zeros(num_heads, NUM_CATEGORIES),
        lost=zeros(num_heads, NUM_CATEGORIES),
        mass=zeros(num_heads, len(REGIONS)),
        offsets=zeros(num_heads, NUM_OFFSETS + 1),
        pairs=torch.zeros(batch, NUM_CATEGORIES, dtype=torch.int64, device=device),
        influence=zeros(num_heads, NUM_CATEGORIES, num_gradients),
        deviation=zeros(num_heads),
    )


def _count_pairs(template: Template, visibility: Visibility) -> Tensor:
    """Count under the model's own mask; one that is not intervals counts as causal."""
    base = visibility.intervals()
    if base is None:
        itself = torch.arange(template.num_tokens, device=template.span_id.device)
        prompts = range(len(template.span_id))
        valid = [visibility.of(b, itself, itself)[0].any(0) for b in prompts]
        return count_visible(template, key_valid=torch.stack(valid))
    return count_visible(
        template, base_lower=base.lower, base_upper=base.upper, key_valid=base.valid
    )


class _Partial:
    """A softmax over some of the keys: running maximum, sum, and weighted values.

    Attributes:
        highest, total: ``[H, r]``; the sum of exponentials is relative to the maximum.
        output: ``[H, r, D]``, D of the values, not yet divided by the sum.
        offsets: ``[H, r, NUM_OFFSETS + 1]``, the sum by offset, or None.
    """

    def __init__(
        self, highest: Tensor, total: Tensor, output: Tensor, offsets: Tensor | None = None
    ) -> None:
        self.highest, self.total, self.output, self.offsets = highest, total, output, offsets

    def add(self, other: _Partial) -> _Partial:
        highest = torch.maximum(self.highest, other.highest)
        ours, theirs = (_exp(part.highest - highest) for part in (self, other))
        output = self.output * ours[..., None] + other.output * theirs[..., None]
        total = self.total * ours + other.total * theirs
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = self.offsets * ours[..., None] + other.offsets * theirs[..., None]
        return _Partial(highest, total, output, offsets)


def _exp(x: Tensor) -> Tensor:
    """Return e^x, and 0 for the nan of -inf minus -inf: keys that do not exist weigh nothing."""
    return x.exp().nan_to_num_(nan=0.0)


class _Row:
    """One prompt of the batch."""

    def __init__(
        self,
        call: ProbedCall,
        b: int,
        layout: SortedPrompt,
        gradients: Sequence[Tensor],
        key_block: int,
    ) -> None:
        self._b = b
        self._layout = layout
        self._gradients = gradients
        self._key_block = key_block
        self._visibility = call.visibility
        self._query, self._output = call.query[b], call.output[b]
        self._key, self._value = call.key[b], call.value[b]
        self._sorted_key, self._sorted_value = (
            x[:, layout.order] for x in (self._key, self._value)
        )
        self._dtype = torch.promote_types(call.query.dtype, torch.float32)
        self._scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        self._group_size = call.query.shape[1] // call.key.shape[1]

    def measure(self, run: Run, begin: int, end: int, losses: Losses) -> None:
        """Add what the rows ``begin..end - 1`` of a run lose."""
        query = self._query[:, begin:end].to(self._dtype) * self._scale
        groups = [self._attend(query, begin, group, run) for group in range(_NUM_GROUPS)]
        itself = self._attend_to_itself(query, begin)
        dense = _join(groups)
        some = dense.total > 0
        scale_of = [_exp(part.highest - dense.highest) / dense.total for part in (*groups, itself)]
        weights = [
            (part.total * factor).nan_to_num_(nan=0.0)
            for part, factor in zip((*groups, itself), scale_of, strict=True)
        ]
        expected = _divide(dense)
        b = self._b
        losses.num_rows[b] += some.all(0).sum()
        losses.norm[b] += _square_sum(expected)
        found = self._output[:, begin:end].to(self._dtype)
        losses.deviation[b] += _square_sum((found - expected) * some[..., None])
        for category in HeadCategory:
            if category is HeadCategory.DENSE:
                continue
            kept = [groups[group] for group in _KEPT[category]]
            hidden = sum(
                weights[group] for group in range(_NUM_GROUPS) if group not in _KEPT[category]
            )
            assert isinstance(hidden, Tensor)
            if category is HeadCategory.SINK:
                kept.append(itself)
                hidden = hidden - weights[-1]
            change = _divide(_join(kept)) - expected
            losses.error[b, :, category] += _square_sum(change)
            for at, gradient in enumerate(self._gradients):
                product = gradient[:, begin:end].to(self._dtype) * change
                losses.influence[b, :, category, at] += product.double().sum((1, 2))
            losses.lost[b, :, category] += hidden.clamp(min=0).double().sum(-1)
        regions = (weights[_OWN_SINKS] + weights[_OWN], weights[_OTHER_SINKS], weights[_TEXT])
        mass = torch.stack([*regions, weights[_OTHERS]], dim=-1)
        losses.mass[b] += mass.double().sum(1)
        for group in (_OTHER_SINKS, _OTHERS):
            by_offset = groups[group].offsets
            assert by_offset is not None
            by_offset = (by_offset * scale_of[group][..., None]).nan_to_num_(nan=0.0)
            losses.offsets[b] += by_offset.double().sum(1)

    def _attend(self, query: Tensor, first: int, group: int, run: Run) -> _Partial:
        """Attend from the rows from ``first`` on to one group of keys, block by block."""
        stop = first + query.shape[1]
        by_offset = group in (_OTHER_SINKS, _OTHERS)
        partial = self._nothing(query, by_offset)
        rows = torch.arange(first, stop, device=query.device)[:, None]
        for begin, end in self._blocks(first, stop, group, run):
            scores = self._scores(query, self._sorted_key[:, begin:end])
            columns = self._layout.order[begin:end]
            scores = _masked(scores, self._visibility.of(self._b, rows, columns))
            highest = scores.amax(-1)
            weights = _exp(scores - highest[..., None])
            values = self._sorted_value[:, begin:end].to(self._dtype)
            output = self._per_group(weights) @ values
            offsets = None
            if by_offset:
                offsets = weights @ self._layout.offsets[begin:end].to(self._dtype)
            part = _Partial(highest, weights.sum(-1), output.view(*query.shape[:2], -1), offsets)
            partial = partial.add(part)
        return partial

    def _attend_to_itself(self, query: Tensor, begin: int) -> _Partial:
        """Attend from each row to its own token, unless that is a sink and so in a group."""
        end = begin + query.shape[1]
        key, value = (
            x[:, begin:end].to(self._dtype).repeat_interleave(self._group_size, dim=0)
            for x in (self._key, self._value)
        )
        rows = torch.arange(begin, end, device=query.device)
        scores = _masked((query * key).sum(-1), self._visibility.of(self._b, rows, rows))
        scores = scores.masked_fill(self._layout.is_sink[begin:end], float("-inf"))
        total = torch.isfinite(scores).to(self._dtype)
        return _Partial(scores, total, value * total[..., None])

    def _blocks(self, first: int, stop: int, group: int, run: Run) -> Iterator[tuple[int, int]]:
        """Yield the blocks of sorted keys of a group that the rows ``first..stop - 1`` may see."""
        layout = self._layout
        sinks, others = layout.starts
        ranges: Sequence[tuple[int, int]] = {
            _TEXT: [(0, sinks)],
            _OWN_SINKS: [run.sinks],
            _OWN: [run.others],
            _OTHER_SINKS: [(sinks, run.sinks[0]), (run.sinks[1], others)],
            _OTHERS: [(others, run.others[0]), (run.others[1], len(layout.tokens))],
        }[group]
        lowest, highest = self._visibility.extent(self._b, first, stop)
        for begin, end in ranges:
            begin = bisect_left(layout.tokens, lowest, begin, end)
            end = bisect_right(layout.tokens, highest, begin, end)
            for at in range(begin, end, self._key_block):
                yield at, min(at + self._key_block, end)

    def _nothing(self, query: Tensor, by_offset: bool) -> _Partial:
        shape = query.shape[:2]
        return _Partial(
            query.new_full(shape, float("-inf")),
            query.new_zeros(shape),
            query.new_zeros(*shape, self._value.shape[-1]),
            query.new_zeros(*shape, NUM_OFFSETS + 1) if by_offset else None,
        )

    def _per_group(self, x: Tensor) -> Tensor:
        """Return ``[H, r, *]`` as ``[G, H / G * r, *]``: the rows that share a key head."""
        return x.reshape(x.shape[0] // self._group_size, -1, x.shape[2])

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return ``[H, r, c]`` for ``[H, r, D]`` and ``[G, c, D]``."""
        scores = self._per_group(query) @ key.to(self._dtype).transpose(1, 2)
        return scores.view(*query.shape[:2], key.shape[1])


def _masked(scores: Tensor, mask: tuple[Tensor, Tensor | None]) -> Tensor:
    allowed, bias = mask
    if bias is not None:
        scores = scores + bias
    return scores.masked_fill(~allowed, float("-inf"))


def _join(parts: Sequence[_Partial]) -> _Partial:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.add(part)
    return joined


def _divide(partial: _Partial) -> Tensor:
    """Return the output of a softmax; rows without keys give zeros."""
    return (partial.output / partial.total[..., None]).nan_to_num_(nan=0.0)


def _square_sum(x: Tensor) -> Tensor:
    """Return the squared norm of each head, ``[H]`` float64 for ``[H, r, D]``."""
    return x.double().square().sum((1, 2))
