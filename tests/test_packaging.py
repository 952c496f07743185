"""The distribution: what it contains, and what importing it costs."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import blindsight

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def find_packages(folder: Path, name: str) -> set[str]:
    """Return the package in a folder and those below it; links are not followed."""
    found = {name} if (folder / "__init__.py").exists() else set()
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            found |= find_packages(child, f"{name}.{child.name}")
    return found


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    expected = find_packages(ROOT / "blindsight", "blindsight")
    expected |= find_packages(ROOT / "passes", "blindsight.passes")
    assert sorted(listed) == sorted(expected)


def test_package_folders_exist(pyproject: dict[str, Any]) -> None:
    folders = pyproject["tool"]["setuptools"]["package-dir"]
    assert set(folders) <= set(pyproject["tool"]["setuptools"]["packages"])
    for folder in folders.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_link_for_editors() -> None:
    link = ROOT / "blindsight" / "passes"
    if link.is_file():  # git on Windows writes a link as a small text file
        pytest.skip("this checkout has no symlinks")
    assert os.readlink(link) == "../passes"


def test_version(pyproject: dict[str, Any]) -> None:
    assert blindsight.__version__ == pyproject["project"]["version"]


def test_installed_metadata(pyproject: dict[str, Any]) -> None:
    try:
        distribution = importlib.metadata.distribution("blindsight")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("blindsight is not installed")
    assert distribution.version == pyproject["project"]["version"]
    entries = {(entry.group, entry.name): entry.value for entry in distribution.entry_points}
    assert entries["torch_dynamo_backends", "blindsight"] == "blindsight.backend_by_name:blindsight"
    assert entries["console_scripts", "blindsight"] == "blindsight.cli:main"


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    # A fresh interpreter finds the package as this one did, installed or not.
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "statement", ["import blindsight", "from blindsight import HeadCategory, Profile, TemplateRule"]
)
def test_import_is_light(statement: str) -> None:
    heavy = {"datasets", "matplotlib", "sklearn", "transformers"}
    modules = modules_after(statement)
    assert "blindsight" in modules
    assert not heavy & modules


def test_every_public_name_can_be_imported() -> None:
    assert len(blindsight.__all__) <= 10
    for name in blindsight.__all__:
        assert getattr(blindsight, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        blindsight.no_such_name  # noqa: B018


def test_dir_shows_what_is_public() -> None:
    shown = {name for name in dir(blindsight) if not name.startswith("__")}
    assert set(blindsight.__all__) < shown
    assert not {"Any", "TYPE_CHECKING", "annotations"} & shown
    assert not [name for name in shown if name.startswith("_")]
    for name in shown:
        assert getattr(blindsight, name) is not None


@pytest.mark.parametrize("name", ["calibrate", "evaluate", "sweep"])
def test_modules_are_called_as_their_functions(name: str) -> None:
    module = getattr(blindsight, name)
    assert module is importlib.import_module(f"blindsight.{name}")
    with pytest.raises(TypeError, match=rf"{name}\(\) missing .* 'model'"):
        module()


def test_python_runs_the_package() -> None:
    command = [sys.executable, "-m", "blindsight", "--version"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, f"{blindsight.__version__}\n"), result.stderr


def test_types_are_packaged(pyproject: dict[str, Any]) -> None:
    assert (ROOT / "blindsight" / "py.typed").is_file()
    assert "py.typed" in pyproject["tool"]["setuptools"]["package-data"]["blindsight"]
