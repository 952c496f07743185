"""Reference masks, attention and model runs, written straight from the definitions.

Nothing here is shared with the implementation, and nothing here is fast.

Legend: B batch, L layers, H query heads, G key/value heads, T tokens of the whole sequence, Q query
rows, K key columns, D head dim.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

DENSE, SINK, DOCUMENT, DOCUMENT_SINK = 0, 1, 2, 3

_run_numbers = itertools.count()


def oracle_template(
    input_ids: torch.Tensor,
    image_ids: Sequence[int],
    start_ids: Sequence[int],
    end_ids: Sequence[int],
    sink_offsets: Sequence[int] = (0,),
    leading_ids: Sequence[int] = (),
    trailing_ids: Sequence[int] = (),
    video_ids: Sequence[int] = (),
    num_frames: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spans and sinks of a prompt, from its token ids [B, T].

    A span is a maximal run of image tokens, plus the start delimiter right before it and the end
    delimiter right after it, where there are any. A delimiter without image tokens is text.

    A run with a leading mark before it, and neither an image token nor a start delimiter in
    between, is one span with the run after it; a run with such a trailing mark is one span with
    the run before it.

    A run of video tokens is cut into as many equal frames as `num_frames` says, a number for each
    run of all rows in turn, and each frame is a span; without it videos are whole.

    Sink offsets count from the span's first token and are clipped to the span; one that falls on
    text inside the span is none.

    Returns:
        span_id: int64 [B, T], 1..n in each row, 0 for text.
        is_sink: bool [B, T].
    """
    num_rows, num_tokens = input_ids.shape
    span_id = torch.zeros(num_rows, num_tokens, dtype=torch.int64)
    is_sink = torch.zeros(num_rows, num_tokens, dtype=torch.bool)
    frames_of_videos = iter(num_frames)
    for b in range(num_rows):
        ids = input_ids[b].tolist()
        frames = set()  # where they begin
        if num_frames:
            is_video = [token_id in video_ids for token_id in ids]
            for inside, run in itertools.groupby(range(num_tokens), is_video.__getitem__):
                if inside:
                    tokens = list(run)
                    size, rest = divmod(len(tokens), next(frames_of_videos))
                    assert rest == 0
                    frames.update(tokens[::size])
        spans: list[list[int]] = []  # their tokens
        to_be_continued = False
        marks: list[int] = []
        t = 0
        while t < num_tokens:
            if ids[t] not in image_ids:
                marks = [*([] if ids[t] in start_ids else marks), ids[t]]
                t += 1
                continue
            first = t
            while t < num_tokens and ids[t] in image_ids:
                t += 1
            last = t - 1
            if first > 0 and ids[first - 1] in start_ids:
                first -= 1
                if spans and spans[-1][-1] == first:
                    spans[-1].pop()  # it is an end delimiter too
            if last + 1 < num_tokens and ids[last + 1] in end_ids:
                last += 1
            if not spans or not (to_be_continued or set(marks) & set(trailing_ids)):
                spans.append([])
            for token in range(first, last + 1):
                if token in frames and token > first and ids[token - 1] in image_ids:
                    spans.append([])
                spans[-1].append(token)
            to_be_continued = bool(set(marks) & set(leading_ids))
            marks = []
        for number, tokens in enumerate(spans, 1):
            span_id[b, tokens] = number
            for offset in sink_offsets:
                sink = min(max(tokens[0] + offset, tokens[0]), tokens[-1])
                is_sink[b, sink] |= sink in tokens
    return span_id.to(input_ids.device), is_sink.to(input_ids.device)


