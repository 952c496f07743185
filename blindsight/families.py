"""What differs between model families, as rows of data.

A family that is not listed works too: give its :class:`~blindsight.TemplateRule` explicitly.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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

# Of the types of decoder layers in transformers; all others have attention.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe"})
# Their own code changes the mask, for what it is under scaled_dot_product_attention.
_CHOOSING_KEYS = frozenset(
    {"minimax_m3_sparse", "indexed_attention", "compressed_sparse_attention"}
)

CACHE_ARGUMENTS = ("cache", "past_key_values")  # its name from transformers 5.24 on, and before


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return what a model's forward calls its cache."""
    known = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in known), CACHE_ARGUMENTS[-1])


def cache_of(output: Any) -> Any:
    """Return the cache in what a model put out."""
    return next((getattr(output, name) for name in CACHE_ARGUMENTS if hasattr(output, name)), None)


def config_of(model_or_config: Any) -> Any:
    """Return the config of a model, or the config itself."""
    return getattr(model_or_config, "config", model_or_config)


def text_config(config: Any) -> Any:
    """Return the part of a multimodal config that describes its decoder."""
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def family_of(model_or_config: Any) -> Family:
    """Return the row of a model's family.

    Raises:
        ValueError: There is none.
    """
    config = config_of(model_or_config)
    model_type = getattr(config, "model_type", type(config).__name__)
    if model_type not in FAMILIES:
        raise ValueError(
            f"model type must be one of {', '.join(FAMILIES)}, got {model_type!r}. For another "
            "family give rule=TemplateRule(image_token_ids=..., layer_pattern=...) explicitly "
            "(blindsight calibrate: --rule, a file of its to_json())."
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


def attends(layer_type: str) -> bool:
    """Whether layers of a type, as transformers names them, have a softmax over keys."""
    return layer_type not in _WITHOUT_ATTENTION


def check_has_vision(model_or_config: Any) -> None:
    """Check that a model reads images.

    Raises:
        ValueError: It does not.
    """
    config = config_of(model_or_config)
    if getattr(config, "vision_config", None) is None:
        kind = getattr(config, "model_type", type(model_or_config).__name__)
        raise ValueError(
            f"model must have a vision part, got {kind!r}, which has none. Give a vision-language "
            "model, such as a Qwen2.5-VL."
        )


def check_masks_are_known(model: Any) -> None:
    """Check that the mask that a model hands its attention is all there is.

    Raises:
        ValueError: Some layers choose keys by themselves.
    """
    types = getattr(text_config(config_of(model)), "layer_types", None) or ()
    if chosen := sorted(_CHOOSING_KEYS.intersection(types)):
        raise ValueError(
            f"layers must attend by the masks that they are handed, got {', '.join(chosen)} in "
            f"{type(model).__name__}, which choose keys by themselves. Such a model can be "
            "compiled, and neither evaluated nor run as a reference."
        )


def shares_keys(model_or_config: Any) -> bool:
    """Whether some layers take the keys of earlier ones (small Gemma 4).

    Such layers compute no more rows than the logits that are asked for.
    """
    text = text_config(config_of(model_or_config))
    return bool(getattr(text, "num_kv_shared_layers", 0))


def forgets(layer_type: str) -> bool:
    """Whether the cache of such layers drops the first tokens of a long sequence."""
    return "sliding" in layer_type or "chunked" in layer_type


def with_attention(layer_types: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of the layers that have a softmax over keys."""
    return tuple(at for at, name in enumerate(layer_types) if attends(name))


def fingerprint(model_or_config: Any) -> dict[str, str]:
    """Return what a profile must share with its model: architecture and attention shape.

    Key/value heads and head dim are one number, or one for each layer (see :func:`each_layer`).

    Raises:
        ValueError: The layers have unlike numbers of query heads.
    """
    config = config_of(model_or_config)
    text = text_config(config)
    num_layers = text.num_hidden_layers
    layer_types = list(getattr(text, "layer_types", None) or ["full_attention"] * num_layers)
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    num_heads = {layer.num_attention_heads for layer in layers}
    if len(num_heads) > 1:
        raise ValueError(
            f"all layers must have the same number of query heads, got {sorted(num_heads)}."
        )
    return {
        "architecture": str(config.model_type),
        "num_layers": str(num_layers),
        "num_heads": str(num_heads.pop()),
        "num_kv_heads": in_short([_num_key_heads(layer) for layer in layers]),
        "head_dim": in_short([_head_dim(layer) for layer in layers]),
        "layer_types": ",".join(layer_types),
    }


def in_short(numbers: Sequence[int]) -> str:
    """Write a number of each layer: once, if it is always the same."""
    return ",".join(map(str, numbers if len(set(numbers)) > 1 else numbers[:1]))


def each_layer(numbers: str, num_layers: int) -> tuple[int, ...]:
    """Return the number of each layer; the inverse of :func:`in_short`."""
    found = tuple(map(int, numbers.split(",")))
    return found * num_layers if len(found) == 1 else found


def widths_of(fingerprint: Mapping[str, str]) -> tuple[int, list[int]]:
    """Return a head dim, and the multiple of it that each layer's is; 0 without attention."""
    types = fingerprint["layer_types"].split(",")
    dims = each_layer(fingerprint["head_dim"], len(types))
    layers = with_attention(types)
    unit = math.gcd(*(dims[layer] for layer in layers))
    return unit, [dim // unit if layer in layers else 0 for layer, dim in enumerate(dims)]


def _num_key_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    """Return the elements of a query and a key; a value's may be others (latent attention)."""
    known = (getattr(config, name, None) for name in ("qk_head_dim", "head_dim"))
    whole = int(config.hidden_size // config.num_attention_heads)
    return next((int(size) for size in known if size), whole)
