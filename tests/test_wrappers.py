"""What calls a model may give it other tokens than it is given, or call it more than once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blindsight import BlindsightWarning, Profile, blindsight_backend
from blindsight.passes.find_inputs import embeds_other_tokens
from blindsight.reference import reference_logits
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
        *itertools.product(["qwen2_5_vl"], ["decoder", "model", "wrapper"], [False, True]),
        *itertools.product(["qwen3_vl", "gemma3"], ["decoder", "model"], [False]),
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

    def logits_of(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        embeds = self.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter((input_ids == IMAGE_ID)[..., None], features)
        states = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        )
        return self.model.lm_head(states.last_hidden_state)


class Guided(InOneGraph):
    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        first, second = (self.logits_of(input_ids, x, positions) for x in (features, -features))
        return 2 * first - second


class Shifting(InOneGraph):
    def forward(self, input_ids: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        return self.logits_of(input_ids.roll(1, 1), features, positions)


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
        (Shifting, "the tokens that are embedded are others than the model's input_ids"),
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


def test_tokens_that_are_written_over_stay_where_they_are() -> None:
    table = torch.randn(9, 4)

    def embedded(input_ids: Tensor) -> Tensor:
        ids = input_ids.clone()
        ids[ids == 7] = 0
        return torch.nn.functional.embedding(torch.where(ids > 5, 0, ids).clamp(min=0), table)

    def moved(input_ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input_ids[:, [1, 0, 2]], table)

    def cut(input_ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input_ids[:, 1:], table)

    answers = []

    def look(gm: Any, inputs: Any) -> Any:
        answers.append(embeds_other_tokens(gm, 0))
        return gm

    for function in (embedded, moved, cut):
        torch.compile(function, backend=look, fullgraph=True)(torch.tensor([[1, 7, 3]]))
    assert answers == [False, True, True]
