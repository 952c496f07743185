"""Decoders that nobody's library wrote: masks, heads and caches of their own making."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blindsight import BlindsightWarning, Profile, TemplateRule, blindsight_backend, use_template
from oracles import keep_of_call, oracle_attention, oracle_keep, oracle_template

IMAGE, START, END, TEXT = 90, 91, 92, 5
HEADS, DIM, LENGTH = 4, 8, 23
CATEGORIES = [[0, 1, 2, 3], [3, 0, 1, 2]]


def row_of(*sizes: int) -> list[int]:
    """Text and images, cut to the length."""
    ids = [TEXT]
    for size in sizes:
        ids += [START, *[IMAGE] * size, END, TEXT]
    return (ids + [TEXT] * LENGTH)[:LENGTH]


IDS = torch.tensor([row_of(3, 2, 4), row_of(2, 5, 3)])
BATCH = len(IDS)
POSITIONS = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


class Attention(nn.Module):
    """What an attention may do with heads and results; ``sdpa`` is the oracle in a reference."""

    num_key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(32, HEADS * DIM, bias=False)
        self.key = nn.Linear(32, self.num_key_heads * DIM, bias=False)
        self.value = nn.Linear(32, self.num_key_heads * DIM, bias=False)
        self.output = nn.Linear(HEADS * DIM, 32, bias=False)
        self.sdpa: Callable[..., Tensor] = F.scaled_dot_product_attention

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            project(states).view(*states.shape[:2], -1, DIM).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return self.joined(self.attend(query, key, value, mask))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return self.sdpa(query, key, value, attn_mask=mask, is_causal=mask is None)

    def joined(self, attended: Tensor) -> Tensor:
        return self.output(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.self_attn = attention


class Decoder(nn.Module):
    def __init__(self, kind: type[Attention], make_mask: Callable[..., Any], num_layers: int):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList(Layer(kind()) for _ in range(num_layers))
        self.make_mask = make_mask

    def forward(self, input_ids: Tensor, *data: Tensor) -> Tensor:
        states = self.embed(input_ids)
        mask = self.make_mask(*data)
        for layer in self.language_model.layers:
            states = states + layer.self_attn(states, mask)
        return states


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def profile_of(model: Decoder) -> Profile:
    layers = model.language_model.layers
    rule = TemplateRule(image_token_ids=(IMAGE,), start_token_ids=(START,), end_token_ids=(END,))
    shape = {
        "architecture": "own",
        "num_layers": str(len(layers)),
        "num_heads": str(HEADS),
        "num_kv_heads": str(layers[0].self_attn.num_key_heads),
        "head_dim": str(DIM),
        "layer_types": ",".join(["full_attention"] * len(layers)),
    }
    categories = torch.tensor(CATEGORIES[: len(layers)], dtype=torch.uint8)
    return Profile(categories, rule=rule, fingerprint=shape)


def reference_of(model: Decoder, profile: Profile, sequences: Tensor | None = None) -> Decoder:
    """A copy in fp64 whose attention is the oracle."""
    template = oracle_template(IDS, (IMAGE,), (START,), (END,))

    def sdpa(heads: Sequence[int]) -> Callable[..., Tensor]:
        keep = torch.stack([oracle_keep(*template, code, sequences) for code in heads], dim=1)

        def attend(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
            attn_mask, is_causal = given.get("attn_mask"), given.get("is_causal", False)
            num_queries, num_keys = query.shape[2], key.shape[2]
            allowed = torch.ones(num_queries, num_keys, dtype=torch.bool)
            allowed = allowed.tril() if is_causal else allowed
            allowed = allowed if attn_mask is None else attn_mask
            kept = torch.stack([keep_of_call(x, num_queries, num_keys) for x in keep.unbind(1)], 1)
            attended = oracle_attention(query, key, value, allowed & kept, DIM**-0.5)
            return attended.transpose(1, 2).contiguous().transpose(1, 2)

        return attend

    reference = copy.deepcopy(model).double()
    for layer, heads in zip(reference.language_model.layers, profile.categories, strict=True):
        layer.self_attn.sdpa = sdpa(heads.tolist())
    return reference


def check(
    make_mask: Callable[..., Any],
    *calls: tuple[Tensor, ...],
    kind: type[Attention] = Attention,
    num_layers: int = 1,
    lowering: str = "fused",
    dynamic: bool | None = None,
    sequences: Tensor | None = None,
    inner: str = "eager",
) -> None:
    """Compile once, and compare every call with the oracle and with the dense model."""
    torch.manual_seed(0)
    model = Decoder(kind, make_mask, num_layers).eval()
    profile = profile_of(model)
    backend = blindsight_backend(profile, inner=inner, lowering=lowering)
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    reference = reference_of(model, profile, sequences)
    for data in calls:
        expected = reference(IDS, *data)
        assert (expected - model(IDS, *data)).abs().max() > 1e-3
        torch.testing.assert_close(run(IDS, *data).double(), expected, atol=1e-5, rtol=0)
    runs = {how for row in backend.report().rows for how in row.runs}
    assert all(how.startswith("sparse") for how in runs), runs


def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of queries and of keys."""
    return values[:, None, :, None], values[:, None, None]


