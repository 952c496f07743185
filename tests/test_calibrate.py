"""Calibration: what a budget chooses, resuming, and what is said of bad input."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from blindsight import blindsight_backend, compile_apart, modules
from blindsight.calibrate import (
    calibrate,
    evidence_of,
    few_prompts,
    find_sink_offsets,
    flops_cut,
    profile_of,
    select_categories,
)
from blindsight.calibration import measure as measuring
from blindsight.calibration.measurements import Measurements
from blindsight.cli import main
from blindsight.cli.calibrate import summary
from blindsight.data.processors import model_inputs
from blindsight.data.samples import Samples, load_samples
from blindsight.profile import Profile
from blindsight.reference import reference_logits
from blindsight.runtime.context import BlindsightWarning
from blindsight.template import TemplateRule
from models import tiny_model
from processors import tiny_processor

DENSE, SINK, DOCUMENT, DOCUMENT_SINK = range(4)
by_error = partial(select_categories, criterion="output_error")

PAIRS = torch.tensor([1000.0, 300.0, 400.0, 450.0])


def evidence_of_errors(error: Any, pairs: torch.Tensor = PAIRS) -> dict[str, torch.Tensor]:
    error = torch.as_tensor(error, dtype=torch.float32)
    return {"error": error, "lost_mass": error.flip(1), "pairs": pairs.expand_as(error)}


def measurements_of_errors(error: torch.Tensor) -> Measurements:
    """Of errors [N, L, H, C]."""
    num, layers, heads, _ = error.shape
    return Measurements(
        num_rows=torch.full((num,), 10.0),
        error=error,
        lost_mass=error / 2,
        mass=torch.full((num, layers, heads, 4), 0.25),
        offset_mass=torch.zeros(num, layers, heads, 9),
        effect=error / 4,
        pairs=PAIRS.expand(num, layers, 4),
    )


# Choosing.

losses = st.lists(
    st.lists(
        st.tuples(*[st.floats(0, 2, width=32)] * 3).map(lambda x: (0.0, *x)),
        min_size=3,
        max_size=3,
    ),
    min_size=2,
    max_size=2,
)
costs = st.tuples(*[st.integers(1, 1000)] * 3).map(lambda x: torch.tensor([1000.0, *x]))
budgets = st.floats(0, 3)


@given(losses, costs, budgets, budgets, st.sampled_from(["per_head", "global"]))
def test_a_larger_budget_never_costs_more(
    error: Any, pairs: torch.Tensor, a: float, b: float, allocation: str
) -> None:
    evidence = evidence_of_errors(error, pairs)
    small, large = (
        by_error(evidence, budget, allocation=allocation).long() for budget in sorted((a, b))
    )
    cost = evidence["pairs"].double()
    per_head = [cost.gather(2, chosen[..., None])[..., 0] for chosen in (small, large)]
    assert per_head[1].sum() <= per_head[0].sum()
    assert (per_head[1] <= per_head[0]).all()


@given(losses, costs, budgets)
def test_every_head_takes_the_cheapest_within_the_budget(
    error: Any, pairs: torch.Tensor, budget: float
) -> None:
    evidence = evidence_of_errors(error, pairs)
    chosen = by_error(evidence, budget)
    for layer in range(2):
        for head in range(3):
            loss, at = evidence["error"][layer, head].double(), int(chosen[layer, head])
            assert at == DENSE or loss[at] <= budget
            for other in (SINK, DOCUMENT, DOCUMENT_SINK):
                assert pairs[other] >= pairs[at] or loss[other] > budget


@given(losses, costs, budgets)
def test_a_global_budget_is_kept(error: Any, pairs: torch.Tensor, budget: float) -> None:
    evidence = evidence_of_errors(error, pairs)
    chosen = by_error(evidence, budget, allocation="global").long()
    spent = evidence["error"].double().gather(2, chosen[..., None]).square().mean().sqrt()
    assert spent <= budget * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("allocation", ["per_head", "global"])
def test_the_ends_of_the_knob(allocation: str) -> None:
    error = torch.rand(4, 3, 4) + 1e-6
    error[..., DENSE] = 0
    error[2, 1, DOCUMENT] = 0  # free
    evidence = evidence_of_errors(error)
    nothing = by_error(evidence, 0.0, allocation=allocation)
    assert nothing[2, 1] == DOCUMENT
    assert nothing.sum() == DOCUMENT
    everything = by_error(evidence, float("inf"), allocation=allocation)
    assert (everything == SINK).all()


def test_a_global_budget_is_spent_where_it_buys_most() -> None:
    error = torch.tensor([[[0, 0.5, 0.3, 0.2], [0, 0.1, 0.4, 0.05]]])
    # One step is affordable: it is the second head's, which saves more for less.
    chosen = by_error(evidence_of_errors(error), 0.08, allocation="global")
    assert chosen.tolist() == [[DENSE, SINK]]
    assert by_error(evidence_of_errors(error), 0.08).tolist() == [[DENSE, DOCUMENT_SINK]]


def test_criteria_and_wrong_arguments() -> None:
    evidence = evidence_of_errors([[[0, 1, 0.2, 0.1], [0, 0.05, 1, 0.3]]])
    assert by_error(evidence, 0.25).tolist() == [[DOCUMENT, SINK]]
    by_mass = select_categories(evidence, 0.25, criterion="attention_mass")
    assert by_mass.tolist() == [[SINK, DOCUMENT]]
    for arguments, message in (
        ({"budget": -1.0}, "budget must be a number of at least 0"),
        ({"budget": float("nan")}, "budget must be a number of at least 0"),
        ({"budget": 1.0, "criterion": "x"}, "criterion must be one of output_error, attention"),
        ({"budget": 1.0, "allocation": "x"}, "allocation must be one of per_head, global"),
    ):
        with pytest.raises(ValueError, match=message):
            select_categories(evidence, **{"criterion": "output_error", **arguments})
    with pytest.raises(ValueError, match="evidence must have error and pairs, got no pairs"):
        by_error({"error": evidence["error"]}, 1.0)


def test_a_quantile_sees_the_rare_prompt_that_a_mean_does_not() -> None:
    error = torch.full((20, 1, 1, 4), 0.01)
    error[7] = 0.9
    error[..., DENSE] = 0
    measurements = measurements_of_errors(error)
    config = tiny_model("qwen2_5_vl", num_layers=1).config
    for aggregate, expected in (("quantile", DENSE), ("mean", SINK)):
        evidence = evidence_of(measurements, aggregate=aggregate)
        assert by_error(evidence, 0.1).tolist() == [[expected]]
    spread = evidence_of(measurements)["error_spread"]
    assert torch.allclose(spread, error.std(0, correction=0))
    wide = measurements_of_errors(error.expand(-1, 1, 4, -1).contiguous())
    rule = TemplateRule.from_config(config)
    profile = profile_of(
        config, wide, rule=rule, budget=0.1, criterion="output_error", aggregate="mean"
    )
    assert profile.counts()[SINK] == 4
    assert torch.allclose(profile.evidence["margin"], 0.1 - profile.evidence["error"])
    assert flops_cut(profile) == pytest.approx(0.7)
    assert "70.0% less" in summary(profile, 3.0)
    with pytest.raises(ValueError, match="quantile must be in"):
        profile_of(config, wide, rule=rule, quantile=1.5)


def test_sinks_are_where_other_images_look() -> None:
    measurements = measurements_of_errors(torch.zeros(3, 2, 2, 4))
    mass = measurements.offset_mass
    mass[..., 3] = 0.4
    assert find_sink_offsets(measurements) == (3,)
    mass[..., 8] = 0.3
    assert find_sink_offsets(measurements) == (3, 2**20)
    mass[..., 0] = 0.25
    assert len(find_sink_offsets(measurements)) == 2


@pytest.mark.parametrize("budget", [0.0, 1.0, math.inf])
def test_what_is_not_a_number_fits_no_budget(budget: float) -> None:
    error = torch.tensor([[[0.0, math.nan, math.nan, math.nan], [0.0, math.nan, math.nan, 0.1]]])
    evidence = evidence_of_errors(error)
    expected = [[DENSE, DENSE if budget == 0 else DOCUMENT_SINK]]
    for allocation in ("per_head", "global"):
        assert by_error(evidence, budget, allocation=allocation).tolist() == expected


# Measuring.


def rows(num_rows: int = 4, num_images: int = 3) -> list[dict[str, Any]]:
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": "what?"}]
    return [
        {
            "images": [
                Image.new("RGB", (16, 16), (40 * n, 255 - 50 * m, 7)) for m in range(num_images)
            ],
            "messages": [{"role": "user", "content": content}],
        }
        for n in range(num_rows)
    ]


def test_an_interrupted_calibration_goes_on_to_the_same_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    file = tmp_path / "partial"
    rule = TemplateRule.from_config(model.config)
    whole_prober = measuring.Prober(model, rule, next_token=True)
    calls = 0

    class Interrupted:
        """One prober for all, which is compiled once; the third call of all is interrupted."""

        def __init__(self, model: Any, rule: Any, **options: Any) -> None:
            pass

        def __call__(self, inputs: Any) -> Measurements:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            return whole_prober(inputs)

        def close(self) -> None:
            pass

    monkeypatch.setattr(measuring, "Prober", Interrupted)
    options: dict[str, Any] = {"budget": 0.5, "checkpoint": file, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, processor, rows(), **options)
    assert file.exists()
    with pytest.raises(ValueError, match="with batch_size 1 and not 2"):
        calibrate(model, processor, rows(), batch_size=2, **options)
    with pytest.raises(ValueError, match="an unfinished one with other samples, num_samples 4"):
        calibrate(model, processor, rows(5), **options)
    resumed = calibrate(model, processor, rows(), **options)
    assert calls == 5  # two, the interrupted one, and the two that were left
    calls = 10
    fresh = calibrate(model, processor, rows(), **{**options, "checkpoint": None})
    assert calls == 14
    assert resumed == fresh
    resumed.save(tmp_path / "a")
    fresh.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Profile.load(tmp_path / "a") == fresh
    assert fresh.calibration["num_samples"] == fresh.calibration["num_samples_used"] == "4"
    again = calibrate(model, processor, rows(), **{**options, "budget": 0.0})
    assert calls == 14  # another budget needs no other measurement
    assert again.counts()[DENSE] == 0  # the last layer's images are read by nobody
    dense = by_error(again.evidence, 0.0)
    assert not dense.any()
    measured = calibrate(
        model, processor, rows(2), sink_offsets="measure", checkpoint=tmp_path / "c", progress=False
    )
    assert calls == 18
    assert 1 <= len(measured.rule.sink_offsets) <= 2
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="checkpoint must be one that calibration wrote"):
        calibrate(model, processor, rows(), **options)
    fresh.save(file)
    with pytest.raises(ValueError, match=r"got .* with format 'blindsight-profile'"):
        calibrate(model, processor, rows(), **options)


@pytest.mark.filterwarnings("error::blindsight.BlindsightWarning")
def test_fewer_prompts_than_the_quantile_can_tell_are_warned_of() -> None:
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    samples = load_samples([*rows(1), *rows(1, num_images=1)])
    with pytest.warns(BlindsightWarning, match=r"Only 1 prompt with .* 95% .* takes 20 to tell"):
        calibrate(model, processor, samples, progress=False)
    calibrate(model, processor, samples, aggregate="mean", progress=False)
    noted = {"quantile": "0.95", "num_samples_used": "19"}
    assert "Only 19 prompts" in few_prompts(noted)
    assert not few_prompts({**noted, "num_samples_used": "20"})
    assert not few_prompts({**noted, "quantile": "0.9"}) and not few_prompts({})


def test_bad_input_is_said_clearly(tmp_path: Path) -> None:
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    with pytest.raises(
        ValueError, match="at least two images, or frames of a video, got fewer in all of 2"
    ):
        calibrate(model, processor, rows(2, num_images=1), progress=False)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        calibrate(model, processor, [])
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        calibrate(model, processor, rows(1), num_samples=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        calibrate(model, processor, rows(1), batch_size=0)
    with pytest.raises(ValueError, match="sink_offsets must be ints or 'measure'"):
        calibrate(model, processor, rows(1), sink_offsets="found")
    with pytest.raises(ValueError, match=r"criterion must be one of output_error, .*, got 'mass'"):
        calibrate(model, processor, rows(1), criterion="mass")
    with pytest.raises(ValueError, match="aggregate must be one of quantile, mean"):
        calibrate(model, processor, rows(1), aggregate="median")
    with pytest.raises(ValueError, match=r"budget must be a number of at least 0, got '0.1'"):
        calibrate(model, processor, rows(1), budget="0.1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allocation must be one of per_head, global"):
        calibrate(model, processor, rows(1), allocation="perhead")
    with pytest.raises(ValueError, match=r"two images, .*, among the first 2, got none"):
        calibrate(model, processor, rows(2, num_images=1), sink_offsets="measure", progress=False)
    eager = tiny_model("gemma3", num_layers=1, attn_implementation="eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa', got 'eager'"):
        calibrate(eager, processor, rows(1))
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    text_model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="model must have a vision part, got 'llama'"):
        calibrate(text_model, processor, rows(1))


def test_inference_mode_around_it_is_no_matter() -> None:
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    expected = calibrate(model, processor, rows(1), progress=False)
    with torch.inference_mode():
        assert calibrate(model, processor, rows(1), progress=False) == expected


def test_under_autocast_it_measures_to_half_precision() -> None:
    model, processor = tiny_model("qwen2_5_vl"), tiny_processor("qwen2_5_vl")
    expected = calibrate(model, processor, rows(2), progress=False).evidence
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model, processor, rows(2), progress=False).evidence
    for name in ("error", "effect", "lost_mass"):
        scale = expected[name].max()
        assert 0 < (found[name] - expected[name]).abs().max() < 0.05 * scale


def test_the_model_stays_in_training_mode() -> None:
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    model.train()
    with pytest.raises(ValueError, match="two images"):
        calibrate(model, processor, rows(1, num_images=1), progress=False)
    assert model.training


# The command.


def save_rows(folder: Path, num_rows: int) -> None:
    folder.mkdir()
    lines = []
    for n, row in enumerate(rows(num_rows)):
        names = []
        for m, image in enumerate(row["images"]):
            names.append(f"{n}-{m}.png")
            image.save(folder / names[-1])
        lines.append(json.dumps({"images": names, "messages": row["messages"]}))
    (folder / "data.jsonl").write_text("\n".join(lines))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model with its processor, and a dataset, in one folder each."""
    tiny_model("gemma3", num_layers=1).save_pretrained(tmp_path / "model")
    tiny_processor("gemma3").save_pretrained(tmp_path / "model")
    save_rows(tmp_path / "data", 2)
    return tmp_path


