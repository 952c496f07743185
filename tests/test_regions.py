"""What keeps compile time down: attention that layers share, and masks made by an operator."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from blindsight import HeadCategory, Profile, blindsight_backend
from blindsight.attention.base_mask import CAUSAL, Form
from blindsight.attention.mask_forms import ordered_mask, sorted_mask
from blindsight.attention.mask_operator import (
    _ordered_mask,
    _read,
    _sorted_mask,
    _write,
    ordered_mask_by_operator,
    sorted_mask_by_operator,
)
from blindsight.attention.region import call_in_region
from blindsight.runtime.inner import Inner
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
        sizes = {**sizes, "query_capacity": length + 70, "key_capacity": length + 9}
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
    args = (*_write(windowed(span_id)), span_id, is_sink, span_id.shape[0], length, length)
    torch.library.opcheck(_ordered_mask, args, test_utils=checks)
    for capacities in ((None, None), (length + 70, length + 9), (None, length)):
        for by_group in (False, True):
            given = (*args, *capacities, by_group)
            torch.library.opcheck(_sorted_mask, given, test_utils=checks)


def test_numbers_that_are_not_known_yet_are_arguments_of_the_operator() -> None:
    env = ShapeEnv()
    symbol = env.create_symbol(7, ConstantSource("past"), dynamic_dim=DimDynamic.DYNAMIC)
    past = env.create_symintnode(symbol, hint=7)
    valid = torch.ones(3)
    row = ("add", ("index", "q"), past)
    text, tensors, numbers = _write(("and", ("upper", row), ("valid", valid), ("lower", row)))
    assert tensors == [valid] and numbers == [past, past] and not env.guards
    read = _read(text, tensors, [7, 8])
    assert read[1][1] == ("add", ("index", "q"), 7) and read[3][1][2] == 8
    assert read[2][1] is valid


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
