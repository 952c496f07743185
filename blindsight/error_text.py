"""The text of error messages: what was given, and what other libraries say."""

from __future__ import annotations

from collections.abc import Collection

_LONGEST_SHOWN = 300
_LONGEST_LINE = 600  # of an error on the command line


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Check that an argument is one of the words that are known.

    Raises:
        ValueError: It is not; the message lists all of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def shortened(text: str) -> str:
    """Return a text cut to a length that suits a message; an image may come as long base64."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def on_one_line(error: BaseException) -> str:
    """Return an error's message without its line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def in_short(error: BaseException) -> str:
    """Return an error's message on one line that can be read; compilers add whole programs."""
    whole = on_one_line(error)
    if len(whole) <= _LONGEST_LINE:
        return whole
    first, _, rest = str(error).strip().partition("\n")
    if first.rstrip().endswith(":"):  # Dynamo's "backend=... raised:", and then the error
        first = f"{first} {rest.strip().partition(chr(10))[0]}"
    return shortened(" ".join(first.split()))
