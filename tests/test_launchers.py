"""Real launchers, and signals to them and to what they started: every worker saves after the same step and ends.

What a launcher does with a signal is its own affair and differs: torchrun hands SIGTERM on to its workers and dies of
SIGUSR1 without a word to them; accelerate dies of both. `signals.heard` covers the workers that are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cytoclip import state
from cytoclip.config import Config
from tests.group import free_port
from tests.test_commands import ACCELERATE, LAUNCHER_SETS, TORCHRUN, TRAIN, write

pytestmark = pytest.mark.slow  # a launcher and what it launches import one after the other: half a minute each
PATIENCE = 120.0  # seconds

LAUNCHED = {"torchrun": 2, "accelerate": 1}  # and how many workers each starts here


@dataclass
class Launch:
    """A launcher under way, what it has started, and where both write."""

    launcher: subprocess.Popen[bytes]
    workers: list[psutil.Process]
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def steps(self) -> int:
        losses = self.run / "losses.jsonl"
        return losses.read_text().count("\n") if losses.is_file() else 0

    def saved(self) -> list[int]:
        return [step for step, _ in state.listed(self.run / "checkpoints")]

    def ended(self) -> bool:
        """Whether launcher and workers are gone, waiting for them."""
        self.launcher.wait(PATIENCE)
        return not psutil.wait_procs(self.workers, PATIENCE)[1]


@pytest.fixture
def launch(experiment: Callable[..., Config], tmp_path: Path) -> Iterator[Callable[[str], Launch]]:
    """Start a run that would take an hour under a launcher, or go on with it, and wait for its third step."""
    started: list[Launch] = []
    long = {"steps": 100_000}

    def begin(name: str) -> Launch:
        wanted = experiment(train=long, validate={"every": 100_000}, checkpoint={"every": 100_000})
        recipe = write(wanted, tmp_path / "long.yaml")
        before = [*TORCHRUN, str(free_port())] if name == "torchrun" else [*ACCELERATE, "--num_processes", "1"]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_SETS)}
        with (tmp_path / "said.txt").open("wb") as said:
            launcher = subprocess.Popen(
                [*before, TRAIN, "--config", str(recipe)],
                cwd=tmp_path,
                env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")},
                stdout=said,
                stderr=said,
            )
        under_way = Launch(launcher, [], tmp_path)
        started.append(under_way)
        enough, until = under_way.steps() + 3, time.monotonic() + PATIENCE
        while under_way.steps() < enough:
            assert launcher.poll() is None, under_way.said()
            assert time.monotonic() < until, under_way.said()
            time.sleep(0.05)
        under_way.workers += workers_of(launcher.pid)
        assert len(under_way.workers) == LAUNCHED[name]
        return under_way

    yield begin
    for one in started:
        for process in [*one.workers, *workers_of(one.launcher.pid)]:
            if process.is_running():
                process.kill()
        one.launcher.kill()
        one.launcher.wait()


def workers_of(launcher: int) -> list[psutil.Process]:
    """What a launcher started with our script, the first rank first."""
    try:
        children = psutil.Process(launcher).children()
    except psutil.NoSuchProcess:
        return []
    ours = [child for child in children if TRAIN in child.cmdline()]
    return sorted(ours, key=lambda child: int(child.environ().get("RANK", "0")))


@pytest.mark.parametrize("name", LAUNCHED)
def test_sigterm_to_one_worker_stops_all_after_the_same_step(name: str, launch: Callable[[str], Launch]) -> None:
    """To the last rank: under torchrun that is not the one that saves and speaks."""
    under_way = launch(name)
    under_way.workers[-1].send_signal(signal.SIGTERM)
    assert under_way.ended(), under_way.said()
    assert_saved(under_way, signal.SIGTERM)
    assert under_way.launcher.returncode != 0
    codes = {"torchrun": "exitcode  : 143", "accelerate": "exit status 143"}  # as each launcher reports it
    assert codes[name] in under_way.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_signal_to_the_launcher_leaves_a_saved_run_and_no_orphan(
    name: str, number: signal.Signals, launch: Callable[[str], Launch]
) -> None:
    under_way = launch(name)
    under_way.launcher.send_signal(number)
    assert under_way.ended(), under_way.said()
    assert_saved(under_way, signal.SIGTERM)  # what an orphan takes the death of its launcher for


def test_what_a_launched_run_saved_goes_on(launch: Callable[[str], Launch]) -> None:
    """With other processes than it was begun with: two before, one after."""
    under_way = launch("torchrun")
    under_way.launcher.send_signal(signal.SIGUSR1)
    assert under_way.ended(), under_way.said()
    done = under_way.saved()[0]
    second = launch("accelerate")
    assert f"resuming {second.run} after step {done}" in second.said()
    second.launcher.send_signal(signal.SIGTERM)
    assert second.ended(), second.said()
    assert_saved(second, signal.SIGTERM, stops=2)


def assert_saved(under_way: Launch, number: int, stops: int = 1) -> None:
    """Its newest checkpoint is of the last step that it wrote down, whole, and it said so once in its log."""
    done = under_way.steps()
    step, folder = state.newest(under_way.run / "checkpoints", pytest.fail) or (0, Path())
    assert step == done == max(under_way.saved())
    assert json.loads((folder / state.MORE).read_text())["step"] == done
    log = (under_way.run / "train.log").read_text()
    assert f"stopped by {number.name} after step {done}, which is saved" in log
    assert log.count("stopped by SIG") == stops
    assert not (under_way.run / "results.json").exists()
    assert "Traceback" not in (under_way.run / "train.log").read_text()