def test_the_command_takes_a_rule(saved: Path) -> None:
    rule = replace(TemplateRule.from_config(tiny_model("gemma3").config), sink_offsets=(1,))
    (saved / "rule.json").write_text(rule.to_json())
    arguments = ["calibrate", "--model", str(saved / "model"), "--data", str(saved / "data")]
    output = saved / "profile.safetensors"
    assert main([*arguments, "-o", str(output), "--rule", str(saved / "rule.json")]) == 0
    assert Profile.load(output).rule == rule


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_the_command_and_the_function_choose_the_same_prompts(
    saved: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    save_rows(saved / "many", 8)
    chosen = []

    def measure(model: Any, processor: Any, samples: Samples, **_: Any) -> Measurements:
        chosen.append([sample.index for sample in samples])
        raise ValueError("seen")

    monkeypatch.setattr("blindsight.calibrate.measure", measure)
    arguments = ["calibrate", "--model", str(saved / "model"), "--data", str(saved / "many")]
    arguments += ["-o", str(saved / "profile.safetensors"), "--limit", "5"]
    assert main([*arguments, *([] if seed is None else ["--sample-seed", str(seed)])]) == 2
    model, processor = tiny_model("gemma3", num_layers=1), tiny_processor("gemma3")
    with pytest.raises(ValueError, match="seen"):
        calibrate(model, processor, saved / "many", num_samples=5, seed=seed)
    command, function = chosen
    assert command == function and len(set(command)) == 5
    assert (command == [0, 1, 2, 3, 4]) == (seed is None)


def test_the_command_writes_a_profile(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = saved / "profile.safetensors"
    arguments = ["calibrate", "--model", str(saved / "model"), "--data", str(saved / "data")]
    arguments += ["-o", str(output)]
    assert main([*arguments, "--budget", "0.9"]) == 0
    text = capsys.readouterr().out
    assert text.count("warning: Only ") == 1
    assert main(["show", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "warning: Only " in shown and "% of the attention FLOPs on its prompts" in shown
    assert f"saved to {output}\n" in text and "attention FLOPs" in text and "s each" in text
    profile = Profile.load(output)
    profile.validate(tiny_model("gemma3", num_layers=1))
    assert profile.calibration["budget"] == "0.9"
    assert main([*arguments, "--budget", "0"]) == 0
    text = capsys.readouterr().out
    assert f"saved to {output}, replacing profile {profile.digest[:12]}\n" in text
    weights = saved / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert main([*arguments, "-o", str(weights)]) == 2
    assert "a new file, or a profile to replace" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert set(profile.evidence) >= {"effect", "error", "error_spread", "margin", "mass", "pairs"}
    assert sorted(path.name for path in saved.iterdir()) == ["data", "model", output.name]
    assert load_samples(saved / "data")[1].images


@pytest.mark.parametrize(
    ("model", "data", "output", "message"),
    [
        ("model", "nothing", "p", "dataset must be a path that exists"),
        ("nothing", "data", "p", "model must be a path that exists"),
        ("llama", "data", "p", "model must have a vision part"),
        ("model", "data", "no/such/p", "output must be a file in an existing folder"),
    ],
)
def test_errors_of_the_command_are_one_line(
    saved: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    data: str,
    output: str,
    message: str,
) -> None:
    (saved / "llama").mkdir()
    LlamaConfig().save_pretrained(saved / "llama")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["--model", str(saved / model), "--data", str(saved / data)]
    assert main(["calibrate", *arguments, "-o", str(saved / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# What is compiled besides.


def compiled_in_place(model: Any, how: str) -> Any:
    part = model.model.language_model if how.startswith("decoder") else model
    if how.endswith("forward"):
        part.forward = torch.compile(part.forward, backend="eager")
        return model
    backend = blindsight_backend(Profile.for_model(model, "sink"), inner="eager")
    for each in part.layers if how == "decoder layers" else [part]:
        each.compile(backend=backend)
    with torch.no_grad():
        model(**model_inputs(tiny_processor(), list(load_samples(rows(1)))))
    return model


@pytest.mark.parametrize("how", ["model", "model.forward", "decoder", "decoder layers"])
def test_a_model_that_is_compiled_in_place_is_measured(how: str) -> None:
    processor = tiny_processor()
    expected = calibrate(tiny_model("qwen2_5_vl"), processor, rows(2), progress=False)
    model = compiled_in_place(tiny_model("qwen2_5_vl"), how)
    kept = model._compiled_call_impl, vars(model).get("forward")
    found = calibrate(model, processor, rows(2), progress=False)
    assert torch.equal(found.categories, expected.categories)
    torch.testing.assert_close(found.evidence, expected.evidence)
    assert (model._compiled_call_impl, vars(model).get("forward")) == kept


@pytest.mark.parametrize(
    ("most_left", "limit", "accumulated"),
    [(128, 4, 256), pytest.param(0, 8, 8, marks=pytest.mark.nightly)],
)
def test_a_calibrated_model_can_be_compiled_as_often_as_another(
    most_left: int, limit: int, accumulated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of images compiles some frames again, and Dynamo allows so many of one."""
    monkeypatch.setattr(compile_apart, "_MOST_LEFT", most_left)
    model, processor = tiny_model("qwen2_5_vl"), tiny_processor()
    prompts = [rows(1, num_images=number)[0] for number in range(2, limit + 4)]
    with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=accumulated):
        calibrate(model, processor, prompts, progress=False)
        profile = Profile.for_model(model, "document")
        backend = blindsight_backend(profile, inner="eager", lowering="fused")
        run = torch.compile(model, backend=backend)
        for prompt in prompts[:2]:
            inputs = model_inputs(processor, list(load_samples([prompt])))
            expected = reference_logits(model, inputs, profile)
            with torch.no_grad():
                torch.testing.assert_close(run(**inputs).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(0,), (), (3,), (5, 7), (2, 3, 4)])
def test_a_digest_sees_every_value_and_their_order(dtype: Any, shape: tuple[int, ...]) -> None:
    """In pieces, too, and where a weight is a part of a tensor."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(64, generator=generator).relu().to(dtype)
    weight = made[3 : 3 + math.prod(shape)].view(shape)
    changed = [flipped(weight, at) for at in range(weight.numel())]
    turned = [weight.flip(dim) for dim in range(len(shape) if len(shape) > 1 else 0)]
    with mock.patch.object(modules, "_AT_ONCE", 2):
        first, *others = (digest_of(each) for each in (weight, weight.clone(), *changed, *turned))
    assert others.count(first) == 1
    assert len(set(others)) == len(others)


def digest_of(weight: torch.Tensor) -> str:
    module = torch.nn.Module()
    module.register_buffer("weight", weight)
    return modules.digest_of_model(module)


def flipped(weight: torch.Tensor, at: int) -> torch.Tensor:
    result = weight.clone()
    result.view(-1)[at] = ~result.view(-1)[at] if weight.dtype == torch.bool else 9
    return result


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny_model("qwen2_5_vl", num_layers=1)
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(ValueError, match="logits of the next token must be numbers, got nan in"):
        calibrate(model, tiny_processor(), rows(1), progress=False)


@pytest.mark.parametrize("change", ["processor", "weights", "config"])
def test_measurements_of_something_else_are_not_gone_on_with(tmp_path: Path, change: str) -> None:
    model, processor = tiny_model("qwen2_5_vl"), tiny_processor()
    file = tmp_path / "partial"
    rule = TemplateRule.from_config(model.config)
    measuring.measure(model, processor, load_samples(rows(1)), rule=rule, checkpoint=file)
    if change == "processor":
        processor.image_processor.size["longest_edge"] //= 2
    elif change == "weights":  # of which most are the same
        model.model.language_model.layers[1].mlp.down_proj.weight.data[5:7] += 1
    else:
        model.config.text_config.rms_norm_eps = 0.1
    name = "another processor" if change == "processor" else "other weights or another dtype"
    with pytest.raises(ValueError, match=f"of this calibration, got an unfinished one with {name}"):
        measuring.measure(model, processor, load_samples(rows(1)), rule=rule, checkpoint=file)
