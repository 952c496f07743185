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


def check_can_be_made(path: str | os.PathLike[str], name: str) -> None:
    """Check that a file can be written in a folder that may have to be made, before any work.

    Raises:
        ValueError: It cannot; the message says why.
    """
    target = Path(os.path.realpath(path))
    folder = next(parent for parent in target.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = f"{folder} is no folder that can be written to"
    elif target.is_dir():
        problem = "it is a folder"
    else:
        return
    raise ValueError(f"{name} must be a file that can be written, got {path}: {problem}.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text completely or not at all; the folder is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file completely or not at all: under another name, synced, and moved into place.

    Raises:
        OSError: The file cannot be written; it names the target, and what was there before is
            untouched.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".blindsight-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # Python makes the class of the number; nobody knows the temporary file.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        raise
