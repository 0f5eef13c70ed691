"""What the page and the API both do: pictures taken in and handed out, questions put to an index, all within bounds.

Letters: N pictures, M texts, D embedding.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cytoclip import images, thumbnails
from cytoclip.errors import ExitCode, UserError
from cytoclip.search import Hit, Index, Kind

UPLOAD_BYTES = 20_000_000
UPLOAD_PIXELS = 50_000_000  # 0.45 GB while RGB is decoded, 1.7 for floats; microscope cameras have up to 25 million
# Those whose decoders are libraries. In others a part is Python's: 200 kB of one may take seconds of every user.
UPLOAD_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF")
NARROWEST = 50  # times longer than wide: the shortest edge is brought to the model's, whatever the other becomes
TEXT = 2_000  # characters: no text tower reads as many
CAPTIONS = 100  # to score a picture against
HITS = 200
BATCH_PICTURES = 32
BATCH_TEXTS = 256
HELD_BYTES = 200_000_000  # of all pictures that were dropped on the page, the oldest given up first
THUMB, LARGE = 256, 2048  # pixels of the longer side
THUMB_BYTES = 64_000_000  # of all small pictures that are kept


class Kept:
    """Bytes by name, the longest unused given up once there are more than `budget`. For several threads."""

    def __init__(self, budget: int) -> None:
        self._left, self._lock = budget, threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def put(self, name: str, kept: bytes) -> None:
        with self._lock:
            self._left += len(self._kept.pop(name, b"")) - len(kept)
            self._kept[name] = kept
            while self._left < 0:
                self._left += len(self._kept.popitem(last=False)[1])

    def get(self, name: str) -> bytes | None:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)


@dataclass(frozen=True)
class Taken:
    """A picture that was dropped on the page: its name here, which nobody can guess, and what it is."""

    ticket: str
    width: int
    height: int
    preview: bytes  # a small JPEG


@dataclass(frozen=True)
class Scored:
    """How a caption fits a picture: cosine, and the probability of the zero-shot classifier."""

    caption: str
    score: float
    probability: float


class UnknownRow(UserError):  # noqa: N818 - it is told like any other
    """A number that no pair of the index has, or whose picture is not there any more."""


@dataclass(frozen=True)
class Desk:
    """An index with a model, asked by several users at once.

    Parameters
    ----------
    at_once
        Decodes and model calls at a time; others wait.
    """

    index: Index
    at_once: int = 2
    _held: Kept = field(default_factory=lambda: Kept(HELD_BYTES), repr=False)
    _thumbs: Kept = field(default_factory=lambda: Kept(THUMB_BYTES), repr=False)
    _turn: threading.BoundedSemaphore = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_turn", threading.BoundedSemaphore(self.at_once))

    def take(self, picture: bytes) -> Taken:
        """Look at a picture and keep its bytes in memory for the questions to come.

        Raises
        ------
        UserError
            For what is no picture, or too large a one.
        """
        with self._turn:
            decoded = decode(picture)
            preview = thumbnails.jpeg(decoded, THUMB)
        ticket = secrets.token_urlsafe(16)
        self._held.put(ticket, picture)
        return Taken(ticket, *decoded.size, preview)

    def held(self, ticket: str) -> bytes:
        """The bytes that `take` kept."""
        found = self._held.get(ticket)
        if found is None:
            raise UserError("the picture is not held any more", "drop it again", ExitCode.DATA)
        return found

    def search(
        self,
        text: str | None,
        picture: bytes | None,
        k: int,
        weight: float = 0.5,
        kind: Kind = "images",
        where: Mapping[str, str] | None = None,
    ) -> list[Hit]:
        """The k nearest of a text, a picture, or both; an empty text is none."""
        text = text.strip() if text else None
        if not text and picture is None:
            raise UserError("there is nothing to look for", "give a text, a picture, or both")
        if text and len(text) > TEXT:  # the page's own bound is kept by the browser alone
            raise UserError(f"a text of {len(text):,} characters", f"at most {TEXT:,}")
        decoded = None
        with self._turn, self._asked():
            if picture is not None:
                decoded = decode(picture)
            return self.index.search(text or None, decoded, k=k, weight=weight, kind=kind, where=where or None)

    def like(self, row: int, k: int, where: Mapping[str, str] | None = None, kind: Kind = "images") -> list[Hit]:
        """The k pictures nearest to one of the index, without itself; or the captions nearest to it."""
        with self._turn, self._asked(row):
            if kind == "captions":
                return self.index.search(None, self.index.picture(row), k=k, kind=kind, where=where or None)
            return self.index.like(row, k=k, where=where or None)

    def score(self, picture: bytes, captions: Sequence[str]) -> list[Scored]:
        """How each caption fits, in the order given."""
        if not captions:
            raise UserError("there are no captions to score", "write one a line")
        empty = next((number for number, one in enumerate(captions, 1) if not one.strip()), None)
        if empty:
            raise UserError(f"caption {empty} is empty", "give a few words, or leave it out")
        with self._turn:
            decoded, encoder = decode(picture), self.index.encoder
            cosines = encoder.similarity(decoded, list(captions))[0]
            shares = encoder.shares(cosines[None])[0]
        return [
            Scored(caption, float(cosine), float(share))
            for caption, cosine, share in zip(captions, cosines, shares, strict=True)
        ]

    def embed(self, pictures: Sequence[bytes], texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Unit embeddings: (N, D) of the pictures, (M, D) of the texts."""
        encoder = self.index.encoder
        image_ND = []
        for one in pictures:  # a turn each: thirty-two of the largest would hold up all others for long
            with self._turn:
                image_ND.append(encoder.embed_images(decode(one)))
        with self._turn:
            text_MD = encoder.embed_texts(list(texts))
        return np.concatenate([np.empty((0, encoder.width), np.float32), *image_ND]), text_MD

    def model(self) -> dict[str, Any]:
        """Which model answers: its name without the folders above it, digest and width."""
        encoder = self.index.encoder
        return {"model": model_name(encoder.name), "digest": encoder.digest, "width": encoder.width}

    def image(self, row: int, thumb: bool) -> bytes:
        """A picture of the index as JPEG, made small enough to be looked at, with nothing of its file's metadata."""
        made = self._thumbs.get(str(row)) if thumb else None
        if made is None:
            with self._turn, self._asked(row):
                made = thumbnails.jpeg(self.index.picture(row), THUMB if thumb else LARGE)
            if thumb:
                self._thumbs.put(str(row), made)
        return made

    @contextmanager
    def _asked(self, row: int | None = None) -> Iterator[None]:
        """What the index says of a question, without the folders of this machine; of a number, that it is unknown."""
        try:
            yield
        except UserError as error:
            every = (str(self.index.folder), *self.index.manifest.roots, *self.index.roots)
            places = {str(place) for place in every if Path(place).is_absolute() and len(Path(place).parts) > 1}
            message, hint = error.message, error.hint
            for place in sorted(places, key=len, reverse=True):
                message, hint = message.replace(place, "the index"), hint.replace(place, "the index")
            about_row = row is not None and error.code == ExitCode.DATA  # a filter that fits nothing is USAGE
            raise (UnknownRow if about_row else UserError)(message, hint, error.code) from None


