"""One full look at every picture, in processes of their own, remembered for as long as the file stays as it is."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from multiprocessing import connection
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageFile
from pyarrow import parquet

from cytoclip import files, identifiers, images
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece

Place = Path | Piece

DIED = "ended the process that decoded it: out of memory, or more than 120 seconds"

DATED = " (date)"  # behind the name of a field of metadata in which nothing but a day was found

_VERSION = "2"  # of what a look finds: another one forgets what is remembered
_SECONDS = 120
_CHUNK = 8  # files given to a worker at once: what a worker that dies may have had in hand
_SAVE_EVERY = 300.0  # seconds
_MOST = 50  # times as many files as there are now that are remembered: what came with the data may claim any number
_HASHED = 128  # pixels of the shorter side that are left for the hash, which reads 32
_THUMB = 16
# What each hash leaves out at left, top, right and bottom, as shares: a copy that was cropped has the hash of a part.
# One hash finds 75 % of copies without 2 % at two sides, two (the second without a margin) 92 %, these six all.
_M = 0.01
_PARTS = ((0, 0, 0, 0), (_M, _M, _M, _M), (_M, _M, 0, 0), (0, _M, _M, 0), (_M, 0, 0, _M), (0, 0, _M, _M))


@dataclass(frozen=True, slots=True)
class Look:
    """What one file is. All but `content` and `problem` are empty where there is a problem.

    Parameters
    ----------
    content
        SHA-256 of its bytes; empty where they could not be read.
    problem
        As `images.scan` puts it, or None.
    format
        Pillow's name of it.
    mode, depth
        Pillow's mode of the first page, and bits a channel, as they are stored.
    used
        Bits that the highest value takes; fewer than `depth` where a camera of 12 bits was stored in 16.
    transparent
        Some pixel lets the background through.
    orientation
        EXIF's, 1 for upright.
    several
        There is more than one page or frame.
    width, height
        Of the upright picture.
    spread
        Standard deviation of its grey levels (0..255) at about 128 pixels.
    hashes
        pHash (64 bits of a discrete cosine transform) of the whole, and of it without a hundredth at some sides.
    thumb
        16×16 grey levels: what tells whether two pictures of nearly equal hashes are alike.
    personal
        Names of the fields of metadata that may identify a person, or a day (they end with `DATED`).
    """

    content: str
    problem: str | None
    format: str = ""
    mode: str = ""
    depth: int = 0
    used: int = 0
    transparent: bool = False
    orientation: int = 1
    several: bool = False
    width: int = 0
    height: int = 0
    spread: float = 0.0
    hashes: tuple[int, ...] = ()
    thumb: bytes = b""
    personal: tuple[str, ...] = ()


def look_at(places: Sequence[Place], root: Path, console: Console) -> list[Look]:
    """Decode every file in full, all cores at work; those looked at before and unchanged are not read again.

    A file that ends its process, or holds it for too long, is that file's problem. What was found lies in
    `files.cache_folder(root)`, keyed by path, size and time of change, and is kept when the work is interrupted.
    """
    cache = files.cache_folder(root) / "looks.parquet"
    known = _read(cache, _MOST * len(places))
    keys = [_key(place) for place in places]
    looks: list[Look | None] = [known.get(key) if key else None for key in keys]
    waiting = [i for i, look in enumerate(looks) if look is None]
    saved = time.monotonic()
    try:
        with console.progress("decoding every picture", len(places), len(places) - len(waiting)) as bar:
            for i, look in _in_processes(places, waiting):
                looks[i] = look
                bar.advance()
                if time.monotonic() - saved > _SAVE_EVERY:
                    _write(cache, keys, looks)
                    saved = time.monotonic()
    finally:
        if waiting:
            _write(cache, keys, looks)
    return [look for look in looks if look is not None]


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def look(place: Place) -> Look:
    """The look at one file, in this process."""
    scan, found = images.examine(place, _facts)
    return Look(scan.content, scan.problem, **(found or {}))


def _facts(image: ImageFile.ImageFile) -> dict[str, Any]:
    depth = _depth(image)
    stored = {"format": image.format or "", "mode": image.mode, "depth": depth}
    plain = images.normalise(image)
    reduced = plain.reduce(max(1, min(plain.size) // _HASHED)).convert("L")
    return {
        **stored,
        "used": _used(image, depth),
        "transparent": _see_through(image),
        "orientation": _orientation(image),
        "several": bool(getattr(image, "is_animated", False)),
        "width": plain.width,
        "height": plain.height,
        "spread": round(float(np.asarray(reduced).std()), 3),
        "hashes": tuple(_hash(reduced, part) for part in _PARTS),
        "thumb": reduced.resize((_THUMB, _THUMB), Image.Resampling.BOX).tobytes(),
        "personal": _personal(image),
    }


def _hash(grey: Image.Image, part: Sequence[float]) -> int:
    left, top, right, bottom = part
    box = (grey.width * left, grey.height * top, grey.width * (1 - right), grey.height * (1 - bottom))
    small = grey.resize((32, 32), Image.Resampling.LANCZOS, box=box)  # the size and filter of phash itself
    return int.from_bytes(np.packbits(imagehash.phash(small).hash).tobytes(), "big")


def _depth(image: ImageFile.ImageFile) -> int:
    """Bits a channel as stored, where Pillow tells; it brings 16-bit colour to 8 when it decodes."""
    if image.mode == "F":
        return 32
    bits = getattr(image, "tag_v2", {}).get(258)
    if bits:
        return int(max(np.ravel(bits)))
    if image.mode == "1":
        return 1
    tile = getattr(image, "tile", None)
    return 16 if image.mode.startswith("I") or (tile and ";16" in str(tile[0].args)) else 8


def _used(image: Image.Image, depth: int) -> int:
    """Of 16 bits that are scaled from their whole range, those that the highest value takes; of others, all."""
    if depth != 16:
        return depth
    if image.mode.startswith("I"):
        low, high = images.stored_range(image) or (0, 0)
        return int(np.asarray(image).max()).bit_length() if (low, high) == (0, 65535) else depth
    shown = [band for band in image.getbands() if band not in "Aa"]
    highest = max(image.getchannel(band).getextrema()[1] for band in shown)  # the upper 8 bits: Pillow keeps no more
    return 8 + int(highest).bit_length()  # type: ignore[arg-type]


def _see_through(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    key = image.info.get("transparency")
    try:
        if image.mode.startswith("I"):
            return bool((np.asarray(image) == key).any())
        lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    except (ValueError, TypeError):  # a transparent colour that Pillow does not convert
        return True
    return bool(lowest < 255)  # type: ignore[operator]


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata raises nearly every kind
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_TELLING = {"Artist", "CameraOwnerName", "BodySerialNumber"}
_DATED = {"DateTime", "DateTimeOriginal", "DateTimeDigitized"}
_ADDRESS = re.compile(r"https?://\S+")  # of a program or a schema, whose years and numbers are nobody's


def _personal(image: Image.Image) -> tuple[str, ...]:
    """Names of fields, never their values: those that always tell, and free text in which something is found."""
    try:
        exif = image.getexif()
        tags = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
        places = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except Exception:  # broken metadata raises nearly every kind
        tags, places = {}, {}
    named = {f"EXIF {ExifTags.TAGS.get(tag, f'tag {tag}')}": value for tag, value in tags.items()}
    named |= {f"{image.format} {key}": value for key, value in image.info.items() if key not in ("exif", "icc_profile")}
    told = {"EXIF GPS position"} if places else set()
    for name, value in named.items():
        field = name.partition(" ")[2]
        text = _ADDRESS.sub(" ", _text(value))
        kinds = {*identifiers.found(text), *identifiers.found(f"{field}: {text}")} if text else set()
        if field in _TELLING and text.strip("\0 "):
            kinds.add("name")
        if field in _DATED and text.strip("\0 0:-"):
            kinds.add("date")
        if kinds:
            plain = "".join(character for character in name[:40] if character.isprintable())
            told.add(plain + DATED if kinds == {"date"} else plain)
    return tuple(sorted(told))


def _text(value: object) -> str:
    if isinstance(value, bytes):
        wide = value[1:2] == b"\0"  # Windows' fields are UTF-16
        return value[:20_000].decode("utf-16-le" if wide else "utf-8", "ignore")
    return value[:20_000] if isinstance(value, str) else ""


def _in_processes(places: Sequence[Place], waiting: Sequence[int]) -> Iterator[tuple[int, Look]]:
    """The looks at `places[i]` as they come. Where a process died, what it may have had in hand is tried one by one."""
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload([__name__])  # so that a new process starts in milliseconds
    chunks = deque(waiting[i : i + _CHUNK] for i in range(0, len(waiting), _CHUNK))
    workers = min(cores(), 61)
    while chunks:
        suspects: list[int] = []
        with ProcessPoolExecutor(min(workers, len(chunks)), context, _begin) as pool:
            yield from _until_one_dies(pool, places, chunks, 3 * workers, suspects)
        for i in suspects:
            yield i, _alone(places[i], context)


def _until_one_dies(
    pool: ProcessPoolExecutor, places: Sequence[Place], chunks: deque[Sequence[int]], ahead: int, suspects: list[int]
) -> Iterator[tuple[int, Look]]:
    running: dict[Future[list[Look]], Sequence[int]] = {}
    while chunks or running:
        while chunks and len(running) < ahead and not suspects:
            chunk = chunks.popleft()
            try:
                running[pool.submit(_chunk, [places[i] for i in chunk])] = chunk
            except BrokenProcessPool:  # between two looks at what is done
                suspects.extend(chunk)
        if suspects and not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            chunk = running.pop(future)
            try:
                yield from zip(chunk, future.result(), strict=True)
            except BrokenProcessPool:
                suspects.extend(chunk)


def _alone(place: Place, context: Any) -> Look:
    with ProcessPoolExecutor(1, context, _begin) as pool:
        try:
            return pool.submit(_chunk, [place]).result()[0]
        except BrokenProcessPool:
            pass
    with ProcessPoolExecutor(1, context, _begin) as pool:
        try:
            pool.submit(_chunk, []).result()
        except BrokenProcessPool:
            raise UserError(
                "no process can be started that decodes pictures",
                "free some memory; in a script of your own, keep its work below `if __name__ == '__main__':`",
                ExitCode.SYSTEM,
            ) from None
    return Look("", DIED)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the pool
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    connection.wait([parent])
    os._exit(1)


def _chunk(places: Sequence[Place]) -> list[Look]:
    found = []
    for place in places:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        found.append(look(place))
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found


_Key = tuple[str, int, int, int, int]  # path, offset and size of the piece, size and time of change of the file


def _key(place: Place) -> _Key | None:
    path, offset, size = (place.path, place.offset, place.size) if isinstance(place, Piece) else (place, 0, -1)
    try:
        facts = path.stat()
    except (OSError, ValueError):
        return None
    return str(path), offset, size, facts.st_size, facts.st_mtime_ns


_COLUMNS = ("path", "offset", "piece", "size", "changed")


def _read(cache: Path, most: int) -> dict[_Key, Look]:
    try:
        if not stat.S_ISREG(cache.lstat().st_mode) or parquet.read_metadata(cache).num_rows > most:
            return {}
        table = parquet.read_table(cache)
        if (table.schema.metadata or {}).get(b"version") != _VERSION.encode() or not table.schema.equals(_schema()):
            return {}
        columns = {name: table.column(name).to_pylist() for name in (*_COLUMNS, *_names())}
        columns["hashes"] = [tuple(int(one, 16) for one in row) for row in columns["hashes"]]
        columns["personal"] = [tuple(row) for row in columns["personal"]]
        keys = zip(*(columns[name] for name in _COLUMNS), strict=True)
        looks = [Look(*values) for values in zip(*(columns[name] for name in _names()), strict=True)]
        found = dict(zip(keys, looks, strict=True))
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):  # not there, or not ours: all are looked at
        return {}
    return found if all(_is_whole(look) for look in looks) else {}


def _is_whole(look: Look) -> bool:
    """Whether it is one that `look` could have made: what is remembered may have come with the data."""
    numbers = (look.width, look.height, look.depth, look.used, look.orientation)
    texts = look.content, look.format, look.mode
    known = None not in (*numbers, *texts, look.spread, look.transparent, look.several, *look.personal)
    if not known or look.problem is not None:
        return known
    return (
        len(look.hashes) == len(_PARTS)
        and max(look.hashes) < 1 << 64
        and len(look.thumb or b"") == _THUMB**2
        and min(look.width, look.height) > 0
    )


def _write(cache: Path, keys: Sequence[_Key | None], looks: Sequence[Look | None]) -> None:
    """Those whose bytes were read: whatever kept the others from it may be gone next time."""
    kept = {key: look for key, look in zip(keys, looks, strict=True) if key and look and look.content}
    columns: dict[str, Any] = {name: [key[i] for key in kept] for i, name in enumerate(_COLUMNS)}
    columns |= {name: [getattr(look, name) for look in kept.values()] for name in _names()}
    columns["hashes"] = [[f"{one:016x}" for one in row] for row in columns["hashes"]]  # beyond int64
    try:
        with files.whole_file(cache) as stream:
            parquet.write_table(pa.table(columns, schema=_schema()), stream, compression="zstd")
    except (UserError, ValueError):
        pass  # a disk that is full or not ours, or a name that is no text: the next check looks again


def _schema() -> pa.Schema:
    return pa.schema([(name, _TYPES.get(name, pa.string())) for name in (*_COLUMNS, *_names())], {"version": _VERSION})


def _names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(Look))


_TEXTS = pa.list_(pa.string())
_TYPES = {name: pa.int64() for name in (*_COLUMNS[1:], "depth", "used", "orientation", "width", "height")}
_TYPES |= {"spread": pa.float64(), "hashes": _TEXTS, "personal": _TEXTS, "thumb": pa.binary()}
_TYPES |= {"transparent": pa.bool_(), "several": pa.bool_()}
