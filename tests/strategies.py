"""Hypothesis strategies: templates of batches, models' own masks, categories, head counts.

Legend: B batch, T tokens of the whole sequence, Q query rows, K key columns, L layers, H query
heads, G key/value heads.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from blindsight.attention.interval_masks import BaseMask


@dataclass(frozen=True)
class Template:
    """A batch of prompts, reduced to what the masks need.

    `rows` is what was drawn, before padding: per batch row its segments as (is_span, num_tokens).
    """

    span_id: torch.Tensor  # int64 [B, T], 0 for text and padding
    is_sink: torch.Tensor  # bool [B, T]
    attention_mask: torch.Tensor  # bool [B, T], True for tokens, False for padding
    rows: tuple[tuple[tuple[int, int], ...], ...]  # span and length of each segment, 0 for text
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
    text_inside: bool = False,
) -> Template:
    """Batches of unlike rows, padded left or right.

    A row is text and spans in turn; texts of no tokens make adjacent spans, and the end of the
    prompt may cut its last segment. A row may be without spans, or without text.

    Args:
        max_spans: spans a row.
        max_span: tokens a span, or a part of one.
        max_text: tokens of text between spans.
        max_batch: rows.
        max_sinks: sink offsets a span; (0,) is the usual draw.
        text_inside: some spans are several, with text between or without.
    """
    num_rows = draw(st.integers(1, max_batch), label="rows")
    rows = tuple(
        draw(
            _rows(
                max_spans=max_spans,
                max_span=max_span,
                max_text=max_text,
                text_inside=text_inside,
            )
        )
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
        for number, length in row:
            span_id[b, position : position + length] = number
            position += length
        for number in range(1, int(span_id[b].max()) + 1):
            tokens = (span_id[b] == number).nonzero().flatten().tolist()
            for offset in sink_offsets:
                sink = min(tokens[0] + offset, tokens[-1])
                is_sink[b, sink] |= sink in tokens
    return Template(span_id, is_sink, attention_mask, rows, pad_side)


@st.composite
def _rows(
    draw: st.DrawFn, *, max_spans: int, max_span: int, max_text: int, text_inside: bool
) -> tuple[tuple[int, int], ...]:
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, max_text), st.integers(1, max_span)),
            max_size=max_spans,
        )
    )
    last_text = draw(st.integers(0 if pairs else 1, max(1, max_text)))
    going_on = frozenset()
    if text_inside:
        going_on = draw(st.frozensets(st.integers(2, max(2, max_spans)), min_size=1))
    segments, number = [], 0
    for part, (text, length) in enumerate(pairs, 1):
        number += part not in going_on
        segments += [(0, text), (number, length)]
    segments = [segment for segment in [*segments, (0, last_text)] if segment[1]]
    if draw(st.booleans()):
        # the prompt ends inside its last segment
        number, length = segments[-1]
        segments[-1] = (number, draw(st.integers(1, length)))
    return tuple(segments)


def runs_of(span_id: torch.Tensor) -> torch.Tensor:
    """Number the runs of equal ids in each row, 0 for text: int64 [B, T]."""
    before = torch.nn.functional.pad(span_id, (1, 0))[:, :-1]
    return ((span_id != before) & (span_id > 0)).cumsum(1) * (span_id > 0)


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


@dataclass(frozen=True)
class BaseCase:
    """One attention call: a template, which rows and columns of it, and the model's own mask.

    The conditions are those of `oracles.oracle_base`. `first_span` says in words of rows what
    `sequence_id` says in words of tokens.
    """

    template: Template
    num_queries: int
    num_keys: int
    sight: str
    window: int | None
    distance: int | None
    chunk: int | None
    sequence_id: torch.Tensor | None  # int64 [B, T], never decreasing
    image_id: torch.Tensor  # int64 [B, T]
    valid: torch.Tensor  # bool [B, K]

    @property
    def num_tokens(self) -> int:
        return self.template.span_id.shape[1]

    @property
    def first_key(self) -> int:
        return max(self.num_tokens - self.num_keys, 0)

    @property
    def first_span(self) -> torch.Tensor | None:
        """bool [B, Q], or None where rows are not packed."""
        if self.sequence_id is None:
            return None
        flags = torch.zeros_like(self.template.is_sink)
        for b, spans in enumerate(self.template.span_id.tolist()):
            first: dict[int, int] = {}
            for t, (span, sequence) in enumerate(
                zip(spans, self.sequence_id[b].tolist(), strict=True)
            ):
                flags[b, t] = span != 0 and first.setdefault(sequence, span) == span
        return flags[:, self.num_tokens - self.num_queries :]

    def interval_form(self) -> BaseMask:
        """The base mask as the implementation takes it: each condition bounds a row's interval.

        Where images see each other there are three: of text, sinks and other tokens of spans.
        """
        num_tokens = self.num_tokens
        query = torch.arange(num_tokens - self.num_queries, num_tokens).expand(
            self.template.span_id.shape[0], -1
        )
        lower, upper = torch.zeros_like(query), torch.full_like(query, num_tokens - 1)
        at = query

        def extent(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """First and last token with a query's id."""
            same = ids[:, None, :] == ids.gather(1, query)[:, :, None]
            return same.int().argmax(2), num_tokens - 1 - same.flip(2).int().argmax(2)

        if self.sight != "all":
            upper = query
        if self.sight == "causal or image":
            image = self.image_id.gather(1, query)
            upper = torch.where(image != 0, torch.maximum(query, extent(self.image_id)[1]), upper)
        if self.sight == "causal or images":
            is_image = self.image_id.gather(1, query) != 0
            _, last = extent((self.image_id != 0).long())
            ahead = torch.where(is_image, torch.maximum(query, last), query)
            upper = torch.stack([query, ahead, ahead], dim=1)
            lower, at = lower[:, None].expand_as(upper), query[:, None]
        if self.window is not None:
            lower = torch.maximum(lower, at - self.window + 1)
        if self.distance is not None:
            lower = torch.maximum(lower, at - self.distance + 1)
            upper = torch.minimum(upper, at + self.distance - 1)
        if self.chunk is not None:
            begin = at - at % self.chunk
            lower = torch.maximum(lower, begin)
            upper = torch.minimum(upper, begin + self.chunk - 1)
        if self.sequence_id is not None:
            first, last = extent(self.sequence_id)
            if self.sight == "causal or images":
                first, last = first[:, None], last[:, None]
            lower, upper = torch.maximum(lower, first), torch.minimum(upper, last)
        return BaseMask((lower - self.first_key).int(), (upper - self.first_key).int(), self.valid)

    def __repr__(self) -> str:
        sequences = None if self.sequence_id is None else self.sequence_id.tolist()
        return (
            f"BaseCase({self.template}, Q={self.num_queries}, K={self.num_keys}, "
            f"sight={self.sight!r}, window={self.window}, distance={self.distance}, "
            f"chunk={self.chunk}, sequence_id={sequences}, "
            f"invalid={(~self.valid).nonzero().tolist()})"
        )


