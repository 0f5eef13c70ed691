"""What `src` imports is what pyproject.toml installs; a dev environment would hide a missing one."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2]
OTHER_NAMES = {"PIL": "pillow", "yaml": "pyyaml"}
USED_BY_OTHERS = {"tensorboard", "sentencepiece"}  # by accelerate's tracker, and by the tokenizer of SigLIP
PART_OF = {"pydantic_core": "pydantic"}  # pydantic pins the one version that fits it


def test_every_import_is_a_dependency_and_every_dependency_is_imported() -> None:
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=~!\[ ]", one)[0].lower() for one in declared}
    imported: set[str] = set()
    files = list((PROJECT / "src").rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = {PART_OF.get(name, name) for name in imported - sys.stdlib_module_names - {"cytoclip"}}
    assert len(files) > 25
    assert {OTHER_NAMES.get(name, name) for name in foreign} == names - USED_BY_OTHERS
