"""Whole models as on a GPU: the programs that Inductor writes for one, run without one.

The decoder's own; what comes before it is the CPU's. Each in a process of its own that pretends to
have an H200, see :mod:`without_gpu`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import StaticCache

import without_gpu
from blindsight import blindsight_backend
from blindsight.attention.mask_forms import MaskForm
from blindsight.runtime import rewriting
from family_models import make_inputs, tiny_model, why_not_here
from models import Image, split_turns
from oracles import assert_close_to_reference, run_reference
from test_exactness import Case
from test_families import exact_copy, masks_of, profile_of, without_vision

pytest.importorskip("triton", reason="needs triton, which the extra 'test' installs on Linux")
pytestmark = pytest.mark.inductor
NIGHTLY = pytest.mark.nightly


@contextmanager
def as_on_gpu(form: str) -> Iterator[Any]:
    """Inside, rewritten graphs are compiled for a GPU, and run in Triton's interpreter."""
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(recompile_limit=64),  # Qwen3-VL's layers are compiled one by one
        mock.patch.object(rewriting, "best_mask_form", return_value=MaskForm[form]),
        without_gpu.inductor_for_gpu(),
        without_gpu.written() as programs,
    ):
        yield programs


def runs_of(backend: Any) -> list[str]:
    return sorted({how for row in backend.report().rows for how in row.runs})


def run_prompts(
    family: str, scenarios: list[str], dtype: str, form: str, lowering: str, any_length: bool
) -> dict[str, Any]:
    cases = [Case(family, getattr(torch, dtype), scenario) for scenario in scenarios]
    with as_on_gpu(form) as programs:
        model, backend = cases[0].compile("inductor", dynamic=any_length, lowering=lowering)
        for case in cases:
            case.check(model(**case.inputs, use_cache=False).logits)
    return {
        "lengths": [case.num_tokens for case in cases],
        "sparse": all(case.differs_from_dense() for case in cases),
        "runs": runs_of(backend),
        "flex": sum("triton_tem" in name for program in programs for name in program.kernels),
    }


@pytest.mark.parametrize(
    ("family", "scenarios", "num_kernels"),
    [
        pytest.param("gemma3", ["one_row"], 1, marks=NIGHTLY),
        # one for prompts of a single block, one for all others
        pytest.param("gemma3", ["one_row", "images_at_both_ends", "long"], 2, marks=NIGHTLY),
        pytest.param("qwen2_5_vl", ["one_row", "images_at_both_ends", "long"], 2, marks=NIGHTLY),
    ],
)
def test_a_model_of_any_length(
    in_process: Any, family: str, scenarios: list[str], num_kernels: int
) -> None:
    arguments = (family, scenarios, "float32", "SORTED", "fused", True)
    found = in_process("test_triton_models:run_prompts", *arguments, interpret=True)
    assert found["sparse"]
    assert found["runs"] == ["sparse, sorted, fused"]
    assert len(set(found["lengths"])) == len(scenarios)
    assert found["flex"] == num_kernels


@NIGHTLY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["SORTED", "ORDERED", "EXPRESSED", "MATERIALISED"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_model_of_fixed_length(in_process: Any, family: str, form: str, dtype: str) -> None:
    arguments = (family, ["left_padding"], dtype, form, "fused", False)
    found = in_process("test_triton_models:run_prompts", *arguments, interpret=True)
    assert found["sparse"]
    assert found["runs"] == [f"sparse, {form.lower()}, fused"]


@NIGHTLY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_model_whose_dense_heads_are_apart(
    in_process: Any, family: str, any_length: bool, dtype: str
) -> None:
    arguments = (family, ["one_row", "long"], dtype, "SORTED", "split", any_length)
    found = in_process("test_triton_models:run_prompts", *arguments, interpret=True)
    assert found["sparse"]
    assert found["runs"] == ["sparse, sorted, split"]


def run_turns(family: str, any_length: bool) -> dict[str, Any]:
    """On a static cache: Dynamo does not trace a dynamic one's first tensor on this device."""
    case = Case(family, torch.float32, "two_turns")
    split = case.num_tokens - Image().num_tokens - 3
    config = case.model.config.get_text_config()
    made = StaticCache(config=config, max_cache_len=case.num_tokens + 9)
    first, second = split_turns(case.model, case.inputs, split)
    with as_on_gpu("SORTED"):
        model, backend = case.compile("inductor", dynamic=any_length)
        output = model(**first, past_key_values=made, use_cache=True)
        case.check(output.logits, slice(0, split))
        output = model(**second, past_key_values=output.past_key_values, use_cache=True)
        case.check(output.logits, slice(split, None))
    return {"sparse": case.differs_from_dense(), "runs": runs_of(backend)}


@NIGHTLY
@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_second_turn(in_process: Any, family: str, any_length: bool) -> None:
    found = in_process("test_triton_models:run_turns", family, any_length, interpret=True)
    assert found["sparse"]
    assert found["runs"] == ["sparse, sorted, fused"]


def run_family(family: str, image_counts: list[int], any_length: bool) -> dict[str, Any]:
    """Whole prompts of tests/test_families.py, of different lengths."""
    model = without_vision(tiny_model(family))
    exact, profile = exact_copy(model), profile_of(model, family)
    with as_on_gpu("SORTED"):
        torch._dynamo.reset()
        backend = blindsight_backend(profile, lowering="fused")
        compiled = torch.compile(model, backend=backend, dynamic=any_length)
        for count in image_counts:
            inputs = make_inputs(family, count)
            masks = masks_of(profile, inputs)
            logits = compiled(**inputs, use_cache=False).logits
            references = [
                run_reference(each, *masks, inputs, use_cache=False).logits
                for each in (model, exact)
            ]
            valid = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
            assert_close_to_reference(logits, *references, valid)
    return {"runs": runs_of(backend)}


@NIGHTLY
@pytest.mark.skipif(bool(why_not_here("molmo2")), reason=why_not_here("molmo2"))
@pytest.mark.parametrize("any_length", [False, True])
def test_a_model_whose_images_see_each_other(in_process: Any, any_length: bool) -> None:
    arguments = ("molmo2", [4, 3] if any_length else [4], any_length)
    found = in_process("test_triton_models:run_family", *arguments, interpret=True)
    assert found["runs"] == ["sparse, grouped, fused"]
