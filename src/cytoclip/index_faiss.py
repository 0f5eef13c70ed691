"""What a large index is searched by, made from its shards: vectors in flat files, and faiss's lists of them.

INDEX/faiss/GENERATION/
    images.f32  images.safetensors     vectors and lists (ivf.py) of more than 50,000 pictures
    texts.f32   texts.safetensors      of the different captions; the lists where those are more than 50,000
    captions.safetensors               which picture has which of them

An index of fewer pictures and captions has none of it: its shards are read into memory.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cytoclip import catalogue, files, ivf, manifest, vector_shards, vectors
from cytoclip.catalogue import Having
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.ivf import Approximate, ListsFile
from cytoclip.manifest import Manifest, Shard, Side
from cytoclip.vectors import Flat, Found, Held, Vectors, damaged

Embed = Callable[[list[str]], NDArray[np.float32]]
_FIELDS = ("row", "number", "first_row", "first_which", "ties")


@dataclass(frozen=True)
class Made:
    """What the manifest says of it."""

    generation: str
    images: Side
    texts: Side


class Exact:
    """Vectors that are all compared with each query."""

    def __init__(self, held: Vectors, ties: NDArray[np.int64]) -> None:
        self._held, self._ties = held, ties

    def __len__(self) -> int:
        return len(self._held)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at `rows`."""
        return self._held.take(rows)

    def nearest(self, query_D: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        """As `vectors.nearest`."""
        return vectors.nearest(self._held, self._ties, query_D, k, allowed)


Captions = tuple[Having, Exact | Approximate]


def make(folder: Path, shards: list[Shard], width: int, embed: Embed, there: Manifest | None, console: Console) -> Made:
    """Make it for these shards, from what the manifest before them names where that fits.

    Parameters
    ----------
    embed
        The text tower, for queries by which recall is measured where pictures have no captions.
    """
    pictures = sum(shard.rows for shard in shards)
    having = catalogue.havings(catalogue.tables(folder, shards, width))
    if max(pictures, len(having)) <= ivf.EXACT:
        return Made("", Side(pictures), Side(len(having)))
    ivf.library()  # or it is missed when all is embedded
    generation = hashlib.sha256(repr(shards).encode()).hexdigest()[:16]
    target = manifest.faiss_folder(folder, generation)
    old = manifest.faiss_folder(folder, there.faiss) if there and there.faiss else None
    if there and there.faiss == generation and _is_whole(folder, there):
        return Made(generation, there.images, there.texts)
    with files.whole_folder(target) as new:
        arrays = {name: np.ascontiguousarray(getattr(having, name)) for name in _FIELDS}  # else other numbers are saved
        save_file(arrays, new / "captions.safetensors")
        texts = _flat_file(new / "texts.f32", catalogue.caption_vectors(folder, shards, width, having), len(having),
                           width, console)  # fmt: skip
        images: Vectors | None = None
        keys: list[NDArray[np.int64]] = []
        ids: list[NDArray[np.int64]] = []
        for table in catalogue.tables(folder, shards, width):
            keys.append(catalogue.content_keys(table))
            ids.append(table["id"].to_numpy())
        if pictures > ivf.EXACT:
            read = (vector_shards.images(manifest.shard_path(folder, s.name), s.rows, width) for s in shards)
            images = _flat_file(new / "images.f32", read, pictures, width, console)
        asked = _queries(images, texts, lambda: embed(_names(folder, shards, width)))
        image_side, text_side = Side(pictures), Side(len(having))
        if images is not None:
            image_side = _listed(new, old, "images", images, np.concatenate(ids), np.concatenate(keys), width,
                                 asked("images"), console)  # fmt: skip
        if len(having) > ivf.EXACT:
            text_side = _listed(new, old, "texts", texts, having.ties, having.ties, width, asked("texts"), console)
    return Made(generation, image_side, text_side)


def image_search(folder: Path, found: Manifest, ids: NDArray[np.int64]) -> Exact | Approximate:
    """The pictures of an index, ready to be searched.

    Raises
    ------
    UserError
        Where a file is damaged, or missing.
    """
    if found.images.kind == "exact":
        parts = [vector_shards.images(manifest.shard_path(folder, s.name), s.rows, found.width) for s in found.shards]
        return Exact(Held(np.concatenate(parts)), ids)
    place, side = manifest.faiss_folder(folder, found.faiss), found.images
    flat = Flat(place / "images.f32", side.vectors, found.width)
    return Approximate(
        ListsFile(place / "images.safetensors"), flat, found.width, ids, side.parameters.get("probes", 1)
    )


def text_search(folder: Path, found: Manifest) -> Callable[[], Captions]:
    """What makes the different captions of an index ready to be searched, once they are asked for.

    The files are opened now: the index is then read as it is, whoever deletes them meanwhile.

    Raises
    ------
    UserError
        Where a file is damaged, or missing; the call too.
    """
    width = found.width
    if not found.faiss:
        having = catalogue.havings(catalogue.tables(folder, found.shards, width))
        parts = catalogue.caption_vectors(folder, found.shards, width, having)
        exact = Exact(Held(np.concatenate([np.empty((0, width), np.float32), *parts])), having.ties)
        return lambda: (having, exact)
    place = manifest.faiss_folder(folder, found.faiss)
    having = _having(place / "captions.safetensors", found)
    flat = Flat(place / "texts.f32", len(having), width)
    if found.texts.kind == "exact":
        return lambda: (having, Exact(Held(flat.block(0, len(flat))), having.ties))
    lists = ListsFile(place / "texts.safetensors")
    probes = found.texts.parameters.get("probes", 1)
    return lambda: (having, Approximate(lists, flat, width, having.ties, probes))


def _is_whole(folder: Path, there: Manifest) -> bool:
    try:
        image_search(folder, there, np.empty(0, np.int64))
        text_search(folder, there)()
    except UserError:
        return False
    return True


def _having(path: Path, found: Manifest) -> Having:
    """With its bounds checked: it may come from somebody else."""
    count, pictures = found.texts.vectors, found.pictures
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise damaged(path, "it is no regular file")
        arrays = load_file(path)
        having = Having(**{name: arrays[name].astype(np.int64, casting="safe") for name in _FIELDS})
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise damaged(path, " ".join(str(error).split())[:200]) from None
    shapes = {column.shape for column in (having.first_row, having.first_which, having.ties)}
    within = ((having.row, pictures), (having.first_row, pictures), (having.number, count))
    fits = shapes == {(count,)} and having.row.shape == having.number.shape == (len(having.row),)
    if not fits or any(len(column) and (column.min() < 0 or column.max() >= end) for column, end in within):
        raise damaged(path, "its numbers are of other pictures and captions")
    if (np.diff(having.number) < 0).any() or len(np.unique(having.number)) != count:
        raise damaged(path, "a caption in it belongs to no picture")
    return having


def _flat_file(path: Path, parts: Iterable[NDArray[np.float32]], count: int, width: int, console: Console) -> Flat:
    with path.open("wb") as stream, console.progress(f"writing {path.stem}", count) as bar:
        for part_ND in parts:
            stream.write(np.ascontiguousarray(part_ND, "<f4").tobytes())
            bar.advance(len(part_ND))
    return Flat(path, count, width)


def _listed(  # noqa: PLR0913 - each is another thing
    new: Path,
    old: Path | None,
    name: str,
    held: Vectors,
    ties: NDArray[np.int64],
    keys: NDArray[np.int64],
    width: int,
    queries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]],
    console: Console,
) -> Side:
    """Lists of `held`, by the centroids of the index before where it has about as many vectors."""
    wanted, before = ivf.lists_for(len(held)), None
    if old is not None:
        before = ivf.read_quantiser(old / f"{name}.safetensors", width)
    if before is None or not wanted / 2 <= len(before[0].centroids_LD) <= wanted * 2:
        console.say(f"{name}: {len(held)} vectors, {wanted} lists for faiss")
        before = ivf.train(ivf.sample_of(held, wanted), wanted), {}
    quantiser, arrays = before
    path = new / f"{name}.safetensors"
    with console.progress(f"{name} into lists", len(held)) as bar:
        ivf.sort_into_lists(path, held, keys, quantiser, arrays or None, bar.advance)
    made = Approximate(ListsFile(path), held, width, ties, 1)
    recall = ivf.tune(made, queries)
    said = ", ".join(f"{value:.3f} for {kind}" for kind, value in recall.items())
    console.say(f"{name}: a query looks through {made.probes} of {made.lists} lists; recall@10 {said}")
    if min(recall.values(), default=1.0) < ivf.TARGET:
        console.warn(f"{name}: recall@10 {said}, where {ivf.TARGET} was wanted: some of the nearest are missed")
    return Side(len(held), "ivf", {"lists": made.lists, "probes": made.probes}, recall)


