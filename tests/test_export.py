"""Exported programs and packages of AOTInductor, against the reference and the compiled model."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import blindsight
from blindsight import Profile, blindsight_backend
from blindsight.exported import _without_partial_graph, decoder_inputs
from decoders import template_of
from models import (
    NUM_KV_HEADS,
    Image,
    make_inputs,
    skip_unless_traced_whole,
    tiny_model,
    valid_positions,
    without_vision,
)
from oracles import assert_close_to_reference, reference_copy, run_reference

CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 0]]

# Loads a package and runs it where nothing of ours can be imported.
RUN_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("blindsight", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(**prompt) for prompt in torch.load(inputs)], outputs)
assert not any(name.startswith(("blindsight", "transformers")) for name in sys.modules)
"""


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def case(family: str, num_layers: int = 2) -> tuple[Any, Profile, list[dict[str, torch.Tensor]]]:
    """A model, a profile, and two prompts of the same sizes with images in other places."""
    model = tiny_model(family, num_layers=num_layers)
    big = Image() if family == "gemma3" else Image(4, 3)
    prompts = [
        make_inputs(family, [[5, Image(), 4, big, Image(), 7]]),
        make_inputs(family, [[big, 9, Image(), 5, Image(), 2]], seed=1),
    ]
    return model, Profile.for_model(model, CATEGORIES[:num_layers]), prompts


def check(model: Any, profile: Profile, inputs: dict[str, torch.Tensor], logits: Any) -> None:
    template = template_of(inputs["input_ids"])
    references = [
        run_reference(m, profile.categories, *template, inputs, use_cache=False).logits
        for m in (model, reference_copy(model))
    ]
    dense = model(**inputs, use_cache=False).logits
    assert (dense - references[0]).abs().max() > 0.1
    assert_close_to_reference(logits, *references, valid_positions(inputs))


def outputs_alone(program: Any, examples: list[Any], folder: Path) -> list[torch.Tensor]:
    """Package a program, and return what it computes in a process without us."""
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2")
    )
    torch.save(examples, folder / "inputs.pt")
    command = [sys.executable, "-c", RUN_ALONE, package]
    command += [str(folder / name) for name in ("inputs.pt", "outputs.pt")]
    subprocess.run(command, check=True, cwd=folder)
    outputs: list[torch.Tensor] = torch.load(folder / "outputs.pt")
    return outputs


def example_of(family: str, model: Any, profile: Profile, inputs: Any) -> dict[str, torch.Tensor]:
    """The whole model's inputs where ``torch.export`` can trace it, else its decoder's."""
    return inputs if family == "gemma3" else decoder_inputs(model, profile, inputs)


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_program_equals_the_reference(family: str, lowering: str) -> None:
    skip_unless_traced_whole(family)
    model, profile, prompts = case(family)
    examples = [example_of(family, model, profile, prompt) for prompt in prompts]
    program = blindsight.export(model, profile, examples[0], lowering=lowering)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "flex_attention" in targets
    flex = next(node for node in program.graph.nodes if str(node.target) == "flex_attention")
    if lowering == "fused":  # grouped queries share their keys
        assert flex.args[1].meta["val"].shape[1] == NUM_KV_HEADS
    # Operators alone: nothing of ours is called any more.
    assert not any("blindsight" in getattr(n.target, "__module__", "") for n in program.graph.nodes)
    run = program.module()
    for prompt, example in zip(prompts, examples, strict=True):
        check(model, profile, prompt, run(**example))


def test_the_vision_tower_of_qwen_is_named_as_the_limit(capsys: Any) -> None:
    model, profile, prompts = case("qwen2_5_vl", 1)
    with pytest.raises(ValueError, match=r"traceable by torch.export.*blindsight.exported.decoder"):
        blindsight.export(model, profile, prompts[0])
    assert "def forward" not in "".join(capsys.readouterr())  # the graph, up to where it failed


def test_what_else_is_printed_is_passed_on(capsys: Any) -> None:
    class Failed(Exception):
        partial_fx_graph = "the graph"

    @_without_partial_graph()
    def fail() -> None:
        print("before", file=sys.stderr)
        print(Failed.partial_fx_graph, file=sys.stderr)
        raise Failed

    with pytest.raises(Failed):
        fail()
    with _without_partial_graph():
        print("after", file=sys.stderr)
    assert capsys.readouterr().err == "before\nafter\n"


