"""What the backend does around the attention: names, options, errors, reports, regions."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import blindsight
from blindsight import BlindsightWarning, Profile, TemplateRule, blindsight_backend, use_template
from blindsight.backend_by_name import blindsight as by_name
from blindsight.reference import reference_logits
from blindsight.runtime.compiled_graph import CompiledGraph
from blindsight.template import Template
from models import (
    END_ID,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    make_inputs,
    tiny_model,
    valid_positions,
    without_vision,
)
from oracles import assert_close_to_reference, oracle_template, reference_copy, run_reference

# Layers that are compiled one by one are given their masks ready made
pytestmark = pytest.mark.filterwarnings("ignore:a mask is read element by element")

MIXED = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def qwen() -> Any:
    return without_vision(tiny_model("qwen2_5_vl", num_layers=2))


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs("qwen2_5_vl", [[5, Image(2, 5), 4, Image(4, 3), Image(), 7]])


def profile_of(model: Any, categories: Any = None) -> Profile:
    num_layers = model.config.get_text_config().num_hidden_layers
    return Profile.for_model(model, categories or [MIXED] * num_layers)


def check(model: Any, profile: Profile, inputs: dict[str, torch.Tensor], logits: Any) -> None:
    span_id, is_sink = oracle_template(
        inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,)
    )
    references = [
        run_reference(m, profile.categories, span_id, is_sink, inputs, use_cache=False).logits
        for m in (model, reference_copy(model))
    ]
    assert_close_to_reference(logits, *references, valid_positions(inputs))


# Ways to ask for it


@pytest.mark.parametrize("as_path", [False, True])
def test_by_name_with_options(qwen: Any, inputs: Any, as_path: bool, tmp_path: Any) -> None:
    """The entry point's function is called for every graph; its state must be one all the same."""
    from torch._dynamo.backends import registry

    profile = profile_of(qwen)
    profile.save(tmp_path / "profile.safetensors")
    if "blindsight" not in registry._BACKENDS and "blindsight" not in torch._dynamo.list_backends():
        # Not installed, only on the path: what importlib.metadata would have found.
        registry.register_backend(compiler_fn=by_name, name="blindsight")
    options = {
        "profile": tmp_path / "profile.safetensors" if as_path else profile,
        "inner": "eager",
        "lowering": "fused",
    }
    model = torch.compile(qwen, backend="blindsight", options=options)
    check(qwen, profile, inputs, model(**inputs, use_cache=False).logits)


def test_by_name_without_a_profile(qwen: Any, inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"must be given a profile.*options=\{'profile'"):
        by_name(torch.fx.GraphModule({}, torch.fx.Graph()), [])


def test_equal_options_share_a_backend(inputs: Any, tmp_path: Any) -> None:
    """As they share Dynamo's graphs: a profile that is written anew is not mixed with the old."""
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    path = tmp_path / "profile.safetensors"
    old, new = profile_of(model), profile_of(model, [[3, 3, 1, 1], [2, 0, 2, 0]])
    old.save(path)
    other = make_inputs("qwen2_5_vl", [[6, Image(2, 5), 4, Image(4, 3), 9]])

    def compiled() -> Any:
        options = {"profile": path, "inner": "eager", "lowering": "fused"}
        return torch.compile(model, backend=by_name, options=options)

    torch._dynamo.reset()
    check(model, old, inputs, compiled()(**inputs, use_cache=False).logits)
    new.save(path)
    with pytest.warns(BlindsightWarning, match=r"was written to since.*torch\.compiler\.reset"):
        check(model, old, inputs, compiled()(**inputs, use_cache=False).logits)
    check(model, old, other, compiled()(**other, use_cache=False).logits)
    torch.compiler.reset()
    for each in (inputs, other):
        check(model, new, each, compiled()(**each, use_cache=False).logits)


def test_options_that_are_edited_are_an_error(qwen: Any, inputs: Any) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"profile": profile_of(qwen), "inner": "eager", "lowering": "fused"}
    first = torch.compile(qwen, backend=by_name, options=options)
    first(**inputs, use_cache=False)
    options["profile"] = profile_of(qwen, [[3, 3, 1, 1], [2, 0, 2, 0]])
    for run in (first, torch.compile(qwen, backend=by_name, options=options)):
        with pytest.raises(ValueError, match="must stay as they were given"):
            run(**inputs, use_cache=False)


