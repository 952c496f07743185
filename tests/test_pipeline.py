"""Stages of a pipeline: each has the profile of its own layers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blindsight import Profile, blindsight_backend, disabled, use_template
from blindsight.cli.show import describe
from blindsight.runtime.forwards import Forwards
from decoders import PROMPT, check_decoder, decoder_prompt, template_of
from models import Image, make_inputs, tiny_model
from stages import CATEGORIES, NUM_LAYERS, Stage, compile_stages, prompts
from test_distributed import needs_gloo, run_on_ranks


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def qwen() -> Any:
    return tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return decoder_prompt([PROMPT])


@pytest.mark.parametrize("keeps_numbers", [False, True])
def test_stages_are_as_the_whole_model(qwen: Any, inputs: Any, keeps_numbers: bool) -> None:
    first, middle, last = compile_stages(qwen, [0, 1, 3, 4], keeps_numbers=keeps_numbers)
    hidden = first(inputs["input_ids"])  # which tells where the images are
    with use_template(*template_of(inputs["input_ids"])):
        logits = last(middle(hidden))
    check_decoder(qwen, Profile.for_model(qwen, CATEGORIES), inputs, logits)


@pytest.mark.parametrize("keeps_numbers", [False, True])
def test_a_stage_with_the_profile_of_all_layers(
    qwen: Any, inputs: Any, keeps_numbers: bool
) -> None:
    """Layers that are numbered anew would be taken for the first ones."""
    profile = Profile.for_model(qwen, CATEGORIES)
    stage = Stage(qwen, 1, 3, keeps_numbers=keeps_numbers)
    compiled = torch.compile(stage, backend=blindsight_backend(profile, inner="eager"))
    hidden = torch.randn(*inputs["input_ids"].shape, 64)
    missing = "0, 3" if keeps_numbers else "2-3"
    template = template_of(inputs["input_ids"])
    with (
        pytest.raises(ValueError, match=f"layers {missing} of the profile did not run.*stage"),
        use_template(*template),
    ):
        compiled(hidden)
    backend = blindsight_backend(profile, inner="eager", strict=False)
    compiled = torch.compile(stage, backend=backend)
    with pytest.warns(match=f"layers {missing} of the profile"), use_template(*template):
        compiled(hidden)


@pytest.mark.parametrize("keeps_numbers", [False, True])
def test_a_stage_that_is_numbered_otherwise(qwen: Any, inputs: Any, keeps_numbers: bool) -> None:
    own = Profile.for_model(qwen, CATEGORIES).stage(2, 4, keeps_numbers=keeps_numbers)
    stage = Stage(qwen, 2, 4, keeps_numbers=not keeps_numbers)
    compiled = torch.compile(stage, backend=blindsight_backend(own, inner="eager"))
    number, ours = ("1", "2-3") if keeps_numbers else ("3", "0-1")
    with (
        pytest.raises(ValueError, match=f"is layer {number}, but.*of layers {ours}"),
        use_template(*template_of(inputs["input_ids"])),
    ):
        compiled(torch.randn(*inputs["input_ids"].shape, 64))


def test_what_is_not_missing_under_a_template(qwen: Any) -> None:
    """Dense layers may run anywhere, and any layer where nothing is to be sparse."""
    inputs = make_inputs("qwen2_5_vl", [PROMPT])
    template = template_of(inputs["input_ids"])
    for categories, text_only in (([[0] * 4, CATEGORIES[0]] + [[0] * 4] * 2, 0), (CATEGORIES, 1)):
        model = tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS)
        profile = Profile.for_model(model, categories)
        backend = blindsight_backend(profile, inner="eager", lowering="fused", model=model)
        model.model.language_model.layers[1].compile(backend=backend)
        if text_only:
            with use_template(*template), disabled():
                model(**inputs, use_cache=False)
            template = tuple(torch.zeros_like(x) for x in template)
        with use_template(*template):
            model(**inputs, use_cache=False)
    with (
        pytest.raises(ValueError, match="layers 0, 2-3 of the profile"),
        use_template(*template_of(inputs["input_ids"])),
    ):
        model(**inputs, use_cache=False)


def test_what_is_not_missing_where_the_model_is_found_in_the_call(qwen: Any) -> None:
    inputs = make_inputs("qwen2_5_vl", [PROMPT])
    model = tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS)
    profile = Profile.for_model(model, [[0] * 4, CATEGORIES[0]] + [[0] * 4] * 2)
    model.model.language_model.layers[1].compile(
        backend=blindsight_backend(profile, inner="eager", lowering="fused")
    )
    for _ in range(2):
        with use_template(*template_of(inputs["input_ids"])):
            model(**inputs, use_cache=False)


def test_layers_of_a_model_that_are_renumbered() -> None:
    """The model of a stage is told from the whole one; with its own profile it is as any."""
    model = tiny_model("gemma3", num_layers=NUM_LAYERS)
    profile = Profile.for_model(model, CATEGORIES)
    inputs = make_inputs("gemma3", [[5, Image(), 4, Image(), Image(), 7]])
    text = model.model.language_model
    text.layers = text.layers[2:]
    with pytest.raises(ValueError, match=r"parameters in layers 0-3 .* found 0-1.*of a pipeline"):
        blindsight_backend(profile, inner="eager", model=model)
    stage = torch.compile(model, backend=blindsight_backend(profile, inner="eager"))
    with pytest.raises(ValueError, match="layers 2-3 of the profile did not run"):
        stage(**inputs, use_cache=False)
    own = profile.stage(2, 4, keeps_numbers=False)
    backend = blindsight_backend(own, inner="eager", lowering="fused", model=model)
    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**inputs, use_cache=False)
    assert not backend.report().missing_layers
    runs = {how.split(",")[0] for row in backend.report().rows for how in row.runs}
    assert runs == {"sparse"}


def test_a_template_is_read_whole() -> None:
    """Of a prompt in chunks it is a view, and what is compiled counts on its strides."""
    wide = torch.arange(8, dtype=torch.int32).clamp(max=1).expand(2, -1).contiguous()
    is_sink = wide > 0
    with use_template(wide[:, :5], is_sink[:, :5]):
        profile = Profile.for_model(tiny_model("qwen2_5_vl"), "sink")
        history = Forwards(profile, strict=True).explicit_history()
    assert history is not None
    assert all(tensor.is_contiguous() for tensor in history.template.tensors())


def test_the_profile_of_a_stage(qwen: Any, tmp_path: Path) -> None:
    whole = Profile.for_model(qwen, CATEGORIES)
    anew, kept = (whole.stage(1, 3, keeps_numbers=keeps) for keeps in (False, True))
    assert anew.categories.tolist() == CATEGORIES[1:3] and anew.layers == (0, 1)
    assert kept.categories.tolist() == [[0] * 4, *CATEGORIES[1:3], [0] * 4]
    assert kept.layers == (1, 2) and whole.layers == (0, 1, 2, 3)
    assert len({profile.digest for profile in (whole, anew, kept)}) == 3
    assert sum(kept.counts().values()) == sum(anew.counts().values()) == 8
    assert "2 layers" in repr(kept)
    assert describe(kept).count("\n    ") == describe(anew).count("\n    ")
    assert whole.stage(0, 4, keeps_numbers=False) is whole
    for profile in (anew, kept):
        profile.save(tmp_path / "stage.safetensors")
        assert Profile.load(tmp_path / "stage.safetensors").layers == profile.layers
        part = profile.shard(1, 2)
        assert part.categories.equal(profile.categories[:, 2:]) and part.layers == profile.layers
        for valid in (profile, part):
            valid.validate(qwen, part_is_fine=True)
            with pytest.raises(ValueError, match="stage"):
                valid.validate(qwen)
    of_a_shard = whole.shard(1, 2).stage(1, 3, keeps_numbers=False)
    assert of_a_shard.digest == anew.shard(1, 2).digest
    anew.validate(tiny_model("qwen2_5_vl", num_layers=2), part_is_fine=True)  # a config of its own
    with pytest.raises(ValueError, match="stage must be written first:stop/layers, got 'x'"):
        dataclasses.replace(whole, fingerprint={**whole.fingerprint, "stage": "x"})
    with pytest.raises(ValueError, match="num_layers=4"):
        kept.validate(tiny_model("qwen2_5_vl", num_layers=2), part_is_fine=True)
    with pytest.raises(ValueError, match="got stage 1:3/4"):
        anew.stage(0, 1, keeps_numbers=False)
    for first, stop in ((2, 2), (-1, 2), (2, 5)):
        with pytest.raises(ValueError, match=f"0..4, got {first} and {stop}"):
            whole.stage(first, stop, keeps_numbers=True)


@needs_gloo
def test_pipelining_of_torch(qwen: Any, tmp_path: Path) -> None:
    """Two microbatches, each with a template of its own."""
    run_on_ranks("stages.py", str(tmp_path))
    logits = torch.load(tmp_path / "logits.pt")
    check_decoder(qwen, Profile.for_model(qwen, CATEGORIES), prompts(), logits)
