"""The compiled model equals an eager one with explicit dense masks, on four architectures.

Every comparison is with the fp64 reference, within twice the error of the same computation done
eagerly in the same dtype. The full matrix of families, dtypes, inner backends and scenarios is
nightly; CI runs every scenario of every family once, and a part of the rest.
"""

import copy
import functools
import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import blindsight
from blindsight import Profile, blindsight_backend, use_template
from blindsight.attention.attend import attend
from blindsight.attention.mask_forms import MaskForm
from blindsight.reference import reference_logits
from models import (
    END_ID,
    FAMILIES,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    append_text,
    full_position_ids,
    generation_options,
    make_inputs,
    split_turns,
    tiny_model,
    valid_positions,
)
from oracles import (
    assert_close_to_reference,
    error_bound,
    generate_reference,
    oracle_template,
    reference_copy,
    run_reference,
)

NUM_LAYERS = 3
# Mixed in every layer, and no two layers alike: a swapped head or layer is seen.
CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]]
NIGHTLY = pytest.mark.nightly
# The decoder of Qwen2-VL is that of Qwen2.5-VL.
DISTINCT = [pytest.param(x, marks=NIGHTLY) if x == "qwen2_vl" else x for x in FAMILIES]


def image(family: str, height: int, width: int) -> Image:
    return Image() if family == "gemma3" else Image(height, width)


def rows_of(scenario: str, family: str) -> tuple[list[list[Any]], str | None]:
    """The segments of each batch row, and the side of the padding."""
    small, wide, tall = (image(family, *size) for size in ((2, 2), (2, 5), (4, 3)))
    # 1, 2 and 3 images, of unlike sizes, in rows of unlike lengths
    batch = [[5, wide, 4, tall, 6], [3, small, tall, 2, small, 9], [8, wide]]
    return {
        "one_row": ([[5, wide, 4, tall, small, 7]], None),
        "left_padding": (batch, "left"),
        "right_padding": (batch, "right"),
        "images_at_both_ends": ([[wide, tall, 4, small]], None),
        "long": ([[40, *([tall, 11] * 7), 30, *([small] * 6), 9]], None),
        "two_turns": ([[5, wide, 4, tall, 6, small, 3], [9, tall, 2, wide, 6, small, 3]], "left"),
        "text_only": ([[17], [17]], None),
        "one_image": ([[4, tall, 6]], None),
    }[scenario]


SCENARIOS = (
    "one_row",
    "left_padding",
    "right_padding",
    "images_at_both_ends",
    "long",
    "text_only",
    "one_image",
)
IS_DENSE = ("text_only", "one_image")


