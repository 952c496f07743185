"""What a model shows of its forwards: nothing that Dynamo drops, or that failed, goes unseen."""

import contextlib
import contextvars
import copy
import gc
import io
import itertools
import pickle
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import blindsight
from blindsight import BlindsightWarning, Profile, blindsight_backend, use_template
from blindsight.reference import reference_logits
from blindsight.runtime.cache_notes import Witness
from blindsight.runtime.context import is_disabled
from blindsight.runtime.history import SeenHistory
from blindsight.runtime.tensor_notes import TensorNotes
from models import Image, full_position_ids, make_inputs, split_turns, tiny_model, without_vision

CATEGORIES = [[3, 1, 2, 0], [2, 3, 1, 0]]
PROMPT = [5, Image(2, 5), 4, Image(4, 3), Image(), 7]


@pytest.fixture
def model() -> Any:
    return without_vision(tiny_model("qwen2_5_vl"))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def profile_of(model: Any) -> Profile:
    return Profile.for_model(model, CATEGORIES)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend=backend_of(model))


def backend_of(model: Any, **options: Any) -> Any:
    return blindsight_backend(profile_of(model), inner="eager", lowering="fused", **options)


def inputs_of(*row: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    return make_inputs("qwen2_5_vl", [list(row)], seed=seed)


def assert_right(run: Any, inputs: dict[str, torch.Tensor], model: Any) -> None:
    expected = reference_logits(model, inputs, profile_of(model))
    torch.testing.assert_close(run(**inputs).logits, expected, atol=1e-4, rtol=0)


def test_pixels_without_a_token_of_an_image_are_warned_of(model: Any) -> None:
    rule = replace(profile_of(model).rule, image_token_ids=(77,), video_token_ids=())
    profile = Profile.for_model(model, CATEGORIES, rule=rule)
    run = torch.compile(model, backend=blindsight_backend(profile, inner="eager"))
    inputs = inputs_of(*PROMPT)
    with use_template(profile_of(model).rule.template(inputs["input_ids"])):
        run(**inputs)  # who says where they are need not be told
    with pytest.warns(BlindsightWarning, match=r"given pixels, but by .*ids=\(77,\)\) the prompt"):
        run(**inputs)


def test_a_witness_sees_what_changed_places(model: Any) -> None:
    """In inference mode nothing counts what is written: the keys themselves have to tell."""
    history = SeenHistory(profile_of(model).rule, torch.zeros(3, 8, dtype=torch.uint8))
    with torch.inference_mode():
        keys = torch.randn(3, 2, 10, 4)
        witness = Witness.of(keys, history, before=None)
        assert witness is not None and witness.holds(keys)
        keys[:, :, 8:] += 1  # beyond what is known
        assert witness.holds(keys)
        for dim in range(3):
            order = torch.arange(keys.shape[dim])
            order[:2] = torch.tensor([1, 0])
            assert not witness.holds(keys.index_select(dim, order))


@pytest.mark.parametrize(
    "part",
    ["whole", "decoder", "forward", pytest.param("bound forward", marks=pytest.mark.nightly)],
)
def test_what_dynamo_drops_for_good_is_an_error_each_time(model: Any, part: str) -> None:
    prompts = [inputs_of(text, *PROMPT) for text in (1, 2, 3, 4, 5)]
    run = model
    if part == "decoder":
        model.model.language_model.compile(backend=backend_of(model), dynamic=False)
    elif part == "forward":
        model.forward = torch.compile(model.forward, backend=backend_of(model))
    elif part == "bound forward":
        run = torch.compile(model.forward, backend=backend_of(model))
    else:
        run = compiled(model)
    dropped = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for inputs in prompts:
            try:
                assert_right(run, inputs, model)
            except ValueError as error:
                dropped.append((inputs, str(error)))
        assert len(dropped) >= 2
        for _, message in dropped:
            assert "did not run through this backend" in message
            limit, others = (re.search(x, message) for x in ("recompile_limit ?= ?64", "eval"))
            assert limit and others and limit.start() < others.start()  # the likely cause first
        inputs, _ = dropped[-1]
        template = profile_of(model).rule.template(inputs["input_ids"])
        told = pytest.raises(ValueError, match="did not run through this backend under the temp")
        with told, use_template(template):
            run(**inputs)
        run(**inputs_of(1, 2))  # nothing was to be sparse
        with blindsight.disabled():
            run(**inputs)
    if part == "whole":
        model.model.language_model.norm.compile(backend="eager")
        model(**inputs)  # its decoder is not compiled where it is called so


def test_a_forward_that_failed_is_forgotten(model: Any) -> None:
    """Its prompt must not be taken for the next one's, which shows no ids."""
    run = compiled(model)
    first, second = inputs_of(*PROMPT), inputs_of(*reversed(PROMPT), seed=1)
    assert_right(run, first, model)
    with pytest.raises(Exception, match=r"out of bounds|fake tensor|do not match"):
        run(**{**first, "pixel_values": first["pixel_values"][:-4]})
    embeds = model.get_input_embeddings()(second["input_ids"])
    given = {
        "inputs_embeds": embeds,
        "attention_mask": second["attention_mask"],
        "position_ids": full_position_ids(model, second),
    }
    with pytest.warns(BlindsightWarning, match="input_ids were not seen"):
        found = run(**given).logits
    torch.testing.assert_close(found, model(**given).logits)


@torch._dynamo.config.patch(recompile_limit=64)  # newer transformers have frames that ask for many
@pytest.mark.parametrize("is_first", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_call_after_an_error_in_the_decoder_is_right(model: Any, is_first: bool) -> None:
    run = compiled(model)
    inputs = inputs_of(*PROMPT)
    fails: list[str] = []

    @torch.compiler.disable
    def fail(*args: Any) -> None:
        if fails:
            raise MemoryError(fails.pop())

    model.model.language_model.layers[1].register_forward_pre_hook(fail)
    if not is_first:
        assert_right(run, inputs, model)
    fails.append("out of memory")
    with pytest.raises(MemoryError):
        run(**inputs)
    assert_right(run, inputs, model)
    assert_right(run, inputs_of(3, *PROMPT), model)


def test_a_forward_that_may_have_failed_is_a_warning(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no hook tells its end, half of the layers may have run, and then an error."""
    monkeypatch.setattr("blindsight.runtime.left_dense.recompile_limit_was_hit", lambda: False)
    forwards = backend_of(model).state.forwards
    forwards.met.update(forwards.layers)
    first, second = (inputs_of(*PROMPT, seed=seed)["input_ids"] for seed in (0, 1))
    forwards.observe(first)
    forwards.serve([0])
    with pytest.warns(BlindsightWarning, match=r"layers 1 of the profile .* call again"):
        forwards.observe(second)


@pytest.mark.parametrize(
    "mode", [pytest.param(torch.no_grad, marks=pytest.mark.nightly), torch.inference_mode]
)
def test_another_prompts_keys_in_the_same_cache_are_noticed(model: Any, mode: Any) -> None:
    run = compiled(model)
    question = inputs_of(Image(2, 2), 6, seed=9)

    def turns(first: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        names = ("input_ids", "attention_mask", "mm_token_type_ids")
        whole = {name: torch.cat([first[name], question[name]], 1) for name in names}
        for name in ("pixel_values", "image_grid_thw"):
            whole[name] = torch.cat([first[name], question[name]])
        return split_turns(model, whole, first["input_ids"].shape[1])

    with mode():
        (one, next_one), (other, _) = turns(inputs_of(*PROMPT)), turns(inputs_of(*reversed(PROMPT)))
        cache = StaticCache(config=model.config, max_cache_len=128)
        run(**one, past_key_values=cache)
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        run(**next_one, past_key_values=cache)  # known, and sparse
        cache.reset()
        run(**other, past_key_values=cache)
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        with pytest.warns(BlindsightWarning, match="already in the cache are not known"):
            run(**next_one, past_key_values=cache)


@pytest.mark.parametrize(
    "cache_class", [StaticCache, pytest.param(DynamicCache, marks=pytest.mark.nightly)]
)
def test_turns_on_a_cache_that_slides(cache_class: Any) -> None:
    """Layers compiled one by one each have their own; in inference mode nobody counts writes."""
    model = without_vision(tiny_model("gemma3"))
    backend = backend_of(model)
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    turns = [[5, Image(), 3], [4, Image(), 2], [1], [1], [3, Image(), Image(), 2], [4, Image(), 2]]
    limits = {"max_cache_len": 128} if cache_class is StaticCache else {}

    def run() -> list[torch.Tensor]:
        cache, found, num_tokens = cache_class(config=model.config, **limits), [], 0
        for seed, turn in enumerate(turns):
            inputs = make_inputs("gemma3", [turn], seed=seed)
            num_tokens += inputs["input_ids"].shape[1]
            inputs["attention_mask"] = torch.ones(1, num_tokens, dtype=torch.long)
            found.append(model(**inputs, past_key_values=cache).logits)
        return found

    with torch._dynamo.config.patch(recompile_limit=64):
        expected = run()
        with torch.inference_mode():
            found = run()  # a warning, that the tokens in the cache are not known, is an error
    for ours, others in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, others, atol=1e-4, rtol=0)


def test_the_end_of_a_sequence_does_not_tell_what_slid_away() -> None:
    """Two caches may hold the very same keys of a window, and other images before it."""
    model = without_vision(tiny_model("gemma3", num_layers=1))
    profile = Profile.for_model(model, CATEGORIES[:1])
    run = torch.compile(model, backend=blindsight_backend(profile, inner="eager"))
    image = make_inputs("gemma3", [[5, Image(), 24]])
    text = make_inputs("gemma3", [[image["input_ids"].shape[1]]])
    text["input_ids"][:, -24:] = image["input_ids"][:, -24:]
    question = make_inputs("gemma3", [[3, Image(), Image(), 6]])
    length = image["input_ids"].shape[1] + question["input_ids"].shape[1]
    question["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    caches = []
    for first in (text, image):
        caches.append(DynamicCache(config=model.config))
        run(**first, past_key_values=caches[-1])
    ours, others = (cache.layers[0].keys for cache in caches)
    assert torch.equal(ours, others)
    with pytest.warns(BlindsightWarning, match="already in the cache are not known"):
        run(**question, past_key_values=copy.deepcopy(caches[1]))


def test_an_embedding_that_is_compiled_apart_shows_the_prompt(model: Any) -> None:
    backend = backend_of(model)

    class Embedding(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return model.get_input_embeddings()(input_ids)

    embed = torch.compile(Embedding(), backend=backend)
    decoder = torch.compile(model.model.language_model, backend=backend)
    inputs = inputs_of(*PROMPT)
    given = {
        "position_ids": full_position_ids(model, inputs),
        "attention_mask": inputs["attention_mask"],
    }
    decoder(inputs_embeds=embed(inputs["input_ids"]), **given)
    assert sum(row.runs.total() for row in backend.report().rows) == 2
    assert all("sparse" in how for row in backend.report().rows for how in row.runs)


@pytest.mark.parametrize("part", [pytest.param("decoder", marks=pytest.mark.nightly), "layers"])
def test_parts_that_are_replaced_by_compiled_ones(model: Any, part: str) -> None:
    """Their names have another part then."""
    backend, inner = backend_of(model), model.model
    if part == "decoder":
        inner.language_model = torch.compile(inner.language_model, backend=backend)
    else:
        layers = inner.language_model.layers
        for number, layer in enumerate(layers):
            layers[number] = torch.compile(layer, backend=backend)
    for text in (1, 2):
        assert_right(model, inputs_of(text, *PROMPT), model)


def test_what_other_threads_compile_is_no_matter(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, watched = backend_of(model), []
    model.model.language_model.compile(backend=backend)
    for text in (1, 2):
        assert_right(model, inputs_of(text, *PROMPT), model)
    forwards = backend.state.forwards
    table = model.get_input_embeddings()
    table.register_forward_pre_hook(lambda *_: watched.append(forwards.is_watched))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # it is one for all
    model(**inputs_of(2, *reversed(PROMPT), seed=1))
    assert watched == [True]


def test_what_is_dense_by_wish_is_no_error(model: Any) -> None:
    inputs = inputs_of(*PROMPT)
    dense = model(**inputs).logits
    for _ in range(2):  # the second backend takes the place of the first
        model.compile(backend=backend_of(model))
        assert_right(model, inputs, model)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(**inputs).logits, dense)
    with torch.compiler.set_stance("eager_on_recompile"):  # which says nothing of sparse or dense
        assert_right(model, inputs, model)
        with pytest.raises(ValueError, match="set no stance"):
            model(**inputs_of(1, *PROMPT))
    model.compile(backend="eager")
    torch.testing.assert_close(model(**inputs).logits, dense, atol=1e-4, rtol=0)


def test_an_interrupted_forward_is_forgotten(model: Any) -> None:
    model.model.language_model.compile(backend=backend_of(model))
    first, second = inputs_of(*PROMPT), inputs_of(*reversed(PROMPT), seed=1)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.language_model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**first)
    hook.remove()
    given = {
        "inputs_embeds": model.get_input_embeddings()(second["input_ids"]),
        "attention_mask": second["attention_mask"],
        "position_ids": full_position_ids(model, second),
    }
    with pytest.warns(BlindsightWarning, match="input_ids were not seen"):
        model.model.language_model(**given)


def test_garbage_collected_in_the_midst_of_a_note() -> None:
    class Collects(dict[int, Any]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            gc.collect()
            super().update(*args, **kwargs)

    notes: TensorNotes[int] = TensorNotes()
    notes._batches = Collects()
    kept = torch.zeros(1)

    def write() -> None:
        for number in range(3):
            cycle: list[Any] = [torch.zeros(1)]
            cycle.append(cycle)
            notes.put(cycle[:1], [number], [0])
            del cycle
        notes.put([kept], [3], [0])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert notes.get(kept) == 3
    assert len(notes._batches) == 1


def test_a_copy_has_layers_of_its_own() -> None:
    """It shares the compiled graphs, in which layers of Qwen3-VL are told by their parameters."""
    model = without_vision(tiny_model("qwen3_vl"))
    run, inputs = compiled(model), make_inputs("qwen3_vl", [PROMPT])
    assert_right(run, inputs, model)
    other = copy.deepcopy(run)
    for parameter in other.parameters():
        parameter.mul_(1.01)
    assert_right(other, inputs, other._orig_mod)
    assert_right(run, inputs, model)


def test_the_model_is_found_within_others(model: Any) -> None:
    """Whatever else holds its layers says nothing of its prompt."""

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Any, given: dict[str, Any]) -> Any:
            return self.inner(**given)

    backend = backend_of(model)
    run = torch.compile(Outer(), backend=backend)
    inputs, other = inputs_of(*PROMPT), inputs_of(*reversed(PROMPT), seed=1)
    for _ in range(2):
        assert_right(lambda **given: run(other["input_ids"], given), inputs, model)
    [found] = backend.state.models.layer_map.models
    assert found is model
    embeds = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
        "position_ids": full_position_ids(model, inputs),
    }
    with pytest.warns(BlindsightWarning, match="input_ids were not seen"):
        logits = run(other["input_ids"], embeds).logits
    torch.testing.assert_close(logits, model(**embeds).logits, atol=1e-4, rtol=0)


def test_threads_that_call_a_model_first_attach_to_it_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = backend_of(model).state.models
    attach = models.attach

    def slowly(found: Any) -> None:
        time.sleep(0.3)
        attach(found)

    monkeypatch.setattr(models, "attach", slowly)
    model.forward = lambda **_: models.attach_to_called()
    threads = [threading.Thread(target=model) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(models.layer_map.models) == 1
    assert len(models._hooks) == 2  # before and after


def test_a_part_that_ran_before_the_whole(model: Any) -> None:
    """Both are watched, and the outer one's forward is what counts."""
    backend = backend_of(model)
    model.model.compile(backend=backend)
    model.model(**inputs_of(*PROMPT))
    model.compile(backend=backend)
    for text in (1, 2, 1):
        assert_right(model, inputs_of(text, *PROMPT), model)
    assert len(backend.state.models.layer_map.models) == 2


def test_a_watched_model_is_stored(model: Any) -> None:
    run = compiled(model)
    assert_right(run, inputs_of(*PROMPT), model)
    buffer = io.BytesIO()
    torch.save(model.model.language_model, buffer)
    backend = backend_of(model)
    hook = next(iter(model._forward_pre_hooks.values()))
    assert pickle.loads(pickle.dumps(hook))(model, (), {}) is None
    backend.detach()


def test_layers_that_accelerate_moves(model: Any) -> None:
    """What ``device_map="auto"`` puts on the layers of a model on several devices."""
    hooks = pytest.importorskip("accelerate").hooks
    inputs = inputs_of(*PROMPT)
    expected = reference_logits(model, inputs, profile_of(model))
    for name, part in model.named_modules():
        if name in ("", "lm_head") or name.endswith(("layers.0", "layers.1")):
            moves = hooks.AlignDevicesHook(execution_device=torch.device("cpu"))
            hooks.add_hook_to_module(part, moves)
    found = compiled(model)(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_weights_that_accelerate_offloads_are_an_error_at_once(model: Any, how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = inputs_of(*PROMPT)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    run = compiled(model)
    if how == "in place":
        model.compile(backend=backend_of(model))
        run = model
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be parameters of the model.*offloads weights"):
            run(**inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_that_slides_is_reset(mode: Any) -> None:
    """Its keys are overwritten unread, and nothing counts what is written in inference mode."""
    model = without_vision(tiny_model("gemma3", num_layers=2))
    profile = Profile.for_model(model, CATEGORIES)
    first, second = (
        make_inputs("gemma3", [[text, Image(), 9, Image(), 8]], seed=text) for text in (5, 4)
    )
    expected = reference_logits(model, second, profile)
    backend = blindsight_backend(profile, inner="eager", lowering="fused")
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch._dynamo.config.patch(recompile_limit=64), mode():
        model(**first, past_key_values=cache, use_cache=True)
        cache.reset()
        found = model(**second, past_key_values=cache, use_cache=True).logits.clone()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_the_first_token_is_prefilled_alone(model: Any, cache_class: Any) -> None:
    inputs = inputs_of(*PROMPT)
    expected = reference_logits(model, inputs, profile_of(model))
    backend = backend_of(model)
    model.model.language_model.compile(backend=backend)
    config = model.config.get_text_config()
    sizes = {"max_cache_len": 128} if cache_class is StaticCache else {}
    cache = cache_class(config=config, **sizes)
    begin, rest = split_turns(model, inputs, 1)
    model(**begin, past_key_values=cache, use_cache=True)
    found = model(**rest, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected[:, 1:], atol=1e-4, rtol=0)


def test_a_delimiter_at_the_end_of_a_chunk_after_a_template_by_hand(model: Any) -> None:
    """Of tokens that came after the template everything is known that the rule needs."""
    inputs = inputs_of(5, Image(), 4, Image(), 6, Image(), 8)
    ids = inputs["input_ids"]
    rule = profile_of(model).rule
    starts = (ids[0] == rule.start_token_ids[0]).nonzero().flatten().tolist()
    cuts = [0, starts[2] - 3, starts[2] + 1, ids.shape[1]]
    positions = full_position_ids(model, inputs)
    outputs = {}
    warned = []
    for by_hand in (False, True):
        torch._dynamo.reset()
        model.model.language_model.compile(backend=backend_of(model))
        cache = DynamicCache(config=model.config.get_text_config())
        parts = []
        for begin, end in itertools.pairwise(cuts):
            template = rule.template(ids[:, :end]).tensors()
            is_first = begin == 0 and by_hand
            told = use_template(*template) if is_first else contextlib.nullcontext()
            with told, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                output = model(
                    input_ids=ids[:, begin:end],
                    position_ids=positions[..., begin:end],
                    attention_mask=inputs["attention_mask"][:, :end],
                    past_key_values=cache,
                    use_cache=True,
                )
            warned += [by_hand for each in caught if "a chunk ended in" in str(each.message)]
            parts.append(output.logits)
        outputs[by_hand] = torch.cat(parts, dim=1)
    torch.testing.assert_close(outputs[True], outputs[False], atol=1e-5, rtol=0)
    assert warned == [False, True]


def test_a_prefill_that_generate_leaves_uncompiled_is_heard_of(model: Any) -> None:
    """With a static cache and a ``compile_config`` transformers compiles decoding alone."""
    config = CompileConfig(backend=backend_of(model), fullgraph=False, mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "max_new_tokens": 3}
    inputs = inputs_of(*PROMPT)
    model.generate(**inputs, **options)
    with pytest.raises(ValueError, match=r"so it was dense\..* compiles decoding alone: compile"):
        model.generate(**inputs, **options)


# The first call: it is under way as the model is found


def forget_the_first_layer(model: Any, backend: Any) -> None:
    for layer in model.model.language_model.layers[1:]:
        layer.compile(backend=backend)


def hide_all_attention(model: Any, backend: Any) -> None:
    for layer in model.model.language_model.layers:
        layer.self_attn.forward = torch.compiler.disable(layer.self_attn.forward)
    model.model.language_model.compile(backend=backend)


def hide_the_first_attention(model: Any, backend: Any) -> None:
    attention = model.model.language_model.layers[0].self_attn
    attention.forward = torch.compiler.disable(attention.forward)
    model.model.language_model.compile(backend=backend)


@pytest.mark.parametrize(
    ("leave_out", "how"),
    [
        (forget_the_first_layer, "forward"),
        (hide_all_attention, "forward"),
        (hide_all_attention, "generate"),
        (hide_the_first_attention, "forward"),
    ],
)
def test_what_the_first_call_leaves_out_is_an_error_at_once(
    model: Any, leave_out: Any, how: str
) -> None:
    leave_out(model, backend_of(model))
    call, options = (model, {}) if how == "forward" else (model.generate, {"max_new_tokens": 2})
    # torch 2.15 traces what is around a hidden attention with other weights: an error, too.
    told = r"attention (of layers 0.* did not run through|at .* must be parameters of the model)"
    with pytest.raises(ValueError, match=told):
        call(**inputs_of(*PROMPT), **options)


def test_a_first_call_that_leaves_nothing_out_is_no_error(model: Any) -> None:
    expected = reference_logits(model, inputs_of(*PROMPT), profile_of(model))
    model.model.language_model.compile(backend=backend_of(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlindsightWarning)
        for _ in range(2):
            found = model(**inputs_of(*PROMPT)).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not model.lm_head._forward_pre_hooks


def test_ids_that_another_graph_saw_first_were_no_forward(model: Any) -> None:
    inputs = inputs_of(*PROMPT)
    ids = inputs.pop("input_ids")
    expected = reference_logits(model, {"input_ids": ids, **inputs}, profile_of(model))

    @torch.compile(backend=backend_of(model))
    def answer(ids: torch.Tensor) -> Any:
        ids = ids.clamp(min=0)
        torch._dynamo.graph_break()
        return model(input_ids=ids, **inputs).logits

    for _ in range(2):
        torch.testing.assert_close(answer(ids), expected, atol=1e-4, rtol=0)


def test_many_numbers_of_images_are_one_decoder(model: Any) -> None:
    """A whole model reaches Dynamo's recompile limit: frames around the vision tower count them."""
    run = tiny_model("qwen2_5_vl")
    reference = copy.deepcopy(run)
    run.get_decoder().compile(backend=backend_of(run))
    for number in range(2, 12):
        inputs = inputs_of(5, *[Image(2, 2), 3] * number)
        assert_right(run, inputs, reference)


# Warnings and contexts


def test_a_warning_that_is_an_error_is_one_at_each_call(model: Any) -> None:
    backend = backend_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BlindsightWarning)
        for _ in range(2):
            with pytest.raises(BlindsightWarning, match="so it is"):
                backend.state.forwards.warn_once("so it is")
    with pytest.warns(BlindsightWarning, match="so it is"):
        backend.state.forwards.warn_once("so it is")


def test_backends_show_the_same_warning_each(model: Any) -> None:
    backends = [backend_of(model) for _ in range(2)]
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default", BlindsightWarning)
        for backend in backends * 2:
            backend.state.forwards.warn_once("so it is")
    assert len(shown) == 2


def test_a_generator_goes_on_in_another_context() -> None:
    def stream() -> Iterator[bool]:
        with blindsight.disabled():
            yield is_disabled()
            yield is_disabled()

    steps = stream()
    found = [contextvars.copy_context().run(next, steps, None) for _ in range(3)]
    assert found == [True, False, None] and not is_disabled()
