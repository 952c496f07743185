"""What the probe measures, against fp64 and the definitions; and that it changes nothing."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import oracles
import pretend
from blindsight.attention.base_mask import CAUSAL
from blindsight.calibrate import evidence_of, find_sink_offsets, select_categories
from blindsight.calibration.probe import REGIONS, Losses, ProbedCall, measure_losses
from blindsight.calibration.probe_layout import NUM_OFFSETS
from blindsight.calibration.prober import Prober, measurements_of
from blindsight.calibration.visibility import (
    IntervalVisibility,
    Visibility,
    visibility_of_expression,
    visibility_of_form,
    visibility_of_tensor,
)
from blindsight.passes.find_attention import find_attention
from blindsight.passes.lift_mask import lift_mask
from blindsight.passes.probe_attention import probe_attention_pass
from blindsight.template import TemplateRule, find_sinks
from models import Image, make_inputs, tiny_model
from strategies import BaseCase, gqa_heads, runs_of, templates
from test_masks import base_of


def expected_losses(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    base: torch.Tensor,
    span_id: torch.Tensor,
    is_sink: torch.Tensor,
    scale: float,
    bias: torch.Tensor | float = 0.0,
    gradients: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """The same sums straight from the definitions, in fp64; base is bool [B, 1 or H, T, T]."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    batch, num_heads, num_tokens, _ = query.shape
    restricted = span_id > 1  # [B, T]
    scores = query @ key.transpose(-1, -2) * scale + bias

    def attend(mask: torch.Tensor) -> torch.Tensor:
        """Weights [B, H, T, T] under a mask; 0 where a row sees nothing, and in other rows."""
        softmax = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
        return softmax.masked_fill(~mask, 0.0) * restricted[:, None, :, None]

    weights = attend(base)
    dense = weights @ value
    result = {
        "num_rows": restricted.sum(1).double(),
        "norm": dense.square().sum((-1, -2)),
        "error": torch.zeros(batch, num_heads, 4, dtype=torch.float64),
        "lost": torch.zeros(batch, num_heads, 4, dtype=torch.float64),
        "mass": torch.zeros(batch, num_heads, len(REGIONS), dtype=torch.float64),
        "offsets": torch.zeros(batch, num_heads, NUM_OFFSETS + 1, dtype=torch.float64),
        "influence": torch.zeros(batch, num_heads, 4, len(gradients), dtype=torch.float64),
    }
    for category in range(4):
        keep = oracles.oracle_keep(span_id, is_sink, category)[:, None]
        sparse = attend(base & keep) @ value
        result["error"][..., category] = (sparse - dense).square().sum((-1, -2))
        for at, gradient in enumerate(gradients):
            result["influence"][..., category, at] = (gradient * (sparse - dense)).sum((-1, -2))
        result["lost"][..., category] = (weights * ~keep).sum((-1, -2))
    for b, spans in enumerate(span_id.tolist()):
        first = {span: spans.index(span) for span in spans}
        last = {span: num_tokens - 1 - spans[::-1].index(span) for span in spans}
        for k, span in enumerate(spans):
            for q in range(num_tokens):
                weight = weights[b, :, q, k]
                if span == 0:
                    region = "text"
                elif span == spans[q]:
                    region = "own_span"
                else:
                    region = "other_sinks" if is_sink[b, k] else "other_spans"
                    if k == last[span]:
                        result["offsets"][b, :, NUM_OFFSETS] += weight
                    elif k - first[span] < NUM_OFFSETS:
                        result["offsets"][b, :, k - first[span]] += weight
                result["mass"][b, :, REGIONS.index(region)] += weight
    return result


