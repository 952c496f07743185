"""Masks in interval form, made by an operator that no compiler looks into.

A mask is made once for a prompt, from a few rows as long as the prompt: a millisecond or two. A
dozen C++ kernels for it take several seconds to compile, and are no faster. So graphs for a CPU
call :func:`sorted_mask` and :func:`ordered_mask` as an operator. On a GPU, hundreds of launches
would take longer than the few of a compiled mask; there they are traced, as in graphs that must
run without this package.

Shapes: B batch, C categories, Q and K lengths in tokens, N and M numbers of query and key blocks.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor

from blindsight.attention.base_mask import Form
from blindsight.attention.block_tables import BlockTables, block_size_of, ceil_div
from blindsight.attention.chunks import num_chunks_of, num_rows_of
from blindsight.attention.interval_masks import BaseMask, Keep
from blindsight.attention.intervals import NUM_KEY_GROUPS, TokenOrder
from blindsight.attention.mask_forms import OrderedMask, SortedMask, ordered_mask, sorted_mask
from blindsight.categories import NUM_CATEGORIES

_TENSOR, _NUMBER = "tensor", "number"  # stand for one in a form that is written as text


def sorted_mask_by_operator(
    form: Form, span_id: Tensor, is_sink: Tensor, **sizes: Any
) -> SortedMask:
    """As :func:`~blindsight.attention.mask_forms.sorted_mask`."""
    if (written := _write(form)) is None:
        return sorted_mask(form, span_id, is_sink, **sizes)
    made = _sorted_mask(*written, span_id, is_sink, **sizes)
    order, (lower, upper), tables = TokenOrder(*made[:3]), made[3:5], BlockTables(*made[5:])
    capacity = sizes.get("query_capacity")
    capacity = sizes["num_queries"] if capacity is None else capacity
    block_size = block_size_of(span_id.device)
    num_chunks = num_chunks_of(span_id.device, capacity, block_size, sizes.get("num_threads", 1))
    return SortedMask(order, lower, upper, tables, block_size, num_chunks)


def ordered_mask_by_operator(
    form: Form, span_id: Tensor, is_sink: Tensor, **sizes: Any
) -> OrderedMask:
    """As :func:`~blindsight.attention.mask_forms.ordered_mask`."""
    if (written := _write(form)) is None:
        return ordered_mask(form, span_id, is_sink, **sizes)
    made = _ordered_mask(*written, span_id, is_sink, **sizes)
    block_size = block_size_of(span_id.device)
    return OrderedMask(BaseMask(*made[:3]), Keep(*made[3:6]), BlockTables(*made[6:]), block_size)


@torch.library.custom_op("blindsight::sorted_mask", mutates_args=())
def _sorted_mask(
    form: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    span_id: Tensor,
    is_sink: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    by_group: bool = False,
    num_threads: int = 1,
) -> list[Tensor]:
    mask = sorted_mask(
        _read(form, tensors, numbers),
        span_id,
        is_sink,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
        query_capacity=query_capacity,
        key_capacity=key_capacity,
        by_group=by_group,
        num_threads=num_threads,
    )
    return _own(*mask.order, mask.lower, mask.upper, *mask.tables)


@_sorted_mask.register_fake
def _(
    form: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    span_id: Tensor,
    is_sink: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
    query_capacity: int | None = None,
    key_capacity: int | None = None,
    by_group: bool = False,
    num_threads: int = 1,
) -> list[Tensor]:
    queries = num_queries if query_capacity is None else query_capacity
    block_size = block_size_of(span_id.device)
    num_chunks = num_chunks_of(span_id.device, queries, block_size, num_threads)
    queries = num_rows_of(queries, num_chunks, block_size)
    keys = num_keys if key_capacity is None else key_capacity
    positions = [(batch, size) for size in (queries, keys, num_queries)]
    return [
        *_empty(span_id, torch.int64, *positions),
        *_empty(span_id, torch.int32, *[(batch, NUM_CATEGORIES * NUM_KEY_GROUPS, queries)] * 2),
        *_empty_tables(span_id, batch, queries, keys),
    ]


@torch.library.custom_op("blindsight::ordered_mask", mutates_args=())
def _ordered_mask(
    form: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    span_id: Tensor,
    is_sink: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> list[Tensor]:
    mask = ordered_mask(
        _read(form, tensors, numbers),
        span_id,
        is_sink,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_keys,
    )
    return _own(*mask.base, *mask.keep, *mask.tables)


@_ordered_mask.register_fake
def _(
    form: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    span_id: Tensor,
    is_sink: Tensor,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> list[Tensor]:
    row, column = (batch, num_queries), (batch, num_keys)
    kept_row, kept_column = ((batch, NUM_CATEGORIES, size) for size in (num_queries, num_keys))
    return [
        *_empty(span_id, torch.int32, row, row),
        *_empty(span_id, torch.bool, column),
        *_empty(span_id, torch.int32, kept_row, kept_row),
        *_empty(span_id, torch.bool, kept_column),
        *_empty_tables(span_id, batch, num_queries, num_keys),
    ]


def _own(*tensors: Tensor) -> list[Tensor]:
    """Return each as memory of its own, which an operator must."""
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


def _empty(like: Tensor, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=like.device) for shape in shapes]


def _empty_tables(like: Tensor, batch: int, num_queries: int, num_keys: int) -> list[Tensor]:
    size = block_size_of(like.device)
    rows, width = (ceil_div(length, size) for length in (num_queries, num_keys))
    num, blocks = (batch, NUM_CATEGORIES, rows), (batch, NUM_CATEGORIES, rows, width)
    return _empty(like, torch.int32, num, blocks, num, blocks)


def _write(form: Form) -> tuple[str, list[Tensor], list[int]] | None:
    """Return a form as text, with places for its tensors and symbolic numbers, and those.

    None if it holds what a text cannot.
    """
    tensors: list[Tensor] = []
    numbers: list[Any] = []

    def place(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node)
            return _TENSOR, len(tensors) - 1
        if isinstance(node, SymInt):
            numbers.append(node)
            return _NUMBER, len(numbers) - 1
        return node

    tree = _map(form, place)
    try:
        fits = ast.literal_eval(repr(tree)) == tree
    except (SyntaxError, ValueError):
        return None
    return (repr(tree), tensors, numbers) if fits else None


def _read(text: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> Form:
    def fetch(node: Any) -> Any:
        if not isinstance(node, tuple) or node[:1] not in ((_TENSOR,), (_NUMBER,)):
            return node
        return (tensors if node[0] == _TENSOR else numbers)[node[1]]

    form: Form = _map(ast.literal_eval(text), fetch)
    return form


def _map(node: Any, function: Callable[[Any], Any]) -> Any:
    """Return a tree of tuples with ``function`` applied to every node, from the top."""
    node = function(node)
    return tuple(_map(part, function) for part in node) if isinstance(node, tuple) else node
