"""The text of error messages: what was given, and what other libraries say."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

_ENDINGS = (".json", ".jsonl", ".parquet", ".csv")  # of files
_LONGEST_SHOWN = 300
_LONGEST_LINE = 600  # of an error on the command line


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Check that an argument is one of the words that are known.

    Raises:
        ValueError: It is not; the message lists all of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def local_path(name: str, what: str) -> str:
    """Return a name with ``~`` expanded, which is a path that exists or may be an id on the hub.

    Args:
        name: As somebody gave it.
        what: What it should be, for the message.

    Raises:
        ValueError: There is no such path, and the name is none that the hub could know: asking
            there takes long.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return path
    is_path = name.startswith(("/", ".", "~")) or name.endswith(_ENDINGS)
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"{what} must be a path that exists, or the id of one on the hub, 'name' or "
            f"'owner/name', got {name!r}, and there is no such file or folder. Check the path."
        )
    return name


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
