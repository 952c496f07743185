"""How heads are grouped, and what is chosen for a prompt; test_exactness shows it exact."""

import json
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blindsight import Profile, TemplateRule, blindsight_backend, tune
from blindsight.attention.attend import attend
from blindsight.attention.interval_masks import BaseMask, causal_base
from blindsight.attention.lowering import (
    Layout,
    Lowering,
    causal_layout,
    fused_layout,
    split_layout,
)
from blindsight.attention.mask_forms import MaskForm, sorted_mask
from blindsight.runtime.choose import Choice, ChoosableCall, Device, Fastest, choose_layouts
from blindsight.runtime.cost_model import (
    CallSize,
    Costs,
    cache_file,
    causal_skew,
    costs_of,
    device_name,
    save_costs,
    time_of_groups,
    time_of_own,
)
from blindsight.runtime.data_check import means_is_causal
from blindsight.runtime.history import ExplicitHistory, History
from blindsight.template import Template
from blindsight.timer import Timer
from blindsight.tune import measure_costs
from models import Image, make_inputs, tiny_model, without_vision
from oracles import oracle_attention, oracle_keep

CPU = torch.device("cpu")
COSTS = Costs(causal=4.0, masked=4.0, flex=6.0, move=0.4, call=2e5)

codes = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def prompt(num_images: int, image: int, text: int) -> History:
    ids = [i for n in range(1, num_images + 1) for i in [0] * text + [n] * image]
    span_id = torch.tensor([ids + [0] * 64], dtype=torch.int32)
    is_sink = (span_id > 0) & (span_id != span_id.roll(1, 1))
    rule = TemplateRule(
        image_token_ids=(1,),
    )
    return ExplicitHistory(rule, Template(span_id, is_sink))


def call_of(
    history: History,
    categories: list[int],
    *,
    is_masked: bool = True,
    form: MaskForm = MaskForm.SORTED,
) -> ChoosableCall:
    tokens = history.num_tokens
    size = CallSize(8, 2, 128, 1, tokens, tokens, tokens, tokens, is_masked)
    return ChoosableCall(tuple(categories), form, True, size)


# Layouts


@given(codes=codes, num_threads=st.integers(1, 4))
def test_a_fused_layout_has_every_head_once(codes: list[int], num_threads: int) -> None:
    layout = fused_layout(codes, num_threads)
    assert sorted(layout.heads) == list(range(len(codes)))
    ((kind, size),) = layout.groups
    assert size == len(codes)
    if kind == "all":
        assert layout.heads == tuple(range(len(codes)))


@given(num_dense=st.integers(0, 8), num_threads=st.sampled_from([2, 4, 8]))
def test_each_thread_gets_as_many_dense_heads(num_dense: int, num_threads: int) -> None:
    categories = [0] * num_dense + [3] * (16 - num_dense)
    heads = fused_layout(categories, num_threads).heads
    each = 16 // num_threads
    dense = [
        sum(categories[head] == 0 for head in heads[at : at + each]) for at in range(0, 16, each)
    ]
    if num_dense > 0:
        assert max(dense) - min(dense) <= 1


def categories_of_groups(codes: list[int], layout: Layout) -> list[tuple[str, set[int]]]:
    assert sorted(layout.heads) == list(range(len(codes)))
    assert sum(size for _, size in layout.groups) == len(codes)
    heads = iter(layout.heads)
    return [(kind, {codes[head] for head in islice(heads, size)}) for kind, size in layout.groups]


@given(codes=codes, num_threads=st.integers(1, 4), is_causal=st.booleans())
def test_a_split_layout_has_its_dense_heads_apart(
    codes: list[int], num_threads: int, is_causal: bool
) -> None:
    layout = split_layout(codes, num_threads, is_causal=is_causal)
    groups = categories_of_groups(codes, layout)
    if not is_causal or 0 not in codes:
        assert layout == fused_layout(codes, num_threads)
        return
    assert groups[0] == ("causal", {0}) and layout.groups[0][1] == codes.count(0)
    for kind, categories in groups[1:]:
        assert kind == ("alike" if len(categories) == 1 else "mixed") and 0 not in categories
    assert len(groups) == (2 if any(codes) else 1)


@given(codes=codes, is_causal=st.booleans())
def test_a_layout_per_category_has_a_group_for_each(codes: list[int], is_causal: bool) -> None:
    layout = split_layout(codes, is_causal=is_causal, per_category=True)
    groups = categories_of_groups(codes, layout)
    assert len(groups) == len(set(codes))
    for kind, categories in groups:
        assert len(categories) == 1
        assert kind == ("causal" if categories == {0} and is_causal else "alike")


