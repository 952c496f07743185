"""The points of a sweep: what each budget selects, and the baselines beside it.

Shapes: L layers, H query heads, C categories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blindsight.calibration.selection import ALLOCATIONS, check_evidence, select_categories
from blindsight.evaluation.baselines import PruningMasking, WindowMasking, shuffled_categories
from blindsight.evaluation.masked_model import Masking, ProfileMasking
from blindsight.profile import Profile

# What a budget selects: evidence, budget -> category codes [L, H].
Select = Callable[[Mapping[str, Tensor], float], Tensor]

_LOSSES = ("error", "lost_mass", "effect")  # evidence that a budget can limit
_OWN = "output_error"  # the criterion that considers only the head's own output
_BISECTIONS = 24

BY_HEAD, BY_LAYER, BY_ERROR, RANDOM = "by head", "by layer", "by own error", "random"
WINDOW, PRUNING = "window", "pruning"
OWN = "this profile"
MEANINGS = {
    OWN: "the categories of the profile that was given",
    BY_HEAD: "a category for each head, selected at the budget",
    BY_LAYER: "all heads of a layer alike, selected at the budget from the layer's mean errors",
    BY_ERROR: "a category for each head, selected by how much of the head's own output changes",
    RANDOM: "the categories of the point by head, dealt anew to all heads of all layers; in "
    "brackets the range of the draws",
    WINDOW: "first tokens and a sliding window, in all rows and heads (StreamingLLM's mask, "
    "arXiv 2309.17453)",
    PRUNING: "image tokens dropped after layer 2 by the last token's attention (FastV's rule, "
    "arXiv 2403.06764)",
}


@dataclass(frozen=True, eq=False)
class PlannedPoint:
    """A point that is to be answered."""

    series: str
    knob: float
    masking: Masking
    categories: Tensor | None = None
    seed: int | None = None


def spread_budgets(evidence: Mapping[str, Tensor], select: Select, num_points: int) -> list[float]:
    """Return budgets with costs that are spread evenly, from dense to the sparsest possible.

    Args:
        evidence: That of a calibration; the costs are those of its prompts.
        select: What a budget selects; a larger budget never costs more.
        num_points: About how many budgets.

    Raises:
        ValueError: There are fewer than two points, or the evidence is incomplete.
    """
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2, got {num_points}.")
    check_evidence(evidence)
    largest = max(float(evidence[name].max()) for name in _LOSSES if name in evidence)
    pairs = evidence["pairs"].double()

    def cost(budget: float) -> float:
        return float(pairs.gather(2, select(evidence, budget).long()[..., None]).sum())

    most, least = cost(0.0), cost(largest)
    budgets = {0.0, largest}
    for at in range(1, num_points - 1):
        wanted = most + (least - most) * at / (num_points - 1)
        low, high = 0.0, largest
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) > wanted else (low, middle)
        budgets.add(high)
    return sorted(budgets)


def category_plans(
    profile: Profile,
    budgets: Sequence[float],
    select: Select,
    num_seeds: int,
    baselines: bool,
) -> list[PlannedPoint]:
    """Return the points that a profile's evidence chooses, and those they are compared with.

    Args:
        profile: With evidence.
        budgets: One point each.
        select: The categories that a budget chooses, from evidence.
        num_seeds: How often the categories of each point are dealt to other heads at random.
        baselines: Whether to add choices by layer, and by each head's own error.
    """
    check_evidence(profile.evidence)
    alike = {
        name: tensor.mean(1, keepdim=True).expand_as(tensor) if name in _LOSSES else tensor
        for name, tensor in profile.evidence.items()
    }
    plans: list[PlannedPoint] = []
    series = [(BY_HEAD, profile.evidence, select, budgets)]
    if baselines:
        series.append((BY_LAYER, alike, select, budgets))
        if profile.calibration.get("criterion", _OWN) != _OWN and len(budgets) > 1:
            by_error = selection_of(profile, criterion=_OWN)
            spread = spread_budgets(profile.evidence, by_error, len(budgets))
            series.append((BY_ERROR, profile.evidence, by_error, spread))
    for name, evidence, selected, knobs in series:
        seen: set[str] = set()
        for budget in sorted(knobs):
            categories = selected(evidence, budget).to(torch.uint8)
            masking = ProfileMasking(categories)
            if masking.key in seen or not bool(categories.any()):
                continue
            seen.add(masking.key)
            plans.append(PlannedPoint(name, budget, masking, categories))
    for plan in [plan for plan in plans if plan.series == BY_HEAD]:
        assert plan.categories is not None
        if len(set(plan.categories[list(profile.layers)].flatten().tolist())) == 1:
            continue  # there is only one way to deal equal cards
        for seed in range(num_seeds):
            dealt = shuffled_categories(plan.categories, profile.layers, seed)
            plans.append(PlannedPoint(RANDOM, plan.knob, ProfileMasking(dealt), dealt, seed))
    return plans


def token_plans(shares: Sequence[float], widths: Sequence[int]) -> list[PlannedPoint]:
    """Return the points of the token baselines, as far as the decoder allows them.

    Args:
        shares: Shares of dense attention, see :mod:`blindsight.evaluation.baselines`.
        widths: Widths of the decoder's layers; 0 for one without attention.
    """
    plans = [PlannedPoint(WINDOW, share, WindowMasking(share)) for share in shares]
    if len(widths) > 2 and all(widths):
        plans += [PlannedPoint(PRUNING, share, PruningMasking(share)) for share in shares]
    return plans


def selection_of(profile: Profile, *, criterion: str | None = None) -> Select:
    """Return what a budget selects, by default by the criterion that made the profile."""
    noted = profile.calibration
    criterion = noted.get("criterion", _OWN) if criterion is None else criterion
    allocation = noted.get("allocation", ALLOCATIONS[0])

    def select(evidence: Mapping[str, Tensor], budget: float) -> Tensor:
        return select_categories(evidence, budget, criterion=criterion, allocation=allocation)

    return select
