"""What the config of a transformers model says of its decoder, and where its cache is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

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
