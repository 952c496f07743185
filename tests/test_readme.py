"""The README's example runs as it stands (on the eager inner backend, to save compiling)."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("context", ["inference_mode", "no_grad"])
def test_the_example_runs(context: str) -> None:
    text = README.read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    example = example.replace(
        "blindsight_backend(profile, ", "blindsight_backend(profile, inner='eager', "
    )
    example = example.replace("torch.inference_mode()", f"torch.{context}()")
    assert "inner='eager'" in example
    assert context in example
    exec(compile(example, str(README), "exec"), {})


def test_the_first_screen_has_two_commands() -> None:
    first_screen = "\n".join(README.read_text().splitlines()[:40])
    commands = [line for line in first_screen.splitlines() if line.startswith("    python")]
    assert len(commands) == 2
    assert commands[0].endswith("blindsight demo")
    assert commands[1].endswith("pytest -q -n auto")
