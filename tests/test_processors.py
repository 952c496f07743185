"""From images and messages to spans: what the real processors of the families write."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING

from blindsight import TemplateRule
from blindsight.calibrate import calibrate
from blindsight.calibration.prober import Prober
from blindsight.data.processors import inputs_on, model_inputs
from blindsight.data.samples import load_samples
from blindsight.families import FAMILIES
from family_models import FAMILIES as TINY
from family_models import IMAGE_ID, IMAGE_SIZE, SPECIAL_IDS, make_inputs, tiny_model, why_not_here
from family_processors import HAS_TORCHVISION, ROWS, make_processor

# heights and widths in the side of a tile: two tiles, one, two below each other
SIZES = ((1, 2), (1, 1), (2, 1))
# Each tile of an image is a span.
IN_PIECES = {"idefics2"}
# How many frames of a video are a span, where it is not two.
FRAMES_OF_A_SPAN = {
    **dict.fromkeys(("internvl", "smolvlm", "minicpmv4_6", "video_llama_3"), 1),
    **dict.fromkeys(("gemma4", "gemma4_unified"), 1),
    "kimi_k25": 4,
    "molmo2": 1,
    "llava_onevision": 8,  # one run of tokens, and nothing tells its frames
}
# Tiny models that their processors do not fit.
NO_MODEL = {"aria": "its image processor makes images of 490 or 980 pixels"}


def conversation(sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(
            generator.integers(0, 255, (h * IMAGE_SIZE, w * IMAGE_SIZE, 3), dtype=np.uint8)
        )
        for h, w in sizes
    ]
    content = [{"type": "text", "text": "see"}]
    for _ in images:
        content += [{"type": "image"}, {"type": "text", "text": " and "}]
    return {"images": images, "messages": [{"role": "user", "content": content}]}


def processor_or_skip(family: str) -> Any:
    try:
        return make_processor(family)
    except ImportError as error:
        pytest.skip(f"the processor of {family}: {' '.join(str(error).split())}")


def rule_of(family: str, processor: Any) -> TemplateRule:
    config_class = CONFIG_MAPPING[family]
    fields = config_class.__dataclass_fields__
    known = {name: value for name, value in SPECIAL_IDS.items() if name in fields}
    return TemplateRule.from_config(config_class(**known), processor)


def test_no_family_is_forgotten() -> None:
    elsewhere = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"}  # processors of their wholes
    assert set(ROWS) | elsewhere == set(FAMILIES)


@pytest.mark.parametrize("family", ROWS)
def test_what_a_processor_writes_is_found(family: str) -> None:
    processor = processor_or_skip(family)
    samples = load_samples([conversation(SIZES), conversation(SIZES[1:])])
    ids = model_inputs(processor, list(samples))["input_ids"]
    span_id, is_sink = rule_of(family, processor).template(ids).tensors()
    assert (span_id[ids == IMAGE_ID] > 0).all()
    if family in IN_PIECES:
        return
    assert span_id.amax(1).tolist() == [3, 2]
    assert torch.equal(is_sink.sum(1), span_id.amax(1))
    for row, sizes in enumerate((SIZES, SIZES[1:])):
        for number, size in enumerate(sizes, 1):
            (twice,) = load_samples([conversation((size, size))])
            expected = (model_inputs(processor, [twice])["input_ids"] == IMAGE_ID).sum() / 2
            assert (ids[row] == IMAGE_ID)[span_id[row] == number].sum() == expected > 1


@pytest.mark.skipif(not HAS_TORCHVISION, reason="video processors need torchvision")
@pytest.mark.parametrize("family", ROWS)
def test_frames_of_a_video_are_found(family: str) -> None:
    processor = processor_or_skip(family)
    if getattr(processor, "video_processor", None) is None:
        pytest.skip("takes no videos")
    if family == "ernie4_5_vl_moe":
        pytest.skip("writes times into frames, in a font that it downloads")
    video = ROWS[family].image.replace(processor.image_token, processor.video_token)
    before, image, after = processor.chat_template.partition("{% else %}")
    processor.chat_template = f"{before}{{% elif entry.type == 'video' %}}{video}{image}{after}"
    frames = list(np.random.default_rng(0).integers(0, 255, (8, 56, 112, 3), dtype=np.uint8))
    content = [{"type": "text", "text": "see"}, {"type": "video"}, {"type": "text", "text": "?"}]
    row = {
        "videos": [{"frames": list(map(Image.fromarray, frames)), "fps": 2}],
        "messages": [{"role": "user", "content": content}],
    }
    inputs = model_inputs(processor, list(load_samples([row])))
    template = rule_of(family, processor).template_of_inputs(inputs)
    assert int(template.span_id.max()) == 8 // FRAMES_OF_A_SPAN.get(family, 2)


def runs(families: Any) -> list[Any]:
    return [
        pytest.param(family, marks=[] if family in {"idefics3"} else [pytest.mark.nightly])
        for family in families
        if family in TINY
    ]


@pytest.mark.parametrize("family", runs(ROWS))
def test_a_model_is_calibrated(family: str) -> None:
    """In bfloat16, as checkpoints are: not every family converts its pixels."""
    processor = processor_or_skip(family)
    if reason := why_not_here(family) or NO_MODEL.get(family):
        pytest.skip(reason)
    model = tiny_model(family, torch.bfloat16)
    samples = [conversation(SIZES), conversation(SIZES[1:])]
    profile = calibrate(model, processor, samples, batch_size=2, budget=0.1, progress=False)
    assert profile.calibration["num_samples"] == "2"
    assert all(torch.isfinite(tensor).all() for tensor in profile.evidence.values())


@pytest.mark.parametrize("family", ["kimi_k25", pytest.param("aria", marks=pytest.mark.nightly)])
def test_pixels_become_what_the_model_computes_in(family: str) -> None:
    model, inputs = tiny_model(family, torch.bfloat16), make_inputs(family, 3)
    timestamps = {"second_per_grid_ts": torch.tensor([0.1])}
    found = inputs_on(model, {**inputs, **timestamps, "names": ["a"]})
    assert found["pixel_values"].dtype == torch.bfloat16
    assert found["second_per_grid_ts"].dtype == torch.float32
    assert found["input_ids"].dtype == torch.int64 and found["names"] == ["a"]
    processor = type("Tokenizer", (), {"get_vocab": lambda self: ROWS[family].tokens})()
    measured = Prober(model, TemplateRule.from_config(model.config, processor))(inputs)
    assert (measured.error.amax((0, 1, 2)) > 0).tolist() == [False, True, True, True]
