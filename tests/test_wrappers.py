"""What calls a model may give it other tokens than it is given, or call it more than once."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import test_handwritten as handwritten
from blindsight import BlindsightWarning, Profile, blindsight_backend, use_template
from blindsight.passes.find_inputs import embeds_other_tokens
from blindsight.passes.graph import placeholders
from blindsight.reference import reference_logits
from decoders import PROMPT, DecoderWithHead, decoder_prompt, template_of
from models import IMAGE_ID, Image, full_position_ids, make_inputs, tiny_model, without_vision

CATEGORIES = [[3, 1, 2, 0], [2, 3, 1, 0]]
ROWS = [[5, Image(), 4, Image(), 6, Image(), 3], [9, Image(), 3, Image(), Image(), 3, 3]]
OTHERS = [[3, Image(), 8, Image(), 4, Image(), 3], [7, Image(), 5, Image(), Image(), 3, 3]]
TOKENS = [IMAGE_ID]  # that are not to be generated


class Wrapper(nn.Module):
    """A reward model, say: it has a config, as transformers' have."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config


class Swapping(Wrapper):
    """Gives the model its rows in another order."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return self.model(**swapped({"input_ids": input_ids, **inputs}), use_cache=False).logits


class SwappingInPlace(Wrapper):
    """Writes into what it is given."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        given = swapped({"input_ids": input_ids, **inputs})
        given["input_ids"] = input_ids.copy_(given["input_ids"])
        return self.model(**given, use_cache=False).logits


class Comparing(Wrapper):
    """Calls the model twice."""

    def forward(self, input_ids: Tensor, rejected_ids: Tensor, first: Any, second: Any) -> Any:
        chosen = self.model(input_ids=input_ids, **first, use_cache=False).logits
        return chosen, self.model(input_ids=rejected_ids, **second, use_cache=False).logits


def swapped(inputs: dict[str, Any]) -> dict[str, Any]:
    """The rows of a prompt in another order; pixels stay, and are those of other images then."""
    return {
        name: x.flip(0) if name.endswith(("input_ids", "token_type_ids")) else x
        for name, x in inputs.items()
    }


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def backend_of(profile: Profile, **options: Any) -> Any:
    return blindsight_backend(profile, inner="eager", lowering="fused", **options)


def assert_sparse(
    model: Any, profile: Profile, inputs: Any, logits: Tensor, last: bool = False
) -> None:
    expected = reference_logits(model, inputs, profile)
    expected = expected[:, -1] if last else expected
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "compiles", "is_told"),
    [
        ("qwen2_5_vl", "decoder", True),
        *itertools.product(["qwen2_5_vl"], ["decoder", "model", "wrapper"], [False]),
        *itertools.product(["qwen3_vl", "gemma3"], ["decoder"], [False]),
        *(
            pytest.param(*each, marks=pytest.mark.nightly)
            for each in (
                *itertools.product(["qwen2_5_vl"], ["model", "wrapper"], [True]),
                *itertools.product(["qwen3_vl", "gemma3"], ["model"], [False]),
            )
        ),
    ],
)
@pytest.mark.parametrize("kind", [Swapping, Comparing])
def test_tokens_are_those_that_the_model_is_given(
    family: str, compiles: str, kind: type[Wrapper], is_told: bool
) -> None:
    wrapper = kind(without_vision(tiny_model(family)))
    model = wrapper.model
    profile = Profile.for_model(model, CATEGORIES)
    backend = backend_of(profile, model=wrapper if is_told else None)
    parts = {"decoder": model.model.language_model, "model": model, "wrapper": wrapper}
    parts[compiles].compile(backend=backend)
    inputs, others = (make_inputs(family, rows, seed=9) for rows in (ROWS, OTHERS))
    for _ in range(2):
        if kind is Swapping:
            found = [(wrapper(**inputs), swapped(inputs))]
        else:
            ids = inputs["input_ids"], others["input_ids"]
            rest = [
                {n: x for n, x in each.items() if n != "input_ids"} for each in (inputs, others)
            ]
            found = list(zip(wrapper(*ids, *rest), (inputs, others), strict=True))
        for logits, given in found:
            assert_sparse(model, profile, given, logits)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tokens_that_are_written_into_on_the_way(mode: Any) -> None:
    wrapper = SwappingInPlace(without_vision(tiny_model("qwen2_5_vl")))
    model = wrapper.model
    profile = Profile.for_model(model, CATEGORIES)
    model.model.language_model.compile(backend=backend_of(profile, model=wrapper))
    for _ in range(2):
        with mode():
            inputs = make_inputs("qwen2_5_vl", ROWS, seed=9)
            expected = swapped(inputs)
            assert_sparse(model, profile, expected, wrapper(**inputs))