def same(values: Tensor) -> Tensor:
    query, key = pairs(values)
    return query == key


def causal() -> Tensor:
    place = torch.arange(LENGTH)
    return place <= place[:, None]


# What a proof rests on may not hold of the next prompt.


def padded_or_itself(padding: Tensor) -> Tensor:
    place = torch.arange(LENGTH)
    causal, itself = place <= place[:, None], place == place[:, None]
    return (causal & padding[:, None, None]) | itself


def up_to_its_position(positions: Tensor) -> Tensor:
    query, key = pairs(positions)
    return key <= query


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.filterwarnings("ignore:a mask is evaluated element by element")
def test_dense_heads_do_not_rest_on_what_does_not_hold(lowering: str) -> None:
    padding, shuffled = torch.ones(BATCH, LENGTH, dtype=torch.bool), POSITIONS.clone()
    holes = padding.clone()
    holes[:, 5:9] = False
    shuffled[:, 4:12] = shuffled[:, 4:12].flip(1)
    check(padded_or_itself, (padding,), (holes,), lowering=lowering)
    check(up_to_its_position, (POSITIONS,), (shuffled,), lowering=lowering)


@pytest.mark.filterwarnings("ignore:a mask is evaluated element by element")
@pytest.mark.parametrize(
    "begin", [lambda query: query - query % 4, lambda query: query - 4 - query // 8]
)
def test_positions_need_not_begin_at_zero(begin: Callable[[Tensor], Tensor]) -> None:
    def chunks(positions: Tensor) -> Tensor:
        query, key = pairs(positions)
        return (key <= query) & (key >= begin(query))

    check(chunks, (POSITIONS,), (POSITIONS + 2,))


def test_sequences_may_be_numbered_in_one_of_several_kinds_of_ids() -> None:
    ids = SEQUENCES.expand(3, -1, -1).contiguous()

    def packed(positions: Tensor, several: Tensor) -> Tensor:
        return up_to_its_position(positions) & same(several[1])

    check(packed, (POSITIONS, ids), sequences=ids[1])


def starts_again(positions: Tensor) -> Tensor:
    return F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))


