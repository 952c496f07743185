"""Models on another device, on a machine that has none: on meta, and on one that is pretended."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pretend
from blindsight import Profile, blindsight_backend, use_template
from blindsight.evaluation.baselines import PruningMasking, WindowMasking
from blindsight.evaluation.masked_model import ProfileMasking, _CategoryMasks
from blindsight.evaluation.prefill import Decoder
from blindsight.reference import reference_logits
from models import Image, make_inputs, tiny_model

META = torch.device("meta")
LENGTH = 30


class Stop(Exception):
    """Instead of running a graph, which meta tensors have no data for."""


def trace(gm: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
    """Trace rewritten graphs with tensors that know their devices: an inner backend."""
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    if not any(name.startswith("blindsight") for name in inputs):
        return gm.forward
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in examples]
    with mode:
        gm(*fakes)
    raise Stop


def run_on_meta(decoder: Any, profile: Profile, attention_mask: Any) -> None:
    torch._dynamo.reset()
    span_id = torch.zeros(1, LENGTH, dtype=torch.int32)
    span_id[:, 3:10], span_id[:, 12:22] = 1, 2
    hidden = decoder.config.hidden_size
    backend = blindsight_backend(profile, inner=trace, lowering="fused")
    with torch.no_grad(), use_template(span_id, torch.zeros_like(span_id, dtype=torch.bool)):
        torch.compile(decoder, backend=backend)(
            inputs_embeds=torch.empty(1, LENGTH, hidden, device=META),
            position_ids=torch.zeros(3, 1, LENGTH, dtype=torch.long, device=META),
            attention_mask=attention_mask,
            use_cache=False,
        )


def decoder_on_meta() -> tuple[Any, Profile]:
    model = tiny_model("qwen2_5_vl")
    profile = Profile.for_model(model, [[1, 2, 3, 3]] * 2)
    return copy.deepcopy(model.model.language_model).to(META), profile


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_padding_mask_that_the_model_moves(dtype: torch.dtype, device: str) -> None:
    decoder, profile = decoder_on_meta()
    mask = torch.ones(1, LENGTH, dtype=dtype, device=device)
    with pytest.raises(Stop):
        run_on_meta(decoder, profile, mask)


def test_a_graph_on_two_devices_is_refused() -> None:
    decoder, profile = decoder_on_meta()
    layer = decoder.layers[1].to_empty(device="cpu")

    class Elsewhere(type(layer)):  # type: ignore[misc]
        def forward(self, hidden: Any, **arguments: Any) -> Any:
            moved = {
                name: value.to("cpu") if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            moved["position_embeddings"] = tuple(
                part.to("cpu") for part in arguments["position_embeddings"]
            )
            return super().forward(hidden.to("cpu"), **moved).to(META)

    layer.__class__ = Elsewhere
    mask = torch.ones(1, LENGTH, dtype=torch.bool, device=META)
    with pytest.raises(ValueError, match=r"layers\.1.*on one device.*meta, got cpu"):
        run_on_meta(decoder, profile, mask)


def test_pairs_are_counted_on_a_gpu() -> None:
    visible = torch.randint(1, 2**40, (2, 3, 4))
    codes = [[0, 1, 1], [3, 3, 2]]

    def count(of: torch.Tensor) -> torch.Tensor:
        prompt: Any = type("Prompt", (), {"visible": of})
        masks: Any = object.__new__(_CategoryMasks)
        masks._prompt, masks._codes = prompt, codes
        return masks.count_pairs()

    expected = [
        sum(int(visible[at, b, code]) for at, row in enumerate(codes) for code in row)
        for b in range(3)
    ]
    with pretend.pretending():
        with pytest.raises(RuntimeError, match="products of integers"):
            pretend.OnGpu(visible) @ pretend.OnGpu(visible.mT)
        found = count(pretend.OnGpu(visible))
    assert isinstance(found, pretend.OnGpu)
    assert found.data_.tolist() == expected


def evaluated(model: Any, inputs: dict[str, torch.Tensor], profile: Profile) -> list[torch.Tensor]:
    """What evaluation and its baselines make of a prompt, and the reference."""
    decoder = Decoder(model, profile)
    batch = decoder.prepare(inputs)
    found = [reference_logits(model, inputs, profile)]
    for masking in (ProfileMasking(profile.categories), WindowMasking(0.7), PruningMasking(0.8)):
        masks = masking.masks(batch.prompt)
        output = decoder.prefill(batch, masks, use_cache=True)
        tokens = decoder.decode(batch, masks, output, max_new_tokens=3, stop_ids=[])
        found += [output.logits, tokens, masks.count_pairs()]
    return found


@pytest.mark.parametrize("on_gpu", [(1,), pytest.param((0, 2), marks=pytest.mark.nightly)])
def test_a_model_on_several_devices_is_evaluated(on_gpu: tuple[int, ...]) -> None:
    """As `device_map` spreads one: each part moves what it is given."""
    model = tiny_model("qwen2_5_vl", num_layers=3)
    profile = Profile.for_model(model, [[1, 2, 3, 0], [3, 3, 2, 1], [2, 2, 2, 2]])
    rows = [[5, Image(2, 4), 4, Image(4, 2), 6], [5, Image(2, 4), 4, Image(4, 2), 3]]
    inputs = make_inputs("qwen2_5_vl", rows, pad_side="left")
    expected = evaluated(copy.deepcopy(model), inputs, profile)
    decoder = model.model.language_model
    with torch.no_grad(), pretend.pretending():
        for number, layer in enumerate(decoder.layers):
            pretend.place(layer, on_gpu=number in on_gpu)
        for module in (decoder.norm, decoder.rotary_emb, model.lm_head):
            pretend.place(module, on_gpu=False)
        found = evaluated(model, inputs, profile)
    for ours, theirs in zip(found, expected, strict=True):
        ours = ours.data_ if isinstance(ours, pretend.OnGpu) else ours
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
