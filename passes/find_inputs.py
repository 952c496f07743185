"""Find the inputs of a model's graph that tell where its images and videos are.

Shapes: B batch, Q query rows, V videos.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

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
# What moves slices along dimensions, and which argument those are.
_MOVING = {"roll": 2, "flip": 1, "gather": 1, "index_select": 1, "take_along_dim": 2}
# What computes with each token alone, besides.
_BY_TOKEN = {"layer_norm", "rms_norm", "dropout"}


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
    is counted or compared, such as positions, is no tokens any more. Embeddings must not be moved,
    either, before a layer reads them.

    Args:
        gm: A graph as Dynamo traced it.
        input_ids: Position of the input that the tokens come from.
    """
    moved = {placeholders(gm)[input_ids]: False}  # nodes that hold tokens: whether out of place
    lookups = set()
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
            lookups.add(node)
        elif _may_hold_tokens(node) and name not in _NO_TOKENS:
            moved[node] = any(held) or not _keeps_places(node, name)
    return _are_moved(gm, lookups)


def _are_moved(gm: fx.GraphModule, lookups: Collection[fx.Node]) -> bool:
    """Whether a graph puts embeddings ``[B, Q, E]`` in another order of tokens, or of rows.

    They are followed through what computes token by token, up to the first projection: what layers
    do with tokens is their own affair.
    """
    states: set[fx.Node] = set()  # embeddings, with features written over some
    mixed: set[fx.Node] = set()  # what else they lead to
    for node in gm.graph.nodes:
        if node in lookups:
            tensor = fake_tensor(node)
            if tensor is not None and tensor.dim() == 3:
                states.add(node)
            continue
        sources = [parent for parent in node.all_input_nodes if parent in states]
        name = name_of(node).removesuffix("_")
        if any(_reorders(node, name, source) for source in sources):
            return True
        is_mixed = any(parent in mixed for parent in node.all_input_nodes)
        for written in overwritten(node):
            if written in states and is_mixed:
                states.discard(written)
                mixed.add(written)
        if sources and not is_mixed and _goes_on(node, name, sources[0]):
            states.add(node)
        elif sources or is_mixed:
            mixed.add(node)
    return False


def _goes_on(node: fx.Node, name: str, states: fx.Node) -> bool:
    """Whether a result is embeddings still, token by token."""
    result, before = fake_tensor(node), fake_tensor(states)
    if result is None or before is None or not _have_one_shape(result, before):
        return False
    if not result.is_floating_point():
        return False
    return name in _BY_TOKEN or _keeps_places(node, name)


def _reorders(node: fx.Node, name: str, states: fx.Node) -> bool:
    """Whether a node moves whole tokens or rows of ``[B, Q, E]``, all of which stay."""
    result, before = fake_tensor(node), fake_tensor(states)
    if result is None or before is None or not _have_one_shape(result, before):
        return False
    if not node.args or node.args[0] is not states:
        return False
    if name in _MOVING:
        at = _MOVING[name]
        dims = node.kwargs.get("dims", node.kwargs.get("dim"))
        if dims is None:
            dims = node.args[at:] if name == "flip" else node.args[at : at + 1]
        is_flat = name == "roll" and dims in ((), [])
        return is_flat or not _dims(dims).isdisjoint({0, 1})
    if name not in ("getitem", "index"):
        return False
    index = node.args[1]
    parts = list(index) if isinstance(index, tuple | list) else [index]
    parts = [part for part in parts if part is not None]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (4 - len(parts))
    return any(fake_tensor(part) is not None for part in parts[:2])


def _dims(given: object) -> set[int]:
    """Return which of three dimensions are meant; none where that is not known."""
    if isinstance(given, tuple | list):
        return set().union(*(_dims(each) for each in given))
    return {given % 3} if isinstance(given, int) else set()


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