def model_name(name: str) -> str:
    """A hub id as it is; a run or a folder by its own name, which does not tell where it lies."""
    place = Path(name)
    if not place.is_absolute():
        return name
    return place.parent.name if place.name == "best" else place.name


def decode(picture: bytes) -> Image.Image:
    """The bytes of a picture from anybody, with tighter bounds than pictures of one's own data have."""
    if len(picture) > UPLOAD_BYTES:
        raise UserError(
            f"the picture has {len(picture):,} bytes, and {UPLOAD_BYTES:,} are allowed",
            "make it smaller",
            ExitCode.DATA,
        )
    try:
        decoded = images.decode(picture, most=UPLOAD_PIXELS, formats=UPLOAD_FORMATS)
    except UserError as error:
        why = error.message.removeprefix("a picture: ")
        raise UserError(f"this is no picture that can be read: {why}", _HINT, ExitCode.DATA) from None
    if max(decoded.size) > NARROWEST * min(decoded.size):
        width, height = decoded.size
        raise UserError(f"a picture of {width}x{height} is too narrow", f"cut it: at most {NARROWEST}:1", ExitCode.DATA)
    return decoded


_HINT = f"JPEG, PNG, TIFF, BMP, WebP, GIF, JPEG 2000 or AVIF, up to {UPLOAD_PIXELS // 1_000_000} million pixels"