SEQUENCES = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
SEQUENCES[0, 11:], SEQUENCES[1, 5:] = 1, 1  # between two images
PACKED = torch.where(SEQUENCES > 0, POSITIONS - torch.tensor([[11], [5]]), POSITIONS)
MARKS = F.one_hot(torch.tensor([11, 5]), LENGTH)
SPELLINGS_OF_SEQUENCES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "given": (lambda ids: ids + 1, SEQUENCES),
    "given, padding marked": (lambda ids: torch.where(ids >= 0, ids, -1), SEQUENCES),
    "where positions start again": (lambda x: starts_again(x).cumsum(-1), PACKED),
    "first positions": (lambda x: (x == 0).cumsum(-1) - 1, PACKED),
    "bounds": (
        lambda begins: torch.searchsorted(begins, POSITIONS, right=True),
        torch.tensor([[0, 11], [0, 5]]),
    ),
    "two marks a sequence": (
        lambda marks: (marks + marks.roll(1, 1)).cumsum(-1) // 2 + marks,
        MARKS,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS_OF_SEQUENCES)
def test_sequences_are_told_by_what_is_given_or_counted(name: str) -> None:
    number, data = SPELLINGS_OF_SEQUENCES[name]

    def packed(data: Tensor) -> Tensor:
        return causal() & same(number(data))

    check(packed, (data,), sequences=SEQUENCES)


def eighths(positions: Tensor) -> Tensor:
    return positions // 8


SPELLINGS_OF_CHUNKS: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": eighths,
    "divided, and counted from one": lambda x: eighths(x) + 1,
    "divided, padding marked": lambda x: torch.where(x >= 0, eighths(x), -1),
    "shifted": lambda x: x >> 3,
    "truncated": lambda x: torch.div(x, 8, rounding_mode="trunc"),
    "scaled": lambda x: (x * 0.125).long(),
    "masked": lambda x: x & ~7,
    "begins": lambda x: x - x % 8,
    "counted": lambda x: (x % 8 == 0).cumsum(-1),
    "by bounds": lambda x: torch.bucketize(x, torch.tensor([8, 16]), right=True),
}


@pytest.mark.parametrize("of_graph", [False, True])
@pytest.mark.parametrize("name", SPELLINGS_OF_CHUNKS)
def test_chunks_are_no_sequences(name: str, of_graph: bool) -> None:
    """The first image of each chunk is not free, whoever made the positions that are divided."""

    def chunked(positions: Tensor) -> Tensor:
        if of_graph:
            positions = torch.arange(LENGTH).expand(BATCH, -1)
        return causal() & same(SPELLINGS_OF_CHUNKS[name](positions))

    check(chunked, (POSITIONS,))


@pytest.mark.filterwarnings("ignore:a mask is read element by element")
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.uint8, torch.tensor(300)),  # which is 44 there
        (torch.uint8, torch.tensor(30)),
        (torch.uint8, torch.tensor(-1, dtype=torch.int8)),  # and this 255
        (torch.int32, torch.tensor(2**32 + 30)),
        (torch.int64, torch.tensor(30, dtype=torch.uint8)),
        (torch.float32, torch.tensor(5 + 1e-9, dtype=torch.float64)),
        (torch.bfloat16, torch.tensor(50.1)),
    ],
)
def test_what_is_compared_may_be_cast_to_something_narrower(
    dtype: torch.dtype, limit: Tensor
) -> None:
    values = torch.full((BATCH, LENGTH), 5)
    values[:, 8:14], values[:, 14:] = 50, 250

    def below(values: Tensor, limit: Tensor) -> Tensor:
        keys = values[:, None, None]
        return causal() & ((keys < limit) | (keys == 250))

    check(below, (values.to(dtype), limit))


# Masks that are shared, given, or made of what a layer computed.


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_layers_with_fewer_queries_have_masks_of_their_own(mask: str) -> None:
    class AllRows(Attention):
        def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
            return self.sdpa(query, key, value, attn_mask=mask)

    class LastRows(AllRows):
        def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
            attended = super().attend(query[:, :, -9:], key, value, mask)
            return F.pad(attended, (0, 0, LENGTH - 9, 0))

    torch.manual_seed(0)
    padding = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
    padding[..., :2] = False
    data = () if mask == "none" else (padding,)
    model = Decoder(AllRows, lambda *data: data[0] if data else None, 2).eval()
    model.language_model.layers[1] = Layer(LastRows())
    profile = profile_of(model)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    found = torch.compile(model, backend=backend, fullgraph=True)(IDS, *data)
    expected = reference_of(model, profile)(IDS, *data)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:a mask is read element by element")
