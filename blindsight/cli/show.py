"""The command ``show``: describe a profile as text and as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blindsight.profile import Profile


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the command; ``everywhere`` is the parent parser with the shared options."""
    show = commands.add_parser("show", parents=[everywhere], help="describe a profile")
    show.add_argument("profile", type=Path)
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw the heads by category")
    show.set_defaults(run=_run_show)


def _run_show(arguments: argparse.Namespace) -> None:
    from blindsight.files import check_target
    from blindsight.profile import Profile

    if arguments.plot is not None:
        check_target(arguments.plot, "plot")
    profile = Profile.load(arguments.profile)
    print(describe(profile))
    if arguments.plot is not None:
        from blindsight.plots import plot_profile

        plot_profile(profile, arguments.plot)


def describe(profile: Profile) -> str:
    """Return a description of a profile, as text."""
    shape = ", ".join(f"{name}={value}" for name, value in profile.fingerprint.items())
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
