"""What keeps compile time down: attention that layers share, and masks made by an operator."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blindsight import HeadCategory, Profile, blindsight_backend
from blindsight.base_mask import CAUSAL, Form
from blindsight.inner import Inner
from blindsight.mask_forms import ordered_mask, sorted_mask
from blindsight.mask_operator import (
    _ordered_mask,
    _sorted_mask,
    _write,
    ordered_mask_by_operator,
    sorted_mask_by_operator,
)
from blindsight.region import call_in_region
from decoders import PROMPT, DecoderWithHead, check_decoder, decoder_prompt
from models import tiny_model
from strategies import templates

SMALL: dict[str, Any] = {"max_spans": 4, "max_span": 40, "max_text": 20}
MIXED = [category.value for category in HeadCategory]


def windowed(span_id: Tensor) -> Form:
    """Causal, the last five tokens, the last column padded: with a tensor and a number in it."""
    length = span_id.shape[1]
    valid = torch.arange(length).expand(span_id.shape) < length - 1
    column = ("load", valid, (("index", "b"), ("index", "k")))
    first = ("sub", ("index", "q"), 4)
    return ("and", CAUSAL, ("lower", first), ("valid", column))


def tensors_of(mask: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tuple(mask))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@given(templates(**SMALL), st.booleans(), st.booleans())
def test_the_operator_makes_the_same_mask(template: Any, is_windowed: bool, is_stretched: bool):
    span_id, is_sink = template.span_id, template.is_sink
    length = span_id.shape[1]
    form = windowed(span_id) if is_windowed else CAUSAL
    given_ = (form, span_id, is_sink)
    sizes = {"batch": span_id.shape[0], "num_queries": length, "num_keys": length}
    pairs = [(ordered_mask, ordered_mask_by_operator, sizes)]
    if is_stretched:
        sizes = {**sizes, "num_queries": None, "num_keys": None, "capacity": length + 70}
    pairs.append((sorted_mask, sorted_mask_by_operator, sizes))
    for traced, by_operator, its_sizes in pairs:
        expected, found = (tensors_of(make(*given_, **its_sizes)) for make in (traced, by_operator))
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@settings(max_examples=5)
@given(templates(**SMALL))
def test_what_a_compiler_is_told_of_the_operator_is_so(template: Any) -> None:
    span_id, is_sink = template.span_id, template.is_sink
    length = span_id.shape[1]
    checks = ("test_schema", "test_faketensor")
    text, tensors = _write(windowed(span_id))
    args = (text, tensors, span_id, is_sink, span_id.shape[0])
    torch.library.opcheck(_ordered_mask, (*args, length, length), test_utils=checks)
    for sizes in ((length, length, None), (None, None, length + 70)):
        torch.library.opcheck(_sorted_mask, (*args, *sizes), test_utils=checks)


def test_a_form_that_is_not_all_known_is_traced() -> None:
    assert _write(("upper", ("add", ("index", "q"), object()))) is None
    assert _write(("upper", ("add", ("index", "q"), float("inf")))) is None


def test_constants_that_are_only_equal_are_told_apart() -> None:
    def kind_of(x: Tensor, constant: object) -> tuple[Tensor]:
        return (x + (10 if constant is True else 20),)

    zero = torch.zeros(1)
    found = [call_in_region("k", kind_of, zero, item)[0].item() for item in (1, True, 1.0)]
    assert found == [20, 10, 20]


@pytest.mark.inductor
def test_layers_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    codes: list[str] = []
    monkeypatch.setattr(GraphLowering, "save_output_code", staticmethod(codes.append))
    model = tiny_model("qwen2_5_vl", num_layers=3)
    profile = Profile.for_model(model, [MIXED] * 3)
    backend = blindsight_backend(profile, lowering="fused")
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = torch.compile(DecoderWithHead(model), backend=backend)
        inputs = decoder_prompt([PROMPT])
        check_decoder(model, profile, inputs, compiled(**inputs))
    (code,) = codes
    kernels = [line for line in code.splitlines() if "async_compile.cpp" in line]
    assert sum("flex_attention" in line for line in kernels) == 1
    assert "torch.ops.blindsight.ordered_mask" in code
    assert not any("cumsum" in line for line in kernels)  # nothing of the mask is compiled


@pytest.mark.parametrize(
    ("inner", "takes"),
    [
        (Inner("inductor", {}), True),
        (Inner("inductor", {"mode": "max-autotune-no-cudagraphs"}), True),
        (Inner("inductor", {"options": {"cpp_wrapper": True}}), False),
        (Inner("inductor", {"config_patches": {"cpp_wrapper": True}}), False),
        (Inner("aot_eager", {}), False),
        (Inner(lambda gm, inputs: gm, {}), False),
    ],
)
def test_who_takes_regions(inner: Inner, takes: bool) -> None:
    assert inner.takes_regions is takes
