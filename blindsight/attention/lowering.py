"""How the heads of a layer are computed: by which operators, and in which groups.

Shapes: H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from blindsight.attention.attend import Group
from blindsight.categories import HeadCategory


class Lowering(Enum):
    """How a layer whose heads are of several categories is computed.

    ``FUSED``: one call of FlexAttention, with block tables per head.
    ``SPLIT``: dense heads go to ``scaled_dot_product_attention`` where the model's own mask is
    plain causal, the fastest dense kernel there is; the others to one call of FlexAttention, or
    to one per category where block tables per head would be too large.
    ``AUTO``: whichever is estimated to be the fastest for a prompt, or all heads dense where this
    is faster, in the model's own graph or without its mask: see
    :mod:`blindsight.runtime.cost_model`.
    """

    FUSED = "fused"
    SPLIT = "split"
    AUTO = "auto"

    @classmethod
    def of(cls, name: str) -> Lowering:
        """Return a lowering by its name.

        Raises:
            ValueError: There is none of this name.
        """
        try:
            return cls(name)
        except ValueError:
            names = ", ".join(repr(member.value) for member in cls)
            raise ValueError(f"lowering must be one of {names}, got {name!r}.") from None


@dataclass(frozen=True)
class Layout:
    """The heads of a layer in the order in which they are computed, and their groups."""

    heads: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        """``"fused"``, ``"split"``, or ``"is_causal"``: all heads on the dense kernel."""
        kinds = {kind for kind, _ in self.groups}
        if kinds == {"causal"}:
            return "is_causal"
        return "fused" if kinds <= {"all", "mixed"} else "split"


def causal_layout(num_heads: int) -> Layout:
    """Return the layout of dense heads whose mask is plain causal."""
    return Layout(tuple(range(num_heads)), (("causal", num_heads),))


def fused_layout(categories: Sequence[int], num_threads: int = 1) -> Layout:
    """Return the layout of one call.

    Args:
        categories: ``[H]`` codes of :class:`~blindsight.HeadCategory`.
        num_threads: Threads that share the same queries, each a run of neighbouring heads: dense
            heads are spread evenly over them. 1 keeps the order, and key heads shared.
    """
    heads = tuple(range(len(categories)))
    if num_threads == 1 or len(set(categories)) == 1:
        return Layout(heads, (("all", len(heads)),))
    return Layout(_deal(heads, categories, num_threads), (("mixed", len(heads)),))


def split_layout(
    categories: Sequence[int],
    num_threads: int = 1,
    *,
    is_causal: bool,
    per_category: bool = False,
) -> Layout:
    """Return the layout with dense heads apart, or that of one call where this gains nothing.

    Args:
        categories: ``[H]`` codes of :class:`~blindsight.HeadCategory`.
        num_threads: As for :func:`fused_layout`.
        is_causal: Whether the model's own mask is plain causal, for this prompt.
        per_category: A call per category, so that there is no table per head.
    """
    by_category = {
        category: [head for head, code in enumerate(categories) if code == category]
        for category in HeadCategory
    }
    dense = by_category[HeadCategory.DENSE]
    if per_category:
        groups: list[Group] = [
            ("causal" if is_causal and members is dense else "alike", len(members))
            for members in by_category.values()
            if members
        ]
        heads = tuple(head for members in by_category.values() for head in members)
        return Layout(heads, tuple(groups))
    if not (dense and is_causal):
        return fused_layout(categories, num_threads)
    groups = [("causal", len(dense))]
    sparse = [head for head in range(len(categories)) if categories[head] != HeadCategory.DENSE]
    if sparse:
        is_one = len({categories[head] for head in sparse}) == 1
        groups.append(("alike" if is_one else "mixed", len(sparse)))
    return Layout((*dense, *_deal(sparse, categories, num_threads)), tuple(groups))


def _deal(heads: Sequence[int], categories: Sequence[int], num_threads: int) -> tuple[int, ...]:
    """Deal heads into ``num_threads`` runs of similar cost, in snake order, dense heads first."""
    by_cost = sorted(heads, key=lambda head: categories[head])
    parts: list[list[int]] = [[] for _ in range(num_threads)]
    for turn, head in enumerate(by_cost):
        lap, at = divmod(turn, num_threads)
        parts[at if lap % 2 == 0 else num_threads - 1 - at].append(head)
    return tuple(head for part in parts for head in part)
