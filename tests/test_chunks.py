"""Queries in chunks: the same attention, in another order.

Compiled for the CPU, as what is not compiled reads no tables. What a GPU runs,
tests/test_triton.py runs in Triton's interpreter, too, and with heads that share their keys.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.functional import pad

from blindsight.attention import chunks, mask_forms
from blindsight.attention.attend import attend
from blindsight.attention.base_mask import CAUSAL
from blindsight.attention.block_tables import BlockTables
from blindsight.attention.chunks import num_chunks_of
from blindsight.attention.mask_forms import sorted_mask
from blindsight.tune import compile_alone
from fused_call import form_of, template_of
from oracles import oracle_attention, oracle_keep

HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 16, 8
UNUSED = 30  # keys of a static cache


def attend_in_chunks(num_queries: int, groups: Any, num_threads: int = 1) -> Any:
    def call(*inputs: Tensor) -> Tensor:
        query, key, value, span_id, is_sink, heads, kinds = inputs
        sizes = {"batch": len(query), "num_queries": num_queries, "num_keys": key.shape[2]}
        form = form_of("causal", span_id, span_id, span_id.shape[1] - num_queries)
        mask = sorted_mask(form, span_id, is_sink, num_threads=num_threads, **sizes)
        assert mask.num_chunks == num_threads or num_threads == 1 < mask.num_chunks
        assert mask.order.query.shape[1] % (mask.num_chunks * mask.block_size) == 0
        return attend(query, key, value, mask, heads, kinds, groups)

    return call


def error_of(
    run: Any, batch: int, length: int, past: int, codes: list[int], heads: list[int]
) -> float:
    """The largest difference from the definitions in float64."""
    generator = torch.Generator().manual_seed(length)
    span_id, is_sink = template_of(batch, length)
    query, key, value = (
        torch.randn(batch, number, length, size, generator=generator)
        for number, size in ((HEADS, HEAD_DIM), (KEY_HEADS, HEAD_DIM), (KEY_HEADS, VALUE_DIM))
    )
    query = query[:, :, past:].contiguous()
    in_cache = (pad(x, (0, 0, 0, UNUSED if past else 0), value=1e4) for x in (key, value))
    order = torch.tensor(heads)
    kinds = torch.tensor(codes, dtype=torch.int32)[order]
    found = run(query, *in_cache, span_id, is_sink, order, kinds)
    causal = torch.arange(length) <= torch.arange(past, length)[:, None]
    keep = torch.stack([oracle_keep(span_id, is_sink, code) for code in codes], dim=1)
    exact = (x.double() for x in (query, key, value))
    expected = oracle_attention(*exact, keep[:, :, past:] & causal, HEAD_DIM**-0.5)
    return float((found - expected).abs().max())


CASES = {
    "two calls": (1, 290, 0, 2, [0, 3, 1, 0], [0, 3, 2, 1], [("causal", 2), ("mixed", 2)]),
    "after a cache": (2, 290, 101, 3, [0, 3, 1, 0], [0, 3, 2, 1], [("mixed", 4)]),
    "one table": (1, 290, 0, 4, [0, 2, 2, 2], [0, 1, 2, 3], [("causal", 1), ("alike", 3)]),
    "one table, batch": (2, 203, 0, 2, [3, 3, 3, 3], [2, 1, 0, 3], [("alike", 4)]),
}


@pytest.mark.inductor
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name != "one table")) for name in CASES],
)
def test_chunks_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, past, number, codes, heads, groups = CASES[case]
    monkeypatch.setattr(mask_forms, "num_chunks_of", lambda *_: number)
    monkeypatch.setattr(chunks, "_chunks_as_batch", chunks._chunks_as_heads)

    def run(*inputs: Tensor) -> Any:
        call: Any = compile_alone(attend_in_chunks(length - past, groups), inputs)
        (found,) = call(*inputs)
        return found

    assert error_of(run, batch, length, past, codes, heads) < 5e-6


OF_THREADS = {
    **CASES,
    "heads that share their keys": (2, 500, 0, 4, [0, 3, 1, 0], [0, 1, 2, 3], [("all", 4)]),
    "fewer blocks than threads": (1, 290, 0, 8, [0, 3, 1, 2], [0, 1, 2, 3], [("all", 4)]),
}


OF_THREADS_IN_CI = ("one table", "heads that share their keys")


@pytest.mark.inductor
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[] if name in OF_THREADS_IN_CI else [pytest.mark.nightly])
        for name in OF_THREADS
    ],
)
def test_threads_change_nothing(case: str) -> None:
    batch, length, past, threads, codes, heads, groups = OF_THREADS[case]

    def run(*inputs: Tensor) -> Any:
        call: Any = compile_alone(attend_in_chunks(length - past, groups, threads), inputs)
        (found,) = call(*inputs)
        return found

    assert error_of(run, batch, length, past, codes, heads) < 5e-6


@given(
    batch=st.integers(1, 2),
    length=st.integers(150, 400),
    at=st.floats(0, 1),
    threads=st.integers(2, 6),
    codes=st.lists(st.integers(0, 3), min_size=HEADS, max_size=HEADS),
    heads=st.permutations(range(HEADS)),
    kind=st.sampled_from(["all", "mixed"]),
)
def test_any_number_of_threads_changes_nothing(
    batch: int,
    length: int,
    at: float,
    threads: int,
    codes: list[int],
    heads: list[int],
    kind: str,
) -> None:
    past = int(at * (length - 150))
    heads = list(range(HEADS)) if kind == "all" else heads
    run = attend_in_chunks(length - past, [(kind, HEADS)], threads)
    assert error_of(run, batch, length, past, codes, heads) < 5e-6


@pytest.mark.parametrize("num_threads", [2, 5, 16, 32])
@pytest.mark.parametrize("num_dense", [1, 7])
def test_threads_work_alike(num_threads: int, num_dense: int) -> None:
    num_heads, num_images, image = 28, 60, 272
    size = num_images * image
    span_id = torch.arange(1, num_images + 1, dtype=torch.int32).repeat_interleave(image)[None]
    span_id[torch.arange(size)[None] % image < 16] = 0
    is_sink = (span_id > 0) & (span_id != torch.roll(span_id, 1))
    codes = torch.tensor([0] * num_dense + [1, 2, 3] * 9, dtype=torch.int32)[:num_heads]
    given: list[BlockTables] = []

    def flex(query: Tensor, key: Tensor, value: Tensor, tables: BlockTables, *_: Any) -> Tensor:
        given.append(tables)
        return query

    mask = sorted_mask(
        CAUSAL, span_id, is_sink, batch=1, num_queries=size, num_keys=size, num_threads=num_threads
    )
    query, key = (torch.zeros(1, heads, size, 1) for heads in (num_heads, 4))
    with mock.patch.object(chunks, "flex_attention", flex):
        heads = torch.arange(num_heads)
        attend(query, key, key, mask, heads, codes, [("all", num_heads)])
    ((num_partial, _, num_full, _),) = given
    work = (num_partial + num_full).sum((1, 2))  # a thread takes a row of the call's batch
    assert len(work) == num_threads
    assert work.max() < 1.1 * work.double().mean()


def test_how_many_chunks_there_are() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    size = ShapeEnv().create_unbacked_symint()
    assert num_chunks_of(cpu, 100_000, 64) == num_chunks_of(cpu, size, 64, 8) == 1
    assert [num_chunks_of(cpu, n, 64, 2) for n in (1, 15, 16, 100_000)] == [1, 1, 2, 2]
    sizes = (100, 2_000, 8_000, 16_000)
    assert [num_chunks_of(cpu, n, 64, 56) for n in sizes] == [1, 8, 28, 56]
    assert num_chunks_of(cuda, size, 128) == 8
    sizes = (1, 2047, 2048, 4095, 4096, 8191, 8192, 300_000)
    assert [num_chunks_of(cuda, n, 128) for n in sizes] == [1, 1, 2, 2, 4, 4, 8, 8]
