"""Write files completely or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def check_target(path: str | os.PathLike[str], name: str) -> None:
    """Check that a file can be written, before any work is done.

    Raises:
        ValueError: It cannot; the message says why.
    """
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = f"{folder} is no folder that can be written to"
    elif os.path.isdir(path):
        problem = "it is a folder"
    else:
        return
    raise ValueError(f"{name} must be a file in an existing folder, got {path}: {problem}.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text completely or not at all; the folder is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file completely or not at all: under another name, synced, and moved into place.

    Raises:
        OSError: The file cannot be written; what was there before is untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".blindsight-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
