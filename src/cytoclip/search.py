"""Search an index: pictures by text, by picture or by both, captions by picture or text.

Letters: N pictures, D embedding.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from cytoclip import encoder, images, index, manifest, vector_shards, vectors
from cytoclip.console import Console
from cytoclip.encoder import Encoder, Picture
from cytoclip.errors import ExitCode, UserError, first_few, nearest
from cytoclip.files import Piece
from cytoclip.manifest import Manifest
from cytoclip.pairs import same_caption_key
from cytoclip.rows import leaves
from cytoclip.vectors import Exact

if TYPE_CHECKING:
    from PIL import Image

MOST = 10_000  # hits that one query may ask for
VALUES = 200  # of a key that are named, the most frequent ones
_KEYS = 64
_TRIES = 5  # to open an index whose files another process replaces meanwhile
Kind = Literal["images", "captions"]


@dataclass(frozen=True)
class Hit:
    """A picture or caption that was found.

    Parameters
    ----------
    rank
        From 1.
    score
        Cosine with the query.
    id
        Of the picture; of a caption, that of a picture that it describes.
    name
        As the data write it.
    file
        None for a caption, and where there is no file here.
    keys
        Its source, label, group, and what else the data say of it in a few words.
    """

    rank: int
    score: float
    id: int
    name: str
    file: Path | Piece | None
    caption: str | None
    keys: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As plain data."""
        piece = self.file if isinstance(self.file, Piece) else None
        path = piece.path if piece else self.file
        where = {"offset": piece.offset, "size": piece.size} if piece else None
        return {**asdict(self), "file": None if path is None else str(path), "piece": where, "keys": dict(self.keys)}


