"""Find the attention of a traced model, and what is known about each call of it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from blindsight.passes.graph import (
    ancestors,
    fake_tensor,
    module_of,
    placeholders,
    same_size,
    source_name,
)

# Dynamo keeps the builtin; an exported program has the ATen operator.
_ATTENTION_TARGETS: tuple[Callable[..., Any], ...] = (
    scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_SAME_ELEMENTS = ("to", "contiguous", "clone")


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention`` in a graph.

    Attributes:
        node: The call.
        query, key, value: ``[B, H, Q, D]``, ``[B, G, K, D]`` as the model projects them: key and
            value before they are repeated for grouped queries.
        attn_mask: Node of the mask, or None.
        is_causal, dropout_p, scale: As in the call.
        path: Dotted path of the module that calls it, seen from the compiled frame.
        module_class: Name of that module's class.
        layer: The layer's number, where the path tells it.
        parameters: Positions of the placeholders that are parameters of that module; of a frame
            that Dynamo resumed inside it, all that the frame has.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    is_causal: bool
    dropout_p: float
    scale: float | None
    path: str
    module_class: str
    layer: int | None
    parameters: tuple[int, ...]

    @property
    def num_heads(self) -> int | None:
        query = fake_tensor(self.query)
        return None if query is None else int(query.shape[1])

    @property
    def head_dim(self) -> int | None:
        query = fake_tensor(self.query)
        return None if query is None else int(query.shape[-1])

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """H, G and D.

        Raises:
            ValueError: The graph does not say what shapes its tensors have.
        """
        query, key = self._shapes
        return int(query[1]), int(key[1]), int(query[3])

    @property
    def lengths(self) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """Q and K, as the graph knows them."""
        query, key = self._shapes
        return query[2], key[2]

    def sizes(self, size_of: Callable[[int | torch.SymInt], int]) -> dict[str, int]:
        """Return B, Q and K as arguments of the functions that make masks.

        Args:
            size_of: The value of a symbolic size.

        Raises:
            ValueError: The graph does not say what shapes its tensors have.
        """
        query, key = self._shapes
        return {
            "batch": size_of(query[0]),
            "num_queries": size_of(query[2]),
            "num_keys": size_of(key[2]),
        }

    @cached_property
    def _shapes(self) -> tuple[torch.Size, torch.Size]:
        query, key = fake_tensor(self.query), fake_tensor(self.key)
        if query is None or key is None:
            raise ValueError(
                f"queries and keys of {self.node} must have known shapes, and the graph has none. "
                "Trace it with Dynamo or torch.export."
            )
        return query.shape, key.shape


def has_attention(gm: fx.GraphModule) -> bool:
    """Whether a graph, or a region that it calls, has any attention call."""
    regions = (child for child in gm.children() if isinstance(child, fx.GraphModule))
    return any(_is_attention(node) for node in gm.graph.nodes) or any(map(has_attention, regions))


def count_attention(gm: fx.GraphModule) -> int:
    """Return how many attention calls a graph has."""
    return sum(_is_attention(node) for node in gm.graph.nodes)


def _is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _ATTENTION_TARGETS


def find_attention(gm: fx.GraphModule, *, layer_pattern: str) -> list[Attention]:
    """Return the attention calls of a graph, in its order; nothing is changed.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
    """
    inputs = [source_name(node) for node in placeholders(gm)]
    found = []
    for node in gm.graph.nodes:
        if not _is_attention(node):
            continue
        call = {**_DEFAULTS, **dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
        path, module_class = module_of(node)
        matched = re.search(layer_pattern, path)
        found.append(
            Attention(
                node=node,
                query=call["query"],
                key=_before_repeat(call["key"], call["query"]),
                value=_before_repeat(call["value"], call["query"]),
                attn_mask=call["attn_mask"],
                is_causal=bool(call["is_causal"]),
                dropout_p=float(call["dropout_p"]),
                scale=call["scale"],
                path=path,
                module_class=module_class,
                layer=int(matched.group(1)) if matched else None,
                parameters=tuple(
                    position
                    for position, name in enumerate(inputs)
                    if name.startswith(path + "." if path else "self.")
                ),
            )
        )
    return found


def find_eager_attention(
    gm: fx.GraphModule, *, layer_pattern: str, module_classes: Container[str] = ()
) -> list[str]:
    """Return the paths of decoder modules whose attention is written out, with a softmax.

    Args:
        gm: A graph as Dynamo traced it.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
        module_classes: Classes of decoder attention, for frames whose paths tell no layer.
    """
    paths: dict[str, None] = {}
    for node in gm.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        path, module_class = module_of(node)
        ours = module_class in module_classes or re.search(layer_pattern, path)
        if "softmax" in name and ours:
            paths[path] = None
    return list(paths)


def find_input_ids(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``input_ids [B, Q]``, if any."""
    return _find_input(gm, "input_ids", is_token_ids)


