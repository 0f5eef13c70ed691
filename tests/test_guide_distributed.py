"""The commands of docs/guide/distributed.md: run where one machine without a GPU can, else read by their tools."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from cytoclip import config, state
from cytoclip.config import Config
from tests.group import free_port
from tests.test_commands import BIN, HERE, LAUNCHER_SETS, TRAIN, assert_trained, results, write

PAGE = (HERE / "docs" / "guide" / "distributed.md").read_text(encoding="utf-8")
Start = Callable[..., "subprocess.Popen[str]"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands(language: str) -> list[list[str]]:
    """The words of each command line in the blocks of a language, without its comment."""
    return [shlex.split(line, comments=True) for block in blocks(language) for line in block.splitlines()]


@pytest.fixture
def recipe(experiment: Callable[..., Config], tmp_path: Path) -> Path:
    return write(experiment(train={"steps": 2}), tmp_path / "my.yaml")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command beside the YAML, its own variables on top; what is left of it at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(words: list[str], **variables: str) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith((*LAUNCHER_SETS, "SLURM_"))}
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
        in_full = {words[0]: str(BIN / words[0]), "python": sys.executable, "train.py": TRAIN}
        process = subprocess.Popen(
            [in_full.get(word, word) for word in words],
            cwd=tmp_path,
            env={**kept, **quiet, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_what_the_page_has() -> None:
    """So that no command is left out of the tests below by its look."""
    assert [words[0] for words in commands("bash")] == ["torchrun", "accelerate", "torchrun"]
    assert [words[0] for words in commands("sh")] == ["torchrun", *["accelerate"] * 3, "torchrun"]
    assert [len(blocks(language)) for language in ("bash", "sh", "yaml", "slurm")] == [2, 3, 1, 1]
    assert len(re.findall("^```[a-z]", PAGE, flags=re.MULTILINE)) == 7


@pytest.mark.parametrize("words", commands("sh"), ids=lambda words: " ".join(words[:4]))
def test_what_needs_gpus_is_at_least_understood(words: list[str], recipe: Path) -> None:
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        script, rest = given.training_script, given.training_script_args
        assert given.nproc_per_node == "4"
    else:
        given = launch_command_parser().parse_args(words[2:])
        script, rest = given.training_script, given.training_script_args
        assert given.num_processes == 4 or given.config_file == "nodes.yaml"
    assert script == "train.py"
    assert rest[:2] == ["--config", "my.yaml"]
    assert config.load(recipe, rest[2:]).train.shard == (rest[2:] == ["train.shard=true"])


def test_accelerates_file_is_one(tmp_path: Path) -> None:
    """An unknown key is refused by accelerate itself."""
    file = tmp_path / "nodes.yaml"
    file.write_text(blocks("yaml")[0])
    said = ClusterConfig.from_yaml_file(str(file))
    assert (said.num_machines, said.num_processes, said.main_process_ip) == (2, 16, "node0")


@pytest.mark.slow  # torchrun and two processes: 20 s
def test_torchrun_on_one_machine(recipe: Path, tmp_path: Path, start: Start) -> None:
    words = commands("bash")[0]
    assert_trained(ended(start([words[0], "--master_port", str(free_port()), *words[1:]])), tmp_path, 2)


@pytest.mark.slow  # accelerate and one process: 20 s
def test_accelerate_on_one_machine(recipe: Path, tmp_path: Path, start: Start) -> None:
    assert_trained(ended(start(commands("bash")[1])), tmp_path, 1)


@pytest.mark.slow  # two torchruns of one process each: 30 s
def test_several_machines_stood_in_for_by_two_launchers_on_one(recipe: Path, tmp_path: Path, start: Start) -> None:
    words = [word.replace("node0:29500", f"127.0.0.1:{free_port()}") for word in commands("bash")[2]]
    made = [ended(process) for process in [start(words), start(words)]]
    assert [one.returncode for one in made] == [0, 0], "".join(one.stderr for one in made)
    assert results(tmp_path)["processes"] == 2
    assert sorted(one.stdout.count("run folder:") for one in made) == [0, 1]


def test_the_batch_file_asks_to_queue_again_after_the_signal_that_it_asks_for(tmp_path: Path) -> None:
    script = blocks("slurm")[0]
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    asked = re.search(r"^#SBATCH --signal=(\w+)@(\d+)$", script, flags=re.MULTILINE)
    assert asked
    assert f'-eq {128 + getattr(signal, f"SIG{asked[1]}")} ]; then scontrol requeue "$SLURM_JOB_ID"' in script


@pytest.mark.slow  # two processes: 20 s
def test_what_srun_starts_finds_each_other_and_saves_on_its_signal(
    experiment: Callable[..., Config], tmp_path: Path, start: Start
) -> None:
    write(experiment(train={"steps": 100_000}, checkpoint={"every": 100_000}), tmp_path / "my.yaml")
    line = re.search(r"^srun (?:--\S+ )*(.*)$", blocks("slurm")[0], flags=re.MULTILINE)
    assert line
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2"}
    tasks = [start(shlex.split(line[1]), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **meet) for rank in range(2)]
    losses = tmp_path / "run" / "losses.jsonl"
    until = time.monotonic() + 120
    while not (losses.is_file() and losses.read_text().count("\n") >= 3):
        assert all(task.poll() is None for task in tasks), [ended(task) for task in tasks]
        assert time.monotonic() < until
        time.sleep(0.05)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    assert [ended(task).returncode for task in tasks] == [138, 138]
    assert "2 processes on cpu" in (tmp_path / "run" / "train.log").read_text()
    assert [step for step, _ in state.listed(tmp_path / "run" / "checkpoints")] == [losses.read_text().count("\n")]
