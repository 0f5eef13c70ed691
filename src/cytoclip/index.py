"""Make an index: embed every picture of a place, and its captions, once.

Each process takes its share of the pictures and writes a shard whenever it has 8,192 of them or a minute has passed;
the first process then writes the manifest that names the shards, and from that moment on the index is the new one.
What a run that was killed has written is found by the next one, which embeds what is missing: going on is the same as
adding to an index that is there.

**What is embedded.** A picture whose file has the size and time of change that the index remembers keeps its row, and
is not opened. Else its bytes are hashed, and it is embedded where the index has no picture of those bytes. A time of
change tells nothing of a file that was still young when it was read (two changes within a clock's tick look the same),
so such a one is hashed again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cytoclip import encoder, entries, files, images, liveness, manifest, model, pixels, vector_shards
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.entries import Entry
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.files import Piece
from cytoclip.manifest import Manifest, Shard, Side
from cytoclip.rows import Columns
from cytoclip.vector_shards import ROWS, Header, Row

SECONDS = 60.0  # of work that is lost at most where a process is killed
YOUNG = 2.0  # seconds after a change in which another one may leave the same time, on the coarsest file systems
FEW = 64  # small shards, which many additions leave, that are put together
_AHEAD = 4  # batches that are decoded before they are embedded
_HELD = 8  # shards whose embeddings are held while rows are carried over
_CAPTIONS = 16_384  # embeddings of captions that are remembered: 32 MB of 512 dimensions
_TOLD = 1000  # bad pictures that are named; more are only counted


@dataclass(frozen=True)
class How:
    """How to go about it.

    Parameters
    ----------
    columns
        Of tables; what is not named is guessed.
    batch_size
        Pictures or captions embedded at once.
    device, precision
        As of `encoder.load`.
    rebuild
        Embed everything anew, whatever the index there holds and whatever model made it.
    """

    columns: Columns = Columns()
    batch_size: int = 64
    device: str = "auto"
    precision: str = "no"
    rebuild: bool = False


@dataclass(frozen=True)
class Built:
    """What came of it, for people: pictures embedded, taken over, left out."""

    manifest: Manifest
    embedded: int
    kept: int
    removed: int
    skipped: int

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        counts = {"embedded": self.embedded, "kept": self.kept, "removed": self.removed, "skipped": self.skipped}
        return {"schema": 1, **counts, "index": manifest.document(self.manifest)}

    def text(self, folder: Path) -> str:
        """One line."""
        held = self.manifest
        return (
            f"{folder}: {counted(held.pictures, 'picture')}, {counted(held.captions, 'different caption')}; "
            f"{self.embedded} embedded, {self.kept} kept, {self.removed} removed, {self.skipped} left out"
        )


def build(model_name: str | Path, source: str | Path, to: str | Path, console: Console, how: How = How()) -> Built:  # noqa: B008 - frozen
    """Make the index `to` of the pictures at `source`, or bring the one that is there up to date.

    Raises
    ------
    UserError
        For a model or place that cannot be used, an index that another model made, one that another process writes,
        or where not one picture can be used.
    """
    folder = Path(to)
    made = encoder.load(model_name, how.device, how.precision)
    world = made.world
    with liveness.watched(world):
        lock = _Lock(folder)
        try:
            world.once(lambda: lock.take(made, how))
            return _build(made, Path(source), folder, console, how)
        finally:
            lock.release()


def weights_of(made: Encoder) -> str:
    """What must be the same in a query's model: weights and how pictures and texts are read, at any precision."""
    read = made.opened
    return model.digest_of(read.encoder.clip, read.pixels, read.context)


