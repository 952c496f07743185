"""Prompts of many lengths in one compiled graph."""

import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.functional import scaled_dot_product_attention
from transformers import StaticCache

import blindsight
from blindsight import Profile, blindsight_backend
from blindsight.attention.interval_masks import causal_base
from blindsight.attention.intervals import allowed_sorted, sorted_bounds, stretched
from blindsight.runtime.any_length import SymbolicSizes, capacity_of, is_symbol
from blindsight.runtime.sizes import compiled_sizes
from models import (
    END_ID,
    FAMILIES,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    make_inputs,
    recompiles_per_image,
    split_turns,
    tiny_model,
    valid_positions,
    without_vision,
)
from oracles import assert_close_to_reference, oracle_template, reference_copy, run_reference
from test_exactness import case_of, run_in_chunks

NIGHTLY = [pytest.mark.nightly, pytest.mark.inductor]
CPU = torch.device("cpu")
MIXED = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counting:
    """An inner backend that counts the graphs with attention that it compiles."""

    def __init__(self, inner: str) -> None:
        self.compile = blindsight.runtime.inner.Inner(inner, {})
        self.sparse = self.dense = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        self.dense += any(node.target is scaled_dot_product_attention for node in gm.graph.nodes)
        self.sparse += any(name.startswith("blindsight") for name in names)
        return self.compile(gm, example_inputs)


def prompts(family: str) -> list[dict[str, Tensor]]:
    """Prompts of various lengths and numbers of images; the last is of the first one's length."""
    layouts: list[list[Any]] = [
        [5, Image(2, 5), 4, Image(4, 3), 7],
        [3, Image(2, 2), 9, Image(4, 3), Image(2, 6), 1],
        [1, Image(6, 6), 2, Image(2, 2), 30],
        [12, Image(), Image(), Image(2, 3), 3, Image(3, 3), 3],
        [40, Image(2, 7), 1, Image(8, 8), 33, Image(5, 5), 3],
        [5, Image(4, 3), 4, Image(2, 5), 7],
    ]
    if family == "gemma3":  # its images are all alike
        layouts = [[x if isinstance(x, int) else Image() for x in layout] for layout in layouts]
    return [
        make_inputs(family, [layout], seed=seed, attention_mask=family != "gemma3")
        for seed, layout in enumerate(layouts)
    ]


@cache
def references(family: str) -> tuple[Any, Any]:
    """A model that nobody compiles, and one in float64."""
    model = tiny_model(family, num_layers=2)
    return model, reference_copy(model)


def check(family: str, profile: Profile, inputs: dict[str, Tensor], logits: Tensor) -> None:
    template = oracle_template(inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,))
    expected = [
        run_reference(model, profile.categories, *template, inputs, use_cache=False).logits
        for model in references(family)
    ]
    assert_close_to_reference(logits, *expected, valid_positions(inputs))


def skip_where_each_number_of_images_compiles(model: Any) -> None:
    if recompiles_per_image(model):
        pytest.skip("Dynamo compiles the frames of these transformers per number of images")


@pytest.mark.parametrize(
    ("family", "inner", "lowering"),
    [
        pytest.param("qwen2_vl", "aot_eager", "fused", marks=pytest.mark.nightly),
        pytest.param("qwen2_5_vl", "aot_eager", "split", marks=pytest.mark.nightly),
        ("gemma3", "aot_eager", "fused"),
    ],
)
def test_the_second_length_is_the_last_to_be_compiled(
    family: str, inner: str, lowering: str
) -> None:
    model = tiny_model(family, num_layers=2)
    if family != "gemma3":
        skip_where_each_number_of_images_compiles(model)
    without_vision(model)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting(inner)
    backend = blindsight_backend(profile, inner=counting, lowering=lowering)
    compiled = torch.compile(model, backend=backend)
    counts = []
    for inputs in prompts(family):
        check(family, profile, inputs, compiled(**inputs, use_cache=False).logits)
        counts.append(counting.sparse)
    assert counts == [1, 2, 2, 2, 2, 2]
    assert {how for row in backend.report().rows for how in row.runs if "dense" in how} == set()