@st.composite
def base_masks(
    draw: st.DrawFn,
    *,
    max_spans: int = 5,
    max_span: int = 30,
    max_text: int = 12,
    max_batch: int = 2,
    text_inside: bool = False,
    by_group: bool = False,
) -> BaseCase:
    """Attention calls with every base mask of interval form, and any of them together.

    Causal, bidirectional, sliding windows to one side or both, Gemma 3's masks (images see
    themselves, with a window or without), chunks, packed sequences; padding left, right and in
    holes; prefills, later chunks of one, sliding and static caches.

    by_group: Molmo 2's instead, where images see each other.
    """
    template = draw(
        templates(
            max_spans=max_spans,
            max_span=max_span,
            max_text=max_text,
            max_batch=max_batch,
            text_inside=text_inside,
        )
    )
    num_rows, num_tokens = template.span_id.shape
    some_length = st.integers(1, num_tokens)
    num_queries = draw(st.one_of(st.just(num_tokens), some_length), label="num_queries")
    num_keys = draw(
        st.one_of(st.just(num_tokens), some_length, st.integers(num_tokens, num_tokens + 40)),
        label="num_keys",
    )
    first_key = max(num_tokens - num_keys, 0)

    sights = ["causal or images"] if by_group else ["causal", "causal or image", "all"]
    sight = draw(st.sampled_from(sights), label="sight")
    # often none of these, often one
    limits = draw(
        st.one_of(
            st.just(frozenset()),
            st.sampled_from(["window", "distance", "chunk", "packed"]).map(
                lambda x: frozenset([x])
            ),
            st.frozensets(st.sampled_from(["window", "distance", "chunk", "packed"])),
        ),
        label="limits",
    )

    def limit(name: str) -> int | None:
        return draw(some_length, label=name) if name in limits else None

    sequence_id = None
    if "packed" in limits:
        starts = draw(
            st.lists(
                st.lists(st.integers(0, num_tokens - 1), max_size=4),
                min_size=num_rows,
                max_size=num_rows,
            ),
            label="starts of sequences",
        )
        sequence_id = torch.zeros_like(template.span_id)
        for b, row in enumerate(starts):
            for start in row:
                sequence_id[b, start:] += 1

    image_id = runs_of(template.span_id)  # those of a model that sees them whole have no text
    if not by_group and draw(st.booleans(), label="delimiters stay causal"):
        inside = torch.nn.functional.pad(image_id, (1, 1))
        image_id[(inside[:, :-2] != image_id) | (inside[:, 2:] != image_id)] = 0

    valid = torch.ones(num_rows, num_keys, dtype=torch.bool)
    if draw(st.booleans(), label="padding is hidden"):
        tokens = template.attention_mask[:, first_key:]
        valid[:, : tokens.shape[1]] = tokens
    columns = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_keys - 1))
    for b, column in draw(st.lists(columns, max_size=4), label="holes"):
        valid[b, column] = False
    return BaseCase(
        template=template,
        num_queries=num_queries,
        num_keys=num_keys,
        sight=sight,
        window=limit("window"),
        distance=limit("distance"),
        chunk=limit("chunk"),
        sequence_id=sequence_id,
        image_id=image_id,
        valid=valid,
    )
