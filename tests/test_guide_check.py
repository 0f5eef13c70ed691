"""The commands of docs/guide/check.md, and what the page says of files, codes and JSON."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from cytoclip import cli
from tests import planted

HERE = Path(__file__).parents[1]
PAGE = (HERE / "docs" / "guide" / "check.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_commands_in_order(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = planted.clean(tmp_path / "path" / "to" / "data_root")
    planted.plant(root, ["html"])
    assert COMMANDS
    commands = COMMANDS.group(1).replace("openai/clip-vit-base-patch16", str(base)).splitlines()
    assert len(commands) == 4
    said = []
    for command in commands:
        assert run(shlex.split(command), monkeypatch) == 3
        said.append(capsys.readouterr())
    assert "captions with HTML in them: 1 of 48 captions in train" in said[0].out
    assert "name a checkpoint with --model" in said[0].out
    assert "name a checkpoint with --model" not in said[1].out
    assert "wrote check.html" in said[1].err
    assert (tmp_path / "check.html").read_text().startswith("<!doctype html>")
    document = json.loads(said[2].out)
    keys = set(re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE))))
    assert set(document) == keys
    assert document["loss"] is None, "256 is more than the pairs there are"
    assert "data.cache: " in said[3].err
    assert "crop: pad" in said[3].out
    assert {path.parts[-4] for path in root.glob("*/.cytoclip/pictures/*")} == {"train", "val"}
    told = {"formats", "modes", "width", "height", "aspect_ratio", "tokens_per_caption", "share_lost_to_crop"}
    assert told <= set(document["splits"]["train"])
    assert set(document["findings"][0]) == {
        "kind", "severity", "split", "count", "of", "title", "detail", "fix", "cases"
    }  # fmt: skip
    assert all(f"`{key}`" in PAGE for key in (*told, *document["findings"][0]))
    assert (root / ".cytoclip" / "looks.parquet").is_file()


def test_the_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = planted.clean(tmp_path / "data")
    planted.plant(root, ["deep"])
    assert run(["cytoclip", "check", str(root)], monkeypatch) == 0
    assert "Ready: nothing here needs a hand, 1 thing good to know." in capsys.readouterr().out
    shutil.rmtree(root / "val")
    assert run(["cytoclip", "check", str(root)], monkeypatch) == 3
    for folder in (root / "train", tmp_path / "nowhere"):
        capsys.readouterr()
        assert run(["cytoclip", "check", str(folder)], monkeypatch) == 4
        said = capsys.readouterr()
        assert said.out == ""
        assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error", "hint"]
    (root / "train" / "img_text_pair.json").write_text("[]")
    assert run(["cytoclip", "check", str(root)], monkeypatch) == 4
    assert "is an empty list" in capsys.readouterr().err