def test_where_any_number_will_do_short_prompts_share_the_graph_of_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, where few tokens have a graph of their own only if they come first."""
    for module in ("any_length", "rewriting"):
        monkeypatch.setattr(
            f"blindsight.runtime.{module}.takes_any_number", lambda size, device: is_symbol(size)
        )
    monkeypatch.setattr("blindsight.runtime.any_length._MIN_CAPACITY", 100)
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    skip_where_each_number_of_images_compiles(model)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting("aot_eager")
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    compiled = torch.compile(model, backend=backend)
    first, block, few, _, many, _ = prompts("qwen2_5_vl")
    lengths, counts = [], []
    for inputs in (first, many, few, block, many):
        lengths.append(inputs["input_ids"].shape[1])
        with torch._dynamo.config.patch(recompile_limit=64):  # of frames around the vision tower
            logits = compiled(**inputs, use_cache=False).logits
        check("qwen2_5_vl", profile, inputs, logits)
        counts.append(counting.sparse)
    assert lengths[3] <= 64 < lengths[2] < 100 < lengths[1]
    assert counts == [1, 2, 2, 3, 3]  # a single block is not as several are


def test_masks_that_come_ready_made_are_for_any_length() -> None:
    """Qwen3-VL's layers are compiled one by one, and are handed the mask of the model."""
    model = tiny_model("qwen3_vl", num_layers=2)
    skip_where_each_number_of_images_compiles(model)
    without_vision(model)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting("aot_eager")
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    compiled = torch.compile(model, backend=backend)
    counts = []
    for inputs in prompts("qwen3_vl")[:4]:
        check("qwen3_vl", profile, inputs, compiled(**inputs, use_cache=False).logits)
        counts.append(counting.sparse)
    assert counts == [1, 2, 2, 2]
    rows = [row for row in backend.report().rows if row.runs]
    assert {row.tier for row in rows} == {3}
    assert {how for row in rows for how in row.runs} == {
        "sparse, ordered, fused",  # the first, of a fixed length
        "sparse, sorted, fused",
    }


