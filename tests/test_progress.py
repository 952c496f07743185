"""What is shown while work goes on: bars, and other libraries' messages."""

import io
import logging
import sys
import threading
import warnings
from typing import Any

import pytest

import blindsight
from blindsight import ranks
from blindsight.progress import graph_breaks_hidden, progress_bar
from models import Image, make_inputs, tiny_model


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


GRAPH_BREAKS = logging.getLogger("torch._dynamo.variables.tensor")
RECOMPILES = logging.getLogger("torch._dynamo.convert_frame")


def shown() -> tuple[bool, bool]:
    breaks, recompiles = (x.isEnabledFor(logging.WARNING) for x in (GRAPH_BREAKS, RECOMPILES))
    return breaks, recompiles


def test_explain_does_not_speak_of_graph_breaks() -> None:
    model, seen = tiny_model("qwen2_5_vl", num_layers=1), []
    model.register_forward_pre_hook(lambda *_: seen.append(shown()))
    inputs = make_inputs("qwen2_5_vl", [[5, Image(), 4, Image(), 7]])
    blindsight.explain(model, inputs, blindsight.Profile.for_model(model, "sink"))
    assert set(seen) == {(False, True)}
    assert shown() == (True, True)


@pytest.mark.parametrize(
    ("module", "first"), [("calibrate", "_check_options"), ("evaluate", "check_choice")]
)
def test_neither_do_calibrate_and_evaluate(
    module: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        assert shown() == (False, True)
        warnings.warn("the user's own", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"blindsight.{module}.{first}", stop)
    function: Any = getattr(getattr(blindsight, module), module)
    with pytest.warns(UserWarning, match="the user's own"), pytest.raises(KeyboardInterrupt):
        function(None, None, None, *([None] if module == "evaluate" else []))
    assert shown() == (True, True)


def test_calls_may_overlap_in_threads() -> None:
    inside, go_on = threading.Event(), threading.Event()

    @graph_breaks_hidden()
    def work() -> None:
        inside.set()
        go_on.wait(60)

    thread = threading.Thread(target=work)
    with graph_breaks_hidden():
        thread.start()
        inside.wait(60)
    assert shown() == (False, True)  # the thread is still at work
    go_on.set()
    thread.join()
    assert shown() == (True, True)


def test_who_asks_for_more_logs_gets_them() -> None:
    GRAPH_BREAKS.setLevel(logging.DEBUG)
    try:
        with graph_breaks_hidden():
            assert shown() == (True, True)
        assert GRAPH_BREAKS.level == logging.DEBUG
    finally:
        GRAPH_BREAKS.setLevel(logging.NOTSET)
