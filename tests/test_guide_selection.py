"""What docs/guide/selection.md shows and says, against the code: its experiment is run and its commands typed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from cytoclip import cli, config, selection, soup, training
from cytoclip.console import Console
from tests.conftest import write_split

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "selection.md").read_text(encoding="utf-8")
SMALL = {"epochs: 20, batch_size: 256": "epochs: 2, batch_size: 12", "every: 200": "every: 2"}


@pytest.fixture(scope="module")
def made(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's paths in it and its experiment done, small."""
    folder = tmp_path_factory.mktemp("guide")
    data = shutil.copytree(root, folder / "path" / "to" / "data_root")
    write_split(data / "test", 14, seed=5)
    write_split(folder / "path" / "to" / "general_root" / "val", 16, seed=77)
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    for written, instead in {**SMALL, "openai/clip-vit-base-patch16": str(base)}.items():
        assert written in block
        block = block.replace(written, instead)
    (folder / "my.yaml").write_text(block)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        training.fit(config.load(folder / "my.yaml"), Console(quiet=True))
    return folder


def test_results_have_what_its_table_names(made: Path) -> None:
    found: dict[str, Any] = json.loads((made / "runs" / "first" / "results.json").read_text())
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", PAGE.split("## What is written")[1], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(named) == 15
    assert set(named) <= set(found)
    for split in ("val", "test"):
        assert {"before", "best"} <= set(found[split])
    steps = [json.loads(line)["step"] for line in (made / "runs/first/validations.jsonl").read_text().splitlines()]
    assert steps[0] == 0


def test_its_commands_do_what_it_says(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    commands = block.strip().splitlines()
    assert len(commands) == 3
    said = []
    for command in commands:
        monkeypatch.setattr("sys.argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None), command
        said.append(capsys.readouterr().out)
    assert "alpha 0.1" in said[0]
    assert "95% of what" in said[0]
    assert "90% of what" in said[1]
    assert "hit@50" in said[2]
    assert sorted(path.name for path in (made / "runs/first/soup").iterdir()) == ["curve.svg", "model", "soup.json"]


def test_its_choices_and_defaults_are_the_code_s() -> None:
    (line,) = (line for line in PAGE.splitlines() if "select_by: hits" in line)
    assert selection.choices([1, 10]) == ["hits", *re.findall(r"hit@\d+", line), "mrr", "map"]
    assert f"{soup.KEPT:.0%}".replace("%", " %") in PAGE
    assert soup.ALPHAS[:2] == (0, 0.1)
    assert soup.ALPHAS[-1] == 1