def conversations(family: str) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Prompts, and where their second turns begin, with an image in either."""
    for extra in (0, 3, 11):
        images = [Image(2, 5), Image(4, 3), Image(2, 2 + 2 * extra)]
        if family == "gemma3":
            images = [Image()] * 3
        row: list[Any] = [5 + extra, images[0], 4, images[1], 7, images[2], 3 + 2 * extra]
        inputs = make_inputs(family, [row], seed=extra, attention_mask=family != "qwen2_5_vl")
        yield inputs, inputs["input_ids"].shape[1] - images[2].num_tokens - row[-1] - 4


@pytest.mark.parametrize(
    ("family", "cache", "inner", "counts"),
    [
        pytest.param("qwen2_5_vl", "dynamic", "eager", [2, 4, 4], marks=NIGHTLY),
        ("gemma3", "dynamic", "eager", [2, 4, 4]),  # one layer slides
        # of a static cache the second turn is not compiled again: past tokens are no size of it
        ("qwen2_5_vl", "static", "eager", [2, 3, 3]),
        pytest.param("gemma3", "static", "eager", [2, 3, 3], marks=NIGHTLY),
        # each layer for itself
        pytest.param("qwen3_vl", "dynamic", "eager", [4, 8, 8], marks=pytest.mark.nightly),
        pytest.param("qwen2_5_vl", "dynamic", "inductor", [2, 4, 4], marks=NIGHTLY),
        pytest.param("gemma3", "dynamic", "inductor", [2, 4, 4], marks=NIGHTLY),
        pytest.param("gemma3", "static", "inductor", [2, 3, 3], marks=NIGHTLY),
    ],
)
def test_the_second_conversation_is_the_last_to_be_compiled(
    family: str, cache: str, inner: str, counts: list[int]
) -> None:
    model = tiny_model(family, num_layers=2)
    if family != "gemma3":
        skip_where_each_number_of_images_compiles(model)
    without_vision(model)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting(inner)
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    compiled = torch.compile(model, backend=backend)
    config = model.config.get_text_config()
    found = []
    for inputs, split in conversations(family):
        made = StaticCache(config=config, max_cache_len=256) if cache == "static" else None
        first, second = split_turns(model, inputs, split)
        output = compiled(**first, past_key_values=made, use_cache=True)
        logits = [output.logits]
        output = compiled(**second, past_key_values=output.past_key_values, use_cache=True)
        check(family, profile, inputs, torch.cat([*logits, output.logits], dim=1))
        found.append(counting.sparse)
    assert found == counts
    assert "dense" not in str([row.runs for row in backend.report().rows])


@pytest.mark.nightly
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("pad_side", [None, "left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
@torch._dynamo.config.patch(recompile_limit=256)  # frames of models ask for many, with numbers
def test_random_conversations(
    family: str, cache: str, pad_side: str | None, dynamic: bool | None
) -> None:
    """Of one or two rows, which differ in the padding alone."""
    model = without_vision(tiny_model(family, num_layers=2))
    profile = Profile.for_model(model, [MIXED, MIXED[::-1]])
    backend = blindsight_backend(profile, inner="aot_eager", lowering="fused")
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    config = model.config.get_text_config()
    for seed in range(6):
        draw = random.Random(seed)

        def piece(draw: random.Random = draw) -> list[Any]:
            size = (2, 2) if family == "gemma3" else (draw.randint(1, 4), draw.randint(2, 5))
            return [draw.randint(2, 9), Image(*size)]

        first, second = ([x for _ in range(draw.randint(1, 3)) for x in piece()] for _ in "ab")
        rows = [[*first, *second, 4]]
        if pad_side is not None:
            rows.append([1, *first[1:], *second, 4] if pad_side == "left" else [*first, *second, 1])
        inputs = make_inputs(family, rows, seed=seed, pad_side=pad_side)
        split = sum(x if isinstance(x, int) else x.num_tokens for x in first)
        made = StaticCache(config=config, max_cache_len=192) if cache == "static" else None
        logits = []
        for turn in split_turns(model, inputs, split):
            output = compiled(**turn, past_key_values=made, use_cache=True)
            made = output.past_key_values
            logits.append(output.logits)
        check(family, profile, inputs, torch.cat(logits, dim=1))


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.nightly)])
def test_chunks_of_one_length_share_a_graph(cache: str) -> None:
    """As servers cut long prompts: the queries are fixed, and the keys grow; or are fixed, too."""
    case = case_of("qwen2_5_vl", torch.float32, "long")
    config = case.model.config.get_text_config()
    made = StaticCache(config=config, max_cache_len=320) if cache == "static" else None
    counting = Counting("aot_eager")
    backend = blindsight_backend(case.profile, inner=counting, lowering="fused")
    logits, counts = [], []
    edges = [*range(0, case.num_tokens, 12), case.num_tokens]
    for chunk in run_in_chunks(case, backend, edges, made):
        logits.append(chunk)
        counts.append(counting.sparse)
    case.check(torch.cat(logits, dim=1))
    assert set(counts) == {0, 1}  # nothing of the first image's chunks is sparse


def test_a_graph_that_dynamo_traces_again_is_reported_once() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    profile = Profile.for_model(model, [MIXED] * 2)
    tries = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        tries.append(gm)
        if len(tries) == 1:  # as Inductor does to have a number fixed
            raise TensorifyScalarRestartAnalysis(restart_reason="the test's")
        return gm.forward

    backend = blindsight_backend(profile, inner=inner, model=model, lowering="fused")
    model.model.language_model.compile(backend=backend, dynamic=True)
    inputs = prompts("qwen2_5_vl")[0]
    logits = model(**inputs, use_cache=False).logits
    check("qwen2_5_vl", profile, inputs, logits)
    assert len(tries) == 3  # the last is sparse
    assert [row.layer for row in backend.report().rows] == [0, 1]


@pytest.mark.inductor
def test_one_kernel_for_many_lengths() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting("inductor")
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    model.model.language_model.compile(backend=backend, dynamic=True)
    for inputs in prompts("qwen2_5_vl"):
        logits = model(**inputs, use_cache=False).logits
        check("qwen2_5_vl", profile, inputs, logits)
    assert counting.sparse == 1


def test_after_a_warmup_no_attention_is_compiled() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    skip_where_each_number_of_images_compiles(model)
    without_vision(model)
    profile = Profile.for_model(model, [MIXED] * 2)
    counting = Counting("eager")
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    compiled = torch.compile(model, backend=backend)
    several = prompts("qwen2_5_vl")
    backend.warmup(compiled, {**several[0], "use_cache": False}, [60, 64, 70])
    assert (counting.sparse, counting.dense) == (2, 2)  # for the first length, and for all
    for inputs in several[1:]:
        check("qwen2_5_vl", profile, inputs, compiled(**inputs, use_cache=False).logits)
        with blindsight.disabled():
            compiled(**inputs, use_cache=False)
    assert (counting.sparse, counting.dense) == (2, 2)


def test_after_a_warmup_generate_compiles_nothing() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    backend = blindsight_backend(
        Profile.for_model(model, [MIXED] * 2), inner="eager", lowering="fused"
    )
    torch._dynamo.reset()
    model.model.language_model.compile(backend=backend)
    several = prompts("qwen2_5_vl")
    backend.warmup(model, several[0], [60, 64], generate=True)
    before = backend._num_graphs
    for inputs in several[1:4]:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert backend._num_graphs == before


def test_one_length_may_be_an_int() -> None:
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    backend = blindsight_backend(Profile.for_model(model, [MIXED] * 2), inner="eager")
    inputs = {**prompts("qwen2_5_vl")[0], "use_cache": False}
    backend.warmup(torch.compile(model, backend=backend), inputs, 64)
    assert {row.runs.total() for row in backend.report().rows} == {2}


@pytest.mark.parametrize(
    ("change", "lengths", "message"),
    [
        ({"input_ids": None}, [64], "input_ids"),
        ({}, [], "at least the"),
        ({}, [10, 64], "at least the"),
        ({}, 10, r"at least the .* got \[10\]"),
        ({"input_ids": torch.tensor([[20, 21, 22]])}, [64], "at least two images, got 0"),
        (
            {"input_ids": torch.tensor([[START_ID, IMAGE_ID, END_ID] * 2])},
            [64],
            "a prompt with text",
        ),
    ],
)
def test_a_warmup_with_a_prompt_that_does_not_do(change: Any, lengths: Any, message: str) -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    backend = blindsight_backend(Profile.for_model(model, [MIXED] * 2), inner="eager")
    with pytest.raises(ValueError, match=message):
        backend.warmup(model, {**prompts("qwen2_5_vl")[0], **change}, lengths)


def test_sizes_are_functions_of_what_the_inputs_are_by_now() -> None:
    first, second = sympy.symbols("s0 s1", integer=True)
    inputs = [sympy.Integer(15), first, 2 * second]  # one became a number, one is composed
    plain = [3 * first + 1, first + 2 * second, 5]
    assert compiled_sizes(plain, inputs)(15, 7, 8) == [22, 15, 5]
    assert compiled_sizes([*plain, sympy.Max(first, 9)], inputs)(15, 7, 8) == [22, 15, 5, 9]


@pytest.mark.parametrize("length", [2, 17, 64, 100])
def test_what_is_beyond_the_last_token_sees_and_shows_nothing(length: int) -> None:
    span_id = (torch.arange(length)[None] // 7 % 3).to(torch.int32).cummax(1).values
    is_sink = torch.zeros_like(span_id, dtype=torch.bool)
    base = causal_base(1, length, length, length)
    bounds, order = sorted_bounds(base, span_id, is_sink, length, length)
    wide, wide_order = stretched(bounds, order, 100, 100)
    q, k = torch.arange(100)[:, None], torch.arange(100)
    codes, b = torch.arange(4, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    for head in range(4):
        h = torch.tensor(head)
        allowed = allowed_sorted(b, h, q, k, codes, *wide.rows())
        expected = allowed_sorted(b, h, q[:length], k[:length], codes, *bounds.rows())
        assert torch.equal(allowed[:length, :length], expected)
        assert not allowed[length:].any() and not allowed[:, length:].any()
    assert torch.equal(wide_order.query[:, :length], order.query)
    assert wide_order.query.shape == wide_order.key.shape == (1, 100)
    assert wide_order.query.max() < length


def test_new_symbols_are_not_mistaken_for_those_of_dynamo() -> None:
    """Both are named by numbers that are drawn from a hundred."""
    env, values = ShapeEnv(), range(10, 50)
    sources = [ConstantSource(f"size{value}") for value in values]
    symbols = [
        env.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
        for value, source in zip(values, sources, strict=True)
    ]
    traced = [
        env.create_symintnode(symbol, hint=value)
        for symbol, value in zip(symbols, values, strict=True)
    ]
    new = SymbolicSizes(dict(zip(symbols, values, strict=True)), fixed={symbols[0]}, num_tokens=7)
    fixed, *found = map(new.size, traced)
    assert fixed == values[0]
    assert len({size.node.expr for size in found}) == len(found)
    by_name = dict(zip(map(str, symbols), values, strict=True))
    clashes = [size for size in found if by_name.get(str(size.node.expr), size) != size]
    assert clashes, "no name is shared, so this shows nothing"
    pairs = itertools.pairwise(zip(traced[1:], found, strict=True))
    for (size, its_new), (other, others_new) in pairs:
        assert new.size(size * other + 1).node.expr == (its_new * others_new + 1).node.expr


def test_capacities_are_few() -> None:
    env = ShapeEnv()
    symbol = env.create_symbol(9, ConstantSource("size"), dynamic_dim=DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=9)
    of_cpu = {n: capacity_of(n, size, CPU) for n in range(1, 16385)}
    assert set(of_cpu.values()) == {1024, 2048, 4096, 8192, 16384}
    assert all(capacity >= n for n, capacity in of_cpu.items())
    cuda = torch.device("cuda")
    lengths = (2, 1024, 1025, 300_000)
    assert [capacity_of(n, size, cuda) for n in lengths] == [1024, 1024, None, None]
    composed = [capacity_of(n, size + 1, cuda) for n in lengths]
    assert composed == [1024, 1024, 2048, 2**19]
    assert [capacity_of(n, 7, device) for n in lengths for device in (CPU, cuda)] == [None] * 8


def test_a_warmup_of_a_model_that_is_not_compiled() -> None:
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    backend = blindsight_backend(Profile.for_model(model, [MIXED] * 2), inner="eager")
    with pytest.raises(ValueError, match=r"must be what is compiled.*torch\.compile returned"):
        backend.warmup(model, {**prompts("qwen2_5_vl")[0], "use_cache": False}, [64])


def test_a_warmup_of_a_generate_that_is_not_compiled() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=2)
    backend = blindsight_backend(Profile.for_model(model, [MIXED] * 2), inner="eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.raises(ValueError, match=r"generate\(\) of what torch\.compile returns"):
        backend.warmup(compiled, prompts("qwen2_5_vl")[0], 64, generate=True)
    with pytest.raises(ValueError, match=r"model must have generate\(\) .*got Qwen2_5_VLModel"):
        backend.warmup(model.model, prompts("qwen2_5_vl")[0], 64, generate=True)
