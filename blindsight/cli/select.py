"""The command ``select``: the categories of a calibrated profile at another budget."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from blindsight.cli.numbers import not_negative, path

if TYPE_CHECKING:
    from blindsight.profile import Profile


def add_commands(commands: Any, everywhere: argparse.ArgumentParser) -> None:
    """Register the command; ``everywhere`` is the parent parser with the shared options."""
    parser = commands.add_parser(
        "select",
        parents=[everywhere],
        help="choose the categories of a calibrated profile by another budget",
        description="Choose the categories again, from what calibration measured and the profile "
        "keeps. Nothing is measured: the result is what calibrating with this budget would give.",
    )
    parser.add_argument("profile", type=path, help="a profile that blindsight calibrate made")
    parser.add_argument(
        "--budget",
        type=not_negative,
        required=True,
        help="how far one head may move the next token, see blindsight calibrate; inf is the "
        "sparsest",
    )
    parser.add_argument("-o", "--output", type=path, required=True, help="the profile to write")
    parser.set_defaults(run=_run_select)


def _run_select(arguments: argparse.Namespace) -> None:
    from blindsight.cli.show import heads_by_layer
    from blindsight.cli.targets import profile_replaced_at, say_saved
    from blindsight.profile import Profile

    replaced = profile_replaced_at(arguments.output)
    before = Profile.load(arguments.profile)
    after = before.at_budget(arguments.budget)
    changed = int((before.categories != after.categories).sum())
    after.save(arguments.output)
    print("\n".join(heads_by_layer(after)))
    print("\nattention FLOPs on the prompts of the calibration:")
    print(f"  before, {_saved(before)}")
    print(f"  after, {_saved(after)}; {changed} of {after.categories.numel()} heads changed")
    say_saved([arguments.output], replaced)


def _saved(profile: Profile) -> str:
    from blindsight.calibrate import flops_cut

    edited = " and edits by hand" if "edited" in profile.calibration else ""
    budget = profile.calibration.get("budget", "unknown")
    return f"budget {budget}{edited}: {flops_cut(profile):.1%} less"
