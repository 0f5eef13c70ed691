"""Decoded pictures on disk: a table of rows that whoever decodes a picture fills, and later epochs and runs read.

Letters: U different pictures of a table, N pairs, H×W pixels.

A table is a folder of three files; row u of each belongs to one picture:

- `contents`: 32 bytes, which picture it is. Rows are only ever added, under a lock.
- `pixels`: its 3·H·W bytes. Sparse until they are written.
- `marks`: 8 bytes, 0 until the pixels are there, then their checksum.

**What a crash leaves.** A mark is written after its pixels, so a process that is killed leaves a row without a mark,
which is decoded again. A power cut may keep the mark and lose the pixels, and a disk may lose either: the mark is a
CRC-32 of picture and pixels, compared when a process reads a row for the first time. A row that fails is decoded again,
written anew and counted. So nothing waits for the disk: an fsync for each row would cost more than decoding it. Two
processes that fill one row write the same bytes.

**Why rows are read and not mapped.** Through a map the pages read would count as memory of the process, which then
seems to grow by the size of the data, and a disk error or a file cut short would end it by SIGBUS. From the page cache
56,000 rows of 224×224 a second were read on one core, and 80,000 copied from a map.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cytoclip import files
from cytoclip.errors import ExitCode, UserError

Shape = tuple[int, int, int]

_FILES = ("contents", "marks", "pixels", "lock", "about.json")
_KEY = 32  # bytes of a picture's key
_FILLED, _MENDED = 1 << 32, 1 << 33  # in a mark, above the checksum
_PATIENCE = 600.0  # seconds for a lock that is held while rows are added: a second for a million


def key_of(content: str) -> bytes:
    """The key of a picture, from what `Pairs.contents` says of it."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()


def keys_there(folder: Path) -> list[bytes]:
    """The pictures of the table in `folder`, by row; of none that is there, none."""
    path = folder / "contents"
    _refuse_foreign(folder)
    written = path.read_bytes() if path.is_file() else b""
    return [written[begin : begin + _KEY] for begin in range(0, len(written) - _KEY + 1, _KEY)]


def filled_there(folder: Path, rows: int) -> NDArray[np.bool_]:
    """Which of the first `rows` rows of the table in `folder` are filled: bool (rows,)."""
    path, filled = folder / "marks", np.zeros(rows, bool)
    marks = np.fromfile(path, "<i8", rows) if path.is_file() else np.empty(0, np.int64)
    filled[: len(marks)] = (marks & _FILLED).astype(bool)
    return filled


class Table:
    """The table in a folder, as one process sees it; made, and its missing pictures added, by `opened`.

    For any number of processes and threads at a time. Crosses to a worker process by fork or by pickle.
    """

    def __init__(self, folder: Path, shape: Shape, keys: Sequence[bytes]) -> None:
        self.folder, self.shape = folder, shape
        self.row_bytes = int(np.prod(shape))
        self._keys = keys
        self._sound = np.zeros(len(keys), bool)  # compared with its checksum by this process
        self._damaged: set[int] = set()
        self._handles = threading.local()
        self._mended_before = self._marked_mended()

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._handles = threading.local()

    def read(self, row: int, picture_3HW: NDArray[np.uint8]) -> bool:
        """Read row `row` into a contiguous uint8 (3, H, W); False where it is not filled, or damaged."""
        if self._sound[row]:
            return self._read(row, picture_3HW)
        mark = self._mark(row)
        if not mark & _FILLED:
            return False
        whole = self._read(row, picture_3HW) and mark & ~_MENDED == self._checksum(row, picture_3HW)
        if whole:
            self._sound[row] = True
        else:
            self._damaged.add(row)
        return whole

    def write(self, row: int, picture_3HW: NDArray[np.uint8]) -> None:
        """Write row `row`, its mark last; nothing where another process has written it meanwhile.

        Raises
        ------
        UserError
            The disk is full, or the table cannot be written to.
        """
        mark = self._checksum(row, picture_3HW)
        mended = row in self._damaged
        if not mended and self._mark(row) & ~_MENDED == mark:
            return
        with files.disk_errors(self.folder):
            self._put("pixels", row * self.row_bytes, np.ascontiguousarray(picture_3HW).tobytes())
            self._put("marks", row * 8, (mark | _MENDED * mended).to_bytes(8, "little"))
        self._damaged.discard(row)

    def filled(self) -> NDArray[np.bool_]:
        """Which rows are filled, by any process: bool (U,). A damaged one counts until it is read."""
        return filled_there(self.folder, len(self))

    def mended(self) -> int:
        """Damaged rows that were decoded again since this process opened the table, by any process."""
        return self._marked_mended() - self._mended_before

    def _marked_mended(self) -> int:
        return int(np.count_nonzero(np.fromfile(self.folder / "marks", "<i8", len(self)) & _MENDED))

    def _mark(self, row: int) -> int:
        stream = self._stream("marks")
        stream.seek(row * 8)
        return int.from_bytes(stream.read(8), "little")

    def _read(self, row: int, picture_3HW: NDArray[np.uint8]) -> bool:
        stream = self._stream("pixels")
        stream.seek(row * self.row_bytes)
        return bool(stream.readinto(picture_3HW.data) == self.row_bytes)

    def _put(self, name: str, at: int, written: bytes) -> None:
        stream = self._stream(name)
        stream.seek(at)
        while written:  # the system may take less than it is given, as before a full disk
            written = written[stream.write(written) :]

    def _checksum(self, row: int, picture_3HW: NDArray[np.uint8]) -> int:
        """A mark for these pixels: of the picture too, so that a row of another one is never taken for it."""
        return _FILLED | zlib.crc32(np.ascontiguousarray(picture_3HW).data, zlib.crc32(self._keys[row]))

    def _stream(self, name: str) -> Any:
        """An unbuffered file of this thread in this process: one that a fork shares has one position for both."""
        held = self._handles.__dict__
        if held.get("process") != os.getpid():
            held.clear()
            held["process"] = os.getpid()
        if name not in held:
            with files.disk_errors(self.folder):
                held[name] = (self.folder / name).open("r+b", buffering=0)
        return held[name]


