"""Block tables against the blocks of the masks themselves.

The checks take the function they check, so that planted faults can be shown to fail them.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask

from blindsight.attention.block_tables import (
    BlockTables,
    listed_share,
    prompt_order_lists_less,
    runs_of_sorted,
    tables_of_mask,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.attention.interval_masks import BaseMask, causal_base, keep_intervals
from blindsight.attention.intervals import SortedBounds, allowed_sorted, sorted_bounds
from strategies import BaseCase, base_masks
from test_masks import call, expected_mask, sort_mask

BLOCK_SIZES = (16, 32, 64, 128, 256)


def block_sizes() -> st.SearchStrategy[tuple[int, int]]:
    """(queries, keys), equal or not; small ones make many blocks of a short prompt."""
    one = st.sampled_from(BLOCK_SIZES)
    return st.one_of(one.map(lambda size: (size, size)), st.tuples(one, one))


def num_blocks(length: int, block_size: int) -> int:
    return -(-length // block_size)


def dense_blocks(num: torch.Tensor, blocks: torch.Tensor, num_key_blocks: int) -> torch.Tensor:
    """Listed blocks as bool [B, C, N, M]; asserts that rows list existing blocks, once each."""
    assert num.dtype == blocks.dtype == torch.int32
    result = torch.zeros(*num.shape, num_key_blocks, dtype=torch.bool)
    assert (num >= 0).all() and (num <= blocks.shape[-1]).all(), "more blocks than the table holds"
    assert ((blocks >= 0) & (blocks < num_key_blocks)).all(), "no such block"
    for row in torch.cartesian_prod(*(torch.arange(size) for size in num.shape)).tolist():
        b, c, n = row
        listed = blocks[b, c, n, : num[b, c, n]]
        assert len(listed.unique()) == len(listed), "a block is listed twice"
        assert listed.tolist() == sorted(listed.tolist()), "blocks are out of order"
        result[b, c, n, listed.long()] = True
    return result


def blocks_of_mask(mask: torch.Tensor, block_size: tuple[int, int]):
    """Which blocks of [B, C, Q, K] hold allowed pairs, and which whole blocks hold nothing else."""
    query_size, key_size = block_size
    some, every = [], []
    for rows in mask.split(query_size, dim=2):
        tiles = rows.split(key_size, dim=3)
        some.append(torch.stack([tile.any(3).any(2) for tile in tiles], dim=-1))
        every.append(
            torch.stack(
                [tile.all(3).all(2) & (tile.shape[2:] == block_size) for tile in tiles], dim=-1
            )
        )
    return torch.stack(some, dim=2), torch.stack(every, dim=2)


def check_tables(tables: BlockTables, mask: torch.Tensor, block_size: tuple[int, int]) -> None:
    """Nothing missing, nothing full that is not; and what is full is known to be."""
    num_key_blocks = num_blocks(mask.shape[3], block_size[1])
    partial = dense_blocks(tables.num_partial, tables.partial, num_key_blocks)
    full = dense_blocks(tables.num_full, tables.full, num_key_blocks)
    some, every = blocks_of_mask(mask, block_size)
    assert partial.shape == some.shape
    assert not (partial & full).any(), "a block is both partial and full"
    assert (partial | full)[some].all(), "an allowed pair is in no listed block"
    assert every[full].all(), "a full block has a masked element"
    assert torch.equal(full, every), "a full block is called partial"


def check_sorted(case: BaseCase, block_size, tables_of=tables_of_sorted, bounds_of=sorted_bounds):
    bounds, order = call(bounds_of, case)
    tables = tables_of(bounds, case.num_keys, block_size)
    check_tables(tables, sort_mask(expected_mask(case), order), block_size)


def keep_of(case: BaseCase):
    return keep_intervals(
        case.template.span_id,
        case.template.is_sink,
        case.num_queries,
        case.num_keys,
        first_span=case.first_span,
    )


def check_prompt_order(case: BaseCase, block_size, tables_of=tables_of_prompt_order):
    tables = tables_of(case.interval_form(), keep_of(case), case.num_keys, block_size)
    check_tables(tables, expected_mask(case), block_size)


@given(base_masks(), block_sizes())
def test_sorted_tables_are_sound(case, block_size):
    check_sorted(case, block_size)


@given(base_masks(), block_sizes())
def test_prompt_order_tables_are_sound(case, block_size):
    check_prompt_order(case, block_size)


@settings(max_examples=25)
@given(base_masks(text_inside=True), block_sizes())
def test_spans_may_have_text_inside(case, block_size):
    check_sorted(case, block_size)
    check_prompt_order(case, block_size)


@given(base_masks(), block_sizes())
def test_tables_of_a_mask_are_its_blocks(case, block_size):
    mask = expected_mask(case)
    tables = tables_of_mask(mask, block_size)
    check_tables(tables, mask, block_size)
    num_listed = (tables.num_partial + tables.num_full).sum()
    assert num_listed == blocks_of_mask(mask, block_size)[0].sum()


@settings(max_examples=10)
@given(base_masks(), block_sizes())
def test_listed_blocks_include_those_of_create_block_mask(case, block_size):
    bounds, _ = call(sorted_bounds, case)
    lower, upper = bounds.rows()
    categories = torch.arange(4)
    block_mask = create_block_mask(
        lambda b, h, q, k: allowed_sorted(b, h, q, k, categories, lower, upper),
        case.valid.shape[0],
        4,
        case.num_queries,
        case.num_keys,
        device="cpu",
        BLOCK_SIZE=block_size,
    )
    tables = tables_of_sorted(bounds, case.num_keys, block_size)
    num_key_blocks = num_blocks(case.num_keys, block_size[1])
    ours = dense_blocks(tables.num_partial, tables.partial, num_key_blocks)
    our_full = dense_blocks(tables.num_full, tables.full, num_key_blocks)
    partial = dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, num_key_blocks)
    full = dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, num_key_blocks)
    assert (ours | our_full)[partial | full].all()
    assert full[our_full].all()


@given(base_masks(), block_sizes())
def test_runs_count_what_tables_list(case, block_size):
    bounds, _ = call(sorted_bounds, case)
    tables = tables_of_sorted(bounds, case.num_keys, block_size)
    listed = runs_of_sorted(bounds, block_size).num_listed()
    assert torch.equal(tables.num_partial + tables.num_full, listed)


def test_tables_of_rows_that_see_nothing():
    base, keep, bounds = both_orders([8, 24])
    base = base._replace(valid=torch.zeros_like(base.valid))
    bounds = SortedBounds(bounds.lower, bounds.lower)
    for tables in (
        tables_of_sorted(bounds, 32, 16),
        tables_of_prompt_order(base, keep, 32, 16),
    ):
        assert not tables.num_partial.any() and not tables.num_full.any()
        assert tables.partial.shape == tables.full.shape == (1, 4, 2, 2)


@given(base_masks(), block_sizes(), st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_heads_take_the_tables_of_their_categories(case, block_size, heads):
    bounds, _ = call(sorted_bounds, case)
    categories = torch.tensor(heads)
    tables = tables_of_sorted(bounds, case.num_keys, block_size).of_heads(categories)
    of_heads = SortedBounds(bounds.lower[:, categories], bounds.upper[:, categories])
    expected = tables_of_sorted(of_heads, case.num_keys, block_size)
    assert all(torch.equal(x, y) for x, y in zip(tables, expected, strict=True))


@given(base_masks(max_batch=1), block_sizes())
def test_a_causal_mask_lists_what_it_must(case, block_size):
    """The range from the smallest to the largest bound of a block has no gaps then."""
    assume(case.first_key == 0 and case.num_tokens == case.num_queries)
    base = causal_base(1, case.num_queries, case.num_keys, case.num_tokens)
    bounds, _ = sorted_bounds(
        base, case.template.span_id, case.template.is_sink, case.num_queries, case.num_keys
    )
    tables = tables_of_sorted(bounds, case.num_keys, block_size)
    key = torch.arange(case.num_keys)
    mask = ((bounds.lower[..., None] <= key) & (key < bounds.upper[..., None])).any(2)
    some, _ = blocks_of_mask(mask, block_size)
    listed = tables.num_partial + tables.num_full
    assert torch.equal(listed[:, 0], some[:, 0].sum(-1)), "dense heads"
    share = listed_share(tables, mask[:, 0].sum(), block_size)
    assert torch.equal(share, listed.sum(-1) * block_size[0] * block_size[1] / mask[:, 0].sum())


def both_orders(lengths, window=10_000):
    """Masks of a causal prompt in both orders, given as lengths of text and span in turn."""
    kinds = [i % 2 * (i // 2 + 1) for i in range(len(lengths))]
    span_id = torch.tensor(kinds).repeat_interleave(torch.tensor(lengths))[None]
    is_sink = (span_id > 0) & (span_id != torch.nn.functional.pad(span_id, (1, 0))[:, :-1])
    size = span_id.shape[1]
    base = causal_base(1, size, size, size)
    base = base._replace(lower=(base.upper - window).clamp(min=0))
    keep = keep_intervals(span_id, is_sink, size, size)
    return base, keep, sorted_bounds(base, span_id, is_sink, size, size)[0]


def lists_less(masks, num_heads, block_size, keys_per_move):
    base, keep, bounds = masks
    listed = runs_of_sorted(bounds, block_size).num_listed()
    return prompt_order_lists_less(
        base, keep, listed, num_heads, block_size, keys_per_move=keys_per_move
    )


def test_choice_of_order_counts_blocks_of_the_heads_in_use():
    def prompt_order(masks, num_heads, block_size=128, keys_per_move=180):
        return lists_less(masks, num_heads, block_size, keys_per_move)

    with_text = both_orders([16, 256] * 16)
    without_text = both_orders([0, 256] * 16)
    assert not prompt_order(with_text, [0, 0, 0, 8])
    assert not prompt_order(with_text, [0, 8, 8, 0], (64, 32))
    assert prompt_order(without_text, [0, 0, 8, 0])
    assert not prompt_order(without_text, [0, 0, 1, 8])
    # nothing to gain: no sparse head, no head at all, a narrow window, or a high cost
    assert prompt_order(with_text, [8, 0, 0, 0])
    assert prompt_order(with_text, [0, 0, 0, 0])
    assert prompt_order(both_orders([16, 256] * 16, window=100), [0, 0, 0, 8])
    assert prompt_order(with_text, [0, 0, 0, 8], keys_per_move=10_000)


@pytest.mark.parametrize("text", [0, 1, 3, 16])
def test_some_blocks_stand_for_all_of_a_long_prompt(text, monkeypatch):
    """The choice turns at nearly the same cost of moving tokens."""
    masks = both_orders([text, 64] * 300)

    def turns_at():
        def stays(cost):
            return lists_less(masks, [1, 1, 1, 5], 64, cost)

        low, high = 0.0, 1e5
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if stays(middle) else (middle, high)
        return high

    sampled = turns_at()
    monkeypatch.setattr("blindsight.attention.block_tables._MAX_SAMPLED_BLOCKS", 10**6)
    assert sampled == pytest.approx(turns_at(), rel=0.02, abs=40)


@settings(max_examples=5)
@given(base_masks(), block_sizes())
def test_tables_trace_without_data_dependence(case, block_size):
    base, keep = case.interval_form(), keep_of(case)
    bounds, _ = call(sorted_bounds, case)

    def both(lower, upper, valid, keep_lower, keep_upper, visible, sorted_lower, sorted_upper):
        base, keep = BaseMask(lower, upper, valid), type(keep_)(keep_lower, keep_upper, visible)
        return (
            *tables_of_prompt_order(base, keep, case.num_keys, block_size),
            *tables_of_sorted(SortedBounds(sorted_lower, sorted_upper), case.num_keys, block_size),
        )

    keep_ = keep
    inputs = (*base, *keep, *bounds)
    graph = make_fx(both, tracing_mode="fake")(*(torch.zeros_like(x) for x in inputs))
    for traced, eager in zip(graph(*inputs), both(*inputs), strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.inductor
def test_compiled_tables_are_the_eager_ones():
    span_id = torch.arange(1, 8).repeat_interleave(40)
    span_id = torch.stack([span_id * (torch.arange(280) % 40 > 9), span_id * 0 + 1])
    is_sink = torch.arange(280).expand(2, -1) % 40 == 10

    def tables(span_id, is_sink, valid):
        base = causal_base(2, 200, 280, 280)._replace(valid=valid)
        bounds, order = sorted_bounds(base, span_id, is_sink, 200, 280)
        return (*bounds, *order, *tables_of_sorted(bounds, 280, 32))

    inputs = (span_id, is_sink, torch.arange(280).expand(2, -1) > 5)
    # one node of Dynamo's graph, as the backend's own functions are
    node = torch.compiler.allow_in_graph(tables)
    compiled = torch.compile(lambda *args: node(*args), fullgraph=True, dynamic=False)
    for one, other in zip(compiled(*inputs), tables(*inputs), strict=True):
        assert torch.equal(one, other)
