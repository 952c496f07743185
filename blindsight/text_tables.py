"""Text for people: aligned tables, and numbers in short."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines whose columns are aligned, a rule under the first row.

    A cell may have several lines.
    """
    split = [[cell.split("\n") for cell in row] for row in rows]
    widths = [
        max(len(line) for cell in column for line in cell) for column in zip(*split, strict=True)
    ]
    rule = [["-" * width] for width in widths]
    return "\n".join(
        "  ".join(line.ljust(width) for line, width in zip(lines, widths, strict=True)).rstrip()
        for row in (split[0], rule, *split[1:])
        for lines in zip_longest(*row, fillvalue="")
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Return names and what is said of each, one a line."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {text}".rstrip() for name, text in pairs)


def compact(numbers: Sequence[int]) -> str:
    """Return for example ``"0-3, 7"`` for sorted ints."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