class Case:
    """One model, one prompt, and what the reference says of them."""

    def __init__(self, family: str, dtype: torch.dtype, scenario: str) -> None:
        self.family = family
        self.model = model_of(family, dtype)
        self.categories = torch.tensor(CATEGORIES)
        self.profile = Profile.for_model(self.model, self.categories)
        rows, pad_side = rows_of(scenario, family)
        self.inputs = make_inputs(family, rows, pad_side=pad_side)
        self.span_id, self.is_sink = template_of(self.inputs)
        self.valid = valid_positions(self.inputs)
        self.reference = self.logits_of(self.model)
        self.reference64 = self.logits_of(model_of(family, dtype, in_fp64=True))

    @property
    def num_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    def logits_of(self, model: Any) -> torch.Tensor:
        args = (self.categories, self.span_id, self.is_sink, self.inputs)
        return run_reference(model, *args, use_cache=False).logits

    def compile(
        self,
        inner: Any = "eager",
        *,
        with_vision: bool = False,
        dynamic: bool | None = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        """Return the compiled model and its backend.

        The vision tower is some 20 graphs that the backend hands on untouched, and most of the
        time of tracing: it runs uncompiled unless it is asked for.
        """
        torch._dynamo.reset()
        compile_vision(self.model, with_vision)
        backend = blindsight_backend(self.profile, inner=inner, **{"lowering": "fused", **options})
        return torch.compile(self.model, backend=backend, dynamic=dynamic), backend

    def check(self, logits: torch.Tensor, tokens: slice = slice(None)) -> None:
        """Compare the logits of some tokens of the prompt."""
        assert_close_to_reference(
            logits, self.reference[:, tokens], self.reference64[:, tokens], self.valid[:, tokens]
        )

    def differs_from_dense(self) -> bool:
        with torch.no_grad():
            dense = self.model(**self.inputs, use_cache=False).logits
        bound = error_bound(self.reference64[self.valid], self.reference[self.valid])
        return bool((dense - self.reference64)[self.valid].abs().max() > 4 * bound)


@functools.cache
def model_of(family: str, dtype: torch.dtype, *, in_fp64: bool = False) -> Any:
    model = tiny_model(family, num_layers=NUM_LAYERS, dtype=dtype)
    return reference_copy(model) if in_fp64 else model


def compile_vision(model: Any, yes: bool) -> None:
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    tower.__dict__.pop("forward", None)
    if not yes:
        tower.forward = torch._dynamo.disable(tower.forward)


case_of = functools.cache(Case)


def template_of(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_template(inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,))


def runs_of(backend: Any) -> set[str]:
    """How the decoder's attention ran, over all graphs."""
    return {how.split(",")[0] for row in backend.report().rows for how in row.runs}


@pytest.fixture(autouse=True)
def form(monkeypatch: pytest.MonkeyPatch) -> Callable[[MaskForm], None]:
    """Sort the tokens of all prompts: left to itself, the choice for short ones is not to."""

    def force(form: MaskForm) -> None:
        monkeypatch.setattr("blindsight.runtime.rewriting.best_mask_form", lambda *_, **__: form)

    force(MaskForm.SORTED)
    return force


@pytest.fixture(autouse=True)
def room_for_layers() -> Iterator[None]:
    # Qwen3-VL's layers are compiled one by one, and again for every shape.
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        yield


def matrix(*, ci: Callable[[str, torch.dtype, Any, str], bool]) -> list[Any]:
    """Families x dtypes x inner backends x scenarios, nightly unless ``ci`` says otherwise."""
    combinations = itertools.product(
        FAMILIES, (torch.float32, torch.bfloat16), ("eager", "aot_eager"), SCENARIOS
    )
    return [
        pytest.param(*combination, marks=() if ci(*combination) else NIGHTLY)
        for combination in combinations
    ]


def in_ci(family: str, dtype: torch.dtype, inner: str, scenario: str) -> bool:
    if family == "qwen2_vl" and (scenario != "left_padding" or dtype != torch.float32):
        return False
    if dtype == torch.float32 and inner == "eager":
        return True
    # one other combination each, so that every axis is met in CI
    return (dtype, inner, scenario) in (
        (torch.bfloat16, "eager", "left_padding"),
        (torch.float32, "aot_eager", "right_padding"),
    )


@pytest.mark.parametrize(("family", "dtype", "inner", "scenario"), matrix(ci=in_ci))
def test_prefill_equals_dense_masks(
    family: str, dtype: torch.dtype, inner: str, scenario: str
) -> None:
    case = case_of(family, dtype, scenario)
    with_vision = scenario == "left_padding" and dtype == torch.float32
    model, backend = case.compile(inner, with_vision=with_vision)
    case.check(model(**case.inputs, use_cache=False).logits)
    assert case.differs_from_dense() == (scenario not in IS_DENSE)
    assert runs_of(backend) == (
        {"dense: no query in a second image"} if scenario in IS_DENSE else {"sparse"}
    )
    assert not backend.report().missing_layers


@pytest.mark.parametrize("form_name", ["ORDERED", "EXPRESSED", "MATERIALISED"])
@pytest.mark.parametrize("family", DISTINCT)
def test_other_forms_of_the_mask(family: str, form_name: str, form: Any) -> None:
    form(MaskForm[form_name])
    case = case_of(family, torch.float32, "left_padding")
    model, backend = case.compile()
    case.check(model(**case.inputs, use_cache=False).logits)
    hows = {how for row in backend.report().rows for how in row.runs}
    assert hows == {f"sparse, {form_name.lower()}, fused"}


SPLITS_IN_CI = {
    ("qwen2_5_vl", "one_row", "SORTED"),
    ("qwen3_vl", "one_row", "SORTED"),
    ("gemma3", "one_row", "SORTED"),
    ("gemma3", "left_padding", "EXPRESSED"),
    ("qwen2_5_vl", "left_padding", "MATERIALISED"),
}


@pytest.mark.parametrize(
    ("family", "scenario", "form_name"),
    [
        pytest.param(*split, marks=() if split in SPLITS_IN_CI else NIGHTLY)
        for split in itertools.product(
            FAMILIES,
            ("one_row", "left_padding"),
            ("SORTED", "EXPRESSED", "MATERIALISED"),
        )
    ],
)
def test_heads_split_by_category(
    family: str, form_name: str, scenario: str, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call per category, as where tables per head would be too large."""
    monkeypatch.setattr("blindsight.runtime.choose.MAX_TABLE_BYTES", 0)
    form(MaskForm[form_name])
    case = case_of(family, torch.float32, scenario)
    graphs: list[torch.fx.GraphModule] = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    model, backend = case.compile(inner, lowering="split")
    case.check(model(**case.inputs, use_cache=False).logits)
    kinds = {
        kind
        for gm in graphs
        for node in gm.graph.nodes
        if node.target is attend
        for kind, _ in node.args[6]
    }
    # dense heads are causal and no more: without padding, and but for Gemma's images
    is_causal = scenario == "one_row" and family != "gemma3"
    assert kinds == ({"alike", "causal"} if is_causal else {"alike"})
    assert runs_of(backend) == {"sparse"}


@pytest.mark.parametrize("family", DISTINCT)
def test_layers_of_dense_heads_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are rewritten, too: their mask need not be built."""
    monkeypatch.setattr(f"{__name__}.CATEGORIES", [[0, 0, 0, 0], [3, 2, 1, 0], [0, 0, 0, 0]])
    case = Case(family, torch.float32, "one_row")
    model, backend = case.compile()
    case.check(model(**case.inputs, use_cache=False).logits)
    assert runs_of(backend) == {"sparse", "dense: all its heads are dense"}


PADDED, LONG = ("left_padding", "ORDERED", "fused"), ("long", "SORTED", "split")


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("family", "scenario", "form_name", "lowering"),
    [
        ("qwen2_5_vl", *PADDED),
        ("gemma3", *PADDED),
        ("qwen3_vl", *LONG),
        pytest.param("qwen2_5_vl", *LONG, marks=NIGHTLY),
        pytest.param("gemma3", *LONG, marks=NIGHTLY),
        pytest.param("qwen3_vl", *PADDED, marks=NIGHTLY),
    ],
)
def test_prefill_on_inductor(
    family: str, scenario: str, form_name: str, lowering: str, form: Any
) -> None:
    form(MaskForm[form_name])
    case = case_of(family, torch.float32, scenario)
    model, backend = case.compile("inductor", lowering=lowering)
    case.check(model(**case.inputs, use_cache=False).logits)
    assert runs_of(backend) == {"sparse"}


@NIGHTLY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_on_inductor_throughout(family: str, scenario: str, dtype: torch.dtype) -> None:
    case = case_of(family, dtype, scenario)
    model, _ = case.compile("inductor")
    case.check(model(**case.inputs, use_cache=False).logits)


TURNS_IN_CI = {
    ("qwen2_5_vl", "static"),
    ("gemma3", "dynamic"),
    ("qwen3_vl", "dynamic"),
}


def caches(case: Case) -> dict[str, Callable[[], Any]]:
    config = case.model.config.get_text_config()
    return {
        "made_by_the_model": lambda: None,
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=case.num_tokens + 9),
    }


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=NIGHTLY)])
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        pytest.param(
            family, cache, marks=() if (family, cache) in TURNS_IN_CI else pytest.mark.nightly
        )
        for family in FAMILIES
        for cache in ("made_by_the_model", "dynamic", "static")
    ],
)
def test_whole_and_two_turns_agree(family: str, cache: str, inner: str) -> None:
    """The second turn knows the images of the first from the cache that it is given."""
    case = case_of(family, torch.float32, "two_turns")
    model, backend = case.compile(inner)
    split = case.num_tokens - Image().num_tokens - 3
    if cache != "made_by_the_model":
        whole = model(**case.inputs, past_key_values=caches(case)[cache](), use_cache=True)
        case.check(whole.logits)
    first, second = split_turns(case.model, case.inputs, split)
    output = model(**first, past_key_values=caches(case)[cache](), use_cache=True)
    case.check(output.logits, slice(0, split))
    output = model(**second, past_key_values=output.past_key_values, use_cache=True)
    case.check(output.logits, slice(split, None))
    assert "the tokens already in the cache are not known" not in str(backend.report())


