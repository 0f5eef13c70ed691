"""A process that dies or hangs ends the others with two lines, and a clean end is no death."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cytoclip import config, liveness
from cytoclip.config import Config
from cytoclip.device import World
from cytoclip.errors import ExitCode
from tests.group import started, until

TRAIN = "from cytoclip import cli; cli.main()"
QUICK = "from cytoclip import liveness; liveness.BEAT, liveness.SILENT = 0.2, 4.0; "
ENDS_LATE = """
import os, time
from cytoclip import device, liveness
liveness.BEAT, liveness.SILENT = 0.1, 2.0
world = device.start("cpu", "no")
with liveness.watched(world):
    world.wait()
    time.sleep({late} * (world.rank == {rank}))
print("done")
"""


@pytest.fixture
def recipe(experiment: Callable[..., Config], tmp_path: Path) -> Path:
    """A YAML of a run that does not end by itself."""
    path = tmp_path / "long.yaml"
    path.write_text(config.dump(experiment(train={"steps": 100_000, "device": "cpu"})))
    return path


@pytest.mark.slow  # two processes that train: 15 s each
@pytest.mark.parametrize(
    ("rank", "number", "code"), [(0, 9, TRAIN), (1, 9, TRAIN), (0, 19, QUICK + TRAIN), (1, 19, QUICK + TRAIN)]
)
def test_the_others_end_within_a_minute(rank: int, number: int, code: str, recipe: Path, tmp_path: Path) -> None:
    """Killed, its connections close; stopped (SIGSTOP), they stay open and only the silence tells."""
    losses = tmp_path / "run" / "losses.jsonl"
    with started(code, ["train", str(recipe)]) as group:
        until(lambda: losses.is_file() and losses.read_text().count("\n") > 2, "the third step")
        group[rank].send_signal(number)
        began = time.monotonic()
        other = group[1 - rank]
        _, said = other.communicate(timeout=60)
        assert time.monotonic() - began < 60
    assert other.returncode == ExitCode.SYSTEM, said
    lines = said.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert sum(line.startswith("hint: ") for line in lines) == 1
    assert "Traceback" not in said
    assert "ended or does not answer" in said
    assert "goes on from the last checkpoint" in said


@pytest.mark.slow  # two processes that sleep: 10 s each
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_ends_earlier_is_not_dead(rank: int) -> None:
    with started(ENDS_LATE.format(rank=rank, late=3.5), []) as group:
        for process in group:
            out, said = process.communicate(timeout=60)
            assert (process.returncode, out) == (0, "done\n"), said


@pytest.mark.slow  # two processes that sleep: 15 s
def test_all_that_were_stopped_together_go_on() -> None:
    """A terminal's Ctrl-Z, or a scheduler that suspends a job: each has heard nothing, and none is dead."""
    with started(
        ENDS_LATE.format(rank=0, late=2).replace("world.wait()", "world.wait(); print(flush=True)"), []
    ) as group:
        for process in group:
            assert process.stdout is not None
            process.stdout.readline()
        for process in group:
            process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        for process in group:
            process.send_signal(signal.SIGCONT)
        assert [process.wait(timeout=60) for process in group] == [0, 0]


def test_only_a_lost_connection_is_one() -> None:
    assert liveness.is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]"))
    assert not liveness.is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not liveness.is_lost(OSError("Connection reset by peer"))
    assert not liveness.ended().everywhere


def test_alone_nothing_is_watched() -> None:
    before = threading.active_count()
    with liveness.watched(World(torch.device("cpu"))):
        assert threading.active_count() == before
