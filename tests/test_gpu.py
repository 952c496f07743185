"""On a GPU: real kernels, CUDA graphs, and what copies by CUDA streams.

Skipped without one. ``BLINDSIGHT_GPU_TESTS=cpu`` rehearses them on a CPU, but for what needs CUDA.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import blindsight
import questions
from blindsight import Profile, blindsight_backend
from blindsight.calibrate import calibrate
from blindsight.exported import decoder_inputs
from blindsight.tune import compile_alone
from fused_call import KERNELS, MORE_KERNELS, as_of_long_prompts, attention, errors_of, inputs_of
from models import FAMILIES, Image, generation_options, make_inputs, split_turns, tiny_model
from oracles import generate_reference, run_reference
from processors import tiny_processor
from test_any_length import Counting, check
from test_exactness import Case, case_of, model_of, runs_of
from test_export import case as case_of_export
from test_export import check as check_export
from test_export import outputs_alone
from test_families import check_compiled

DEVICE = os.environ.get("BLINDSIGHT_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU that CUDA sees",
    ),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs and streams are CUDA's own")
offloads = pytest.mark.skipif(
    DEVICE != "cuda" or torch.__version__ < (2, 12),
    reason="transformers copies by CUDA streams, which end torch 2.11's compiler in a segfault",
)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # The references round as float32 does. cuDNN's convolutions, of the vision towers, do not.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Qwen3-VL's layers are compiled one by one, and again for every shape.
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        yield


def to_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def compiled(case: Case, **options: Any) -> tuple[Any, Any]:
    """Return a case's model, compiled on the device, and its backend."""
    model = copy.deepcopy(case.model).to(DEVICE)
    backend = blindsight_backend(case.profile, **{"lowering": "fused", **options})
    return torch.compile(model, backend=backend), backend