def test_the_inputs_of_a_decoder_by_the_path_of_a_profile(tmp_path: Path) -> None:
    model, profile, prompts = case("qwen2_5_vl", 1)
    profile.save(tmp_path / "profile.safetensors")
    found = decoder_inputs(model, tmp_path / "profile.safetensors", prompts[0])
    expected = decoder_inputs(model, profile, prompts[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_decoder_that_takes_more_than_tensors() -> None:
    model, profile, prompts = case("gemma3", 1)
    with pytest.raises(ValueError, match=r"must take tensors, got {'attention_mask': 'dict'}"):
        decoder_inputs(model, profile, prompts[0])


def test_a_program_cannot_be_saved_yet(tmp_path: Path) -> None:
    """torch.export has no schema for the operator; a package of AOTInductor is the way."""
    from torch._export.serde.serialize import SerializeError

    model, profile, prompts = case("qwen2_5_vl", 1)
    program = blindsight.export(model, profile, decoder_inputs(model, profile, prompts[0]))
    with pytest.raises(SerializeError, match="flex_attention"):
        torch.export.save(program, tmp_path / "program.pt2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {n: v for n, v in x.items() if n != "is_sink"}, r"got no is_sink"),
        (lambda x: {"attention_mask": x["attention_mask"]}, r"input_ids or inputs_embeds, got att"),
    ],
)
def test_inputs_that_do_not_tell_the_images(change: Any, message: str) -> None:
    model, profile, prompts = case("qwen2_5_vl", 1)
    inputs = decoder_inputs(model, profile, prompts[0])
    with pytest.raises(ValueError, match=message):
        blindsight.export(model, profile, change(inputs))


def test_a_model_without_sdpa() -> None:
    model, profile, prompts = case("qwen2_5_vl", 1)
    inputs = decoder_inputs(model, profile, prompts[0])
    other = tiny_model("qwen2_5_vl", num_layers=1, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn must be one call .*='sdpa'"):
        blindsight.export(other, profile, inputs)


def test_a_layer_that_is_not_in_the_program() -> None:
    model, profile, prompts = case("qwen2_5_vl", 2)
    inputs = decoder_inputs(model, profile, prompts[0])
    model.model.language_model.layers[1].self_attn.forward = lambda hidden_states, **_: (
        hidden_states,
        None,
    )
    message = r"layers \[0, 1\] of the profile must be .*got layers \[0\]"
    with pytest.raises(ValueError, match=message):
        blindsight.export(model, profile, inputs)


def test_other_errors() -> None:
    model, profile, _ = case("qwen2_5_vl", 1)
    with pytest.raises(ValueError, match=r"num_layers=1.*num_layers=2"):
        blindsight.export(tiny_model("qwen2_5_vl"), profile, {})
    with pytest.raises(ValueError, match=r"'fused' or 'split' for an export, got 'auto'"):
        blindsight.export(model, profile, {}, lowering="auto")
    with pytest.raises(ValueError, match=r"must be in eval mode"):
        blindsight.export(model.train(), profile, {})


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("family", "lowering", "num_layers"),
    [
        ("qwen2_5_vl", "fused", 1),
        pytest.param("qwen2_vl", "split", 2, marks=pytest.mark.nightly),
        pytest.param("gemma3", "fused", 2, marks=pytest.mark.nightly),
        pytest.param("qwen3_vl", "fused", 2, marks=pytest.mark.nightly),
    ],
)
def test_a_package_runs_without_us(
    family: str, lowering: str, num_layers: int, tmp_path: Path
) -> None:
    skip_unless_traced_whole(family)
    model, profile, prompts = case(family, num_layers)
    examples = [example_of(family, model, profile, prompt) for prompt in prompts]
    program = blindsight.export(model, profile, examples[0], lowering=lowering)
    outputs = outputs_alone(program, examples, tmp_path)
    for prompt, logits in zip(prompts, outputs, strict=True):
        check(model, profile, prompt, logits)
    backend = blindsight_backend(profile, inner="eager", lowering=lowering)
    compiled = torch.compile(without_vision(model), backend=backend)
    for prompt, logits in zip(prompts, outputs, strict=True):
        expected = compiled(**prompt, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
