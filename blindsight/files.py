"""Files that are whole, or not there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: under another name, synced, and moved into place.

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