@pytest.mark.parametrize("lowering", ["fused", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill(family: str, dtype: torch.dtype, lowering: str) -> None:
    """One length, another one (from which on the graph is for any), and a batch with padding."""
    cases = [case_of(family, dtype, name) for name in ("one_row", "long", "left_padding")]
    model, backend = compiled(cases[0], lowering=lowering)
    for case in cases:
        case.check(model(**to_device(case.inputs), use_cache=False).logits.cpu())
        assert case.differs_from_dense()
    assert runs_of(backend) == {"sparse"}


@needs_cuda
@pytest.mark.parametrize(
    "kernel", [*KERNELS, *MORE_KERNELS], ids=lambda kernel: "-".join(map(str, kernel))
)
def test_kernels_whose_buffers_are_padded(kernel: Any) -> None:
    """As in Triton's interpreter, with chunks and padded buffers, which long prompts have."""
    base, order, batch, length, mix, past, dtype = kernel
    inputs = inputs_of(batch, length, 32, getattr(torch, dtype), mix, base, past)
    on_device = [x.to(DEVICE) for x in inputs]
    with as_of_long_prompts():
        run: Any = compile_alone(attention(base, order, batch), on_device)
        (found,) = run(*on_device)
    error, of_eager = errors_of(found.cpu(), base, inputs)
    assert error < (2e-5 if dtype == "float32" else 2 * of_eager)


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4/large", "llama4", "kimi_k25", "internvl"])
def test_other_families(family: str) -> None:
    """Layers without attention, heads of two sizes, chunks, values narrower than keys."""
    check_compiled(family, inner="inductor", device=DEVICE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_turns(family: str, cache: str) -> None:
    case = case_of(family, torch.float32, "two_turns")
    config = case.model.config.get_text_config()
    made: Any = DynamicCache(config=config)
    if cache == "static":
        made = StaticCache(config=config, max_cache_len=case.num_tokens + 9)
    model, backend = compiled(case)
    split = case.num_tokens - Image().num_tokens - 3
    for turn, tokens in zip(
        split_turns(case.model, case.inputs, split),
        (slice(0, split), slice(split, None)),
        strict=True,
    ):
        output = model(**to_device(turn), past_key_values=made, use_cache=True)
        case.check(output.logits.cpu(), tokens)
    assert runs_of(backend) == {"sparse"}


def test_thirty_prompts_compile_attention_no_more_than_their_sizes_ask() -> None:
    """Nothing after the first whose tokens are a single block, number 8."""
    model = tiny_model("qwen2_5_vl", num_layers=2)
    profile = Profile.for_model(model, [[0, 1, 2, 3]] * 2)
    counting = Counting("inductor")
    backend = blindsight_backend(profile, inner=counting, lowering="fused")
    on_device = copy.deepcopy(model).to(DEVICE)
    on_device.model.language_model.compile(backend=backend)
    counts = []
    for number in range(30):
        num_images = 2 + number % 7 + (30 if number % 2 else 0)
        row = [piece for image in range(num_images) for piece in (3 + image % 5, Image(4, 8))]
        inputs = make_inputs("qwen2_5_vl", [[*row, 5 + number]], seed=number)
        logits = on_device(**to_device(inputs), use_cache=False).logits.cpu()
        if number % 5 == 0:
            check("qwen2_5_vl", profile, inputs, logits)
        counts.append(counting.sparse)
    assert counts[-1] == counts[8] <= 4


@pytest.mark.parametrize(
    "cache",
    [
        "dynamic",
        "static",
        pytest.param("offloaded", marks=offloads),
        pytest.param("offloaded_static", marks=offloads),
    ],
)
def test_generate(cache: str) -> None:
    case = case_of("qwen2_5_vl", torch.float32, "left_padding")
    options = generation_options(cache)
    plain = {name: value for name, value in options.items() if name != "cache_implementation"}
    args = case.model, case.categories, case.span_id, case.is_sink, case.inputs
    expected = generate_reference(*args, **plain)
    model = copy.deepcopy(case.model).to(DEVICE)
    backend = blindsight_backend(case.profile, lowering="fused")
    model.compile(backend=backend)
    found = model.generate(**to_device(case.inputs), **options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-3, rtol=1e-3)
    assert "sparse" in runs_of(backend)


@pytest.mark.parametrize(
    "mode", [pytest.param("reduce-overhead", marks=needs_cuda), "max-autotune-no-cudagraphs"]
)
def test_modes(mode: str) -> None:
    """Run often enough for CUDA graphs to be recorded and replayed, prompts in turn.

    Of the decoder: the vision tower computes an index on the CPU, and CUDA graphs refuse that.
    """
    cases = [case_of("qwen2_5_vl", torch.bfloat16, name) for name in ("one_row", "long")]
    model = copy.deepcopy(cases[0].model).to(DEVICE)
    backend = blindsight_backend(cases[0].profile, lowering="fused", mode=mode)
    model.model.language_model.compile(backend=backend)
    inputs = [to_device(case.inputs) for case in cases]
    for _ in range(4):
        for case, its in zip(cases, inputs, strict=True):
            case.check(model(**its, use_cache=False).logits.cpu())
    assert runs_of(backend) == {"sparse"}
    assert not counters["inductor"]["cudagraph_skips"]


@needs_cuda
def test_float8_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="of the extra 'compose'")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8")
    case = case_of("qwen2_5_vl", torch.bfloat16, "left_padding")
    model = copy.deepcopy(model_of("qwen2_5_vl", torch.bfloat16)).to(DEVICE)
    config = quantization.Float8WeightOnlyConfig()
    quantization.quantize_(model.model.language_model, config)
    args = case.categories, case.span_id.to(DEVICE), case.is_sink.to(DEVICE)
    inputs = to_device(case.inputs)
    expected = run_reference(model, *args, inputs, use_cache=False).logits.cpu()
    backend = blindsight_backend(case.profile, lowering="fused")
    found = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits.cpu()
    # As close as the quantised model is to itself without quantisation.
    scale = (expected - case.reference)[case.valid].abs().max()
    assert (found - expected)[case.valid].abs().max() < scale
    assert runs_of(backend) == {"sparse"}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_calibration(family: str) -> None:
    """Measures the same as on a CPU, gradients included."""
    model, processor = tiny_model(family), tiny_processor(family)
    samples = [row for row in questions.rows(6) if len(row["images"]) > 1]
    with torch.enable_grad():
        expected, found = (
            calibrate(copy.deepcopy(model).to(device), processor, samples, progress=False).evidence
            for device in ("cpu", DEVICE)
        )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.parametrize("lowering", ["fused", "split"])
def test_a_package_runs_without_us(lowering: str, tmp_path: Path) -> None:
    model, profile, prompts = case_of_export("qwen2_5_vl")
    on_device = copy.deepcopy(model).to(DEVICE)
    examples = [decoder_inputs(on_device, profile, to_device(prompt)) for prompt in prompts]
    program = blindsight.export(on_device, profile, examples[0], lowering=lowering)
    outputs = outputs_alone(program, examples, tmp_path)
    for prompt, logits in zip(prompts, outputs, strict=True):
        check_export(model, profile, prompt, logits.cpu())