def assert_losses(found: Losses, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        if not value.numel():
            continue
        scale = value.abs().max()
        if name in ("norm", "error", "influence"):
            scale = torch.maximum(scale, expected["norm"].max())
        if name == "lost":  # a difference of weights, which are 1 in all of each row
            scale = torch.maximum(scale, 1e-2 * expected["num_rows"].max())
        difference = (getattr(found, name) - value).abs().max()
        assert difference <= tolerance * scale + 1e-12, (name, difference, scale)


def full_case(template: Any, sight: str, window: int | None, delimiters: bool) -> BaseCase:
    image_id = runs_of(template.span_id)
    if delimiters:
        inside = torch.nn.functional.pad(image_id, (1, 1))
        image_id[(inside[:, :-2] != image_id) | (inside[:, 2:] != image_id)] = 0
    num_tokens = template.span_id.shape[1]
    return BaseCase(
        template=template,
        num_queries=num_tokens,
        num_keys=num_tokens,
        sight=sight,
        window=window,
        distance=None,
        chunk=None,
        sequence_id=None,
        image_id=image_id,
        valid=template.attention_mask,
    )


SMALL = {"max_spans": 5, "max_span": 12, "max_text": 5, "max_batch": 2}


@given(
    template=templates(**SMALL) | templates(**SMALL, text_inside=True),
    heads=gqa_heads(max_heads=4),
    sight=st.sampled_from(["causal", "causal or image", "all"]),
    window=st.sampled_from([None, None, 1, 7, 20]),
    delimiters=st.booleans(),
    how=st.sampled_from(["intervals", "tensor", "bias", "per head"]),
    blocks=st.sampled_from([(256, 512), (3, 5), (1, 1), (8, 2)]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    spread=st.sampled_from([0.0, 1.0, 8.0, 60.0]),
    seed=st.integers(0, 2**16),
)
def test_losses_are_those_of_the_definitions(
    template: Any,
    heads: tuple[int, int],
    sight: str,
    window: int | None,
    delimiters: bool,
    how: str,
    blocks: tuple[int, int],
    dtype: torch.dtype,
    spread: float,
    seed: int,
) -> None:
    case = full_case(template, sight, window, delimiters)
    base = base_of(case)[:, None]  # [B, 1, T, T]
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (batch, num_tokens) = heads, template.span_id.shape

    def draw(num: int) -> torch.Tensor:
        return torch.randn(batch, num, num_tokens, 4, generator=generator, dtype=dtype)

    query, key, value = draw(num_heads) * spread, draw(num_kv_heads), draw(num_kv_heads)
    visibility: Visibility
    added: torch.Tensor | float = 0.0
    if how == "intervals":
        visibility = IntervalVisibility(case.interval_form())
    elif how == "tensor":
        visibility = visibility_of_tensor(base, template.span_id)
    elif how == "per head":
        base = base.repeat(1, num_heads, 1, 1)
        base[:, -1] &= torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril().triu(-9)
        base |= torch.eye(num_tokens, dtype=torch.bool)
        visibility = visibility_of_tensor(base, template.span_id)
    else:
        added = torch.randn(base.shape, generator=generator, dtype=dtype)
        lowest = torch.tensor(torch.finfo(dtype).min, dtype=dtype)
        visibility = visibility_of_tensor(torch.where(base, added, lowest), template.span_id)
    scale = 0.7
    repeated = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=torch.where(base, added, float("-inf")).to(dtype), scale=scale
    ).nan_to_num(nan=0.0)
    gradients = [draw(num_heads) for _ in range(2)]
    call = ProbedCall(
        query, key, value, output, visibility, template.span_id, template.is_sink, scale
    )
    found = measure_losses(call, gradients, query_block=blocks[0], key_block=blocks[1])
    expected = expected_losses(
        *(query, key, value, base, template.span_id, template.is_sink),
        *(scale, added, gradients),
    )
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    assert_losses(found, expected, tolerance)
    assert (found.deviation <= tolerance**2 * expected["norm"].max() + 1e-20).all()
    rows = case.valid[:, None, :, None]
    if how != "per head" and ((sight == "causal" and window is None) or how == "intervals"):
        for category in range(4):
            keep = oracles.oracle_keep(template.span_id, template.is_sink, category)[:, None]
            pairs = (base & keep & rows).sum((1, 2, 3))
            assert torch.equal(found.pairs[:, category], pairs)


def test_form_and_expression_say_what_the_tensor_says() -> None:
    ids = [[0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 3, 3, 0], [1, 1, 0, 2, 2, 0, 3, 3, 3, 0, 4, 4, 0, 0]]
    span_id = torch.tensor(ids)
    is_sink = find_sinks(span_id, (0,))
    valid = torch.ones_like(is_sink)
    valid[0, :2], valid[1, -1:] = False, False
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 14, 4, generator=generator)
    key = value = torch.randn(2, 1, 14, 4, generator=generator)
    base = torch.ones(14, 14).tril().bool() & valid[:, None]
    output = oracles.oracle_attention(query, key, value, base[:, None], 0.5)
    padding = ("load", valid, (("index", "b"), ("index", "k")))
    form = ("and", ("upper", ("index", "q")), ("valid", padding))
    expression = ("and", ("le", ("index", "k"), ("index", "q")), padding)
    views: list[Any] = [
        visibility_of_form(form, (), span_id, is_sink),
        visibility_of_expression(expression, span_id),
        visibility_of_tensor(base[:, None], span_id),
    ]
    valid |= True  # what an expression read may be overwritten later
    expected = expected_losses(query, key, value, base[:, None], span_id, is_sink, 0.5)
    for visibility in views:
        call = ProbedCall(query, key, value, output, visibility, span_id, is_sink)
        found = measure_losses(call)
        assert_losses(found, expected, 1e-5)


