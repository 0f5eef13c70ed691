"""The commands as users type them, each in a process of its own: what is printed where, and how a failure ends.

A process imports for seconds, so the fast tests start two in all, and each real launcher is one slow test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cytoclip import config, evaluation
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode
from cytoclip.evaluation import How, Question
from tests import group

HERE = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TRAIN, EVALUATION = str(HERE / "train.py"), str(HERE / "evaluation.py")
PYTHON = [sys.executable]
QUIET = Console(quiet=True)
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port"]
ACCELERATE = [str(BIN / "accelerate"), "launch"]
LAUNCHER_SETS = ("ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "FORK_LAUNCHED", "TORCHELASTIC_")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """From another folder than the project's, with one thread for each process so that two do not fight."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_SETS)}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(experiment: Callable[..., Config], tmp_path: Path) -> Path:
    """A YAML of two steps whose run folder is `tmp_path/run`."""
    return write(experiment(train={"steps": 2}), tmp_path / "tiny.yaml")


def write(wanted: Config, path: Path) -> Path:
    path.write_text(config.dump(wanted))
    return path


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "results.json").read_text())
    return found


def assert_trained(made: subprocess.CompletedProcess[str], folder: Path, processes: int) -> None:
    """The first of our lines says how many processes there are, the table is on stdout once, the run folder whole."""
    assert made.returncode == 0, made.stderr
    first = (folder / "run" / "train.log").read_text().splitlines()[0]
    assert f"{processes} process{'es' * (processes > 1)} on cpu" in first
    assert f"global batch 12 = {processes} × {12 // processes}" in first
    assert results(folder)["processes"] == processes
    assert made.stdout.count("image → text: each of 20 images ranks all 20 texts") == 1
    assert made.stdout.count("run folder:") == 1
    assert "before:" not in made.stdout, "stdout is data"
    assert made.stderr.count("before: image → text") == 1
    assert "Traceback" not in made.stderr


def assert_refused(made: subprocess.CompletedProcess[str], code: ExitCode, said: str) -> None:
    """It ends with one error and one hint line, no traceback, nothing on stdout, and the documented exit code."""
    assert_said_once(made.stderr, said)
    assert [line.partition(":")[0] for line in made.stderr.splitlines()[-2:]] == ["error", "hint"], made.stderr
    assert "Traceback" not in made.stderr
    assert made.stdout == ""
    assert made.returncode == code


def assert_said_once(stderr: str, said: str) -> None:
    ours = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert [line.partition(":")[0] for line in ours] == ["error", "hint"], stderr
    assert said in ours[0]
    assert len(ours[1]) > len("hint: ") + 8