def test_a_misspelt_option_is_an_error(qwen: Any) -> None:
    with pytest.raises(ValueError, match="got 'lowring' for 'lowering'"):
        blindsight_backend(profile_of(qwen), inner="eager", lowring="fused")
    blindsight_backend(profile_of(qwen), mode="default", options={"max_autotune": True})
    blindsight_backend(profile_of(qwen), config_patches={}, decompositions={})


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("name", ["dynamic", "fullgraph", "recompile_limit"])
def test_an_option_of_torch_compile_is_an_error(qwen: Any, inner: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'. Give it to torch.compile, not to the b"):
        blindsight_backend(profile_of(qwen), inner=inner, **{name: True})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lower", "got 'lower' for 'lowering'"),
        ("fused", r"among inner, .*, got 'fused'\. What is of Inductor's config"),
        ("max_autotune", r"got 'max_autotune'\. .*options=\{'max_autotune': \.\.\.\}"),
        ("modes", "got 'modes' for 'mode'"),
    ],
)
def test_an_option_that_inductor_does_not_take_is_an_error(
    qwen: Any, name: str, advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        blindsight_backend(profile_of(qwen), **{name: True})


def test_a_backend_that_was_not_called_says_so(qwen: Any, inputs: Any) -> None:
    torch._dynamo.reset()
    model: Any = torch.compile(qwen, backend=blindsight_backend)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"must be called with a profile.*blindsight_backend\(prof"):
        model(**inputs, use_cache=False)


def test_a_profile_that_is_written_to_is_not_the_backends(inputs: Any) -> None:
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    profile, expected = profile_of(model), profile_of(model)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    profile.categories[:] = 2
    torch._dynamo.reset()
    logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
    check(model, expected, inputs, logits)