def opened(folder: Path, shape: Shape, keys: Sequence[bytes], about: str = "") -> tuple[Table, NDArray[np.int64]]:
    """The table in `folder` with a row for each of `keys`, and which row that is: int64, one for each key.

    A new one is told apart from others by people by `about`, in `about.json`.

    Pictures that it lacks are added behind the others; files cut short, by whatever, are made long enough again, with
    rows that are not filled.

    Raises
    ------
    UserError
        The folder cannot be written to, or another process holds it for ten minutes.
    """
    _refuse_foreign(folder)
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / "lock", timeout=_PATIENCE):
                there = keys_there(folder)
                row_of = {key: row for row, key in enumerate(there)}
                new = [key for key in dict.fromkeys(keys) if key not in row_of]
                row_of |= {key: row for row, key in enumerate(new, start=len(there))}
                whole = [*there, *new]
                _lengthen(folder / "marks", len(whole) * 8)
                _lengthen(folder / "pixels", len(whole) * int(np.prod(shape)))
                with (folder / "contents").open("ab") as stream:
                    stream.truncate(len(there) * _KEY)  # a crash may have cut the last one
                    stream.write(b"".join(new))
                if not (folder / "about.json").is_file():
                    files.write_json(folder / "about.json", {"shape": shape, "settings": about})
        except Timeout:
            raise UserError(
                f"{folder / 'lock'} is held by another process for more than {_PATIENCE:.0f} s",
                "wait for it, or end it and try again",
                ExitCode.SYSTEM,
            ) from None
    return Table(folder, shape, whole), np.array([row_of[key] for key in keys], np.int64)


def _refuse_foreign(folder: Path) -> None:
    """A table may have come with the data: through a link in it another file would be read, or written over."""
    for path in (folder, *(folder / name for name in _FILES)):
        of_its_kind = path.is_dir() if path == folder else path.is_file()
        if path.is_symlink() or (path.exists() and not of_its_kind):
            raise UserError(
                f"{path} is no part of a cache, but a link, pipe, device or folder",
                f"delete {folder}: it is made anew",
                ExitCode.DATA,
            )


def _lengthen(path: Path, size: int) -> None:
    with path.open("ab") as stream:
        if stream.tell() < size:
            stream.truncate(size)


@dataclass(frozen=True)
class Decoded:
    """The rows of N pairs in one or more tables.

    Parameters
    ----------
    table_of, row_of
        int64 (N,): where the picture of each pair is.
    """

    tables: tuple[Table, ...]
    table_of: NDArray[np.int64]
    row_of: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row_of)

    @property
    def shape(self) -> Shape:
        return self.tables[0].shape

    def read(self, pair: int, picture_3HW: NDArray[np.uint8]) -> bool:
        """`Table.read` of the picture of pair `pair`."""
        return self.tables[int(self.table_of[pair])].read(int(self.row_of[pair]), picture_3HW)

    def write(self, pair: int, picture_3HW: NDArray[np.uint8]) -> None:
        """`Table.write` of the picture of pair `pair`."""
        self.tables[int(self.table_of[pair])].write(int(self.row_of[pair]), picture_3HW)

    def missing(self) -> NDArray[np.int64]:
        """Pairs whose picture is not filled, the first of each picture."""
        begins = np.cumsum([0, *(len(table) for table in self.tables)])
        filled = np.concatenate([table.filled() for table in self.tables])
        rows = begins[self.table_of] + self.row_of
        pairs = np.flatnonzero(~filled[rows])
        return pairs[np.sort(np.unique(rows[pairs], return_index=True)[1])]

    def mended(self) -> int:
        """`Table.mended` of all of them."""
        return sum(table.mended() for table in self.tables)

    def take(self, pairs: NDArray[np.int64]) -> Decoded:
        """Of the pairs at `pairs` only."""
        return replace(self, table_of=self.table_of[pairs], row_of=self.row_of[pairs])


def joined(parts: Sequence[Decoded]) -> Decoded:
    """Of several sets of pairs behind one another."""
    begins = np.cumsum([0, *(len(part.tables) for part in parts)])
    return Decoded(
        tuple(table for part in parts for table in part.tables),
        np.concatenate([part.table_of + begin for part, begin in zip(parts, begins[:-1], strict=True)]),
        np.concatenate([part.row_of for part in parts]),
    )
