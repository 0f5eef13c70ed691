"""Which recipe is worth most per pair seen: a search on real pairs with really pretrained towers.

    python bench/recipe.py MODEL DATA_ROOT --to OUT --work /dev/shm/recipe --seconds 500 --jobs 12
    python bench/recipe.py MODEL DATA_ROOT --to OUT --small --jobs 1        # all of it in small, to see that it runs

Every run is a whole `training.fit`, in a pool of processes that share the device. Stages:

1. search: as many trials of the baseline (learning rate and warm-up) as of ours (full, LoRA), by optuna's TPE, one
   seed, scored on 15 % of train, cut by caption; a trial below its arm's 35th percentile at a quarter of its pairs, or
   below the median at half, ends.
2. close: the best few of each arm again on two more cuts and seeds; the mean of three decides.
3. final: the choice of each arm, the original's recipe as given, and ours with a quarter of the pairs, on all of train
   with three seeds each; scored once, after the last step, on val.
4. without: what the best full recipe and the best LoRA lose without each of their options, on the three cuts.

With --trials 0 nothing is searched: the finals are of the first guesses. Nothing is selected by val. A JSON line for
each finished run is in OUT/recipe.jsonl at once: the same command goes on, also with --from a former one. --seconds is
kept: what is not finished is lost, and earlier stages leave time for later ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process a core
os.environ.setdefault("TQDM_DISABLE", "1")

import optuna
from recipe_result import summary
from recipe_space import GIVEN, PLAIN, PRIORS, SPACES, Params, runs, without

Line = dict[str, Any]
BUDGET = 17_440  # pairs seen: 20 epochs of 872
QUARTERS = {1: 35.0, 2: 50.0}  # percentile of its arm under which a trial ends there
ENOUGH = 8  # trials at a quarter before any ends
KS = [1, 5, 10, 50]
SELECTION = 0.15  # of train


@dataclass(frozen=True)
class Task:
    """One or two runs that are one recipe: `key` says which, whatever process it is done by."""

    stage: str
    arm: str
    params: Params
    seed: int
    cut: int | None  # the seed of the selection split; None: all of train, scored on val
    budget: int
    name: str = ""

    @property
    def key(self) -> str:
        asked = (self.stage, self.arm, self.params, self.seed, self.cut, self.budget)
        return json.dumps(asked, sort_keys=True)


@dataclass
class Bench:
    """What all stages share."""

    given: argparse.Namespace
    work: Path
    deadline: float
    lines: list[Line] = field(default_factory=list)
    asked: dict[str, tuple[optuna.Study, optuna.Trial]] = field(default_factory=dict)  # trials in hand, by key

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def done(self, stage: str, arm: str | None = None) -> list[Line]:
        return [x for x in self.lines if x["stage"] == stage and arm in (None, x["arm"]) and "failed" not in x]

    def write(self, line: Line) -> None:
        self.lines.append(line)
        for place in (self.work, self.given.to):
            with (place / "recipe.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")
        said = {k: v for k, v in line.items() if k in ("stage", "arm", "name", "score", "ended", "failed", "seconds")}
        print(f"{self.left:4.0f} s left {json.dumps(said)}", flush=True)

    def each(self) -> float:
        """Seconds of a whole run beside its neighbours."""
        whole = [
            x["seconds"] for x in self.lines if "score" in x and "ended" not in x and x["budget"] == self.given.budget
        ]
        return mean(whole[-24:]) if whole else self.given.guess

    def waves(self, count: int) -> float:
        """Seconds for so many whole runs, with something to spare."""
        return 1.25 * self.each() * math.ceil(count / self.given.jobs)


def score(scored: Line) -> float:
    """What is selected by: both directions of hit@5, MRR and mAP, every right answer counted; 5 of 132 as 10 of 252."""
    keys, sides = ("hit@5_groups", "mrr_groups", "map_groups"), ("image_to_text", "text_to_image")
    return mean(_number(scored[side], key) for side in sides for key in keys)


def _number(numbers: Line, key: str) -> float:
    """Where every query has one right answer nothing is counted by group, and mAP is MRR."""
    short = key.removesuffix("_groups")
    return float(next(numbers[name] for name in (key, short, "mrr") if name in numbers))


class Ended(Exception):  # noqa: N818 - it is no error
    """A trial that is not worth its end; where it stood."""


def work(task: Task, model: str, root: str, home: Path, device: str) -> Line:
    """All that a worker does: the runs of a task, what they scored, and nothing left on disk but final embeddings."""
    import torch

    from cytoclip import config, training
    from cytoclip.console import Console

    torch.set_num_threads(1)
    began, name = time.monotonic(), f"{os.getpid()}-{time.monotonic_ns()}"
    folder, line = home / "runs" / name, dict(vars(task))
    at: list[float] = []
    try:
        parts = runs(task.params, task.budget, task.seed, _pairs(root, task))
        for number, sections in enumerate(parts):
            last, output = number == len(parts) - 1, folder / str(number)
            wanted = config.parse(_complete(sections, task, model, root, output, device), str(output))
            every = wanted.validation.every

            def watch(step: int, scored: Line, every: int = every) -> None:
                at.append(score(scored))
                if task.stage == "search" and step % every == 0 and _is_low(home, task.arm, step // every, at[-1]):
                    raise Ended

            done = training.fit(wanted, Console(quiet=True), watch if last else None)
            model = str(output / "model")
        line |= {"score": score(done.last), "scores": _few(done.last)}
        if task.stage == "final":
            line["embeddings"] = name
            (home / "final").mkdir(exist_ok=True)
            (output / "embeddings" / "best.safetensors").rename(home / "final" / f"{name}.safetensors")
    except Ended:
        line |= {"score": at[-1], "ended": len(at)}
    except Exception as error:  # one that fails ends no other
        line["failed"] = f"{type(error).__name__}: {error}"[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {**line, "at": at, "seconds": round(time.monotonic() - began, 1)}


def _pairs(root: str, task: Task) -> int:
    """Of the training split, or of what a cut leaves of it, more or less."""
    listed = len(json.loads(Path(root, "train", "img_text_pair.json").read_text()))
    return listed if task.cut is None else round((1 - SELECTION) * listed)


def _complete(sections: dict[str, Any], task: Task, model: str, root: str, output: Path, device: str) -> dict[str, Any]:
    """The sections of one run as a whole configuration; what is final is ranked before and after, and not between."""
    steps, held = sections["train"]["steps"], task.cut is not None
    cut = {"hold_out": {"share": SELECTION, "seed": task.cut}} if held else {}
    precision = {"device": device, "precision": "bf16"}
    return {
        "data": {"root": root, "workers": 0, "cache": True, **cut, **sections["data"]},
        "model": {"name": model, **sections["model"]},
        "train": {**sections["train"], **precision},
        "validate": {"every": math.ceil(steps / 4) if held else steps, "ks": KS},
        "checkpoint": {"every": 10**9, "keep_last": 1},
        "track": {"to": []},
        "report": {"images": False},
        "output": str(output),
    }


def _is_low(home: Path, arm: str, quarter: int, reached: float) -> bool:
    """Whether a trial that scores `reached` there is among its arm's worse ones; what it reached is told the others."""
    path = home / f"rungs-{arm}-{quarter}"
    with path.open("a") as out:
        out.write(f"{reached}\n")  # one short write, appended whole
    there = sorted(float(text) for text in path.read_text().split())
    if quarter not in QUARTERS or len(there) < ENOUGH:
        return False
    return reached < there[int(len(there) * QUARTERS[quarter] / 100)]