@pytest.mark.parametrize("lowering", ["fused", "split", "auto"])
def test_tensors_are_made_on_another_device_by_default(
    inputs: Any, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``torch.set_default_device("cuda")``; what is chosen is chosen on the host."""
    as_callable = CompiledGraph.as_callable

    def elsewhere(graph: CompiledGraph) -> Any:
        run = as_callable(graph)

        def run_elsewhere(*args: Any) -> Any:
            with torch.device("meta"):
                return run(*args)

        return run_elsewhere

    monkeypatch.setattr(CompiledGraph, "as_callable", elsewhere)
    model = without_vision(tiny_model("qwen2_5_vl", num_layers=2))
    profile = profile_of(model)
    torch._dynamo.reset()
    backend = blindsight_backend(profile, inner="eager", lowering=lowering)
    logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
    if lowering != "auto":
        check(model, profile, inputs, logits)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compile_in_place_keeps_the_model(qwen: Any, inputs: Any, context: Any) -> None:
    profile = profile_of(qwen)
    qwen.compile(backend=blindsight_backend(profile, inner="eager", lowering="fused"))
    try:
        with context():
            logits = qwen(**inputs, use_cache=False).logits
    finally:
        qwen._compiled_call_impl = None
    check(qwen, profile, inputs, logits)


def test_inner_backend_gets_its_options(qwen: Any, inputs: Any) -> None:
    seen = []

    def inner(gm: Any, example_inputs: Any, **options: Any) -> Any:
        seen.append(options)
        return gm.forward

    backend = blindsight_backend(profile_of(qwen), inner=inner, lowering="fused", color="blue")
    torch.compile(qwen, backend=backend, options={"size": 3})(**inputs, use_cache=False)
    assert seen
    assert all(options == {"color": "blue", "options": {"size": 3}} for options in seen)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"mode": "max-autotune-no-cudagraphs"}, True),
        ({"options": {"max_autotune": True}}, True),
        ({"config_patches": {"max_autotune": True}}, True),
        # The more specific wins
        ({"mode": "max-autotune-no-cudagraphs", "options": {"max_autotune": False}}, False),
        ({"options": {"max_autotune": True}, "config_patches": {"max_autotune": False}}, False),
    ],
)
def test_inductor_gets_mode_options_and_patches(
    qwen: Any, inputs: Any, options: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.compile_fx as home

    seen = []

    def compile_fx(gm: Any, example_inputs: Any, **options: Any) -> Any:
        seen.append(options["config_patches"])
        return gm.forward

    monkeypatch.setattr(home, "compile_fx", compile_fx)
    profile = profile_of(qwen)
    backend = blindsight_backend(profile, lowering="fused", **options)
    check(qwen, profile, inputs, torch.compile(qwen, backend=backend)(**inputs).logits)
    assert [patches.get("max_autotune", False) for patches in seen] == [expected] * len(seen)
    assert seen


def test_explain_traces_rewrites_and_leaves_no_trace(qwen: Any, inputs: Any) -> None:
    hooks = dict(qwen._forward_pre_hooks)
    report = blindsight.explain(qwen, inputs, profile_of(qwen), lowering="fused")
    assert [row.layer for row in report.rows] == [0, 1]
    assert report.num_rewritten == 2
    assert not report.missing_layers
    assert all(row.tier == 1 and row.runs.total() == 1 for row in report.rows)
    assert all("sparse" in how for row in report.rows for how in row.runs)
    assert "2 of the 2 layers of the profile met" in str(report)
    assert "0-1     1 DENSE, 1 SINK, 1 DOCUMENT, 1 DOCUMENT_SINK  1 sparse, " in str(report)
    assert dict(qwen._forward_pre_hooks) == hooks


def test_a_backend_is_shown_in_short(qwen: Any, inputs: Any) -> None:
    torch._dynamo.reset()
    profile = profile_of(qwen)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    whole = f"lowering 'fused', inner 'eager', profile {profile.digest[:8]} of 2 layers"
    assert repr(backend) == f"<blindsight backend: {whole}; 0 graphs so far>"
    torch.compile(qwen, backend=backend)(**inputs, use_cache=False)
    assert "0 graphs" not in repr(backend)


def test_explain_looks_through_a_model_that_is_compiled_in_place(qwen: Any, inputs: Any) -> None:
    torch._dynamo.reset()
    qwen.compile(backend="eager")
    before = qwen._compiled_call_impl
    report = blindsight.explain(qwen, inputs, profile_of(qwen), lowering="fused")
    assert qwen._compiled_call_impl is before
    qwen._compiled_call_impl = None
    assert [row.rewritten for row in report.rows if row.layer is not None] == [True, True]
    assert not report.missing_layers


def test_a_family_that_is_not_listed_works_through_its_rule(qwen: Any, inputs: Any) -> None:
    rule = TemplateRule(
        image_token_ids=(IMAGE_ID,),
        start_token_ids=(START_ID,),
        end_token_ids=(END_ID,),
        layer_pattern=r"\.layers\.(\d+)\.self_attn",
    )
    profile = Profile.for_model(qwen, "document_sink", rule=rule)
    model = torch.compile(
        qwen, backend=blindsight_backend(profile, inner="eager", lowering="fused")
    )
    check(qwen, profile, inputs, model(**inputs, use_cache=False).logits)


# Frames that serve several layers


@pytest.mark.parametrize("use_cache", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_qwen3_with_12_layers(use_cache: bool) -> None:
    model = without_vision(tiny_model("qwen3_vl", num_layers=12))
    inputs = make_inputs("qwen3_vl", [[5, Image(2, 5), 4, Image(4, 3), Image(), 7]])
    categories = [[(layer + head) % 4 for head in range(4)] for layer in range(12)]
    profile = profile_of(model, categories)
    with torch._dynamo.config.patch(recompile_limit=64):
        backend = blindsight_backend(profile, inner="eager", lowering="fused")
        logits = torch.compile(model, backend=backend)(**inputs, use_cache=use_cache).logits
    check(model, profile, inputs, logits)
    assert not backend.report().missing_layers
    # without a cache one frame serves all layers that deepstack does not tell apart
    rewritten = [row for row in backend.report().rows if row.rewritten]
    assert (len(rewritten) == 12) == use_cache
    assert sum(row.runs.total() for row in rewritten) == 12


@pytest.mark.parametrize(
    "inner",
    ["eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.nightly])],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_the_decoder_of_qwen3_as_one_graph(inner: str) -> None:
    """What its deepstack picks by a mask has a size that no input tells."""
    model = without_vision(tiny_model("qwen3_vl", num_layers=4))
    profile = profile_of(model, [[(layer + head) % 4 for head in range(4)] for layer in range(4)])
    backend = blindsight_backend(profile, inner=inner, lowering="fused")
    text = model.model.language_model
    for first in ([5], [4, 3]):
        inputs = make_inputs("qwen3_vl", [[*first, Image(2, 5), 4, Image(4, 3), Image(), 7]])
        text.compile(backend=backend)
        logits = model(**inputs, use_cache=True).logits
        text._compiled_call_impl = None
        check(model, profile, inputs, logits)
    rows = backend.report().rows
    assert {row.tier for row in rows} == {1}
    assert len({row.graph for row in rows}) == 2


def test_qwen3_beyond_the_recompile_limit_is_an_error() -> None:
    model = without_vision(tiny_model("qwen3_vl", num_layers=12))
    inputs = make_inputs("qwen3_vl", [[5, Image(2, 5), 4, Image(4, 3), 7]])
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    with pytest.raises(ValueError, match=r"recompile_limit must be at least .* 12.* got 8"):
        torch.compile(model, backend=backend)(**inputs, use_cache=True)


def test_layers_lost_to_the_recompile_limit_are_an_error_in_the_same_call() -> None:
    model = without_vision(tiny_model("qwen3_vl", num_layers=4))
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    compiled = torch.compile(model, backend=backend)

    def run() -> None:
        for text in (5, 6, 7):
            inputs = make_inputs("qwen3_vl", [[text, Image(2, 5), 4, Image(4, 3), 7]])
            compiled(**inputs, use_cache=True)

    # Which of the two depends on the frame that is lost: with the decoder's, or the embedding's.
    with (
        torch._dynamo.config.patch(recompile_limit=6),
        pytest.raises(
            (ValueError, BlindsightWarning), match=r"so (it was )?dense.*recompile_limit"
        ),
    ):
        run()


LIMIT = "Dynamo recompile limit exceeded\n"


@pytest.fixture
def reasons() -> Iterator[Any]:
    """Why Dynamo gave up on frames so far."""
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["unimplemented"]
    torch._dynamo.utils.counters.clear()


def test_a_decoder_that_dynamo_gives_up_on_is_told_with_the_logits(reasons: Any) -> None:
    backend = blindsight_backend(profile_of(without_vision(tiny_model("qwen2_5_vl"))))
    forwards = backend.state.forwards
    forwards.finish()  # a head may be compiled alone
    reasons[LIMIT] += 1
    forwards.serve([0])
    forwards.finish()
    with blindsight.disabled():
        forwards.finish()
    with pytest.warns(BlindsightWarning, match=r"outside of this backend's graphs.*dense"):
        forwards.finish()


def given_to(part: Any, call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a part of a model is given in a call."""
    given: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given.append((args, kwargs))

    hook = part.register_forward_pre_hook(note, with_kwargs=True)
    call()
    hook.remove()
    return given[0]


def test_a_layer_called_alone_needs_the_model(inputs: Any) -> None:
    """Nothing on the way to it is the model, and its frame may serve any layer."""
    model = tiny_model("qwen2_5_vl")
    layer = model.model.language_model.layers[0]
    args, kwargs = given_to(layer, lambda: model(**inputs, use_cache=False))
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    with pytest.raises(ValueError, match=r"blindsight_backend\(profile, model=model\)"):
        torch.compile(layer, backend=backend)(*args, **kwargs)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_regional_compilation(family: str) -> None:
    """Decoder layers compiled one by one: the model runs eagerly, and shows its input_ids."""
    model = tiny_model(family, num_layers=4)
    small = Image()
    inputs = make_inputs(
        family, [[5, small, 4, small, small, 7], [6, small, 4, small, 0, small, 6]]
    )
    profile = profile_of(model, [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 2, 1, 3]])
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    logits = model(**inputs, use_cache=False).logits
    # the very same prompt through an eager reference needs the layers uncompiled
    for layer in model.model.language_model.layers:
        layer._compiled_call_impl = None
    check(model, profile, inputs, logits)
    assert not backend.report().missing_layers
    assert backend.state.forwards.pending is None


