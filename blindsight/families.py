"""What differs between model families, as rows of data.

A family that is not listed works too: give its :class:`~blindsight.TemplateRule` explicitly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blindsight.template import DEFAULT_LAYER_PATTERN, TemplateRule


@dataclass(frozen=True)
class Family:
    """One row: where a family's config keeps what we need.

    Attributes:
        image_tokens, start_tokens, end_tokens: Names of config attributes that hold token ids.
        attention: Class name of the decoder's attention module, for compiled frames that begin
            inside the decoder, where a module's path no longer tells it from the vision tower's.
    """

    image_tokens: tuple[str, ...]
    start_tokens: tuple[str, ...]
    end_tokens: tuple[str, ...]
    attention: str
    layer_pattern: str = DEFAULT_LAYER_PATTERN


def _qwen(attention: str) -> Family:
    return Family(
        image_tokens=("image_token_id", "video_token_id"),
        start_tokens=("vision_start_token_id",),
        end_tokens=("vision_end_token_id",),
        attention=attention,
    )


FAMILIES: dict[str, Family] = {
    "qwen2_vl": _qwen("Qwen2VLAttention"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLAttention"),
    "qwen3_vl": _qwen("Qwen3VLTextAttention"),
    "gemma3": Family(
        image_tokens=("image_token_index",),
        start_tokens=("boi_token_index",),
        end_tokens=("eoi_token_index",),
        attention="Gemma3Attention",
    ),
}

# Of the types of decoder layers in transformers; all others have attention.
_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "recurrent", "conv", "moe"})

DECODER_ATTENTION_CLASSES = frozenset(family.attention for family in FAMILIES.values())


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


def template_rule(model_or_config: Any) -> TemplateRule:
    """Return the rule of a listed family.

    Raises:
        ValueError: The family is not listed.
    """
    config = config_of(model_or_config)
    model_type = getattr(config, "model_type", type(config).__name__)
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"model type must be one of {', '.join(FAMILIES)}, got {model_type!r}. For another "
            "family give rule=TemplateRule(image_token_ids=..., layer_pattern=...) explicitly."
        )

    def ids(names: tuple[str, ...]) -> tuple[int, ...]:
        found = (getattr(config, name, None) for name in names)
        return tuple(token_id for token_id in found if token_id is not None)

    return TemplateRule(
        image_token_ids=ids(family.image_tokens),
        start_token_ids=ids(family.start_tokens),
        end_token_ids=ids(family.end_tokens),
        layer_pattern=family.layer_pattern,
    )


def attends(layer_type: str) -> bool:
    """Whether layers of a type, as transformers names them, have a softmax over keys."""
    return layer_type not in _WITHOUT_ATTENTION


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
            f"all layers must have as many query heads as each other, got {sorted(num_heads)}."
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


def _num_key_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    """Return the elements of a query and a key; a value's may be others (latent attention)."""
    known = (getattr(config, name, None) for name in ("qk_head_dim", "head_dim"))
    whole = int(config.hidden_size // config.num_attention_heads)
    return next((int(size) for size in known if size), whole)