@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=NIGHTLY)])
@pytest.mark.parametrize(
    "family",
    ["qwen3_vl", *(pytest.param(x, marks=NIGHTLY) for x in FAMILIES if x != "qwen3_vl")],
)
@pytest.mark.parametrize(
    "context", [torch.no_grad, pytest.param(torch.inference_mode, marks=NIGHTLY)]
)
def test_a_conversation_with_turns_of_text(family: str, cache: str, context: Any) -> None:
    """Qwen3-VL runs text in one graph and images layer by layer: each must know every cache."""
    case = case_of(family, torch.float32, "one_row")
    config = case.model.config.get_text_config()
    if cache == "static":
        past: Any = StaticCache(config=config, max_cache_len=128)
    else:
        past = DynamicCache(config=config)
    row = [5, Image(), 4, Image(), 6, 7, 3, Image(), 2, 9, 8, 4, Image(), 5]
    inputs = make_inputs(family, [row])
    *_, third, fourth = (inputs["input_ids"][0] == START_ID).nonzero()[:, 0].tolist()
    turns = [inputs]
    for split in (fourth - 1, third, third - 1, third - 3):
        turns[:1] = split_turns(case.model, turns[0], split)
    expected = reference_logits(case.model, inputs, case.profile)
    model, backend = case.compile()
    logits = []
    with context():
        for turn in turns:
            logits.append(model(**turn, past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)
    assert runs_of(backend) == {"dense: no query in a second image", "sparse"}


@pytest.mark.parametrize("family", FAMILIES)
def test_second_turn_on_an_unknown_cache_is_dense_and_says_so(family: str) -> None:
    case = case_of(family, torch.float32, "one_row")
    split = int((case.inputs["input_ids"][0] == START_ID).nonzero()[-1])
    first, second = split_turns(case.model, case.inputs, split)
    cache = DynamicCache(config=case.model.config.get_text_config())
    case.model(**first, past_key_values=cache, use_cache=True)
    expected = case.model(**second, past_key_values=copy_cache(cache), use_cache=True).logits
    model, backend = case.compile()
    with pytest.warns(blindsight.BlindsightWarning, match="already in the cache are not known"):
        output = model(**second, past_key_values=copy_cache(cache), use_cache=True)
    torch.testing.assert_close(output.logits, expected)
    assert runs_of(backend) == {"dense: the tokens already in the cache are not known"}
    with use_template(case.span_id, case.is_sink):
        output = model(**second, past_key_values=copy_cache(cache), use_cache=True)
    assert "sparse" in runs_of(backend)


def copy_cache(cache: Any) -> Any:
    return copy.deepcopy(cache)


def test_a_copy_of_one_of_two_caches_of_a_prompt_is_nobodys() -> None:
    """The first layer's keys are the same, whatever its images are said to be."""
    case = case_of("qwen2_5_vl", torch.float32, "one_row")
    split = int((case.inputs["input_ids"][0] == START_ID).nonzero()[-1])
    first, second = split_turns(case.model, case.inputs, split)
    span_id, is_sink = case.span_id[:, :split], case.is_sink[:, :split]
    second_sink = int(is_sink[0].nonzero()[1])
    merged = torch.where(span_id >= 2, span_id - 1, span_id)
    one_less = is_sink & (torch.arange(split) != second_sink)
    model, _ = case.compile()
    with use_template(merged, one_less):
        other = model(**first, use_cache=True).past_key_values
    cache = model(**first, use_cache=True).past_key_values
    for each in (cache, other):
        with pytest.warns(blindsight.BlindsightWarning) if each is cache else nullcontext():
            found = model(**second, past_key_values=copy_cache(each), use_cache=True).logits
        dense = case.model(**second, past_key_values=copy_cache(each), use_cache=True).logits
        torch.testing.assert_close(found, dense)
    # With the other gone, it is known whose copy it is.
    del other, each
    gc.collect()
    found = model(**second, past_key_values=copy_cache(cache), use_cache=True).logits
    case.check(found, slice(split, None))


def test_tokens_are_decoded_after_a_template_of_the_prompt() -> None:
    """``generate`` from embeddings: nobody can give the template of what it will write."""
    case = case_of("qwen2_5_vl", torch.float32, "one_row")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    options["return_dict_in_generate"] = True
    positions = {"position_ids": full_position_ids(case.model, case.inputs)}
    given = {
        "inputs_embeds": embeddings_of(case),
        "attention_mask": case.inputs["attention_mask"],
        **positions,
    }
    args = case.model, case.categories, case.span_id, case.is_sink
    expected = generate_reference(*args, given, **options)
    model, backend = case.compile()
    model = copy.deepcopy(case.model)
    model.compile(backend=backend)
    with use_template(case.span_id, case.is_sink):
        found = model.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert "sparse" in runs_of(backend)


@pytest.mark.parametrize("change", ["crop", "write", "reorder"])
def test_a_changed_cache_is_an_unknown_one(change: str) -> None:
    """What is known of a cache's tokens must not outlive a crop, a write or a reordering."""
    case = case_of("qwen2_5_vl", torch.float32, "one_row")
    split = int((case.inputs["input_ids"][0] == START_ID).nonzero()[-1])
    first, second = split_turns(case.model, case.inputs, split)
    model, _ = case.compile()
    output = model(**first, use_cache=True)
    cache = output.past_key_values
    if change == "crop":
        cache.crop(-1)
        second["attention_mask"] = second["attention_mask"][:, 1:]
    elif change == "write":
        cache = copy_cache(cache)
        cache.layers[0].keys[0, 0, -1, -1] += 1
    else:
        cache.reorder_cache(torch.tensor([0]))
    with pytest.warns(blindsight.BlindsightWarning, match="already in the cache are not known"):
        model(**second, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, pytest.param(torch.no_grad, marks=NIGHTLY)]
)
@pytest.mark.parametrize(
    "family",
    ["qwen3_vl", *(pytest.param(x, marks=NIGHTLY) for x in FAMILIES if x != "qwen3_vl")],
)
def test_a_copied_prefix_is_known(family: str, context: Any) -> None:
    """Many questions after one prefix: each goes on with a copy of its cache."""
    case = case_of(family, torch.float32, "one_row")
    split = int((case.inputs["input_ids"][0] == START_ID).nonzero()[-1])
    with context():
        first, second = split_turns(case.model, case.inputs, split)
        model, backend = case.compile()
        cache = DynamicCache(config=case.model.config.get_text_config())
        model(**first, past_key_values=cache, use_cache=True)
        for _ in range(2):
            output = model(**second, past_key_values=copy_cache(cache), use_cache=True)
            case.check(output.logits, slice(split, None))
    assert "the tokens already in the cache are not known" not in str(backend.report())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_chunks_that_cut_images_agree_with_the_whole(family: str) -> None:
    """No row depends on what comes after it, so a prompt may be cut anywhere."""
    case = case_of(family, torch.float32, "one_row")
    backend = blindsight_backend(case.profile, inner="eager", lowering="fused")
    chunks = run_in_chunks(case, backend, [0, 9, 10, 23, 31, case.num_tokens])
    case.check(torch.cat(list(chunks), dim=1))


