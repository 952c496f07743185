"""Find the inputs of a model's graph that tell where its images and videos are.

Shapes: B batch, Q query rows, V videos.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from blindsight.passes.graph import ancestors, fake_tensor, input_name, placeholders
from blindsight.passes.names import name_of

# Besides those that ATen calls pointwise.
_KEEP_PLACES = {
    *("and", "or", "not", "xor", "le", "lt", "ge", "gt", "eq", "ne", "neg", "abs"),
    *("add", "sub", "mul", "floordiv", "mod", "min", "max"),
    *("clone", "contiguous", "detach", "to", "long", "int", "type", "setitem", "index_put"),
}


def find_input_ids(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``input_ids [B, Q]``, if any."""
    return _find_input(gm, "input_ids", is_token_ids)


def find_video_grid(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``video_grid_thw [V, 3]``, if any."""
    return _find_input(gm, "video_grid_thw", is_video_grid)


def find_axis_positions(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that is ``position_ids [3 or 4, B, Q]``, if any."""
    return _find_input(gm, "position_ids", is_axis_positions)


def embeds_other_tokens(gm: fx.GraphModule, input_ids: int) -> bool:
    """Whether a graph looks up embeddings of tokens that it moved, or took a part of.

    Those that are written over in place, as models do with the tokens of images, stay where they
    are.

    Args:
        gm: A graph as Dynamo traced it.
        input_ids: Position of the input that they come from.
    """
    given = placeholders(gm)[input_ids]
    lookups = [node for node in gm.graph.nodes if name_of(node) == "embedding"]
    looked_up = [arg for node in lookups for arg in node.all_input_nodes if _holds_tokens(arg)]
    return any(not _keeps_places(given, arg, {}) for arg in looked_up)


def _holds_tokens(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and is_token_ids(tensor)


def _keeps_places(given: fx.Node, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether what a node has of ``given`` is at the same place in both."""
    if node is given:
        return True
    if node not in known:
        known[node] = True
        moves = [x for x in node.all_input_nodes if not _keeps_places(given, x, known)]
        comes_from_it = given in ancestors(node)
        known[node] = not moves and (not comes_from_it or _is_elementwise(node))
    return known[node]


def _is_elementwise(node: fx.Node) -> bool:
    name = name_of(node).removesuffix("_")
    if name in _KEEP_PLACES:
        return True
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, x) for x in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _find_input(gm: fx.GraphModule, name: str, fits: Callable[[torch.Tensor], bool]) -> int | None:
    for position, node in enumerate(placeholders(gm)):
        tensor = fake_tensor(node)
        if input_name(node) == name and tensor is not None and fits(tensor):
            return position
    return None


def is_token_ids(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like token ids ``[B, Q]``."""
    return tensor.dim() == 2 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool


def is_video_grid(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like frames, heights and widths of videos ``[V, 3]``."""
    return tensor.dim() == 2 and tensor.shape[1] == 3 and not tensor.dtype.is_floating_point


def is_axis_positions(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like positions in (text,) time, height and width."""
    return tensor.dim() == 3 and tensor.shape[0] in (3, 4)  # floats in Qwen3-Omni
