"""The commands of docs/guide/data.md, run; and its table against the formats that are tested."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from cytoclip import cli, sources
from cytoclip.config import Config, parse
from tests import formats

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "data.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_what_the_page_has() -> None:
    assert len(COMMANDS) == 4
    assert len(re.findall("^```[a-z]", PAGE, flags=re.MULTILINE)) == 2
    assert len(re.findall("^[|] (?!place|---)", PAGE, flags=re.MULTILINE)) == 11


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[4])
def test_every_command_writes_a_data_root(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = formats.drawn(30)
    formats.table("csv")(tmp_path, pairs)
    formats.tar(tmp_path / "shards", pairs)
    (tmp_path / "tables").mkdir()
    if "--image-root" in words:
        (tmp_path / "pairs.csv").rename(tmp_path / "tables" / "pairs.csv")
    if "--image-column" in words:
        text = (tmp_path / "pairs.csv").read_text(encoding="utf-8")
        (tmp_path / "pairs.csv").write_text(text.replace("img_path,source,caption", "file,source,finding"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.out == f"{words[4]}\n"
    assert ("(guessed)" in printed.err) == (words[4] in ("root", "by_root"))
    splits = ["train", "val"] if "--test" in words else ["train", "val", "test"]
    assert [p.name for p in sorted((tmp_path / words[4]).iterdir())] == sorted(splits)
    assert sum(len(sources.read(tmp_path / words[4] / split)) for split in splits) == 30


def test_the_yaml_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    wanted = parse(yaml.safe_load(block), "the page")
    assert isinstance(wanted, Config)
    assert (wanted.data.image_column, wanted.data.caption_column) == ("file", "finding")
