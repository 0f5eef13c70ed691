"""The README's commands do what it says, in the order in which it says them, on a tiny data root."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cytoclip import cli

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
CHECKPOINT = "openai/clip-vit-base-patch16"
YAML = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)


def test_what_the_readme_has() -> None:
    assert len(COMMANDS) == 14
    assert len(YAML) == 1
    assert README.index("make demo") < README.index("## "), "the two commands stand on the first screen"


def test_make_targets_exist() -> None:
    """`make demo` itself is the slow test of tests/test_demo.py, and `make test` is what runs this."""
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=PROJECT, check=True, capture_output=True)


def test_commands_in_order(
    root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, since each start of Python costs seconds; `accelerate launch` itself is in test_commands.py."""
    monkeypatch.chdir(tmp_path)
    small = {CHECKPOINT: str(base), "batch_size: 256": "batch_size: 12", "epochs: 10": "epochs: 2"}
    recipe = YAML[0].replace("path/to/data_root", str(root))
    for written, instead in small.items():
        assert written in recipe
        recipe = recipe.replace(written, instead)
    Path("my.yaml").write_text(recipe)
    said = {}
    for command in COMMANDS:
        if command.startswith("make "):
            continue
        words = shlex.split(command.replace("path/to/data_root", str(root)).replace(CHECKPOINT, str(base)))
        if words[:2] == ["accelerate", "launch"]:
            assert (PROJECT / words[words.index("--config") + 1]).is_file()
            words = ["python", words[2], "--config", "my.yaml"]
        with pytest.raises(SystemExit) as ended:
            _run(words, monkeypatch)
        assert ended.value.code in ((3,) if words[1] == "check" else (0, None)), command  # 3: it found something
        said[command] = capsys.readouterr()
    outputs = list(said.values())
    assert "proposed configuration:" in outputs[0].out
    assert Path("check.html").is_file()
    assert "nothing was written" in outputs[1].out
    assert "run folder: runs/first" in outputs[2].out
    assert "chance" in outputs[2].out
    assert "hit@50" in outputs[4].out
    assert "← chosen" in outputs[5].out
    assert "train.batch_size" in outputs[6].out
    assert "68 pictures" in outputs[7].out + outputs[7].err
    assert outputs[8].out.count(".png") == 10
    assert Path("exported/model.safetensors").is_file()
    assert "is finished" in outputs[10].err  # the same run as `cytoclip train my.yaml`
    assert "hit@50" in outputs[11].out
    assert "hit@1_groups" in json.loads(Path("runs/first/eval_result.json").read_text())
    assert _tree(Path("runs/first")) >= {"model", "best", "results.json", "losses.jsonl", "checkpoints", "config.yaml"}
    named = set(re.findall(r"^\| `([a-z.]+)/?`", README, flags=re.MULTILINE)) - {"checkpoints"}
    assert len(named) >= 5
    assert _tree(Path("runs/first")) >= named


def _run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(PROJECT / words[1]), run_name="__main__")
    else:
        assert words[0] == "cytoclip"
        monkeypatch.setattr(sys, "argv", words)
        cli.main()


def _tree(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