def test_a_decoder_called_alone_takes_a_template(inputs: Any) -> None:
    model = tiny_model("qwen2_5_vl")
    profile = profile_of(model)
    text = model.model.language_model
    _, kwargs = given_to(text, lambda: model(**inputs, use_cache=False))
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    text.compile(backend=backend)
    span_id, is_sink = oracle_template(
        inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,)
    )
    with pytest.warns(BlindsightWarning, match="input_ids were not seen.*use_template"):
        text(**kwargs)
    with use_template(span_id, is_sink):
        alone = model.lm_head(text(**kwargs).last_hidden_state)
    within = model(**inputs, use_cache=False).logits  # which shows them
    text._compiled_call_impl = None
    check(model, profile, inputs, alone)
    check(model, profile, inputs, within)


# State


def test_state_is_consumed(qwen: Any, inputs: Any) -> None:
    """A later call of the same length with inputs_embeds must not find the last one's images."""
    model = torch.compile(
        qwen, backend=blindsight_backend(profile_of(qwen), inner="eager", lowering="fused")
    )
    model(**inputs, use_cache=False)
    embeds = torch.randn(*inputs["input_ids"].shape, 64)
    with pytest.warns(BlindsightWarning, match="input_ids were not seen"):
        found = model(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(found, qwen(inputs_embeds=embeds, use_cache=False).logits)


def test_an_aborted_call_leaves_nothing_behind(qwen: Any, inputs: Any) -> None:
    profile = profile_of(qwen)
    model = torch.compile(
        qwen, backend=blindsight_backend(profile, inner="eager", lowering="fused")
    )
    model(**inputs, use_cache=False)
    broken = {**inputs, "pixel_values": inputs["pixel_values"][:-4]}
    with pytest.raises(Exception, match=r"."):
        model(**broken, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlindsightWarning)
        check(qwen, profile, inputs, model(**inputs, use_cache=False).logits)


# Bad input: one clear error that names both values


def test_a_profile_of_another_model_is_an_error(qwen: Any) -> None:
    other = tiny_model("qwen2_5_vl", num_layers=3)
    with pytest.raises(ValueError, match=r"num_layers=2.*num_layers=3"):
        blindsight_backend(profile_of(qwen), inner="eager", lowering="fused", model=other)


def of_another_family(model: Any) -> Profile:
    return Profile.for_model(tiny_model("qwen2_vl"), "sink")


def of_fewer_layers(model: Any) -> Profile:
    return profile_of(tiny_model("qwen2_5_vl", num_layers=1))


def of_a_wrong_pattern(model: Any) -> Profile:
    rule = replace(profile_of(model).rule, layer_pattern=r"decoder\.layers\.(\d+)\.attn")
    return Profile.for_model(model, "sink", rule=rule)


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("whole", of_another_family, "architecture=qwen2_vl, model has architecture=qwen2_5_vl"),
        ("decoder", of_another_family, "architecture=qwen2_vl, model has architecture=qwen2_5_vl"),
        ("layers", of_fewer_layers, "profile has num_layers=1, model has num_layers=2"),
    ],
)
def test_a_profile_that_does_not_fit_is_told_without_the_model(
    qwen: Any, inputs: Any, part: str, other: Any, message: str
) -> None:
    model = copy.deepcopy(qwen)
    backend = blindsight_backend(other(qwen), inner="eager", lowering="fused")
    decoder = model.model.language_model
    for module in {"whole": [model], "decoder": [decoder], "layers": decoder.layers}[part]:
        module.compile(backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(**inputs, use_cache=False)


def test_a_wrong_pattern_is_told_where_nothing_else_tells_layers(qwen: Any, inputs: Any) -> None:
    model = copy.deepcopy(qwen)
    backend = blindsight_backend(of_a_wrong_pattern(qwen), inner="eager", lowering="fused")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    with pytest.raises(ValueError, match=r"layers 0-1 at 'decoder.*', found none\. Give the whole"):
        model(**inputs, use_cache=False)


def test_weights_may_be_buffers_where_paths_tell_layers() -> None:
    """As quantised ones are: then no parameter tells a layer."""
    model = tiny_model("gemma3")
    inputs = make_inputs("gemma3", [[5, Image(), 4, Image(), 6]])
    expected = reference_logits(model, inputs, Profile.for_model(model, "sink"))
    for layer in model.model.language_model.layers:
        for module in layer.self_attn.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.data)
    backend = blindsight_backend(Profile.for_model(model, "sink"), inner="eager", lowering="fused")
    model.compile(backend=backend)
    logits = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert {row.layer for row in backend.report().rows if row.rewritten} == {0, 1}


