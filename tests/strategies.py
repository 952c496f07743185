"""Hypothesis strategies: templates of batches, profiles' categories, head counts.

Legend: B batch, T tokens, L layers, H query heads, G key/value heads.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st


@dataclass(frozen=True)
class Template:
    """A batch of prompts, reduced to what the masks need.

    `rows` is what was drawn, before padding: per batch row its segments as (is_span, num_tokens).
    """

    span_id: torch.Tensor  # int64 [B, T], 0 for text and padding
    is_sink: torch.Tensor  # bool [B, T]
    attention_mask: torch.Tensor  # bool [B, T], True for tokens, False for padding
    rows: tuple[tuple[tuple[bool, int], ...], ...]
    pad_side: str

    def __repr__(self) -> str:
        """Short: tensors of a thousand tokens hide the example."""
        return (
            f"Template(rows={self.rows}, pad_side={self.pad_side!r}, "
            f"sinks={self.is_sink.nonzero().tolist()})"
        )


@st.composite
def templates(
    draw: st.DrawFn,
    *,
    max_spans: int = 20,
    max_span: int = 300,
    max_text: int = 50,
    max_batch: int = 3,
    max_sinks: int = 2,
) -> Template:
    """Batches of unlike rows, padded left or right.

    A row is text and spans in turn; texts of no tokens make adjacent spans, and the end of the
    prompt may cut its last segment. A row may be without spans, or without text.

    Args:
        max_spans: spans a row.
        max_span: tokens a span.
        max_text: tokens of text between spans.
        max_batch: rows.
        max_sinks: sink offsets a span; (0,) is the usual draw.
    """
    num_rows = draw(st.integers(1, max_batch), label="rows")
    rows = tuple(
        draw(_rows(max_spans=max_spans, max_span=max_span, max_text=max_text))
        for _ in range(num_rows)
    )
    pad_side = draw(st.sampled_from(["left", "right"]), label="pad_side")
    sink_offsets = draw(
        st.one_of(
            st.just((0,)),
            st.lists(st.integers(0, max_span), max_size=max_sinks).map(tuple),
        ),
        label="sink_offsets",
    )

    num_tokens = max(sum(length for _, length in row) for row in rows)
    span_id = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    is_sink = torch.zeros(num_rows, num_tokens, dtype=torch.bool)
    attention_mask = torch.zeros(num_rows, num_tokens, dtype=torch.bool)
    for b, row in enumerate(rows):
        row_length = sum(length for _, length in row)
        position = num_tokens - row_length if pad_side == "left" else 0
        attention_mask[b, position : position + row_length] = True
        number = 0
        for is_span, length in row:
            if is_span:
                number += 1
                span_id[b, position : position + length] = number
                for offset in sink_offsets:
                    is_sink[b, position + min(offset, length - 1)] = True
            position += length
    return Template(span_id, is_sink, attention_mask, rows, pad_side)


@st.composite
def _rows(
    draw: st.DrawFn, *, max_spans: int, max_span: int, max_text: int
) -> tuple[tuple[bool, int], ...]:
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, max_text), st.integers(1, max_span)),
            max_size=max_spans,
        )
    )
    last_text = draw(st.integers(0 if pairs else 1, max(1, max_text)))
    segments = [
        segment for text, span in pairs for segment in ((False, text), (True, span)) if segment[1]
    ]
    if last_text:
        segments.append((False, last_text))
    if draw(st.booleans()):
        # the prompt ends inside its last segment
        is_span, length = segments[-1]
        segments[-1] = (is_span, draw(st.integers(1, length)))
    return tuple(segments)


def categories(num_layers: int, num_heads: int) -> st.SearchStrategy[torch.Tensor]:
    """Category of every head: uint8 [L, H], values 0..3. Layers of one category are common."""
    layer = st.one_of(
        st.integers(0, 3).map(lambda category: [category] * num_heads),
        st.lists(st.integers(0, 3), min_size=num_heads, max_size=num_heads),
    )
    return st.lists(layer, min_size=num_layers, max_size=num_layers).map(
        lambda rows: torch.tensor(rows, dtype=torch.uint8)
    )


def gqa_heads(*, max_heads: int = 8) -> st.SearchStrategy[tuple[int, int]]:
    """(H, G): numbers of query and of key/value heads, G divides H; odd ratios included."""
    pairs = [
        (num_heads, num_kv_heads)
        for num_heads in range(1, max_heads + 1)
        for num_kv_heads in range(1, num_heads + 1)
        if num_heads % num_kv_heads == 0
    ]
    return st.sampled_from(pairs)