def _queries(
    images: Vectors | None, texts: Vectors, stand_ins: Callable[[], NDArray[np.float32]]
) -> Callable[[str], dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]]:
    """Queries of either kind for either side; texts made of names where there are no captions."""

    def drawn(held: Vectors) -> NDArray[np.int64]:
        count = min(len(held), ivf.QUERIES)
        return np.sort(np.random.default_rng(1).choice(len(held), count, replace=False))

    found: dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]] = {}
    for name, held in (("images", images), ("texts", texts)):
        if held is not None and len(held):
            rows = drawn(held)
            found[name] = held.take(rows), rows
    if not len(texts):
        made_QD = stand_ins()
        found["names"] = made_QD, np.full(len(made_QD), -1)

    def of(side: str) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
        return {kind: (q, own if kind == side else np.full(len(own), -1)) for kind, (q, own) in found.items()}

    return of


def _names(folder: Path, shards: list[Shard], width: int) -> list[str]:
    """Up to 200 texts made of the names and keys of pictures."""
    found: dict[str, None] = {}
    for table in catalogue.tables(folder, shards, width):
        for column in ("label", "source", "group", "name"):
            for value in table[column].unique().to_pylist()[: ivf.QUERIES]:
                words = " ".join(re.findall(r"[^\W_]+", str(value or "").rpartition(".")[0] or str(value or "")))
                if words:
                    found.setdefault(words)
        if len(found) >= ivf.QUERIES:
            break
    return list(found)[: ivf.QUERIES] or ["a picture"]
