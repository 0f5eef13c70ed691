"""Files that are whole or not there: write beside, fsync, rename; locks that die with their process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from cytoclip.errors import ExitCode, UserError

CACHE = ".cytoclip"  # in a folder of data


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes of a file from `offset` on, such as one member of a tar: a file within a file."""

    path: Path
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path} at byte {self.offset}"


def cache_folder(beside: Path) -> Path:
    """Where what was computed from the data in folder `beside` is kept: there, or where nobody may write, at home.

    Everything in it can be deleted at any time. A link is not followed: data from elsewhere may hold one.
    """
    inside = beside / CACHE
    if not _leads_away(inside) and os.access(inside if inside.is_dir() else beside, os.W_OK):
        return inside
    real = os.path.realpath(beside)  # one place, however it is named
    return home_cache() / hashlib.sha256(os.fsencode(real)).hexdigest()[:16]


def home_cache() -> Path:
    """Where what belongs to no data is kept; it can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cytoclip"


def _leads_away(inside: Path) -> bool:
    if inside.is_symlink() or not inside.is_dir():
        return inside.is_symlink()
    with os.scandir(inside) as entries:
        return any(entry.is_symlink() for entry in entries)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, written: bytes) -> None:
    """Write a whole file or leave the old one: a crash at any moment leaves one of the two."""
    beside = path.with_name(f".{path.name}.new")
    with disk_errors(path):
        _make(path.parent)
        with beside.open("wb") as stream:
            stream.write(written)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
        _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; on a clean exit it takes the place of `path`, on any error nothing changes.

    Two folders cannot be exchanged in one portable step, so the old one waits under another name until the new one
    stands; `recover` brings it back if the process died between the two renames.
    """
    beside = path.with_name(f".{path.name}.new")
    with disk_errors(path):
        recover(path)
        shutil.rmtree(beside, ignore_errors=True)
        _make(beside)
        try:
            yield beside
            _sync_tree(beside)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old(path))
        beside.rename(path)
        _sync_folder(path.parent)
        shutil.rmtree(old(path), ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to fill; on a clean exit it stands at `path`, on any error nothing does.

    Two processes that fill the same one don't meet: each writes beside it under a name of its own.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    with disk_errors(path):
        _make(path.parent)
        try:
            with beside.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
            _sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def old(path: Path) -> Path:
    """Where the folder at `path` waits while `whole_folder` puts another in its place."""
    return path.with_name(f".{path.name}.old")


def recover(path: Path) -> None:
    """Undo a replacement of `path` that a crash cut in half. Only for its one writer: a reader would break it."""
    if old(path).exists():
        if path.exists():
            shutil.rmtree(old(path))
        else:
            old(path).rename(path)


def remove(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves nothing under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def remove_empty(folder: Path, keep: Path | None = None) -> None:
    """Delete a folder and its parents, as long as nothing is in them and up to `keep`, which stays."""
    while folder != keep and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


@contextmanager
def lock(path: Path, busy: UserError, wait: float = 0) -> Iterator[None]:
    """Hold `path` as a lock (the system frees it when the process dies); raises `busy` when another one holds it, and
    still does after `wait` seconds.
    """
    held = FileLock(path)
    try:
        with disk_errors(path):
            _make(path.parent)
            held.acquire(timeout=wait)
    except Timeout:
        raise busy from None
    try:
        yield
    finally:
        held.release()


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds `path` or, if it is not there yet, its nearest existing parent."""
    return shutil.disk_usage(existing(path)).free


def existing(path: Path) -> Path:
    """`path` itself, absolute, or if it is not there the nearest of its parents that is."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return there


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into a message; libraries hide the error number in their text."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOSPC or "No space left on device" in str(error):
            raise UserError(
                f"no space left on the disk while writing {path}",
                "free some space and run the same command again: what was saved before is whole",
                ExitCode.SYSTEM,
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {path}: {os.strerror(number)}", "name a folder that you may write to", ExitCode.SYSTEM
            ) from error
        raise


def _make(folder: Path) -> None:
    """A folder with its parents; where there is no place for one, as in /proc, the system calls it not found."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise PermissionError(errno.EPERM, f"no folder can be made: {error.strerror}", str(folder)) from error


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