def test_generate_inside_a_forward() -> None:
    class Asking(Wrapper):
        def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
            options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
            return self.model.generate(
                input_ids=input_ids, **inputs, **options, output_logits=True, suppress_tokens=TOKENS
            )

    wrapper = Asking(without_vision(tiny_model("qwen2_5_vl")))
    model = wrapper.model
    profile = Profile.for_model(model, CATEGORIES)
    backend = backend_of(profile)
    model.model.language_model.compile(backend=backend)
    inputs = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)
    for _ in range(2):
        found = wrapper(**inputs)
        assert_sparse(model, profile, inputs, found.logits[0], last=True)
    reasons = {how.split(":")[-1] for row in backend.report().rows for how in row.runs}
    assert reasons == {"sparse, ordered, fused", " no query in a second image"}


class InOneGraph(nn.Module):
    """A step whose image features are computed already."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def embedded(self, input_ids: Tensor, features: Tensor) -> Tensor:
        embeds = self.model.get_input_embeddings()(input_ids)
        return embeds.masked_scatter((input_ids == IMAGE_ID)[..., None], features)

    def logits_of(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        states = self.model.model.language_model(
            inputs_embeds=self.embedded(input_ids, features),
            position_ids=positions,
            use_cache=False,
        )
        return self.model.lm_head(states.last_hidden_state)


class Guided(InOneGraph):
    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        first, second = (self.logits_of(input_ids, x, positions) for x in (features, -features))
        return 2 * first - second


class Shifting(InOneGraph):
    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        return self.logits_of(input_ids.roll(1, 1), features, positions)


class ShiftingEmbeddings(InOneGraph):
    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        return self.logits_of(input_ids, features, positions)

    def embedded(self, input_ids: Tensor, features: Tensor) -> Tensor:
        return super().embedded(input_ids, features).roll(5, 1)


class Dropping(InOneGraph):
    """Goes on without some tokens after the first layer, as FastV does."""

    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        decoder = self.model.model.language_model
        embeds = self.model.get_input_embeddings()(input_ids)
        states = embeds.masked_scatter((input_ids == IMAGE_ID)[..., None], features)
        rotary = decoder.rotary_emb(states, positions)
        for layer in decoder.layers:
            states = layer(states, attention_mask=None, position_embeddings=rotary)
            states, rotary = states[:, ::2], tuple(each[..., ::2, :] for each in rotary)
        return self.model.lm_head(decoder.norm(states))


def one_graph(kind: type[InOneGraph], **options: Any) -> tuple[Any, Any, Any, list[Tensor]]:
    model = tiny_model("qwen2_5_vl")
    inputs = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)
    found = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features = torch.cat(list(getattr(found, "pooler_output", found)))
    backend = backend_of(Profile.for_model(model, CATEGORIES), **options)
    run = torch.compile(kind(model), backend=backend, fullgraph=True)
    return run, kind(model), backend, [features, full_position_ids(model, inputs)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Guided, "a layer runs twice in one graph, maybe for several prompts"),
        (
            Shifting,
            "the tokens that are embedded are others than the model's input_ids, or are moved",
        ),
        (
            ShiftingEmbeddings,
            "the tokens that are embedded are others than the model's input_ids, or are moved",
        ),
        (Dropping, "some of its attention is of other tokens than the prompt's"),
    ],
)
def test_tokens_that_a_graph_changes_are_not_guessed(kind: Any, reason: str) -> None:
    ids = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)["input_ids"]
    run, plain, backend, rest = one_graph(kind)
    with pytest.warns(BlindsightWarning, match=f"prefill ran dense: {reason}"):
        logits = run(ids, *rest)
    torch.testing.assert_close(logits, plain(ids, *rest), atol=1e-5, rtol=0)
    assert {how for row in backend.report().rows for how in row.runs} == {f"dense: {reason}"}


LOOKUPS: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "as they are": (False, lambda ids: ids),
    "a copy": (False, lambda ids: ids.clone().to(torch.int64)),
    "clamped": (False, lambda ids: torch.where(ids > 5, 0, ids).clamp(min=0)),
    "masked": (False, lambda ids: ids.masked_fill(ids == 7, 0)),
    "other tokens between": (False, lambda ids: torch.where(ids > 5, torch.zeros_like(ids), ids)),
    "scattered": (False, lambda ids: ids.masked_scatter(ids == 7, torch.full((9,), 4))),
    "viewed": (False, lambda ids: ids.view(-1, ids.shape[-1])),
    "reshaped": (False, lambda ids: ids.reshape(ids.shape)),
    "all of it": (False, lambda ids: ids[:, :]),
    "unsqueezed": (False, lambda ids: ids.unsqueeze(0).squeeze(0)),
    "positions of what is no padding": (False, lambda ids: (ids != 7).cumsum(1)),
    "positions": (False, lambda ids: torch.arange(ids.shape[1]).expand_as(ids)),
    "kinds": (False, lambda ids: torch.zeros(ids.size(), dtype=torch.int64)),
    "moved": (True, lambda ids: ids[:, [1, 0, 2]]),
    "rolled": (True, lambda ids: ids.roll(1, 1)),
    "cut": (True, lambda ids: ids[:, 1:]),
    "rows in another order": (True, lambda ids: ids.flip(0)),
    "together": (True, lambda ids: torch.cat([ids, ids], 1)),
    "moved, then masked": (True, lambda ids: ids.roll(1, 1).masked_fill(ids == 7, 0)),
}


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens_that_are_moved_are_told_from_others(name: str, dynamic: bool) -> None:
    is_moved, make = LOOKUPS[name]
    table = torch.randn(9, 4)
    answers = []

    def look(gm: Any, inputs: Any) -> Any:
        names = [node.name for node in placeholders(gm)]
        # Of some only the size is asked.
        at = names.index("l_input_ids_") if "l_input_ids_" in names else None
        answers.append(at is not None and embeds_other_tokens(gm, at))
        return gm

    def embedded(input_ids: Tensor) -> Tensor:
        return F.embedding(make(input_ids), table)

    run = torch.compile(embedded, backend=look, fullgraph=True, dynamic=dynamic)
    run(torch.tensor([[1, 7, 3], [2, 2, 7]]))
    assert answers == [is_moved]


ORDER = torch.tensor([0, 2, 1])
EMBEDDINGS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "as they are": (False, lambda x, ids: x),
    "scaled, in another dtype": (False, lambda x, ids: (x * 2).to(torch.bfloat16)),
    "features scattered": (
        False,
        lambda x, ids: x.masked_scatter((ids == 7)[..., None], torch.ones(3, 4)),
    ),
    "features chosen": (
        False,
        lambda x, ids: torch.where((ids == 7)[..., None], torch.ones(2, 3, 4).roll(1, 1), x),
    ),
    "features of a row": (False, lambda x, ids: x + torch.ones(9, 4)[ids]),
    "read by a mask": (False, lambda x, ids: x * x[ids == 7].sum()),
    "channels in another order": (False, lambda x, ids: x.flip(-1)[..., [1, 0, 3, 2]].roll(1, 2)),
    "cut": (False, lambda x, ids: x[:, 1:]),
    "moved by a layer": (False, lambda x, ids: (x + (x @ torch.ones(4, 4))).roll(1, 1)),
    "rolled": (True, lambda x, ids: x.roll(1, 1)),
    "rolled all": (True, lambda x, ids: torch.roll(x, 4)),
    "rolled, by name": (True, lambda x, ids: torch.roll(x, shifts=(1, 1), dims=(-2, 2))),
    "flipped": (True, lambda x, ids: x.flip(1)),
    "rows in another order": (True, lambda x, ids: torch.flip(x, [0])),
    "indexed": (True, lambda x, ids: x[:, ORDER]),
    "indexed from the end": (True, lambda x, ids: x[..., ORDER, :]),
    "selected": (True, lambda x, ids: x.index_select(1, ORDER)),
    "gathered": (True, lambda x, ids: x.gather(1, ORDER[None, :, None].expand(2, -1, 4))),
    "taken": (True, lambda x, ids: torch.take_along_dim(x, ORDER[None, :, None], dim=1)),
    "moved, with features": (
        True,
        lambda x, ids: x.masked_scatter((ids == 7)[..., None], torch.ones(3, 4)).flip(1),
    ),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_that_are_moved_are_told_from_others(name: str) -> None:
    is_moved, make = EMBEDDINGS[name]
    table = torch.randn(9, 4)
    answers = []

    def look(gm: Any, inputs: Any) -> Any:
        at = [node.name for node in placeholders(gm)].index("l_input_ids_")
        answers.append(embeds_other_tokens(gm, at))
        return gm

    def embedded(input_ids: Tensor) -> Tensor:
        return make(F.embedding(input_ids, table), input_ids)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(embedded, backend=look, fullgraph=True)
        run(torch.tensor([[1, 7, 3], [2, 2, 7]]))
    assert answers == [is_moved]


def test_tokens_that_are_written_over_in_place() -> None:
    table = torch.randn(9, 4)
    answers = []

    def over(input_ids: Tensor) -> Tensor:
        ids = input_ids.clone()
        ids[ids == 7] = 0
        return F.embedding(ids, table)

    def shifted(input_ids: Tensor) -> Tensor:
        ids = torch.zeros_like(input_ids)
        ids[:, 1:] = input_ids[:, :-1]
        return F.embedding(ids, table)

    def swapped_in_place(input_ids: Tensor) -> Tensor:
        input_ids.copy_(input_ids.flip(1))
        return F.embedding(input_ids, table)

    def deep(input_ids: Tensor) -> Tensor:
        states = F.embedding(input_ids, table)
        for _ in range(1200):
            states = states + 1
        return F.embedding(states.argmax(-1), table)

    def look(gm: Any, inputs: Any) -> Any:
        answers.append(embeds_other_tokens(gm, 0))
        return gm

    for function in (over, shifted, swapped_in_place, deep):
        torch.compile(function, backend=look, fullgraph=True)(torch.tensor([[1, 7, 3]]))
    assert answers == [False, True, True, False]


def test_a_template_says_whose_tokens_are_run_twice() -> None:
    inputs = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)
    run, plain, backend, rest = one_graph(Guided)
    with use_template(*template_of(inputs["input_ids"])):
        found = run(inputs["input_ids"], *rest)
    assert (found - plain(inputs["input_ids"], *rest)).abs().max() > 0.1
    runs = {how for row in backend.report().rows for how in row.runs}
    assert runs == {"sparse, ordered, fused"}


def test_images_that_a_module_hides_are_warned_of() -> None:
    class Hiding(Wrapper):
        def forward(self, input_ids: Tensor, embeds: Tensor) -> Any:
            ids = input_ids.masked_fill(input_ids == IMAGE_ID, 5)
            return self.model(input_ids=ids, use_cache=False).logits

    wrapper = Hiding(without_vision(tiny_model("qwen2_5_vl")))
    profile = Profile.for_model(wrapper.model, CATEGORIES)
    wrapper.model.model.language_model.compile(backend=backend_of(profile))
    inputs = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)
    with pytest.warns(BlindsightWarning, match="tokens without images by a module that is given"):
        wrapper(inputs["input_ids"], inputs["pixel_values"])


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("fails_first", [False, True])
def test_a_call_within_that_ran_uncompiled_is_heard_of(is_told: bool, fails_first: bool) -> None:
    wrapper = Comparing(without_vision(tiny_model("qwen2_5_vl")))
    profile = Profile.for_model(wrapper.model, CATEGORIES)
    backend = backend_of(profile, model=wrapper if is_told else None)
    wrapper.model.model.language_model.compile(backend=backend, dynamic=False)
    inputs = make_inputs("qwen2_5_vl", ROWS[:1], seed=9)
    longer = make_inputs("qwen2_5_vl", [[*ROWS[0], 9]], seed=9)
    rest = [{n: x for n, x in i.items() if n != "input_ids"} for i in (inputs, longer)]
    wrapper(inputs["input_ids"], inputs["input_ids"].clone(), rest[0], rest[0])
    order = (longer, inputs) if fails_first else (inputs, longer)
    others = rest[::-1] if fails_first else rest
    with (
        torch.compiler.set_stance("eager_on_recompile"),
        pytest.raises(ValueError, match="did not run through this backend"),
    ):
        wrapper(*(each["input_ids"] for each in order), *others)


@pytest.mark.parametrize("has_config", [True, False])
def test_what_dynamo_drops_of_a_module_without_config_is_an_error(has_config: bool) -> None:
    """Whether it holds a model that has one, or nothing in it has."""
    if has_config:
        model = tiny_model("qwen2_5_vl")
        module: nn.Module = DecoderWithHead(model)
        profile = Profile.for_model(model, CATEGORIES)
        prompts = [decoder_prompt([[text, *PROMPT]]) for text in (1, 2, 3, 4)]
    else:
        module = handwritten.Decoder(handwritten.Attention, lambda: None, 2).eval()
        profile = handwritten.profile_of(module)
        prompts = [{"input_ids": handwritten.IDS[:, :length]} for length in (19, 20, 21, 22)]
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    modules = [module, copy.deepcopy(module)]  # a backend may serve several
    first, second = (torch.compile(each, backend=backend, dynamic=False) for each in modules)
    with torch._dynamo.config.patch(recompile_limit=2):
        for run, inputs in ((first, prompts[0]), (second, prompts[1])):
            run(**inputs)
        for run, inputs in itertools.product((first, second), prompts[2:] * 2):
            with pytest.raises(ValueError, match=r"so it was dense\. torch\._dynamo has reached"):
                run(**inputs)
    assert all(sum(row.runs.values()) == 1 for row in backend.report().rows)


def test_the_profile_of_another_model_in_a_module_without_config() -> None:
    model, other = tiny_model("qwen2_5_vl"), tiny_model("qwen2_vl")
    backend = blindsight_backend(Profile.for_model(model, CATEGORIES), inner="eager")
    run = torch.compile(Shifting(other), backend=backend, fullgraph=True)
    inputs = make_inputs("qwen2_vl", [PROMPT])
    num_images = int((inputs["input_ids"] == IMAGE_ID).sum())
    features = torch.randn(num_images, other.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="profile has architecture=qwen2_5_vl, model has"):
        run(inputs["input_ids"], features, full_position_ids(other, inputs))
