"""What others do to the same model: adapters, quantised weights, regions, caches, passes.

Each against the plain reference of the model as it then is.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import QuantizedCache

from blindsight import Profile, blindsight_backend, use_template
from blindsight.runtime.context import BlindsightWarning
from models import (
    END_ID,
    IMAGE_ID,
    START_ID,
    VIDEO_ID,
    Image,
    append_text,
    make_inputs,
    split_turns,
    tiny_model,
    valid_positions,
)
from oracles import (
    assert_close_to_reference,
    generate_reference,
    oracle_template,
    reference_copy,
    run_reference,
)

CATEGORIES = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 2, 1, 3]]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def package(name: str) -> Any:
    """An optional package: pip install 'blindsight[compose]'."""
    pytest.importorskip(name, reason=f"needs {name}, which the extra 'compose' installs")
    return importlib.import_module(name)


def model_of(family: str = "qwen2_5_vl", num_layers: int = 2) -> Any:
    """The vision tower runs uncompiled: tracing it is most of a test's time."""
    model = tiny_model(family, num_layers=num_layers)
    tower = getattr(model.model, "visual", None) or model.model.vision_tower
    kind = type(tower)
    # of the class, not of the instance: a copy of the model must run the copy's tower
    members = {"forward": torch._dynamo.disable(kind.forward)}
    tower.__class__ = type(kind.__name__, (kind,), members)
    return model


def profile_of(model: Any) -> Profile:
    return Profile.for_model(model, CATEGORIES[: model.config.get_text_config().num_hidden_layers])


def prompt(family: str = "qwen2_5_vl") -> dict[str, torch.Tensor]:
    small = Image()
    return make_inputs(family, [[5, small, 4, small, small, 7]])


