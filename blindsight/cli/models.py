"""Load a model as the options of a command say."""

from __future__ import annotations

import argparse
from typing import Any

from blindsight.error_text import local_path, on_one_line

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DEVICE = "default: cuda where there is one, else cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for :func:`load_model`."""
    parser.add_argument("--model", required=True, help="folder or hub id of a pretrained model")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and computation (default: as the weights are stored; on a CPU float32, as "
        "others are slow there)",
    )
    parser.add_argument(
        "--device",
        help="such as cpu or cuda; auto spreads the layers over all GPUs, with accelerate "
        f"({DEFAULT_DEVICE})",
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that show a bar."""
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show how far it is (default: on a terminal only)",
    )


def load_model(
    name: str,
    dtype: str | None = None,
    device: str | None = "cpu",
    *,
    has_rule: bool = False,
) -> Any:
    """Load a model that reads images.

    Args:
        name: A folder, or an id on the hub.
        dtype: Of its weights; by default as they are stored, and float32 on a CPU.
        device: See :func:`blindsight.ranks.local_device`; ``"auto"`` uses all GPUs.
        has_rule: Whether the rule that finds its images is given, so that any family will do.

    Raises:
        ValueError: There is no such model, it reads text only, or it does not fit the device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from blindsight.configs import check_has_vision
    from blindsight.families import family_of
    from blindsight.ranks import is_launched_with_others, local_device

    if device == "auto" and is_launched_with_others():
        raise ValueError(
            "device must be a GPU for each of several processes, got 'auto', which spreads one "
            "model over all GPUs. Run one process, or give --device cuda."
        )
    name = local_path(name, "model")
    if device != "auto":
        device = local_device(device)
    if dtype is None:
        dtype = "float32" if device == "cpu" else "auto"
    try:
        config: Any = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = on_one_line(error)
        raise ValueError(
            f"model must be a folder or a hub id that can be reached, got {name!r}: {what}"
        ) from error
    check_has_vision(config)
    if not has_rule:
        family_of(config)
    model_class: Any = AutoModelForImageTextToText
    model = model_class.from_pretrained(
        name,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation="sdpa",
        device_map="auto" if device == "auto" else None,
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the weights must fit in the memory of the GPUs, got some that would be fetched for "
            "each prompt. Give more GPUs, or a smaller --dtype."
        )
    return model.eval() if device == "auto" else model.to(device).eval()
