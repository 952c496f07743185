"""Numbers that options of commands take; what is none is an error before anything is loaded."""

from __future__ import annotations

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """Return an int of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """Return an int of at least 0."""
    return _at_least(0, text)


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
