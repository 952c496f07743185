"""Find the inputs of a model's graph that tell where its images and videos are.

Shapes: B batch, Q query rows, V videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from blindsight.passes.expressions import ARITHMETIC
from blindsight.passes.graph import fake_tensor, input_name, placeholders, same_size
from blindsight.passes.memory import overwritten
from blindsight.passes.names import FILLS, name_of

# Results that hold no tokens, whatever they are computed from.
_NO_TOKENS = {
    *("full_like", "new_full", "full", "empty_like", "new_empty", "rand_like", "arange", "size"),
    *("cumsum", "cumprod", "sum", "argmax", "argmin", "count_nonzero", "nonzero", "bincount"),
    *FILLS,
}
# What leaves elements where they are, besides what ATen calls pointwise.
_ORDERED = {
    *ARITHMETIC,
    *("and", "or", "not", "xor", "neg", "abs"),
    *("clone", "contiguous", "detach", "alias", "to", "long", "int", "type"),
    *("where", "masked_fill", "masked_scatter", "index_put", "copy"),
    *("view", "reshape", "flatten", "unsqueeze", "squeeze", "unflatten", "view_as", "type_as"),
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

    Tokens that it only writes over, as models do with those of images, stay where they are. What
    is counted or compared, such as positions, is no tokens any more.

    Args:
        gm: A graph as Dynamo traced it.
        input_ids: Position of the input that the tokens come from.
    """
    moved = {placeholders(gm)[input_ids]: False}  # nodes that hold tokens: whether out of place
    for node in gm.graph.nodes:
        for written in overwritten(node):
            if any(moved.get(x, False) for x in node.all_input_nodes if x is not written):
                moved[written] = True
        held = [moved[parent] for parent in _sources_of_tokens(node) if parent in moved]
        if not held:
            continue
        name = name_of(node).removesuffix("_")
        if name == "embedding":
            if any(held):
                return True
        elif _may_hold_tokens(node) and name not in _NO_TOKENS:
            moved[node] = any(held) or not _keeps_places(node, name)
    return False


def _sources_of_tokens(node: fx.Node) -> Sequence[fx.Node]:
    """Return what the tokens in a result, if it has any, are from."""
    if name_of(node) in ("expand_as", "type_as", "view_as", "reshape_as"):
        return node.all_input_nodes[:1]
    return node.all_input_nodes


def _may_hold_tokens(node: fx.Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool


def _keeps_places(node: fx.Node, name: str) -> bool:
    """Whether what holds tokens in a result holds them in the order of its argument."""
    if name in _ORDERED:
        return True
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(part in (None, Ellipsis, slice(None, None, None)) for part in index)
    if name == "expand":
        result, argument = (fake_tensor(x) for x in (node, node.args[0]))
        return result is not None and argument is not None and _have_one_shape(result, argument)
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, x) for x in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def _have_one_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


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
