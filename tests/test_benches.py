"""The benches: each begins, and explains itself. What they measure is none of the tests'."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "bench"
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("testbed/*.py")])


@pytest.fixture(autouse=True)
def own_modules() -> Iterator[None]:
    """Scripts import each other by names that others may have, too."""
    names = {path.stem for path in SCRIPTS}
    others = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    yield
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


@pytest.mark.parametrize(
    "path",
    [path for path in SCRIPTS if "\ndef main() " in path.read_text()],
    ids=lambda path: path.stem,
)
def test_a_bench_explains_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (ROOT / "testbed", ROOT, path.parent):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    bench = importlib.import_module(path.stem)
    assert bench.__file__ == str(path)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