def run_in_chunks(
    case: Case, backend: Any, edges: Sequence[int], cache: Any = None
) -> Iterator[torch.Tensor]:
    """Yield the logits of one part of a prompt after the other, of a Qwen."""
    embeds, positions = embeddings_of(case), full_position_ids(case.model, case.inputs)
    text, head = case.model.model.language_model, case.model.lm_head
    torch._dynamo.reset()
    compiled = torch.compile(text, backend=backend)
    cache = DynamicCache(config=text.config) if cache is None else cache
    for start, stop in itertools.pairwise(edges):
        with use_template(case.span_id[:, :stop], case.is_sink[:, :stop]):
            output = compiled(
                inputs_embeds=embeds[:, start:stop],
                position_ids=positions[..., start:stop],
                attention_mask=case.inputs["attention_mask"][:, :stop],
                past_key_values=cache,
                use_cache=True,
            )
        yield head(output.last_hidden_state)


def embeddings_of(case: Case) -> torch.Tensor:
    """What the decoder is given: text embeddings, with the images in their places."""
    taken: list[torch.Tensor] = []

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        taken.append(kwargs["inputs_embeds"])

    handle = case.model.model.language_model.register_forward_pre_hook(take, with_kwargs=True)
    case.model(**case.inputs, use_cache=False)
    handle.remove()
    return taken[0]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DISTINCT)