def test_a_profile_that_does_not_fit_leaves_a_model_dense_on_request(
    qwen: Any, inputs: Any
) -> None:
    expected = qwen(**inputs, use_cache=False).logits
    options = {"inner": "eager", "lowering": "fused", "strict": False}
    model = torch.compile(qwen, backend=blindsight_backend(of_another_family(qwen), **options))
    with pytest.warns(BlindsightWarning) as warned:
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    assert "left dense: profile must be made for this model" in str(warned[0].message)


def test_a_profile_of_the_text_model_alone_fits_the_whole(qwen: Any, inputs: Any) -> None:
    rule, text = profile_of(qwen).rule, qwen.model.language_model
    profile = Profile.for_model(text, profile_of(qwen).categories, rule=rule)
    assert profile.fingerprint["architecture"] != profile_of(qwen).fingerprint["architecture"]
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    logits = torch.compile(qwen, backend=backend)(**inputs, use_cache=False).logits
    check(qwen, profile_of(qwen), inputs, logits)


def test_strict_is_a_flag(qwen: Any) -> None:
    with pytest.raises(ValueError, match="strict must be True or False, got 'no'"):
        blindsight_backend(profile_of(qwen), strict="no")  # type: ignore[arg-type]


def test_a_profile_with_other_heads_is_an_error(qwen: Any, inputs: Any) -> None:
    config = type(qwen.config)(**qwen.config.to_dict())
    config.get_text_config().num_attention_heads = 8
    config.get_text_config().hidden_size = 128
    profile = Profile.for_model(config, "sink")
    model = torch.compile(
        qwen, backend=blindsight_backend(profile, inner="eager", lowering="fused")
    )
    with pytest.raises(ValueError, match="profile has num_heads=8, model has num_heads=4"):
        model(**inputs, use_cache=False)