@given(data=st.data())
def test_any_grouping_gives_each_head_its_own_attention(data: st.DataObject) -> None:
    history = prompt(3, 5, 4)
    span_id, is_sink = history.template.tensors()
    length = history.num_tokens
    mixed = st.lists(st.integers(0, 3), min_size=6, max_size=6)
    categories = data.draw(st.one_of(mixed, st.just([0] * 6)))
    layout = data.draw(
        st.sampled_from(
            [
                fused_layout(categories),
                fused_layout(categories, 2),
                fused_layout(categories, 4),
                split_layout(categories, is_causal=True),
                split_layout(categories, 2, is_causal=True),
                split_layout(categories, is_causal=True, per_category=True),
                split_layout(categories, is_causal=False, per_category=True),
            ]
        )
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(1, 6, length, 8, dtype=torch.float64)
    key, value = (torch.randn(1, 2, length, 8, dtype=torch.float64) for _ in range(2))
    causal = ("upper", ("index", "q"))
    mask = sorted_mask(causal, span_id, is_sink, batch=1, num_queries=length, num_keys=length)
    heads = torch.tensor(layout.heads)
    found = attend(
        query,
        key,
        value,
        mask,
        heads,
        torch.tensor(categories, dtype=torch.int32)[heads],
        layout.groups,
    )
    keep = torch.stack([oracle_keep(span_id, is_sink, code) for code in categories], dim=1)
    allowed = keep & torch.ones(length, length, dtype=torch.bool).tril()
    expected = oracle_attention(query, key, value, allowed, 8**-0.5)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


# What is_causal means


def test_plain_causal_is_only_that() -> None:
    base = causal_base(2, 9, 9, 9)
    assert means_is_causal(base)
    assert means_is_causal(BaseMask(*base[:2], torch.ones(2, 12, dtype=torch.bool)))
    window, ahead, padded = base.lower.clone(), base.upper.clone(), base.valid.clone()
    window[1, 8], ahead[0, 3], padded[1, 0] = 1, 4, False
    assert not means_is_causal(base._replace(lower=window))
    assert not means_is_causal(base._replace(upper=ahead))
    assert not means_is_causal(base._replace(valid=padded))
    assert not means_is_causal(BaseMask(base.lower, base.upper + 2, base.valid))  # past tokens
    assert not means_is_causal(BaseMask(*base[:2], torch.ones(2, 8, dtype=torch.bool)))


# Choices


def choose(history: History, categories: list[int], lowering: str, **options: Any) -> Any:
    choice = choose_layouts(
        [call_of(history, categories, **options)],
        history,
        lowering=Lowering.of(lowering),
        device=Device(COSTS, block_size=128, num_threads=2),
    )
    of_dense = {Fastest.CAUSAL: (causal_layout(len(categories)),), Fastest.OWN_GRAPH: None}
    return of_dense.get(choice.fastest, choice.layouts)


def test_a_lowering_that_is_asked_for_is_taken() -> None:
    history = prompt(2, 5, 5)
    mixed = [0, 0, 1, 1, 2, 2, 3, 3]
    assert choose(history, mixed, "fused") == (fused_layout(mixed),)
    assert choose(history, mixed, "split") == (split_layout(mixed, is_causal=True),)
    # Whole heads are dealt out to the threads, two here, where tokens stay where they are.
    form = MaskForm.ORDERED
    assert choose(history, mixed, "fused", form=form) == (fused_layout(mixed, 2),)
    assert choose(history, mixed, "split", form=form) == (split_layout(mixed, 2, is_causal=True),)


@pytest.mark.parametrize("lowering", ["fused", "split", "auto"])
def test_a_dense_layer_stays_on_the_dense_kernel(lowering: str) -> None:
    (layout,) = choose(prompt(30, 256, 16), [0] * 8, lowering)
    assert layout.groups == (("causal", 8),)


def test_short_prompts_run_dense_and_long_ones_sparse() -> None:
    mixed = [0, 0, 1, 1, 2, 2, 3, 3]
    assert choose(prompt(2, 40, 5), mixed, "auto") is None
    assert choose(prompt(30, 256, 16), mixed, "auto") is not None
    # against a dense call without a mask there is less to gain
    short = prompt(4, 256, 16)
    assert choose(short, mixed, "auto") is not None
    assert choose(short, mixed, "auto", is_masked=False) is None


def test_dense_prompts_need_no_mask_where_it_is_plain_causal() -> None:
    """A mask that the model builds costs all pairs, and ``is_causal`` half of them."""
    history = prompt(2, 400, 5)

    def choose_with(costs: Costs, *calls: ChoosableCall) -> Choice:
        device = Device(costs, block_size=128, num_threads=1)
        return choose_layouts(calls, history, lowering=Lowering.AUTO, device=device)

    call = call_of(history, [0, 0, 1, 1, 2, 2, 3, 3])
    slow = replace(COSTS, flex=1000.0, call=10.0)
    choice = choose_with(slow, call)
    assert choice.fastest is Fastest.CAUSAL
    assert "ms with is_causal" in choice.reasons[0]
    # Of a call that has no mask, or another one, and where it would save too little.
    unmasked = replace(call, size=replace(call.size, is_masked=False))
    other = replace(call, is_causal=False)
    for own in ([unmasked], [other], [call, other]):
        assert choose_with(slow, *own).fastest is Fastest.OWN_GRAPH
    large = replace(slow, call=1e9)
    assert choose_with(large, call).fastest is Fastest.OWN_GRAPH
    # Sparse must beat the better of both.
    between = replace(COSTS, call=10.0, flex=1.1 * COSTS.causal, move=0.0)
    found = [choose_with(between, each).fastest for each in (unmasked, call, other)]
    assert found == [Fastest.OWN_GRAPH, Fastest.CAUSAL, Fastest.SPARSE]


def test_tables_per_head_do_not_grow_beyond_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    history = prompt(30, 256, 16)
    for_fused = replace(COSTS, move=0.0, causal=2 * COSTS.flex)
    call = call_of(history, [0, 1, 2, 3] * 2)
    device = Device(for_fused, block_size=128, num_threads=1)
    auto: dict[str, Any] = {"lowering": Lowering.AUTO, "device": device}
    choice = choose_layouts([call], history, **auto)
    assert choice.layouts[0].name == "fused" and "fused" in choice.reasons[0]
    blocks = -(-history.num_tokens // 128)
    table_bytes = 2 * 8 * blocks * blocks * 4
    monkeypatch.setattr("blindsight.runtime.choose.MAX_TABLE_BYTES", table_bytes)
    assert choose_layouts([call], history, **auto).layouts == choice.layouts
    monkeypatch.setattr("blindsight.runtime.choose.MAX_TABLE_BYTES", table_bytes - 1)
    choice = choose_layouts([call], history, **auto)
    assert choice.layouts[0].groups == (("causal", 2), ("mixed", 6))
    assert "too large" in choice.reasons[0]
    monkeypatch.setattr("blindsight.runtime.choose.MAX_TABLE_BYTES", table_bytes // 2)
    choice = choose_layouts([call], history, **auto)
    assert choice.layouts[0].groups == (("causal", 2), ("alike", 2), ("alike", 2), ("alike", 2))


def test_dense_heads_go_where_they_are_fastest() -> None:
    history = prompt(30, 256, 16)
    (layout,) = choose(history, [0, 0, 3, 3, 3, 3, 3, 3], "auto")
    assert layout.groups[0] == ("causal", 2)


def test_estimates_follow_from_what_is_computed() -> None:
    size = CallSize(8, 2, 64, 1, 1000, 1000, 1000, 1000, is_masked=True)
    assert time_of_own(COSTS, size) == pytest.approx(0.5 * 8 * 1e6 * 4.0)
    unmasked = replace(size, is_masked=False)
    assert time_of_own(COSTS, unmasked) == pytest.approx(0.5 * 8 * 0.5e6 * 4.0)
    groups = (("causal", 2), ("alike", 6))
    found = time_of_groups(
        COSTS, size, groups, [0, 0, 3, 3, 3, 3, 3, 3], [7, 7, 7, 10**5], is_sorted=True
    )
    moved = 0.4 * 64 * 2000 * (2 + 2 + 6 + 6)
    computed = 2e5 + 0.5 * (2 * 0.5e6 * 4.0 + 6 * 1e5 * 6.0)
    assert found == pytest.approx(moved + computed)
    # Rows up to what is compiled for are moved, and nothing else.
    filled = replace(size, query_rows=1024, key_rows=2048)
    found = time_of_groups(
        COSTS, filled, groups, [0, 0, 3, 3, 3, 3, 3, 3], [7, 7, 7, 10**5], is_sorted=True
    )
    assert found == pytest.approx(moved * 3072 / 2000 + computed)
    assert time_of_own(COSTS, filled) == time_of_own(COSTS, size)


@given(
    num_rows=st.integers(1, 12), num_queries=st.integers(1, 5000), num_threads=st.integers(1, 70)
)
def test_the_skew_of_causal_attention_is_that_of_its_blocks(
    num_rows: int, num_queries: int, num_threads: int
) -> None:
    block = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    work = [at + 1 for at in range(-(-num_queries // block))] * num_rows
    each = -(-len(work) // num_threads)
    threads = [sum(work[at : at + each]) for at in range(0, len(work), each)]
    expected = max(threads) * num_threads / sum(work)
    assert causal_skew(num_rows, num_queries, num_threads) == pytest.approx(expected)


def test_few_dense_heads_for_many_threads_are_faster_fused() -> None:
    history, mixed = prompt(30, 256, 16), [0, 0, 1, 2, 3, 1, 2, 3]

    def layout_on(num_threads: int) -> str:
        costs = replace(COSTS, flex=1.3 * COSTS.causal)
        device = Device(costs, block_size=64, num_threads=num_threads)
        calls = [call_of(history, mixed)]
        choice = choose_layouts(calls, history, lowering=Lowering.AUTO, device=device)
        return choice.layouts[0].name

    assert [layout_on(number) for number in (1, 2, 16)] == ["split", "split", "fused"]


def test_the_report_says_that_dense_was_faster() -> None:
    model = tiny_model("qwen2_5_vl")
    without_vision(model)
    inputs = make_inputs("qwen2_5_vl", [[5, Image(2, 5), 4, Image(4, 3), 7]])
    backend = blindsight_backend(Profile.for_model(model, "sink"), inner="eager")
    with torch.no_grad():
        logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
        expected = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, expected)
    (how,) = {how for row in backend.report().rows for how in row.runs}
    assert how == "dense: estimated to be faster than sparse"


def test_an_unknown_lowering_is_an_error() -> None:
    profile = Profile.for_model(tiny_model("qwen2_5_vl"), "sink")
    with pytest.raises(ValueError, match="'fused', 'split', 'auto', got 'unfused'"):
        blindsight_backend(profile, lowering="unfused")


# Costs of a device


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLINDSIGHT_COSTS", str(tmp_path / "cache" / "costs.json"))


def test_costs_are_kept_per_device_and_dtype() -> None:
    default = costs_of(CPU, torch.float32)
    assert default != COSTS
    assert save_costs(CPU, torch.float32, COSTS) == cache_file()
    other = Costs(1.0, 2.0, 3.0, 4.0, 5.0)
    # What was not measured is not taken for what was.
    assert costs_of(CPU, torch.bfloat16) not in (COSTS, default)
    save_costs(CPU, torch.bfloat16, other)
    assert costs_of(CPU, torch.float32) == COSTS
    assert costs_of(CPU, torch.bfloat16) == other
    assert list(json.loads(cache_file().read_text())) == [device_name(CPU)]
    assert [path.name for path in cache_file().parent.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("text", ["", "[1]", '{"cpu": {"float32": {"causal": 1}}}'])
def test_a_damaged_file_of_costs_is_an_error(text: str) -> None:
    cache_file().parent.mkdir()
    cache_file().write_text(text)
    with pytest.raises(ValueError, match=r"costs.json must hold .* Delete it"):
        costs_of(CPU, torch.float32)


@pytest.mark.inductor
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_costs_are_measured(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, too, where masks are timed apart: by this machine's clock, here."""

    class OfGpu(Timer):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.on_gpu = True

        def wait(self) -> None:
            pass

        def prepare(self, run: Any) -> Any:
            return lambda: 1e3 * self.seconds(run)

    if on_gpu:
        monkeypatch.setattr(tune, "Timer", OfGpu)
    steps: list[str] = []
    with torch.inference_mode():
        costs = measure_costs(CPU, torch.float32, num_tokens=1024, repeats=1, progress=steps.append)
    assert steps[-1] == "timing" and len(steps) == (7 if on_gpu else 4)
    assert ("compiling: sorted long, mask" in steps) == on_gpu
    # A pair takes nanoseconds, and a call at least as long as many of them.
    for name in ("causal", "masked", "flex"):
        assert 0.01 < getattr(costs, name) < 1000
    assert costs.move >= 0 and costs.call >= 0
