"""The command ``show``: describe a profile as text and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindsight.cli.numbers import path

if TYPE_CHECKING:
    from blindsight.profile import Profile


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the command; ``everywhere`` is the parent parser with the shared options."""
    show = commands.add_parser("show", parents=[everywhere], help="describe a profile")
    show.add_argument("profile", type=path)
    show.add_argument(
        "--plot",
        type=path,
        metavar="PNG",
        help="draw the heads by category: a PNG, PDF or SVG by its ending (default: .png)",
    )
    show.set_defaults(run=_run_show)


def _run_show(arguments: argparse.Namespace) -> None:
    from blindsight.files import check_target
    from blindsight.profile import Profile

    plot: Path | None = arguments.plot
    if plot is not None:
        from blindsight.plots import check_ending

        plot = plot if plot.suffix else plot.with_name(f"{plot.name}.png")
        check_target(plot, "plot")
        check_ending(plot)
    profile = Profile.load(arguments.profile)
    print(describe(profile))
    if plot is not None:
        from blindsight.cli.targets import say_saved
        from blindsight.plots import plot_profile

        plot_profile(profile, plot)
        print()
        say_saved([plot])


def describe(profile: Profile) -> str:
    """Return a description of a profile, as text."""
    from blindsight.calibrate import few_prompts, flops_cut
    from blindsight.fingerprints import in_words

    shape = ", ".join(f"{name}={value}" for name, value in in_words(profile.fingerprint).items())
    cut = flops_cut(profile) if "pairs" in profile.evidence else None
    rule = profile.rule
    lines = [
        f"model        {' @ '.join(profile.model.values()) or 'not named'}",
        f"fingerprint  {shape}",
        f"images       token ids {_ids(rule.image_token_ids)}, between "
        f"{_ids(rule.start_token_ids)} and {_ids(rule.end_token_ids)}",
        *(
            f"{name:13}token ids {_ids(ids)}"
            for name, ids in (
                ("first tiles", rule.leading_tile_ids),
                ("later tiles", rule.trailing_tile_ids),
                ("videos", rule.video_token_ids),
            )
            if ids
        ),
        f"sinks        at {_ids(rule.sink_offsets)} from the start of an image",
        f"layers       {rule.layer_pattern}",
        f"calibration  {', '.join(f'{k}={v}' for k, v in profile.calibration.items()) or 'none'}",
        *([f"             warning: {what}"] if (what := few_prompts(profile.calibration)) else []),
        *([] if cut is None else [f"saves        {cut:.1%} of the attention FLOPs on its prompts"]),
        f"evidence     {', '.join(profile.evidence) or 'none'}",
        f"digest       {profile.digest}",
        "",
    ]
    return "\n".join([*lines, *heads_by_layer(profile)])


def heads_by_layer(profile: Profile) -> list[str]:
    """Return the lines of a table of the heads of each category, by layer with attention."""
    from blindsight.categories import NUM_CATEGORIES, HeadCategory

    total = len(profile.layers) * profile.num_heads
    names = HeadCategory.names()
    widths = [max(len(name), len(str(total))) for name in names]

    def row(first: str, cells: Sequence[object]) -> str:
        numbers = (str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first.rjust(5), *numbers])

    lines = [row("layer", names)]
    for layer in profile.layers:
        codes = profile.categories[layer].tolist()
        lines.append(row(str(layer), [codes.count(code) for code in range(NUM_CATEGORIES)]))
    counts = list(profile.counts().values())
    lines.append(row("all", counts))
    lines.append(row("", [f"{count / max(total, 1):.0%}" for count in counts]))
    return lines


def _ids(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "nothing"