def oracle_keep(
    span_id: torch.Tensor,
    is_sink: torch.Tensor,
    category: int,
    sequence_id: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which pairs (q, k) a head of this category keeps: bool [B, T, T] over the whole sequence.

    Args:
        span_id: [B, T], 0 for text.
        is_sink: bool [B, T].
        category: DENSE, SINK, DOCUMENT or DOCUMENT_SINK.
        sequence_id: [B, T], which packed sequence a token belongs to; None is one sequence a row.
    """
    num_rows, num_tokens = span_id.shape
    in_first_span = torch.zeros_like(span_id, dtype=torch.bool)
    for b in range(num_rows):
        first_span: dict[int, int] = {}
        for t in range(num_tokens):
            sequence = 0 if sequence_id is None else int(sequence_id[b, t])
            span = int(span_id[b, t])
            if span != 0:
                in_first_span[b, t] = first_span.setdefault(sequence, span) == span

    span_q, span_k = span_id[:, :, None], span_id[:, None, :]
    same_span = span_q == span_k
    sink_k = is_sink[:, None, :]
    itself = torch.eye(num_tokens, dtype=torch.bool, device=span_id.device)

    if category == DENSE:
        image_to_image = torch.ones_like(same_span)
    elif category == SINK:
        image_to_image = sink_k | itself
    elif category == DOCUMENT:
        image_to_image = same_span
    elif category == DOCUMENT_SINK:
        image_to_image = same_span | sink_k
    else:
        raise ValueError(f"category must be 0, 1, 2 or 3, got {category}.")
    return (span_q == 0) | (span_k == 0) | in_first_span[:, :, None] | image_to_image


def oracle_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Masked softmax attention in the arithmetic of the inputs' dtype; empty rows give zeros.

    Args:
        query: [B, H, Q, D].
        key: [B, G, K, D], query head h uses key head h // (H / G).
        value: [B, G, K, D].
        mask: bool, broadcastable to [B, H, Q, K], True where visible.
        scale: factor of the scores.

    Returns:
        [B, H, Q, D].
    """
    group_size = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group_size, dim=1)
    value = value.repeat_interleave(group_size, dim=1)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    # softmax of a row of -inf is nan
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return torch.matmul(weights, value)


def keep_of_call(
    keep: torch.Tensor,
    num_queries: int,
    num_keys: int,
) -> torch.Tensor:
    """Cut [B, T, T] to the rows and columns of one attention call: [B, Q, K].

    The query rows are the last Q tokens. With fewer keys than tokens (a sliding-window cache) the
    columns are the last K tokens; with more, the rest are unfilled cache slots, which the base mask
    hides, so here they are kept.
    """
    num_tokens = keep.shape[-1]
    rows = keep[:, num_tokens - num_queries :]
    if num_keys <= num_tokens:
        return rows[:, :, num_tokens - num_keys :]
    return F.pad(rows, (0, num_keys - num_tokens), value=True)


