"""Find the attention calls of a traced model, and what is known about each of them.

Shapes: B batch, H query heads, G key/value heads, Q query rows, K key columns, D head dim.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from blindsight.families import DECODER_ATTENTION_CLASSES
from blindsight.passes.graph import fake_tensor, module_of, placeholders, same_size, source_name
from blindsight.passes.memory import MemoryGroups, overwritten
from blindsight.passes.names import name_of

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


@dataclass(frozen=True)
class Attention:
    """One call of ``scaled_dot_product_attention`` in a graph.

    Attributes:
        node: The call.
        query, key, value: ``[B, H, Q, D]`` and twice ``[B, G, K, D]``, as the model projects them:
            key and value before they are repeated for grouped queries.
        attn_mask: Node of the mask, or None.
        is_causal, dropout_p, scale: As in the call.
        path: Dotted path of the module that calls it, seen from the compiled frame.
        module_class: Name of that module's class.
        layer: The layer's number, where the path tells it.
        parameters: Positions of the placeholders that are parameters of that module; where Dynamo
            resumed a frame inside the module, of all parameters that the frame has.
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
    def where(self) -> str:
        """Where the call is, for messages."""
        return self.path or "a frame of its own"

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
    def batch_size(self) -> int | torch.SymInt:
        """B, as the graph knows it."""
        return self._shapes[0][0]

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
    return any(is_attention(node) for node in gm.graph.nodes) or any(map(has_attention, regions))


def count_attention(gm: fx.GraphModule) -> int:
    """Return how many attention calls a graph has."""
    return sum(is_attention(node) for node in gm.graph.nodes)


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a call of ``scaled_dot_product_attention``."""
    return node.op == "call_function" and node.target in _ATTENTION_TARGETS


def find_attention(gm: fx.GraphModule, *, layer_pattern: str) -> list[Attention]:
    """Return the attention calls of a graph, in its order; nothing is changed.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
    """
    inputs = [source_name(node) for node in placeholders(gm)]
    repeats = _Repeats(gm)
    found = []
    for node in gm.graph.nodes:
        if not is_attention(node):
            continue
        call = {**_DEFAULTS, **dict(zip(_PARAMETERS, node.args, strict=False)), **node.kwargs}
        path, module_class = module_of(node)
        key, value = repeats.undone(call["key"], call["value"], node)
        found.append(
            Attention(
                node=node,
                query=call["query"],
                key=key,
                value=value,
                attn_mask=call["attn_mask"],
                is_causal=bool(call["is_causal"]),
                dropout_p=float(call["dropout_p"]),
                scale=call["scale"],
                path=path,
                module_class=module_class,
                layer=_layer_of(path, module_class, layer_pattern),
                parameters=tuple(
                    position
                    for position, name in enumerate(inputs)
                    if name.startswith(path + "." if path else "self.")
                ),
            )
        )
    return found


def _layer_of(path: str, module_class: str, layer_pattern: str) -> int | None:
    """Return the layer that the path of an attention module tells, or None."""
    matched = re.search(layer_pattern, path)
    if matched is None and module_class in DECODER_ATTENTION_CLASSES:
        # The compiled frame began at the decoder itself: `self.layers.3.self_attn`.
        matched = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    return int(matched.group(1)) if matched else None


def problem_of_eager_attention(gm: fx.GraphModule, *, layer_pattern: str) -> str | None:
    """Return what is wrong if a decoder module writes its attention out, with a softmax.

    The text has no full stop, so that a caller can go on.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
    """
    for node in gm.graph.nodes:
        path, module_class = module_of(node)
        is_ours = module_class in DECODER_ATTENTION_CLASSES or re.search(layer_pattern, path)
        if is_ours and "softmax" in name_of(node):
            return (
                f"attention of {path} must be one call of scaled_dot_product_attention, got one "
                "that is written out. Load the model with attn_implementation='sdpa'"
            )
    return None


class _Repeats:
    """Finds keys and values before their heads were repeated."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._nodes = list(gm.graph.nodes)
        self._places = {node: place for place, node in enumerate(self._nodes)}
        self._writers = [node for node in self._nodes if overwritten(node)]

    @cached_property
    def _memory(self) -> MemoryGroups:
        return MemoryGroups(self._nodes)

    def undone(self, key: fx.Node, value: fx.Node, call: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return both with as few heads as both have, or both as they are."""
        repeated = key, value
        before = before_repeat(key), before_repeat(value)
        shapes = [fake.shape for x in before if (fake := fake_tensor(x)) is not None]
        are_alike = all(same_size(shape[1], shapes[0][1]) for shape in shapes)
        pairs = zip(before, repeated, strict=True)
        if not are_alike or any(self._is_written(*pair, call) for pair in pairs):
            return repeated
        return before

    def _is_written(self, before: fx.Node, repeated: fx.Node, call: fx.Node) -> bool:
        """Whether either is written into after the first was read and before the call."""
        if before is repeated or not self._writers:
            return False
        read = min(self._places[user] for user in before.users if user in _chain(repeated))
        groups = {self._memory.find(node) for node in (before, repeated)}
        return any(
            self._memory.find(written) in groups
            for writer in self._writers
            if read < self._places[writer] < self._places[call]
            for written in overwritten(writer)
        )


def _chain(repeated: fx.Node) -> set[object]:
    """Return the nodes of a repeat that :func:`before_repeat` matches."""
    expanded: Any = repeated.args[0]
    return {repeated, expanded, expanded.args[0]}


def before_repeat(repeated: fx.Node) -> fx.Node:
    """Return the ``[B, G, K, D]`` that ``repeated [B, H, K, D]`` repeats head by head, or itself.

    Matches what transformers' ``repeat_kv`` traces to: a new axis by indexing (in an exported
    program by unsqueeze), expand, reshape.
    """
    aten = torch.ops.aten
    expanded = _argument_of(repeated, "reshape", torch.reshape, aten.reshape.default)
    indexed = _argument_of(expanded, "expand", torch.Tensor.expand, aten.expand.default)
    original = _argument_of(indexed, operator.getitem, aten.unsqueeze.default)
    shapes = [
        fake.shape
        for node in (original, expanded, repeated)
        if (fake := fake_tensor(node)) is not None
    ]
    if indexed is None or original is None or len(shapes) != 3:
        return repeated
    everything = slice(None, None, None)
    index = indexed.args[1]
    is_new_axis = (indexed.target is aten.unsqueeze.default and index == 2) or (
        isinstance(index, tuple)
        and index[:3] == (everything, everything, None)
        and all(part == everything for part in index[3:])
    )
    before, middle, after = shapes
    repeats_heads = (
        (len(before), len(middle), len(after)) == (4, 5, 4)
        and all(same_size(a, b) for a, b in zip(before, (*middle[:2], *middle[3:]), strict=True))
        and all(same_size(before[dim], after[dim]) for dim in (0, 2, 3))
        and same_size(after[1], middle[1] * middle[2])
    )
    return original if is_new_axis and repeats_heads else repeated


def _argument_of(node: fx.Node | None, *targets: object) -> fx.Node | None:
    """Return the node that another gets as its first argument, if it calls one of the targets."""
    if node is None or node.target not in targets:
        return None
    argument = next(iter(node.args), None)
    return argument if isinstance(argument, fx.Node) else None
