"""What docs/guide/scale.md says of several processes and other engines: run where it can be, else read by its tools."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser

import cytoclip
from cytoclip import index
from cytoclip.console import Console
from tests.group import free_port
from tests.test_commands import BIN, run

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "scale.md").read_text(encoding="utf-8")
QUIET = Console(quiet=True)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_what_the_page_has() -> None:
    counts = [len(blocks(language)) for language in ("bash", "sh", "slurm", "python", "py")]
    assert counts == [1, 2, 1, 2, 1]
    assert len(re.findall("^```[a-z]", PAGE, flags=re.MULTILINE)) == sum(counts)


def test_other_engines_find_the_same_and_parts_come_together(
    base: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, to in ((root, "my-index"), (root / "train", "part-1"), (root / "val", "part-2")):
        index.build(base, source, to, QUIET)
    names: dict[str, Any] = {}
    for program in blocks("python"):
        exec(program, names)  # noqa: S102 - our own page
    whole = cytoclip.Index.open("my-index")
    expected = whole.search("koilocytes with perinuclear halo")
    assert [point.id for point in names["found"]] == [hit.id for hit in expected]
    assert [point.score for point in names["found"]] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    assert [hit.file for hit in names["best"]] == [hit.file for hit in whole.search("koilocytes")]
    assert len(capsys.readouterr().out.splitlines()) == 2
    names["client"].close()


@pytest.mark.slow  # torchrun and two processes: 20 s
def test_torchrun_on_one_machine(base: Path, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "path" / "to" / "pictures")
    shutil.copytree(base, tmp_path / "runs" / "first")
    words = shlex.split(blocks("bash")[0])
    done = run(tmp_path, str(BIN / words[0]), "--master_port", str(free_port()), *words[1:])
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stdout.startswith("my-index: 68 pictures")
    assert len(cytoclip.Index.open(tmp_path / "my-index").search("a cell", k=100)) == 68


def test_what_needs_gpus_is_at_least_understood(tmp_path: Path) -> None:
    words = shlex.split(blocks("sh")[0])
    given = launch_command_parser().parse_args(words[2:])
    assert (given.num_processes, given.module, given.training_script) == (8, True, "cytoclip")
    script = blocks("slurm")[0]
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    line = re.search(r"^srun python -m cytoclip (.*)$", script, flags=re.MULTILINE)
    assert line
    assert shlex.split(line[1]) == given.training_script_args
    compile(blocks("py")[0], "the page", "exec")