def test_facts_that_fail_leave_the_given_mask() -> None:
    positions = torch.tensor([[0, 1, 5, 6]])
    form, facts = ("upper", ("index", "q")), (("consecutive", positions, None),)
    template = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool)
    assert visibility_of_form(form, facts, *template) is None


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                # What is expanded occupies no memory.
                self.numel = max(self.numel, part.untyped_storage().nbytes() // part.element_size())
        return result


@pytest.mark.parametrize("how", ["form", "expression", "tensor"])
def test_no_tensor_of_all_pairs(how: str) -> None:
    num_tokens = 2048
    span_id = torch.zeros(1, num_tokens, dtype=torch.int32)
    for number in range(4):
        span_id[0, 100 + 400 * number : 400 + 400 * number] = number + 1
    is_sink = find_sinks(span_id, (0,))
    query = torch.randn(1, 2, num_tokens, 8)
    form, expression = ("upper", ("index", "q")), ("le", ("index", "k"), ("index", "q"))
    mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()
    with _Largest() as largest:
        visibility = {
            "form": lambda: visibility_of_form(form, (), span_id, is_sink),
            "expression": lambda: visibility_of_expression(expression, span_id),
            "tensor": lambda: visibility_of_tensor(mask, span_id),
        }[how]()
        assert visibility is not None
        key = query[:, :1]
        measure_losses(ProbedCall(query, key, key, query, visibility, span_id, is_sink))
    if how == "tensor":  # the mask itself is there, and views of it; nothing else is as large
        assert largest.numel <= num_tokens**2
    else:
        assert largest.numel <= 2 * 256 * 512


def test_heads_of_a_kind_are_told() -> None:
    """Heads that look at their own image, at sinks, at both, and at another image."""
    ids = [0] * 6
    for number in range(1, 7):
        ids += [number] * 12 + [0] * 2
    span_id = torch.tensor([ids])
    is_sink = find_sinks(span_id, (0,))
    num_tokens, dim = span_id.shape[1], 24
    one_hot = torch.eye(8)[span_id[0]] * (span_id[0] > 0)[:, None]
    sink = is_sink[0].float()[:, None]
    rest = torch.zeros(num_tokens, dim - 17)
    key = torch.cat([one_hot, one_hot * (1 - sink), sink, rest], dim=1)
    previous = torch.eye(8)[(span_id[0] - 1).clamp(min=0)]
    zero, one = torch.zeros(num_tokens, 8), torch.ones(num_tokens, 1)
    heads = [
        torch.cat([one_hot, zero, 0 * one, rest], 1),  # its own image
        torch.cat([zero, zero, one, rest], 1),  # sinks
        torch.cat([zero, one_hot, one, rest], 1),  # both
        torch.cat([previous, zero, 0 * one, rest], 1),  # the image before it
    ]
    query = 20 * torch.stack(heads)[None]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 1, num_tokens, dim, generator=generator)
    base = torch.ones(num_tokens, num_tokens).tril().bool()
    output = oracles.oracle_attention(query, key[None, None], value, base, 1.0)
    visibility = visibility_of_form(("upper", ("index", "q")), (), span_id, is_sink)
    assert visibility is not None
    call = ProbedCall(
        query, key[None, None], value, output, visibility, span_id, is_sink, scale=1.0
    )
    losses = measure_losses(call)
    measurements = measurements_of({0: losses})
    evidence = evidence_of(measurements)
    for criterion, allocation in (
        ("output_error", "per_head"),
        ("output_error", "global"),
        ("attention_mass", "per_head"),
    ):
        found = select_categories(evidence, 0.01, criterion=criterion, allocation=allocation)
        assert found.tolist() == [[2, 1, 3, 0]]
    of_sinks = dataclasses.replace(measurements, offset_mass=measurements.offset_mass[:, :, 1:2])
    assert find_sink_offsets(of_sinks) == (0,)


