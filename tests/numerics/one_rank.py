"""One process of a group that a test spawns once: runs every case of a JSON list, then says so.

    python one_rank.py CASES.json      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun sets them)

A case is {"config": a whole configuration, "float64": bool, "die_at": step to send itself a signal in, or null,
"signal": its number, 9 by default, "rank": the only process that does so, by default all}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from cytoclip import checkpoint, training
from cytoclip.config import parse
from cytoclip.console import Console
from cytoclip.errors import Stopped


def run(case: dict[str, Any]) -> training.RunResult:
    """`train.fit` of one case in this process."""
    opens, steps = checkpoint.open_model, training._step

    def open_double(*asked: Any) -> checkpoint.Opened:
        opened = opens(*asked)
        opened.encoder.double()
        return opened

    def step_or_die(job: Any, step: int, *rest: Any) -> Any:
        if step == case["die_at"] and case.get("rank", job.world.rank) == job.world.rank:
            os.kill(os.getpid(), case.get("signal", signal.SIGKILL))
        return steps(job, step, *rest)

    checkpoint.open_model = open_double if case["float64"] else opens
    training._step = step_or_die
    try:
        return training.fit(parse(case["config"], "the case"), Console(quiet=True))
    finally:
        checkpoint.open_model, training._step = opens, steps


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for each in json.loads(Path(sys.argv[1]).read_text()):
        try:
            run(each)
        except Stopped as stop:
            sys.exit(128 + stop.number)
    print("done", flush=True)
