"""How commands load a model."""

from __future__ import annotations

from typing import Any


def load_model(name: str, dtype: str) -> Any:
    """Load a model that reads images.

    Raises:
        ValueError: There is none, or it reads text only.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from blindsight.evaluation.prefill import check_has_vision
    from blindsight.families import family_of

    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"model must be a folder or a hub id that can be reached, got {name!r}: {what}"
        ) from error
    check_has_vision(config)
    family_of(config)
    model_class: Any = AutoModelForImageTextToText
    model = model_class.from_pretrained(
        name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.eval()
