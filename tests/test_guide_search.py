"""The commands and the program of docs/guide/search.md, as a reader would type them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cytoclip import ivf, training
from cytoclip.config import Config
from cytoclip.console import Console
from tests.typed import Run

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "search.md").read_text(encoding="utf-8")


def test_the_commands_and_the_program(
    experiment: Callable[..., Config],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    training.fit(experiment(train={"steps": 2}, output="runs/first"), Console(quiet=True))
    shutil.copytree(root, "path/to/pictures")
    shutil.copy(root / "val" / "imgs" / "003.png", "query.png")
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    said = [run(*shlex.split(line)[1:]) for line in block.splitlines()]
    assert len(said) == 6
    assert [one.code for one in said] == [0] * 6, said
    assert said[0].out.startswith("my-index: 68 pictures, ")
    assert [len(one.out.splitlines()) for one in said[1:5]] == [10, 5, 10, 10]
    assert said[2].out.split()[1:3] == ["1.0000", "003.png"]
    assert {hit["keys"]["split"] for hit in json.loads(said[5].out)["hits"]} == {"val"}
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 - our own page
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == list("12345")
    assert printed[5] == f"68 {list(names['index'].keys)} exact"
    assert names["hits"][0].id not in {hit.id for hit in names["nearest"]}
    assert names["picture"].size == (40, 40)
    assert {hit.keys["split"] for hit in names["captions"]} == {"val"}


def test_the_numbers_are_those_of_the_code() -> None:
    assert f"Up to {ivf.EXACT:,} pictures" in PAGE
    assert f"the best {ivf.CANDIDATES} are scored exactly" in PAGE
    assert f"{ivf.TARGET * 100:.0f} of 100" in PAGE
