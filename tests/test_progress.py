"""When a bar is shown, and when not."""

import io
import sys

import pytest

from blindsight import ranks
from blindsight.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "on_terminal", "elsewhere"),
    [(None, True, False), (True, True, True), (False, False, False)],
)
def test_a_bar_is_shown_on_a_terminal_or_as_asked(
    progress: bool | None, on_terminal: bool, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream, expected in ((Terminal(), on_terminal), (io.StringIO(), elsewhere)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(progress, total=2, desc="working") as bar:
            bar.update()
        assert ("working" in stream.getvalue()) == expected


def test_only_the_first_process_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    for rank in (1, 0):
        token = ranks._ranks.set(ranks.Ranks(rank, 2))
        try:
            progress_bar(True, total=2).close()
        finally:
            ranks._ranks.reset(token)
        assert (stream.getvalue() == "") == (rank == 1)