@contextmanager
def recorded_calls(model: Any) -> Iterator[dict[int, tuple[torch.Tensor, ...]]]:
    """Keep query, key, value, mask and scale of every layer of a model that runs eagerly."""
    calls: dict[int, tuple[Any, ...]] = {}

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        calls[module.layer_idx] = (query, key, value, attention_mask, kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    AttentionInterface.register("recorded", attention)
    AttentionMaskInterface.register("recorded", mask)
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "recorded"
    try:
        yield calls
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping["recorded"]
        del AttentionMaskInterface._global_mapping["recorded"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "qwen3_vl"])
def test_a_model_is_measured_and_its_outputs_stay_as_they_are(family: str) -> None:
    model = tiny_model(family)
    rule = TemplateRule.from_config(model.config)
    prober = Prober(model, rule)
    rows = [[3, Image(), 2, Image(), Image(), 4], [5, Image(), Image(), 1]]
    for pad_side in ("left", "right"):
        inputs = make_inputs(family, rows, pad_side=pad_side)
        template = rule.template(inputs["input_ids"])
        prober._backend.begin(template)
        with torch.no_grad():
            probed = prober._compiled(**inputs, use_cache=False).logits
            layers = prober._backend.end()
            assert torch.equal(probed, model(**inputs, use_cache=False).logits)
            with recorded_calls(model) as calls:
                model(**inputs, use_cache=False)
        assert sorted(layers) == sorted(calls) == [0, 1]
        for layer, (query, key, value, mask, scale) in calls.items():
            arguments = (query, key, value, mask, *template.tensors(), scale)
            assert_losses(layers[layer], expected_losses(*arguments), 1e-5)
            deviation = layers[layer].deviation / layers[layer].norm
            assert (deviation < 1e-10).all()


def test_what_was_compiled_before_is_no_hindrance() -> None:
    """Dynamo counts the frames of all models that share code, and then stops compiling."""
    rows = [[3, Image(), 2, Image(), 4]]
    with torch._dynamo.config.patch(accumulated_recompile_limit=1):
        for _ in range(2):
            model = tiny_model("gemma3", num_layers=1)
            found = Prober(model, TemplateRule.from_config(model.config))(
                make_inputs("gemma3", rows)
            )
            assert (found.error[:, :, :, 1:] > 0).all()


def test_the_effect_on_the_next_token_is_that_of_a_small_change() -> None:
    """Attention that adds little to the residual: then an effect is what one head does."""
    model = tiny_model("qwen2_5_vl", dtype=torch.float64)
    model.model.language_model.layers[0].self_attn.o_proj.weight.data *= 3e-3
    rule = TemplateRule.from_config(model.config)
    prober = Prober(model, rule, next_token=True)
    rows = [[3, Image(), 2, Image(), 4], [Image(), Image(), 1]]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for side in ("left", "right"):
        inputs = make_inputs("qwen2_5_vl", rows, pad_side=side)
        found = prober(inputs)
        assert flags == [parameter.requires_grad for parameter in model.parameters()]
        template = rule.template(inputs["input_ids"]).tensors()
        last = [int(row.nonzero()[-1]) for row in inputs["attention_mask"]]
        after = [_next_token(model, None, inputs, template, last)]
        for head, category in ((0, 1), (2, 2), (3, 3)):
            after.append(_next_token(model, (0, head, category), inputs, template, last))
            change = after[-1] - after[0]
            weights = (after[0].exp() * change**2).gather(1, after[0].topk(4).indices)
            expected = weights.sum(1).div(2).sqrt()
            effect = found.effect[:, 0, head, category].double()
            assert torch.allclose(effect, expected, rtol=0.05)
        assert (found.effect[:, 0, :, 1:] > 0).all()
        assert not found.effect[:, 1].any()  # nobody reads what images are in the last layer


