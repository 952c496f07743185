"""What categories do to the next token: against the reference, and what must be zero."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blindsight.calibration.refine import mean_divergence, refine, reselect
from blindsight.cli import main
from blindsight.data.processors import model_inputs
from blindsight.evaluation.answering import divergence
from blindsight.evaluation.masked_model import ProfileMasking
from blindsight.evaluation.prefill import Decoder
from blindsight.evaluation.sweep_points import selection_of
from blindsight.profile import Profile
from blindsight.reference import reference_logits
from models import tiny_model
from processors import tiny_processor
from questions import rows, samples

NUM_LAYERS, NUM_HEADS = 2, 4


def model_and_profile() -> tuple[Any, Profile]:
    model = tiny_model("qwen2_5_vl", num_layers=NUM_LAYERS)
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(NUM_LAYERS, NUM_HEADS, 4, generator=generator)
    error[:, :, 0] = 0
    pairs = torch.tensor([100.0, 10.0, 50.0, 60.0]).expand_as(error).contiguous()
    noted = {"criterion": "output_error", "budget": "0.1", "allocation": "per_head"}
    bare = Profile.for_model(model, "dense")
    return model, replace(bare, evidence={"error": error, "pairs": pairs}, calibration=noted)


def run(**options: Any) -> Profile:
    model, profile = model_and_profile()
    options = {"budget": 0.05, "batch_size": 3, **options}
    return refine(model, tiny_processor(), samples(5), profile, **options)


def test_effects_are_those_of_the_reference() -> None:
    model, _ = model_and_profile()
    effect = run().evidence["effect"]
    for head, code in ((1, 1), (2, 3)):
        categories = torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.uint8)
        categories[0, head] = code
        tried, dense = (Profile.for_model(model, codes) for codes in (categories, "dense"))
        found = []
        for sample in samples(5):
            inputs = model_inputs(tiny_processor(), [sample])
            p, q = (reference_logits(model, inputs, x)[:, -1] for x in (dense, tried))
            found.append(float(divergence(p, q)))
        expected = (sum(found) / 5) ** 0.5
        assert float(effect[0, head, code]) == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-3


def test_the_last_layer_never_matters() -> None:
    """Nothing reads what its image tokens become; not even rounding differs."""
    effect = run().evidence["effect"]
    assert bool((effect[-1] == 0).all()) and bool((effect[0, :, 1:] > 0).all())
    assert bool((effect[:, :, 0] == 0).all())
    assert run(budget=0.0).categories[-1].tolist() == [1] * NUM_HEADS
    assert run(budget=0.0).categories[0].tolist() == [0] * NUM_HEADS


def test_a_layers_effect_is_shared_out_by_squared_error() -> None:
    model, profile = model_and_profile()
    effect = run(by="layer").evidence["effect"].double()
    decoder = Decoder(model, profile)
    sink = torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.uint8)
    sink[0] = 1
    (whole,) = mean_divergence(decoder, tiny_processor(), samples(5), [sink]).tolist()
    assert float((effect[0, :, 1] ** 2).sum()) == pytest.approx(whole, rel=1e-4)
    ratio = effect[0, :, 1:] / profile.evidence["error"][0, :, 1:].double()
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-4, atol=0)
    assert bool((effect[-1] == 0).all())


def test_the_profile_says_how_it_was_refined(tmp_path: Path) -> None:
    found = run(budget=0.02)
    assert found.calibration["criterion"] == "next_token"
    assert found.calibration["budget"] == "0.02"
    assert found.calibration["effect"] == "by head, 5 prompts"
    assert found.calibration["refinement_dataset"] == "list"
    select = selection_of(found)
    assert torch.equal(select(found.evidence, 0.02), found.categories)
    assert bool(select(found.evidence, 1e9).all())
    effect = found.evidence["effect"]
    chosen = effect.gather(2, found.categories.long()[..., None])
    assert bool((chosen <= 0.02).all())
    torch.testing.assert_close(found.evidence["margin"], 0.02 - effect)
    found.save(tmp_path / "refined.safetensors")
    assert Profile.load(tmp_path / "refined.safetensors") == found


def test_another_budget_needs_no_other_measurement() -> None:
    assert reselect(run(budget=0.02), 0.3) == run(budget=0.3)
    assert run(budget=0.02) != run(budget=0.3)
    with pytest.raises(ValueError, match="got no effect"):
        reselect(model_and_profile()[1], 0.3)


def test_batches_do_not_matter() -> None:
    one, other = run(batch_size=1).evidence["effect"], run(batch_size=5).evidence["effect"]
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_the_dense_model_has_no_divergence() -> None:
    model, profile = model_and_profile()
    decoder = Decoder(model, profile)
    dense = torch.zeros(NUM_LAYERS, NUM_HEADS, dtype=torch.uint8)
    assert mean_divergence(decoder, tiny_processor(), samples(2), [dense]).tolist() == [0.0]
    assert ProfileMasking(dense).key == ProfileMasking(dense.clone()).key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "token"}, "by must be one of head, layer, got 'token'"),
        ({"budget": -1.0}, "budget must be a number of at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_profile_without_evidence_is_named() -> None:
    model, _ = model_and_profile()
    with pytest.raises(ValueError, match="must hold the evidence of its calibration"):
        refine(model, tiny_processor(), samples(2), Profile.for_model(model, "sink"), budget=0.1)


def test_the_command_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, profile = model_and_profile()
    model.save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    profile.save(tmp_path / "profile.safetensors")
    with open(tmp_path / "data.jsonl", "w") as file:
        for at, row in enumerate(rows(3)):
            names = [f"{at}-{number}.png" for number in range(len(row["images"]))]
            for name, image in zip(names, row["images"], strict=True):
                image.save(tmp_path / name)
            del row["answer"]
            file.write(json.dumps({**row, "images": names}) + "\n")
    options = {
        "model": tmp_path / "model",
        "profile": tmp_path / "profile.safetensors",
        "data": tmp_path / "data.jsonl",
        "output": tmp_path / "refined.safetensors",
        "by": "layer",
    }
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    assert main(["refine", *arguments]) == 0
    found = Profile.load(tmp_path / "refined.safetensors")
    assert found.calibration["effect"] == "by layer, 3 prompts"
    assert found.digest[:8] in capsys.readouterr().out
