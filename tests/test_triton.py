"""The kernels that Inductor writes for a GPU, on a machine without one: run, and assembled.

Each in a process of its own that pretends to have an H200, see :mod:`without_gpu`.
"""

import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import without_gpu
from blindsight import Profile, blindsight_backend
from blindsight.attention.flex import kernel_options_of
from blindsight.passes.replace_attention import Capacity
from decoders import DecoderWithHead, check_decoder, decoder_prompt
from fused_call import KERNELS, MORE_KERNELS, as_of_long_prompts, attention, errors_of, inputs_of
from models import Image, tiny_model

pytest.importorskip("triton", reason="needs triton, which the extra 'test' installs on Linux")
pytestmark = pytest.mark.inductor

# Run in Triton's interpreter


def run_one(
    base: str, order: str, batch: int, length: int, mix: str, past: int, dtype: str
) -> tuple[float, float]:
    inputs = inputs_of(batch, length, 32, getattr(torch, dtype), mix, base, past)
    function = attention(base, order, batch)
    with as_of_long_prompts():
        (found,) = without_gpu.compile_for_gpu(function, inputs)(*inputs)
    return errors_of(found, base, inputs)


def run_all(kernels: list[Any]) -> list[Any]:
    """The errors of all kernels, or why there are none."""
    results: list[Any] = []
    for kernel in kernels:
        try:
            results.append(run_one(*kernel))
        except Exception:
            results.append(traceback.format_exc())
    return results


def run_many(
    prompts: list[tuple[int, int]], num_keys: int | None, capacity: Capacity
) -> list[float]:
    """One program at several lengths, after several numbers of tokens in a cache."""
    run, errors = None, []
    for length, past in prompts:
        inputs = inputs_of(1, length, 32, torch.float32, "each", past=past)
        given = inputs
        if num_keys is not None:  # of a static cache; what is not filled must not be seen
            kept = (pad(x, (0, 0, 0, num_keys - length), value=1e4) for x in inputs[1:3])
            given = [inputs[0], *kept, *inputs[3:]]
        if run is None:
            function = attention("causal", "sorted", 1, capacity)
            sizes = {length, length - past}
            run = without_gpu.compile_for_gpu(function, given, symbolic=sorted(sizes))
        (found,) = run(*given)
        errors.append(errors_of(found, "causal", inputs)[0])
    return errors


@pytest.mark.parametrize(
    "kernels",
    [KERNELS, pytest.param(MORE_KERNELS, marks=pytest.mark.nightly)],
    ids=["usual", "more"],
)
def test_the_kernels_compute_what_the_masks_mean(in_process: Any, kernels: Any) -> None:
    """One test, so that one process runs them all: beginning takes longer than a kernel does."""
    wrong = {}
    for kernel, found in zip(
        kernels, in_process("test_triton:run_all", kernels, interpret=True), strict=True
    ):
        if isinstance(found, str):
            wrong[kernel] = found
            continue
        error, of_eager = found
        if not error < (5e-6 if kernel[-1] == "float32" else 2 * of_eager):
            wrong[kernel] = f"error {error}, of eager attention {of_eager}"
    assert not wrong, "\n".join(f"{kernel}: {why}" for kernel, why in wrong.items())


@pytest.mark.parametrize(
    ("lengths", "pasts", "num_keys", "capacity"),
    [
        ([203, 131, 129, 290, 384], [0] * 5, None, (None, None)),
        # what comes after a cache that has grown, and after one of fixed length
        pytest.param(
            [290, 203, 384], [101, 60, 205], None, (None, None), marks=pytest.mark.nightly
        ),
        pytest.param([203, 131, 64, 290, 17], [0] * 5, None, (512, 512), marks=pytest.mark.nightly),
        pytest.param([290, 300, 203], [101, 11, 60], 384, (None, None), marks=pytest.mark.nightly),
        pytest.param([290, 203, 384], [101, 200, 5], 512, (512, None), marks=pytest.mark.nightly),
    ],
)
def test_one_kernel_at_many_lengths(
    in_process: Any, lengths: list[int], pasts: list[int], num_keys: int | None, capacity: Any
) -> None:
    prompts = list(zip(lengths, pasts, strict=True))
    errors = in_process("test_triton:run_many", prompts, num_keys, capacity, interpret=True)
    assert len(errors) == len(lengths) and max(errors) < 5e-6


