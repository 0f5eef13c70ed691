"""Files and functions stay small enough to be read from top to bottom."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "bench", "docs")
FILE_LINES = 450
FUNCTION_LINES = 60
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def test_no_file_is_longer_than_450_lines() -> None:
    found = [*REPOSITORY.glob("*.py"), *python_files(*FOLDERS)]
    assert 50 <= len(found) <= 400
    lengths = {str(p.relative_to(REPOSITORY)): len(p.read_text(encoding="utf-8").splitlines()) for p in found}
    assert {name: length for name, length in lengths.items() if length > FILE_LINES} == {}


def test_no_function_of_the_package_is_longer_than_60_lines() -> None:
    lengths = {
        f"{path.name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in python_files("src")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert 200 <= len(lengths) <= 2000
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_every_module_is_named_for_what_it_does() -> None:
    names = {path.stem for path in python_files("src")}
    assert 26 <= len(names) <= 150
    assert {name for name in names if name.strip("_") in VAGUE} == set()


def test_the_package_is_flat() -> None:
    """One folder, so that a name is enough to find a module."""
    assert {path.parent for path in python_files("src")} == {REPOSITORY / "src" / "cytoclip"}
