"""A model from Python: pictures and texts in, unit vectors out.

Letters: N pictures, M texts, D embedding.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cytoclip import captions, checkpoint, images, pixels, places
from cytoclip.checkpoint import Opened
from cytoclip.device import World, start
from cytoclip.errors import ExitCode, UserError, shown, suggested
from cytoclip.files import Piece

Picture: TypeAlias = str | Path | Piece | bytes | Image.Image | NDArray[np.uint8]
# What is one picture, though some of it could be gone through like several.
_ONE: Any = (str, os.PathLike, Piece, bytes, Image.Image)
_SHAPES = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
_LONGEST = 100  # characters of a name of no file
_TAKEN = f"a picture is a file's name, the bytes of one, a PIL.Image or a uint8 array of shape {_SHAPES}"


@dataclass(frozen=True)
class Encoder:
    """A model ready to use; made by `load`. Calls from several threads at once are allowed.

    Parameters
    ----------
    opened
        The model with what reads its input.
    world
        Its device and precision.
    """

    opened: Opened
    world: World
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()), repr=False)

    def __repr__(self) -> str:
        world = self.world
        return f"<Encoder {self.name} on {world.device}, precision {world.precision}, {self.width} dimensions>"

    @property
    def name(self) -> str:
        """The hub id or absolute folder that it came from."""
        return self.opened.name

    @property
    def width(self) -> int:
        """D, the dimensions of an embedding."""
        return self.opened.encoder.width

    @property
    def logit_scale(self) -> float:
        """The factor on cosines, 1 / temperature."""
        return float(self.opened.encoder.logit_scale.detach().exp())

    @property
    def logit_bias(self) -> float | None:
        """What is added to scaled cosines by the sigmoid families; None where there is none."""
        bias = self.opened.encoder.logit_bias
        return None if bias is None else float(bias.detach())

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what decides an embedding: the weights, how pictures and texts are read, and the precision."""
        return self.opened.digest(self.world.precision)

    def embed_images(self, pictures: Picture | Iterable[Picture], batch_size: int = 64) -> NDArray[np.float32]:
        """Unit embeddings (N, D) of pictures: files, their bytes, PIL, or uint8 arrays (H, W), (H, W, 1), (H, W, 3),
        (H, W, 4).

        They come in a list, a generator, a column of a table, or a uint8 array (N, H, W, 3); one picture gives N = 1.
        Memory holds `batch_size` decoded pictures at a time.

        Raises
        ------
        UserError
            For a picture that cannot be read, with its place, and for what is no picture, with its row; nothing is
            returned then.
        """
        parts, rows = [np.empty((0, self.width), np.float32)], count()
        for batch in _cut(_listed(pictures), batch_size):
            ready_B3HW = np.stack(list(self._pool.map(self._pixels, batch, rows)))
            parts.append(self.embed_pixels(ready_B3HW))
        return np.concatenate(parts)

    def embed_pixels(self, ready_B3HW: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unit embeddings (B, D) of one batch of pictures that `pixels.prepare` has made ready."""
        with torch.no_grad(), self.world.autocast():
            embedded = self.opened.encoder.images(torch.from_numpy(ready_B3HW).to(self.world.device))
        found: NDArray[np.float32] = embedded.float().cpu().numpy()
        return found

    def embed_texts(self, texts: str | Iterable[str], batch_size: int = 256) -> NDArray[np.float32]:
        """Unit embeddings (M, D) of texts, cut to the model's context; one text gives M = 1.

        Raises
        ------
        UserError
            For what is no text, with its row, and for a text that the model cannot read, such as an empty one where
            its tokenizer makes no token of it.
        """
        some = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        for row, text in enumerate(some):
            if not isinstance(text, str):
                raise UserError(
                    f"row {row} is {shown(text)}, no text", "give a text there, or leave it out", ExitCode.DATA
                )
        encoder, parts = self.opened.encoder, [np.empty((0, self.width), np.float32)]
        for batch in _cut(some, batch_size):
            with self._one_at_a_time:  # a tokenizer keeps how it was last told to cut: two threads would disturb it
                tokens = captions.tokenise(self.opened.tokenizer, batch, self.opened.context, encoder.family)
            with torch.no_grad(), self.world.autocast():
                embedded = encoder.texts(tokens.batch(range(len(batch))).to(self.world.device))
            parts.append(embedded.float().cpu().numpy())
        return np.concatenate(parts)

    def similarity(self, pictures: Picture | Iterable[Picture], texts: str | Iterable[str]) -> NDArray[np.float32]:
        """Cosines (N, M)."""
        cosines: NDArray[np.float32] = self.embed_images(pictures) @ self.embed_texts(texts).T
        return cosines

    def probabilities(self, pictures: Picture | Iterable[Picture], texts: str | Iterable[str]) -> NDArray[np.float32]:
        """How likely each text is for a picture, by the model's own scale: (N, M).

        Rows sum to 1 over the texts (zero-shot classification, CLIP, arXiv 2103.00020, section 3.1); in the sigmoid
        families each is a probability of its own (SigLIP, arXiv 2303.15343).
        """
        return self.shares(self.similarity(pictures, texts))

    def shares(self, cosines_NM: NDArray[np.float32]) -> NDArray[np.float32]:
        """The `probabilities` that cosines stand for: (N, M)."""
        logits_NM = torch.from_numpy(cosines_NM * self.logit_scale)
        if self.logit_bias is not None:
            return torch.sigmoid(logits_NM + self.logit_bias).numpy()
        return logits_NM.softmax(1).numpy()

    def _pixels(self, picture: Picture, row: int) -> NDArray[np.uint8]:
        return pixels.prepare(_plain(picture, row), self.opened.pixels)


def load(path: str | Path, device: str = "auto", precision: str = "no") -> Encoder:
    """Open a run folder (its best weights), a Hugging Face folder, an adapter of ours, or a hub id.

    Parameters
    ----------
    path
        Its name: a folder, or `ORG/NAME` at the hub.
    device
        `auto`, `cpu`, `cuda` or `mps`.
    precision
        `no` (float32), `bf16`, `fp16`, or `auto`: the best that the device has.

    Raises
    ------
    UserError
        Where nothing there can be opened, or the precision or device is none or not there.

    Examples
    --------
    >>> import cytoclip
    >>> encoder = cytoclip.load("runs/first")
    >>> encoder.embed_texts(["one round cell", "a sheet of cells"]).shape == (2, encoder.width)
    True
    >>> encoder.similarity("picture.png", ["one round cell", "a sheet of cells"]).shape
    (1, 2)
    """
    return opened_in(start(device, precision, "the call"), path)


def opened_in(world: World, path: str | Path) -> Encoder:
    """What `load` opens, on a device and in a precision that are settled."""
    opened = checkpoint.open_model(str(path))
    opened.encoder.to(world.device).eval()
    return Encoder(opened, world)


def _listed(pictures: Any) -> Iterable[Any]:
    """The pictures that were given, one after another."""
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        return pictures.tolist() if pictures.dtype.kind in "OU" else [pictures]  # a column of paths, or one picture
    return pictures if isinstance(pictures, Iterable) and not isinstance(pictures, _ONE) else [pictures]


def _plain(picture: Any, row: int) -> Image.Image:
    if isinstance(picture, Image.Image):
        return images.normalise(picture)
    if isinstance(picture, np.ndarray):
        if (
            picture.dtype != np.uint8
            or not picture.size
            or picture.ndim < 2
            or picture.shape[2:] not in ((), (1,), (3,), (4,))
        ):
            raise UserError(
                f"an array of {picture.dtype} {picture.shape} is no picture",
                f"pass uint8 of shape {_SHAPES}; several of one size as (N, H, W, 3)",
                ExitCode.DATA,
            )
        return images.normalise(Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture))
    if not isinstance(picture, _ONE):
        raise UserError(f"row {row} is {shown(picture)}, no picture", _TAKEN, ExitCode.DATA)
    if isinstance(picture, str) and places.is_remote(picture):
        hint = "download it, and give the file or its bytes"
        raise UserError(f"{shown(picture)} is an address, and addresses are not fetched", hint, ExitCode.DATA)
    return _read(picture if isinstance(picture, bytes | Piece) else Path(picture))


def _read(place: Path | Piece | bytes) -> Image.Image:
    """A picture that a caller named: there is no list of pairs that a hint could send them to."""
    try:
        return images.decode(place)
    except UserError as error:
        if isinstance(place, Path) and not os.path.exists(place):  # noqa: PTH110 - Path.exists raises for a long name
            name = str(place) if len(str(place)) <= _LONGEST else f"{str(place)[:_LONGEST]}…"
            hint = suggested(place, f"a name that does not begin with / is looked for in {Path.cwd()}")
            raise UserError(f"{name}: no such file", hint, ExitCode.DATA) from error
        hint = images.READ if images.READ in error.hint else error.hint
        raise UserError(error.message, hint, ExitCode.DATA) from error


def _cut(some: Iterable[Any], each: int) -> Iterator[list[Any]]:
    if not isinstance(each, int) or each < 1:
        raise UserError(f"batch_size {shown(each)} is no whole number from 1", "such as batch_size=64")
    left = iter(some)
    while batch := list(islice(left, each)):
        yield batch
