"""Pictures: masks, the categories of a profile's heads, and accuracy over cost.

matplotlib is needed only here, and imported only when something is drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blindsight.attention.interval_masks import keep_elements, keep_intervals
from blindsight.categories import HeadCategory
from blindsight.files import write_whole

if TYPE_CHECKING:
    from blindsight.profile import Profile
    from blindsight.template import Template

# Told apart by everybody, and in print: M. Okabe and K. Ito, Color universal design, 2008.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B0608F"
SKY = "#56B4E9"
GREY, INK, FAINT = "#8A8A8A", "#222222", "#D9D9D9"

# From all to least of what a head sees, dark to light.
CATEGORY_COLORS = {
    HeadCategory.DENSE: "#2D2A5F",
    HeadCategory.DOCUMENT_SINK: "#2A7F9E",
    HeadCategory.DOCUMENT: "#6CC08B",
    HeadCategory.SINK: "#F6E27A",
}
_DPI = 170
_TEXT_ON = {HeadCategory.DENSE: "white", HeadCategory.DOCUMENT_SINK: "white"}


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        label: Written at its end.
        color: Of line and label.
        x, y: The points, in order.
        low, high: A band around them, or nothing.
        is_main: Drawn strongest.
    """

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_main: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves over one axis.

    Attributes:
        title: What is up, written above.
        curves: The lines.
        baseline: A level to compare with, or None.
        is_log: Whether the axis is logarithmic.
        marks: Points x, y to draw with a ring.
        mark_label: What is written above these.
    """

    title: str
    curves: Sequence[Curve]
    baseline: float | None = None
    is_log: bool = False
    marks: Sequence[tuple[float, float]] = ()
    mark_label: str = "this profile"


def plot_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Draw the category of every head, layers by heads, as PNG, PDF or SVG by the path's ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, heads = profile.num_layers, profile.num_heads
    cell = min(0.34, 9.0 / heads, 11.0 / layers)
    width, height = max(4.9, heads * cell + 1.1), layers * cell + 1.6
    figure = _figure(width, height)
    left, bottom = 0.75 / width, 0.55 / height
    axes = figure.add_axes((left, bottom, heads * cell / width, layers * cell / height))
    for layer in range(layers):
        if layer not in profile.layers:
            kind = profile.layer_types[layer].replace("_", " ")
            style = {"color": GREY, "size": 5.5, "ha": "center", "va": "center"}
            axes.text((heads - 1) / 2, layer, f"{kind}: no heads", **style)
            continue
        for head, code in enumerate(profile.categories[layer].tolist()):
            color = CATEGORY_COLORS[HeadCategory(code)]
            axes.add_patch(_square(head, layer, 0.92, color))
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.set_xticks(_ticks(heads))
    axes.set_yticks(_ticks(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    _clean(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)

    total, counts = len(profile.layers) * heads, profile.counts()
    known = profile.model.get("id", "")
    name = (
        Path(known).name if os.path.isabs(known) else known or profile.fingerprint["architecture"]
    )
    top = 1 - 0.33 / height
    figure.text(left, top, f"What each head of {name} sees", color=INK, size=11, weight="bold")
    labels = [
        (f"{category.name} {counts[category] / total:.0%}", color, _TEXT_ON.get(category, INK))
        for category, color in CATEGORY_COLORS.items()
    ]
    _write_row(figure, left * width, height - 0.73, labels)
    _save(figure, path)


def plot_masks(template: Template, path: str | os.PathLike[str]) -> None:
    """Draw what each category keeps of a causal mask, queries by keys, of the first prompt.

    Args:
        template: Of a prompt of some dozens of tokens.
        path: A PNG, PDF or SVG, by its ending.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.colors import ListedColormap

    span_id, is_sink = (part[:1] for part in template.tensors())
    num_tokens = template.num_tokens
    keep = keep_intervals(span_id, is_sink, num_tokens, num_tokens)
    kept = keep_elements(keep, num_tokens)[0]
    spans, tokens = span_id[0], torch.arange(num_tokens)
    causal = tokens <= tokens[:, None]
    own = spans == spans[:, None]
    of_images = (spans > 0) & (spans[:, None] > 0)
    # 0: a later key; 1: hidden by the category; the others are seen.
    kind = torch.where(of_images, torch.where(own, 3, torch.where(is_sink[0], 4, 5)), 2)
    legend = (
        ("hidden", "#F1F1F1"),
        ("text", "#BDBDBD"),
        ("own image", "#6CC08B"),
        ("sinks of other images", ORANGE),
        ("other images", "#2D2A5F"),
    )
    colors = ("white", *(color for _, color in legend))

    side, gap, width, height = 1.82, 0.16, 8.0, 2.72
    figure = _figure(width, height)
    for at, category in enumerate(CATEGORY_COLORS):
        drawn = torch.where(causal, torch.where(kept[category], kind, 1), 0)
        left = 0.14 + at * (side + gap)
        axes = figure.add_axes((left / width, 0.42 / height, side / width, side / height))
        axes.imshow(
            drawn.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=5, interpolation="nearest"
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        share = float((causal & kept[category]).sum() / causal.sum())
        title = f"{category.name}  {share:.0%}"
        if at == 0:
            hint = {"color": GREY, "size": 6.5, "ha": "right", "transform": axes.transAxes}
            axes.text(1, 0.93, "keys \N{RIGHTWARDS ARROW}", **hint)
            axes.text(1, 0.83, "queries \N{DOWNWARDS ARROW}", **hint)
        axes.set_title(title, color=INK, size=8.5, weight="bold", loc="left", pad=5)
    labels = [(name, color, "white" if color == colors[-1] else INK) for name, color in legend]
    _write_row(figure, 0.17, 0.15, labels)
    _save(figure, path)


def plot_curves(
    panels: Sequence[Panel],
    path: str | os.PathLike[str],
    *,
    title: str,
    subtitle: str,
    x_label: str,
) -> None:
    """Draw panels above each other over one axis, in percent, which falls to the right.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines = subtitle.count("\n") + 1
    height = 1.0 + 0.16 * lines + 2.9 * len(panels)
    figure = _figure(8.6, height)
    left, width = 0.085, 0.665
    figure.text(left, 1 - 0.36 / height, title, color=INK, size=12.5, weight="bold")
    figure.text(left, 1 - 0.48 / height, subtitle, color="#555555", size=8.5, va="top")
    everything = [x for panel in panels for curve in panel.curves for x in curve.x]
    lowest, highest = min(everything), max(everything)
    margin = 0.03 * max(highest - lowest, 1.0)
    for at, panel in enumerate(panels):
        bottom = (0.62 + 2.9 * (len(panels) - 1 - at)) / height
        axes = figure.add_axes((left, bottom, width, 2.3 / height))
        axes.set_xlim(highest + margin, lowest - margin)
        if panel.is_log:
            axes.set_yscale("log")
        for curve in sorted(panel.curves, key=lambda curve: curve.is_main):
            _draw(axes, curve)
        for x, y in panel.marks:
            ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "color": INK}
            axes.plot([x], [y], markeredgewidth=1.4, zorder=5, clip_on=False, **ring)
            axes.plot([x], [y], "o", markersize=3.5, color=INK, zorder=5, clip_on=False)
            place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
            axes.annotate(panel.mark_label, (x, y), color=INK, size=8, zorder=5, **place)
        if panel.baseline is not None:
            axes.axhline(panel.baseline, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(panel.title, loc="left", size=9.5, color=INK, pad=7)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter("{x:.0f} %")
        _clean(axes)
        if at < len(panels) - 1:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel(x_label)
        _label_ends(axes, panel.curves)
    _save(figure, path)


def _draw(axes: Any, curve: Curve) -> None:
    order = 4 if curve.is_main else 3
    if len(curve.low):
        axes.fill_between(
            curve.x, curve.low, curve.high, color=curve.color, alpha=0.16, linewidth=0, zorder=2
        )
    axes.plot(
        curve.x,
        curve.y,
        color=curve.color,
        linewidth=2.4 if curve.is_main else 1.5,
        marker="o",
        markersize=5 if curve.is_main else 3.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=order,
        clip_on=False,
    )


def _label_ends(axes: Any, curves: Sequence[Curve]) -> None:
    """Write each curve's label beside its end, none over another."""
    axes.set_ylim(axes.get_ylim())
    data = [axes.transData.transform((curve.x[-1], curve.y[-1])) for curve in curves]
    ends = [axes.transAxes.inverted().transform(point) for point in data]
    to_share = [float(share) for _, share in ends]
    lines = [curve.label.count("\n") + 1 for curve in curves]
    places = _spread(to_share, [0.066 * number + 0.025 for number in lines])
    for curve, place, (x_end, share) in zip(curves, places, ends, strict=True):
        axes.plot(
            [x_end + 0.012, 1.03, 1.045],
            [share, place, place],
            transform=axes.transAxes,
            color=curve.color,
            linewidth=0.7,
            alpha=0.7,
            clip_on=False,
            zorder=1,
        )
        axes.text(
            1.055,
            place,
            curve.label,
            transform=axes.transAxes,
            color=curve.color,
            size=8.5,
            va="center",
            linespacing=1.15,
            weight="bold" if curve.is_main else "normal",
        )


def _spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Return places near the wanted ones, as far apart as the sizes ask for, within 0..1."""
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    places = list(wanted)
    for before, at in pairwise(order):
        places[at] = max(places[at], places[before] + (sizes[before] + sizes[at]) / 2)
    if order:
        places[order[-1]] = min(places[order[-1]], 1.0)
    for after, at in pairwise(reversed(order)):
        places[at] = min(places[at], places[after] - (sizes[after] + sizes[at]) / 2)
    return places


def _ticks(number: int) -> list[int]:
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, number) if number / s <= 16)
    return list(range(0, number, step))


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors="#555555", labelsize=8.5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color("#555555")
        label.set_size(9)


def check_can_plot() -> None:
    """Check, before any work is done, that there will be a picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError(
            "pictures need matplotlib, which is not installed. Install blindsight[viz], or ask "
            "for none."
        ) from None


def _figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches; nothing of pyplot's global state is touched."""
    check_can_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _square(x: float, y: float, side: float, color: str) -> Any:
    """Return a square around a point, its corners a little rounded."""
    from matplotlib.patches import FancyBboxPatch

    rounding = 0.08 * side
    corner = (x - side / 2 + rounding, y - side / 2 + rounding)
    return FancyBboxPatch(
        corner,
        side - 2 * rounding,
        side - 2 * rounding,
        boxstyle=f"round,pad={rounding},rounding_size={rounding}",
        facecolor=color,
        edgecolor="none",
    )


def _write_row(figure: Any, x: float, y: float, labels: Sequence[tuple[str, str, str]]) -> None:
    """Write labels beside each other, each with the colors of its box and of its text."""
    width, height = figure.get_size_inches()
    for label, color, ink in labels:
        box = {"boxstyle": "round,pad=0.25", "facecolor": color, "edgecolor": "none"}
        text = figure.text(x / width, y / height, f" {label} ", size=7.5, color=ink, bbox=box)
        extent = text.get_window_extent(figure.canvas.get_renderer())
        x += extent.width / _DPI + 0.12  # inches, padding included


def check_ending(path: str | os.PathLike[str]) -> str:
    """Check that a picture can be written to a path; return its format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The path ends in no format that there is.
    """
    ending = os.path.splitext(path)[1].lstrip(".").lower() or "png"
    known = sorted(_figure(1, 1).canvas.get_supported_filetypes())
    if ending not in known:
        raise ValueError(f"a picture's path must end in one of {', '.join(known)}, got {ending!r}.")
    return ending


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    ending = check_ending(path)
    buffer = io.BytesIO()
    # Without the time and version that they would carry, equal pictures are equal files.
    metadata = {"Software": None} if ending == "png" else None
    figure.savefig(buffer, format=ending, dpi=_DPI, facecolor="white", metadata=metadata)
    write_whole(path, buffer.getvalue())
