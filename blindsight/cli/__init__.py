"""The command line: ``blindsight demo``, ``show``, ``explain`` and others; see ``--help``.

Each command imports what it needs when it runs, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import blindsight
from blindsight.cli import calibrate, demo, evaluate, select, show, tune
from blindsight.error_text import in_short, on_one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after an error, which is printed as one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        resumes = "; the same command resumes" if getattr(arguments, "resumes", False) else ""
        print(f"blindsight: interrupted{resumes}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.traceback:
            raise
        message = in_short(error)
        if message != on_one_line(error):
            message = f"{message} (--traceback shows all)"
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        print(f"blindsight: error: {message}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blindsight", description="Per-head sparse attention for vision-language models."
    )
    parser.add_argument("--version", action="version", version=blindsight.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument(
        "--traceback", action="store_true", help="show the traceback of an error"
    )
    for part in (demo, show, tune, calibrate, select, evaluate):
        part.add_commands(commands, everywhere)
    return parser