def find_video_grid(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``video_grid_thw [V, 3]``, if any."""
    return _find_input(gm, "video_grid_thw", is_video_grid)


def find_axis_positions(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that is ``position_ids [3 or 4, B, Q]``, if any."""
    return _find_input(gm, "position_ids", is_axis_positions)


def _find_input(gm: fx.GraphModule, name: str, fits: Callable[[torch.Tensor], bool]) -> int | None:
    for position, node in enumerate(placeholders(gm)):
        tensor = fake_tensor(node)
        # An exported program names its inputs, Dynamo says where they come from.
        named = source_name(node).rpartition(".")[2] or node.name
        if named == name and tensor is not None and fits(tensor):
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


@dataclass(frozen=True)
class KeyCache:
    """How the keys of one attention call pass through a cache.

    Attributes:
        before: The input that holds the cached keys, or None where the graph makes the cache.
        after: Nodes that may be the cache's tensor when the graph has run.
        length: The input that counts the tokens in a static cache, or None.
        in_place: Whether the graph writes the new keys into ``before``.
        is_read: Whether the call attends to what ``before`` holds, and not to its own keys alone.
        has_new: Whether ``before`` holds the call's own keys already.
    """

    before: fx.Node | None
    after: tuple[fx.Node, ...]
    length: fx.Node | None
    in_place: bool
    is_read: bool
    has_new: bool


def find_key_cache(gm: fx.GraphModule, attention: Attention) -> KeyCache:
    """Return how the keys of a call pass through a cache, as far as the graph shows it."""
    key = _before_repeat(_before_cut(attention), attention.query)
    key = _latents_of(key) or key
    before = None
    chain, waiting = [key], [key]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            before = node
            continue
        for parent in node.all_input_nodes:
            if parent not in chain and _same_heads(parent, key):
                chain.append(parent)
                waiting.append(parent)
    after, waiting = [key], [key]
    written = set()
    while waiting:
        for user in waiting.pop().users:
            if user.target in ("copy_", "index_copy_") and isinstance(user.args[0], fx.Node):
                # A static cache: what holds the keys is what they are written to.
                written.add(user.args[0])
                found = [user, user.args[0]]
            else:
                found = [user] if _is_view(user) else []
            for node in found:
                if node not in after and _same_heads(node, key):
                    after.append(node)
                    waiting.append(node)
    is_read = before is not None
    if before is None:
        held = [node for node in written if node.op == "placeholder"]
        before = held[0] if held else None
    counters = [
        node for node in placeholders(gm) if source_name(node).endswith(".cumulative_length")
    ]
    length = None
    for node in {*chain, *after}:
        for user in node.users:
            if counters and user.target == "index_copy_" and user.args[0] is node:
                used = set(ancestors(user.args[2]))  # type: ignore[arg-type]
                length = next((counter for counter in counters if counter in used), length)
    in_place = before is not None and any(
        user.args[:1] == (before,) and user.target in ("copy_", "index_copy_", operator.setitem)
        for user in before.users
    )
    while key.target in _SAME_ELEMENTS and isinstance(key.args[0], fx.Node):
        key = key.args[0]  # layers may be on several devices
    has_new = before is key and not in_place
    return KeyCache(before, tuple(after), length, in_place, is_read, has_new)


def _latents_of(key: fx.Node) -> fx.Node | None:
    """Return the ``[B, 1, K, R]`` that keys are computed of, where a cache holds those instead."""
    num_keys = None if (ours := fake_tensor(key)) is None else ours.shape[2]
    seen, waiting = {key}, [key]
    while waiting:
        node = waiting.pop()
        if node.target is torch.nn.functional.linear:
            source = node.all_input_nodes[0]
            latents = fake_tensor(source)
            if latents is not None and latents.dim() == 4 and same_size(latents.shape[1], 1):
                return source if same_size(latents.shape[2], num_keys) else None
            continue
        for parent in node.all_input_nodes:
            tensor = fake_tensor(parent)
            if parent not in seen and tensor is not None and tensor.dim() == 4:
                seen.add(parent)
                waiting.append(parent)
    return None


def _same_heads(node: fx.Node, key: fx.Node) -> bool:
    """Whether a node is a ``[B, G, *, D]`` tensor like the keys."""
    ours, theirs = fake_tensor(node), fake_tensor(key)
    if ours is None or theirs is None or ours.dim() != 4:
        return False
    return all(same_size(ours.shape[dim], theirs.shape[dim]) for dim in (1, 3))


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in ("contiguous", "clone", "narrow")


def _before_cut(attention: Attention) -> fx.Node:
    """Return the tensor of which a causal call has the first keys, as many as queries; or those.

    What transformers does to a static cache that a prompt fills.
    """
    cut = attention.key
    if not attention.is_causal or attention.attn_mask is not None:
        return cut
    if cut.target is not operator.getitem or not isinstance(cut.args[0], fx.Node):
        return cut
    index, whole = cut.args[1], fake_tensor(cut.args[0])
    if not isinstance(index, tuple) or len(index) < 3 or whole is None or whole.dim() != 4:
        return cut
    everything = slice(None, None, None)
    is_of_keys = (
        isinstance(index[2], slice)
        and index[2].start in (None, 0)
        and index[2].step in (None, 1)
        and all(part == everything for part in (*index[:2], *index[3:]))
    )
    return cut.args[0] if is_of_keys else cut


def _before_repeat(repeated: fx.Node, query: fx.Node) -> fx.Node:
    """Return ``[B, G, K, D]`` that ``repeated [B, H, K, D]`` repeats head by head, or itself.

    Matches what transformers' ``repeat_kv`` traces to: index a new axis in (an exported program:
    unsqueeze), expand, reshape.
    """
    aten = torch.ops.aten
    reshapes = ("reshape", torch.reshape, aten.reshape.default)
    expanded = repeated.args[0] if repeated.target in reshapes else None
    expands = ("expand", torch.Tensor.expand, aten.expand.default)
    if not isinstance(expanded, fx.Node) or expanded.target not in expands:
        return repeated
    indexed = expanded.args[0]
    if not isinstance(indexed, fx.Node) or indexed.target not in (
        operator.getitem,
        aten.unsqueeze.default,
    ):
        return repeated
    original, index = indexed.args
    everything = slice(None, None, None)
    shapes = [fake_tensor(node) for node in (original, expanded, repeated)]
    if not isinstance(original, fx.Node) or any(shape is None for shape in shapes):
        return repeated
    before, middle, after = (shape.shape for shape in shapes if shape is not None)
    is_new_axis = (indexed.target is aten.unsqueeze.default and index == 2) or (
        isinstance(index, tuple)
        and index[:3] == (everything, everything, None)
        and all(part == everything for part in index[3:])
    )
    repeats_heads = (
        (len(before), len(middle), len(after)) == (4, 5, 4)
        and all(same_size(a, b) for a, b in zip(before, (*middle[:2], *middle[3:]), strict=True))
        and all(same_size(before[dim], after[dim]) for dim in (0, 2, 3))
        and same_size(after[1], middle[1] * middle[2])
    )
    return original if is_new_axis and repeats_heads else repeated
