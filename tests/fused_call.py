"""One fused call of attention: its inputs, the call, and how far it is from the definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from blindsight.attention import mask_forms
from blindsight.attention.attend import attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.element_masks import expressed_mask, materialised_mask
from blindsight.attention.mask_forms import (
    ordered_mask,
    sorted_mask,
)
from blindsight.passes.replace_attention import Capacity
from blindsight.template import find_sinks
from oracles import oracle_attention, oracle_keep

MIXES = {"each": [0, 1, 2, 3], "dense": [0, 0, 0, 0], "document": [2, 2, 2, 2], "two": [3, 1, 1, 3]}
WINDOW = 60
COLUMN = ("index", "k")
CHUNK = ("floordiv", COLUMN, WINDOW)


def template_of(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Text, then images of 40 tokens with 9 of text between; the second row is one token off."""
    rows = []
    for row in range(batch):
        position = (torch.arange(length) - 5 - row).clamp(min=-1)
        inside = (position >= 0) & (position % 49 < 40)
        rows.append(torch.where(inside, position // 49 + 1, 0))
    span_id = torch.stack(rows).to(torch.int32)
    return span_id, find_sinks(span_id, (0,))


def ids_of(base: str, span_id: Tensor) -> Tensor:
    """Of images (-1: text), or of packed sequences, of which the second begins within text."""
    if base == "image":
        return torch.where(span_id > 0, span_id, -1)
    begins = 98 + torch.arange(span_id.shape[0])[:, None]
    return (torch.arange(span_id.shape[1]) >= begins).to(torch.int32)


def form_of(base: str, valid: Tensor, ids: Tensor, past: int = 0) -> Any:
    """The base mask as intervals; rows begin after ``past`` tokens."""
    row = ("add", ("index", "q"), past)
    query, key = ("load", ids, (("index", "b"), row)), ("load", ids, (("index", "b"), COLUMN))
    causal = CAUSAL if past == 0 else ("upper", row)
    if base == "sliding":
        return ("and", causal, ("lower", ("sub", row, WINDOW - 1)))
    if base == "chunks":
        return ("and", causal, ("same", (("floordiv", row, WINDOW),), (CHUNK,), True))
    if base == "padding":
        return ("and", causal, ("valid", ("load", valid, (("index", "b"), COLUMN))))
    if base == "image":
        image = ("and", ("row", ("ge", query, 0)), ("same", (query,), (key,), False))
        return ("or", causal, image)
    if base == "packed":
        return ("and", causal, ("same", (query,), (key,), True))
    return causal


def expression_of(base: str, valid: Tensor, ids: Tensor) -> Any:
    """The base mask element by element."""
    row, column = ("index", "q"), COLUMN
    query, key = (("load", ids, (("index", "b"), axis)) for axis in (row, column))
    causal = ("le", column, row)
    if base == "sliding":
        return ("and", causal, ("gt", column, ("sub", row, WINDOW)))
    if base == "padding":
        return ("and", causal, ("load", valid, (("index", "b"), column)))
    if base == "image":
        return ("or", causal, ("and", ("ge", query, 0), ("eq", query, key)))
    return causal


def allowed_of(base: str, valid: Tensor, ids: Tensor) -> Tensor:
    """The base mask, element by element, ``[B, 1, L, L]``."""
    length = valid.shape[1]
    q, k = torch.arange(length)[:, None], torch.arange(length)
    allowed = (k <= q).expand(valid.shape[0], 1, -1, -1)
    same = (ids[:, :, None] == ids[:, None])[:, None]
    if base == "sliding":
        return allowed & (k > q - WINDOW)
    if base == "chunks":
        return allowed & (q // WINDOW == k // WINDOW)
    if base == "padding":
        return allowed & valid[:, None, None, :]
    if base == "image":
        return allowed | (same & (ids >= 0)[:, None, :, None])
    return allowed & same if base == "packed" else allowed


def inputs_of(
    batch: int,
    length: int,
    head_dim: int,
    dtype: torch.dtype,
    mix: str,
    base: str = "causal",
    past: int = 0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def random(heads: int, length: int = length) -> Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)

    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, : length // 7] = False
    codes = torch.tensor(MIXES[mix], dtype=torch.int32)
    span_id, is_sink = template_of(batch, length)
    ids = ids_of(base, span_id)
    allowed = allowed_of(base, valid, ids)[:, :, past:].contiguous()
    query, key, value = random(4, length - past), random(2), random(2)
    return [query, key, value, span_id, is_sink, codes, valid, ids, allowed]


def attention(
    base: str,
    order: str,
    batch: int,
    capacity: Capacity = (None, None),
) -> Callable[..., Tensor]:
    """One fused call; whatever is symbolic of its sizes up to the capacity, if there is one."""

    def mask_of(
        num_queries: int,
        num_keys: int,
        span_id: Tensor,
        is_sink: Tensor,
        valid: Tensor,
        ids: Tensor,
        allowed: Tensor,
    ) -> Any:
        template: Any = (span_id, is_sink)
        past = span_id.shape[1] - num_queries
        sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
        if order == "materialised":
            return materialised_mask(allowed, *template, **sizes)
        if order == "expressed":
            return expressed_mask(expression_of(base, valid, ids), *template, **sizes)
        form = form_of(base, valid, ids, past)
        if order == "ordered":
            return ordered_mask(form, *template, **sizes)
        return sorted_mask(
            form, *template, **sizes, query_capacity=capacity[0], key_capacity=capacity[1]
        )

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span_id: Tensor,
        is_sink: Tensor,
        codes: Tensor,
        valid: Tensor,
        ids: Tensor,
        allowed: Tensor,
    ) -> Tensor:
        mask = mask_of(query.shape[2], key.shape[2], span_id, is_sink, valid, ids, allowed)
        heads = torch.arange(4, device=query.device)
        return attend(query, key, value, mask, heads, codes, (("all", 4),))

    return call


def errors_of(found: Tensor, base: str, inputs: list[Tensor]) -> tuple[float, float]:
    """The largest difference from the oracle in float64, and that of eager attention."""
    query, key, value, span_id, is_sink, codes, _, ids, allowed = inputs
    sequences = ids if base == "packed" else None
    keep = torch.stack(
        [oracle_keep(span_id, is_sink, code, sequences) for code in codes.tolist()], dim=1
    )
    mask = keep[:, :, -query.shape[2] :] & allowed
    exact = (x.double() for x in (query, key, value))
    expected = oracle_attention(*exact, mask, query.shape[3] ** -0.5)
    eager = oracle_attention(query, key, value, mask, query.shape[3] ** -0.5)
    assert found.shape == expected.shape and found.dtype == query.dtype
    ours, its = ((x.double() - expected).abs().max() for x in (found, eager))
    return float(ours), float(its)


# Base mask, form, batch, length, categories, tokens in the cache before, dtype
KERNELS = [
    ("causal", "sorted", 2, 203, "each", 0, "bfloat16"),
    ("causal", "sorted", 1, 290, "each", 101, "float32"),
    ("causal", "ordered", 1, 290, "two", 101, "float32"),
    ("padding", "sorted", 2, 203, "each", 0, "float32"),
    ("padding", "expressed", 2, 203, "two", 0, "float32"),
    ("padding", "materialised", 1, 150, "each", 0, "bfloat16"),
    ("sliding", "sorted", 2, 260, "two", 0, "float32"),
    ("chunks", "ordered", 2, 203, "each", 0, "float32"),
    ("image", "sorted", 2, 203, "each", 0, "float32"),
    ("image", "expressed", 1, 203, "each", 0, "float32"),
    ("packed", "sorted", 2, 203, "each", 0, "float32"),
]
MORE_KERNELS = [
    ("causal", "sorted", 1, 203, "each", 0, "float32"),
    ("causal", "sorted", 1, 128, "document", 0, "float32"),
    ("causal", "ordered", 1, 203, "dense", 0, "float32"),
    ("padding", "ordered", 2, 203, "two", 0, "float32"),
    ("sliding", "ordered", 1, 150, "each", 0, "float32"),
    ("sliding", "expressed", 2, 203, "each", 0, "float32"),
    ("chunks", "sorted", 1, 203, "each", 0, "float32"),
    ("image", "ordered", 1, 203, "each", 0, "float32"),
    ("packed", "ordered", 1, 203, "each", 0, "float32"),
]


@contextmanager
def as_of_long_prompts() -> Iterator[None]:
    """Inside, two chunks of queries; and buffers are padded from four elements on, not from 1,024.

    Both are a GPU's.
    """
    with (
        mock.patch.object(mask_forms, "num_chunks_of", return_value=2),
        torch._inductor.config.patch(padding_stride_threshold=4),
    ):
        yield
