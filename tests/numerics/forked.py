"""Runs that are killed and begun again: one process imports everything once, and each attempt is a fork of it.

    python -m tests.numerics.forked RUNS.json OUTCOMES.json

A run is {"config": a whole configuration, "processes": how many, "kills": [{"moment", "after", "rank"}, ...]}. Each
kill is one attempt, in which process `rank` sends itself signal 9 the `after`-th time that it comes to `moment`; a
last attempt is left alone. Once one process of an attempt is gone the others are killed, as launchers do. An outcome
is a list of attempts, each {"hit": the moment at which it was killed or "", "codes": exit codes by rank (negative: the
signal)}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.numerics.preloaded  # noqa: F401 - what each attempt would import by itself
from cytoclip import checkpoint, files, optim, selection, state, training, validation
from cytoclip.config import parse
from cytoclip.console import Console
from cytoclip.journal import Journal
from cytoclip.model import DualEncoder
from tests.group import free_port

Test = Callable[..., bool]


def _always(*_: Any) -> bool:
    return True


def _is_new_state(path: Path, *_: Any) -> bool:
    return path.name.startswith(".step-") and path.name.endswith(".new")


def _is_new_best_while_the_old_one_waits(path: Path, *_: Any) -> bool:
    return path.name == ".best.new" and files.old(path.with_name("best")).exists()


def _is_best(folder: Path, *_: Any) -> bool:
    return folder.name == "best"


def _is_manifest(path: Path, *_: Any) -> bool:
    return path.name == state.MANIFEST


def _is_gone(path: Any, *_: Any) -> bool:
    return str(path).endswith(".gone") and Path(path).exists()


# Where the moment is: the owner and name of a function, whether before or after it, and which of its calls count.
MOMENTS: dict[str, tuple[Any, str, str, Test]] = {
    "forward": (DualEncoder, "forward", "before", _always),
    "backward": (optim, "clip", "before", _always),
    "optimizer moved": (DualEncoder, "clamp_scale", "before", _always),
    "line half written": (Journal, "step", "half a line before", _always),
    "line written, curves not": (Journal, "_log", "before", _always),
    "validation": (validation, "look", "after", _always),
    "best written": (checkpoint, "save_model", "after", _is_best),
    "best between two renames": (Path, "rename", "before", _is_new_best_while_the_old_one_waits),
    "tensors written": (state, "save_file", "after", _always),
    "no manifest yet": (files, "write_json", "before", _is_manifest),
    "no rename yet": (Path, "rename", "before", _is_new_state),
    "old one half deleted": (shutil, "rmtree", "before", _is_gone),
}
IN_ALL_PROCESSES = ("forward", "backward", "optimizer moved", "validation")


def main(runs: Path, outcomes: Path) -> None:
    hit = outcomes.with_suffix(".hit")
    done = []
    for run in json.loads(runs.read_text()):
        attempts = []
        for kill in (*run["kills"], None):
            hit.write_text("")
            codes = _attempt(run, kill, hit)
            attempts.append({"hit": hit.read_text(), "codes": codes})
        done.append(attempts)
    outcomes.write_text(json.dumps(done))


def _attempt(run: dict[str, Any], kill: dict[str, Any] | None, hit: Path) -> list[int]:
    port = free_port()
    ranks = {}
    for rank in range(run["processes"]):
        pid = os.fork()
        if pid == 0:
            _child(run, rank, port, kill, hit)
        ranks[pid] = rank
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]]:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in range(run["processes"])]


def _child(run: dict[str, Any], rank: int, port: int, kill: dict[str, Any] | None, hit: Path) -> None:
    """A whole attempt; never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        if run["processes"] > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run["processes"]),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        _better_at_each_third_validation()
        if kill and kill["rank"] == rank:
            _arm(kill["moment"], kill["after"], hit)
        training.fit(parse(run["config"], "the run"), Console(quiet=True))
        code = 0
    except BaseException:
        if kill is None:
            traceback.print_exc()
    finally:
        os._exit(code)


def _better_at_each_third_validation() -> None:
    """So that best/ is written anew however little a tiny model learns; a function of the step alone."""
    notes = validation.note

    def note(job: Any, progress: Any, book: Any) -> bool:
        due = progress.step // job.config.validation.every % 3 == 0
        selection.score = lambda scores, *_: float(due and scores is progress.last)
        return notes(job, progress, book)

    validation.note = note


def _arm(moment: str, after: int, hit: Path) -> None:
    owner, name, when, counts = MOMENTS[moment]
    plain, left = getattr(owner, name), [after]

    def die() -> None:
        hit.write_text(moment)
        os.kill(os.getpid(), signal.SIGKILL)

    def armed(*given: Any, **named: Any) -> Any:
        due = False
        if counts(*given):
            left[0] -= 1
            due = left[0] == 0
        if due and when == "half a line before":
            given[0]._losses._stream.write('{"step": 1, "lo')
            given[0]._losses._stream.flush()
        if due and when != "after":
            die()
        made = plain(*given, **named)
        if due:
            die()
        return made

    setattr(owner, name, armed)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
