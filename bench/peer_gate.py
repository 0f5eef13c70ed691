"""Where a run that `bench/peers.py` compares is timed: a gate behind each optimizer step, and a line to the driver.

The gate times segments of steps and waits in between. The driver stops the process group while others run, so nobody
reads ahead meanwhile.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peer_data import Place


@dataclass(frozen=True)
class Task:
    """What is trained, and how much at once; the same for all."""

    place: str
    model: str
    batch: int
    chunk: int  # pairs that are held at once, by those who can
    workers: int
    device: str
    precision: str  # bf16, or no (float32)
    warm: int  # steps before anything is timed

    @property
    def here(self) -> Place:
        return Place(Path(self.place))


class Stop(BaseException):
    """The driver has seen enough of this run."""


class Gate:
    """Called after each optimizer step: ends a segment where it is full, and waits until the next one is asked for."""

    def __init__(self, task: Task, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.task, self.ask = task, ask
        self.left = self.steps = task.warm
        self.began, self.worked = time.perf_counter(), self.processor()

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left > 0:
            return
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        worked = self.processor() - self.worked
        said = {"pairs": self.steps * self.task.batch, "seconds": seconds, "processor": worked, **self.memory()}
        order = self.ask(said)
        if "go" not in order:
            raise Stop
        self.left = self.steps = order["go"]
        if order.get("forget"):
            self.forget()
        self.began, self.worked = time.perf_counter(), self.processor()

    def processor(self) -> float:
        """Seconds of processor time so far, with those of its loader: what a busy machine does not change much."""
        own = psutil.Process()
        times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
        return float(sum(each.user + each.system for each in times))

    def memory(self) -> dict[str, float]:
        """Peak of what the device holds, in GB: resident memory with the loader's own, or the allocator's on a GPU."""
        if self.task.device == "cuda":
            return {"GB": torch.cuda.max_memory_allocated() / 1e9}
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        own = sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))
        return {"GB": int(peak.split()[1]) / 1e6 + own / 1e9}

    def forget(self) -> None:
        if self.task.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here


@contextmanager
def _talking() -> Any:
    """A line to the driver on what was stdout; whatever libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield lambda line: print(json.dumps(line), file=out, flush=True)


def serve(way: Callable[[Task, Gate], None]) -> None:
    """Read JSON lines: `{"build": Task}`, `{"go": steps}`; another ends the run, the end of input the process."""
    warnings.filterwarnings("ignore")
    with _talking() as tell:

        def ask(said: dict[str, Any]) -> dict[str, Any]:
            tell(said)
            order: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
            return order

        order = ask({"started": True})
        while "build" in order:
            task = Task(**order["build"])
            try:
                way(task, Gate(task, ask))
            except Stop:
                said: dict[str, Any] = {"ended": True}
            except Exception as error:
                traceback.print_exc()
                said = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:300]}
            gc.collect()
            if task.device == "cuda":
                torch.cuda.empty_cache()
            order = ask(said)
