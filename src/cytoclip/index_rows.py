"""Pictures looked at by threads, embedded batch by batch, and written shard by shard."""

from __future__ import annotations

import json
import os
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cytoclip import images, index_plan, manifest, pixels, vector_shards
from cytoclip.encoder import Encoder
from cytoclip.files import Piece
from cytoclip.index_plan import Place, Standing, Work
from cytoclip.manifest import Shard
from cytoclip.pixels import PixelSpec
from cytoclip.vector_shards import ROWS, Header, Row

SECONDS = 60.0  # of work that is lost at most where a process is killed
YOUNG = 2.0  # seconds after a change in which another one may leave the same time, on the coarsest file systems
_AHEAD = 4  # batches that are decoded before they are embedded
_CAPTIONS = 16_384  # embeddings of captions that are remembered: 32 MB of 512 dimensions
_TOLD = 1000  # bad pictures that are named; more are only counted


class Looked(NamedTuple):
    """A picture that was looked at: where the index has its embedding, else its pixels, else what is wrong with it."""

    row: Row | None
    place: Place | None = None
    pixels: NDArray[np.uint8] | None = None
    problem: str = ""


@dataclass
class Written:
    """What one process wrote.

    Parameters
    ----------
    embedded
        Pictures that went through the model; the others were known by their bytes.
    problems
        Of pictures that cannot be used, the first thousand.
    """

    shards: list[Shard] = field(default_factory=list)
    embedded: int = 0
    carried: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)


def looked_at(share: Iterable[Work], standing: Standing, spec: PixelSpec, batch_size: int) -> Iterator[Looked]:
    """Each picture in turn, looked at by threads a few batches ahead."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ahead: deque[Future[Looked]] = deque()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // here), thread_name_prefix="pictures") as pool:
        try:
            for work in share:
                ahead.append(pool.submit(_look, work, standing, spec))
                if len(ahead) > _AHEAD * batch_size:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


class Writer:
    """Rows as they come; each process writes shards of its own numbers, from `numbers` on."""

    def __init__(
        self, folder: Path, header: Header, standing: Standing, made: Encoder, batch_size: int, numbers: int
    ) -> None:
        self._folder, self._header, self._standing, self._made = folder, header, standing, made
        self._batch_size = batch_size
        self._captions: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._rows: list[Row] = []
        self._vectors: list[NDArray[np.float32] | None] = []
        self._texts: list[NDArray[np.float32] | None] = []
        self._waiting: list[tuple[int, NDArray[np.uint8]]] = []
        self._began = time.monotonic()
        self._number = numbers + made.world.rank
        self.written = Written()

    def add(self, looked: Looked) -> None:
        """One more; a batch is embedded and a shard written when there is enough for one."""
        row, vector, texts = looked.row, None, None
        if row is None:
            self.written.bad += 1
            if len(self.written.problems) < _TOLD:
                self.written.problems.append(looked.problem)
            return
        if looked.place is not None:
            vector = self._standing.image(looked.place)
            row = row._replace(content=self._standing.content(looked.place))
            said, text_CD = self._standing.captions(looked.place)
            texts = text_CD if tuple(said) == row.captions else None
            self.written.carried += 1
        if looked.pixels is not None:
            self._waiting.append((len(self._rows), looked.pixels))
        self._rows.append(row)
        self._vectors.append(vector)
        self._texts.append(texts)
        if len(self._waiting) >= self._batch_size:
            self._embed()
        if len(self._rows) >= ROWS or time.monotonic() - self._began > SECONDS:
            self.finish()

    def finish(self) -> None:
        """Write what is held as a shard."""
        self._embed()
        if self._rows:
            path = manifest.shard_path(self._folder, f"{self._number:05}.parquet")
            vectors_ND = np.stack([vector for vector in self._vectors if vector is not None])
            vector_shards.write(path, self._header, self._rows, vectors_ND, self._embedded_texts())
            self.written.shards.append(Shard(path.name, len(self._rows)))
            self._number += self._made.world.size
        self._rows, self._vectors, self._texts, self._began = [], [], [], time.monotonic()

    def _embed(self) -> None:
        if self._waiting:
            rows, ready = zip(*self._waiting, strict=True)
            for row, vector_D in zip(rows, self._made.embed_pixels(np.stack(ready)), strict=True):
                self._vectors[row] = vector_D
            self.written.embedded += len(rows)
            self._waiting = []

    def _embedded_texts(self) -> list[NDArray[np.float32]]:
        """The embeddings (C, D) of each row's captions; each different caption goes through the model once."""
        both = list(zip(self._rows, self._texts, strict=True))
        asked = {caption for row, texts in both if texts is None for caption in row.captions}
        new = sorted(asked - self._captions.keys(), key=lambda caption: (len(caption), caption))  # little padding
        if new:
            self._captions.update(zip(new, self._made.embed_texts(new, self._batch_size), strict=True))
        blank = np.empty((0, self._made.width), np.float32)
        found = []
        for row, texts in both:
            own = [self._captions[caption] for caption in row.captions] if texts is None else []
            found.append((np.stack(own) if own else blank) if texts is None else texts)
        while len(self._captions) > _CAPTIONS:
            self._captions.popitem(last=False)
        return found


def _look(work: Work, standing: Standing, spec: PixelSpec) -> Looked:
    if work.known is not None:
        return Looked(_row(work, "", work.about), work.known)
    entry, stamp = work.entry, index_plan.stamp(work.entry)
    if stamp is not None and time.time() - stamp[1] / 1e9 < YOUNG:
        stamp = None
    about = index_plan.about(entry, work.root, work.file, stamp)
    if len(standing):
        content = images.content_of(entry.place)
        found = standing.of_content(content)
        if found is not None:
            return Looked(_row(work, content, about), found)
    scan, ready = images.examine(entry.place, lambda image: pixels.prepare(images.normalise(image), spec))
    if ready is None:
        return Looked(None, problem=f"{entry.name} ({scan.problem})")
    return Looked(_row(work, scan.content, about), pixels=ready)


def _row(work: Work, content: str, about: int) -> Row:
    entry, piece = work.entry, work.entry.place if isinstance(work.entry.place, Piece) else None
    return Row(
        vector_shards.identity(work.root, work.file, index_plan.offset(entry)),
        work.root,
        work.file,
        piece.offset if piece else None,
        piece.size if piece else None,
        entry.name,
        content,
        about,
        entry.captions,
        entry.source,
        entry.label,
        entry.group,
        json.dumps(dict(entry.extra), ensure_ascii=False, sort_keys=True) if entry.extra else None,
    )
