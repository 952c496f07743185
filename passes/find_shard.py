"""Which heads of the decoder this process computes, where tensor parallelism splits them.

A rank of a tensor-parallel group has some of the heads, and its graphs say how many, not which.
That is told by the query projection's weight: a DTensor that is sharded by rows, on a mesh in which
this process has a place. Anything else is for the user to say, with :meth:`Profile.shard`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindsight.fingerprints import shard_of
from blindsight.modules import plain_name
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import ancestors, fake_tensor
from blindsight.profile import Profile


def shard_of_call(
    profile: Profile, call: Attention, inputs: list[fx.Node], model_weights: Iterable[Tensor] = ()
) -> tuple[int, int] | None:
    """Return (rank, number of ranks) of the heads a call computes; None if they are the profile's.

    Args:
        profile: Of the whole model, or of the heads of this rank.
        call: One of the decoder's.
        inputs: The placeholders of its graph.
        model_weights: Query projections of the model, for a graph that shows none.

    Raises:
        ValueError: It cannot be told which heads the call has, or they are not the profile's. The
            message has no full stop, so that a caller can go on.
    """
    found = call.num_heads
    shard = shard_of(profile.fingerprint)
    if found is None or (found == profile.num_heads and shard is None):
        return None
    weights = list(query_weights(call, inputs)) or list(model_weights)
    where = call.where
    if shard is not None and found == profile.num_heads:
        # The user said which: what the weights tell must not contradict it.
        rank, size = shard
        told = {place for weight in weights for place in _places(weight) if place[1] == size}
        if len(told) == 1 and told != {shard}:
            raise ValueError(
                f"the profile must be shard {told.pop()[0]} of {size} for the weights of attention "
                f"at {where}, got shard {rank}. Give the whole profile, or the rank's own shard"
            )
        return None
    size, rest = divmod(profile.num_heads, found)
    advice = "Use the profile of this model"
    if shard is None and not rest:
        rows = profile.num_heads * (call.head_dim or 0)
        places = [{p for p in _places(w) if p[1] == size and len(w) == rows} for w in weights]
        if places and len(places[0]) == 1 and all(place == places[0] for place in places):
            return places[0].pop()
        advice += (
            f", or give each process its own heads: blindsight_backend(profile.shard(rank, {size}))"
        )
    raise ValueError(
        f"heads of attention at {where} must be {profile.num_heads} as in the profile, got "
        f"{found}. {advice}"
    )


def query_weights(call: Attention, inputs: list[fx.Node]) -> Iterable[Tensor]:
    """Yield the sharded parameters of its own module that the queries of a call come from."""
    own = {inputs[at] for at in call.parameters}
    for node in ancestors(call.query):
        tensor = fake_tensor(node) if node in own else None
        if tensor is not None and _places(tensor):
            yield tensor


def sharded_weights(models: Iterable[nn.Module], layer_pattern: str) -> Iterable[Tensor]:
    """Yield the query projections of models' layers, those that are sharded by rows."""
    for name, parameter in chain.from_iterable(model.named_parameters() for model in models):
        is_of_layer = re.search(layer_pattern, plain_name(name)) is not None
        if is_of_layer and name.endswith("q_proj.weight") and _places(parameter):
            yield parameter


def check_is_whole(model: nn.Module, what: str) -> None:
    """Check that every process has all of the model.

    Raises:
        ValueError: Its weights are sharded.
    """
    for name, parameter in model.named_parameters():
        if _is_sharded(parameter):
            raise ValueError(
                f"{what} must be given a whole model in each process, got {name} sharded over "
                "several. Load it without tensor parallelism: the processes share the samples."
            )


def _places(tensor: Any) -> set[tuple[int, int]]:
    """Return the rank and the size of each dimension of a mesh that shards a tensor by rows."""
    if not _is_sharded(tensor):
        return set()
    from torch.distributed.tensor import Shard

    mesh = tensor.device_mesh
    # A strided shard is a subclass, and not the rows in their order.
    return {
        (mesh.get_local_rank(dim), mesh.size(dim))
        for dim, placement in enumerate(tensor.placements)
        if type(placement) is Shard and placement.dim == 0 and mesh.size(dim) > 1
    }


def is_distributed_tensor(tensor: object) -> bool:
    """Whether a tensor stands for several processes' parts."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _is_sharded(tensor: Any) -> bool:
    return is_distributed_tensor(tensor) and not all(p.is_replicate() for p in tensor.placements)
