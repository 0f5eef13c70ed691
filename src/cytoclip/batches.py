"""From pairs on disk to batches on the device.

Letters: b pairs of a batch in this process, H×W pixels, L tokens, K patches that are kept.
"""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from cytoclip import images, signals, sources
from cytoclip.captions import Tokens
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, first_few
from cytoclip.files import Piece
from cytoclip.images import Scan
from cytoclip.order import Draw, Share, Wording
from cytoclip.pairs import Pairs
from cytoclip.pictures import Drawn, Pictures, Rows
from cytoclip.rows import PICTURES, Columns

# Elsewhere each process begins anew and imports torch, for every validation again: 5 seconds, on a busy machine 20.
_FORKS = platform.system() == "Linux"
_FEW = 0.02  # share of the kept pictures that may still be decoded by threads: where bad ones are skipped, none comes
_COPIED = 2**28  # bytes of a batch that is copied ahead: 1,700 pictures of 224×224


@dataclass(frozen=True)
class Batch:
    """Pairs `indices` of a process: what its image tower and its text tower read, or pictures alone.

    Parameters
    ----------
    images
        uint8 pixels (b, 3, H, W), or stored features (b, width) of a frozen tower.
    texts, lengths
        Padded token ids (b, L) and how many of them a row needs; or stored features (b, width), without lengths.
    changes
        float32 (b, 22): how `augment.Variation` changes the pictures, where they are varied.
    keep
        int64 (b, K): the patches that the image tower sees, where some are dropped.
    """

    indices: NDArray[np.int64]
    images: torch.Tensor
    texts: torch.Tensor | None = None
    lengths: NDArray[np.int64] | None = None
    changes: torch.Tensor | None = None
    keep: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """Called by the loader where the device copies faster from pinned memory."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """`function` of each tensor that the towers read."""
        parts = (self.texts, self.changes, self.keep)
        texts, changes, keep = (None if part is None else function(part) for part in parts)
        return replace(self, images=function(self.images), texts=texts, changes=changes, keep=keep)

    def chunks(self, each: int) -> list[tuple[torch.Tensor, ...]]:
        """Views of `each` pairs as the encoder's arguments, the last maybe fewer; tokens cut to the chunk's longest."""
        assert self.texts is not None  # noqa: S101 - of the training loader
        found = []
        for begin in range(0, len(self.indices), each):
            cut = slice(begin, begin + each)
            texts = self.texts[cut] if self.lengths is None else self.texts[cut, : self.lengths[cut].max()]
            found.append(
                (self.images[cut], texts, *(part[cut] for part in (self.changes, self.keep) if part is not None))
            )
        return found


def open_split(folder: Path, console: Console) -> Pairs:
    """`sources.read` and `scanned` in one."""
    return scanned(sources.read(folder, Columns(), console), folder, console)


def scanned(pairs: Pairs, folder: Path, console: Console, skips: bool = False) -> Pairs:
    """Read every picture's bytes once: its content hash, and whether it is there and whole.

    With `skips`, those that are not are said and stay in: others will stand in for them.

    Raises
    ------
    UserError
        For missing or unreadable pictures, all of them counted.
    """
    files = list(dict.fromkeys(pairs.images))
    with console.progress(f"reading {folder}", len(files)) as bar:
        scans = dict(
            zip(files, images.scan(files, threads=os.cpu_count() or 1, progress=lambda _: bar.advance()), strict=True)
        )
    names = dict(zip(pairs.images, pairs.names, strict=True))
    bad = [f"{names[file]} ({scan.problem})" for file, scan in scans.items() if scan.problem]
    if bad and skips:
        console.warn(f"{len(bad)} of {len(files)} pictures in {folder} are skipped: {first_few(bad)}")
    elif bad:
        raise UserError(
            f"{len(bad)} of {len(files)} pictures in {sources.called(folder)} cannot be used: {first_few(bad)}",
            _mending(files, names, scans, folder),
            ExitCode.DATA,
        )
    contents = (scans[image].content or str(image) for image in pairs.images)  # what nobody can read equals nothing
    return replace(pairs, contents=tuple(contents))


def _mending(
    files: list[Path | Piece], names: Mapping[Path | Piece, str], scans: Mapping[Path | Piece, Scan], folder: Path
) -> str:
    """The hint for pictures that cannot be used: where the first one was looked for, and what its name may lack."""
    listing = sources.listing(folder)
    mend = f"mend these files, or take their entries out of {listing}"
    missing = [file for file in files if isinstance(file, Path) and scans[file].problem == images.MISSING]
    if not missing:
        return mend
    first, name = missing[0], names[missing[0]]
    slashed = name.replace("\\", "/")
    if "://" in name:
        why = f"{name} is an address: download the pictures, and name their files"
    elif slashed != name:
        why = f"{name} is written with backslashes: write {slashed} in {listing}"
    elif first.suffix.lower() not in PICTURES and (there := _with_ending(first)):
        why = f"{name} has no ending, and {there.name} is there: write it in {listing}"
    elif all(scan.problem == images.MISSING for scan in scans.values()) and listing.name != sources.LIST_NAME:
        why = "data.image_root (--image-root with cytoclip bring and check) names the folder below which pictures lie"
    else:
        why = mend
    return f"looked for {first}; {why}"


def _with_ending(file: Path) -> Path | None:
    endings = [each for ending in sorted(PICTURES) for each in (ending, ending.upper())]
    return next((there for ending in endings if os.path.lexists(there := Path(f"{file}{ending}"))), None)


@dataclass(frozen=True)
class Texts:
    """What the text tower reads: `table` has a row for every caption, and `wording` says which one is drawn."""

    table: Tokens | Rows
    wording: Wording


def loader(
    pictures: Pictures | Rows,
    texts: Texts | None,
    batches: Share | list[list[Draw]],
    workers: int,
    device: torch.device,
) -> Iterable[Batch | UserError]:
    """Batches in the order of `batches`, ahead of their use: decoded by `workers` processes (0: in this one).

    Where processes cannot be forked (macOS, Windows) it is as many threads of this process. So are pictures read that
    are kept decoded, as soon as nearly all of them are there: a process for it would cost more than it does, since each
    batch would be copied to this one.
    """
    if isinstance(pictures, Pictures) and pictures.kept:
        found: Iterable[Batch | UserError] = _kept(pictures, texts, batches, workers, device)
    else:
        found = _decoding(pictures, texts, batches, workers, device)
    return _on_device(found, device) if device.type == "cuda" else found


def bytes_ahead(pairs: int, size: tuple[int, int]) -> int:
    """Bytes of a GPU that a batch copied ahead takes beside the one in use, of (height, width); 0: it is too large."""
    each = pairs * 3 * size[0] * size[1]
    return 2 * each if each <= _COPIED else 0


def next_batch(source: Iterator[Batch | UserError]) -> Batch:
    """The next batch, or the error of a picture that was whole when the run began and no longer is."""
    batch = next(source)
    if isinstance(batch, UserError):
        batch.everywhere = False  # the other processes read other pictures
        try:
            raise batch
        finally:
            del batch  # or error and frame hold each other, and with them the loader, whose workers end slowly then
    return batch


def _decoding(
    pictures: Pictures | Rows,
    texts: Texts | None,
    batches: Share | list[list[Draw]],
    workers: int,
    device: torch.device,
) -> Iterable[Batch | UserError]:
    if isinstance(pictures, Pictures) and workers and not _FORKS:
        return _in_threads(pictures, texts, batches, workers, device)
    loaded: DataLoader[Any] = DataLoader(
        pictures,
        batch_sampler=batches,
        collate_fn=partial(_collate, texts),
        pin_memory=device.type == "cuda",
        **processes(0 if isinstance(pictures, Rows) else workers),  # of rows nothing is decoded
    )
    return loaded


def processes(workers: int) -> dict[str, Any]:
    """How a DataLoader starts its `workers`: forked where that is safe, which is no longer Python's default (3.14)."""
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers and _FORKS else None,
        "worker_init_fn": signals.in_loader,
        "generator": torch.Generator(),  # its own: the loader must not draw from the global random state
    }