def test_a_row_of_a_given_mask_is_not_all_of_it() -> None:
    given = (CAUSAL & (torch.arange(LENGTH) >= torch.tensor([[3], [0]]))[:, None])[:, None]
    check(lambda mask: mask[:1], (given,))
    check(lambda mask: mask[1:], (given,))


@pytest.mark.parametrize("under_template", [False, True])
def test_a_given_mask_is_looked_at_in_every_forward(under_template: bool) -> None:
    """What writes to it may not be counted: numpy, a CUDA graph, ``.data``."""
    given = CAUSAL.expand(BATCH, 1, LENGTH, LENGTH).contiguous()
    torch.manual_seed(0)
    model = Decoder(Attention, lambda mask: mask, 1).eval()
    profile = profile_of(model)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    run = torch.compile(model, backend=backend, fullgraph=True)
    template = oracle_template(IDS, (IMAGE,), (START,), (END,))
    with use_template(*template) if under_template else contextlib.nullcontext():
        for begin in (0, 4):
            given.data.copy_(CAUSAL & (torch.arange(LENGTH) >= begin))
            expected = reference_of(model, profile)(IDS.clone(), given)
            found = run(IDS.clone(), given)
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:a mask is evaluated element by element")
@pytest.mark.parametrize("lowering", ["fused", "split"])
def test_a_mask_may_depend_on_an_earlier_layer(lowering: str) -> None:
    class Pruning(Decoder):
        def forward(self, input_ids: Tensor, *data: Tensor) -> Tensor:
            first, second = (layer.self_attn for layer in self.language_model.layers)
            states = self.embed(input_ids)
            states = states + first(states, None)
            return states + second(states, padded_or_itself(states[:, :, 0] > data[0]))

    torch.manual_seed(0)
    model = Pruning(Attention, lambda: None, 2).eval()
    profile = profile_of(model)
    reference = reference_of(model, profile)
    backend = blindsight_backend(profile, inner="eager", lowering=lowering)
    run = torch.compile(model, backend=backend, fullgraph=True)
    for threshold in (-0.5, 0.0, 0.5):
        data = torch.tensor(threshold)
        torch.testing.assert_close(
            run(IDS, data).double(), reference(IDS, data.double()), atol=1e-5, rtol=0
        )


# Heads that are repeated.


def repeated(heads: Tensor, times: int) -> Tensor:
    batch, num_heads, length, dim = heads.shape
    expanded = heads[:, :, None].expand(batch, num_heads, times, length, dim)
    return expanded.reshape(batch, num_heads * times, length, dim)


class Shared(Attention):
    num_key_heads = 2


class WrittenAfter(Shared):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        keys, values = repeated(key, 2), repeated(value, 2)
        keys.mul_(0.5)
        return super().attend(query, keys, values, mask)


class PartWrittenAfter(Shared):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        keys, values = repeated(key, 2), repeated(value, 2)
        keys[..., 4:] = -keys[..., 4:]
        return super().attend(query, keys, values, mask)


class OriginalWrittenAfter(Shared):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        keys, values = repeated(key, 2), repeated(value, 2)
        key.zero_()
        value.zero_()
        return super().attend(query, keys, values, mask)


