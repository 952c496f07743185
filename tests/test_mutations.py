"""Planted faults: the checks of masks and block tables must fail on each."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings

from blindsight.attention import block_tables, intervals
from blindsight.attention.block_tables import (
    BlockTables,
    _list_blocks,
    tables_of_prompt_order,
    tables_of_sorted,
)
from blindsight.attention.intervals import (
    NUM_KEY_GROUPS,
    SortedBounds,
    TokenOrder,
    allowed_sorted,
    sorted_bounds,
)
from oracles import DOCUMENT, DOCUMENT_SINK, SINK
from strategies import base_masks
from test_block_tables import (
    block_sizes,
    check_prompt_order,
    check_sorted,
    dense_blocks,
    num_blocks,
)
from test_masks import check_bounds, check_mask_mod, check_order

TEXT_PART, SINK_PART, SPAN_PART = range(NUM_KEY_GROUPS)


def is_caught(check: Callable[..., None]) -> bool:
    """Whether the check fails on any of the examples that every change is tested with."""

    @settings(max_examples=50, derandomize=True, database=None, phases=[Phase.generate])
    @given(base_masks(), block_sizes())
    def run(case, block_size) -> None:
        check(case, block_size)

    try:
        run()
    except AssertionError:
        return True
    return False


# Masks: each takes the arguments of sorted_bounds and returns something slightly wrong.


def one_key_more(*args, **kwargs):
    bounds, order = sorted_bounds(*args, **kwargs)
    some = bounds.lower < bounds.upper
    return SortedBounds(bounds.lower, torch.where(some, bounds.upper + 1, bounds.upper)), order


def one_key_less(*args, **kwargs):
    bounds, order = sorted_bounds(*args, **kwargs)
    some = bounds.lower < bounds.upper
    return SortedBounds(bounds.lower + some, bounds.upper), order


def base_one_key_more(base, *args, **kwargs):
    return sorted_bounds(base._replace(upper=base.upper + 1), *args, **kwargs)


def base_starts_late(base, *args, **kwargs):
    return sorted_bounds(base._replace(lower=base.lower + 1), *args, **kwargs)


def drops_part(category: int, part: int):
    def faulty(*args, **kwargs):
        bounds, order = sorted_bounds(*args, **kwargs)
        upper = bounds.upper.clone()
        upper[:, category, part] = bounds.lower[:, category, part]
        return SortedBounds(bounds.lower, upper), order

    return faulty


def swaps_categories(*args, **kwargs):
    bounds, order = sorted_bounds(*args, **kwargs)
    swapped = [0, SINK, DOCUMENT_SINK, DOCUMENT]
    return SortedBounds(bounds.lower[:, swapped], bounds.upper[:, swapped]), order


def pads_other_side(base, *args, **kwargs):
    return sorted_bounds(base._replace(valid=base.valid.flip(1)), *args, **kwargs)


def ignores_padding(base, *args, **kwargs):
    return sorted_bounds(base._replace(valid=torch.ones_like(base.valid)), *args, **kwargs)


def restricts_first_span(*args, first_span=None):
    none = torch.zeros_like(args[0].lower, dtype=torch.bool)
    return sorted_bounds(*args, first_span=none)


def ignores_packing(*args, first_span=None):
    return sorted_bounds(*args)


def forgets_past(base, span_id, is_sink, num_queries, num_keys, **kwargs):
    """Takes the first tokens for those of the queries."""
    rolled = (x.roll(num_queries, dims=1) for x in (span_id, is_sink))
    return sorted_bounds(base, *rolled, num_queries, num_keys, **kwargs)


def sinks_one_late(base, span_id, is_sink, *args, **kwargs):
    return sorted_bounds(base, span_id, is_sink.roll(1, dims=1), *args, **kwargs)


def reverses_queries(*args, **kwargs):
    bounds, order = sorted_bounds(*args, **kwargs)
    return bounds, order._replace(query=order.query.flip(1))


def keys_in_prompt_order(*args, **kwargs):
    bounds, order = sorted_bounds(*args, **kwargs)
    in_order = torch.arange(order.key.shape[1]).expand_as(order.key)
    return bounds, TokenOrder(order.query, in_order, order.inverse_query)


@pytest.mark.parametrize(
    "faulty",
    [
        one_key_more,
        one_key_less,
        base_one_key_more,
        base_starts_late,
        drops_part(DOCUMENT_SINK, SINK_PART),
        drops_part(SINK, SPAN_PART),
        drops_part(DOCUMENT, TEXT_PART),
        drops_part(DOCUMENT, SINK_PART),
        swaps_categories,
        pads_other_side,
        ignores_padding,
        restricts_first_span,
        ignores_packing,
        forgets_past,
        sinks_one_late,
        reverses_queries,
        keys_in_prompt_order,
    ],
)
def test_faults_of_bounds_are_caught(faulty):
    assert is_caught(lambda case, _: check_bounds(case, bounds_of=faulty))


@pytest.mark.parametrize("faulty", [reverses_queries, keys_in_prompt_order, ignores_padding])
def test_faults_of_the_order_are_caught(faulty):
    assert is_caught(lambda case, _: check_order(case, bounds_of=faulty))


def test_a_wrong_inverse_order_is_caught():
    def faulty(*args, **kwargs):
        bounds, order = sorted_bounds(*args, **kwargs)
        return bounds, order._replace(inverse_query=order.query)

    assert is_caught(lambda case, _: check_order(case, bounds_of=faulty))


@pytest.mark.parametrize(
    "faulty",
    [
        lambda b, h, q, k, *captured: allowed_sorted(b, h, q, k - 1, *captured),
        lambda b, h, q, k, categories, *bounds: allowed_sorted(b, h * 0, q, k, categories, *bounds),
        lambda b, h, q, k, categories, lower, upper: allowed_sorted(
            b, h, q, k, categories, lower, upper + 1
        ),
    ],
    ids=["next key", "first head", "closed interval"],
)
def test_faults_of_the_mask_mod_are_caught(faulty):
    assert is_caught(lambda case, _: check_mask_mod(case, mask_mod=faulty))


# Tables: each takes right tables of M key blocks and returns something slightly wrong.


def _edit(tables: BlockTables, num_keys: int, block_size, edit) -> BlockTables:
    num_key_blocks = num_blocks(num_keys, block_size[1])
    partial = dense_blocks(tables.num_partial, tables.partial, num_key_blocks)
    full = dense_blocks(tables.num_full, tables.full, num_key_blocks)
    partial, full = edit(partial, full)
    return BlockTables(*_list_blocks(partial), *_list_blocks(full))


def partial_as_full(partial, full):
    return torch.zeros_like(partial), full | partial


def last_partial_as_full(partial, full):
    last = partial & (partial.flip(-1).cumsum(-1).flip(-1) == 1)
    return partial & ~last, full | last


def ragged_column_as_full(partial, full):
    last = torch.zeros_like(partial)
    last[..., -1] = partial[..., -1]
    return partial & ~last, full | last


def misses_last_block(partial, full):
    return partial & (partial.flip(-1).cumsum(-1).flip(-1) != 1), full


def misses_first_block(partial, full):
    return partial & (partial.cumsum(-1) != 1), full & (full.cumsum(-1) != 1)


def misses_last_row(partial, full):
    partial = partial.clone()
    partial[:, :, -1] = False
    return partial, full


def lists_full_twice(partial, full):
    return partial | full, full


def full_as_partial(partial, full):
    return partial | full, torch.zeros_like(full)


TABLE_FAULTS = [
    partial_as_full,
    last_partial_as_full,
    ragged_column_as_full,
    misses_last_block,
    misses_first_block,
    misses_last_row,
    lists_full_twice,
    full_as_partial,
]


@pytest.mark.parametrize("edit", TABLE_FAULTS)
def test_faults_of_sorted_tables_are_caught(edit):
    def faulty(bounds, num_keys, block_size):
        return _edit(tables_of_sorted(bounds, num_keys, block_size), num_keys, block_size, edit)

    assert is_caught(lambda case, size: check_sorted(case, size, tables_of=faulty))


@pytest.mark.parametrize("edit", TABLE_FAULTS)
def test_faults_of_prompt_order_tables_are_caught(edit):
    def faulty(base, keep, num_keys, block_size):
        tables = tables_of_prompt_order(base, keep, num_keys, block_size)
        return _edit(tables, num_keys, block_size, edit)

    assert is_caught(lambda case, size: check_prompt_order(case, size, tables_of=faulty))


def test_bounds_of_empty_rows_as_bounds_are_caught():
    """The first row's interval stands for its block: what an unskipped empty row can do."""

    def faulty(bounds, num_keys, block_size):
        first = torch.arange(bounds.lower.shape[-1]) // block_size[0] * block_size[0]
        of_first = SortedBounds(*(x[..., first] for x in bounds))
        return tables_of_sorted(of_first, num_keys, block_size)

    assert is_caught(lambda case, size: check_sorted(case, size, tables_of=faulty))


