"""The long prompt of the demo, made of crops of photographs, and a model that reads it.

The default needs no download: the two sample photographs of scikit-learn go through the family's
own image processor into a small Qwen2.5-VL with random weights, whose tokens are bytes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from blindsight.configs import text_config

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")

# The small model's vocabulary: the bytes, then these.
_CHAT_START, _CHAT_END, _VISION_START, _VISION_END, _IMAGE, _VIDEO = range(256, 262)
_VOCAB_SIZE = 264
_PATCH_SIZE, _MERGE_SIZE = 14, 2
_PIXELS = _PATCH_SIZE * _MERGE_SIZE  # an image token stands for this many, squared

_CAPTION = "Photograph {number}: "
_QUESTION = "Which of these photographs were taken at the same place, and what differs?"
_MAX_LOGITS = 2**26  # held at once: 256 MiB in float32


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo; see ``blindsight demo --help``."""

    images: Path | None = None
    num_images: int = 12
    tokens: int = 4000
    layers: int = 2
    model: str | None = None
    profile: Path | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    inner: str = "inductor"
    whole: bool = False
    check: bool = True
    repeats: int = 3
    new_tokens: int = 8
    part: str = "both"

    def __post_init__(self) -> None:
        for name in ("num_images", "tokens", "layers", "repeats", "new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.part not in ("answers", "speed", "both"):
            raise ValueError(f"part must be 'answers', 'speed' or 'both', got {self.part!r}.")


def load(options: DemoOptions) -> tuple[nn.Module, dict[str, Any], str]:
    """Return a model, its inputs for one prompt of images, and a description of the model."""
    draw = random.Random(options.seed)
    images = _load_images(options, draw)
    if options.model is None:
        model = _build_model(options)
        inputs = _build_inputs(images)
        weights = f"random weights (seed {options.seed})"
    else:
        model, inputs = _load_pretrained(options, images)
        weights = options.model
    model = model.to(options.device)
    inputs = {
        name: value.to(options.device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    dtype = str(options.dtype).removeprefix("torch.")
    return model, inputs, f"{type(model).__name__}, {weights}, {dtype} on {options.device}"


# The photographs.


def _load_images(options: DemoOptions, draw: random.Random) -> list[Image.Image]:
    """Return the images of the prompt, of various sizes: whole photographs, then crops of them."""
    photos = _sample_photos() if options.images is None else _photos_of(options.images)
    overhead = len(_CAPTION) + 4  # delimiters and such
    average = (options.tokens - len(_QUESTION)) / options.num_images - overhead
    images = []
    for at in range(options.num_images):
        photo = photos[at % len(photos)]
        scale = 1.0 if at < len(photos) else draw.uniform(0.3, 0.8)
        area = max(4.0, average * draw.uniform(0.6, 1.4))  # in image tokens
        shape = photo.width / photo.height * draw.uniform(0.7, 1.4)
        width = max(2, round(math.sqrt(area * shape)))
        height = max(2, round(area / width))
        crop_width = scale * min(photo.width, photo.height * width / height)
        crop_height = crop_width * height / width
        left = draw.uniform(0, photo.width - crop_width)
        top = draw.uniform(0, photo.height - crop_height)
        box = (left, top, left + crop_width, top + crop_height)
        images.append(photo.resize((width * _PIXELS, height * _PIXELS), box=box))
    return images


def _sample_photos() -> list[Image.Image]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise ImportError(
            "the sample photographs come with scikit-learn, which is not installed. Install "
            "blindsight[demo], or give a folder of images."
        ) from None
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _photos_of(folder: Path) -> list[Image.Image]:
    if not folder.is_dir():
        raise ValueError(f"images must be an existing folder, got {str(folder)!r}.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"images must be a folder with {', '.join(IMAGE_SUFFIXES)} files, got none in "
            f"{str(folder)!r}."
        )
    return [Image.open(path).convert("RGB") for path in paths]


# The model.


def _build_model(options: DemoOptions) -> nn.Module:
    """Return a small Qwen2.5-VL with random weights, drawn so that attention is uneven."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    hidden_size, num_heads = 512, 8
    text = {
        "vocab_size": _VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 2,
        "bos_token_id": _CHAT_START,
        "eos_token_id": _CHAT_END,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],  # of the 32 frequencies of a head
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": hidden_size,
        "patch_size": _PATCH_SIZE,
        "spatial_merge_size": _MERGE_SIZE,
        "window_size": 4 * _PIXELS,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
        vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )
    model_class: Any = Qwen2_5_VLForConditionalGeneration
    model: nn.Module = model_class._from_config(
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(options.seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        spread = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
        if "q_proj" in name or "k_proj" in name:
            spread *= 1.6  # or every head would average over all that it sees
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(spread * noise)
    return model.to(options.dtype).eval()


def _build_inputs(images: list[Image.Image]) -> dict[str, Tensor]:
    """Return the inputs of the small model: a chat turn with a text before each image."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=_PATCH_SIZE, merge_size=_MERGE_SIZE)
    pixels = processor(images=images, return_tensors="pt")
    ids = [_CHAT_START, *b"user\n"]
    for number, grid in enumerate(pixels["image_grid_thw"], start=1):
        num_tokens = int(grid.prod()) // _MERGE_SIZE**2
        ids += _CAPTION.format(number=number).encode()
        ids += [_VISION_START, *[_IMAGE] * num_tokens, _VISION_END]
    ids += [*_QUESTION.encode(), _CHAT_END, *b"\n", _CHAT_START, *b"assistant\n"]
    input_ids = torch.tensor([ids])
    # Nothing is padded, so there is no attention mask and dense attention is at its fastest.
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == _IMAGE).int(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def _load_pretrained(
    options: DemoOptions, images: list[Image.Image]
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model_class: Any = AutoModelForImageTextToText
    processor_class: Any = AutoProcessor
    processor = processor_class.from_pretrained(options.model)
    content: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        content.append({"type": "text", "text": _CAPTION.format(number=number)})
        content.append({"type": "image", "image": image})
    content.append({"type": "text", "text": _QUESTION})
    inputs = dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )
    inputs.pop("attention_mask", None)  # as in _build_inputs
    model: nn.Module = model_class.from_pretrained(
        options.model, dtype=options.dtype, attn_implementation="sdpa"
    )
    keep = _MAX_LOGITS // text_config(model.config).vocab_size
    if keep < inputs["input_ids"].shape[1]:
        inputs["logits_to_keep"] = keep
    return model.eval(), inputs
