"""Small pictures, inside a page as data URIs: they hold pixels and nothing else of their file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cytoclip import images, pages
from cytoclip.errors import UserError
from cytoclip.files import Piece


class Thumbnails:
    """Small JPEGs as data URIs, each made once, until a budget is spent.

    Parameters
    ----------
    budget
        Bytes of all that is handed out; each mention is a copy. What is asked for first has its picture first.
    side
        Pixels of the longer side.
    """

    def __init__(self, budget: int, side: int = 160) -> None:
        self._left, self._side = budget, side
        self._made: dict[Path | Piece, str] = {}

    def of(self, place: Path | Piece) -> str:
        """The picture of a file; empty where it cannot be read, or nothing is left of the budget."""
        if place not in self._made:
            self._made[place] = self._make(place) if self._left > 0 else ""
        made = self._made[place]
        if len(made) > self._left:
            return ""
        self._left -= len(made)
        return made

    def _make(self, place: Path | Piece) -> str:
        try:
            picture = images.decode(place)
        except UserError:  # changed since it was looked at
            return ""
        return pages.data_uri(jpeg(picture, self._side, quality=75))


def jpeg(picture: Image.Image, side: int, quality: int = 85) -> bytes:
    """A plain picture as JPEG, its longer side at most `side` pixels; nothing of its file's metadata comes along."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
    written = io.BytesIO()
    Image.fromarray(np.asarray(small)).save(written, "JPEG", quality=quality)
    return written.getvalue()
