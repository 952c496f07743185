"""What is quoted in an error message: other libraries' errors, and what was given."""

from __future__ import annotations

_LONGEST_SHOWN = 300


def shortened(text: str) -> str:
    """Return a text cut to what an error message can show; images come as long base64."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def on_one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
