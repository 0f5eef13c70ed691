"""Search an index: pictures by text, by picture or by both, captions by picture or text.

Letters: N pictures, D embedding.
"""

from __future__ import annotations

import functools
import operator
import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cytoclip import catalogue, encoder, images, index, index_faiss, manifest
from cytoclip.catalogue import Having
from cytoclip.console import Console
from cytoclip.encoder import Encoder, Picture
from cytoclip.errors import ExitCode, UserError, first_few, nearest, shown, suggested
from cytoclip.files import Piece
from cytoclip.index_faiss import Captions
from cytoclip.manifest import Manifest
from cytoclip.rows import leaves

if TYPE_CHECKING:
    from PIL import Image

MOST = 10_000  # hits that one query may ask for
VALUES = 200  # of a key that are named, the most frequent ones
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

    def __init__(self, folder: Path, found: Manifest, device: str, model: str | None, roots: Sequence[str]) -> None:
        self.folder, self.manifest = folder, found
        self._device, self._model, self._roots = device, model, tuple(roots)
        self._lock = threading.Lock()
        self._made: Encoder | None = None
        self._read: Captions | None = None
        self._rows = catalogue.read(folder, found)
        self._images = index_faiss.image_search(folder, found, self._rows.ids)
        self._texts = index_faiss.text_search(folder, found)

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders below which its pictures are looked for now."""
        return self._roots

    @classmethod
    def open(
        cls,
        folder: str | Path,
        device: str = "auto",
        model: str | Path | None = None,
        roots: Sequence[str | Path] = (),
    ) -> Index:
        """Open an index.

        Parameters
        ----------
        device
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
                hint = suggested(place, f"cytoclip index MODEL SOURCE --to {place}")
                raise UserError(f"{place} is no index", hint, ExitCode.DATA)
            try:
                where = _moved(found, roots)
                return cls(place, found, device, None if model is None else str(model), where)
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
        how: index.How | None = None,
    ) -> Index:
        """`cytoclip index` from Python: make the index `to`, or bring it up to date, and open it.

        Raises
        ------
        UserError
            As `index.build`.
        """
        index.build(model, source, to, console or Console(quiet=True), how)
        return cls.open(to, how.device if how else "auto", model)

    def __len__(self) -> int:
        return self.manifest.pictures

    @property
    def encoder(self) -> Encoder:
        """The model, opened when it is first needed.

        Raises
        ------
        UserError
            Where it is not there, or is not the one that made the index.
        """
        with self._lock:
            self._made = self._made or self._opened()
            return self._made

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
            For no query, one that cannot be embedded, a number out of range, or a kind, key or value that is not there.
        """
        _refuse_kind(kind)
        return self._near(self._query(text, image, weight), k, kind, where)

    def near(
        self, query_D: NDArray[np.float32], k: int = 10, kind: Kind = "images", where: Mapping[str, str] | None = None
    ) -> list[Hit]:
        """As `search`, for an embedding: float32 (D,). Of one that is longer or shorter than 1 the direction counts.

        Raises
        ------
        UserError
            For what is no embedding of the index's width, or has no direction; else as `search`.
        """
        _refuse_kind(kind)
        return self._near(self._direction(query_D), k, kind, where)

    def _near(self, query_D: NDArray[np.float32], k: int, kind: Kind, where: Mapping[str, str] | None) -> list[Hit]:
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
        name, place = self._rows.text("name", row), self._file(row)
        if place is None:
            hint = "open the index with the folder where the pictures are now: --root, or roots=[…]"
            raise UserError(f"{name}: its file is not below {first_few(list(self._roots)) or 'any folder'}", hint,
                            ExitCode.DATA)  # fmt: skip
        if images.content_of(place) != self._rows.text("content", row):
            raise UserError(f"{name} is not what was indexed", "bring the index up to date: cytoclip index",
                            ExitCode.DATA)  # fmt: skip
        return images.decode(place)

    def _opened(self) -> Encoder:
        name = self._model or self.manifest.model.name
        found = encoder.load(name, self._device, "no")
        if index.weights_of(found) != self.manifest.model.weights:
            raise UserError(
                f"{name} is not the model that made {self.folder}: its weights are others",
                "name the one that did with --model, or make the index again with this one: cytoclip index --rebuild",
                ExitCode.MODEL,
            )
        return found

    def _direction(self, query_D: Any) -> NDArray[np.float32]:
        width = self.manifest.width
        try:
            given_D = np.asarray(query_D, np.float32)
        except (TypeError, ValueError, RuntimeError):  # what is no numbers; a tensor on a GPU, or with a gradient
            given_D = np.empty(0, np.float32)
        if given_D.shape != (width,):
            what = f"of shape {given_D.shape}" if given_D.size else shown(query_D)
            hint = f"give {width} numbers, such as a row of encoder.embed_texts"
            raise UserError(f"an embedding {what} is none of this index, which has {width} dimensions", hint)
        length = float(np.linalg.norm(given_D))
        if not np.isfinite(length) or length == 0:
            raise UserError(f"an embedding of length {length:g} has no direction", "give a finite one that is not zero")
        return given_D if abs(length - 1) < 1e-5 else (given_D / length).astype(np.float32)

    def _query(self, text: str | None, image: Picture | None, weight: float) -> NDArray[np.float32]:
        if text is None and image is None:
            raise UserError("nothing to search for", "give a text, a picture, or both")
        if not isinstance(weight, int | float) or not 0 <= weight <= 1:
            raise UserError(f"weight {weight} is not from 0 to 1", "such as 0.5: picture and text alike")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{shown(text)} is no text to search for", "give one text; search once for each of several")
        if text is not None and not text.strip():
            raise UserError("the text to search for is empty", "give a few words")
        images_ND = [None] if image is None else self.encoder.embed_images(image)
        if len(images_ND) != 1:
            raise UserError(f"{len(images_ND)} pictures to search for", "give one; search once for each of several")
        of_image = images_ND[0]
        of_text = None if text is None else self.encoder.embed_texts(text)[0]
        if of_image is None or of_text is None:
            return of_text if of_image is None else of_image  # type: ignore[return-value]  # one of them is there
        mixed_D = weight * of_image + (1 - weight) * of_text
        length = float(np.linalg.norm(mixed_D))
        if length < 1e-6:
            raise UserError("picture and text point in opposite directions", "choose another weight")
        found: NDArray[np.float32] = (mixed_D / length).astype(np.float32)
        return found

    def _images_near(
        self, query_D: NDArray[np.float32], k: int, where: Mapping[str, str] | None, but: int | None = None
    ) -> list[Hit]:
        allowed = self._allowed(where)
        if but is not None:
            allowed = np.ones(len(self), bool) if allowed is None else allowed
            allowed[but] = False
        rows, scores = self._images.nearest(query_D, _checked(k), allowed)
        return [
            self._hit(rank, row, float(score), self._rows.text("caption", row), self._file(row))
            for rank, (row, score) in enumerate(zip(rows.tolist(), scores, strict=True), start=1)
        ]

    def _captions_near(self, query_D: NDArray[np.float32], k: int, where: Mapping[str, str] | None) -> list[Hit]:
        having, vectors = self._captions
        allowed, rows_allowed = None, self._allowed(where)
        if rows_allowed is not None:
            allowed = np.zeros(len(having), bool)
            allowed[having.number[rows_allowed[having.row]]] = True
        found, scores = vectors.nearest(query_D, _checked(k), allowed)
        hits = []
        for rank, (number, score) in enumerate(zip(found.tolist(), scores, strict=True), start=1):
            rows = having.rows_of(number)
            rows = rows if rows_allowed is None else rows[rows_allowed[rows]]
            row = int(rows[np.argmin(self._rows.ids[rows])])
            hits.append(self._hit(rank, row, float(score), self._said(having, number), None))
        return hits

    def _said(self, having: Having, number: int) -> str | None:
        said, which = self._rows.captions(int(having.first_row[number])), int(having.first_which[number])
        return said[which] if 0 <= which < len(said) else None

    @property
    def _captions(self) -> Captions:
        with self._lock:
            self._read = self._read or self._texts()
            return self._read

    def _hit(self, rank: int, row: int, score: float, caption: str | None, file: Path | Piece | None) -> Hit:
        rows = self._rows
        return Hit(rank, score, int(rows.ids[row]), rows.text("name", row), file, caption, rows.keys(row))

    def _allowed(self, where: Mapping[str, str] | None) -> NDArray[np.bool_] | None:
        where = {} if where is None else where
        if not isinstance(where, Mapping) or not all(isinstance(one, str) for both in where.items() for one in both):
            raise UserError(f"where={shown(where)} is no mapping of texts", 'such as where={"split": "val"}')
        if not where:
            return None
        allowed = np.ones(len(self), bool)
        for key, value in where.items():
            if key not in self._rows.values:
                raise UserError(f"no picture of {self.folder} has a {key}", _near(key, list(self.keys)))
            if value not in self._rows.values[key]:
                raise UserError(f"no picture of {self.folder} has {key}={value}", _near(value, self.keys[key]))
            allowed &= self._rows.having(key, value)
        return allowed

    def _file(self, row: int) -> Path | Piece | None:
        """Where a picture is: None unless it is a regular file below its root, reached without leaving it."""
        columns = ("root", "file", "piece_offset", "piece_size")
        root, file, start, size = (self._rows.text(name, row) for name in columns)
        if root is None or not 0 <= root < len(self._roots) or leaves(file):
            return None
        try:
            base = Path(os.path.realpath(self._roots[root]))
            path = Path(os.path.realpath(base / file))
            if not path.is_relative_to(base) or not stat.S_ISREG(path.stat().st_mode):
                return None
            if start is None or size is None:
                return path
            return Piece(path, start, size) if start >= 0 and 0 < size <= path.stat().st_size - start else None
        except (OSError, ValueError):
            return None


def filters(written: Sequence[str], option: str) -> dict[str, str]:
    """What `key=value` lines ask for; `option` is what they are called where they were written.

    Raises
    ------
    UserError
        For a line without a value, and for a key with two values, which no hit can have.
    """
    found: dict[str, str] = {}
    for one in written:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UserError(f"{option} {one[:80]!r} is not key=value", f"such as {option} label=HSIL")
        if found.setdefault(key, value) != value:
            raise UserError(
                f"{option} {key} is asked to be {found[key][:80]!r} and {value[:80]!r}: no hit is both",
                "search once for each",
            )
    return found


def _near(word: str, known: Sequence[str]) -> str:
    near = nearest(word, known)
    return f"did you mean {near}?" if near else f"there are {first_few(list(known), 8) or 'none'}"


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
    try:
        number = operator.index(k)
    except TypeError:
        number = 0
    if not 1 <= number <= MOST:
        raise UserError(f"k = {shown(k)} is not from 1 to {MOST}", "such as 10")
    return number


def _refuse_kind(kind: str) -> None:
    """Raise `UserError` for what is none: pictures would be found, whatever was meant."""
    if kind not in get_args(Kind):
        near = nearest(str(kind), get_args(Kind))
        raise UserError(f"kind {shown(kind)} is none of {', '.join(get_args(Kind))}",
                        f"did you mean {near}?" if near else "images finds pictures")  # fmt: skip


def document(hits: Sequence[Hit], asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `cytoclip search --json` prints."""
    return {"schema": 1, **asked, "hits": [hit.document() for hit in hits]}


def table(hits: Sequence[Hit]) -> str:
    """The hits for people, one a line: rank, cosine, name, keys, caption."""
    width = max((len(hit.name) for hit in hits), default=0)
    lines = []
    for hit in hits:
        keys = ", ".join(f"{key}={value}" for key, value in hit.keys.items())
        said = [f"{hit.rank:>3}  {hit.score:.4f}  {hit.name:<{width}}", keys, " ".join((hit.caption or "").split())]
        lines.append("  ".join(part for part in said if part).rstrip())
    return "\n".join(lines) or "no hits"
