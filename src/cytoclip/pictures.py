"""What one draw of a pair brings: its picture decoded, or stored features, and all that is random about it.

Letters: N pairs, C captions, U different pictures or captions, H×W pixels, P patches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cytoclip import images
from cytoclip.augment import Variation
from cytoclip.decoded import Decoded
from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece
from cytoclip.order import Draw, Wording
from cytoclip.pixels import PixelSpec, prepare


def read(file: Path | Piece | bytes, spec: PixelSpec, reduced: bool = False) -> NDArray[np.uint8]:
    """A picture as `spec` says: uint8 (3, H, W).

    Parameters
    ----------
    reduced
        A large JPEG is decoded at a half, a quarter or an eighth of its size, and no pixel is exact.
    """
    return prepare(images.decode(file, spec.shortest_read if reduced else None), spec, exact=not reduced)


@dataclass(frozen=True)
class PatchDropout:
    """Which patches the image tower sees, as a function of (seed, epoch, pair).

    Parameters
    ----------
    patches
        P, of a whole picture.
    share
        Of them, that are dropped (FLIP, arXiv 2212.00794).
    """

    patches: int
    share: float
    seed: int

    def keep(self, pair: int, epoch: int) -> torch.Tensor:
        """Indices of the patches kept, in their order: int64 (K,), K the same for every pair."""
        kept = max(1, round(self.patches * (1 - self.share)))
        drawn = np.random.default_rng([self.seed, epoch, pair, 1]).permutation(self.patches)[:kept]
        return torch.from_numpy(np.sort(drawn))


@dataclass(frozen=True)
class Varied:
    """How a split's pictures are varied: upright in the epochs whose caption names a side.

    Parameters
    ----------
    names_side
        bool (C,): of each caption, numbered as in `wording`; nobody asks where `variation` does not mind sides.
    """

    variation: Variation
    wording: Wording
    names_side: NDArray[np.bool_]

    def draw(self, pair: int, epoch: int) -> torch.Tensor:
        """The change of a pair in an epoch: float32 (22,)."""
        caption = self.wording.rows(np.array([pair]), np.array([epoch]))[0]
        return self.variation.draw(pair, epoch, bool(self.names_side[caption]))


class Drawn(NamedTuple):
    """What the loader makes of one draw: of which pair and epoch it is, its picture or features, and what is random."""

    draw: Draw
    picture: NDArray[Any] | UserError
    change: torch.Tensor | None = None
    keep: torch.Tensor | None = None


class Pictures(Dataset[Drawn]):
    """Decoded pictures at the size that `spec` says, each with the draw that it is of.

    One that fails gives way to the first of its standbys that does not, or becomes its error, raised by `next_batch`.

    Parameters
    ----------
    reduced
        As of `read`.
    """

    def __init__(
        self,
        files: Sequence[Path | Piece],
        spec: PixelSpec,
        dropout: PatchDropout | None = None,
        varied: Varied | None = None,
        reduced: bool = False,
    ) -> None:
        self._files, self._spec, self._dropout, self._varied, self._reduced = files, spec, dropout, varied, reduced
        self.kept: Decoded | None = None

    def __len__(self) -> int:
        return len(self._files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of each."""
        return 3, *self._spec.size

    @property
    def settings(self) -> str:
        """All that their pixels depend on beside the file, in words: what comes after the bytes are read does not."""
        plain = replace(self._spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), rescale=1.0)
        return f"{plain}{', reduced' if self._reduced else ''}, {images.VERSION}"

    def kept_in(self, kept: Decoded) -> Pictures:
        """The same pictures, read from `kept` where they are there, else put there once they are decoded."""
        made = copy.copy(self)
        made.kept = kept
        return made

    def __getitem__(self, draw: Draw) -> Drawn:
        return self.drawn(draw, np.empty(self.shape, np.uint8) if self.kept else None)

    def drawn(self, draw: Draw, place_3HW: NDArray[np.uint8] | None = None) -> Drawn:
        """The picture of a draw: where it is read from the kept ones, in `place_3HW`."""
        pair, epoch, *standbys = draw
        for index in (pair, *standbys):
            try:
                picture = self._picture(index, place_3HW)
            except UserError as error:  # the loader would rebuild it from its text alone
                failed = error
                if error.code is not ExitCode.DATA:  # the disk's fault, and no other picture would do better
                    break
            else:
                change = self._varied.draw(index, epoch) if self._varied else None
                keep = self._dropout.keep(index, epoch) if self._dropout else None
                return Drawn((index, epoch), picture, change, keep)
        return Drawn((pair, epoch), failed)

    def _picture(self, index: int, place_3HW: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        if self.kept and place_3HW is not None and self.kept.read(index, place_3HW):
            return place_3HW
        picture = read(self._files[index], self._spec, self._reduced)
        if self.kept:
            self.kept.write(index, picture)
        return picture


class Rows(Dataset[Drawn]):
    """Stored features of a frozen tower, one row a pair, in the place of pictures or captions.

    Parameters
    ----------
    table
        float32 (U, width): a row for each different picture or caption; may be memory-mapped. NaN for a bad picture.
    of
        int64 (N,): the row of each pair.
    """

    def __init__(self, table: NDArray[np.float32], of: NDArray[np.int64]) -> None:
        self.table, self.of = table, of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, draw: Draw) -> Drawn:
        pair, epoch, *standbys = draw
        for index in (pair, *standbys):
            row = np.array(self.table[self.of[index]])  # a copy: the table may be mapped read-only
            if not np.isnan(row[0]):
                return Drawn((index, epoch), row)
        return Drawn((pair, epoch), _no_features(pair))

    def batch(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """The rows of the pairs at `indices`: float32 (B, width)."""
        return torch.from_numpy(np.array(self.table[self.of[indices]]))


def _no_features(pair: int) -> UserError:
    what = f"the picture of pair {pair} could not be used when its features were stored, nor those that may stand in"
    return UserError(what, "mend the pictures that `cytoclip check` names", ExitCode.DATA)
