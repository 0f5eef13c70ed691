"""Small pictures inside a page, as data URIs that hold pixels and nothing else of their file."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from cytoclip import images
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
        picture.thumbnail((self._side, self._side), Image.Resampling.BICUBIC, reducing_gap=2.0)
        written = io.BytesIO()
        bare = Image.fromarray(np.asarray(picture))  # nothing of the file's metadata comes along
        bare.save(written, "JPEG", quality=75)
        return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
