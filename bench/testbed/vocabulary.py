"""The testbed's words: tokenizer, chat template, image processor, and the processor made of them.

A word is a token. Images are named by letters and digits are digits, so that no token means both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DIGITS = tuple("0123456789")
LABELS = tuple("ABCDEFGHIJKL")  # names of images, in order; so at most 12 of them
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
WORDS = (
    *("user", "assistant", "system", "image", "images", ":", "?", "first", "digit", "of", "most"),
    *("frequent", "count", "in", "which", "has", "same", "and", "repeats", "yes", "no"),
)
TOKENS = (*SPECIAL, *WORDS, *DIGITS, *LABELS)
TOKEN_ID = {token: index for index, token in enumerate(TOKENS)}
VOCAB_SIZE = 64

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 4, 2, 2
CELL = PATCH_SIZE * MERGE_SIZE  # pixels: one digit is one image token
IMAGE_MEAN = IMAGE_STD = (0.5, 0.5, 0.5)

# An image is its three tokens, everything else its words. The tokenizer drops white space.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def ids(words: str) -> list[int]:
    """The token ids of words with a space between any two."""
    return [TOKEN_ID[word] for word in words.split()]


def build_processor() -> Any:
    """Image processor, tokenizer and chat template as one processor of transformers.

    Qwen2.5-VL's own processor class cannot be made without a video processor, and that needs
    torchvision. PaddleOCR-VL's has the same prompt format (one placeholder an image, repeated
    ``grid.prod() / merge_size**2`` times, and ``mm_token_type_ids``) and no video, so it is the
    class that is saved; the image processor in it is Qwen2-VL's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PaddleOCRVLProcessor, PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = Tokenizer(models.WordLevel(dict(TOKEN_ID), unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "im_start_token": "<|im_start|>",
        },
        model_max_length=4096,
        padding_side="left",
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        size={"shortest_edge": CELL * CELL, "longest_edge": 64 * CELL * CELL},
    )
    return PaddleOCRVLProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def save_processor(path: Path) -> None:
    """Writes what AutoProcessor, AutoTokenizer and AutoImageProcessor load."""
    processor = build_processor()
    processor.save_pretrained(path)
