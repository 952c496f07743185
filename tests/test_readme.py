"""The README's first example runs as it stands (on the eager inner backend, to save compiling),
and the others, which need a checkpoint, are complete."""

import ast
import builtins
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


def names_of(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that code reads, and those that it binds somewhere."""
    read, bound = set(), set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {name.asname or name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.FunctionDef):
            bound |= {node.name, *(argument.arg for argument in node.args.args)}
    return read, bound


def test_every_example_is_complete() -> None:
    examples = re.findall(r"```py(?:thon)?\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        read, bound = names_of(ast.parse(example, str(README)))
        assert read <= bound


def test_the_examples_import_what_there_is() -> None:
    for example in re.findall(r"```py\n(.*?)```", README.read_text(), flags=re.DOTALL):
        imports = [
            node
            for node in ast.parse(example).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        exec(compile(ast.Module(imports, []), str(README), "exec"), {})


def test_a_prompt_of_the_readme_is_one_with_two_images(tmp_path: Path) -> None:
    from PIL import Image

    from blindsight.data.processors import load_processor

    (example,) = re.findall(r"```py\n(.*?)answer = ", README.read_text(), flags=re.DOTALL)
    for name in ("before.jpg", "after.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        example = example.replace(f'"{name}"', repr(str(tmp_path / name)))
    processor = load_processor(README.parent / "bench" / "testbed" / "model")
    scope = {"processor": processor}
    exec(example[example.index("images = ") :], scope)
    assert len(scope["inputs"]["image_grid_thw"]) == 2
