"""Write pairs of any format in our layout, split so that what belongs together stays together.

Letters: N pairs.
"""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import apart, batches, files, leaks, sources, texts
from cytoclip.apart import SPLITS, Shares
from cytoclip.console import Console, size
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.files import Piece
from cytoclip.pairs import Pairs
from cytoclip.rows import Columns

_MAX_PART = 120  # bytes of each part of a name: file systems take 255, and an ending and a number come on top
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"\\|?*\ufffd]')  # what one system or another refuses in a name
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # Windows' devices
_MAGIC = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG\r\n", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"), (b"RIFF", ".webp"))  # fmt: skip


def bring(place: Path, to: Path, shares: Shares, columns: Columns, console: Console) -> dict[str, int]:
    """Read pairs of any format, split them, and write a data root; how many pairs each split got.

    Where a key `split` of the pairs names splits, it is followed. Pictures are hard-linked where they are files of the
    same disk, else copied byte by byte; never encoded anew. A crash leaves nothing.

    Raises
    ------
    UserError
        For pairs or pictures that cannot be used, a data root that is there, or pairs that cannot be split as asked.
    """
    if not shares.val + shares.test < 1:  # NaN too
        raise UserError(
            f"--val {shares.val} and --test {shares.test} leave nothing to train on", "such as --val 0.1 --test 0.1"
        )
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"{to} is already there", "name another folder, or delete it first", ExitCode.DATA)
    pairs = batches.scanned(sources.read(place, columns, console), place, console)
    rows = _rows(pairs, place, shares, console)
    apart.warn_of_cut_sources(pairs, console)
    _warn_of_no_captions(pairs, console)
    names = safe_names(pairs)
    copied = 0
    with files.whole_folder(to) as folder, console.progress("writing pictures", len(pairs)) as bar:
        for split_name, chosen in rows.items():
            if len(chosen):
                copied += _write(folder / split_name, pairs, names, chosen, bar)
    console.say(f"{to}: {copied} pictures copied, {len(set(pairs.images)) - copied} linked")
    return {name: len(chosen) for name, chosen in rows.items()}


def _rows(pairs: Pairs, place: Path, shares: Shares, console: Console) -> dict[str, NDArray[np.int64]]:
    """The pairs of each split: as the data name it, with what leaks said; else by the shares."""
    told_N = apart.told(pairs, place)
    split_N = apart.split(pairs, shares) if told_N is None else told_N
    rows = {name: np.flatnonzero(split_N == number) for number, name in enumerate(SPLITS)}
    if told_N is None:
        _refuse_empty(rows, shares, pairs, place)
        _say(rows, pairs, shares, console)
    else:
        console.say("splits as column 'split' names them: nothing is shuffled, and --val, --test and --seed do nothing")
        for name, chosen in rows.items():
            if len(chosen):
                console.say(f"{name}: {counted(len(chosen), 'pair')}, {len(chosen) / len(pairs):.3f}")
        for line in leaks.warnings({name: pairs.take(chosen.tolist()) for name, chosen in rows.items()}):
            console.warn(line)
    _say_packed(pairs, console)
    return rows


def safe_names(pairs: Pairs) -> list[str]:
    """A name below `imgs/` for each pair's picture that any file system takes; one place, one name.

    Two names are different even where case and ways to write an accent are one, and no name is another's folder.
    """
    taken: set[str] = set()
    above: set[str] = set()
    named: dict[Path | Piece, str] = {}
    for image, name in zip(pairs.images, pairs.names, strict=True):
        if image in named:
            continue
        stem, ending = _safe(name, image)
        if any(folder in taken for folder in _above(stem)):  # a picture has the name of this one's folder
            stem = stem.replace("/", "_")
        found, number = stem + ending, 1
        while not _is_free(found, taken, above):
            number += 1
            found = f"{stem}-{number}{ending}"
        taken.add(_plain(found))
        above.update(_above(found))
        named[image] = found
    return [named[image] for image in pairs.images]


def _is_free(name: str, taken: set[str], above: set[str]) -> bool:
    plain = _plain(name)
    return plain not in taken and plain not in above


def _above(name: str) -> Iterator[str]:
    return (_plain(str(folder)) for folder in PurePosixPath(name).parents if folder.name)


def _plain(name: str) -> str:
    """Equal for names that are one on some system: macOS tells neither case nor ways to write an accent apart."""
    return unicodedata.normalize("NFC", name.casefold())