def run_with_a_fault() -> float:
    """The upper bounds one too large where a row sees anything."""
    import blindsight.attention.mask_forms as forms
    from blindsight.attention.intervals import SortedBounds

    bounds_of = forms.sorted_bounds

    def wrong(*args: Any, **kwargs: Any) -> Any:
        (lower, upper), order = bounds_of(*args, **kwargs)
        return SortedBounds(lower, torch.where(lower < upper, upper + 1, upper)), order

    forms.sorted_bounds = wrong
    return run_one(*MORE_KERNELS[0])[0]


def test_a_fault_in_the_mask_is_seen(in_process: Any) -> None:
    assert in_process("test_triton:run_with_a_fault", interpret=True) > 1e-2


def cached(orders: list[str]) -> dict[str, Any]:
    """What Inductor's cache says of one call in each order: hits, misses, bypasses."""
    from torch._dynamo.utils import counters

    found = {}
    caches = {"force_disable_caches": False, "fx_graph_cache": True}
    inputs = inputs_of(1, 203, 32, torch.float32, "each")
    for order in orders:
        counters.clear()
        with torch._inductor.config.patch(caches):
            without_gpu.lower(attention("causal", order, 1), inputs)
        kinds = ("hit", "miss", "bypass")
        found[order] = [counters["inductor"]["fxgraph_cache_" + kind] for kind in kinds]
    return found


def test_inductors_cache_has_a_key_for_each_call(in_process: Any) -> None:
    """Whatever the graph of a GPU's mask notes, such as annotations that are strings."""
    orders = ["sorted", "ordered", "expressed", "materialised"]
    assert in_process("test_triton:cached", orders) == {key: [0, 1, 0] for key in orders}


# The whole program of a decoder

DECODER_PROMPTS = [
    [5, Image(6, 8), 4, Image(8, 8), 20, Image(4, 5), 7],
    [30, Image(4, 5), Image(6, 8), 25, Image(8, 8)],
    [3, Image(4, 5), 44, Image(8, 8), 7],
]


def run_decoder(categories: list[list[int]], num_prompts: int) -> dict[str, Any]:
    """Compile and run a decoder as on a GPU, all Triton kernels of it in the interpreter.

    With several prompts, the program is for any length.
    """
    model = tiny_model("qwen2_5_vl")
    profile = Profile.for_model(model, categories)
    backend = blindsight_backend(profile, lowering="fused")
    compiled = torch.compile(
        DecoderWithHead(model), backend=backend, fullgraph=True, dynamic=num_prompts > 1
    )
    lengths = []
    with (
        torch.no_grad(),
        without_gpu.inductor_for_gpu() as largest,
        without_gpu.written() as programs,
    ):
        for prompt in DECODER_PROMPTS[:num_prompts]:
            inputs = decoder_prompt([prompt])
            logits = compiled(**inputs)
            check_decoder(model, profile, inputs, logits)
            lengths.append(inputs["input_ids"].shape[1])
    kernels = [kernel for program in programs for kernel in program.kernels.items()]
    return {
        "flex": [source for name, source in kernels if "triton_tem" in name],
        "num_kernels": len(kernels),
        "largest": largest.num_elements,
        "lengths": lengths,
        "runs": [how for row in backend.report().rows for how in row.runs.items()],
    }


@pytest.mark.parametrize(
    "num_prompts", [pytest.param(1, marks=pytest.mark.nightly), len(DECODER_PROMPTS)]
)
def test_a_decoder_is_as_its_reference(in_process: Any, num_prompts: int) -> None:
    """With one kernel, and nothing that is as large as a mask; for one length, and for any."""
    categories = [[0, 1, 2, 3], [3, 2, 1, 0]]
    found = in_process("test_triton:run_decoder", categories, num_prompts, interpret=True)
    assert len(found["flex"]) == 1 and found["num_kernels"] > 10
    assert len(set(found["lengths"])) == num_prompts
    order = "sorted" if num_prompts > 1 else "ordered"  # which of them lists less, for one prompt
    assert found["runs"] == [[f"sparse, {order}, fused", num_prompts]] * 2
    assert found["largest"] < max(found["lengths"]) ** 2


@pytest.mark.nightly
def test_one_kernel_for_all_categories(in_process: Any) -> None:
    several = ([[0, 1, 2, 3], [3, 2, 1, 0]], [[2, 2, 1, 1], [3, 0, 3, 3]])
    first, second = (
        in_process("test_triton:run_decoder", categories, 1, interpret=True)["flex"]
        for categories in several
    )
    assert first == second