class Index:
    """Pictures with their embeddings, made by `cytoclip index`; opened by `Index.open`.

    Several threads may search at once. What is open stays as it was when another process brings the index up to date.
    """

    def __init__(
        self, folder: Path, found: Manifest, device_name: str, model: str | None, roots: Sequence[str]
    ) -> None:
        self.folder, self.manifest = folder, found
        self._device_name, self._model, self._roots = device_name, model, tuple(roots)
        self._lock = threading.Lock()
        self._rows = _Rows.read(folder, found)
        self._images = _exact_images(folder, found, self._rows)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device_name: str = "auto",
        model: str | Path | None = None,
        roots: Sequence[str | Path] = (),
    ) -> Index:
        """Open an index.

        Parameters
        ----------
        device_name
            Where queries are embedded: `auto`, `cpu`, `cuda` or `mps`.
        model
            Where the model lies by now, if not where it was; it is opened at the first query that needs it, and
            refused unless it has the weights that made the index.
        roots
            Where the pictures lie by now: as many folders as the index has roots, in their order.

        Raises
        ------
        UserError
            Where there is no index, or one that is damaged.
        """
        place = Path(folder)
        for attempt in range(_TRIES):
            found = manifest.read(place)
            if found is None:
                raise UserError(f"{place} is no index", f"cytoclip index MODEL SOURCE --to {place}", ExitCode.DATA)
            try:
                where = _moved(found, roots)
                return cls(place, found, device_name, None if model is None else str(model), where)
            except UserError:
                if attempt == _TRIES - 1 or manifest.read(place) == found:
                    raise
        raise AssertionError  # the loop returns or raises

    @classmethod
    def build(
        cls,
        model: str | Path,
        source: str | Path,
        to: str | Path,
        console: Console | None = None,
        how: index.How = index.How(),  # noqa: B008 - frozen
    ) -> Index:
        """`cytoclip index` from Python: make the index `to`, or bring it up to date, and open it.

        Raises
        ------
        UserError
            As `index.build`.
        """
        index.build(model, source, to, console or Console(quiet=True), how)
        return cls.open(to, how.device, model)

    def __len__(self) -> int:
        return self.manifest.pictures

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The model, opened when it is first needed.

        Raises
        ------
        UserError
            Where it is not there, or is not the one that made the index.
        """
        with self._lock:
            return self._opened()

    @functools.cached_property
    def keys(self) -> Mapping[str, Sequence[str]]:
        """By what pictures can be filtered: of each key its values, the most frequent first, 200 at most."""
        return {key: [value for value, _ in column.most_common(VALUES)] for key, column in self._rows.values.items()}

    def search(
        self,
        text: str | None = None,
        image: Picture | None = None,
        *,
        k: int = 10,
        weight: float = 0.5,
        kind: Kind = "images",
        where: Mapping[str, str] | None = None,
    ) -> list[Hit]:
        """The k nearest pictures (or different captions) to a text, a picture, or both; best first.

        Parameters
        ----------
        weight
            Of the picture where both are given, from 0 to 1: the query is the direction of
            weight · picture + (1 − weight) · text.
        where
            Values by key that a picture must have; a caption, that a picture must have that it describes.

        Raises
        ------
        UserError
            For no query, one that cannot be embedded, a number out of range, or a key or value that is not there.
        """
        query_D = self._query(text, image, weight)
        if kind == "captions":
            return self._captions_near(query_D, k, where)
        return self._images_near(query_D, k, where)

    def like(self, id: int, k: int = 10, where: Mapping[str, str] | None = None) -> list[Hit]:  # noqa: A002
        """The k pictures nearest to one of the index, without that one.

        Raises
        ------
        UserError
            Where the index has no picture of that id.
        """
        row = self._rows.row(id)
        (query_D,) = self._images.take(np.array([row]))
        return self._images_near(query_D, k, where, but=row)

    def picture(self, id: int) -> Image.Image:  # noqa: A002
        """A picture of the index as a plain RGB one.

        Only a file below the index's roots is read, and only if its bytes are those that were indexed.

        Raises
        ------
        UserError
            Where it is not there any more, has changed, or came from an address.
        """
        row = self._rows.row(id)
        name, place = self._rows.name(row), self._file(row)
        if place is None:
            hint = "open the index with the folder where the pictures are now: --root, or roots=[…]"
            raise UserError(f"{name}: its file is not below {first_few(list(self._roots)) or 'any folder'}", hint,
                            ExitCode.DATA)  # fmt: skip
        if images.content_of(place) != self._rows.content(row):
            raise UserError(f"{name} is not what was indexed", "bring the index up to date: cytoclip index",
                            ExitCode.DATA)  # fmt: skip
        return images.decode(place)

    def _opened(self) -> Encoder:
        name = self._model or self.manifest.model.name
        found = encoder.load(name, self._device_name, "no")
        if index.weights_of(found) != self.manifest.model.weights:
            raise UserError(
                f"{name} is not the model that made {self.folder}: its weights are others",
                "name the one that did with --model, or make the index again with this one: cytoclip index --rebuild",
                ExitCode.MODEL,
            )
        return found

    def _query(self, text: str | None, image: Picture | None, weight: float) -> NDArray[np.float32]:
        if text is None and image is None:
            raise UserError("nothing to search for", "give a text, a picture, or both")
        if not 0 <= weight <= 1:
            raise UserError(f"weight {weight} is not from 0 to 1", "such as 0.5: picture and text alike")
        if text is not None and not text.strip():
            raise UserError("the text to search for is empty", "give a few words")
        of_image = None if image is None else self.encoder.embed_images(image)[0]
        of_text = None if text is None else self.encoder.embed_texts(text)[0]
        if of_image is None or of_text is None:
            return of_text if of_image is None else of_image  # type: ignore[return-value]  # one of them is there
        mixed_D = weight * of_image + (1 - weight) * of_text
        length = float(np.linalg.norm(mixed_D))
        if length < 1e-6:
            raise UserError("picture and text point in opposite directions", "choose another weight")
        return (mixed_D / length).astype(np.float32)

    def _images_near(
        self, query_D: NDArray[np.float32], k: int, where: Mapping[str, str] | None, but: int | None = None
    ) -> list[Hit]:
        allowed = self._allowed(where)
        if but is not None:
            allowed = np.ones(len(self), bool) if allowed is None else allowed
            allowed[but] = False
        rows, scores = self._images.nearest(query_D, _checked(k), allowed)
        return [
            self._hit(rank, row, float(score), self._rows.caption(row), self._file(row))
            for rank, (row, score) in enumerate(zip(rows.tolist(), scores, strict=True), start=1)
        ]

    def _captions_near(self, query_D: NDArray[np.float32], k: int, where: Mapping[str, str] | None) -> list[Hit]:
        held = self._captions
        allowed, rows_allowed = None, self._allowed(where)
        if rows_allowed is not None:
            allowed = np.zeros(len(held.vectors), bool)
            allowed[held.number[rows_allowed[held.row]]] = True
        found, scores = held.vectors.nearest(query_D, _checked(k), allowed)
        hits = []
        for rank, (number, score) in enumerate(zip(found.tolist(), scores, strict=True), start=1):
            rows = held.row[held.number == number]
            row = int(rows[0] if rows_allowed is None else rows[rows_allowed[rows]][0])
            hits.append(self._hit(rank, row, float(score), held.texts[number], None))
        return hits

    @functools.cached_property
    def _captions(self) -> _Captions:
        with self._lock:
            return _Captions.read(self.folder, self.manifest, self._rows)

    def _hit(self, rank: int, row: int, score: float, caption: str | None, file: Path | Piece | None) -> Hit:
        rows = self._rows
        return Hit(rank, score, int(rows.ids[row]), rows.name(row), file, caption, rows.keys(row))

    def _allowed(self, where: Mapping[str, str] | None) -> NDArray[np.bool_] | None:
        if not where:
            return None
        allowed = np.ones(len(self), bool)
        for key, value in where.items():
            if key not in self._rows.values:
                near = nearest(key, self._rows.values) or first_few(list(self._rows.values))
                raise UserError(f"no picture of {self.folder} has a {key}",
                                f"did you mean {near}?" if near else "the data give no keys")  # fmt: skip
            if value not in self._rows.values[key]:
                near = nearest(value, self._rows.values[key])
                hint = f"did you mean {near}?" if near else f"there are {first_few(list(self.keys[key]), 8)}"
                raise UserError(f"no picture of {self.folder} has {key}={value}", hint)
            allowed &= self._rows.having(key, value)
        return allowed

    def _file(self, row: int) -> Path | Piece | None:
        """Where a picture is: None unless it is a regular file below its root, reached without leaving it."""
        root, file, offset, size = self._rows.place(row)
        if root is None or not 0 <= root < len(self._roots) or leaves(file):
            return None
        base = os.path.realpath(self._roots[root])
        path = Path(os.path.realpath(Path(base, file)))
        try:
            if not path.is_relative_to(base) or not stat.S_ISREG(path.stat().st_mode):
                return None
            if offset is None or size is None:
                return path
            return Piece(path, offset, size) if 0 <= offset and 0 < size <= path.stat().st_size - offset else None
        except (OSError, ValueError):
            return None


class _Rows:
    """What is said of every picture, in the order of their ids; position i of every column is row i."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.ids: NDArray[np.int64] = table["id"].to_numpy()
        self._codes: dict[str, tuple[NDArray[np.int64], dict[str, int]]] = {}
        self.values: dict[str, Counter[str]] = {}
        for name in ("source", "label", "group"):
            self._coded(name, _encoded(table[name]))
        self._further()

    @classmethod
    def read(cls, folder: Path, found: Manifest) -> _Rows:
        import pyarrow as pa

        light = [
            vector_shards.read(manifest.shard_path(folder, shard.name), shard.rows, found.width)
            for shard in found.shards
        ]
        whole = pa.concat_tables([part.replace_schema_metadata() for part in light])
        order = np.argsort(whole["id"].to_numpy(), kind="stable")
        return cls(whole.take(order).combine_chunks().append_column("order", pa.array(order)))

    @property
    def order(self) -> NDArray[np.int64]:
        """Of each row, where it stands in the shards behind one another."""
        found: NDArray[np.int64] = self._table["order"].to_numpy()
        return found

    def row(self, asked: int) -> int:
        at = int(np.searchsorted(self.ids, asked))
        if at == len(self.ids) or self.ids[at] != asked:
            raise UserError(f"the index has no picture {asked}", "take the id of a hit of this index", ExitCode.DATA)
        return at

    def name(self, row: int) -> str:
        return str(self._table["name"][row].as_py())

    def content(self, row: int) -> str:
        return str(self._table["content"][row].as_py())

    def caption(self, row: int) -> str | None:
        found: str | None = self._table["caption"][row].as_py()
        return found

    def place(self, row: int) -> tuple[int | None, str, int | None, int | None]:
        root, file, offset, size = (
            self._table[name][row].as_py() for name in ("root", "file", "piece_offset", "piece_size")
        )
        return root, file, offset, size

    def keys(self, row: int) -> dict[str, str]:
        found = {}
        for key, (codes, numbers) in self._codes.items():
            if codes[row] >= 0:
                found[key] = list(numbers)[codes[row]]
        return found

    def having(self, key: str, value: str) -> NDArray[np.bool_]:
        codes, numbers = self._codes[key]
        return codes == numbers[value]

    def _coded(self, name: str, encoded: tuple[NDArray[np.int64], list[str]]) -> None:
        codes, texts = encoded
        if (codes >= 0).any():
            self._codes[name] = codes, {text: number for number, text in enumerate(texts)}
            counts = np.bincount(codes[codes >= 0], minlength=len(texts))
            self.values[name] = Counter({text: int(count) for text, count in zip(texts, counts, strict=True) if count})

    def _further(self) -> None:
        """Keys within `extra`: each different text of it is parsed once."""
        codes, texts = _encoded(self._table["extra"])
        parsed = [_flat(text) for text in texts]
        for key in list(dict.fromkeys(key for one in parsed for key in one))[:_KEYS]:
            if key in self._codes:
                continue
            values = list(dict.fromkeys(one[key] for one in parsed if key in one))
            number = {value: at for at, value in enumerate(values)}
            of_text = np.array([*(number[one[key]] if key in one else -1 for one in parsed), -1], np.int64)
            self._coded(key, (of_text[codes], values))


