"""What a profile shares with its model: an architecture, and the shape of its attention.

Of a tensor-parallel rank a fingerprint has the rank's heads and ``shard``, ``"rank/ranks"``; of a
pipeline stage ``stage``, ``"first:stop/layers"``, and its layers, or those of the whole model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from blindsight.configs import config_of, text_config, with_attention

_MOST_RUNS = 4  # of layers of one type, in a message


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
    types = layer_types_of(fingerprint)
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


def layer_types_of(fingerprint: Mapping[str, str]) -> list[str]:
    """Return what transformers calls each layer."""
    return fingerprint["layer_types"].split(",")


def shard_of(fingerprint: Mapping[str, str]) -> tuple[int, int] | None:
    """Return the rank, and the number of ranks, whose heads a fingerprint has; None: all."""
    if "shard" not in fingerprint:
        return None
    rank, world_size = map(int, fingerprint["shard"].split("/"))
    return rank, world_size


class Stage(NamedTuple):
    """Layers of a pipeline stage, and how many the whole model has."""

    first: int
    stop: int
    num_layers: int


def stage_of(fingerprint: Mapping[str, str]) -> Stage | None:
    """Return the stage that a fingerprint is of; None: the whole model."""
    if "stage" not in fingerprint:
        return None
    return Stage(*map(int, re.split("[:/]", fingerprint["stage"])))


def of_shard(fingerprint: Mapping[str, str], rank: int, world_size: int) -> dict[str, str]:
    """Return the fingerprint of the heads that one of several tensor-parallel ranks computes.

    Raises:
        ValueError: There is no such rank, the heads cannot be split evenly, or they are already.
    """
    if "shard" in fingerprint:
        raise ValueError(
            f"profile must be of a whole model, got shard {fingerprint['shard']} of one. "
            "Shard the whole profile."
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}.")
    own = dict(fingerprint)
    for name, numbers in _heads_of(fingerprint).items():
        if any(number % world_size for number in numbers):
            raise ValueError(
                f"{name} must be a multiple of world_size, got {own[name]} for {world_size} "
                "processes. Use fewer, so that each has whole groups of heads."
            )
        own[name] = in_short([number // world_size for number in numbers])
    return {**own, "shard": f"{rank}/{world_size}"}


def of_stage(
    fingerprint: Mapping[str, str], first: int, stop: int, *, keeps_numbers: bool
) -> dict[str, str]:
    """Return the fingerprint of the layers ``first <= layer < stop``.

    Args:
        fingerprint: Of a whole model.
        first, stop: Numbers of layers.
        keeps_numbers: Whether it shall have the shape of the whole model all the same.

    Raises:
        ValueError: There are no such layers, or the fingerprint is of a stage already.
    """
    if "stage" in fingerprint:
        raise ValueError(
            f"profile must be of all layers, got stage {fingerprint['stage']}. Take the "
            "stage of the whole profile."
        )
    num_layers = int(fingerprint["num_layers"])
    if not 0 <= first < stop <= num_layers:
        raise ValueError(f"first < stop must be in 0..{num_layers}, got {first} and {stop}.")
    shape = {} if keeps_numbers else _of_layers(fingerprint, first, stop)
    return {**fingerprint, **shape, "stage": f"{first}:{stop}/{num_layers}"}


def differences(
    ours: Mapping[str, str], found: Mapping[str, str], *, part_is_fine: bool
) -> list[str]:
    """Return in words where a model is not what a profile is for.

    Args:
        ours: The fingerprint of the profile.
        found: That of the model.
        part_is_fine: Whether the profile may be of a part of the model's heads and layers.
    """
    ours, found = dict(ours), dict(found)
    if part_is_fine and (shard := shard_of(ours)) is not None:
        del ours["shard"]
        for name, numbers in _heads_of(ours).items():
            ours[name] = in_short([number * shard[1] for number in numbers])
    if part_is_fine and (stage := stage_of(ours)) is not None:
        del ours["stage"]
        # A stage may have the config of the whole model, or one of its own.
        if int(found["num_layers"]) == stage.num_layers != int(ours["num_layers"]):
            found |= _of_layers(found, stage.first, stage.stop)
    ours, found = map(in_words, (ours, found))
    return [
        f"profile has {name}={ours.get(name)}, model has {name}={found.get(name)}"
        for name in dict.fromkeys([*found, *ours])
        if ours.get(name) != found.get(name)
    ]


def in_words(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Return a fingerprint for people: layers of one type are counted, ``36 x full_attention``.

    Types of several kinds are listed by runs, ``5 x sliding_attention, 1 x full_attention, ...``,
    or counted, where these are many.
    """
    runs = [(name, len(list(same))) for name, same in groupby(layer_types_of(fingerprint))]
    if len(runs) > _MOST_RUNS:
        runs = list(Counter(layer_types_of(fingerprint)).items())
    types = ", ".join(f"{number} x {name}" for name, number in runs)
    return {**fingerprint, "layer_types": types}


def _heads_of(fingerprint: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    num_layers = int(fingerprint["num_layers"])
    names = ("num_heads", "num_kv_heads")
    return {name: each_layer(fingerprint[name], num_layers) for name in names}


def _of_layers(fingerprint: Mapping[str, str], first: int, stop: int) -> dict[str, str]:
    """Return what differs in the fingerprint of some layers."""
    num_layers = int(fingerprint["num_layers"])
    numbers = {
        name: in_short(each_layer(fingerprint[name], num_layers)[first:stop])
        for name in ("num_kv_heads", "head_dim")
    }
    types = layer_types_of(fingerprint)[first:stop]
    return {"num_layers": str(stop - first), "layer_types": ",".join(types), **numbers}