# Assembled

# More than 4 heads of 256 have: no buffer of a call is as large as a mask by chance. Two chunks.
LENGTH = 2100


def assemble_one(order: str, head_dim: int, any_length: bool) -> dict[str, Any]:
    inputs = inputs_of(1, LENGTH, head_dim, torch.bfloat16, "each")
    symbolic = [LENGTH] if any_length else []
    return _found(without_gpu.lower(attention("causal", order, 1), inputs, symbolic=symbolic))


def assemble_eager(head_dim: int) -> dict[str, Any]:
    """Masked softmax as it is written out, the control."""
    inputs = inputs_of(1, LENGTH, head_dim, torch.bfloat16, "each")

    def eager(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3)
        hidden = scores.new_full((LENGTH, LENGTH), -torch.inf).triu(1)
        return torch.softmax(scores + hidden, -1) @ value

    return _found(without_gpu.lower(eager, inputs))


def _found(program: without_gpu.Program) -> dict[str, Any]:
    kernels = [
        vars(without_gpu.assemble(name, source))
        for name, source in program.kernels.items()
        if "triton_tem" in name
    ]
    return {
        "flex": sum("triton_tem" in name for name in program.launches),
        "operators": [name for name in program.launches if not name.startswith("triton_")],
        "largest": program.largest_buffer(LENGTH),
        "kernels": kernels,
    }


@pytest.mark.parametrize(
    ("order", "head_dim", "any_length"),
    [
        ("sorted", 128, False),
        pytest.param("sorted", 64, True, marks=pytest.mark.nightly),
        pytest.param("sorted", 64, False, marks=pytest.mark.nightly),
        pytest.param("ordered", 64, False, marks=pytest.mark.nightly),
        pytest.param("sorted", 128, True, marks=pytest.mark.nightly),
        pytest.param("ordered", 128, False, marks=pytest.mark.nightly),
        pytest.param("sorted", 256, False, marks=pytest.mark.nightly),
        pytest.param("sorted", 256, True, marks=pytest.mark.nightly),
        pytest.param("ordered", 256, False, marks=pytest.mark.nightly),
    ],
)
def test_a_call_is_one_launch_on_tensor_cores(
    in_process: Any, order: str, head_dim: int, any_length: bool
) -> None:
    found = in_process("test_triton:assemble_one", order, head_dim, any_length)
    assert found["flex"] == 1
    assert set(found["operators"]) <= {"aten.scatter_.src", "aten.scatter_reduce_.two"}  # of rows
    assert found["largest"] < LENGTH**2
    (kernel,) = found["kernels"]
    assert kernel["hgmma"] + kernel["hmma"] > 0
    # A few bytes are no loss: the tile of head dim 256 was timed against one that spills none.
    assert kernel["spilled"] <= (160 if head_dim == 256 else 0)
    assert kernel["shared"] <= without_gpu.SHARED_MEMORY


def test_attention_that_is_written_out_is_no_single_launch(in_process: Any) -> None:
    found = in_process("test_triton:assemble_eager", 128)
    assert found["flex"] == 0 and found["largest"] >= LENGTH**2
    assert found["operators"] == ["extern_kernels.bmm"] * 2


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "length", "max_autotune", "is_ours"),
    [
        ("cuda", (9, 0), torch.bfloat16, 300, False, True),
        ("cuda", (9, 0), torch.float16, 128, False, True),
        ("cuda", (9, 0), torch.float32, 300, False, False),
        ("cuda", (9, 0), torch.bfloat16, 127, False, False),
        ("cuda", (9, 0), torch.bfloat16, 300, True, False),
        ("cuda", (8, 0), torch.bfloat16, 300, False, False),
        ("cuda", (10, 0), torch.bfloat16, 300, False, False),
        ("cpu", (9, 0), torch.bfloat16, 300, False, False),
    ],
)
def test_tiles_are_for_hopper_alone(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    length: int,
    max_autotune: bool,
    is_ours: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    query: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with torch._inductor.config.patch(max_autotune=max_autotune):
        for head_dim in (64, 96, 128, 256):
            query.shape = (1, 4, length, head_dim)
            options = kernel_options_of(query)
            assert options.get("USE_TMA", False) == is_ours
            assert ("BLOCK_M" in options) == (is_ours and head_dim != 96)