def test_the_originals_training_and_evaluation_commands(recipe: Path, tmp_path: Path) -> None:
    """`python train.py --config …` and then `python evaluation.py …` on its run folder, as in the original's README."""
    made = run(tmp_path, *PYTHON, TRAIN, "--config", str(recipe), "train.steps=1")
    assert_trained(made, tmp_path, 1)
    assert results(tmp_path)["steps"] == 1, "the override was lost"

    made = run(
        tmp_path, *PYTHON, EVALUATION, "--data_root", str(config.load(recipe).data.root), "--batch_size", "8",
        "--ks", "1", "10", "50", "--pretrained_clip_path", "run",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    written = json.loads((tmp_path / "run" / "eval_result.json").read_text())
    assert {f"hit@{k}{end}" for k in (1, 10, 50) for end in ("", "_groups")} <= set(written)
    assert (written["hit@50"], written["pairs"], written["direction"]) == (1, 20, "image_to_text")
    assert "image → text: each of 20 images ranks all 20 texts" in made.stdout
    assert "text → image" not in made.stdout
    assert f"{written['hit@10']:.4f}" in made.stdout
    assert made.stdout.splitlines()[-1] == f"saved {Path('run') / 'eval_result.json'}"
    assert "warning: k = 50 is more than the 20" in made.stderr


REFUSALS: dict[str, tuple[list[str], ExitCode, str]] = {
    "train.py, no such file": ([TRAIN, "--config", "nowhere.yaml"], ExitCode.USAGE, "nowhere.yaml"),
    "train.py, no --config": ([TRAIN], ExitCode.USAGE, "--config"),
    "train.py, misspelt option": ([TRAIN, "--config", "RECIPE", "train.step=3"], ExitCode.USAGE, "train.step"),
    "train.py, no data": ([TRAIN, "--config", "RECIPE", "data.root=nowhere"], ExitCode.DATA, "nowhere"),
    "train.py, no model": ([TRAIN, "--config", "RECIPE", "model.name=no/such"], ExitCode.MODEL, "no/such"),
    "evaluation.py, no model": (
        [EVALUATION, "--data_root", "ROOT", "--pretrained_clip_path", "no/such"], ExitCode.MODEL, "no/such",
    ),
    "evaluation.py, no data": (
        [EVALUATION, "--data_root", "nowhere", "--pretrained_clip_path", "BASE"], ExitCode.DATA, "nowhere",
    ),
    "evaluation.py, k of 0": (
        [EVALUATION, "--data_root", "ROOT", "--pretrained_clip_path", "BASE", "--ks", "0"], ExitCode.USAGE, "--ks",
    ),
    "cytoclip train, no such file": (["-m", "cytoclip", "train", "nowhere.yaml"], ExitCode.USAGE, "nowhere.yaml"),
    "cytoclip evaluate, no such split": (
        ["-m", "cytoclip", "evaluate", "BASE", "ROOT", "--split", "test"], ExitCode.DATA, "'test'",
    ),
    "cytoclip, no such command": (["-m", "cytoclip", "trian"], ExitCode.USAGE, "trian"),
}  # fmt: skip

# Runs every command line of a JSON list in one process, for imports take longer than the refusals.
ALL_IN_ONE = """
import contextlib, io, json, os, runpy, sys
told = []
for words in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module("cytoclip", run_name="__main__")
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def test_refusals_are_two_lines_and_an_exit_code(recipe: Path, tmp_path: Path) -> None:
    """Contract 7, for every command. (Exit codes of whole processes are in the tests of launchers.)"""
    wanted = config.load(recipe)
    places = {"RECIPE": str(recipe), "ROOT": str(wanted.data.root), "BASE": wanted.model.name}
    commands = [[places.get(word, word) for word in words] for words, _, _ in REFUSALS.values()]
    made = run(tmp_path, *PYTHON, "-c", ALL_IN_ONE, json.dumps(commands))
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert len(told) == len(REFUSALS) == 11
    for (code, out, err), (name, (words, expected, said)) in zip(told, REFUSALS.items(), strict=True):
        print(name)  # shown where it fails
        assert_refused(subprocess.CompletedProcess(words, code, out, err), expected, said)
    assert {p.name for p in tmp_path.iterdir()} <= {"tiny.yaml", "hf"}, "a refused command left something behind"


@pytest.mark.slow  # two processes and torchrun's own: half a minute
def test_torchrun(recipe: Path, tmp_path: Path) -> None:
    made = run(tmp_path, *TORCHRUN, str(group.free_port()), TRAIN, "--config", str(recipe))
    assert_trained(made, tmp_path, 2)


@pytest.mark.slow  # two processes and torchrun's own, twice: half a minute
def test_under_torchrun_an_error_is_said_once(recipe: Path, tmp_path: Path) -> None:
    """torchrun adds its own report of which process failed; ours is one error and one hint, not one a process.

    A misspelt option is met by each process alone, a missing model after they have met, a missing folder by the first.
    """
    wrong = (("train.step=3", "train.step"), ("model.name=no/such", "no/such"), ("data.root=x", "no such folder: x"))
    for override, said in wrong:
        made = run(tmp_path, *TORCHRUN, str(group.free_port()), TRAIN, "--config", str(recipe), override)
        assert made.returncode != 0
        assert_said_once(made.stderr, said)
        assert made.stdout == ""
        assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the launcher and what it launches import one after the other: half a minute
def test_accelerate_launch_train_py(recipe: Path, tmp_path: Path) -> None:
    """Without a configuration of accelerate's, as on a new machine."""
    made = run(tmp_path, *ACCELERATE, TRAIN, "--config", str(recipe))
    assert_trained(made, tmp_path, 1)


@pytest.mark.slow  # the launcher and what it launches import one after the other: half a minute
def test_accelerate_launch_the_module(recipe: Path, tmp_path: Path) -> None:
    """`--mixed_precision` of the launcher decides where the file says nothing."""
    wanted = OmegaConf.load(recipe)
    wanted.train.precision = "auto"
    OmegaConf.save(wanted, recipe)
    made = run(tmp_path, *ACCELERATE, "--mixed_precision", "bf16", "-m", "cytoclip", "train", str(recipe))
    assert_trained(made, tmp_path, 1)
    assert "precision bf16 (from the launcher)" in made.stderr
    assert config.load(tmp_path / "run" / "config.yaml").train.precision == "bf16"


@pytest.mark.slow  # the launcher and what it launches import one after the other: half a minute
def test_accelerate_launch_cpu_with_two_processes_is_one_and_says_so(recipe: Path, tmp_path: Path) -> None:
    """Trap 46: accelerate starts one process then, without a word; our first line is the only sign."""
    made = run(tmp_path, *ACCELERATE, "--cpu", "--num_processes", "2", TRAIN, "--config", str(recipe))
    assert_trained(made, tmp_path, 1)
    assert "1 process on cpu" in made.stderr


@pytest.mark.slow  # the launcher and what it launches import one after the other: half a minute
def test_under_accelerate_an_error_is_said_once_and_the_launch_fails(recipe: Path, tmp_path: Path) -> None:
    made = run(tmp_path, *ACCELERATE, TRAIN, "--config", str(recipe), "train.batch_size=49")
    assert made.returncode != 0
    assert_said_once(made.stderr, "48 training pairs")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # two processes one after the other: 20 s
def test_cytoclip_evaluate_prints_one_json_document(base: Path, root: Path, tmp_path: Path) -> None:
    """stdout is data: it can be piped into another program, warnings and all."""
    made = run(
        tmp_path, str(BIN / "cytoclip"), "evaluate", str(base), str(root), "--json", "--ks", "1", "5", "30",
        "--split", "train",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    (model,) = found["models"]
    assert (model["pairs"], found["split"], model["model"]) == (48, "train", str(base))
    assert {f"hit@{k}{end}" for k in (1, 5, 30) for end in ("", "_groups")} < set(model["text_to_image"])
    assert made.stderr
    assert list(tmp_path.iterdir()) == []
    made = run(tmp_path, str(BIN / "cytoclip"), "evaluate", str(base), str(root), "--ks", "none")
    assert_refused(made, ExitCode.USAGE, "--ks 'none'")


@pytest.mark.slow  # two processes import at once: 25 s
def test_two_processes_evaluate_as_one(base: Path, root: Path, tmp_path: Path) -> None:
    """The embedding is shared out, and the numbers are those of one process; one of them speaks."""
    words = ["-m", "cytoclip", "evaluate", str(base), str(root), "--split", "train", "--json", "--batch-size", "4"]
    made = run(tmp_path, *TORCHRUN, str(group.free_port()), *words)
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("48 pairs of") == 1
    assert "2 processes" in made.stderr
    found = json.loads(made.stdout)["models"][0]
    alone = evaluation.evaluate(
        [str(base)], root / "train", Question([1, 5, 10, 50]), QUIET, How(batch_size=4, workers=0)
    )
    expected = json.loads(json.dumps(alone.columns()[str(base)]))
    assert found["slices"].keys() == expected["slices"].keys()
    for direction in ("image_to_text", "text_to_image"):
        for part in ("scores", "intervals"):
            one, other = (each if part == "scores" else each[part] for each in (found, expected))
            assert one[direction] == {key: pytest.approx(value, abs=1e-9) for key, value in other[direction].items()}