def template_of(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return oracle_template(inputs["input_ids"], (IMAGE_ID, VIDEO_ID), (START_ID,), (END_ID,))


def second_image(inputs: dict[str, torch.Tensor]) -> int:
    """Where it begins."""
    return int((template_of(inputs)[0] == 2).nonzero()[0, 1])


def check(model: Any, logits: Any, inputs: Any, in_fp64: Any = None) -> None:
    """Compare with the reference of the model as it is, adapters and quantised weights included.

    ``in_fp64`` is the same model in double precision, where a copy of it cannot be.
    """
    args = profile_of(model).categories, *template_of(inputs), inputs
    exact = reference_copy(model) if in_fp64 is None else in_fp64
    references = [run_reference(m, *args, use_cache=False).logits for m in (model, exact)]
    assert_close_to_reference(logits, *references, valid_positions(inputs))


def runs_of(backend: Any) -> set[str]:
    return {how.split(",")[0] for row in backend.report().rows for how in row.runs}


# Adapters


def with_lora(model: Any) -> Any:
    peft = package("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.parametrize(
    ("family", "inner"),
    [
        ("qwen2_5_vl", "aot_eager"),
        pytest.param("qwen3_vl", "eager", marks=pytest.mark.nightly),
    ],
)
def test_lora(family: str, inner: str) -> None:
    """Adapters beside the weights, merged into them, switched off, and merged for good."""
    model = model_of(family)
    inputs = prompt(family)
    adapted = with_lora(model)
    backend = blindsight_backend(profile_of(model), inner=inner, lowering="fused", model=adapted)
    compiled = torch.compile(adapted, backend=backend)

    def run(as_it_is: Any) -> torch.Tensor:
        torch._dynamo.reset()  # each state is compiled anew: not to run into the recompile limit
        logits = as_it_is(**inputs, use_cache=False).logits
        check(model, logits, inputs)
        return logits

    beside = run(compiled)
    adapted.merge_adapter()
    merged = run(compiled)
    torch.testing.assert_close(merged, beside, atol=1e-3, rtol=1e-3)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert (run(compiled) - beside).abs().max() > 0.1
    assert runs_of(backend) == {"sparse"}
    assert not backend.report().missing_layers
    run(torch.compile(adapted.merge_and_unload(), backend=backend))


# Quantised weights


@pytest.mark.parametrize(
    ("family", "inner", "bits"),
    [
        ("qwen2_5_vl", "aot_eager", "Int8"),
        ("qwen3_vl", "aot_eager", "Int8"),
        ("qwen2_5_vl", "aot_eager", "Float8"),
        *(
            pytest.param(
                "qwen2_5_vl", "inductor", bits, marks=(pytest.mark.inductor, pytest.mark.nightly)
            )
            for bits in ("Int8", "Float8")
        ),
    ],
)
def test_quantised_weights(family: str, inner: str, bits: str) -> None:
    quantization = package("torchao").quantization
    model = model_of(family)
    text = model.model.language_model
    before = text.layers[0].self_attn.q_proj.weight
    quantization.quantize_(text, getattr(quantization, f"{bits}WeightOnlyConfig")())
    after = text.layers[0].self_attn.q_proj.weight
    assert type(after) is not type(before)
    exact = model_of(family)
    theirs = dict(model.named_parameters())
    for name, parameter in exact.named_parameters():
        full = theirs[name].detach()
        parameter.data = (
            full.dequantize() if type(full) is type(after.detach()) else full
        ).double()
    exact.config.dtype = torch.float64
    inputs = prompt(family)
    backend = blindsight_backend(profile_of(model), inner=inner, lowering="fused")
    check(
        model,
        torch.compile(model, backend=backend)(**inputs, use_cache=False).logits,
        inputs,
        exact,
    )
    assert runs_of(backend) == {"sparse"}


# Regions


@pytest.mark.parametrize(
    "family", [pytest.param("qwen2_5_vl", marks=pytest.mark.nightly), "gemma3"]
)
def test_nested_compile_regions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One traced region serves every layer; each has its own categories all the same."""
    model, inputs = model_of(family, num_layers=4), prompt(family)
    profile = profile_of(model)
    layer_class = type(model.model.language_model.layers[0])
    region = torch.compiler.nested_compile_region(layer_class.forward)
    seen: list[int] = []

    def inner(gm: Any, example_inputs: Any) -> Any:
        regions = [n for n in gm.graph.nodes if "invoke_subgraph" in str(n.target)]
        seen.append(len(regions))
        return gm.forward

    backend = blindsight_backend(profile, inner="aot_eager", lowering="fused")
    with monkeypatch.context() as patch:
        patch.setattr(layer_class, "forward", region)
        # Without us the decoder's graph has a region per layer: the test is of something.
        torch.compile(model, backend=inner)(**inputs, use_cache=False)
        assert max(seen) == 4
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        if family == "gemma3":
            logits = compiled(**inputs, use_cache=False).logits
        else:  # on a cache, whose tensors are other operands of each region
            first, second = split_turns(model, inputs, second_image(inputs))
            turn = compiled(**first, use_cache=True)
            rest = compiled(**second, past_key_values=turn.past_key_values, use_cache=True)
            logits = torch.cat([turn.logits, rest.logits], dim=1)
    check(model, logits, inputs)
    assert {row.layer for row in backend.report().rows if row.rewritten} == {0, 1, 2, 3}
    assert not backend.report().missing_layers
    first_turn = set() if family == "gemma3" else {"dense: no query in a second image"}
    assert runs_of(backend) == {"sparse"} | first_turn


def test_a_region_in_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("qwen2_5_vl", num_layers=2), prompt("qwen2_5_vl")
    layer = model.model.language_model.layers[0]
    with monkeypatch.context() as patch:
        for module in (layer, layer.mlp):
            region = torch.compiler.nested_compile_region(type(module).forward)
            patch.setattr(type(module), "forward", region)
        backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
        logits = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
    check(model, logits, inputs)
    assert runs_of(backend) == {"sparse"}


# Caches and generate


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 3,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_scores": True,
    # random weights may say "image"; a decoded image token is one of a span, not text
    "suppress_tokens": [START_ID, END_ID, IMAGE_ID, VIDEO_ID],
}


def check_generate(model: Any, backend: Any, inputs: Any, options: Any, expected_of: Any) -> None:
    args = model, profile_of(model).categories, *template_of(inputs), inputs
    expected = generate_reference(*args, **OPTIONS, **expected_of)
    model.compile(backend=backend)
    try:
        with torch._dynamo.config.patch(recompile_limit=64):
            found = model.generate(**inputs, **OPTIONS, **options)
    finally:
        model._compiled_call_impl = None
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert runs_of(backend) == {"sparse", "dense: no query in a second image"}


@pytest.mark.parametrize(
    "quantizer",
    ["hqq", pytest.param("optimum.quanto", marks=pytest.mark.nightly)],
)
def test_generate_with_a_quantised_cache(quantizer: str) -> None:
    """The cache cuts every layer in two; the parameters tell what is left of it apart."""
    package(quantizer)
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": quantizer.rpartition(".")[2], "nbits": 4},
    }
    model = model_of()
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    check_generate(model, backend, prompt(), options, options)


def test_the_second_turn_of_a_quantised_cache_takes_a_template() -> None:
    """Nobody can tell which tokens its tensors hold: dense with a warning, or as the user says."""
    package("hqq")
    model, inputs = model_of(), prompt()
    span_id, is_sink = template_of(inputs)
    config = model.config.get_text_config()
    turns = split_turns(model, inputs, second_image(inputs))

    def new_cache() -> QuantizedCache:
        return QuantizedCache("hqq", config, nbits=4, q_group_size=16)

    def run(call: Any, cache: QuantizedCache, second: Any) -> torch.Tensor:
        call(**turns[0], past_key_values=cache, use_cache=True)
        with second:
            return call(**turns[1], past_key_values=cache, use_cache=True).logits

    def refer(categories: Any) -> torch.Tensor:
        cache, past = new_cache(), turns[0]["input_ids"].shape[1]
        first = span_id[:, :past], is_sink[:, :past]
        extra = {"past_key_values": cache, "use_cache": True}
        run_reference(model, profile_of(model).categories, *first, turns[0], **extra)
        return run_reference(model, categories, span_id, is_sink, turns[1], **extra).logits

    categories = profile_of(model).categories
    sparse, dense = refer(categories), refer(torch.zeros_like(categories))
    assert (sparse - dense).abs().max() > 1e-2
    backend = blindsight_backend(profile_of(model), inner="eager", lowering="fused")
    compiled = torch.compile(model, backend=backend)
    warned = pytest.warns(BlindsightWarning, match="already in the cache are not known.*template")
    torch.testing.assert_close(run(compiled, new_cache(), warned), dense, atol=1e-4, rtol=1e-4)
    told = use_template(span_id, is_sink)
    torch.testing.assert_close(run(compiled, new_cache(), told), sparse, atol=1e-4, rtol=1e-4)


# Contexts


def test_inference_mode_throughout() -> None:
    """Made, compiled and called inside, several times, and on a cache."""
    with torch.inference_mode():
        model, inputs = model_of(), prompt()
        backend = blindsight_backend(profile_of(model), inner="aot_eager", lowering="fused")
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            output = compiled(**inputs, use_cache=True)
            check(model, output.logits, inputs)
        longer = append_text(inputs, torch.tensor([[20, 21, 22]]))
        second = split_turns(model, longer, inputs["input_ids"].shape[1])[1]
        found = compiled(**second, past_key_values=output.past_key_values, use_cache=True).logits
        check(model, torch.cat([output.logits, found], dim=1), longer)
    assert runs_of(backend) == {"sparse", "dense: no query in a second image"}


@pytest.mark.parametrize("lowering", ["fused", "split"])
def test_autocast(lowering: str) -> None:
    model, inputs = model_of(), prompt()
    args = profile_of(model).categories, *template_of(inputs), inputs
    exact = run_reference(reference_copy(model), *args, use_cache=False).logits
    backend = blindsight_backend(profile_of(model), inner="aot_eager", lowering=lowering)
    with torch.autocast("cpu", torch.bfloat16):
        same_dtype = run_reference(model, *args, use_cache=False).logits
        found = torch.compile(model, backend=backend)(**inputs, use_cache=False).logits
    assert found.dtype == torch.bfloat16
    assert_close_to_reference(found, same_dtype, exact, valid_positions(inputs))
    assert runs_of(backend) == {"sparse"}


# Inductor's own


@pytest.mark.inductor
@pytest.mark.parametrize(
    "where", ["options", pytest.param("config_patches", marks=pytest.mark.nightly)]
)
def test_a_pass_of_the_users_in_inductor(where: str) -> None:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Watch(CustomGraphPass):  # type: ignore[misc]
        def __call__(self, graph: torch.fx.Graph) -> None:
            seen.append(any("flex_attention" in str(node.target) for node in graph.nodes))

        def uuid(self) -> bytes:
            return where.encode()

    name = "post_grad_custom_post_pass"
    before = getattr(config, name)
    model, inputs = model_of(num_layers=1), prompt()
    settings: Any = {where: {name: Watch()}}
    with torch._inductor.config.patch(force_disable_caches=True):
        backend = blindsight_backend(profile_of(model), lowering="fused", **settings)
        check(
            model, torch.compile(model, backend=backend)(**inputs, use_cache=False).logits, inputs
        )
    assert any(seen), "the pass must see the attention that we put in"
    assert getattr(config, name) is before


@pytest.mark.inductor
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("reduce-overhead", marks=pytest.mark.nightly),
        "max-autotune-no-cudagraphs",
    ],
)
def test_modes_of_inductor(mode: str) -> None:
    model, inputs = model_of(num_layers=1), prompt()
    backend = blindsight_backend(profile_of(model), lowering="fused", mode=mode)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        check(model, compiled(**inputs, use_cache=False).logits, inputs)
    assert runs_of(backend) == {"sparse"}