class _Lock:
    """Held by the first process: an index has one writer."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, None  # type: Path, Any

    def take(self, made: Encoder, how: How) -> None:
        folder = self._folder
        there = manifest.read(folder)
        if there and there.model.digest != made.digest and not how.rebuild:
            same = there.model.weights == weights_of(made)
            why = f"at precision {there.model.precision}" if same else f"by {there.model.name}, of other weights"
            raise UserError(
                f"{folder} was made {why}",
                "--rebuild embeds everything anew; or name another folder, or that model",
                ExitCode.MODEL,
            )
        if not there and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder", "name another folder for the index")
        ours = {manifest.NAME, "shards", "faiss", ".lock", f".{manifest.NAME}.new"}
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours) if folder.is_dir() else []
        if not there and foreign:
            raise UserError(
                f"{folder} holds files that are no index: {first_few(foreign)}", "name an empty or a new folder"
            )
        busy = UserError(f"{folder} is being written by another process", "wait for it", ExitCode.SYSTEM)
        self._held = files.lock(folder / ".lock", busy)
        self._held.__enter__()

    def release(self) -> None:
        if self._held is not None:
            self._held.__exit__(None, None, None)


class _Place(NamedTuple):
    """A row of a shard."""

    shard: int
    row: int


@dataclass(frozen=True)
class _Known:
    """The rows that are there already, of the index and of a run that was cut off.

    Parameters
    ----------
    shards
        Names, with the rows of each.
    at
        Of an id its row and what was said of it.
    of_content
        Of a picture's hash a row.
    """

    shards: list[Shard]
    at: dict[int, tuple[_Place, int]]
    of_content: dict[str, _Place]


class _Work(NamedTuple):
    """A picture to be written: `known` is its row where the file is as it was, and `about` what that said."""

    entry: Entry
    root: int | None
    file: str
    known: _Place | None = None
    about: int = 0


class _Looked(NamedTuple):
    """A picture that was looked at: where the index has its embedding, else its pixels, else what is wrong with it."""

    row: Row | None
    place: _Place | None
    pixels: NDArray[np.uint8] | None
    problem: str | None
    same: bool = False  # its captions' embeddings are those at `place` too


def _build(made: Encoder, source: Path, folder: Path, console: Console, how: How) -> Built:
    world = made.world
    there = world.once(lambda: manifest.read(folder))
    listed = world.once(lambda: entries.listed(source, how.columns, console))
    roots = world.once(lambda: _roots(listed, source, there))
    header = Header(made.digest, tuple(roots))
    names = world.once(lambda: _usable(folder, header, made.width, there, how))
    known = _known(folder, names, made.width)
    kept, work = _planned(listed, roots, known)
    console.say(
        f"{counted(len(listed), 'picture')} of {source} on {world.device.type}, precision {world.precision}, "
        f"{counted(world.size, 'process', 'processes')}: {len(listed) - len(work)} are as they were"
    )
    share = [work[int(at)] for at in np.array_split(np.arange(len(work)), world.size)[world.rank]]
    writer = _Writer(folder, header, known, made, how)
    with console.progress("embedding pictures", len(share)) as bar:
        for looked in _looked(share, known, folder, made, how):
            writer.add(looked)
            bar.advance()
    writer.finish()
    written = world.listed([writer.said])
    skipped = [each for one in written for each in one.skipped]
    bad = sum(one.bad for one in written)
    if bad:
        console.warn(f"{counted(bad, 'picture')} of {len(listed)} cannot be used: {first_few(skipped)}")

    def commit() -> Manifest:
        shards = [*kept, *(shard for one in written for shard in one.shards)]
        return _commit(folder, shards, roots, bad, made, there)

    new = world.once(commit)
    before = there.pictures if there else 0
    embedded = sum(one.embedded for one in written)
    kept_rows = new.pictures - sum(one.fresh for one in written)
    return Built(new, embedded, kept_rows, max(0, before - kept_rows), bad)


def _roots(listed: Sequence[Entry], source: Path, there: Manifest | None) -> list[str]:
    """Those of the index that is there first, so that its rows keep their numbers."""
    roots = dict.fromkeys(there.roots if there else ())
    first = str(entries.root_of(source))
    paths = [place.path if isinstance(place, Piece) else place for place, *_ in listed if not isinstance(place, bytes)]
    if any(path.is_relative_to(first) for path in paths):
        roots.setdefault(first)
    for path in paths:
        if not path.is_relative_to(first):
            roots.setdefault(str(path.parent))
    return list(roots)


def _usable(folder: Path, header: Header, width: int, there: Manifest | None, how: How) -> list[Shard]:
    """Shards whose embeddings are this model's: of the index, and of a run that was cut off."""
    listed = {shard.name for shard in there.shards} if there else set()
    found = []
    for path in sorted((folder / "shards").glob("*.parquet")):
        said = vector_shards.describe(path)
        if said is None or said[0].model != header.model or said[2] != width:
            continue
        if said[0].roots != header.roots[: len(said[0].roots)]:
            continue  # its numbers mean other folders
        if not (how.rebuild and path.name in listed):
            found.append(Shard(path.name, said[1]))
    return found


