"""The cache of decoded pictures: how large it becomes and whether it may, and filling it at once.

A table (`decoded.py`) lies in the folder of the data that it was made from, so that all runs on these data share it,
under a name made of all that its pixels depend on beside the picture's own bytes. Its rows are named by those bytes:
a picture that changes is another one, and pictures that are added to the data are added to the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cytoclip import batches, decoded, files
from cytoclip.console import Console, size
from cytoclip.data_options import Data
from cytoclip.decoded import Decoded
from cytoclip.errors import ExitCode, UserError
from cytoclip.pictures import Pictures

NAME = "pictures"  # in `files.cache_folder`
FREE_SHARE = 0.8  # of the disk's free space that may be filled where no budget is given
_EACH = 40  # bytes of a row's key and mark
_AT_ONCE = 16  # pictures that a process decodes before it says so


@dataclass(frozen=True)
class Part:
    """Pictures of one folder of data that are kept, and how they are read.

    Parameters
    ----------
    beside
        The folder of the split, or the file or pattern of files that it is.
    contents
        Of its pairs, as `Pairs.contents`.
    pictures
        Of its pairs.
    """

    beside: Path
    contents: Sequence[str]
    pictures: Pictures

    @property
    def folder(self) -> Path:
        """Of its table."""
        settings = f"{self.pictures.shape} {self.pictures.settings}"
        return _home(self.beside) / hashlib.sha256(settings.encode()).hexdigest()[:16]


def announce(options: Data, parts: Sequence[Part], console: Console) -> None:
    """Say how large the cache of `parts` becomes and how much of it is there, before anything is written.

    Raises
    ------
    UserError
        It would be larger than `data.cache_budget_gb`, or without one than 80 % of what is free.
    """
    needs = {folder: _needs(some) for folder, some in _by_folder(parts).items()}
    whole = sum(need.bytes for need in needs.values())
    console.say(
        f"data.cache: {sum(need.rows for need in needs.values())} decoded pictures take {size(whole)}, "
        f"{sum(need.filled for need in needs.values())} of them are there: {', '.join(map(str, needs))}"
    )
    _refuse_beyond(options.cache_budget_gb, whole, needs)
    homes = {folder.parent for folder in needs}
    others = [folder for home in homes for folder in _folders(home) if folder not in needs]
    if others:
        taken = size(sum(_on_disk(folder) for folder in others))
        console.say(f"data.cache: {taken} of other settings lie in {_listed(homes)}; delete there what no run needs")


def opened(part: Part) -> Decoded:
    """The rows of a part's pairs, made if they are not there; by any number of processes at a time.

    Raises
    ------
    UserError
        The folder of the data, or the user's cache folder instead, cannot be written to.
    """
    keys = [decoded.key_of(content) for content in part.contents]
    table, row_of = decoded.opened(part.folder, part.pictures.shape, keys, part.pictures.settings)
    return Decoded((table,), np.zeros(len(row_of), np.int64), row_of)


def fill(part: Part, workers: int, console: Console) -> list[UserError]:
    """Decode what is not there yet, with `workers` processes (0: in this one); the pictures that cannot be.

    Another process may fill the same cache meanwhile. Interrupted, it goes on where it was.

    Raises
    ------
    UserError
        The disk is full, or cannot be written to.
    """
    kept = opened(part)
    pictures, missing = part.pictures.kept_in(kept), kept.missing()
    failed: list[UserError] = []
    with console.progress(f"decoding {part.beside}", len(missing)) as bar:
        source: Iterable[list[UserError | None]] = DataLoader(
            _Filling(pictures, missing),
            batch_size=_AT_ONCE,
            collate_fn=list,
            **batches.processes(workers if len(missing) > _AT_ONCE else 0),
        )
        for some in source:
            bar.advance(len(some))
            failed += [error for error in some if error]
            full = next((error for error in failed if error.code is not ExitCode.DATA), None)
            if full:
                raise full
    return failed


class _Filling(Dataset["UserError | None"]):
    """Decode and keep the pictures `missing`; what was wrong with each, if anything."""

    def __init__(self, pictures: Pictures, missing: NDArray[np.int64]) -> None:
        self._pictures, self._missing = pictures, missing

    def __len__(self) -> int:
        return len(self._missing)

    def __getitem__(self, place: int) -> UserError | None:
        picture = self._pictures[int(self._missing[place]), 0].picture
        return picture if isinstance(picture, UserError) else None


@dataclass(frozen=True)
class _Needs:
    """Of one table: its rows once all pictures are added, how many of the wanted are filled, bytes, bytes to come."""

    rows: int
    filled: int
    bytes: int
    to_come: int


def _by_folder(parts: Sequence[Part]) -> dict[Path, list[Part]]:
    """Two splits that are files of one folder share a table."""
    found: dict[Path, list[Part]] = {}
    for part in parts:
        found.setdefault(part.folder, []).append(part)
    return found


def _needs(parts: list[Part]) -> _Needs:
    folder, row = parts[0].folder, int(np.prod(parts[0].pictures.shape)) + _EACH
    wanted = {decoded.key_of(content) for part in parts for content in part.contents}
    there = decoded.keys_there(folder)
    filled = decoded.filled_there(folder, len(there))
    rows, full = len(wanted.union(there)), int(filled.sum())
    ours = sum(bool(whole) and key in wanted for key, whole in zip(there, filled, strict=True))
    return _Needs(rows, ours, rows * row, (rows - full) * row)


def _refuse_beyond(budget_gb: float | None, whole: int, needs: dict[Path, _Needs]) -> None:
    if budget_gb is not None:
        if whole > budget_gb * 1e9:
            raise UserError(
                f"data.cache takes {size(whole)}, more than the {size(budget_gb * 1e9)} of data.cache_budget_gb",
                "raise data.cache_budget_gb, or set data.cache=false",
                ExitCode.DATA,
            )
        return
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(files.existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        to_come, free = sum(needs[folder].to_come for folder in folders), files.free_bytes(folders[0])
        if to_come > FREE_SHARE * free:
            raise UserError(
                f"data.cache needs {size(to_come)} more for {_listed(folders)}, more than "
                f"{FREE_SHARE:.0%} of the {size(free)} that are free",
                "free some space, give data.cache_budget_gb to use more of it, or set data.cache=false",
                ExitCode.SYSTEM,
            )


def _home(beside: Path) -> Path:
    """A split may be a file or a pattern of files: its folder then."""
    there = files.existing(beside)
    return files.cache_folder(there if there.is_dir() else there.parent) / NAME


def _folders(home: Path) -> list[Path]:
    return [path for path in home.iterdir() if path.is_dir()] if home.is_dir() else []


def _on_disk(folder: Path) -> int:
    """Bytes that the files take: what is not written yet of a sparse one takes none."""
    facts = [path.stat() for path in folder.iterdir()]
    return sum(getattr(fact, "st_blocks", fact.st_size // 512) * 512 for fact in facts)


def _listed(folders: Iterable[Path]) -> str:
    return ", ".join(map(str, folders))
