"""Real processors for the tiny models of `family_models.py`: a character is a token.

Each row says what the family's checkpoints have in their files: special tokens, how the chat
template writes an image, and the sizes of an image processor, here those of the tiny model.
"""

import importlib.util
import inspect
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from blindsight.data.processors import without_videos
from family_models import (
    COLUMN_ID,
    END_ID,
    FIRST_TAG_ID,
    FIRST_TEXT_ID,
    GLOBAL_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    MERGE_SIZE,
    NEWLINE_ID,
    NUM_LATENTS,
    NUM_MERGED,
    NUM_PATCHES,
    PAD_ID,
    PATCH_SIZE,
    PATCHES_PER_SIDE,
    ROW_ID,
    START_ID,
    TEMPORAL_PATCH_SIZE,
    TILE_END_ID,
    TILE_START_ID,
    VIDEO_ID,
    VOCAB_SIZE,
)
from processors import character_tokenizer

HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
SIDE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
MERGED = PATCH_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        image: an image in a prompt, before the processor has seen it.
        tokens: ids of special tokens.
        names: attributes of the tokenizer that hold some of them.
        images: arguments of the image processor.
        options: arguments of the processor.
    """

    image: str
    tokens: Mapping[str, int]
    names: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


PATCHES = {
    "patch_size": PATCH_SIZE,
    "merge_size": MERGE_SIZE,
    "size": {"shortest_edge": 4 * MERGED**2, "longest_edge": 6 * MERGED**2},
}


def _delimited(start: str, image: str, end: str, video: str = "", **others: str) -> Row:
    """Delimiters are written by the chat template; placeholders are repeated."""
    names = {"image_token": image, **({"video_token": video} if video else {}), **others}
    ids = {start: START_ID, image: IMAGE_ID, end: END_ID}
    return Row(
        f"{start}{image}{end}",
        {**ids, video: VIDEO_ID} if video else ids,
        names,
        {**PATCHES, "temporal_patch_size": TEMPORAL_PATCH_SIZE},
    )


def _bare(image: str, **options: Any) -> Row:
    return Row(image, {image: IMAGE_ID}, {"image_token": image}, options=options)


def _pixtral(image: str, row_end: str, image_end: str) -> Row:
    return Row(
        image,
        {image: IMAGE_ID, row_end: ROW_ID, image_end: END_ID},
        {"image_token": image, "image_break_token": row_end, "image_end_token": image_end},
        {"patch_size": MERGED, "size": {"longest_edge": 3 * MERGED}},
        {"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE_SIZE},
    )


def _tags(written: str) -> dict[str, int]:
    """Ids of the marks of 2 x 2 tiles."""
    places = [(row, column) for row in (1, 2) for column in (1, 2)]
    return {written.format(*place): FIRST_TAG_ID + at for at, place in enumerate(places)}


_QWEN = _delimited("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_QWEN3 = replace(
    _QWEN,
    names={
        **_QWEN.names,
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
)
# its sizes are those of videos
_GLM_SIZE = {name: size * TEMPORAL_PATCH_SIZE for name, size in PATCHES["size"].items()}
_GLM = replace(
    _delimited("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>"),
    images={**PATCHES, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "size": _GLM_SIZE},
)
_LLAVA = {
    "patch_size": PATCH_SIZE,
    "vision_feature_select_strategy": "full",
    "num_additional_image_tokens": 0,
}
_LLAVA_PIXELS = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": SIDE}
_PINPOINTS = [[IMAGE_SIZE * r, IMAGE_SIZE * c] for r, c in ((1, 2), (2, 1), (2, 2))]
_TILED = {"size": SIDE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
_IDEFICS3 = Row(
    "<image>",
    {
        "<fake_token_around_image>": START_ID,
        "<image>": IMAGE_ID,
        "<global-img>": GLOBAL_ID,
        "\n": NEWLINE_ID,
        **_tags("<row_{}_col_{}>"),
    },
    images={
        "size": {"longest_edge": 2 * IMAGE_SIZE},
        "max_image_size": {"longest_edge": IMAGE_SIZE},
    },
    options={"image_seq_len": NUM_MERGED},
)
_GEMMA4 = Row(
    "<|image|>",
    {"<|image>": START_ID, "<|image|>": IMAGE_ID, "<image|>": END_ID, "<|video|>": VIDEO_ID},
    {
        "boi_token": "<|image>",
        "image_token": "<|image|>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    },
    {"patch_size": PATCH_SIZE, "pooling_kernel_size": MERGE_SIZE, "max_soft_tokens": 70},
)

ROWS: dict[str, Row] = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "exaone4_5": _delimited("<vision>", "<|image_pad|>", "</vision>", "<|video_pad|>"),
    "glm4v": _GLM,
    "glm46v": _GLM,
    "glm4v_moe": _GLM,
    "internvl": Row(
        "<IMG_CONTEXT>",
        {"<img>": START_ID, "<IMG_CONTEXT>": IMAGE_ID, "</img>": END_ID, "<video>": VIDEO_ID},
        {
            "start_image_token": "<img>",
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        _TILED,
        {"image_seq_length": NUM_MERGED},
    ),
    "llava": replace(_bare("<image>", **_LLAVA), images=_LLAVA_PIXELS),
    "llava_next": replace(
        _bare("<image>", **_LLAVA), images={**_LLAVA_PIXELS, "image_grid_pinpoints": _PINPOINTS}
    ),
    "llava_onevision": Row(
        "<image>",
        {"<image>": IMAGE_ID, "<video>": VIDEO_ID},
        {"image_token": "<image>", "video_token": "<video>"},
        {"size": SIDE, "image_grid_pinpoints": _PINPOINTS},
        {"num_image_tokens": NUM_PATCHES, "vision_feature_select_strategy": "full"},
    ),
    "mistral3": _pixtral("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    "lighton_ocr": _pixtral("<|image_pad|>", "<|vision_pad|>", "<|vision_end|>"),
    "llama4": Row(
        "<|image|>",
        {
            "<|image_start|>": START_ID,
            "<|image|>": GLOBAL_ID,
            "<|patch|>": IMAGE_ID,
            "<|image_end|>": END_ID,
            "<|tile_x_separator|>": COLUMN_ID,
            "<|tile_y_separator|>": ROW_ID,
        },
        images={"size": SIDE, "max_patches": 4},
        options={"patch_size": PATCH_SIZE, "pixel_shuffle_ratio": 1 / MERGE_SIZE},
    ),
    "idefics2": Row(
        "<image>",
        {"<fake_token_around_image>": START_ID, "<image>": IMAGE_ID},
        images={
            "do_image_splitting": True,
            "size": {"shortest_edge": IMAGE_SIZE, "longest_edge": IMAGE_SIZE},
        },
        options={"image_seq_len": NUM_LATENTS},
    ),
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "aya_vision": Row(
        "<image>",
        {
            "<image>": VIDEO_ID,
            "<|START_OF_IMG|>": START_ID,
            "<|END_OF_IMG|>": END_ID,
            "<|IMG_PATCH|>": IMAGE_ID,
            "TILE": TILE_START_ID,
            "TILE_GLOBAL": GLOBAL_ID,
        },
        images=_TILED,
        options={"patch_size": MERGED, "img_size": IMAGE_SIZE, "downsample_factor": 1},
    ),
    "cohere2_vision": Row(
        "<|IMG_PATCH|>",
        {
            "<|START_OF_IMG|>": START_ID,
            "<|IMG_PATCH|>": IMAGE_ID,
            "<|IMG_LINE_BREAK|>": ROW_ID,
            "<|END_OF_IMG|>": END_ID,
        },
        {
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        {**_TILED, "patch_size": PATCHES_PER_SIDE // MERGE_SIZE},  # of tokens, not of pixels
    ),
    "lfm2_vl": Row(
        "<image>",
        {
            "<|image_start|>": START_ID,
            "<image>": IMAGE_ID,
            "<|image_end|>": END_ID,
            "<|img_thumbnail|>": GLOBAL_ID,
            **_tags("<|img_row_{}_col_{}|>"),
        },
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        {
            "encoder_patch_size": PATCH_SIZE,
            "downsample_factor": MERGE_SIZE,
            "tile_size": IMAGE_SIZE,
            "min_tiles": 2,
            "max_tiles": 4,
            "min_image_tokens": 4,
            "max_image_tokens": NUM_MERGED,
            "max_num_patches": NUM_PATCHES,
        },
    ),
    "ovis2": Row(
        "<image>",
        {
            "<image>": VIDEO_ID,
            "<IMG_ATOM>": IMAGE_ID,
            "<IMG_START>": START_ID,
            "<IMG_END>": END_ID,
            "<IMG_GRID>": GLOBAL_ID,
            "<IMG_COL>": COLUMN_ID,
            "<IMG_ROW>": ROW_ID,
        },
        images=_TILED,
        options={"image_seq_length": NUM_PATCHES},
    ),
    "minicpmv4_6": Row(
        "<|image_pad|>",
        {
            "<|image_pad|>": IMAGE_ID,
            "<|video_pad|>": VIDEO_ID,
            "<image>": START_ID,
            "</image>": END_ID,
            "<slice>": TILE_START_ID,
            "</slice>": TILE_END_ID,
            "<image_id>": COLUMN_ID,
            "</image_id>": ROW_ID,
        },
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "image_start_token": "<image>",
            "image_end_token": "</image>",
            "slice_start_token": "<slice>",
            "slice_end_token": "</slice>",
            "image_id_start_token": "<image_id>",
            "image_id_end_token": "</image_id>",
        },
        {"patch_size": PATCH_SIZE, "scale_resolution": 32},
    ),
    "molmo2": Row(
        "<|image|>",
        {
            "<|image|>": ROW_ID,
            "<|video|>": VIDEO_ID,
            "<im_patch>": IMAGE_ID,
            "<im_col>": COLUMN_ID,
            "<low_res_im_start>": GLOBAL_ID,
            "<im_start>": START_ID,
            "<im_end>": END_ID,
            "<frame_start>": TILE_START_ID,
            "<frame_end>": TILE_END_ID,
        },
        {
            "image_token": "<|image|>",
            "video_token": "<|video|>",
            "bos_token": "<bos>",
            "low": "<im_low>",
        },
        {
            "size": SIDE,
            "max_crops": 4,
            "overlap_margins": [0, 0],
            "patch_size": PATCH_SIZE,
            "pooling_size": [MERGE_SIZE, MERGE_SIZE],
        },
    ),
    "kimi_k25": Row(
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        {
            "<|media_begin|>": START_ID,
            "<|media_content|>": GLOBAL_ID,
            "<|media_pad|>": IMAGE_ID,
            "<|media_end|>": END_ID,
            "<|kimi_k25_video_placeholder|>": VIDEO_ID,
        },
        {"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"},
        {"patch_size": PATCH_SIZE},
    ),
    "ernie4_5_vl_moe": replace(
        _delimited(
            "<|IMAGE_START|>",
            "<|IMAGE_PLACEHOLDER|>",
            "<|IMAGE_END|>",
            "<|VIDEO_PLACEHOLDER|>",
            image_start_token="<|IMAGE_START|>",
            image_end_token="<|IMAGE_END|>",
            video_start_token="<|VIDEO_START|>",
            video_end_token="<|VIDEO_END|>",
        ),
        images=PATCHES,
    ),
    "aria": Row(
        "<fim_prefix><|img|><fim_suffix>",
        {"<fim_prefix>": START_ID, "<|img|>": IMAGE_ID, "<fim_suffix>": END_ID},
        {"image_token": "<|img|>"},
        options={"size_conversion": {980: NUM_LATENTS}},
    ),
    "video_llama_3": Row(
        "<image>\n",
        {"<image>": IMAGE_ID, "<video>": VIDEO_ID},
        {"image_token": "<image>", "video_token": "<video>"},
        {**PATCHES, "temporal_patch_size": 1},
    ),
    "deepseek_vl": replace(
        _bare("<image_placeholder>", num_image_tokens=NUM_PATCHES),
        images={"size": SIDE, "min_size": PATCH_SIZE},
    ),
    "paddleocr_vl": replace(
        _delimited("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"),
        images={**PATCHES, "temporal_patch_size": 1},
    ),
    "gemma3": Row(
        "<start_of_image>",
        {"<start_of_image>": START_ID, "<image_soft_token>": IMAGE_ID, "<end_of_image>": END_ID},
        {
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
        {"size": SIDE},
        {"image_seq_length": NUM_MERGED},
    ),
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
}


# Of transformers' tables.
_SAME_AS = {"qwen3_vl_moe": "qwen3_vl", "glm4v_moe": "glm4v"}
_NEED_TORCHVISION = {"gemma4", "mistral3", "minicpmv4_6", "smolvlm"}


def make_processor(family: str) -> Any:
    """The processor of `family_models.tiny_model(family)`.

    Raises:
        ImportError: These transformers have none, or it needs a package that is not here.
    """
    row = ROWS[family]
    kinds = IMAGE_PROCESSOR_MAPPING_NAMES.get(_SAME_AS.get(family, family))
    if kinds is None:
        raise ImportError("these transformers have none")
    if not HAS_TORCHVISION and ("pil" not in kinds or family in _NEED_TORCHVISION):
        raise ImportError("needs torchvision")
    image_processor = getattr(transformers, kinds["torchvision" if HAS_TORCHVISION else "pil"])
    processor_class = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])
    options = dict(row.options)
    parts = inspect.signature(processor_class.__init__).parameters
    if "video_processor" in parts and HAS_TORCHVISION:
        videos = VIDEO_PROCESSOR_MAPPING_NAMES[_SAME_AS.get(family, family)]
        name = videos["torchvision"] if isinstance(videos, Mapping) else videos
        options["video_processor"] = getattr(transformers, name)()
    elif "video_processor" in parts:
        processor_class = without_videos(processor_class)
    if "feature_extractor" in parts:
        names = transformers.models.auto.feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING_NAMES
        options["feature_extractor"] = getattr(transformers, names[family])()
    return processor_class(
        image_processor=image_processor(**row.images),
        tokenizer=_tokenizer(row),
        chat_template=_chat_template(row),
        **options,
    )


def _tokenizer(row: Row) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD_ID, **row.tokens}
    others = [*row.names.values(), *string.ascii_letters, *string.digits, *" .,:?!-'_\n", "<unk>"]
    for token in others:
        vocabulary.setdefault(token, FIRST_TEXT_ID + len(vocabulary))
    assert max(vocabulary.values()) < VOCAB_SIZE
    specials = {f"special_{token_id}": token for token, token_id in row.tokens.items()}
    return character_tokenizer(vocabulary, extra_special_tokens={**specials, **row.names})


def _chat_template(row: Row) -> str:
    return (
        "{% for message in messages %}{% for entry in message.content %}"
        "{% if entry.type == 'image' %}" + row.image + "{% else %}{{ entry.text }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