def _known(folder: Path, shards: list[Shard], width: int) -> _Known:
    at: dict[int, tuple[_Place, int]] = {}
    of_content: dict[str, _Place] = {}
    for number, shard in enumerate(shards):
        path = manifest.shard_path(folder, shard.name)
        table = vector_shards.read(path, shard.rows, width, ["id", "about", "content"])
        columns = (table[name].to_pylist() for name in ("id", "about", "content"))
        for row, (own, about, content) in enumerate(zip(*columns, strict=True)):
            at[own] = _Place(number, row), about
            of_content[content] = _Place(number, row)
    return _Known(shards, at, of_content)


def _planned(listed: Sequence[Entry], roots: Sequence[str], known: _Known) -> tuple[list[Shard], list[_Work]]:
    """The shards that stay as they are, and the pictures whose rows are to be written."""
    todo: list[_Work] = []
    same: dict[_Place, _Work] = {}
    for entry in listed:
        root, file = _where(entry, roots)
        found = known.at.get(vector_shards.identity(root, file, _offset(entry)))
        if found is not None and found[1] == _about(entry, root, file, _stamp(entry)):
            same[found[0]] = _Work(entry, root, file, *found)
        else:
            todo.append(_Work(entry, root, file))
    rows_of = [0] * len(known.shards)
    for place in same:
        rows_of[place.shard] += 1
    whole = [count == shard.rows for count, shard in zip(rows_of, known.shards, strict=True)]
    small = [number for number, shard in enumerate(known.shards) if whole[number] and shard.rows < ROWS // 4]
    if len(small) > FEW:
        for number in small:
            whole[number] = False
    carried = [work for place, work in same.items() if not whole[place.shard]]
    return [shard for number, shard in enumerate(known.shards) if whole[number]], [*carried, *todo]


def _where(entry: Entry, roots: Sequence[str]) -> tuple[int | None, str]:
    if isinstance(entry.place, bytes):
        return None, entry.name
    found = vector_shards.relative(entry.place, roots)
    assert found is not None  # noqa: S101 - `_roots` made one for each
    return found


def _offset(entry: Entry) -> int | None:
    return entry.place.offset if isinstance(entry.place, Piece) else None


def _stamp(entry: Entry) -> tuple[int, int] | None:
    """Size and time of change of the file; None where it is not there, or at an address."""
    if isinstance(entry.place, bytes):
        return None
    path = entry.place.path if isinstance(entry.place, Piece) else entry.place
    try:
        facts = os.stat(path)  # noqa: PTH116 - a million of them
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def _about(entry: Entry, root: int | None, file: str, stamp: tuple[int, int] | None) -> int:
    """A digest of all that is said of a picture; 0, which is never equal to one kept, where its file tells nothing."""
    if stamp is None:
        return 0
    piece = (entry.place.offset, entry.place.size) if isinstance(entry.place, Piece) else None
    return vector_shards.digest(root, file, piece, entry[1:], stamp)


def _looked(share: Sequence[_Work], known: _Known, folder: Path, made: Encoder, how: How) -> Iterator[_Looked]:
    """Each picture in turn, looked at by threads a few batches ahead."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, (os.cpu_count() or 1) // here)
    ahead: deque[Future[_Looked]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
        try:
            for work in share:
                ahead.append(pool.submit(_look, work, known, made))
                if len(ahead) > _AHEAD * how.batch_size:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def _look(work: _Work, known: _Known, made: Encoder) -> _Looked:
    entry = work.entry
    if work.known is not None:
        return _Looked(_row(work, "", None)._replace(about=work.about), work.known, None, None, same=True)
    stamp = _stamp(entry)
    if stamp is not None and time.time() - stamp[1] / 1e9 < YOUNG:
        stamp = None
    place = entry.place
    if known.of_content:
        content = images.content_of(place)
        found = known.of_content.get(content)
        if found is not None:
            return _Looked(_row(work, content, stamp), found, None, None)
    spec = made.opened.pixels
    scan, ready = images.examine(place, lambda image: pixels.prepare(images.normalise(image), spec))
    if scan.problem:
        return _Looked(None, None, None, f"{entry.name} ({scan.problem})")
    return _Looked(_row(work, scan.content, stamp), None, ready, None)


def _row(work: _Work, content: str, stamp: tuple[int, int] | None) -> Row:
    entry, piece = work.entry, work.entry.place if isinstance(work.entry.place, Piece) else None
    return Row(
        vector_shards.identity(work.root, work.file, _offset(entry)),
        work.root,
        work.file,
        piece.offset if piece else None,
        piece.size if piece else None,
        entry.name,
        content,
        _about(entry, work.root, work.file, stamp),
        entry.captions,
        entry.source,
        entry.label,
        entry.group,
        json.dumps(dict(entry.extra), ensure_ascii=False, sort_keys=True) if entry.extra else None,
    )


@dataclass
class _Said:
    """What one process wrote.

    Parameters
    ----------
    fresh
        Rows whose pictures the index had not under this name, or had other bytes of.
    """

    shards: list[Shard]
    skipped: list[str]
    embedded: int = 0
    fresh: int = 0
    bad: int = 0


class _Writer:
    """Rows as they come, embedded batch by batch and written shard by shard."""

    def __init__(self, folder: Path, header: Header, known: _Known, made: Encoder, how: How) -> None:
        self._folder, self._header, self._made, self._how = folder, header, made, how
        self._old = _Old(folder, known, made.width)
        self._captions: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._rows: list[Row] = []
        self._vectors: list[NDArray[np.float32] | None] = []
        self._texts: list[NDArray[np.float32] | None] = []
        self._waiting: list[tuple[int, NDArray[np.uint8]]] = []
        self._began = time.monotonic()
        world = made.world
        self._number = max([-1, *(int(path.stem) for path in (folder / "shards").glob("*.parquet"))]) + 1 + world.rank
        world.wait()  # all have looked before one writes
        self.said = _Said([], [])

    def add(self, looked: _Looked) -> None:
        if looked.row is None:
            self.said.bad += 1
            if len(self.said.skipped) < _TOLD:
                self.said.skipped.append(str(looked.problem))
            return
        row, vector, texts = looked.row, None, None
        if looked.place is not None:
            vector = self._old.image(looked.place)
            if looked.same:
                row, texts = row._replace(content=self._old.content(looked.place)), self._old.texts(looked.place)
        if looked.pixels is not None:
            self._waiting.append((len(self._rows), looked.pixels))
        self.said.fresh += not looked.same
        self._rows.append(row)
        self._vectors.append(vector)
        self._texts.append(texts)
        if len(self._waiting) >= self._how.batch_size:
            self._embed()
        if len(self._rows) >= ROWS or (time.monotonic() - self._began > SECONDS and not self._waiting):
            self.finish()

    def finish(self) -> None:
        """Write what is held as a shard."""
        self._embed()
        if not self._rows:
            return
        texts = self._said_texts()
        name = f"{self._number:05}.parquet"
        vectors_ND = np.stack([vector for vector in self._vectors if vector is not None])
        vector_shards.write(manifest.shard_path(self._folder, name), self._header, self._rows, vectors_ND, texts)
        self.said.shards.append(Shard(name, len(self._rows)))
        self._number += self._made.world.size
        self._rows, self._vectors, self._texts, self._began = [], [], [], time.monotonic()

    def _embed(self) -> None:
        if not self._waiting:
            return
        rows, ready = zip(*self._waiting, strict=True)
        for row, vector_D in zip(rows, self._made.embed_pixels(np.stack(ready)), strict=True):
            self._vectors[row] = vector_D
        self.said.embedded += len(rows)
        self._waiting = []

    def _said_texts(self) -> list[NDArray[np.float32]]:
        """The embeddings (C, D) of each row's captions; each different caption is embedded once."""
        asked = [row.captions for row, texts in zip(self._rows, self._texts, strict=True) if texts is None]
        new = sorted({caption for captions in asked for caption in captions} - self._captions.keys(), key=len)
        if new:
            self._captions.update(zip(new, self._made.embed_texts(new, self._how.batch_size), strict=True))
        blank = np.empty((0, self._made.width), np.float32)
        found = [
            (np.stack([self._captions[caption] for caption in row.captions]) if row.captions else blank)
            if texts is None
            else texts
            for row, texts in zip(self._rows, self._texts, strict=True)
        ]
        while len(self._captions) > _CAPTIONS:
            self._captions.popitem(last=False)
        return found


class _Old:
    """Rows of the shards that are there, read back a shard at a time."""

    def __init__(self, folder: Path, known: _Known, width: int) -> None:
        self._folder, self._known, self._width = folder, known, width
        self._held: OrderedDict[tuple[str, int], Any] = OrderedDict()

    def image(self, place: _Place) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._of("images", place)[place.row]
        return found

    def texts(self, place: _Place) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._of("captions", place)[place.row][1]
        return found

    def content(self, place: _Place) -> str:
        return str(self._of("content", place)[place.row])

    def _of(self, what: str, place: _Place) -> Any:
        key = (what, place.shard)
        if key not in self._held:
            shard = self._known.shards[place.shard]
            path, rows = manifest.shard_path(self._folder, shard.name), shard.rows
            if what == "content":
                self._held[key] = vector_shards.read(path, rows, self._width, ["content"])["content"].to_pylist()
            else:
                reader = vector_shards.images if what == "images" else vector_shards.captions
                self._held[key] = reader(path, rows, self._width)
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def _commit(
    folder: Path, shards: list[Shard], roots: list[str], bad: int, made: Encoder, there: Manifest | None
) -> Manifest:
    """The new manifest in the place of the old one, then what it does not name is deleted."""
    shards = sorted(shards, key=lambda shard: int(shard.name.partition(".")[0]))
    pictures = sum(shard.rows for shard in shards)
    if not pictures:
        raise UserError("not one picture can be used", "cytoclip check says what is wrong with each", ExitCode.DATA)
    new = Manifest(
        model=manifest.Model(made.name, weights_of(made), made.digest, made.world.precision),
        width=made.width,
        pictures=pictures,
        captions=0,
        skipped=bad,
        roots=roots,
        shards=shards,
        images=Side(pictures),
        texts=Side(0),
        faiss="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: metadata.version(name) for name in ("cytoclip", "torch", "transformers", "pyarrow")},
    )
    if there is not None and replace(new, created=there.created, versions=there.versions) == there:
        return there
    manifest.write(folder, new)
    _clear(folder, new)
    return new


def _clear(folder: Path, new: Manifest) -> None:
    named = {shard.name for shard in new.shards}
    for path in (folder / "shards").iterdir():
        if path.name not in named:
            path.unlink(missing_ok=True)
    if (folder / "faiss").is_dir():
        for path in (folder / "faiss").iterdir():
            if path.name != new.faiss:
                shutil.rmtree(path, ignore_errors=True)
