"""The commands of docs/guide/tune.md, and what the page says of its files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from cytoclip import config
from tests.typed import Run

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "tune.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
SPACE = re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_in_order(
    loose: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """With fewer trials, and those of the second search one by one."""
    monkeypatch.chdir(tmp_path)
    assert COMMANDS
    assert SPACE
    wanted = {
        "data": {"root": str(loose), "workers": 0, "hold_out": {"share": 0.25}},
        "model": {"name": str(base)},
        "train": {"steps": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 1, "precision": "no"},
        "validate": {"every": 100, "ks": [1, 5]},
        "track": {"to": []},
        "output": "runs/first",
    }
    Path("configs").mkdir()
    Path("configs/first.yaml").write_text(config.dump(config.parse(wanted, "the test")))
    Path("space.yaml").write_text(SPACE.group(1))
    said = []
    for command in COMMANDS.group(1).splitlines():
        shorter = re.sub(r"--trials \d+( --jobs 2)?", "--trials 3", command)
        said.append(run(*shlex.split(shorter)[1:]))
        assert not said[-1].code, said[-1].err
    assert len(said) == 3
    assert "  cytoclip train runs/first-search/best.yaml\n" in said[0].out
    assert {
        option for option in SPACE.group(1).replace(":", "").split() if "." in option and option[0] in "tmd"
    } == set(json.loads(Path("runs/narrow/tune.json").read_text())["trials"][-1]["chosen"]) | set(
        json.loads(Path("runs/narrow/tune.json").read_text())["trials"][0]["chosen"]
    )
    document = json.loads(Path("runs/first-search/tune.json").read_text())
    again = run("tune", "configs/first.yaml", "--trials", "3", "--json")
    assert not again.code, again.err
    assert json.loads(again.out) == document
    for key in ({*document} - {"schema", "trials"}) | {*document["trials"][0]}:
        assert f"`{key}`" in PAGE, key
    files = set(re.findall(r"`([a-z_]+\.(?:yaml|json|log))`", PAGE.partition("| in the folder")[2]))
    assert files == {path.name for path in Path("runs/first-search").iterdir() if path.is_file()} - {".lock"}
    assert "run folder: runs/first-tuned" in said[2].out