def _next_token(
    model: Any,
    tried: tuple[int, int, int] | None,
    inputs: dict[str, torch.Tensor],
    template: tuple[torch.Tensor, torch.Tensor],
    last: list[int],
) -> torch.Tensor:
    """Log-probabilities [B, V] after each prompt, with one head of another category."""
    categories = torch.zeros(2, 4, dtype=torch.int64)
    if tried is not None:
        categories[tried[0], tried[1]] = tried[2]
    run = oracles.run_reference(model, categories, *template, inputs, use_cache=False)
    logits: torch.Tensor = run.logits[torch.arange(len(last)), last]
    return logits.log_softmax(-1)


def test_a_prompt_with_one_image_loses_nothing() -> None:
    model = tiny_model("qwen2_5_vl")
    prober = Prober(model, TemplateRule.from_config(model.config))
    found = prober(make_inputs("qwen2_5_vl", [[3, Image(), 2]]))
    assert found.num_rows.tolist() == [0.0]
    assert not found.error.any()


def test_attention_that_is_not_met_is_an_error() -> None:
    model = tiny_model("gemma3", num_layers=1)
    prober = Prober(model, TemplateRule.from_config(model.config))
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(ValueError, match="attention of layers 0 must be met, got none of layers 0"),
    ):
        prober(make_inputs("gemma3", [[3, Image(), 2, Image()]]))


def test_attention_that_is_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the masks say, is checked against what the model did on every prompt."""
    model = tiny_model("gemma3", num_layers=1)
    prober = Prober(model, TemplateRule.from_config(model.config))
    monkeypatch.setattr(IntervalVisibility, "extent", lambda *_: (0, 9))
    with pytest.raises(ValueError, match="attention of layer 0 must be softmax"):
        prober(make_inputs("gemma3", [[3, Image(), 2, Image()]]))


def test_the_template_goes_where_attention_is() -> None:
    """It is found on the host; mixing devices is an error here, as it is with a GPU."""
    span_id = torch.tensor([[0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 3, 3, 0]], dtype=torch.int32)
    is_sink = find_sinks(span_id, (0,))
    shape = (1, 4, span_id.shape[1], 8)
    query, key, value, gradient = (torch.randn(shape) for _ in range(4))
    graph = torch.fx.Graph()
    inputs = [graph.placeholder(name) for name in ("query", "key", "value", "padding")]
    index = ("index", "k")
    form = ("and", ("upper", ("index", "q")), ("valid", ("load", inputs[3], (0, index))))
    for node in inputs[:3]:
        node.meta["example_value"] = torch.empty(shape, device=pretend.DEVICE)
    output = graph.call_function(
        torch.nn.functional.scaled_dot_product_attention,
        tuple(inputs[:3]),
        {"is_causal": True},
    )
    graph.output((output,))
    gm = torch.fx.GraphModule({}, graph)
    (call,) = find_attention(gm, layer_pattern=r"layers\.(\d+)")
    lifted = dataclasses.replace(lift_mask(gm, call), form=form)
    probe_attention_pass(gm, attention=[call], lifted=[lifted], measure=ProbedCall)
    padding = torch.ones(span_id.shape, dtype=torch.bool)
    arguments = query, key, value, padding
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    alone = visibility_of_form(CAUSAL, (), span_id, is_sink)
    assert alone is not None
    expected = measure_losses(
        ProbedCall(query, key, value, dense, alone, span_id, is_sink), [gradient]
    )
    with pretend.pretending():
        with pytest.raises(RuntimeError, match="same device"):
            pretend.OnGpu(query) + key
        kept = gm(*map(pretend.OnGpu, arguments), span_id, is_sink)[1]
        found = measure_losses(kept, [pretend.OnGpu(gradient)])
    for name, values in found._asdict().items():
        assert isinstance(values, pretend.OnGpu), name
        torch.testing.assert_close(values.data_, getattr(expected, name))
