"""Find the cache that the keys of an attention call pass through.

Shapes: B batch, G key/value heads, K key columns, D head dim, R latent dim.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx

from blindsight.passes.find_attention import Attention, before_repeat
from blindsight.passes.graph import ancestors, fake_tensor, placeholders, same_size, source_name

_COPIES = ("to", "contiguous", "clone")
_WRITES = ("copy_", "index_copy_")


@dataclass(frozen=True)
class KeyCache:
    """How the keys of one attention call pass through a cache.

    Attributes:
        before: The input that holds the cached keys, or None where the graph makes the cache.
        after: Nodes that may be the cache's tensor once the graph has run.
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
    key = before_repeat(_before_cut(attention))
    key = _latents_of(key) or key
    origins = list(ancestors(key, through=lambda node: _same_heads(node, key)))
    after, written = _goes_to(key)
    read_inputs = [node for node in origins if node.op == "placeholder"]
    written_inputs = [node for node in written if node.op == "placeholder"]
    # Where nothing is read, as in the prefill of a static cache, it is what is written to.
    holders = [*reversed(read_inputs), *written_inputs]
    before = holders[0] if holders else None
    in_place = before is not None and any(
        user.args[:1] == (before,) and user.target in (*_WRITES, operator.setitem)
        for user in before.users
    )
    return KeyCache(
        before=before,
        after=tuple(after),
        length=_counter(gm, (*origins, *after)),
        in_place=in_place,
        is_read=bool(read_inputs),
        has_new=before is _before_copies(key) and not in_place,
    )


def _goes_to(key: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes that hold the keys later on, and those that the keys are written into."""
    after, waiting = [key], [key]
    written = []
    while waiting:
        for user in waiting.pop().users:
            found = [user] if _hands_on_keys(user) else []
            if user.target in _WRITES and isinstance(user.args[0], fx.Node):
                # A static cache: what holds the keys is what they are written to.
                written.append(user.args[0])
                found = [user, user.args[0]]
            for node in found:
                if node not in after and _same_heads(node, key):
                    after.append(node)
                    waiting.append(node)
    return after, written


def _counter(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """Return the input that counts a cache's tokens, if it decides where keys are written."""
    counters = [x for x in placeholders(gm) if source_name(x).endswith(".cumulative_length")]
    for node in nodes:
        for user in node.users:
            if user.target == "index_copy_" and user.args[0] is node:
                used = set(ancestors(cast(fx.Node, user.args[2])))
                for counter in counters:
                    if counter in used:
                        return counter
    return None


def _before_copies(key: fx.Node) -> fx.Node:
    """Return the keys before they were copied, for example to the device of another layer."""
    while key.target in _COPIES and isinstance(key.args[0], fx.Node):
        key = key.args[0]
    return key


def _latents_of(key: fx.Node) -> fx.Node | None:
    """Return the latents ``[B, 1, K, R]`` that a cache holds instead of keys, if there are any."""
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


def _hands_on_keys(node: fx.Node) -> bool:
    """Whether a node holds its argument's keys, or some of them: a view or a copy."""
    return node.target is operator.getitem or node.target in ("contiguous", "clone", "narrow")


def _before_cut(attention: Attention) -> fx.Node:
    """Return the static cache that a causal call slices its keys from, or the keys themselves.

    Transformers takes the first keys, as many as queries, of a static cache that a prompt fills.
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
