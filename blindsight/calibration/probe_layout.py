"""The tokens of one prompt, sorted so that each group of keys is contiguous.

Shapes: T tokens of the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from blindsight.template import span_edges

NUM_OFFSETS = 8  # tokens from the start of a span that are told apart, beside its last


class Run(NamedTuple):
    """Consecutive restricted rows of one span, and where its tokens are among the sorted keys."""

    begin: int
    end: int
    sinks: tuple[int, int]
    others: tuple[int, int]


@dataclass(frozen=True)
class SortedPrompt:
    """The tokens of one prompt, sorted as ``[text | sinks | other tokens of spans]``.

    Attributes:
        order: ``[T]`` int64, the token at each sorted position.
        tokens: The same as a list.
        starts: Where the sinks begin, and where the other tokens of spans begin.
        runs: The restricted rows.
        offsets: ``[T, NUM_OFFSETS + 1]`` float32 flags: the offset of each sorted token in its
            span, and whether it is the last token of the span.
        is_sink: ``[T]`` bool, in prompt order.
    """

    order: Tensor
    tokens: list[int]
    starts: tuple[int, int]
    runs: list[Run]
    offsets: Tensor
    is_sink: Tensor


def layout_of(span_id: Tensor, is_sink: Tensor, first_span: Tensor | None) -> SortedPrompt:
    """Sort the tokens of a prompt; ``first_span [T]`` flags those that are in a first span."""
    in_span = span_id > 0
    kind = torch.where(in_span, torch.where(is_sink, 1, 2), 0)
    order = kind.argsort(stable=True)
    tokens: list[int] = order.tolist()
    num_text, num_sinks = (int((kind == group).sum()) for group in (0, 1))
    starts = (num_text, num_text + num_sinks)
    first, last = (edge[0] for edge in span_edges(span_id[None]))
    position = torch.arange(len(span_id), device=span_id.device)
    restricted = (span_id > 1) if first_span is None else in_span & ~first_span
    ids, lengths = torch.unique_consecutive(torch.where(restricted, span_id, 0), return_counts=True)
    ends = lengths.cumsum(0)
    is_run = ids > 0
    runs = [
        Run(
            begin,
            end,
            _cut(tokens, starts[0], starts[1], *edges),
            _cut(tokens, starts[1], len(tokens), *edges),
        )
        for begin, end, *edges in zip(
            (ends - lengths)[is_run].tolist(),
            ends[is_run].tolist(),
            first[ends - 1][is_run].tolist(),
            (last[ends - 1] + 1)[is_run].tolist(),
            strict=True,
        )
    ]
    offset = torch.where(in_span, position - first, -1)
    is_last = in_span & (last == position)
    flags = [(offset == at) & ~is_last for at in range(NUM_OFFSETS)] + [is_last]
    offsets = torch.stack(flags, dim=1)[order].float()
    return SortedPrompt(order, tokens, starts, runs, offsets, is_sink & in_span)


def _cut(tokens: list[int], begin: int, end: int, first: int, stop: int) -> tuple[int, int]:
    """Return where the tokens ``first..stop - 1`` are in the sorted ``tokens[begin:end]``."""
    begin = bisect_left(tokens, first, begin, end)
    return begin, bisect_left(tokens, stop, begin, end)
