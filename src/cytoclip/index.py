"""Make an index: embed every picture of a place, and its captions, once.

Each process takes its share of the pictures and writes a shard whenever it has 8,192 of them or a minute has passed;
the first process then writes the manifest that names the shards, and from that moment on the index is the new one.
What a run that was killed has written is found by the next one, which embeds what is missing: going on is the same as
adding to an index that is there.

**What is embedded.** A picture whose file has the size and time of change that the index remembers keeps its row, and
is not opened. Else its bytes are hashed, and it is embedded where the index has no picture of those bytes. A time of
change tells nothing of a file that was still young when it was read (two changes within a clock's tick look the same),
so such a one is hashed again. Pictures that come from an address are always read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cytoclip import device, encoder, entries, files, index_faiss, index_plan, index_rows, liveness, manifest
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.entries import Entry
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.files import Piece
from cytoclip.index_plan import Plan, Standing, Work
from cytoclip.index_rows import Writer, Written
from cytoclip.manifest import Manifest, Shard
from cytoclip.rows import Columns
from cytoclip.vector_shards import Header

_VERSIONS = ("cytoclip", "faiss-cpu", "numpy", "pillow", "pyarrow", "torch", "transformers")


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

    columns: Columns = field(default_factory=Columns)
    batch_size: int = 64
    device: str = "auto"
    precision: str = "no"
    rebuild: bool = False


@dataclass(frozen=True)
class Built:
    """What came of it.

    Parameters
    ----------
    embedded
        Pictures that went through the model.
    kept
        Pictures whose embeddings were there, from the index before or from a run that was cut off.
    removed
        Pictures that the index had and the source has no more.
    skipped
        Pictures that cannot be used.
    """

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


def build(
    model_name: str | Path, source: str | Path, to: str | Path, console: Console, how: How | None = None
) -> Built:
    """Make the index `to` of the pictures at `source`, or bring the one that is there up to date.

    Parameters
    ----------
    source
        What `entries.listed` reads, or the address of shards (`s3://…`, `https://…`).

    Raises
    ------
    UserError
        For a model or place that cannot be used, an index that another model made, one that another process writes,
        or where not one picture can be used.
    """
    wanted, folder = how or How(), Path(to)
    made = encoder.opened_in(device.start(wanted.device, wanted.precision, "the call", console.warn), model_name)
    with liveness.watched(made.world), ExitStack() as stack:
        there = made.world.once(lambda: _claim(folder, made, wanted, stack))
        return _build(made, str(source), folder, there, console, wanted)


def weights_of(made: Encoder) -> str:
    """What must be the same in a query's model: weights and how pictures and texts are read, at any precision."""
    return made.opened.digest()