def _few(scored: Line) -> Line:
    keys = ("hit@1", "hit@10", "hit@50", "hit@5_groups", "hit@10_groups", "mrr", "mrr_groups", "map_groups")
    sides = ("image_to_text", "text_to_image")
    return {side: {k: round(scored[side][k], 5) for k in keys if k in scored[side]} for side in sides}


def searched(bench: Bench) -> Iterator[Task | None]:
    """Trials of the arm that has the fewest so far; optuna hears of each result as it comes."""
    studies = {arm: _study(bench, arm, number) for number, arm in enumerate(SPACES)}
    begun = {arm: len(bench.done("search", arm)) for arm in SPACES}
    closing = bench.given.close * len(SPACES) * 2
    while True:
        reserve = bench.waves(closing) + bench.waves(len(final_tasks(bench))) + bench.each()
        arm = min(begun, key=lambda name: begun[name])
        if begun[arm] >= bench.given.trials or bench.left < reserve:
            return
        trial = studies[arm].ask(SPACES[arm])
        begun[arm] += 1
        task = Task("search", arm, dict(trial.params), 0, 0, bench.given.budget, f"{arm} {trial.number}")
        bench.asked[task.key] = (studies[arm], trial)
        yield task


def _study(bench: Bench, arm: str, seed: int) -> optuna.Study:
    there = bench.done("search", arm)
    sampler = optuna.samplers.TPESampler(
        seed=seed + 100 * len(there), n_startup_trials=16, multivariate=True, constant_liar=True
    )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for line in there:
        study.add_trial(_told(line))
    for params in PRIORS[arm][len(there) :]:
        study.enqueue_trial(params)
    return study