@contextlib.contextmanager
def reference_attention(
    model: PreTrainedModel,
    categories: Any,
    span_id: torch.Tensor,
    is_sink: torch.Tensor,
    *,
    sequence_id: torch.Tensor | None = None,
    may_grow: bool = False,
) -> Iterator[None]:
    """Inside, the decoder layers of `model` run eagerly under base mask & keep of their heads.

    The vision tower keeps its own attention. On leaving, the model's configuration and the
    registries of transformers are as they were before.

    Args:
        categories: int [L, H].
        span_id: [B, T], T = past + Q of every forward inside.
        is_sink: bool [B, T].
        sequence_id: [B, T], for packed sequences.
        may_grow: tokens after the template are text (what `generate` appends). Else a forward with
            past + Q != T is an error.
    """
    text_config = model.config.get_text_config()
    categories = torch.as_tensor(categories).long()
    expected_shape = (text_config.num_hidden_layers, text_config.num_attention_heads)
    if tuple(categories.shape) != expected_shape:
        raise ValueError(
            f"categories must have shape {expected_shape}, got {tuple(categories.shape)}."
        )
    num_past = 0
    keep_by_length: dict[int, list[torch.Tensor]] = {}

    def keep_of_length(num_tokens: int) -> list[torch.Tensor]:
        """The keep matrix [B, T, T] of each category."""
        growth = num_tokens - span_id.shape[1]
        if growth < 0 or (growth > 0 and not may_grow):
            raise ValueError(f"span_id must cover {num_tokens} tokens, got {span_id.shape[1]}.")
        if num_tokens not in keep_by_length:
            spans, sinks = F.pad(span_id, (0, growth)), F.pad(is_sink, (0, growth))
            sequences = sequence_id
            if sequence_id is not None:
                last = sequence_id[:, -1:].expand(-1, growth)
                sequences = torch.cat([sequence_id, last], dim=1)
            keep_by_length[num_tokens] = [
                oracle_keep(spans, sinks, category, sequences) for category in range(4)
            ]
        return keep_by_length[num_tokens]

    def base_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal num_past
        num_past = int(kwargs["q_offset"])
        # never None: the mask is wanted as a tensor, whatever it is
        kwargs["allow_is_causal_skip"] = False
        kwargs["allow_is_bidirectional_skip"] = False
        return sdpa_mask(*args, **kwargs)

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        assert module.config is text_config, f"{type(module).__name__} is no decoder attention"
        assert attention_mask is not None and attention_mask.dtype == torch.bool
        assert dropout == 0.0 and kwargs.get("softcap") is None
        num_queries, num_keys = query.shape[2], key.shape[2]
        keeps = keep_of_length(num_past + num_queries)
        keep_of_heads = torch.stack(
            [
                keep_of_call(keeps[category], num_queries, num_keys)
                for category in categories[module.layer_idx].tolist()
            ],
            dim=1,
        )
        output = oracle_attention(query, key, value, attention_mask & keep_of_heads, scaling)
        return output.transpose(1, 2).contiguous(), None

    name = f"oracle_attention_{next(_run_numbers)}"
    implementation = text_config._attn_implementation
    AttentionInterface.register(name, attention)
    # a name without a mask function would get no mask at all
    AttentionMaskInterface.register(name, base_mask)
    text_config._attn_implementation = name
    try:
        yield
    finally:
        text_config._attn_implementation = implementation
        del AttentionInterface._global_mapping[name]
        del AttentionMaskInterface._global_mapping[name]


@torch.no_grad()
def run_reference(
    model: PreTrainedModel,
    categories: Any,
    span_id: torch.Tensor,
    is_sink: torch.Tensor,
    inputs: dict[str, Any],
    *,
    sequence_id: torch.Tensor | None = None,
    **extra: Any,
) -> Any:
    """One forward of the same weights under the reference masks.

    Like every forward of a Qwen model it renews `rope_deltas`, which its decode steps read.

    Args:
        categories: int [L, H].
        span_id: [B, T] for all T = past + Q tokens, the cached ones included.
        is_sink: bool [B, T].
        inputs: arguments of the forward.
        extra: more of them (`past_key_values`, `use_cache`, ...).
    """
    with reference_attention(model, categories, span_id, is_sink, sequence_id=sequence_id):
        return model(**inputs, **extra)


@torch.no_grad()
def generate_reference(
    model: PreTrainedModel,
    categories: Any,
    span_id: torch.Tensor,
    is_sink: torch.Tensor,
    inputs: dict[str, Any],
    **generate_kwargs: Any,
) -> Any:
    """`model.generate` under the reference masks; span_id [B, T] covers the prompt."""
    with reference_attention(model, categories, span_id, is_sink, may_grow=True):
        return model.generate(**inputs, **generate_kwargs)


