"""What a profile's parts must be like: each check raises a ValueError that says what is not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blindsight.categories import NUM_CATEGORIES, HeadCategory, summarize_categories
from blindsight.configs import attends
from blindsight.fingerprints import layer_types_of

FORMAT = "blindsight-profile"
VERSION = "1"
FINGERPRINT = ("architecture", "num_layers", "num_heads", "num_kv_heads", "head_dim", "layer_types")
METADATA = ("format", "version", "model", "fingerprint", "rule", "calibration")
DAMAGED = "The file is damaged or was edited: copy it again, or calibrate again."
# Of the evidence.
_BY_CATEGORY = ("error", "error_spread", "effect", "lost_mass", "margin", "pairs")


def check_categories(categories: Tensor) -> None:
    _check_dtype("categories", categories, torch.uint8)
    if categories.dim() != 2 or categories.numel() == 0:
        raise ValueError(
            f"categories must have shape [num_layers, num_heads], got {list(categories.shape)}."
        )
    if (highest := int(categories.max())) >= NUM_CATEGORIES:
        raise ValueError(f"category codes must be 0..{NUM_CATEGORIES - 1}, got {highest}.")


def _check_dtype(name: str, tensor: object, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} must be a {dtype} tensor, got {found}.")


def check_fingerprint(fingerprint: Mapping[str, str], shape: tuple[int, ...]) -> None:
    check_keys("fingerprint", fingerprint, FINGERPRINT)
    for name, pattern, how in (
        ("stage", r"\d+:\d+/\d+", "first:stop/layers"),
        ("shard", r"\d+/\d+", "rank/ranks"),
    ):
        if name in fingerprint and not re.fullmatch(pattern, fingerprint[name]):
            raise ValueError(f"{name} must be written {how}, got {fingerprint[name]!r}. {DAMAGED}")
    for name in ("num_kv_heads", "head_dim"):
        numbers = fingerprint[name].split(",")
        if len(numbers) not in (1, shape[0]) or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(
                f"{name} must be a positive number, or one for each of {shape[0]} layers, got "
                f"{fingerprint[name]!r}. {DAMAGED}"
            )
    num_types = str(len(layer_types_of(fingerprint)))
    found = fingerprint["num_layers"], fingerprint["num_heads"], num_types
    if found != (str(shape[0]), str(shape[1]), str(shape[0])):
        raise ValueError(
            f"fingerprint must have as many layers and heads as the categories {list(shape)}, got "
            f"num_layers={found[0]}, num_heads={found[1]} and {num_types} layer_types."
        )


def check_has_heads(categories: Tensor, layer_types: list[str]) -> None:
    for layer, layer_type in enumerate(layer_types):
        if not attends(layer_type) and bool(categories[layer].any()):
            raise ValueError(
                f"heads of layer {layer}, which is {layer_type}, must be DENSE: it has no "
                f"attention over keys, got {summarize_categories(categories[layer].tolist())}."
            )


def check_evidence(evidence: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    for name, tensor in evidence.items():
        if not isinstance(name, str) or name in ("", "categories", "__metadata__"):
            raise ValueError(f"evidence must have names other than the format's, got {name!r}.")
        _check_dtype(f"evidence {name!r}", tensor, torch.float32)
        last: object = NUM_CATEGORIES if name in _BY_CATEGORY else "..."
        if tensor.shape[:2] != shape or (last != "..." and tensor.shape[2:] != (last,)):
            raise ValueError(
                f"evidence {name!r} must have shape [{shape[0]}, {shape[1]}, {last}], "
                f"got {list(tensor.shape)}."
            )


def check_format(metadata: Mapping[str, str]) -> None:
    for name, expected, advice in (
        ("format", FORMAT, "Give a file that Profile.save wrote."),
        ("version", VERSION, "Use a release of blindsight that reads it, or calibrate again."),
    ):
        if metadata.get(name) != expected:
            raise ValueError(f"{name} must be {expected!r}, got {metadata.get(name)!r}. {advice}")


def check_keys(name: str, mapping: Mapping[str, str], keys: tuple[str, ...]) -> None:
    if missing := [key for key in keys if key not in mapping]:
        raise ValueError(f"{name} must have {', '.join(keys)}, got no {', '.join(missing)}.")


def parse_categories(categories: Any, layer_types: list[str], num_heads: int) -> Tensor:
    """Return ``categories``, array-like or one for all heads, as uint8 ``[L, H]``."""
    shape = len(layer_types), num_heads
    if isinstance(categories, Tensor):
        categories = categories.detach().cpu().tolist()
    try:
        entries = np.array(categories, dtype=object)
    except ValueError as error:  # some ragged lists; of others numpy makes lists as entries
        raise ValueError(f"categories must have shape {list(shape)}, got {error}.") from None
    if entries.ndim == 0:
        entries = np.full(shape, entries.item(), dtype=object)
        entries[[not attends(name) for name in layer_types]] = HeadCategory.DENSE
    if entries.shape != shape:
        raise ValueError(
            f"categories must have shape [num_layers, num_heads] = {list(shape)}, or be one "
            f"category for all heads, got shape {list(entries.shape)}."
        )
    codes = torch.empty(shape, dtype=torch.uint8)
    for (layer, head), entry in np.ndenumerate(entries):
        try:
            codes[layer, head] = HeadCategory.parse(entry)
        except ValueError as error:
            raise ValueError(f"layer {layer}, head {head}: {error}") from None
    return codes


def strings(name: str, mapping: object) -> dict[str, str]:
    if not isinstance(mapping, Mapping) or not all(
        isinstance(text, str) for item in mapping.items() for text in item
    ):
        raise ValueError(f"{name} must map strings to strings, got {mapping!r}.")
    return {key: mapping[key] for key in sorted(mapping)}
