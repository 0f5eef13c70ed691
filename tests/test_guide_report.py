"""The commands of docs/guide/report.md do what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from cytoclip import cli

HERE = Path(__file__).parents[1]
PAGE = (HERE / "docs" / "guide" / "report.md").read_text(encoding="utf-8")


def test_the_commands_in_order(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        shutil.copytree(told, tmp_path / "runs" / name)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    commands = [line.partition("  #")[0] for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None), command
    assert Path("runs/first/report.html").is_file()
    assert "data:image" not in Path("for-others.html").read_text()
    assert "runs" not in Path("for-others.html").read_text()
    assert "first · second" in Path("comparison.html").read_text()


def test_its_picture_is_there_and_small() -> None:
    (name,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert (HERE / "docs" / "guide" / name).stat().st_size < 300_000
