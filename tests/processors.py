"""Small processors for the models of tests/models.py: a character is a token."""

import string
from itertools import chain
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    BatchFeature,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.video_utils import VideoMetadata

import models
from blindsight.data.processors import without_videos

SPECIALS = {
    "<pad>": models.PAD_ID,
    "<|vision_start|>": models.START_ID,
    "<|vision_end|>": models.END_ID,
    "<|image_pad|>": models.IMAGE_ID,
    "<|video_pad|>": models.VIDEO_ID,
    "<|im_start|>": 5,
    "<|im_end|>": 6,
    "<unk>": 7,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% for entry in message.content %}{% if entry.type == 'image' %}IMAGE"
    "{% elif entry.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ entry.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def tiny_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    characters = string.ascii_letters + string.digits + " .,:?!-'\n"
    vocabulary = dict(SPECIALS)
    for character in characters:
        vocabulary[character] = models.FIRST_TEXT_ID + len(vocabulary) - len(SPECIALS)
    assert len(vocabulary) <= models.VOCAB_SIZE
    names = [name for name in SPECIALS if name not in ("<pad>", "<unk>")]
    return character_tokenizer(vocabulary, additional_special_tokens=names, **special)


def character_tokenizer(vocabulary: dict[str, int], **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, where all that is not special is a word for each character."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("(?m:.)"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", **special
    )


def tiny_processor(family: str = "qwen2_5_vl") -> Any:
    """A processor for `models.tiny_model(family)`, Qwen2.5-VL or Gemma-3."""
    if family == "gemma3":
        tokenizer = tiny_tokenizer(
            extra_special_tokens={
                "boi_token": "<|vision_start|>",
                "eoi_token": "<|vision_end|>",
                "image_token": "<|image_pad|>",
            }
        )
        size = models.GEMMA_IMAGE_SIZE
        images = Gemma3ImageProcessorPil(size={"height": size, "width": size})
        template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|>")
        return Gemma3Processor(
            images,
            tokenizer,
            chat_template=template,
            image_seq_length=models.GEMMA_TOKENS_PER_SIDE**2,
        )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=models.PATCH_SIZE,
        merge_size=models.MERGE_SIZE,
        temporal_patch_size=models.TEMPORAL_PATCH_SIZE,
        size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
    )
    template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return without_videos(Qwen2_5_VLProcessor)(
        image_processor, tiny_tokenizer(), chat_template=template
    )


class TinyVideos:
    """In place of a Qwen's video processor, which is torchvision's: a patch of each two frames."""

    merge_size = models.MERGE_SIZE
    temporal_patch_size = models.TEMPORAL_PATCH_SIZE
    do_sample_frames = False
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image_processor: Any) -> None:
        self._images = image_processor
        self.given: list[dict[str, Any]] = []

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        self.given.append(kwargs)
        pixels, grids = [], []
        for frames in chain.from_iterable(videos):
            of_frames = self._images(list(frames[:: self.temporal_patch_size]), return_tensors="pt")
            pixels.append(of_frames["pixel_values"])
            grids.append([len(of_frames["image_grid_thw"]), *of_frames["image_grid_thw"][0, 1:]])
        data = {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature({**data, "video_metadata": kwargs["video_metadata"]})

    def sample_frames(self, metadata: VideoMetadata) -> list[int]:
        return [0, metadata.total_num_frames - 1]


def with_videos(processor: Any) -> Any:
    """Return a processor of :func:`tiny_processor` that takes videos, too."""
    processor.video_processor = TinyVideos(processor.image_processor)
    return processor


def token_counts(input_ids: torch.Tensor) -> list[int]:
    return [int((row == models.IMAGE_ID).sum()) for row in input_ids]