def _claim(folder: Path, made: Encoder, how: How, stack: ExitStack) -> Manifest | None:
    """Hold the folder: an index has one writer. Refuse one that is not ours, or another model's; else what is there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder", "name another folder for the index")
    there = _before(folder, how)
    ours = {manifest.NAME, "shards", "faiss", ".lock", f".{manifest.NAME}.new"}
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in ours) if folder.is_dir() and not there else []
    if foreign:
        raise UserError(f"{folder} holds what is no index: {first_few(foreign)}", "name an empty or a new folder")
    for inner in ("shards", "faiss"):
        if (folder / inner).is_symlink():
            raise UserError(f"{folder / inner} is a link", "name a folder of your own", ExitCode.DATA)
    busy = UserError(f"{folder} is being written by another process", "wait for it", ExitCode.SYSTEM)
    stack.enter_context(files.lock(folder / ".lock", busy))
    before = _before(folder, how)  # which nobody changes from here on
    if before and before.model.digest != made.digest and not how.rebuild:
        same = before.model.weights == weights_of(made)
        why = f"at precision {before.model.precision}" if same else f"by {before.model.name}, with other weights"
        hint = "--rebuild embeds everything anew; or name another folder, or that model"
        raise UserError(f"{folder} was made {why}", hint, ExitCode.MODEL)
    return before


def _before(folder: Path, how: How) -> Manifest | None:
    """The manifest that is there; one that is damaged is none, where everything is made anew."""
    try:
        return manifest.read(folder)
    except UserError:
        if how.rebuild:
            return None
        raise


def _build(made: Encoder, source: str, folder: Path, there: Manifest | None, console: Console, how: How) -> Built:
    world = made.world
    source_of = world.once(lambda: entries.opened(source, how.columns, console))
    roots = world.once(lambda: _roots(source_of.listed, source_of.root, None if how.rebuild else there))
    header = Header(made.digest, tuple(roots))
    names = world.once(lambda: index_plan.usable(folder, header, made.width, there, how.rebuild))
    numbers = world.once(lambda: _numbers(folder, there))
    standing = Standing(folder, names, made.width)
    plan = index_plan.planned(source_of.listed, roots, standing)
    what = f"{len(source_of.shards)} shards" if source_of.shards else counted(len(source_of.listed), "picture")
    console.say(
        f"{what} of {source} on {world.device.type}, {world.arithmetic}, {counted(world.size, 'process', 'processes')}"
    )
    if source_of.listed:
        console.say(f"{len(source_of.listed) - len(plan.work)} are in the index as they are")
    written = world.listed([_written(made, plan, source_of, folder, header, standing, numbers, console, how)])
    problems = [each for one in written for each in one.problems]
    bad = sum(one.bad for one in written)
    if bad:
        console.warn(f"{counted(bad, 'picture')} cannot be used and {'is' if bad == 1 else 'are'} left out: "
                     f"{first_few(problems)}")  # fmt: skip
    shards = [*plan.kept, *(shard for one in written for shard in one.shards)]
    new = world.once(lambda: _commit(folder, shards, roots, bad, made, there, console))
    embedded = sum(one.embedded for one in written)
    seen_again = sum(one.carried for one in written) if source_of.shards else 0
    return Built(new, embedded, new.pictures - embedded, max(0, plan.removed - seen_again), bad)


def _written(  # noqa: PLR0913 - each is another thing
    made: Encoder,
    plan: Plan,
    source_of: entries.Source,
    folder: Path,
    header: Header,
    standing: Standing,
    numbers: int,
    console: Console,
    how: How,
) -> Written:
    """What this process embeds and writes: a share of the pictures, or of the shards at an address."""
    world = made.world
    each = -(-len(plan.work) // world.size)
    own = plan.work[world.rank * each : (world.rank + 1) * each]
    writer = Writer(folder, header, standing, made, how.batch_size, numbers)
    with console.progress("embedding pictures", len(own)) as bar:
        share: Iterable[Work] = own
        if source_of.shards:
            share = _from_afar(source_of, world.rank, world.size, how)
        for looked in index_rows.looked_at(share, standing, made.opened.pixels, how.batch_size):
            writer.add(looked)
            bar.advance(1, note=f"{writer.written.bad} left out" if writer.written.bad else "")
    writer.finish()
    return writer.written


def _from_afar(source_of: entries.Source, rank: int, size: int, how: How) -> Iterator[Work]:
    for address in source_of.shards[rank::size]:
        for entry in entries.from_afar(address, how.columns):
            yield Work(entry, None, entry.name)


def _numbers(folder: Path, there: Manifest | None) -> int:
    """The first that no shard had."""
    taken = [int(path.stem) for path in (folder / "shards").glob("*.parquet") if path.stem.isdecimal()]
    return max([there.numbers if there else 0, *(number + 1 for number in taken)])


def _roots(listed: Sequence[Entry], first: Path | None, there: Manifest | None) -> list[str]:
    """Those of the index that is there first, so that its rows keep their numbers."""
    roots = dict.fromkeys(there.roots if there else ())
    paths = [place.path if isinstance(place, Piece) else place for place, *_ in listed if not isinstance(place, bytes)]
    outside = [path for path in paths if first is None or not path.is_relative_to(first)]
    if first is not None and len(outside) < len(paths):
        roots.setdefault(str(first))
    for path in outside:
        roots.setdefault(str(path.parent))
    return list(roots)


def _commit(
    folder: Path,
    shards: list[Shard],
    roots: list[str],
    bad: int,
    made: Encoder,
    there: Manifest | None,
    console: Console,
) -> Manifest:
    """The new manifest in the place of the old one; then what it does not name is deleted."""
    shards = sorted(shards, key=lambda shard: _number(shard.name))
    if not shards:
        raise UserError("not one picture can be used", "cytoclip check says what is wrong with each", ExitCode.DATA)
    same = there if there and there.model.digest == made.digest else None  # lists of another model's vectors are none
    side = index_faiss.make(folder, shards, made.width, made.embed_texts, same, console)
    new = Manifest(
        model=manifest.Model(made.name, weights_of(made), made.digest, made.world.precision),
        width=made.width,
        pictures=sum(shard.rows for shard in shards),
        captions=side.texts.vectors,
        skipped=bad,
        roots=roots,
        shards=shards,
        numbers=max(_number(shards[-1].name) + 1, there.numbers if there else 0),
        images=side.images,
        texts=side.texts,
        faiss=side.generation,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: version for name in _VERSIONS if (version := _version(name))},
    )
    if there is not None and replace(new, created=there.created, versions=there.versions) == there:
        new = there
    else:
        manifest.write(folder, new)
    _clear(folder, new)
    return new


def _number(name: str) -> int:
    return int(name.partition(".")[0])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _clear(folder: Path, new: Manifest) -> None:
    """Delete what the manifest does not name. Whoever has it open reads on; who was about to, finds the new one."""
    named = {shard.name for shard in new.shards}
    for path in (folder / "shards").iterdir():
        if path.name not in named:
            path.unlink(missing_ok=True)
    for path in (folder / "faiss").iterdir() if (folder / "faiss").is_dir() else ():
        if path.name != new.faiss:
            shutil.rmtree(path, ignore_errors=True)
