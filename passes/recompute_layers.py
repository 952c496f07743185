"""Keep little of a graph's layers for their gradients: what these need is computed again.

What a layer computes inside takes far more memory than what it hands the next. So a graph is cut
between its calls of attention, where the least is handed on, and of each segment its inputs alone
are kept ("Training Deep Nets with Sublinear Memory Cost", https://arxiv.org/abs/1604.06174).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import placeholders
from blindsight.passes.memory import overwritten, storage_of

logger = logging.getLogger(__name__)


class Recomputed(nn.Module):
    """A part of a graph of which its inputs alone are kept for gradients."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.part, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_layers_pass(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    attention: Sequence[Attention],
) -> fx.GraphModule:
    """Return a graph of segments with a call of attention each, which gradients compute again.

    It is to be run as it is, not compiled, and without dropout. A segment that could not be run
    twice, because it changes what another one made, is joined with that; where the graph changes
    its inputs, it is returned as it is.

    Args:
        gm: A graph of Dynamo's; it stays as it is.
        example_inputs: Not read; the usual signature of a pass.
        attention: Calls in ``gm``, from :func:`~blindsight.passes.find_attention.find_attention`.
    """
    del example_inputs
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    together = _together(gm, nodes)
    if together is None or not attention:
        return gm
    number = {node: at for at, node in enumerate(nodes)}
    handed_on = _handed_on(nodes, number)
    cuts = []  # before which nodes
    for this, following in pairwise(sorted(number[call.node] for call in attention)):
        if free := set(range(this + 1, following + 1)) - together:
            cuts.append(min(sorted(free), key=handed_on.__getitem__))
    segments = {node: sum(cut <= at for cut in cuts) for node, at in number.items()}
    result = split_module(gm, gm, segments.__getitem__, keep_original_order=True)
    for name, part in list(result.named_children()):
        setattr(result, name, Recomputed(part))
    logger.info("cut a graph into %d segments", len(cuts) + 1)
    return result


def _handed_on(nodes: Sequence[fx.Node], number: dict[fx.Node, int]) -> list[int]:
    """Return how many values made before each node are read by it or later."""
    changes = [0] * (len(nodes) + 1)
    for at, node in enumerate(nodes):
        last = max((number.get(user, len(nodes) - 1) for user in node.users), default=at)
        changes[at + 1] += 1
        changes[last + 1] -= 1
    return list(accumulate(changes))


def _together(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[int] | None:
    """Return before which nodes no cut may be; None where the graph cannot be run twice.

    What changes a tensor stays with what made it, and calls in a mode (a vmap, an autocast) with
    those that enter and leave it.
    """
    made: dict[int, int] = {}  # where the memory of a tensor was
    for node in placeholders(gm):
        if (memory := storage_of(node)) is not None:
            made[memory] = -1
    found: set[int] = set()
    depth = 0
    for at, node in enumerate(nodes):
        if depth:
            found.add(at)
        name = getattr(node.target, "__name__", "")
        if name == "_set_grad_enabled":
            depth += -1 if node.args[0] else 1
        elif name.startswith("_enter_") or name.endswith("_increment_nesting"):
            depth += 1
        elif name.startswith("_exit_") or name.endswith("_decrement_nesting"):
            depth -= 1
        for changed in overwritten(node):
            begin = made.get(storage_of(changed) or 0, -1)
            if begin < 0:
                return None
            found.update(range(begin + 1, at + 1))
        if (memory := storage_of(node)) is not None:
            made.setdefault(memory, at)
    return found
