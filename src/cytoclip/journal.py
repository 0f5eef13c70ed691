"""What a run writes down as it goes: a line a step and a validation, curves for trackers, the progress bar's note."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker

from cytoclip import files
from cytoclip.errors import ExitCode, UserError

CURVES, VALIDATIONS = "curves.jsonl", "validations.jsonl"  # beside losses.jsonl


class Journal:
    """Lines of JSON, the same numbers to each tracker; begun again where a run resumes.

    `losses.jsonl` has a line a step that two equal runs have equal; `curves.jsonl` one of speeds and such, which are
    never the same twice; `validations.jsonl` one a validation, that of the start, step 0, first.

    Parameters
    ----------
    losses
        The first file; the others lie beside it. Lines after `done` steps are cut off, so that each stands there once.
    folder
        The run folder: trackers that write files put them there, the others take its name.
    trackers
        Their names; `tensorboard` writes to `folder/tensorboard`.
    done
        How many steps are behind.
    """

    def __init__(self, losses: Path, folder: Path, trackers: Sequence[str], done: int) -> None:
        self._losses, self._curves, self._validations = (
            _Lines(path, done) for path in (losses, losses.with_name(CURVES), losses.with_name(VALIDATIONS))
        )
        self._folder = folder
        self._trackers = [_tracker(name, folder, done) for name in trackers]

    def step(self, row: Mapping[str, float], curves: Mapping[str, float]) -> None:
        """Write a step: `row` as it was, `curves` for the eye."""
        self._losses.add(row)
        self._curves.add({"step": row["step"], **curves})
        values = {f"train/{key}": value for key, value in {**row, **curves}.items() if key != "step"}
        self._log(values, int(row["step"]))

    def validation(self, step: int, val: Mapping[str, Any], keep: Mapping[str, Any] | None = None) -> None:
        """Write the scores after a step; `keep`: of `validate.keep`."""
        scored = {"val": val, **({"keep": keep} if keep else {})}
        self._validations.add({"step": step, **scored})
        values = {
            f"{name}/{direction}/{key}": value
            for name, scores in scored.items()
            for direction in ("image_to_text", "text_to_image")
            for key, value in scores[direction].items()
        }
        self._log(values, step)

    def sync(self) -> None:
        """Before a checkpoint: a step that it counts must have its lines after a power cut."""
        for lines in (self._losses, self._curves, self._validations):
            lines.sync()

    def close(self) -> None:
        for lines in (self._losses, self._curves, self._validations):
            lines.close()
        for tracker in self._trackers:
            tracker.finish()

    def _log(self, values: dict[str, float], step: int) -> None:
        with files.disk_errors(self._folder):
            for tracker in self._trackers:
                tracker.log(values, step=step)


class _Lines:
    """A file of one JSON object a line, each on the disk's way when it is added."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [line for line in _lines(path) if done and line["step"] <= done]  # a run from nothing has no old lines
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._stream = path, path.open("a", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        with files.disk_errors(self._path):
            self._stream.write(json.dumps(_finite(row), allow_nan=False) + "\n")
            self._stream.flush()

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can say: a step that fp16 skips has a norm that is not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class Stopwatch:
    """Pairs per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0

    def waited(self, since: float) -> None:
        self._waited += time.perf_counter() - since

    def read(self, pairs: int) -> dict[str, float]:
        now = time.perf_counter()
        took = max(now - self._began, 1e-9)
        reading = {"pairs_per_second": pairs / took, "waiting_for_data": self._waited / took}
        self._began, self._waited = now, 0.0
        return reading


def note(row: Mapping[str, float], curves: Mapping[str, float], chance_loss: float, name: str) -> str:
    """The training line: loss beside that of knowing nothing, hit@1 in the batch, speed, waiting."""
    return (
        f"loss {row['loss']:.3f} ({name} {chance_loss:.3f}), hit@1 in batch {curves['hit_at_1']:.2f}, "
        f"lr {row['lr']:.2e}, {curves['pairs_per_second']:.0f} pairs/s, "
        f"{curves['waiting_for_data']:.0%} waiting for data"
        + (f", {curves['memory_gb']:.1f} GB" if "memory_gb" in curves else "")
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a crash may have cut in its last one."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` for a tracker that is not installed, before any work is done for it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise _no_tracker(name, "it is not installed")


def _tracker(name: str, folder: Path, done: int) -> GeneralTracker:
    try:
        if name == "tensorboard":  # purge_step hides what a crash left behind the checkpoint
            _wait_for_a_later_name(folder / name)
            made = TensorBoardTracker("tensorboard", str(folder), purge_step=done + 1 if done else 0)
        elif name == "mlflow":
            made = LOGGER_TYPE_TO_CLASS[name](experiment_name="cytoclip", run_name=folder.name)
        else:  # accelerate calls the project "run name"
            made = LOGGER_TYPE_TO_CLASS[name]("cytoclip", name=folder.name)
        made.start()
    except Exception as error:  # each service has errors of its own, such as not being logged in
        raise _no_tracker(name, str(error)) from error
    return made


def _wait_for_a_later_name(folder: Path) -> None:
    """Readers take files of events by name, which begins with the second: a new one must come after those there.

    Else a run that was begun again within a second has its steps hidden by what it replaces.
    """
    began = [
        int(m[1]) for path in folder.glob("events.*") if (m := re.match(r"events\.out\.tfevents\.(\d+)", path.name))
    ]
    while began and int(time.time()) == max(began):
        time.sleep(0.02)


def _no_tracker(name: str, why: str) -> UserError:
    hint = f"pip install {name} and log in, or take it out of track.to"
    return UserError(f"track.to: {name} cannot start: {why}", hint, ExitCode.SYSTEM)