@dataclass(frozen=True)
class _Captions:
    """The different captions, and which picture has which: position i of `row` and `number` is one such having."""

    vectors: Exact
    texts: list[str]
    row: NDArray[np.int64]
    number: NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path, found: Manifest, rows: _Rows) -> _Captions:
        row_of = np.empty(len(rows.order), np.int64)
        row_of[rows.order] = np.arange(len(rows.order))
        numbers: dict[str, int] = {}
        texts: list[str] = []
        having: list[tuple[int, int]] = []
        first: list[NDArray[np.float32]] = []
        at = 0
        for shard in found.shards:
            path = manifest.shard_path(folder, shard.name)
            for said, text_CD in vector_shards.captions(path, shard.rows, found.width):
                for text, text_D in zip(said, text_CD, strict=True):
                    key = same_caption_key(text)
                    if key not in numbers:
                        numbers[key] = len(texts)
                        texts.append(text)
                        first.append(text_D)
                    having.append((int(row_of[at]), numbers[key]))
                at += 1
        both = np.array(sorted(having), np.int64).reshape(-1, 2)
        return cls(Exact(np.array(first, np.float32).reshape(-1, found.width)), texts, both[:, 0], both[:, 1])


def _exact_images(folder: Path, found: Manifest, rows: _Rows) -> Exact:
    parts = [
        vector_shards.images(manifest.shard_path(folder, shard.name), shard.rows, found.width) for shard in found.shards
    ]
    return Exact(np.concatenate(parts)[rows.order])