def _collate(texts: Texts | None, rows: list[Drawn]) -> Batch | UserError:
    pictures = []
    for row in rows:
        if isinstance(row.picture, UserError):
            return row.picture
        pictures.append(torch.from_numpy(row.picture))
    return _batch(texts, rows, torch.stack(pictures))


def _batch(texts: Texts | None, rows: list[Drawn], images: torch.Tensor) -> Batch:
    indices, epochs = np.array([row.draw for row in rows], np.int64).T
    changes, keep = (
        torch.stack([one for one in column if one is not None]) if column[0] is not None else None
        for column in zip(*(row[2:] for row in rows), strict=True)
    )
    batch = Batch(indices, images, changes=changes, keep=keep)
    if texts is None:
        return batch
    captions = texts.wording.rows(indices, epochs)
    lengths = texts.table.lengths(captions) if isinstance(texts.table, Tokens) else None
    return replace(batch, texts=texts.table.batch(captions), lengths=lengths)


def _kept(
    pictures: Pictures, texts: Texts | None, batches: Share | list[list[Draw]], workers: int, device: torch.device
) -> Iterator[Batch | UserError]:
    """Epoch by epoch with decoding processes, until at most `_FEW` of the pictures are left to decode."""
    assert pictures.kept is not None  # noqa: S101 - `loader` looked
    parts: deque[Share | list[list[Draw]]] = deque(batches.epochs() if isinstance(batches, Share) else [batches])
    while parts and len(pictures.kept.missing()) > _FEW * len(pictures.kept):
        yield from _decoding(pictures, texts, parts.popleft(), workers, device)
    yield from _in_threads(pictures, texts, (draws for part in parts for draws in part), workers, device)


