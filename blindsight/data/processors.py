"""Processors of transformers: load one, and make a model's inputs of samples.

Shapes: B batch, T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from blindsight.data.media import video_arguments
from blindsight.data.rows import Sample
from blindsight.error_text import local_path, on_one_line, shortened

_PROBES = ((1600, 1200), (60, 40))  # width and height of images, in pixels


def model_inputs(
    processor: Any,
    samples: Sequence[Sample],
    *,
    padding_side: str = "left",
) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward for a batch of samples.

    Args:
        processor: A processor of transformers, with a chat template, a tokenizer and an image
            processor; see :func:`load_processor`.
        samples: One for each row of the batch. An assistant's answer at the end is left out: a
            prompt ends where the assistant's turn begins.
        padding_side: ``"left"`` or ``"right"``.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[B, T]``, the pixels, and whatever else the model's
        family needs.

    Raises:
        ValueError: The processor cannot take these samples; the message says why.
        ImportError: A video has to be decoded, and no decoder is installed.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}.")
    if not samples:
        raise ValueError("samples must be at least one, got none.")
    if hasattr(processor, "convert_tokens_to_ids"):
        raise ValueError(
            f"processor must take images, got a tokenizer, {type(processor).__name__}. Give the "
            "model's processor: blindsight.data.processors.load_processor(path)."
        )
    texts = [
        processor.apply_chat_template(sample.prompt, tokenize=False, add_generation_prompt=True)
        for sample in samples
    ]
    tokenizer = getattr(processor, "tokenizer", processor)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if len(samples) > 1:
        if getattr(tokenizer, "pad_token", None) is None:
            raise ValueError(
                "tokenizer must have a pad_token for batches of several prompts, got none. Set "
                "one, or use a batch size of 1."
            )
        options.update(padding=True, padding_side=padding_side)
    bos = getattr(tokenizer, "bos_token", None)
    if bos is not None and texts[0].startswith(bos):
        options["add_special_tokens"] = False  # the template has written it already
    images = [sample.images for sample in samples]
    videos = [sample.videos for sample in samples]
    if any(videos):
        options.update(video_arguments(processor, videos))
    try:
        return dict(processor(text=texts, images=images if any(images) else None, **options))
    except (RuntimeError, ValueError) as error:
        what = shortened(on_one_line(error))
        if len(samples) == 1 or not any(videos):
            numbers = ", ".join(str(sample.index) for sample in samples)
            raise ValueError(
                f"sample {numbers} must be what {type(processor).__name__} takes, got: {what}"
            ) from error
        raise ValueError(
            f"processor must take {len(samples)} prompts with videos at once, and "
            f"{type(processor).__name__} did not: {what} Try a batch size of 1: some need the same "
            "number of frames in every video."
        ) from error


def digest_of_processor(processor: Any) -> str:
    """Return a digest of what a processor makes of a large and a small image, and some text.

    It tells other limits of images from these, other chat templates, and other tokens. Of videos
    it takes the settings.
    """
    from PIL import Image

    images = [Image.linear_gradient("L").convert("RGB").resize(size) for size in _PROBES]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is new?"}]
    probe = Sample(images, [{"role": "user", "content": content}], None, None, 0)
    digest = hashlib.sha256()
    try:
        inputs = model_inputs(processor, [probe])
    except ValueError as error:  # which samples may well do without
        inputs = {"error": str(error)}
    for name, value in sorted(inputs.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{list(value.shape)} {value.dtype}".encode())
            value = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    if (videos := getattr(processor, "video_processor", None)) is not None:
        digest.update(videos.to_json_string().encode())
    return digest.hexdigest()


def inputs_on(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's forward on the model's device, with pixels in its dtype.

    Most families convert their pixels themselves; Aria, Llama 4 and Kimi do not.
    """
    parameter = next(model.parameters())
    dtype = getattr(model, "dtype", parameter.dtype)

    def on_model(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        is_pixels = name.startswith("pixel_values") and value.is_floating_point()
        return value.to(parameter.device, dtype if is_pixels else None)

    return {name: on_model(name, value) for name, value in inputs.items()}


def load_processor(path: str | os.PathLike[str]) -> Any:
    """Return the processor of a model.

    Where torchvision is not installed, a processor that also takes videos is built without its
    video part, and images go through Pillow.

    Args:
        path: A folder, or the id of a model on the hub.

    Raises:
        ValueError: There is no processor.
        ImportError: The processor needs a package that is not installed.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    auto: Any = AutoProcessor
    name = local_path(os.fspath(path), "model")
    try:
        try:
            return auto.from_pretrained(name)
        except (ImportError, OSError) as error:
            # Videos need torchvision, or were left out when the processor was saved without it.
            if not {"torchvision", "video"} & set(str(error).lower().replace("`", " ").split()):
                raise
            config = AutoConfig.from_pretrained(name)
            try:
                return without_videos(PROCESSOR_MAPPING[type(config)]).from_pretrained(name)
            except (AttributeError, TypeError):
                raise error from None  # some processors cannot do without that part
    except ImportError as error:
        raise ImportError(
            f"the processor of {name!r} needs a package that is not installed: {on_one_line(error)}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model must have a processor, got none in {name!r}: {on_one_line(error)}"
        ) from error


def without_videos(processor_class: Any) -> Any:
    """Return a variant of a processor class that takes no videos, and needs no torchvision."""

    def get_attributes(cls: Any) -> list[str]:
        return [part for part in processor_class.get_attributes() if part != "video_processor"]

    # The same name: it is written to the files that the processor is saved in.
    return type(
        processor_class.__name__,
        (processor_class,),
        {"get_attributes": classmethod(get_attributes)},
    )
