"""What `src` imports is what pyproject.toml installs; a dev environment would hide a missing one."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2]
EXTRAS = ("hub", "export", "open-clip", "search", "serve", "tune")
OTHER_NAMES = {
    "faiss": "faiss-cpu",
    "huggingface_hub": "huggingface-hub",
    "open_clip": "open-clip-torch",
    "sentence_transformers": "sentence-transformers",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}
# by accelerate's tracker, by the tokenizer of SigLIP, and by FastAPI where it reads a form
USED_BY_OTHERS = {"tensorboard", "sentencepiece", "python-multipart"}
LAZY = {"api", "search_page"}  # modules that are imported inside a function, by serve
BY_NAME = {"open-clip-torch"}  # importlib.import_module: the text of an import statement would end every type check
PART_OF = {"pydantic_core": "pydantic", "starlette": "fastapi"}  # pydantic pins the one version that fits it


def test_every_import_is_a_dependency_and_every_dependency_is_imported() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    always = _names(project["dependencies"])
    optional = {name for extra in EXTRAS for name in _names(project["optional-dependencies"][extra])} - {"cytoclip"}
    files = list((PROJECT / "src").rglob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    imported = _foreign({name for tree in trees for node in ast.walk(tree) for name in _imports(node)})
    eager = [tree for file, tree in zip(files, trees, strict=True) if file.stem not in LAZY]
    at_import = _foreign({name for tree in eager for node in tree.body for name in _imports(node)})
    assert len(files) > 25
    assert imported | BY_NAME == (always | optional) - USED_BY_OTHERS
    within = {
        name.name for tree in eager for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert not within & LAZY
    assert not at_import & optional, "an optional dependency is imported where it is used"


def _names(declared: list[str]) -> set[str]:
    return {re.split(r"[<>=~!\[ ]", one)[0].lower() for one in declared}


def _imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


def _foreign(names: set[str]) -> set[str]:
    foreign = {PART_OF.get(name, name) for name in names - sys.stdlib_module_names - {"cytoclip"}}
    return {OTHER_NAMES.get(name, name) for name in foreign}
