"""A report as text: totals, what is wrong and what to do, then a table over layers that are alike.

However many graphs Dynamo compiles, the text grows with the layers that differ, not with the calls.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blindsight.attention.base_mask import Tier
from blindsight.text_tables import aligned, compact

if TYPE_CHECKING:
    from blindsight.report import Report, Verdict

_WIDTH = 100
_WHAT_TO_DO = (
    "compile the decoder in place, model.get_decoder().compile(backend=backend), or the whole, "
    "model.compile(backend=backend), and call the model. If Dynamo warned of its recompile_limit, "
    "raise that, in a new process or after torch._dynamo.reset()."
)
_NOT_MET = f"To have them run through the backend, {_WHAT_TO_DO}"
_NOTHING = (
    "No attention was compiled with this backend. torch.compile(model).generate runs the "
    f"uncompiled model: {_WHAT_TO_DO}"
)
# What each reason for a dense run means, or what to do about it.
_MEANING = {
    "no query in a second image": "text, a single image, or a decoded token",
    "estimated to be faster than sparse": 'lowering="fused" runs it sparse all the same',
    "the tokens already in the cache are not known": "made elsewhere, cropped or reordered",
    "input_ids were not seen and no template was given": "give one: blindsight.use_template(...)",
    "disabled": "inside blindsight.disabled()",
}
_MASKS = {
    Tier.EXPRESSION: "is evaluated element by element",
    Tier.OPAQUE: "is read element by element, unless these turn out to be intervals",
}
_MOST_ESTIMATES = 4


@dataclass
class _Attention:
    """What became of one layer's attention in all graphs; or of a frame's that serves several."""

    layer: int | None
    place: str
    mask: str
    categories: str
    is_sparse: bool
    runs: Counter[str] = field(default_factory=Counter)
    estimate: str = ""


def text_of(report: Report) -> str:
    """Return the text that ``print(report)`` shows."""
    if not report.rows:
        return "\n".join(textwrap.wrap(_NOTHING, _WIDTH))
    ours = [row for row in report.rows if row.layer is not None or row.rewritten]
    found = _merged(ours)
    alike = len({frozenset(x.runs.items()) for x in found if x.is_sparse}) <= 1
    parts = [
        [*_totals(report, ours, found), *_missing(report)],
        [aligned(_table(found, with_reasons=not alike))] if found else [],
        [*_masks(found), *_estimates(found), *_left_alone(report.rows)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _merged(rows: Iterable[Verdict]) -> list[_Attention]:
    merged: dict[tuple[object, ...], _Attention] = {}
    for row in rows:
        place = _without_numbers(row.path) if row.layer is None else ""
        mask = "" if row.tier == Tier.INTERVALS else f"{_MASKS[Tier(row.tier)]}: {row.mask}"
        key = (row.layer, place, mask, row.categories, row.rewritten)
        one = merged.setdefault(
            key, _Attention(row.layer, place, mask, row.categories, row.rewritten)
        )
        one.runs += row.runs
        one.estimate = row.estimate or one.estimate
    return sorted(merged.values(), key=lambda one: (one.layer is None, one.layer or 0))


def _totals(report: Report, ours: Sequence[Verdict], found: Sequence[_Attention]) -> list[str]:
    met = {row.layer for row in ours if row.layer is not None}
    known = set(report.layers) or met | set(report.missing_layers)
    number = len(known - set(report.missing_layers))
    graphs = len({row.graph for row in ours})
    head = f"{number} of the {len(known)} layers of the profile met"
    if graphs:
        head += f", in {graphs} graph{'s' * (graphs > 1)}"
    counted = [x for x in found if x.is_sparse] or list(found)
    runs = [_by_reason(x.runs) for x in counted]
    if not any(runs):
        return [f"{head}."]
    if all(x == runs[0] for x in runs) and all(x.layer is not None for x in counted):
        total, what = runs[0], "each with sparse heads" if counted[0].is_sparse else "each"
    else:
        total = sum(runs, Counter())
        what = "all their attention together"
    lines = [f"{head}; {what} ran {_times(total.total())}:"]
    for how, count in sorted(total.items(), key=lambda item: (item[0] != "sparse", -item[1])):
        meaning = _MEANING.get(how.removeprefix("dense: ").removeprefix("is_causal, "))
        lines.append(f"{count:>6,} {how}" + (f" ({meaning})" if meaning else ""))
    return lines


def _missing(report: Report) -> list[str]:
    if not report.missing_layers:
        return []
    return _wrapped(f"Layers not met: {compact(report.missing_layers)}. {_NOT_MET}")


def _table(found: Sequence[_Attention], *, with_reasons: bool) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    heads = min(46, max([5, *(len(one.categories) for one in found)]))
    for one in found:
        runs = _cell(_runs(one.runs, with_reasons=with_reasons), _WIDTH - 16 - heads - 4)
        groups.setdefault((one.place, one.categories, runs), [])
        if one.layer is not None:
            groups[one.place, one.categories, runs].append(one.layer)
    rows: list[tuple[str, ...]] = [("layers", "heads", "runs")]
    for (place, categories, runs), layers in groups.items():
        where = compact(sorted(set(layers))) or f"several, at {place or 'one frame'}"
        rows.append((_cell(where, 16), _cell(categories or "-", heads), runs))
    return rows


def _masks(found: Sequence[_Attention]) -> list[str]:
    masks: dict[str, list[_Attention]] = {}
    for one in found:
        if one.mask:
            masks.setdefault(one.mask, []).append(one)
    return [
        line
        for mask, those in masks.items()
        for line in _wrapped(f"The mask of {_layers(those)} {mask}.")
    ]


def _estimates(found: Sequence[_Attention]) -> list[str]:
    estimates: dict[str, list[_Attention]] = {}
    for one in found:
        if one.estimate:
            estimates.setdefault(one.estimate, []).append(one)
    lines = []
    for estimate, those in [*estimates.items()][:_MOST_ESTIMATES]:
        lines += _wrapped(f"Estimated of the last prompt, {_layers(those)}: {estimate}.")
    if (more := len(estimates) - _MOST_ESTIMATES) > 0:
        lines.append(f"{more} more estimates are in report.rows.")
    return lines


def _left_alone(rows: Iterable[Verdict]) -> list[str]:
    """Return what is said of attention that is not the decoder's, or was refused."""
    reasons: dict[str, list[Verdict]] = {}
    for row in rows:
        if row.layer is None and not row.rewritten:
            reasons.setdefault(_without_numbers(row.reason), []).append(row)
    lines = []
    for those in reasons.values():
        places = dict.fromkeys(
            _without_numbers(row.path) or "attention of another frame" for row in those
        )
        text = f"Left as it is, {', '.join(places)}: {those[0].reason}"
        lines += _wrapped(text.rstrip(".") + ".")
    return lines


def _by_reason(runs: Counter[str]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for how, count in runs.items():
        counted["sparse" if how.startswith("sparse") else how] += count
    return counted


def _runs(runs: Counter[str], *, with_reasons: bool) -> str:
    sparse = {how: count for how, count in runs.items() if how.startswith("sparse")}
    dense = {how: count for how, count in runs.items() if how not in sparse}
    told = [f"{count} {how}" for how, count in sorted(sparse.items())]
    if with_reasons:
        told += [f"{count} {how}" for how, count in sorted(dense.items())]
    elif dense:
        told.append(f"{sum(dense.values())} dense")
    return "; ".join(told) or "-"


def _layers(those: Sequence[_Attention]) -> str:
    layers = sorted({one.layer for one in those if one.layer is not None})
    if not layers:
        return "several layers"
    return f"layer{'s' * (len(layers) > 1)} {compact(layers)}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"


def _without_numbers(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _cell(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