def test_generate_gives_the_tokens_of_the_reference(family: str, cache: str) -> None:
    case = case_of(family, torch.float32, "left_padding")
    options = generation_options(cache)
    expected = generate_reference(
        case.model, case.categories, case.span_id, case.is_sink, case.inputs, **options
    )
    _, backend = case.compile()
    case.model.compile(backend=backend)
    try:
        found = case.model.generate(**case.inputs, **options)
    finally:
        case.model._compiled_call_impl = None
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    # with a static cache the mask is made outside of any graph
    hows = {how for row in backend.report().rows for how in row.runs}
    assert hows == {"sparse, sorted, fused", "dense: no query in a second image"}


def test_a_decoded_token_waits_for_no_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are functions of the symbols' values: substituting takes longer than a layer."""

    def substitute(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a decoded token must not substitute a size.")

    case = case_of("qwen2_5_vl", torch.float32, "one_row")
    model, _ = case.compile()
    with torch.no_grad():
        past = model(**case.inputs, use_cache=True).past_key_values
        for step in range(5):
            if step == 4:
                monkeypatch.setattr("sympy.Basic.subs", substitute)
            token = {"input_ids": torch.tensor([[5]]), "past_key_values": past}
            num_tokens = case.num_tokens + step
            token["position_ids"] = torch.full((3, 1, 1), num_tokens)
            token["attention_mask"] = torch.ones(1, num_tokens + 1, dtype=torch.long)
            past = model(**token, use_cache=True).past_key_values


@pytest.mark.parametrize("family", DISTINCT)
def test_decoding_after_prefill(family: str) -> None:
    """A decoded token runs the model's own graph on the keys that the sparse prefill left."""
    case = case_of(family, torch.float32, "one_row")
    longer = append_text(case.inputs, torch.tensor([[20, 21]]))
    span_id, is_sink = template_of(longer)
    args = (case.categories, span_id, is_sink, longer)
    reference, reference64 = (
        run_reference(model, *args, use_cache=False).logits
        for model in (case.model, model_of(family, torch.float32, in_fp64=True))
    )
    model, backend = case.compile()
    first, second = split_turns(case.model, longer, case.num_tokens)
    output = model(**first, use_cache=True)
    third = split_turns(case.model, longer, case.num_tokens + 1)[1]
    second = {
        name: value[..., :1] if name in ("input_ids", "position_ids") else value
        for name, value in second.items()
    }
    for name in ("attention_mask", "token_type_ids"):
        if name in second:
            second[name] = second[name][:, :-1]
    if "mm_token_type_ids" in second:
        second["mm_token_type_ids"] = second["mm_token_type_ids"][:, :1]
    for turn, token in ((second, case.num_tokens), (third, case.num_tokens + 1)):
        output = model(**turn, past_key_values=output.past_key_values, use_cache=True)
        rows = slice(token, token + 1)
        assert_close_to_reference(
            output.logits,
            reference[:, rows],
            reference64[:, rows],
            torch.ones(1, 1, dtype=torch.bool),
        )
    assert "dense: no query in a second image" in runs_of(backend)


@pytest.mark.parametrize(
    "family", [x if x == "qwen2_5_vl" else pytest.param(x, marks=NIGHTLY) for x in FAMILIES]
)
def test_a_dense_profile_is_plain_torch_compile(family: str) -> None:
    case = case_of(family, torch.float32, "left_padding")
    torch._dynamo.reset()
    profile = Profile.for_model(case.model, "dense")
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    plain = torch.compile(case.model, backend="eager")(**case.inputs, use_cache=False).logits
    torch._dynamo.reset()
    found = torch.compile(case.model, backend=backend)(**case.inputs, use_cache=False).logits
    assert torch.equal(found, plain)
    assert backend.report().num_rewritten == 0 or family == "qwen3_vl"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_disabled_runs_the_models_own_graphs(context: Any) -> None:
    case = case_of("qwen2_5_vl", torch.float32, "left_padding")
    model, backend = case.compile()
    with context():
        dense = case.model(**case.inputs, use_cache=False).logits
        with blindsight.disabled():
            found = model(**case.inputs, use_cache=False).logits
        torch.testing.assert_close(found, dense)
        case.check(model(**case.inputs, use_cache=False).logits)
    assert runs_of(backend) == {"sparse", "dense: disabled"}


def test_lengths_change_from_call_to_call() -> None:
    """Dynamo turns to symbolic lengths at the second one; each must be right."""
    model, seen = None, []
    for scenario in ("one_row", "long", "images_at_both_ends", "text_only", "one_row"):
        case = case_of("qwen2_5_vl", torch.float32, scenario)
        if model is None:
            model, backend = case.compile()
        case.check(model(**case.inputs, use_cache=False).logits)
        seen.append(case.num_tokens)
    assert len(set(seen)) == 4
    assert runs_of(backend) == {"sparse", "dense: no query in a second image"}


def test_two_backends_interleaved_do_not_mix() -> None:
    case = case_of("qwen2_5_vl", torch.float32, "left_padding")
    torch._dynamo.reset()
    profiles = [case.profile, Profile.for_model(case.model, "document")]
    models = [
        torch.compile(
            case.model, backend=blindsight_backend(profile, inner="eager", lowering="fused")
        )
        for profile in profiles
    ]
    references = [reference_of(case, profile) for profile in profiles]
    for at in (0, 1, 1, 0):
        found = models[at](**case.inputs, use_cache=False).logits
        assert_close_to_reference(found, *references[at], case.valid)


def test_two_threads_do_not_mix() -> None:
    """One backend serves both threads, whose prompts have the same length and other images."""
    family = "qwen2_5_vl"
    case = case_of(family, torch.float32, "one_row")
    wide, tall, small = (image(family, *size) for size in ((2, 5), (4, 3), (2, 2)))
    other_inputs = make_inputs(family, [[7, small, tall, 4, wide, 5]], seed=5)
    assert other_inputs["input_ids"].shape == case.inputs["input_ids"].shape
    span_id, is_sink = template_of(other_inputs)
    other = [
        run_reference(m, case.categories, span_id, is_sink, other_inputs, use_cache=False).logits
        for m in (case.model, model_of(family, torch.float32, in_fp64=True))
    ]
    model, _ = case.compile()
    prompts = [
        (case.inputs, (case.reference, case.reference64)),
        (other_inputs, tuple(other)),
    ]
    # rope_deltas are state of the model, not ours: positions are given
    problems: list[BaseException] = []
    start = threading.Barrier(2)

    def run(inputs: dict[str, torch.Tensor], references: tuple[torch.Tensor, ...]) -> None:
        try:
            with torch.no_grad():
                start.wait()
                for _ in range(4):
                    found = model(**inputs, use_cache=False).logits
                    assert_close_to_reference(found, *references, case.valid)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=prompt) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


