"""The commands of docs/guide/evaluation.md, and what the page says of metrics and files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cytoclip import training
from cytoclip.config import Config
from cytoclip.console import Console
from tests.typed import Run

HERE = Path(__file__).parents[1]
PAGE = (HERE / "docs" / "guide" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_in_order(
    experiment: Callable[..., Config],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root, tmp_path / "path" / "to" / "data_root")
    shutil.copytree(root / "val", tmp_path / "path" / "to" / "data_root" / "test")
    for name in ("first", "second"):
        training.fit(experiment(train={"steps": 2}, output=str(tmp_path / "runs" / name)), Console(quiet=True))
    assert COMMANDS
    said = []
    for command in COMMANDS.group(1).splitlines():
        said.append(run(*shlex.split(command)[1:]))
        assert not said[-1].code
    assert len(said) == 5
    assert "runs/first against base" in said[0].out
    assert re.search(r"hit@10 +\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\]", said[0].out)
    document = json.loads(said[1].out)
    assert document["split"] == "test"
    metrics = set(re.findall(r"^\| `([a-z]+)(?:@k)?`", PAGE, flags=re.MULTILINE)) | {"median_rank", "mean_rank"}
    measured = {key.removesuffix("_groups").partition("@")[0] for key in document["models"][1]["image_to_text"]}
    assert metrics | {"median_rank"} == measured | {"median_rank"}
    assert "caption length" in document["models"][0]["slices"]
    assert "against" not in said[2].out
    assert "runs/second" in said[2].out.splitlines()[1]
    assert {path.name for path in tmp_path.glob("kept*")} == {"kept.safetensors", "kept-base.safetensors"}
    assert [path.name for path in tmp_path.glob("*.html")] == ["page.html"]
    assert "hit@10 by group (image → text, 20 pairs of val) is " in Path("page.html").read_text()
    assert "with so few they are too narrow" in said[0].err
