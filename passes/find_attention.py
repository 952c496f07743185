"""Find the attention of a traced model, and what is known about each call of it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from blindsight.passes.graph import fake_tensor, module_of, placeholders, source_name

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
        query, key, value: ``[B, H, Q, D]``, ``[B, G, K, D]`` as the model projects them: key and
            value before they are repeated for grouped queries.
        attn_mask: Node of the mask, or None.
        is_causal, dropout_p, scale: As in the call.
        path: Dotted path of the module that calls it, seen from the compiled frame.
        module_class: Name of that module's class.
        layer: The layer's number, where the path tells it.
        parameters: Positions of the placeholders that are parameters of that module.
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


def find_attention(gm: fx.GraphModule, *, layer_pattern: str) -> list[Attention]:
    """Return the attention calls of a graph, in its order; nothing is changed.

    Args:
        gm: A graph as Dynamo or ``torch.export`` traced it.
        layer_pattern: See :class:`~blindsight.TemplateRule`.
    """
    inputs = [source_name(node) for node in placeholders(gm)]
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in _ATTENTION_TARGETS:
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
                    if path and name.startswith(path + ".")
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
    paths = {}
    for node in gm.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        path, module_class = module_of(node)
        ours = module_class in module_classes or re.search(layer_pattern, path)
        if "softmax" in name and ours:
            paths[path] = None
    return list(paths)


def find_input_ids(gm: fx.GraphModule) -> int | None:
    """Return the position of the input that the model calls ``input_ids [B, Q]``, if any."""
    for position, node in enumerate(placeholders(gm)):
        tensor = fake_tensor(node)
        named = source_name(node).rpartition(".")[2] == "input_ids"
        if named and tensor is not None and is_token_ids(tensor):
            return position
    return None


def is_token_ids(tensor: torch.Tensor) -> bool:
    """Whether a tensor looks like token ids ``[B, Q]``."""
    return tensor.dim() == 2 and not tensor.dtype.is_floating_point and tensor.dtype != torch.bool


def key_cache(attention: Attention) -> tuple[fx.Node | None, list[fx.Node]]:
    """Return the placeholder that a call's keys come from, and the keys as the graph leaves them.

    The first is the cache's tensor as it was before the call (None where there was none), the
    second are the nodes that may become the cache's tensor afterwards.
    """
    before = None
    seen, waiting = {attention.key}, [attention.key]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            before = node
            continue
        for parent in node.all_input_nodes:
            if parent not in seen and _same_heads(parent, attention.key):
                seen.add(parent)
                waiting.append(parent)
    after, waiting = [attention.key], [attention.key]
    while waiting:
        for user in waiting.pop().users:
            if user not in after and _same_heads(user, attention.key) and _is_view(user):
                after.append(user)
                waiting.append(user)
    return before, after


def _same_heads(node: fx.Node, key: fx.Node) -> bool:
    """Whether a node is a ``[B, G, *, D]`` tensor like the keys."""
    ours, theirs = fake_tensor(node), fake_tensor(key)
    if ours is None or theirs is None or ours.dim() != 4:
        return False
    return bool(ours.shape[1] == theirs.shape[1] and ours.shape[3] == theirs.shape[3])


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target in ("contiguous", "clone", "narrow")


def _before_repeat(repeated: fx.Node, query: fx.Node) -> fx.Node:
    """Return ``[B, G, K, D]`` that ``repeated [B, H, K, D]`` repeats head by head, or itself.

    Matches what transformers' ``repeat_kv`` traces to: index a new axis in, expand, reshape.
    """
    expanded = repeated.args[0] if repeated.target in ("reshape", torch.reshape) else None
    if not isinstance(expanded, fx.Node) or expanded.target not in ("expand", torch.Tensor.expand):
        return repeated
    indexed = expanded.args[0]
    if not isinstance(indexed, fx.Node) or indexed.target is not operator.getitem:
        return repeated
    original, index = indexed.args
    everything = slice(None, None, None)
    shapes = [fake_tensor(node) for node in (original, expanded, repeated)]
    if not isinstance(original, fx.Node) or any(shape is None for shape in shapes):
        return repeated
    before, middle, after = (shape.shape for shape in shapes if shape is not None)
    is_new_axis = (
        isinstance(index, tuple)
        and index[:3] == (everything, everything, None)
        and all(part == everything for part in index[3:])
    )
    groups_outermost = (
        len(before) == 4
        and len(middle) == 5
        and (middle[0], middle[1], middle[3], middle[4]) == tuple(before)
        and tuple(after) == (before[0], middle[1] * middle[2], before[2], before[3])
    )
    return original if is_new_axis and groups_outermost else repeated