def _safe(name: str, image: Path | Piece) -> tuple[str, str]:
    parts = [_safe_part(part) for part in name.split("/") if part not in ("", ".", "..")] or ["picture"]
    ending = PurePosixPath(parts[-1]).suffix
    if not ending:
        begin = _begin(image)
        ending = next((known for magic, known in _MAGIC if begin.startswith(magic)), "")
        return "/".join(parts), ending
    return "/".join([*parts[:-1], parts[-1].removesuffix(ending)]), ending


def _safe_part(part: str) -> str:
    plain = _UNSAFE.sub("_", part).rstrip(". ") or "_"
    plain = f"_{plain}" if _RESERVED.match(plain) else plain
    ending = PurePosixPath(plain).suffix[:16]
    if len(plain.encode()) <= _MAX_PART:
        return plain
    return plain.encode()[: _MAX_PART - len(ending.encode())].decode(errors="ignore") + ending


def _begin(image: Path | Piece) -> bytes:
    with (image.path if isinstance(image, Piece) else image).open("rb") as stream:
        stream.seek(image.offset if isinstance(image, Piece) else 0)
        return stream.read(16)


def _write(folder: Path, pairs: Pairs, names: Sequence[str], rows: NDArray[np.int64], bar: Any) -> int:
    """One split; how many pictures were copied because they could not be linked."""
    entries: list[dict[str, Any]] = []
    copied = 0
    (folder / "imgs").mkdir(parents=True)
    for row in rows.tolist():
        target = folder / "imgs" / names[row]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            copied += _place(pairs.images[row], target)
        more = pairs.more[row]
        entry: dict[str, Any] = {"img": names[row]}
        entry["caption"] = [pairs.captions[row], *more] if more else pairs.captions[row]
        tags = {"group": pairs.groups[row], "source": pairs.sources[row], "label": pairs.labels[row]}
        said = {key: value for key, value in tags.items() if value is not None}
        entries.append({**dict(pairs.extra[row]), **entry, **said})
        bar.advance()
    files.write_json(folder / sources.LIST_NAME, entries)
    return copied


def _place(image: Path | Piece, target: Path) -> bool:
    """Put a picture at `target`; whether it had to be copied."""
    if isinstance(image, Piece):
        with image.path.open("rb") as stream:
            stream.seek(image.offset)
            target.write_bytes(stream.read(image.size))
        return True
    real = Path(os.path.realpath(image))  # a hard link to a link would be one more link
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        target.write_bytes(real.read_bytes())
        return True
    return False


def _refuse_empty(rows: dict[str, NDArray[np.int64]], shares: Shares, pairs: Pairs, place: Path) -> None:
    asked = {"train": 1.0, "val": shares.val, "test": shares.test}
    empty = [name for name, share in asked.items() if share and not len(rows[name])]
    if empty:
        raise UserError(
            f"{', '.join(empty)} would be empty: the {counted(len(pairs), 'pair')} of {place} are "
            f"{apart.components(pairs).max() + 1} with sources, groups and pictures of their own",
            "ask for other shares with --val and --test, or look at its sources and groups",
            ExitCode.DATA,
        )


def _say(rows: dict[str, NDArray[np.int64]], pairs: Pairs, shares: Shares, console: Console) -> None:
    total = len(pairs)
    asked = {"train": 1 - shares.val - shares.test, "val": shares.val, "test": shares.test}
    for name, chosen in rows.items():
        if asked[name]:
            console.say(f"{name}: {counted(len(chosen), 'pair')}, {len(chosen) / total:.3f} ({asked[name]:.3f} asked)")


def _warn_of_no_captions(pairs: Pairs, console: Console) -> None:
    """As `check` would find them; who reads the table again can mend it before anything is trained."""
    said = zip(pairs.names, pairs.captions, pairs.more, strict=True)
    found = [
        f"{name} ({text!r})"
        for name, one, more in said
        for text in (one, *more)
        if texts.is_no_value(text) or texts.is_empty(text)
    ]
    if found:
        console.warn(
            f"{counted(len(found), 'caption')} that say nothing or stand for a missing value: {first_few(found)}"
        )


def _say_packed(pairs: Pairs, console: Console) -> None:
    pieces = sum(image.size for image in set(pairs.images) if isinstance(image, Piece))
    if pieces:
        console.say(f"{size(pieces)} of packed pictures are written out")
