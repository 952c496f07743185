"""Whole models as on a GPU: the programs that Inductor writes for one, run without one.

The decoder's own; what comes before it is the CPU's. Each in a process of its own that pretends to
have an H200, see :mod:`without_gpu`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import StaticCache

import without_gpu
from blindsight import blindsight_backend, compiled_graph
from blindsight.passes import replace_attention
from blindsight.passes.replace_attention import MaskForm
from models import Image, split_turns
from oracles import error_bound
from test_exactness import Case, compile_vision

pytest.importorskip("triton", reason="needs triton, which the extra 'test' installs on Linux")
pytestmark = pytest.mark.inductor
NIGHTLY = pytest.mark.nightly


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Of :mod:`without_gpu`; what all processes need is built once."""
    folder = tmp_path_factory.mktemp("without_gpu")
    return partial(without_gpu.in_process, folder=folder, interpret=True)


@contextmanager
def as_on_gpu(form: str) -> Iterator[Any]:
    """Inside, rewritten graphs are compiled for a GPU, and run in Triton's interpreter."""
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(recompile_limit=64),  # Qwen3-VL's layers are compiled one by one
        # masks are traced for a GPU, and short prompts are long here
        mock.patch.dict(replace_attention._BY_OPERATOR, replace_attention._MAKE_MASK),
        mock.patch.object(compiled_graph, "capacity_of", return_value=None),
        mock.patch.object(compiled_graph, "best_form", return_value=MaskForm[form]),
        without_gpu.inductor_for_gpu(),
        without_gpu.written() as programs,
    ):
        yield programs


def compile_model(case: Case, lowering: str = "fused", **options: Any) -> tuple[Any, Any]:
    compile_vision(case.model, False)
    backend = blindsight_backend(case.profile, model=case.model_if_needed, lowering=lowering)
    return torch.compile(case.model, backend=backend, **options), backend


def found_of(case: Case, logits: torch.Tensor, tokens: slice = slice(None)) -> list[float]:
    """The error of some tokens of the prompt, and its bound."""
    valid = case.valid[:, tokens]
    reference64 = case.reference64[:, tokens][valid]
    bound = error_bound(reference64, case.reference[:, tokens][valid])
    return [float((logits[valid] - reference64).abs().max()), bound]


def runs_of(backend: Any) -> list[str]:
    return sorted({how for row in backend.report().rows for how in row.runs})


def run_prompts(
    family: str, scenarios: list[str], dtype: str, form: str, lowering: str, any_length: bool
) -> dict[str, Any]:
    cases = [Case(family, getattr(torch, dtype), scenario) for scenario in scenarios]
    with as_on_gpu(form) as programs:
        model, backend = compile_model(cases[0], lowering, dynamic=any_length)
        found = [found_of(case, model(**case.inputs, use_cache=False).logits) for case in cases]
    return {
        "found": found,
        "lengths": [case.num_tokens for case in cases],
        "sparse": all(case.differs_from_dense() for case in cases),
        "runs": runs_of(backend),
        "flex": sum("triton_tem" in name for program in programs for name in program.kernels),
    }


def check_found(found: dict[str, Any], runs: list[str]) -> None:
    for error, bound in found["found"]:
        assert error < bound
    assert found["sparse"]
    assert found["runs"] == runs


@pytest.mark.parametrize(
    ("family", "scenarios", "num_kernels"),
    [
        ("gemma3", ["one_row"], 1),
        # for prompts of less than 128 tokens there is another kernel
        pytest.param("gemma3", ["one_row", "images_at_both_ends", "long"], 2, marks=NIGHTLY),
        pytest.param("qwen2_5_vl", ["one_row", "images_at_both_ends", "long"], 2, marks=NIGHTLY),
    ],
)
def test_a_model_of_any_length(
    in_process: Any, family: str, scenarios: list[str], num_kernels: int
) -> None:
    arguments = (family, scenarios, "float32", "SORTED", "fused", True)
    found = in_process("test_triton_models:run_prompts", *arguments)
    check_found(found, ["sparse, sorted, fused"])
    assert len(set(found["lengths"])) == len(scenarios)
    assert found["flex"] == num_kernels


@NIGHTLY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["SORTED", "ORDERED", "EXPRESSED", "MATERIALISED"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_model_of_fixed_length(in_process: Any, family: str, form: str, dtype: str) -> None:
    arguments = (family, ["left_padding"], dtype, form, "fused", False)
    found = in_process("test_triton_models:run_prompts", *arguments)
    check_found(found, [f"sparse, {form.lower()}, fused"])


@NIGHTLY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("any_length", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_model_whose_dense_heads_are_apart(
    in_process: Any, family: str, any_length: bool, dtype: str
) -> None:
    arguments = (family, ["one_row", "long"], dtype, "SORTED", "split", any_length)
    found = in_process("test_triton_models:run_prompts", *arguments)
    check_found(found, ["sparse, sorted, split"])


def run_turns(family: str) -> dict[str, Any]:
    """On a static cache: Dynamo does not trace a dynamic one's first tensor on this device."""
    case = Case(family, torch.float32, "two_turns")
    split = case.num_tokens - Image().num_tokens - 3
    config = case.model.config.get_text_config()
    made = StaticCache(config=config, max_cache_len=case.num_tokens + 9)
    first, second = split_turns(case.model, case.inputs, split)
    with as_on_gpu("SORTED"):
        model, backend = compile_model(case)
        output = model(**first, past_key_values=made, use_cache=True)
        found = [found_of(case, output.logits, slice(0, split))]
        output = model(**second, past_key_values=output.past_key_values, use_cache=True)
        found.append(found_of(case, output.logits, slice(split, None)))
    return {"found": found, "sparse": case.differs_from_dense(), "runs": runs_of(backend)}


@NIGHTLY
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_a_second_turn(in_process: Any, family: str) -> None:
    found = in_process("test_triton_models:run_turns", family)
    check_found(found, ["sparse, sorted, fused"])