def _told(line: Line) -> optuna.trial.FrozenTrial:
    state = optuna.trial.TrialState.PRUNED if "ended" in line else optuna.trial.TrialState.COMPLETE
    reached = dict(enumerate(line["at"], start=1))
    value = {"value": line["score"]} if "ended" not in line else {}
    return optuna.trial.create_trial(
        state=state, params=line["params"], distributions=SPACES[line["arm"]], intermediate_values=reached, **value
    )


def tell(bench: Bench, line: Line, key: str) -> None:
    asked = bench.asked.pop(key, None)
    if asked is None:
        return
    study, trial = asked
    if "failed" in line:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    for quarter, reached in enumerate(line["at"], start=1):
        trial.report(reached, quarter)
    ended = "ended" in line
    study.tell(trial, None if ended else line["score"], optuna.trial.TrialState.PRUNED if ended else None)


def close_tasks(bench: Bench) -> list[Task]:
    found = []
    for arm in SPACES:
        whole = [x for x in bench.done("search", arm) if "ended" not in x]
        few = max(1, min(bench.given.close, len(bench.done("search", arm)) // 3))  # of few trials not all are close
        for line in sorted(whole, key=lambda x: -x["score"])[:few]:
            found += [Task("close", arm, line["params"], cut, cut, bench.given.budget, line["name"]) for cut in (1, 2)]
    return found


def chosen(bench: Bench, arm: str) -> Params | None:
    """Of what was tried on all cuts the best by the mean; before that the best trial."""
    scores: dict[str, list[float]] = {}
    for line in (*bench.done("search", arm), *bench.done("close", arm)):
        if "ended" not in line:
            scores.setdefault(json.dumps(line["params"], sort_keys=True), []).append(line["score"])
    if not scores:
        return None
    best = max(scores, key=lambda key: (len(scores[key]), mean(scores[key])))
    found: Params = json.loads(best)
    return found


def final_tasks(bench: Bench) -> list[Task]:
    budget, found = bench.given.budget, []
    for seed in range(bench.given.seeds):
        found.append(Task("final", "given", GIVEN, seed, None, budget, f"given, seed {seed}"))
        for arm in SPACES:
            params = chosen(bench, arm) or PRIORS[arm][0]
            found.append(Task("final", arm, params, seed, None, budget, f"{arm}, seed {seed}"))
            if arm != "baseline":
                few = f"{arm}, a quarter of the pairs, seed {seed}"
                found.append(Task("final", f"{arm} quarter", params, seed, None, budget // 4, few))
    return found


def without_tasks(bench: Bench) -> list[Task]:
    found = []
    for cut in (0, 1, 2):
        for arm in ("full", "lora"):
            best = chosen(bench, arm)
            for option in PLAIN:
                if best and option in best and without(best, option) != best:
                    less = without(best, option)
                    found.append(Task("without", arm, less, cut, cut, bench.given.budget, f"{arm} without {option}"))
    return found


def carry_out(bench: Bench, tasks: Iterable[Task]) -> None:
    """Do tasks in the pool, as many at once as it has processes; whatever kills a process ends its neighbours' runs."""
    arguments = (str(bench.given.model.resolve()), str(bench.work / "data"), bench.work, bench.given.device)
    there = {line["key"] for line in bench.lines if "failed" not in line}
    queue, held = iter(tasks), {}
    pool: ProcessPoolExecutor | None = None

    def begin(pool: ProcessPoolExecutor, held: dict[Future[Line], Task]) -> bool:
        task = next((task for task in queue if task.key not in there), None)
        if task is not None:
            held[pool.submit(work, task, *arguments)] = task
        return task is not None

    while bench.left > 0:
        pool = pool or new_pool(bench)
        while len(held) < bench.given.jobs and begin(pool, held):
            pass
        if not held:
            break
        ready, _ = wait(held, timeout=max(0.0, bench.left), return_when=FIRST_COMPLETED)
        for future in ready:
            task = held.pop(future)
            try:
                line = future.result()
            except BrokenProcessPool as error:
                line, pool = {**vars(task), "failed": repr(error)}, None
            bench.write({**line, "key": task.key})
            tell(bench, line, task.key)
        if pool is None:
            held = {}


_pools: list[ProcessPoolExecutor] = []


def new_pool(bench: Bench) -> ProcessPoolExecutor:
    if _pools and not getattr(_pools[-1], "_broken", False):
        return _pools[-1]
    _pools.append(ProcessPoolExecutor(bench.given.jobs, multiprocessing.get_context("spawn")))
    return _pools[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for runs: a disk in memory")
    parser.add_argument("--from", dest="former", type=Path, help="recipe.jsonl of a former call on another machine")
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", type=int, default=BUDGET, help="pairs seen in each run")
    parser.add_argument("--trials", type=int, default=120, help="of each arm")
    parser.add_argument("--close", type=int, default=6, help="of each arm that are tried on more cuts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guess", type=float, default=30.0, help="seconds of a run, before there was one")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if given.small:
        given.budget, given.trials, given.close, given.seeds, given.guess = 128, 2, 1, 1, 2
    bench = prepare(given)
    stages: tuple[Callable[[Bench], Iterable[Task]], ...] = (searched, close_tasks, final_tasks, without_tasks)
    for stage in stages:
        print(f"--- {stage.__name__}, {bench.left:.0f} s left, {bench.each():.0f} s a run", flush=True)
        carry_out(bench, stage(bench))
    card, line = summary(bench.lines, bench.work, given.to)
    print(card + "\n" + json.dumps(line), flush=True)
    end(_pools)
    return 0


def prepare(given: argparse.Namespace) -> Bench:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given.to.mkdir(parents=True, exist_ok=True)
    (given.work / "runs").mkdir(parents=True, exist_ok=True)
    if not (given.work / "data").is_dir():  # the cache of pictures lies beside them
        shutil.rmtree(given.work / "data.new", ignore_errors=True)
        shutil.copytree(given.data_root, given.work / "data.new").rename(given.work / "data")
    bench = Bench(given, given.work, time.monotonic() + given.seconds)
    own = given.work / "recipe.jsonl"
    if given.former and own.is_file():
        sys.exit(f"error: --from {given.former}, but {own} is there\nhint: give another --work, or leave --from out")
    former = given.former or own
    if former.is_file():
        bench.lines = [json.loads(text) for text in former.read_text().splitlines()]
        for place in {own, given.to / "recipe.jsonl"} - {former}:
            shutil.copyfile(former, place)
    if not list(given.work.glob("rungs-*")):
        for line in bench.done("search"):
            for quarter, reached in enumerate(line["at"], start=1):
                with (given.work / f"rungs-{line['arm']}-{quarter}").open("a") as out:
                    out.write(f"{reached}\n")
    return bench


def end(pools: list[ProcessPoolExecutor]) -> None:
    """What is still at work is of no use any more."""
    for pool in pools:
        for process in (pool._processes or {}).values():
            process.kill()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