@pytest.mark.parametrize("name", ["valid", "lower", "upper"])
def test_a_condition_left_out_of_prompt_order_tables_is_caught(name):
    anything = {"valid": True, "lower": -1000, "upper": 1000}

    def faulty(base, keep, num_keys, block_size):
        loose = torch.full_like(getattr(base, name), anything[name])
        return tables_of_prompt_order(base._replace(**{name: loose}), keep, num_keys, block_size)

    assert is_caught(lambda case, size: check_prompt_order(case, size, tables_of=faulty))


def rounds_bounds_down(x, divisor):
    """Those of rows; the numbers of blocks are right."""
    return x // divisor if isinstance(x, torch.Tensor) else -(-x // divisor)


def rounds_bounds_too_far(x, divisor):
    return x // divisor + 1 if isinstance(x, torch.Tensor) else -(-x // divisor)


@pytest.mark.parametrize(
    ("module", "name", "faulty"),
    [
        (block_tables, "ceil_div", rounds_bounds_down),
        (block_tables, "ceil_div", rounds_bounds_too_far),
        (block_tables, "_sizes", lambda size: (size[1], size[0])),
        (intervals, "is_unrestricted", lambda span, first: span == 0),
        (intervals, "is_unrestricted", lambda span, first: span <= 1),
        (intervals, "span_edges", lambda span_id: (span_id.long() * 0, span_id.long() * 0 + 9)),
    ],
)
def test_faults_inside_are_caught(monkeypatch, module, name, faulty):
    monkeypatch.setattr(module, name, faulty)
    assert is_caught(check_sorted)


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("_num_before", lambda flags: torch.nn.functional.pad(flags.cumsum(-1).int(), (0, 1))),
        ("_num_before", lambda flags: torch.nn.functional.pad((~flags).cumsum(-1).int(), (1, 0))),
    ],
)
def test_faults_inside_prompt_order_are_caught(monkeypatch, name, faulty):
    monkeypatch.setattr(block_tables, name, faulty)
    assert is_caught(check_prompt_order)


def test_no_fault_is_seen_where_none_is():
    assert not is_caught(check_sorted)
    assert not is_caught(check_prompt_order)
    assert not is_caught(lambda case, _: check_bounds(case))
