"""A finished run, read back from its folder; what an older run lacks is named, and not missed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cytoclip import batches, config, files, split_reader
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, suggested
from cytoclip.pairs import Pairs, fingerprint, spread

Log = dict[str, NDArray[np.float64]]

_MISSING = {
    "curves": "curves.jsonl (speed, waiting, hit@1 in the batch)",
    "losses": "losses.jsonl (loss, learning rate, temperature)",
    "validations": "validations.jsonl (scores over the steps)",
}


@dataclass(frozen=True)
class Embedded:
    """The embeddings of one split by one model, float32 (N, D), and of which pairs they are."""

    image_ND: Tensor
    text_ND: Tensor
    pairs: str


@dataclass(frozen=True)
class Record:
    """What a run folder holds.

    Parameters
    ----------
    wanted
        The run's configuration; None where this version cannot read it.
    losses, curves
        By name, a value a step; NaN where a step has none.
    validations
        As the lines of validations.jsonl.
    soup
        What `soup/soup.json` holds, if it is there.
    missing
        In words, what an older run does not have.
    """

    run: RunFolder
    wanted: Config | None
    versions: str
    results: dict[str, Any]
    losses: Log
    curves: Log
    validations: list[dict[str, Any]]
    soup: dict[str, Any] | None
    missing: list[str] = field(default_factory=list)

    def embedded(self, split: str, which: str) -> Embedded | None:
        """Of `before` or `best`; None where they were not kept, or are not whole, or not finite."""
        name = which if split == "val" else f"{split}-{which}"
        path = self.run.embeddings / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as stored:
                pairs = (stored.metadata() or {}).get("pairs", "")
                image_ND, text_ND = (stored.get_tensor(side).float() for side in ("image", "text"))
        except (OSError, SafetensorError):
            return None
        return usable(image_ND, text_ND, pairs)


def usable(image_ND: Tensor, text_ND: Tensor, pairs: str) -> Embedded | None:
    """Embeddings as a page draws on them; None where they are not rows of the same pairs, or not finite."""
    whole = image_ND.ndim == 2 and image_ND.shape == text_ND.shape and len(image_ND) > 0
    whole = whole and bool(image_ND.isfinite().all()) and bool(text_ND.isfinite().all())
    return Embedded(image_ND.float().cpu(), text_ND.float().cpu(), pairs) if whole else None


def read(folder: Path) -> Record:
    """Everything that the report draws on.

    Raises
    ------
    UserError
        For a folder that is no run, or one that is not finished.
    """
    run = RunFolder(folder)
    if not run.config.is_file():
        hint = suggested(folder, "name one that cytoclip train wrote")
        raise UserError(f"{folder} is no run folder: it has no config.yaml", hint)
    if not run.results.is_file():
        raise UserError(
            f"{folder} is not finished: it has no results.json", f"cytoclip train {run.config}", ExitCode.RUN
        )
    results = _json(run.results)
    if not isinstance(results, dict) or "best" not in results:
        raise UserError(f"{run.results} is damaged", "delete it to score the run again", ExitCode.RUN)
    wanted, missing = _config(run)
    losses, curves = columns(run.losses), columns(run.curves)
    validations = list(_lines(run.validations))
    there = {"losses": losses, "curves": curves, "validations": validations}
    missing += [words for name, words in _MISSING.items() if not there[name]]
    first = run.config.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return Record(
        run=run,
        wanted=wanted,
        versions=first.removeprefix("#").strip() if first.startswith("#") else "",
        results=results,
        losses=losses,
        curves=curves,
        validations=validations,
        soup=_json(folder / "soup" / "soup.json"),
        missing=missing,
    )


def pairs(read: Record, split: str, embedded: Embedded, console: Console, held: Pairs | None = None) -> Pairs:
    """The pairs that were embedded: `held`, or read again, every file, since equal pictures are right answers.

    Raises
    ------
    UserError
        Where they cannot be read any more, or are others by now.
    """
    found = held or _read_again(read, split, console)
    if len(found) != len(embedded.image_ND) or embedded.pairs not in ("", fingerprint(found)):
        raise UserError("the data have changed since", "keep the data as they were", ExitCode.DATA)
    return found


def columns(path: Path) -> Log:
    """A log of one object a line as columns of numbers, 8 bytes each however long the run; none where it is absent."""
    found: dict[str, array[float]] = {}
    count = 0
    for line in _lines(path):
        for name, value in line.items():
            if isinstance(value, int | float | None):
                column = found.setdefault(name, array("d"))
                column.extend([float("nan")] * (count - len(column)))
                column.append(float("nan") if value is None else float(value))
        count += 1
    for column in found.values():
        column.extend([float("nan")] * (count - len(column)))
    return {name: np.frombuffer(column, np.float64) for name, column in found.items() if len(column)}


def _read_again(read: Record, split: str, console: Console) -> Pairs:
    there = split_reader.read(read.wanted.data, [split], Console(quiet=True)) if read.wanted else {}
    if split not in there:
        raise UserError("no configuration says where they are", "keep config.yaml as the run wrote it", ExitCode.DATA)
    place, found = there[split]
    return spread(batches.scanned(found, place, console))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; a crash may have cut the last."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                return
            if isinstance(line, dict):
                yield line


def _json(path: Path) -> Any:
    try:
        return files.read_json(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _config(run: RunFolder) -> tuple[Config | None, list[str]]:
    try:
        return config.load(run.config), []
    except UserError:
        return None, ["its configuration, which this version does not read"]
