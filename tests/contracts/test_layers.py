"""Arrows only point down, and no module stands outside the layers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_no_module_imports_from_a_higher_layer_or_its_own() -> None:
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 1 kept, 0 broken." in done.stdout


def test_every_module_is_in_exactly_one_layer() -> None:
    """`exhaustive` makes import-linter refuse a module that is nowhere; this shows that it is on."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = contracts
    assert contract["type"] == "layers"
    assert contract["exhaustive"] is True
    assert contract["exhaustive_ignores"] == ["__main__"]
    assert contract["ignore_imports"] == ["cytoclip -> cytoclip.*"], "what `import cytoclip` offers, and nothing else"
    # a colon would allow imports within a layer
    listed = [module.strip() for layer in contract["layers"] for module in layer.split("|")]
    modules = {path.stem for path in (REPOSITORY / "src" / "cytoclip").glob("*.py")} - {"__init__", "__main__"}
    assert len(listed) == len(set(listed)) >= 24
    assert set(listed) == modules