def test_an_inner_backend_that_does_not_exist_is_an_error(qwen: Any) -> None:
    with pytest.raises(ValueError, match=r"inner must be .*inductor.* got 'indoctor'"):
        blindsight_backend(profile_of(qwen), inner="indoctor")


def test_what_is_no_profile_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"profile must be a Profile or the path of one, got int"):
        blindsight_backend(3)  # type: ignore[arg-type]


def test_a_template_of_the_wrong_length_is_an_error(qwen: Any, inputs: Any) -> None:
    model = torch.compile(
        qwen, backend=blindsight_backend(profile_of(qwen), inner="eager", lowering="fused")
    )
    num_tokens = inputs["input_ids"].shape[1]
    span_id = torch.zeros(1, num_tokens - 1, dtype=torch.int64)
    with (
        use_template(span_id, span_id.bool()),
        pytest.raises(ValueError, match=rf"{num_tokens}\].*got \[1, {num_tokens - 1}\]"),
    ):
        model(**inputs, use_cache=False)


@pytest.mark.parametrize(
    ("span_id", "is_sink", "message"),
    [
        (torch.zeros(4), torch.zeros(4), r"span_id must be a tensor \[B, T\], got \(4,\)"),
        (torch.zeros(1, 4, dtype=torch.int), torch.zeros(1, 5).bool(), r"\(1, 4\) and \(1, 5\)"),
        (torch.zeros(1, 4), torch.zeros(1, 4).bool(), r"must hold ints, got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.int), torch.zeros(1, 4), r"is_sink must be bool"),
        (torch.tensor([[1, 2, 1, 0]]), torch.zeros(1, 4).bool(), r"got 1 at row 0, token 2"),
        (torch.tensor([[2, 2, 0, 0]]), torch.zeros(1, 4).bool(), r"got 2 at row 0, token 0"),
        (torch.zeros(1, 4, dtype=torch.int), None, r"is_sink must be a tensor \[B, T\], got NoneT"),
        (
            Template(torch.zeros(1, 4, dtype=torch.int), torch.zeros(1, 4).bool()),
            torch.zeros(1, 4).bool(),
            "is_sink must be left out with a template",
        ),
    ],
)
def test_template_that_describes_no_spans(span_id: Any, is_sink: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), use_template(span_id, is_sink):
        pass


def test_gradients_are_an_error(qwen: Any, inputs: Any) -> None:
    model = torch.compile(
        qwen, backend=blindsight_backend(profile_of(qwen), inner="eager", lowering="fused")
    )
    weight = qwen.lm_head.weight
    first = qwen.model.language_model.layers[0].self_attn.q_proj.weight
    first.requires_grad_(True)
    try:
        with (
            torch.enable_grad(),
            pytest.raises(ValueError, match=r"inference_mode\(\) or .*no_grad"),
        ):
            model(**inputs, use_cache=False)
        with torch.enable_grad(), blindsight.disabled():
            model(**inputs, use_cache=False).logits.sum().backward()
        assert first.grad is not None
    finally:
        first.requires_grad_(False)
        first.grad = None
    assert weight is qwen.lm_head.weight


def test_dropout_is_an_error(inputs: Any) -> None:
    model = without_vision(tiny_model("qwen2_5_vl"))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    compiled = torch.compile(
        model.train(),
        backend=blindsight_backend(profile_of(model), inner="eager", lowering="fused"),
    )
    with pytest.raises(ValueError, match=r"dropout of attention .* must be 0, got 0.5.*eval\(\)"):
        compiled(**inputs, use_cache=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_sdpa_is_told(inputs: Any, strict: bool) -> None:
    model = without_vision(tiny_model("qwen2_5_vl", attn_implementation="eager"))
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused", strict=strict)
    compiled = torch.compile(model, backend=backend)
    if strict:
        with pytest.raises(ValueError, match=r"attn_implementation='sdpa'"):
            compiled(**inputs, use_cache=False)
    else:
        with pytest.warns(BlindsightWarning, match=r"attn_implementation='sdpa'"):
            found = compiled(**inputs, use_cache=False).logits
        torch.testing.assert_close(found, model(**inputs, use_cache=False).logits)


def test_attention_that_never_reaches_the_backend(qwen: Any, inputs: Any) -> None:
    """The decoder runs uncompiled: strict says so, naming the layers."""
    text = qwen.model.language_model
    text.forward = torch._dynamo.disable(text.forward)
    try:
        compiled = torch.compile(
            qwen, backend=blindsight_backend(profile_of(qwen), inner="eager", lowering="fused")
        )
        with pytest.raises(ValueError, match=r"layers 0-1 .* were never met"):
            compiled(**inputs, use_cache=False)
    finally:
        del text.forward


def test_backend_state_is_not_on_the_model(qwen: Any, inputs: Any) -> None:
    """What we are given is left as it was: the model still pickles, its cache is a plain one."""
    backend = blindsight_backend(profile_of(qwen), inner="eager", lowering="fused")
    output = torch.compile(qwen, backend=backend)(**inputs, use_cache=True)
    assert type(output.past_key_values) is DynamicCache
    assert pickle.loads(pickle.dumps(qwen.config)).to_dict() == qwen.config.to_dict()


def test_a_float_that_varies_between_models(inputs: Any) -> None:
    """Dynamo hands the second model's epsilon over as a tensor, to be read in the graph."""
    for epsilon in (1e-6, 1e-5):
        model = without_vision(tiny_model("qwen2_5_vl"))
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = epsilon
        profile = profile_of(model)
        backend = blindsight_backend(profile, inner="aot_eager", lowering="fused")
        logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
        assert {how.split(",")[0] for row in backend.report().rows for how in row.runs} == {
            "sparse"
        }
        check(model, profile, inputs, logits)
