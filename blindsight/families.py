"""What differs between model families, as rows of data.

A family that is not listed works too: give its :class:`~blindsight.TemplateRule` explicitly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from blindsight.configs import config_of

# What the decoders of transformers' multimodal models are called.
DEFAULT_LAYER_PATTERN = r"(?:language|text)_model(?:\.model)?\.layers\.(\d+)\.self_attn"


@dataclass(frozen=True)
class Family:
    """One row: how a family writes an image, in its config and in its tokenizer.

    Attributes:
        image_tokens, start_tokens, end_tokens: Names of config attributes that hold token ids.
        video_tokens: The same, of videos whose frames have nothing between them.
        parts, start, end: Regular expressions of tokens that only the tokenizer knows: what parts
            an image (its rows, its tiles), what is before it and after it.
        leading, trailing: The same of the marks of tiles before and after the rest of an image.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
    """

    image_tokens: tuple[str, ...] = ("image_token_id", "video_token_id")
    start_tokens: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    video_tokens: tuple[str, ...] = ()
    parts: str = ""
    start: str = ""
    end: str = ""
    leading: str = ""
    trailing: str = ""
    layer_pattern: str = DEFAULT_LAYER_PATTERN


_QWEN = Family(start_tokens=("vision_start_token_id",), end_tokens=("vision_end_token_id",))
_QWEN2 = replace(_QWEN, video_tokens=("video_token_id",))
_OMNI = replace(
    _QWEN,
    image_tokens=("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    video_tokens=("video_token_id", "video_token_index"),
    # its decoder is called `model` in older transformers
    layer_pattern=r"(?:language_model|(?<!_)model)\.layers\.(\d+)\.self_attn",
)
_GLM = Family(
    start_tokens=("image_start_token_id", "video_start_token_id"),
    end_tokens=("image_end_token_id", "video_end_token_id"),
)
_GEMMA4 = Family(start_tokens=("boi_token_id",), end_tokens=("eoi_token_id",))
# LLaVA and others write placeholders and nothing else: text must be between two images.
_BARE = Family(image_tokens=("image_token_id", "image_token_index", "video_token_index"))
_COHERE = replace(_BARE, start=r"<\|START_OF_IMG\|>", end=r"<\|END_OF_IMG\|>")
_IDEFICS = replace(
    _BARE,
    start=r"<row_\d+_col_\d+>|<global-img>",
    end="<fake_token_around_image>",
    leading=r"<row_\d+_col_\d+>",
)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen3_vl": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen3_5": _QWEN,
    "qwen3_5_moe": _QWEN,
    "gemma3": Family(
        image_tokens=("image_token_index",),
        start_tokens=("boi_token_index",),
        end_tokens=("eoi_token_index",),
    ),
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "internvl": replace(_BARE, start="<img>", end="</img>"),
    "llava": _BARE,
    "llava_next": _BARE,
    "llava_onevision": _BARE,
    "mistral3": replace(_BARE, parts=r"\[IMG_BREAK\]", end=r"\[IMG_END\]"),
    "llama4": Family(
        image_tokens=("image_token_index",),
        start_tokens=("boi_token_index",),
        end_tokens=("eoi_token_index",),
        parts=r"<\|image\|>|<\|tile_[xy]_separator\|>",
    ),
    # its tiles and its images look the same: each is a span
    "idefics2": replace(_BARE, start="<fake_token_around_image>", end="<fake_token_around_image>"),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "glm4v": _GLM,
    "glm46v": _GLM,
    "glm4v_moe": _GLM,
    "aya_vision": replace(_COHERE, leading=r"TILE(_\d+)?"),
    "cohere2_vision": replace(_COHERE, parts=r"<\|IMG_LINE_BREAK\|>"),
    "lfm2_vl": replace(
        _BARE,
        parts=r"<\|img_row_\d+_col_\d+\|>|<\|img_thumbnail\|>",
        start=r"<\|image_start\|>",
        end=r"<\|image_end\|>",
    ),
    "ovis2": replace(_BARE, parts=r"<IMG_(GRID|COL|ROW)>", start="<IMG_START>", end="<IMG_END>"),
    "minicpmv4_6": Family(start="<image>|<slice>", end="</image>|</slice>", trailing="<slice>"),
    "kimi_k25": Family(start=r"<\|media_content\|>", end_tokens=("vision_end_token_id",)),
    "ernie4_5_vl_moe": _GLM,
    "exaone4_5": Family(video_tokens=("video_token_id",), start="<vision>", end="</vision>"),
    "video_llama_3": Family(),
    "molmo2": Family(
        image_tokens=("image_patch_id",),
        parts="<im_col>",
        # an image is written twice, small and then large
        start="<low_res_im_start>|<im_start>|<frame_start>",
        end="<im_end>|<frame_end>",
        trailing="<im_start>",
    ),
    "aria": replace(_BARE, start="<fim_prefix>", end="<fim_suffix>"),
    "deepseek_vl": _BARE,
    "lighton_ocr": _BARE,
    "paddleocr_vl": _QWEN,
}

# Of their decoders, for compiled frames that begin inside: where a module's path no longer tells
# a decoder's attention from a vision tower's.
DECODER_ATTENTION_CLASSES = frozenset(
    f"{name}Attention"
    for name in (
        *("Qwen2VL", "Qwen2_5_VL", "Qwen2_5Omni", "Qwen3VLText", "Qwen3VLMoeText"),
        *("Qwen3OmniMoeThinkerText", "Qwen3_5", "Qwen3_5Moe", "Qwen2", "Qwen3"),
        *("Gemma3", "Gemma4Text", "Gemma4UnifiedText", "Llama", "Llama4Text"),
        *("Mistral", "Ministral3", "Cohere2", "Glm4vText", "Glm4vMoeText", "Lfm2"),
        *("DeepseekV3", "Ernie4_5_VLMoeText", "Exaone4", "AriaText", "PaddleOCR", "Molmo2"),
    )
)


def family_of(model_or_config: Any) -> Family:
    """Return the row of a model's family.

    Raises:
        ValueError: There is none.
    """
    config = config_of(model_or_config)
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type not in FAMILIES:
        inside = [
            f" Or give the model inside, of which {name} is the config."
            for name, part in getattr(config, "__dict__", {}).items()
            if getattr(part, "model_type", None) in FAMILIES
        ]
        raise ValueError(
            f"model type must be one of {', '.join(FAMILIES)}, got {model_type!r}. For another "
            "family give rule=TemplateRule(image_token_ids=..., layer_pattern=...) explicitly "
            "(blindsight calibrate: --rule, a file of its to_json())." + "".join(inside)
        )
    return FAMILIES[model_type]


def rule_of_family(model_or_config: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Return the arguments of a listed family's :class:`~blindsight.TemplateRule`.

    Raises:
        ValueError: See :meth:`~blindsight.TemplateRule.from_config`.
    """
    config, family = config_of(model_or_config), family_of(model_or_config)
    model_type = config.model_type

    def of_config(names: tuple[str, ...]) -> tuple[int, ...]:
        found = (getattr(config, name, None) for name in names)
        return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))

    def of_tokenizer(pattern: str) -> tuple[int, ...]:
        if not pattern:
            return ()
        if tokenizer is None:
            raise ValueError(
                f"the tokenizer of {model_type} must be given, which alone knows the tokens "
                f"{pattern}: rule=TemplateRule.from_config(model.config, tokenizer)."
            )
        vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
        found = [vocabulary[token] for token in vocabulary if re.fullmatch(pattern, token)]
        if not found:
            raise ValueError(
                f"the tokenizer of {model_type} must have tokens {pattern}, got one without. Give "
                "rule=TemplateRule(image_token_ids=..., start_token_ids=..., ...) explicitly."
            )
        return tuple(sorted(found))

    return {
        "image_token_ids": of_config(family.image_tokens) + of_tokenizer(family.parts),
        "start_token_ids": of_config(family.start_tokens) or of_tokenizer(family.start),
        "end_token_ids": of_config(family.end_tokens) or of_tokenizer(family.end),
        "leading_tile_ids": of_tokenizer(family.leading),
        "trailing_tile_ids": of_tokenizer(family.trailing),
        "video_token_ids": of_config(family.video_tokens),
        "layer_pattern": family.layer_pattern,
    }
