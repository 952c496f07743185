"""Masks that a graph is handed ready made: see whether their elements are intervals of keys.

Where no graph shows how a mask came about (decoder layers that are compiled one by one, a static
cache in ``generate``), its elements still tell what it is, or what it is to each group of keys:
text, sinks and other tokens of spans. Looking at them once costs a few bytes of memory traffic per
pair of tokens, beside thousands of operations per pair in attention, which would otherwise look at
them in every head of every layer.

Shapes: B batch, Q query rows, K key columns.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from blindsight.attention.base_mask import Form, Tier
from blindsight.attention.interval_masks import BaseMask
from blindsight.attention.intervals import NUM_KEY_GROUPS, groups_of_keys
from blindsight.passes.find_attention import Attention
from blindsight.passes.graph import add_placeholder, placeholders
from blindsight.passes.lift_mask import Lifted
from blindsight.runtime.history import History
from blindsight.runtime.plan import Plan
from blindsight.runtime.tensor_notes import TensorNotes, version_of
from blindsight.template import Template

# Elements that are looked at together: what is derived of them should stay in a core's cache, and a
# GPU has better things to do than to launch kernels for few.
_ELEMENTS, _ELEMENTS_OF_GPU = 2**20, 2**26


@dataclass
class Note:
    """What is known of a mask in one forward.

    Attributes:
        sizes: B, Q and K.
        history: Of its sequence.
        layers: Those that used it.
        base: None: it is not intervals.
    """

    sizes: tuple[int, int, int]
    history: weakref.ref[History]
    layers: set[int]
    base: BaseMask | None


class GivenMasks:
    """The masks among the inputs of a graph.

    Args:
        plan: Of the graph.
        notes: What is known of masks; other graphs of a model are handed the same ones.
    """

    def __init__(self, plan: Plan, notes: TensorNotes[Note]) -> None:
        self._plan = plan
        self._notes = notes
        users: dict[fx.Node, list[Attention]] = {}
        for call in plan.calls:
            if call.lifted.given is not None:
                users.setdefault(call.lifted.given, []).append(call.attention)
        self._inputs = [
            (at, node.name, users[node])
            for at, node in enumerate(placeholders(plan.gm))
            if node in users
        ]

    def read(
        self, args: Sequence[Any], layers: Sequence[int], history: History
    ) -> dict[str, BaseMask]:
        """Return the masks that are intervals, by the names of their inputs.

        Args:
            args: The graph's inputs.
            layers: Those of the graph.
            history: The whole sequence.
        """
        found = {}
        size_of = self._plan.size_of(args)
        for at, name, users in self._inputs:
            sizes, *others = (user.sizes(size_of) for user in users)
            if any(other != sizes for other in others):
                continue  # a mask of more columns may serve several numbers of keys
            mask = self._look_at(args[at], layers, history, **sizes)
            if mask is not None:
                found[name] = mask
        return found

    def sizes_of(self, name: str) -> tuple[int | torch.SymInt, int | torch.SymInt]:
        """Return Q and K of the mask of this name, as the graph knows them."""
        return next(users[0].lengths for _, known, users in self._inputs if known == name)

    def _look_at(
        self,
        mask: Tensor,
        layers: Sequence[int],
        history: History,
        *,
        batch: int,
        num_queries: int,
        num_keys: int,
    ) -> BaseMask | None:
        sizes = (batch, num_queries, num_keys)
        known = self._notes.get(mask)
        if known is not None and version_of(mask) is None:
            known = None  # a tensor of inference mode keeps no count of its changes
        # Not everybody counts what is written between two forwards: a CUDA graph does not. A layer
        # that is there again is of another forward.
        is_same = known is not None and known.sizes == sizes and known.history() is history
        if known is not None and is_same and known.layers.isdisjoint(layers):
            known.layers.update(layers)
            return known.base
        found = intervals_or_groups(mask, *sizes, history.on(mask.device))
        self._notes.put([mask], [Note(sizes, weakref.ref(history), set(layers), found)], [0])
        return found


def intervals_or_groups(
    mask: Tensor, batch: int, num_queries: int, num_keys: int, template: Template
) -> BaseMask | None:
    """Return the intervals of keys that a mask consists of, or else those of each group of keys.

    Args:
        mask, batch, num_queries, num_keys: As for :func:`intervals_of_elements`.
        template: Of the whole sequence: groups are text, sinks and other tokens of spans.
    """
    sizes = batch, num_queries, num_keys
    if (found := intervals_of_elements(mask, *sizes)) is not None:
        return found
    groups = groups_of_keys(*template.tensors(), num_keys)
    return intervals_of_elements(mask, *sizes, groups=groups)


def intervals_of_elements(
    mask: Tensor, batch: int, num_queries: int, num_keys: int, *, groups: Tensor | None = None
) -> BaseMask | None:
    """Return the intervals and valid columns that a mask consists of, or None if it does not.

    The interval of a row goes from its first allowed column to its last, and a column is valid if
    any row of the batch row sees it. A row that allows as many columns as are valid within its
    interval allows the very same ones: it allows no others.

    Args:
        mask: ``[B or 1, 1, >= Q, >= K]`` bool, or float with 0 for the allowed pairs and -inf, or
            the smallest finite number, for the others.
        batch, num_queries, num_keys: B, Q and K.
        groups: ``[B, G, K]`` bool, if there shall be an interval for each of these groups of
            columns.
    """
    elements = mask[:, 0, :num_queries, :num_keys].expand(batch, num_queries, num_keys)
    device = mask.device
    column = torch.arange(num_keys, device=device, dtype=torch.int32)
    valid = torch.zeros((batch, num_keys), dtype=torch.bool, device=device)
    is_mask = torch.ones((), dtype=torch.bool, device=device)
    each = [torch.ones_like(valid)] if groups is None else groups.unbind(1)
    parts = []
    together = _ELEMENTS if device.type == "cpu" else _ELEMENTS_OF_GPU
    step = max(1, together // max(1, batch * num_keys))
    for row in range(0, num_queries, step):
        rows = elements[:, row : row + step]
        allowed = rows if rows.dtype == torch.bool else rows == 0
        if rows.dtype != torch.bool:
            is_mask &= (allowed | (rows <= torch.finfo(rows.dtype).min)).all()
        valid |= allowed.any(1)
        for group in each:
            inside = allowed if groups is None else allowed & group[:, None]
            lower = torch.where(inside, column, num_keys).amin(-1)
            upper = torch.where(inside, column, -1).amax(-1)
            parts.append((lower, upper, inside.sum(-1)))
    bounds = []
    for at, group in enumerate(each):
        of_group = zip(*parts[at :: len(each)], strict=True)
        lower, upper, num_allowed = (torch.cat(part, dim=1) for part in of_group)
        num_before = torch.nn.functional.pad((valid & group).cumsum(1), (1, 0))
        begin, end = (num_before.gather(1, edge.long()) for edge in (lower, upper + 1))
        # Rows that allow nothing: lower is K, upper -1.
        is_mask &= (num_allowed == (end - begin).clamp(min=0)).all()
        bounds.append((lower, upper))
    if not bool(is_mask):
        return None
    if groups is None:
        return BaseMask(*bounds[0], valid)
    lower, upper = (torch.stack(side, dim=1) for side in zip(*bounds, strict=True))
    return BaseMask(lower, upper, valid)


def given_inputs(name: str) -> tuple[str, ...]:
    """Return the names of the inputs that hold the intervals of a mask: those of BaseMask."""
    return tuple(f"{name}_{part}" for part in BaseMask._fields)


def add_given_inputs(gm: fx.GraphModule, name: str) -> tuple[fx.Node, ...]:
    """Append the inputs that hold the intervals of the mask of this name."""
    return tuple(add_placeholder(gm, each) for each in given_inputs(name))


def lifted_of_given(
    inputs: Sequence[fx.Node], before: fx.Node, *, by_group: bool = False
) -> Lifted:
    """Return what is proven of a mask whose intervals are inputs of the graph."""
    lower, upper, valid = inputs
    b, q, k = (("index", axis) for axis in "bqk")
    is_valid = ("load", valid, (b, k))
    if by_group:
        each = [
            ("and", ("lower", ("load", lower, (b, at, q))), ("upper", ("load", upper, (b, at, q))))
            for at in range(NUM_KEY_GROUPS)
        ]
        # As an expression only the groups would tell it.
        form: Form = ("and", ("by group", *each), ("valid", is_valid))
        return Lifted(Tier.INTERVALS, before, form=form)
    first, last = ("load", lower, (b, q)), ("load", upper, (b, q))
    form = ("and", ("lower", first), ("upper", last), ("valid", is_valid))
    expression = ("and", is_valid, ("and", ("le", first, k), ("le", k, last)))
    return Lifted(Tier.INTERVALS, before, form=form, expression=expression)