def reference_of(case: Case, profile: Profile) -> tuple[torch.Tensor, torch.Tensor]:
    models = (case.model, model_of(case.family, torch.float32, in_fp64=True))
    args = (profile.categories, case.span_id, case.is_sink, case.inputs)
    first, second = (run_reference(model, *args, use_cache=False).logits for model in models)
    return first, second


@pytest.mark.parametrize(
    ("family", "form_name"),
    [("qwen2_5_vl", "SORTED"), ("qwen2_5_vl", "ORDERED"), ("gemma3", "SORTED")],
)
def test_packed_sequences(family: str, form_name: str, form: Any) -> None:
    """Two prompts in one row: the first image of each is free, and neither sees the other."""
    form(MaskForm[form_name])
    case = case_of(family, torch.float32, "one_row")
    wide, tall, small = (image(family, *size) for size in ((2, 5), (4, 3), (2, 2)))
    first, second = [5, wide, 4, tall, small, 7], [3, small, tall, 6, wide, 4]
    inputs = make_inputs(family, [first + second], attention_mask=False)
    num_tokens = inputs["input_ids"].shape[1]
    begin = case.num_tokens  # of the second prompt
    positions = torch.cat([torch.arange(begin), torch.arange(num_tokens - begin)])
    inputs["position_ids"] = positions.expand(4, 1, -1) if family != "gemma3" else positions[None]
    sequence_id = (torch.arange(num_tokens) >= begin).long()[None]
    span_id, is_sink = template_of(inputs)
    reference, reference64, unpacked = (
        run_reference(
            model,
            case.categories,
            span_id,
            is_sink,
            inputs,
            sequence_id=sequences,
            use_cache=False,
        ).logits
        for model, sequences in (
            (case.model, sequence_id),
            (model_of(family, torch.float32, in_fp64=True), sequence_id),
            (case.model, None),
        )
    )
    # or a first image of a later prompt would not be seen to be free
    assert (reference - unpacked).abs().max() > 0.01
    valid = torch.ones(1, num_tokens, dtype=torch.bool)
    plain = reference_logits(case.model, inputs, case.profile)
    assert_close_to_reference(plain, reference, reference64, valid)
    model, backend = case.compile()
    found = model(**inputs, use_cache=False).logits
    assert_close_to_reference(found, reference, reference64, valid)
    assert all(row.tier == 1 for row in backend.report().rows if row.rewritten)


