"""Numbers and paths that options take; what is none is an error before anything is loaded."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    """Return an int of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """Return an int of at least 0."""
    return _at_least(0, text)


def path(text: str) -> Path:
    """Return a path, with ``~`` expanded: after a ``=`` no shell does."""
    return Path(text).expanduser()


def share(text: str) -> float:
    """Return a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return number


def not_negative(text: str) -> float:
    """Return a number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number >= 0:
        raise ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return number


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return number
