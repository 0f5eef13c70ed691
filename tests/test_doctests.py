"""Every example of a docstring is run, beside a model and a data root under the names that examples use."""

from __future__ import annotations

import doctest
import importlib
import shutil
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cytoclip"
WITH_EXAMPLES = sorted(file.stem for file in SOURCE.glob("*.py") if ">>> " in file.read_text(encoding="utf-8"))


def test_how_many_modules_have_examples() -> None:
    assert len(WITH_EXAMPLES) >= 12


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples(name: str, root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, "data_root")
    shutil.copytree(base, "runs/first")
    shutil.copy(root / "val" / "imgs" / "000.png", "picture.png")
    module = importlib.import_module(f"cytoclip.{name}" if name != "__init__" else "cytoclip")
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
