"""The kernels that Inductor writes for a GPU, on a machine without one: run, and assembled.

Each in a process of its own that pretends to have an H200, see :mod:`without_gpu`.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import without_gpu
from blindsight.attention import attend
from blindsight.base_mask import CAUSAL
from blindsight.mask_forms import ordered_mask, sorted_mask
from blindsight.template import find_sinks
from oracles import oracle_attention, oracle_keep

pytest.importorskip("triton", reason="needs triton, which the extra 'test' installs on Linux")
pytestmark = pytest.mark.inductor

MIXES = {"each": [0, 1, 2, 3], "dense": [0, 0, 0, 0], "document": [2, 2, 2, 2], "two": [3, 1, 1, 3]}
BASES = ("causal", "sliding", "padding")
WINDOW = 60


def template_of(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Text, then images of 40 tokens with 9 of text between; the second row is one token off."""
    rows = []
    for row in range(batch):
        position = (torch.arange(length) - 5 - row).clamp(min=-1)
        inside = (position >= 0) & (position % 49 < 40)
        rows.append(torch.where(inside, position // 49 + 1, 0))
    span_id = torch.stack(rows).to(torch.int32)
    return span_id, find_sinks(span_id, (0,))


def form_of(base: str, valid: Tensor) -> Any:
    if base == "sliding":
        return ("and", CAUSAL, ("lower", ("sub", ("index", "q"), WINDOW - 1)))
    if base == "padding":
        return ("and", CAUSAL, ("valid", ("load", valid, (("index", "b"), ("index", "k")))))
    return CAUSAL


def allowed_of(base: str, valid: Tensor) -> Tensor:
    """The base mask, element by element, ``[B, 1, L, L]``."""
    length = valid.shape[1]
    q, k = torch.arange(length)[:, None], torch.arange(length)
    allowed = (k <= q).expand(valid.shape[0], 1, -1, -1)
    if base == "sliding":
        allowed = allowed & (k > q - WINDOW)
    if base == "padding":
        allowed = allowed & valid[:, None, None, :]
    return allowed


def inputs_of(batch: int, length: int, head_dim: int, dtype: torch.dtype, mix: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def random(heads: int) -> Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(dtype)

    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, : length // 7] = False
    codes = torch.tensor(MIXES[mix], dtype=torch.int32)
    return [random(4), random(2), random(2), *template_of(batch, length), codes, valid]


def attention(base: str, order: str, batch: int, length: int | None) -> Callable[..., Tensor]:
    """One fused call; without a length, for all up to 512 tokens."""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        span_id: Tensor,
        is_sink: Tensor,
        codes: Tensor,
        valid: Tensor,
    ) -> Tensor:
        make: Any = sorted_mask if order == "sorted" else ordered_mask
        options: dict[str, Any] = {"num_queries": length, "num_keys": length}
        if length is None:
            options["capacity"] = 512
        mask = make(form_of(base, valid), span_id, is_sink, batch=batch, **options)
        heads = torch.arange(4, device=query.device)
        return attend(query, key, value, mask, heads, codes, (("all", 4),))

    return call


def error_of(found: Tensor, base: str, inputs: list[Tensor]) -> float:
    """The largest difference from the oracle in float64."""
    query, key, value, span_id, is_sink, codes, valid = inputs
    keep = torch.stack([oracle_keep(span_id, is_sink, code) for code in codes.tolist()], dim=1)
    exact = (x.double() for x in (query, key, value))
    expected = oracle_attention(*exact, keep & allowed_of(base, valid), query.shape[3] ** -0.5)
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max())


# Run in Triton's interpreter


def run_one(base: str, order: str, batch: int, length: int, mix: str) -> float:
    inputs = inputs_of(batch, length, 32, torch.float32, mix)
    run = without_gpu.compile_for_gpu(attention(base, order, batch, length), inputs)
    (found,) = run(*inputs)
    return error_of(found, base, inputs)


def run_many(base: str, batch: int, lengths: list[int]) -> list[float]:
    """One program at several lengths."""
    inputs = inputs_of(batch, lengths[0], 32, torch.float32, "each")
    function = attention(base, "sorted", batch, None)
    run = without_gpu.compile_for_gpu(function, inputs, any_length=lengths[0])
    errors = []
    for length in lengths:
        inputs = inputs_of(batch, length, 32, torch.float32, "each")
        (found,) = run(*inputs)
        errors.append(error_of(found, base, inputs))
    return errors


@pytest.mark.parametrize(
    ("base", "order", "batch", "length", "mix"),
    [
        ("causal", "sorted", 1, 203, "each"),
        ("padding", "sorted", 2, 203, "each"),
        pytest.param("sliding", "ordered", 1, 150, "each", marks=pytest.mark.nightly),
        pytest.param("sliding", "sorted", 2, 260, "two", marks=pytest.mark.nightly),
        pytest.param("padding", "ordered", 2, 203, "two", marks=pytest.mark.nightly),
        pytest.param("causal", "sorted", 1, 128, "document", marks=pytest.mark.nightly),
        pytest.param("causal", "ordered", 1, 203, "dense", marks=pytest.mark.nightly),
    ],
)
def test_the_kernel_computes_what_the_masks_mean(
    base: str, order: str, batch: int, length: int, mix: str
) -> None:
    arguments = (base, order, batch, length, mix)
    assert without_gpu.in_process("test_triton:run_one", *arguments, interpret=True) < 5e-6


def test_one_kernel_at_five_lengths() -> None:
    lengths = [203, 131, 64, 290, 17]
    errors = without_gpu.in_process("test_triton:run_many", "causal", 1, lengths, interpret=True)
    assert len(errors) == 5 and max(errors) < 5e-6


def run_with_a_fault() -> float:
    """The upper bounds one too large where a row sees anything."""
    import blindsight.mask_forms as forms
    from blindsight.intervals import SortedBounds

    bounds_of = forms.sorted_bounds

    def wrong(*args: Any, **kwargs: Any) -> Any:
        (lower, upper), order = bounds_of(*args, **kwargs)
        return SortedBounds(lower, torch.where(lower < upper, upper + 1, upper)), order

    forms.sorted_bounds = wrong
    return run_one("causal", "sorted", 1, 203, "each")


def test_a_fault_in_the_mask_is_seen() -> None:
    assert without_gpu.in_process("test_triton:run_with_a_fault", interpret=True) > 1e-2


# Assembled


def assemble_one(order: str, head_dim: int, any_length: bool) -> dict[str, Any]:
    inputs = inputs_of(1, 300, head_dim, torch.bfloat16, "each")
    function = attention("causal", order, 1, None if any_length else 300)
    program = without_gpu.lower(function, inputs, any_length=300 if any_length else None)
    return _found(program)


def assemble_eager(head_dim: int) -> dict[str, Any]:
    """Masked softmax as it is written out, the control."""
    inputs = inputs_of(1, 320, head_dim, torch.bfloat16, "each")

    def eager(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(2, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3)
        return torch.softmax(scores + scores.new_full((320, 320), -torch.inf).triu(1), -1) @ value

    return _found(without_gpu.lower(eager, inputs))


def _found(program: without_gpu.Program) -> dict[str, Any]:
    launches = program.launches
    flex = [name for name in launches if "flex_attention" in name]
    kernels = [
        vars(without_gpu.assemble(name, source))
        for name, source in program.kernels.items()
        if "flex_attention" in name
    ]
    return {
        "flex": len(flex),
        "products": [name for name in launches if re.search(r"(^|[._])b?mm($|[._])", name)],
        "kernels": kernels,
    }


@pytest.mark.parametrize(
    ("order", "head_dim", "any_length"),
    [
        ("sorted", 128, False),
        ("sorted", 128, True),
        pytest.param("ordered", 128, False, marks=pytest.mark.nightly),
        pytest.param("sorted", 256, False, marks=pytest.mark.nightly),
    ],
)
def test_a_call_is_one_launch_on_tensor_cores(order: str, head_dim: int, any_length: bool) -> None:
    found = without_gpu.in_process("test_triton:assemble_one", order, head_dim, any_length)
    assert found["flex"] == 1 and found["products"] == []
    (kernel,) = found["kernels"]
    assert kernel["hgmma"] + kernel["hmma"] > 0
    assert kernel["spilled"] == 0
    assert kernel["shared"] <= without_gpu.SHARED_MEMORY


def test_attention_that_is_written_out_is_no_single_launch() -> None:
    found = without_gpu.in_process("test_triton:assemble_eager", 128)
    assert found["flex"] == 0 and len(found["products"]) == 2
