"""What a model shows of its forwards: nothing that Dynamo drops, or that failed, goes unseen."""

import copy
import gc
import io
import pickle
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import StaticCache

import blindsight
from blindsight import BlindsightWarning, Profile, blindsight_backend, use_template
from blindsight.reference import reference_logits
from blindsight.tensor_notes import TensorNotes
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


def compiled(model: Any, *, is_given: bool = True) -> Any:
    return torch.compile(model, backend=backend_of(model, is_given=is_given))


def backend_of(model: Any, *, is_given: bool = True) -> Any:
    options = {"inner": "eager", "lowering": "fused", "model": model if is_given else None}
    return blindsight_backend(profile_of(model), **options)


def inputs_of(*row: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    return make_inputs("qwen2_5_vl", [list(row)], seed=seed)


def assert_right(run: Any, inputs: dict[str, torch.Tensor], model: Any) -> None:
    expected = reference_logits(model, inputs, profile_of(model))
    torch.testing.assert_close(run(**inputs).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoder_alone", [False, True])
def test_what_dynamo_drops_for_good_is_an_error_each_time(model: Any, decoder_alone: bool) -> None:
    prompts = [inputs_of(text, *PROMPT) for text in (1, 2, 3, 4, 5)]
    if decoder_alone:
        run = model
        model.model.language_model.compile(backend=backend_of(model), dynamic=False)
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
            assert re.search("recompile_limit ?= ?64", message)
        inputs, _ = dropped[-1]
        template = profile_of(model).rule.template(inputs["input_ids"])
        told = pytest.raises(ValueError, match="did not run through this backend under the temp")
        with told, use_template(*template.tensors()):
            run(**inputs)
        run(**inputs_of(1, 2))  # nothing was to be sparse
        with blindsight.disabled():
            run(**inputs)
    if not decoder_alone:
        model.model.language_model.norm.compile(backend="eager")
        model(**inputs)  # its decoder is not compiled where it is called so


def test_a_forward_that_failed_is_forgotten(model: Any) -> None:
    """Its prompt must not be taken for the next one's, which shows no ids."""
    run = compiled(model, is_given=False)
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
@pytest.mark.parametrize("is_first", [False, True])
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
    monkeypatch.setattr("blindsight.runtime._limit_hits", lambda: 0)
    runtime = backend_of(model, is_given=False).state.runtime
    runtime.met.update(runtime.layers)
    first, second = (inputs_of(*PROMPT, seed=seed)["input_ids"] for seed in (0, 1))
    runtime.observe(first)
    runtime.serve([0])
    with pytest.warns(BlindsightWarning, match=r"layers 1 of the profile .* call again"):
        runtime.observe(second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
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


def test_garbage_collected_in_the_midst_of_a_note() -> None:
    class Collects(dict[int, Any]):
        def __setitem__(self, key: int, value: Any) -> None:
            gc.collect()
            super().__setitem__(key, value)

    notes: TensorNotes[int] = TensorNotes()
    notes._entries = Collects()
    kept = torch.zeros(1)

    def write() -> None:
        for number in range(3):
            cycle: list[Any] = [torch.zeros(1)]
            cycle.append(cycle)
            notes.put(cycle[0], number)
            del cycle
        notes.put(kept, 3)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert notes.get(kept) == 3
    assert len(notes._entries) == 1


def test_a_watched_model_is_copied_and_stored(model: Any) -> None:
    run = compiled(model)
    inputs = inputs_of(*PROMPT)
    assert_right(run, inputs, model)
    assert_right(copy.deepcopy(run), inputs, model)
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