@pytest.mark.parametrize("family", DISTINCT)
@pytest.mark.parametrize(
    ("scenario", "attention_mask"),
    [
        ("long", False),
        ("two_turns", True),
        pytest.param("long", True, marks=NIGHTLY),
        pytest.param("two_turns", False, marks=NIGHTLY),
    ],
)
def test_no_tensor_of_all_pairs_is_left(family: str, scenario: str, attention_mask: bool) -> None:
    """Where masks are intervals, no node of a rewritten graph has Q x K elements."""
    case = case_of(family, torch.float32, scenario)
    inputs = {
        name: value
        for name, value in case.inputs.items()
        if attention_mask or name != "attention_mask"
    }
    graphs = []

    def inner(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    model, backend = case.compile(inner)
    model(**inputs, use_cache=False)
    rewritten = [
        gm for gm in graphs if any(node.name == "blindsight_span_id" for node in gm.graph.nodes)
    ]
    assert rewritten
    for gm in rewritten:
        assert "sorted_mask" in str(gm.code)
        for node in gm.graph.nodes:
            value = node.meta.get("example_value")
            if not isinstance(value, torch.Tensor):
                continue
            if list(value.shape).count(case.num_tokens) >= 2:
                # Qwen3-VL's layers are given their mask ready made: nobody reads it any more
                assert node.op == "placeholder" and not node.users, node.format_node()
    hows = {how for row in backend.report().rows for how in row.runs}
    assert hows == {"sparse, sorted, fused"}


def test_where_a_fact_does_not_hold_the_expression_is_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma's images are intervals only while their groups are contiguous."""
    monkeypatch.setattr(
        "blindsight.runtime.data_check.facts_hold", lambda *_, **__: torch.tensor(False)
    )
    case = case_of("gemma3", torch.float32, "left_padding")
    model, backend = case.compile()
    with pytest.warns(blindsight.BlindsightWarning, match="does not hold for this prompt"):
        case.check(model(**case.inputs, use_cache=False).logits)
    assert {how for row in backend.report().rows for how in row.runs} == {
        "sparse, expressed, fused"
    }