def _in_threads(
    pictures: Pictures, texts: Texts | None, batches: Iterable[list[Draw]], workers: int, device: torch.device
) -> Iterator[Batch | UserError]:
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="pictures") as pool:
        ahead: deque[Future[Batch | UserError]] = deque()
        for draws in batches:
            ahead.append(pool.submit(_gathered, pictures, texts, draws, device))
            if len(ahead) > max(1, workers):  # one more than are read at a time: it is ready when it is asked for
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _gathered(pictures: Pictures, texts: Texts | None, draws: list[Draw], device: torch.device) -> Batch | UserError:
    """A batch whose pictures are read to where it lies."""
    pixels = torch.empty((len(draws), *pictures.shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = []
    for draw, place_3HW in zip(draws, pixels.numpy(), strict=True):
        rows.append(pictures.drawn(draw, place_3HW))
        picture = rows[-1].picture
        if isinstance(picture, UserError):
            return picture
        if picture is not place_3HW:
            place_3HW[:] = picture
    return _batch(texts, rows, pixels)


def _on_device(source: Iterable[Batch | UserError], device: torch.device) -> Iterator[Batch | UserError]:
    """The same batches on a GPU, each copied there while the one before it is worked on.

    A stream of its own copies; the stream that works waits for it, and the memory is not given away before that has
    used it. A batch above `_COPIED` bytes stays pinned, and `loss` copies it chunk by chunk: two of them on the device
    would break the promise that a batch takes the memory of its chunks.
    """
    batches, stream = iter(source), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch() -> Batch | UserError | None:
        batch = next(batches, None)
        if not isinstance(batch, Batch) or batch.images.nbytes > _COPIED:
            return batch
        with torch.cuda.stream(stream):
            return batch.map(lambda part: part.to(device, non_blocking=True))

    def here(part: torch.Tensor) -> torch.Tensor:
        if part.device.type == "cuda":
            part.record_stream(torch.cuda.current_stream(device))
        return part

    with ThreadPoolExecutor(1, thread_name_prefix="copying") as pool:
        coming = pool.submit(fetch)
        while (batch := coming.result()) is not None:
            if isinstance(batch, Batch):  # before the next one is asked for, whose copy is nothing to wait for
                torch.cuda.current_stream(device).wait_stream(stream)
                batch = batch.map(here)
            coming = pool.submit(fetch)
            yield batch
