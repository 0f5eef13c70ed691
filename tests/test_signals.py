"""Asked to stop, a run finishes its step, saves, and says with its exit code by what; then it goes on bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import cli, config, signals, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import Stopped
from tests.conftest import weights

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]


@pytest.mark.parametrize("to_all", [False, True], ids=["the trainer", "its loader too"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_the_step_in_hand_is_finished_and_saved(
    name: str,
    code: int,
    to_all: bool,
    done: tuple[Config, training.RunResult],
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sent to the trainer alone, or to the whole group as terminals, `timeout` and schedulers do."""
    send_in_step(1, getattr(signal, name), monkeypatch, to_all)
    wanted = experiment(data={"workers": 1})
    (tmp_path / "recipe.yaml").write_text(config.dump(wanted))
    monkeypatch.setattr(sys, "argv", ["cytoclip", "train", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert "after step 2, which is saved" in capsys.readouterr().err
    run = Path(wanted.output)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert f"stopped by {'Ctrl-C' if name == 'SIGINT' else name} after" in (run / "train.log").read_text()
    monkeypatch.undo()
    training.fit(wanted, QUIET)
    one, two = (weights(folder / "model") for folder in (run, done[1].run))
    assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)


def test_a_signal_in_the_last_step_stops_nothing(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    send_in_step(3, signal.SIGTERM, monkeypatch)
    assert training.fit(experiment(), QUIET).steps == 4


def test_the_second_signal_acts_at_once() -> None:
    with signals.heard() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.heard():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert len(before) == 3


def test_a_worker_whose_launcher_died_stops_and_a_run_without_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for launched in (True, False):
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        with signals.heard() as asked:
            assert asked() == 0
            with monkeypatch.context() as other:
                other.setattr(os, "getppid", lambda: 1)
                assert asked() == (signal.SIGTERM if launched else 0)


def test_outside_the_main_thread_nothing_is_set() -> None:
    said: list[int] = []

    def listen() -> None:
        with signals.heard() as asked:
            said.append(asked())

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert said == [0]


def test_it_says_what_happened() -> None:
    assert str(Stopped(15, 7)).startswith("stopped by SIGTERM after step 7")
    assert str(Stopped(2, 7, "trial")).startswith("stopped by Ctrl-C after trial 7")


def send_in_step(index: int, number: int, monkeypatch: pytest.MonkeyPatch, to_all: bool = False) -> None:
    steps = training._step

    def step(job: Any, at: int, *rest: Any) -> Any:
        if at == index:
            loaders = [child.pid for child in multiprocessing.active_children()] if to_all else []
            assert len(loaders) >= to_all
            pids = [str(pid) for pid in (os.getpid(), *loaders)]
            subprocess.run(["kill", f"-{int(number)}", *pids], check=True)  # from without: a loader heeds its trainer
            time.sleep(0.1 * to_all)  # for a loader to die of it
        return steps(job, at, *rest)

    monkeypatch.setattr(training, "_step", step)


def test_a_loader_ends_when_its_trainer_says_so() -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    loader = context.Process(target=loading, args=(ready,), daemon=True)
    loader.start()
    assert ready.wait(30)
    subprocess.run(["kill", "-TERM", str(loader.pid)], check=True)
    loader.join(0.3)
    assert loader.is_alive(), "somebody else's"
    loader.terminate()
    loader.join(30)
    assert loader.exitcode == 0


def loading(ready: Any) -> None:
    signals.in_loader(0)
    ready.set()
    time.sleep(60)
