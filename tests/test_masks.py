"""The masks of all categories as intervals, against what they mean, element by element.

The checks take the function they check, so that planted faults can be shown to fail them.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_mask

from blindsight.attention.interval_masks import BaseMask, causal_base, keep_intervals
from blindsight.attention.intervals import allowed_sorted, sorted_bounds
from blindsight.categories import NUM_CATEGORIES
from oracles import (
    DENSE,
    DOCUMENT,
    DOCUMENT_SINK,
    SINK,
    keep_of_call,
    oracle_attention,
    oracle_base,
    oracle_keep,
)
from strategies import BaseCase, base_masks, gqa_heads

# a category's pairs are among those of the other
ALLOWS_MORE = [
    (DENSE, SINK),
    (DENSE, DOCUMENT_SINK),
    (DOCUMENT_SINK, DOCUMENT),
    (DOCUMENT_SINK, SINK),
]


def call(bounds_of, case: BaseCase):
    return bounds_of(
        case.interval_form(),
        case.template.span_id,
        case.template.is_sink,
        case.num_queries,
        case.num_keys,
        first_span=case.first_span,
    )


def base_of(case: BaseCase) -> torch.Tensor:
    """[B, Q, K]"""
    return oracle_base(
        case.num_tokens,
        case.num_queries,
        case.num_keys,
        sight=case.sight,
        valid=case.valid,
        image_id=case.image_id,
        window=case.window,
        distance=case.distance,
        chunk=case.chunk,
        sequence_id=case.sequence_id,
    )


def expected_mask(case: BaseCase) -> torch.Tensor:
    """[B, C, Q, K] in prompt order."""
    keep = [
        keep_of_call(
            oracle_keep(case.template.span_id, case.template.is_sink, category, case.sequence_id),
            case.num_queries,
            case.num_keys,
        )
        for category in range(NUM_CATEGORIES)
    ]
    return base_of(case)[:, None] & torch.stack(keep, dim=1)


def sort_mask(mask: torch.Tensor, order) -> torch.Tensor:
    """[B, C, Q, K] from prompt order to sorted order."""
    return torch.stack(
        [mask[b][:, order.query[b]][:, :, order.key[b]] for b in range(mask.shape[0])]
    )


def mask_of_bounds(bounds, num_keys: int) -> torch.Tensor:
    """[B, C, Q, K] in sorted order."""
    key = torch.arange(num_keys)
    inside = (bounds.lower[..., None] <= key) & (key < bounds.upper[..., None])
    assert (inside.sum(2) <= 1).all(), "intervals of a row overlap"
    return inside.any(2)


def check_bounds(case: BaseCase, bounds_of=sorted_bounds) -> None:
    bounds, order = call(bounds_of, case)
    expected = sort_mask(expected_mask(case), order)
    mask = mask_of_bounds(bounds, case.num_keys)
    wrong = (mask != expected).nonzero()
    assert len(wrong) == 0, f"first wrong (batch, category, query, key): {wrong[:5].tolist()}"
    assert torch.equal(bounds.num_pairs(), expected.sum((2, 3))), "pairs are miscounted"


def check_order(case: BaseCase, bounds_of=sorted_bounds) -> None:
    _, order = call(bounds_of, case)
    num_tokens, past = case.num_tokens, case.num_tokens - case.num_queries
    for b in range(case.valid.shape[0]):
        span, sink = case.template.span_id[b].tolist(), case.template.is_sink[b].tolist()
        valid = case.valid[b].tolist()

        def group(token: int) -> int:
            column = token - case.first_key
            if token >= num_tokens or (column >= 0 and not valid[column]):  # noqa: B023
                return 3
            return (1 if sink[token] else 2) if span[token] else 0  # noqa: B023

        rows = sorted(range(case.num_queries), key=lambda row: group(past + row))
        columns = sorted(range(case.num_keys), key=lambda k: group(case.first_key + k))
        assert order.query[b].tolist() == rows, "order of queries"
        assert order.key[b].tolist() == columns, "order of keys"
        assert order.query[b][order.inverse_query[b]].tolist() == list(range(case.num_queries))
    if case.num_queries == case.num_keys == num_tokens:
        assert torch.equal(order.query, order.key)


def check_mask_mod(case: BaseCase, mask_mod=allowed_sorted, bounds_of=sorted_bounds) -> None:
    bounds, order = call(bounds_of, case)
    categories = torch.tensor([DOCUMENT, DENSE, DOCUMENT_SINK, SINK, DOCUMENT], dtype=torch.int32)
    lower, upper = bounds.rows()
    mask = create_mask(
        lambda b, h, q, k: mask_mod(b, h, q, k, categories, lower, upper),
        case.valid.shape[0],
        len(categories),
        case.num_queries,
        case.num_keys,
        device="cpu",
    )
    assert torch.equal(mask, sort_mask(expected_mask(case)[:, categories.long()], order))


def check_prompt_order(case: BaseCase) -> None:
    keep = keep_intervals(
        case.template.span_id,
        case.template.is_sink,
        case.num_queries,
        case.num_keys,
        first_span=case.first_span,
    )
    key = torch.arange(case.num_keys)
    inside = (keep.lower[..., None] <= key) & (key <= keep.upper[..., None])
    kept = inside | keep.visible[:, :, None]
    base = case.interval_form()
    within = (base.lower[..., None] <= key) & (key <= base.upper[..., None])
    mask = (within & base.valid[:, None])[:, None] & kept
    assert torch.equal(mask, expected_mask(case))


@given(base_masks())
def test_bounds_allow_what_the_masks_mean(case):
    check_bounds(case)


@given(base_masks())
def test_tokens_are_sorted_by_group_and_position(case):
    check_order(case)


@given(base_masks())
def test_mask_mod_allows_what_the_masks_mean(case):
    check_mask_mod(case)


@given(base_masks())
def test_prompt_order_keeps_what_the_masks_mean(case):
    check_prompt_order(case)


@settings(max_examples=25)
@given(base_masks(text_inside=True))
def test_spans_may_have_text_inside(case):
    check_bounds(case)
    check_order(case)
    check_mask_mod(case)
    check_prompt_order(case)


@given(base_masks(by_group=True) | base_masks(by_group=True, text_inside=True))
def test_masks_may_be_intervals_of_groups(case):
    check_bounds(case)
    check_mask_mod(case)


@given(base_masks())
def test_a_category_that_allows_more_has_no_fewer_pairs(case):
    num_pairs = call(sorted_bounds, case)[0].num_pairs()
    for more, less in ALLOWS_MORE:
        assert (num_pairs[:, more] >= num_pairs[:, less]).all()


@given(st.data())
def test_sorted_attention_is_attention(data):
    case = data.draw(base_masks(max_spans=3, max_span=12))
    num_heads, num_kv_heads = data.draw(gqa_heads(max_heads=4))
    categories = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=num_heads, max_size=num_heads))
    )
    batch = case.valid.shape[0]
    generator = torch.Generator().manual_seed(0)

    def normal(heads, length):
        return torch.randn(batch, heads, length, 8, dtype=torch.float64, generator=generator)

    query = normal(num_heads, case.num_queries)
    key, value = normal(num_kv_heads, case.num_keys), normal(num_kv_heads, case.num_keys)
    bounds, order = call(sorted_bounds, case)

    def gather(x, index):
        return x.gather(2, index[:, None, :, None].expand_as(x))

    output = oracle_attention(
        gather(query, order.query),
        gather(key, order.key),
        gather(value, order.key),
        mask_of_bounds(bounds, case.num_keys)[:, categories],
        0.3,
    )
    expected = oracle_attention(query, key, value, expected_mask(case)[:, categories], 0.3)
    torch.testing.assert_close(
        gather(output, order.inverse_query), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("num_queries", "num_keys"), [(10, 10), (4, 10), (4, 6), (10, 16)])
def test_causal_base(num_queries, num_keys):
    base = causal_base(2, num_queries, num_keys, 10)
    key = torch.arange(num_keys)
    mask = (base.lower[..., None] <= key) & (key <= base.upper[..., None]) & base.valid[:, None]
    token = key + max(10 - num_keys, 0)
    expected = token <= torch.arange(10 - num_queries, 10)[:, None]
    assert torch.equal(mask, expected.expand(2, -1, -1))


@settings(max_examples=5)
@given(base_masks())
def test_bounds_trace_without_data_dependence(case):
    """One graph of plain operators, right for any other contents of the same sizes."""
    base, (span_id, is_sink) = case.interval_form(), (case.template.span_id, case.template.is_sink)

    def bounds_of(lower, upper, valid, span_id, is_sink):
        return sorted_bounds(
            BaseMask(lower, upper, valid), span_id, is_sink, case.num_queries, case.num_keys
        )

    blank = [torch.zeros_like(x) for x in (*base, span_id, is_sink)]
    graph = make_fx(bounds_of, tracing_mode="fake")(*blank)
    (lower, upper), order = graph(*base, span_id, is_sink)
    bounds, expected_order = bounds_of(*base, span_id, is_sink)
    assert torch.equal(lower, bounds.lower) and torch.equal(upper, bounds.upper)
    assert all(torch.equal(x, y) for x, y in zip(order, expected_order, strict=True))
