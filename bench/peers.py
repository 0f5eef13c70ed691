"""A whole training run, JPEG files to optimizer steps, ours beside those of others: pairs a second and peak memory.

    python bench/peers.py [--models 23M B/32] [--rounds 5] [--batch 32]     # on the CPU
    python bench/peers.py --gpu [--models B/16] [--seconds 300]             # on one GPU; B/32 and L/14 too

Every way is a process of its own that trains for the whole time (`bench/contenders.py` says each): the original's way
written anew from its description, transformers' Trainer in the way of its contrastive example, sentence-transformers'
trainer with its loss and with the cached one, open_clip's loop where torchvision is there, and ours: as it is, with
`data.cache`, with `train.compile`, in chunks as the cached loss is. Who is compiled has it in its name. All have the
same pictures (drawn cells, JPEGs of 360×363), captions of 40 to 48 tokens (`--tokens` for others), batch, precision
(bf16 where the device has it, else float32), threads, loader processes and starting weights (open_clip random ones of
its own).

The ways take turns, a segment of steps each, and are stopped by a signal with all their loader processes while it is
another's turn: nobody works ahead, and whatever else the machine does falls on all alike. Medians over the rounds, and
of the ratios to the best peer of the same round: of pairs a second, and of pairs a second of processor time (loader
processes too), which is what to look at where the machine is busy. Memory is the highest in the segments: resident
memory of the process and what its loader processes have for themselves, or what torch allocated on the GPU.

On a GPU a way holds it alone, one after the other: all at once would not fit. Each has its share of `--seconds`, and
is timed once as many batches have gone as its loader has ready ahead; ratios are of medians.

A card for people, and one JSON line last; what is known so far is printed as it comes. The limit holds for what is not
cached: exit code 1 where neither ours nor ours compiled reaches it, or nothing was there to compare with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contenders import WAYS
from peer_data import SHAPES, TOKENS, Place, write
from peer_gate import Task

CPU_WAYS = ("ours", "ours, cached pictures", "ours, compiled", "ours, in chunks", "the original's way",
            "transformers Trainer", "sentence-transformers", "sentence-transformers, cached loss",
            "open_clip")  # fmt: skip
FEW = ("ours, cached pictures", "ours", "the original's way", "transformers Trainer", "sentence-transformers",
       "open_clip")  # fmt: skip
GPU_WAYS = ("ours, compiled", "open_clip, compiled", "transformers Trainer, compiled", "ours", "open_clip",
            "transformers Trainer", "sentence-transformers", "the original's way",
            "ours, cached and compiled")  # fmt: skip
STEPS = {"23M": 3, "B/32": 2}  # of a segment on a CPU
# Where not 16. On a CPU all ways stay in memory; on a GPU what loaders have ready must fit in shared memory.
BATCH = {"cpu": {"23M": 32}, "cuda": {"B/16": 256, "B/32": 512, "L/14": 128}}
LIMIT = {"cpu": 1.25, "cuda": 1.3}  # times the best peer
FROM_FILES = ("ours", "ours, compiled")
PATIENCE = {"cpu": 900.0, "cuda": 120.0}  # seconds for a build, a compilation, or a segment
AHEAD = 2  # batches that each loader process has ready, by torch's default, which all of them leave


def asked_for(device: str, model: str) -> tuple[str, ...]:
    """Those of a CPU are all in its memory at once, so of a large model the main ones."""
    if device == "cuda":
        return GPU_WAYS
    return FEW if model == "B/32" else CPU_WAYS


@dataclass
class Way:
    """A contender's process, and what its segments were."""

    name: str
    process: subprocess.Popen[str]
    patience: float
    speeds: list[float] = field(default_factory=list)
    by_processor: list[float] = field(default_factory=list)  # pairs a second of processor time
    memory: list[float] = field(default_factory=list)
    failed: str = ""
    built: float = 0.0  # seconds to the first segment

    @classmethod
    def started(cls, name: str, log: Path, patience: float) -> Way:
        command = [sys.executable, str(Path(__file__).with_name("contenders.py")), name]
        # The same for all, and the kinder one to whoever has idle threads (docs/log.md, 2026-11-23).
        settings = {"GOMP_SPINCOUNT": "1000", **os.environ}
        with log.open("a") as errors:
            # A group of this session: should this process be killed, the system sends its stopped children a hang-up.
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                       process_group=0, env=settings)  # fmt: skip
        way = cls(name, process, patience)
        way.read()
        return way

    def order(self, **order: Any) -> dict[str, Any]:
        self.send(**order)
        return self.read()

    def send(self, **order: Any) -> None:
        assert self.process.stdin
        self._signal(signal.SIGCONT)
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def read(self) -> dict[str, Any]:
        """What it says next, one line to each order; it and its loader processes are stopped then."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], self.patience)[0]:
            self.end()
            self.failed = f"said nothing for {self.patience:.0f} s"
            return {"failed": self.failed}
        line = self.process.stdout.readline()
        said: dict[str, Any] = json.loads(line) if line else {"failed": f"ended with code {self.process.wait()}"}
        self.failed = said.get("failed", self.failed)
        if line:
            self._signal(signal.SIGSTOP)
        return said

    def segment(self, steps: int) -> dict[str, Any]:
        said = self.order(go=steps, forget=not self.speeds)
        if "pairs" in said:
            self.speeds.append(said["pairs"] / said["seconds"])
            self.by_processor.append(said["pairs"] / max(said["processor"], 1e-3))
            self.memory.append(said["GB"])
        return said

    def end(self) -> None:
        """Kill the group: of a run that is over nothing is wanted any more."""
        if self.process.poll() is None:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)  # the group's leader, so the group has its number


def on_cpu(task: Task, names: list[str], rounds: int, steps: int, log: Path) -> list[Way]:
    """All ways resident, in turns."""
    ways: list[Way] = []
    try:
        for name in names:
            ways.append(Way.started(name, log, PATIENCE["cpu"]))
            said = ways[-1].order(build=asdict(task))
            print(f"  {name}: {said.get('failed') or 'ready'}", flush=True)
        for number in range(rounds):
            for way in _turn(ways, number):
                way.segment(steps)
            print(f"  round {number + 1}: " + ", ".join(f"{w.name} {w.speeds[-1]:.2f}" for w in ways if w.speeds),
                  flush=True)  # fmt: skip
    finally:
        for way in ways:
            way.end()
    return ways


def _turn(ways: list[Way], number: int) -> list[Way]:
    """Those that still run, another one first in each round."""
    running = [way for way in ways if not way.failed]
    first = number % max(1, len(running))
    return running[first:] + running[:first]


def on_gpu(tasks: list[Task], names: dict[str, list[str]], until: float, log: Path) -> dict[str, list[Way]]:
    """One way at a time on the device; its processes are started together, since that takes longest."""
    with ThreadPoolExecutor() as pool:
        every, patience = dict.fromkeys(name for some in names.values() for name in some), PATIENCE[tasks[0].device]
        ways = dict(zip(every, pool.map(lambda name: Way.started(name, log, patience), every), strict=True))
    found: dict[str, list[Way]] = {task.model: [] for task in tasks}
    turns = [(task, ways[name]) for task in tasks for name in names[task.model]]
    try:
        for number, (task, way) in enumerate(turns):
            result = Way(way.name, way.process, way.patience)
            found[task.model].append(result)
            _alone(task, result, (until - time.perf_counter()) / (len(turns) - number))
            print(json.dumps({"model": task.model, "batch": task.batch, **_row(result)}), flush=True)
    finally:
        for way in ways.values():
            way.end()
    return found


def _alone(task: Task, way: Way, share: float) -> None:
    """Build, use up what lies ready, then five segments within `share` seconds; or three, where that took them."""
    began = time.perf_counter()
    if share < 1 or way.process.poll() is not None:
        way.failed = "no time was left" if share < 1 else "its process ended before"
        return
    if "failed" in way.order(build=asdict(task)):
        return
    ready = AHEAD * task.workers + 3
    said = way.order(go=ready, forget=True)
    way.built = time.perf_counter() - began
    steps = max(2, int((share - way.built) / 5 / max(said.get("seconds", 1.0) / ready, 1e-3)))
    while not way.failed and len(way.speeds) < (5 if time.perf_counter() - began < share else 3):
        way.segment(steps)
    if not way.failed:
        way.order(stop=True)


def _row(way: Way) -> dict[str, Any]:
    if not way.speeds:
        return {"way": way.name, "failed": way.failed or "not measured"}
    return {
        "way": way.name,
        "pairs/s": round(statistics.median(way.speeds), 2),
        "from": round(min(way.speeds), 2),
        "to": round(max(way.speeds), 2),
        "pairs/processor s": round(statistics.median(way.by_processor), 2),
        "peak GB": round(max(way.memory), 2),
        "segments": len(way.speeds),
        **({"seconds before": round(way.built, 1)} if way.built else {}),
        **({"failed": way.failed} if way.failed else {}),
    }


def card(task: Task, ways: list[Way], limit: float) -> dict[str, Any]:
    """A line a way, with its median ratio to the best peer in the same round."""
    peers = [way for way in ways if way.speeds and not way.name.startswith("ours")]
    print(f"\n{task.model}, batch {task.batch}, {task.workers} loader processes")
    best = max(peers, key=lambda way: statistics.median(way.speeds), default=None)
    rows = []
    for way in ways:
        row = _row(way)
        if best and way.speeds:
            row["times the best peer"] = _times(way.speeds, best.speeds, task.device)
            row["by processor time"] = _times(way.by_processor, best.by_processor, task.device)
        rows.append(row)
        said = (
            f"{row['pairs/s']:>9} pairs/s, {row['pairs/processor s']:>8} a processor second, {row['peak GB']:>6} GB"
            if "pairs/s" in row
            else row["failed"]
        )
        times = row.get("times the best peer", ""), row.get("by processor time", "")
        print(f"  {way.name:<38} {said}  {times[0]:>5} {times[1]:>5}", flush=True)
    won = max((row.get("times the best peer", 0) for row in rows if row["way"] in FROM_FILES), default=0)
    return {"model": task.model, "batch": task.batch, "ways": rows, "best peer": best.name if best else None,
            "ours from files": won, "limit": limit}  # fmt: skip


def _times(ours: list[float], best: list[float], device: str) -> float:
    """Of the same round where they took turns, of medians where each was alone."""
    if device == "cuda":
        return round(statistics.median(ours) / statistics.median(best), 2)
    return round(statistics.median(one / other for one, other in zip(ours, best, strict=False)), 2)


def missing(names: Iterable[str]) -> dict[str, str]:
    """Ways that cannot run here, and why."""
    found = {}
    for name in names:
        needs = {
            "open_clip": ("open_clip", "open_clip_train", "torchvision"),
            "sentence": ("sentence_transformers", "datasets"),
        }
        for start, packages in needs.items():
            absent = [package for package in packages if not importlib.util.find_spec(package)]
            if name.startswith(start) and absent:
                found[name] = f"not measured: no {', '.join(absent)} here"
    return found


def precision_of(device: str) -> str:
    """bf16 where the device multiplies it in hardware; elsewhere float32, which is a hundred times faster there."""
    from cytoclip.device import best_precision

    return "bf16" if best_precision(device) == "bf16" else "no"


def facts(gpu: bool) -> dict[str, Any]:
    """What a number depends on: machine, arithmetic, versions."""
    import torch

    names = ("cytoclip", "torch", "transformers", "accelerate", "sentence-transformers", "open_clip_torch", "datasets",
             "pillow", "torchvision")  # fmt: skip
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {"precision": precision_of("cuda" if gpu else "cpu"), "processor": torch.backends.cpu.get_cpu_capability(),
             "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
             "python": platform.python_version(), "versions": versions}  # fmt: skip
    return found | ({"gpu": torch.cuda.get_device_name()} if gpu else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it on a GPU")
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a segment on a CPU")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--chunk", type=int, help="pairs held at once by those in chunks; default: a quarter")
    parser.add_argument(
        "--workers", type=int, help="loader processes of each; default: 1, on a GPU two less than cores"
    )
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--tokens", nargs=2, type=int, default=TOKENS, help="of a caption, from and to")
    parser.add_argument("--log", type=Path, default=Path("peers.log"), help="what the contenders print")
    parser.add_argument("--rehearse", action="store_true", help="the way of the GPU in small, on a CPU")
    return parser.parse_args()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the ways that are stopped meanwhile must not stay behind
    given, began = arguments(), time.perf_counter()
    alone, device, cores = given.gpu or given.rehearse, ("cuda" if given.gpu else "cpu"), os.cpu_count() or 1
    workers = given.workers if given.workers is not None else (max(1, cores - 2) if given.gpu else 1)
    models = given.models or (["B/16"] if given.gpu else ["rehearsal"] if alone else ["23M", "B/32"])
    names = {model: given.ways or asked_for(device, model) for model in models}
    absent = missing([name for some in names.values() for name in some])
    there = {model: [name for name in some if name not in absent] for model, some in names.items()}
    about = facts(given.gpu)
    print(json.dumps(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write(Place(Path(folder)), given.pairs or (8192 if given.gpu else 256), models, given.tokens)
        print(f"pictures and models written in {time.perf_counter() - began:.0f} s", flush=True)
        tasks = []
        for model in models:
            batch = given.batch or BATCH[device].get(model, 16)
            tasks.append(Task(folder, model, batch, given.chunk or batch // 4, workers, device, about["precision"], 2))
        found = on_gpu(tasks, there, began + given.seconds, given.log) if alone else {}
        results = []
        for task in tasks:
            if not alone:
                print(f"\n{task.model}:", flush=True)
                steps = given.steps or STEPS.get(task.model, 2)
                found[task.model] = on_cpu(task, there[task.model], given.rounds, steps, given.log)
            results.append(card(task, found[task.model], LIMIT[device]))
    for name, why in absent.items():
        print(f"  {name}: {why}")
    print(json.dumps({**about, "device": device, "workers": workers, "absent": absent, "results": results}))
    return int(any(one["ours from files"] < one["limit"] for one in results))


if __name__ == "__main__":
    sys.exit(main())
