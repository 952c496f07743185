"""Choose the category of every head, given what each category would lose, within one budget.

The evidence is kept in the profile, see :mod:`blindsight.calibrate`: choosing by another budget
takes no other measurement.

Shapes: L layers, H query heads, C categories.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from blindsight.categories import NUM_CATEGORIES, HeadCategory
from blindsight.error_text import check_choice

# Each criterion, and the evidence that it compares with the budget.
CRITERIA = {"output_error": "error", "attention_mass": "lost_mass", "next_token": "effect"}
ALLOCATIONS = ("per_head", "global")


def select_categories(
    evidence: Mapping[str, Tensor],
    budget: float,
    *,
    criterion: str,
    allocation: str = "per_head",
) -> Tensor:
    """Return the cheapest categories within a budget: uint8 ``[L, H]``.

    The cost of a category is the number of pairs of a query and a key that its head computes. A
    larger budget never costs more.

    Args:
        evidence: ``error`` (or ``lost_mass``, or ``effect``) and ``pairs``, each ``[L, H, C]``.
        budget: With ``allocation="per_head"``, the most that any one head may lose: every head
            takes its cheapest category within it. With ``"global"``, the root mean square of the
            losses of all heads: spent where it saves the most pairs for the loss.
        criterion: What counts as lost: ``"output_error"``, the change of a head's output relative
            to its norm; ``"attention_mass"``, the attention weight that is hidden; or
            ``"next_token"``, the change of the token that follows the prompt.
        allocation: ``"per_head"`` or ``"global"``.

    Raises:
        ValueError: An argument is malformed, or the evidence is incomplete.
    """
    check_choice("criterion", criterion, CRITERIA)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_budget(budget)
    wanted = (CRITERIA[criterion], "pairs")
    if missing := [name for name in wanted if name not in evidence]:
        raise ValueError(
            f"evidence must have {' and '.join(wanted)}, got no {', '.join(missing)}. Calibrate a "
            "profile; one that was written by hand has none."
        )
    loss, pairs = (evidence[name].double() for name in wanted)
    if loss.shape != pairs.shape or loss.dim() != 3 or loss.shape[2] != NUM_CATEGORIES:
        raise ValueError(
            f"evidence must have shape [L, H, {NUM_CATEGORIES}], got {list(loss.shape)} and "
            f"{list(pairs.shape)}."
        )
    choose = _per_head if allocation == "per_head" else _globally
    flat = choose(loss.flatten(0, 1).tolist(), pairs.flatten(0, 1).tolist(), budget)
    return torch.tensor(flat, dtype=torch.uint8).view(loss.shape[:2])


def check_budget(budget: object) -> None:
    """Check that a budget is one.

    Raises:
        ValueError: It is not.
    """
    if not (isinstance(budget, Real) and float(budget) >= 0):
        raise ValueError(f"budget must be a number of at least 0, got {budget!r}.")


def check_evidence(evidence: Mapping[str, Tensor]) -> None:
    """Check that a profile holds the evidence that calibration leaves in it.

    Raises:
        ValueError: It does not.
    """
    if missing := [name for name in ("error", "pairs") if name not in evidence]:
        raise ValueError(
            "profile must hold the evidence of its calibration, error and pairs, got no "
            f"{', '.join(missing)}. Give a profile that `blindsight calibrate` made."
        )


def _per_head(losses: list[list[float]], pairs: list[list[float]], budget: float) -> list[int]:
    chosen = []
    for loss, cost in zip(losses, pairs, strict=True):
        fitting = [c for c in HeadCategory if c is HeadCategory.DENSE or loss[c] <= budget]
        chosen.append(int(min(fitting, key=lambda c: (cost[c], loss[c], c))))
    return chosen


def _globally(losses: list[list[float]], pairs: list[list[float]], budget: float) -> list[int]:
    """Take the steps that save the most per squared loss, up to the first that does not fit."""
    steps: list[tuple[float, int, float, HeadCategory]] = []
    for head, (loss, cost) in enumerate(zip(losses, pairs, strict=True)):
        at = HeadCategory.DENSE
        while True:
            # The next corner of the head's convex hull of loss over cost.
            # A loss that is not a number fits no budget.
            cheaper = [c for c in HeadCategory if cost[c] < cost[at] and not math.isnan(loss[c])]
            if not cheaper:
                break
            prices = {
                c: loss[c] ** 2 - loss[at] ** 2 if loss[c] > loss[at] else 0.0 for c in cheaper
            }
            slopes = {c: prices[c] / (cost[at] - cost[c]) for c in cheaper}
            best = min(cheaper, key=lambda c: (slopes[c], cost[c], c))
            steps.append((slopes[best], head, prices[best], best))
            at = best
    chosen = [int(HeadCategory.DENSE)] * len(losses)
    num_heads = sum(cost[HeadCategory.DENSE] > 0 for cost in pairs)  # of layers with attention
    spent, limit = [0.0], budget**2 * num_heads
    for _, head, price, category in sorted(steps):
        spent.append(price)
        if math.fsum(spent) > limit:
            break
        chosen[head] = int(category)
    return chosen
