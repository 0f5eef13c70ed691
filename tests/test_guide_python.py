"""The programs of docs/guide/python.md, one after another, as a reader would type them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import config, training
from cytoclip.config import Config
from cytoclip.console import Console

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "python.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_programs(
    experiment: Callable[..., Config],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path / "path" / "to" / "data_root")
    training.fit(experiment(train={"steps": 2}, output="runs/first"), Console(quiet=True))
    Path("my.yaml").write_text(config.dump(experiment(data={"root": "path/to/data_root"}, validate={"ks": [1, 10]})))
    names: dict[str, Any] = {}
    assert len(PROGRAMS) == 3
    said = []
    for program in PROGRAMS:
        exec(program, names)  # noqa: S102 - our own page
        said.append(capsys.readouterr().out)
    assert names["image_ND"].shape == names["text_MD"].shape == (2, names["encoder"].width)
    assert np.allclose(names["cosines_NM"], names["image_ND"] @ names["text_MD"].T, atol=1e-6)
    assert np.allclose(names["shares_NM"].sum(1), 1, atol=1e-5)
    assert said[1].startswith(f"{Path('runs/from_python')} 0.")
    assert "hit@10" in said[1]
    assert [model["model"] for model in names["scores"]["models"]][1:] == ["runs/from_python", "runs/first"]
    commented = PROGRAMS[2].rpartition("# ")[2].strip()
    first, _, last = commented.partition(" … ")
    assert said[2].startswith(first)
    assert said[2].strip().endswith(last)