class ScaledAfter(Shared):
    """As rotary positions after the repeat."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        return super().attend(query, repeated(key, 2) * 0.5, repeated(value, 2), mask)


class KeysSharedAlone(Attention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        return super().attend(query, repeated(key[:, :1], HEADS), value, mask)


class Repeated(Shared):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        return super().attend(query, repeated(key, 2), repeated(value, 2), mask)


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.parametrize(
    "kind",
    [
        Repeated,
        WrittenAfter,
        PartWrittenAfter,
        OriginalWrittenAfter,
        ScaledAfter,
        KeysSharedAlone,
    ],
)
def test_repeated_heads(
    kind: type[Attention], lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # heads are dealt out to threads
    check(lambda: None, (), kind=kind, lowering=lowering)


# Queries and keys that are views of what projects them: there are no positions.


class OneKeyHead(Attention):
    num_key_heads = 1


class ProjectedByHead(Attention):
    """Projects to ``[B, H, L, D]`` at once, which a product with weights of each head gives."""

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            (states[:, None] @ project.weight.view(HEADS, DIM, 32).transpose(1, 2))
            for project in (self.query, self.key, self.value)
        )
        return self.joined(self.attend(query, key, value, mask))


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("kind", "num_layers"),
    [
        (OneKeyHead, 1),
        pytest.param(Attention, 2, marks=pytest.mark.nightly),  # a region
        pytest.param(ProjectedByHead, 1, marks=pytest.mark.nightly),
        pytest.param(ProjectedByHead, 2, marks=pytest.mark.nightly),
    ],
)
def test_layers_without_positions(kind: type[Attention], num_layers: int) -> None:
    check(lambda: None, (), kind=kind, num_layers=num_layers, inner="inductor")


# What Inductor has no kernels for.


@pytest.mark.parametrize(
    "strict",
    [True, pytest.param(False, marks=[pytest.mark.inductor, pytest.mark.nightly])],
)
def test_double_precision_on_a_cpu_is_an_error_of_inductor(strict: bool) -> None:
    model = Decoder(Attention, lambda: None, 1).eval().double()
    backend = blindsight_backend(profile_of(model), lowering="fused", strict=strict)
    run = torch.compile(model, backend=backend)
    problem = r"must be in float32, bfloat16 or float16, .* got torch.float64\. Load the model"
    if strict:
        with pytest.raises(ValueError, match=problem):
            run(IDS)
        return
    with pytest.warns(BlindsightWarning, match=problem):
        found = run(IDS)
    torch.testing.assert_close(found, model(IDS))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_double_precision_runs_without_inductor(inner: str) -> None:
    torch.manual_seed(0)
    model = Decoder(Attention, lambda: None, 1).eval().double()
    profile = profile_of(model)
    backend = blindsight_backend(profile, inner=inner, lowering="fused")
    found = torch.compile(model, backend=backend)(IDS)
    torch.testing.assert_close(found, reference_of(model, profile)(IDS), atol=1e-9, rtol=0)


# Results that are viewed.


class Viewed(Attention):
    def joined(self, attended: Tensor) -> Tensor:
        return self.output(attended.transpose(1, 2).view(BATCH, LENGTH, -1))


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_results_may_be_viewed(lowering: str, dynamic: bool | None) -> None:
    check(lambda: None, (), kind=Viewed, lowering=lowering, dynamic=dynamic)


def test_keys_of_something_else_are_not_taken_for_the_prompt() -> None:
    class Crossing(Attention):
        def forward(self, states: Tensor, mask: Any) -> Tensor:
            query = self.query(states).view(BATCH, LENGTH, HEADS, DIM).transpose(1, 2)
            key, value = (
                project(mask).view(BATCH, mask.shape[1], HEADS, DIM).transpose(1, 2)
                for project in (self.key, self.value)
            )
            return self.joined(self.sdpa(query, key, value))

    torch.manual_seed(0)
    model = Decoder(Crossing, lambda memory: memory, 1).eval()
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    memory = torch.randn(BATCH, 7, 32)
    with pytest.warns(BlindsightWarning, match="attention is of other tokens than the prompt's"):
        found = torch.compile(model, backend=backend, fullgraph=True)(IDS, memory)
    torch.testing.assert_close(found, model(IDS, memory))
