"""docs/reference/modules.md: the layers of pyproject.toml, each module with the first line of its docstring."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def page() -> str:
    """The page, top layer first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    rows = []
    for depth, layer in enumerate(contract["layers"]):
        for name in (part.strip() for part in layer.split("|")):
            rows.append(f"| {len(contract['layers']) - depth} | `{name}` | {_what_for(name)} |")
    return "\n".join(
        [
            "# Modules",
            "",
            "Rendered from `pyproject.toml` and the modules' docstrings by `make docs`. A module imports only from",
            "lower layers, and modules of one layer do not import each other; import-linter holds it.",
            "",
            "| layer | module | what for |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _what_for(name: str) -> str:
    tree = ast.parse((ROOT / "src" / "cytoclip" / f"{name}.py").read_text(encoding="utf-8"))
    first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return first.replace("|", "\\|")
