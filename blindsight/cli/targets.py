"""What commands write to: what is there already, and what is said of it when it is replaced.

A result replaces an earlier one of its kind, and the command says which. What is something else is
never replaced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def profile_replaced_at(path: Path) -> str:
    """Check that a profile can be written, before any work; return in words what it replaces.

    Raises:
        ValueError: The path is in no folder that can be written to, or a file of something else.
    """
    from blindsight.files import check_target
    from blindsight.profile import Profile

    check_target(path, "output")
    if not path.exists():
        return ""
    try:
        known = Profile.load(path)
    except ValueError as error:
        raise ValueError(
            f"output must be a new file, or a profile to replace, got a file of something else. "
            f"Give another name, or remove it: {error}"
        ) from None
    return f"profile {known.digest[:12]}"


def results_replaced_at(path: Path, text: str) -> str:
    """Return in words which results a JSON file has that a text will replace; "" if the same."""
    if not path.exists() or (known := path.read_text(encoding="utf-8")) == text:
        return ""
    try:
        found = json.loads(known)
        noted, number = found["conditions"], sum(found["num_questions"].values())
        profile = noted.get("profile", noted.get("evidence of profile"))
        return f"those of profile {profile} for {number} questions of {noted['dataset']}"
    except (AttributeError, KeyError, TypeError, ValueError):
        return "what was there"


def say_saved(paths: Sequence[Path], replaced: str = "") -> None:
    """Print which files were written, and what they replaced."""
    *others, last = map(str, paths)
    names = f"{', '.join(others)} and {last}" if others else last
    print(f"saved to {names}{f', replacing {replaced}' if replaced else ''}")