def reference_copy(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A deep copy with its weights in another dtype (upcasting is exact).

    Buffers (rotary frequencies) stay as they are: they are float32 whatever the weights are, and
    the model casts them itself.
    """
    result = copy.deepcopy(model)
    for parameter in result.parameters():
        parameter.data = parameter.data.to(dtype)
    result.config.dtype = dtype
    return result.eval()


def error_bound(reference64: torch.Tensor, reference_same_dtype: torch.Tensor) -> float:
    """The largest error against fp64 that an implementation in this dtype may have.

    Twice the error of the plain eager computation in the same dtype, plus one rounding of the
    largest value. Both tensors have the same shape and hold compared positions only.
    """
    if reference64.numel() == 0:
        return 0.0
    eager_error = (reference_same_dtype.double() - reference64.double()).abs().max().item()
    rounding = torch.finfo(reference_same_dtype.dtype).eps * reference64.abs().max().item()
    return 2.0 * eager_error + rounding


def assert_close_to_reference(
    actual: torch.Tensor,
    same_dtype_ref: torch.Tensor,
    ref64: torch.Tensor,
    valid: torch.Tensor,
) -> None:
    """Compare [B, Q, ...] with the fp64 reference at the valid positions (bool [B, Q])."""
    assert actual.shape == same_dtype_ref.shape == ref64.shape, (
        f"shapes differ: actual {tuple(actual.shape)}, same-dtype reference "
        f"{tuple(same_dtype_ref.shape)}, fp64 reference {tuple(ref64.shape)}"
    )
    assert actual.dtype == same_dtype_ref.dtype, (
        f"dtypes differ: actual {actual.dtype}, same-dtype reference {same_dtype_ref.dtype}"
    )
    assert ref64.dtype == torch.float64, f"the fp64 reference is {ref64.dtype}"
    assert valid.any(), "no valid position to compare"
    assert torch.isfinite(ref64[valid]).all(), "the fp64 reference is not finite"
    assert torch.isfinite(same_dtype_ref[valid]).all(), "the same-dtype reference is not finite"
    assert torch.isfinite(actual[valid]).all(), "actual has nan or inf at a valid position"
    bound = error_bound(ref64[valid], same_dtype_ref[valid])
    error = (actual.double() - ref64).abs().flatten(2).amax(-1).masked_fill(~valid, 0.0)  # [B, Q]
    worst = error.max().item()
    if worst > bound:
        row, position = divmod(int(error.argmax()), error.shape[1])
        wrong = (error > bound).nonzero().tolist()
        eager_error = (same_dtype_ref.double() - ref64)[valid].abs().max().item()
        raise AssertionError(
            f"error against fp64 {worst:.3e} at batch row {row}, position {position} exceeds the "
            f"bound {bound:.3e} (the eager error in {actual.dtype} is {eager_error:.3e}, the "
            f"largest value {ref64[valid].abs().max().item():.3e}). {len(wrong)} of "
            f"{int(valid.sum())} valid positions are beyond it, the first (row, position): "
            f"{wrong[:10]}"
        )


def oracle_base(
    num_tokens: int,
    num_queries: int,
    num_keys: int,
    *,
    sight: str,
    valid: torch.Tensor,
    image_id: torch.Tensor,
    window: int | None = None,
    distance: int | None = None,
    chunk: int | None = None,
    sequence_id: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a model's own mask allows: bool [B, Q, K], all of the given conditions together.

    Args:
        sight: "all", "causal", "causal or image" (Gemma 3: an image sees all of itself), or
            "causal or images" (Molmo 2: an image sees all of all images).
        valid: bool [B, K], False for padding.
        image_id: [B, T], which image a token belongs to, 0 for none.
        window: a query sees itself and the window - 1 tokens before it, and whatever comes after.
        distance: a query sees tokens fewer than this many away, on both sides.
        chunk: a query sees the tokens of its chunk of this many tokens.
        sequence_id: [B, T], a query sees the tokens of its sequence.
    """
    past = num_tokens - num_queries
    first_key = max(num_tokens - num_keys, 0)
    # lists: reading a tensor element by element takes seconds
    key_valid, image = valid.tolist(), image_id.tolist()
    sequence = torch.zeros_like(image_id).tolist() if sequence_id is None else sequence_id.tolist()

    def is_allowed(b: int, row: int, column: int) -> bool:
        q, k = past + row, first_key + column
        if k >= num_tokens or not key_valid[b][column]:
            return False
        same_image = image[b][q] != 0 and image[b][q] == image[b][k]
        both_images = image[b][q] != 0 and image[b][k] != 0
        return (
            (
                sight == "all"
                or k <= q
                or (sight == "causal or image" and same_image)
                or (sight == "causal or images" and both_images)
            )
            and (window is None or k > q - window)
            and (distance is None or abs(q - k) < distance)
            and (chunk is None or q // chunk == k // chunk)
            and sequence[b][q] == sequence[b][k]
        )

    return torch.tensor(
        [
            [
                [is_allowed(b, row, column) for column in range(num_keys)]
                for row in range(num_queries)
            ]
            for b in range(valid.shape[0])
        ]
    )