def _encoded(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """A number for each row's text, -1 for none, and the texts by number."""
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if hasattr(encoded, "combine_chunks") else encoded
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _flat(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _moved(found: Manifest, roots: Sequence[str | Path]) -> list[str]:
    if not roots:
        return found.roots
    if len(roots) != len(found.roots):
        raise UserError(
            f"{len(roots)} roots given, and the index has {len(found.roots)}: {first_few(found.roots)}",
            "name a folder for each, in this order",
        )
    missing = [str(root) for root in roots if not Path(root).is_dir()]
    if missing:
        raise UserError(f"no such folder: {missing[0]}", "name the folder where the pictures are now")
    return [str(Path(root).absolute()) for root in roots]


def _checked(k: int) -> int:
    if not 1 <= k <= MOST:
        raise UserError(f"k = {k} is not from 1 to {MOST}", "such as 10")
    return k


def document(hits: Sequence[Hit], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `cytoclip search --json` prints."""
    return {"schema": 1, **asked, "hits": [hit.document() for hit in hits]}


def table(hits: Sequence[Hit]) -> str:
    """The hits for people: rank, score, name, keys and caption, one a line."""
    if not hits:
        return "no hits"
    width = max(len(hit.name) for hit in hits)
    lines = []
    for hit in hits:
        said = " ".join((hit.caption or "").split())
        keys = ", ".join(f"{key}={value}" for key, value in hit.keys.items())
        lines.append(
            f"{hit.rank:>3}  {hit.score:.4f}  {hit.name:<{width}}  {keys}{'  ' if keys and said else ''}{said}".rstrip()
        )
    return "\n".join(lines)
