"""Pictures varied for training: what is drawn for a pair is a pure function of (seed, epoch, pair), and done on the
device, a chunk at once.

Letters: b pictures, S×S' pixels as they come (wider than the model's where crops are random), H×W of the model.

A draw is a row of plain numbers that travels with the picture, so the changes are the same in any chunks, on any number
of processes, and when a chunk is embedded the second time. Where only quarter turns and mirrors are drawn they move
pixels and change none. A pair's numbers do not depend on which options are on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import grid_sample, interpolate

from cytoclip.data_options import Augment

# Optical densities per stain in red, green and blue, of unit length: haematoxylin, eosin, DAB (Ruifrok & Johnston,
# Anal Quant Cytol Histol 23:291, 2001, table 1). Papanicolaou's blue-green and pink lie near the first two.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_AMOUNTS = np.linalg.inv(_STAINS)  # from densities, a row, to amounts of the stains
_DARKEST = 1 / 255  # below it the optical density would be infinite
_RATIO = 4 / 3  # of a crop's sides, at most
_WIDEST = math.sqrt(2)  # pixels of twice the model's are read at most: a crop of less than half is enlarged
_REACH = 3  # standard deviations of a blur that its kernel spans
SHOWN = 16  # pictures on a sheet, at most
_DRAWN = 24  # uniform numbers for each pair and epoch; what is not used is drawn all the same


@dataclass(frozen=True)
class Change:
    """What is done to one picture; of several, columns of float32 (b,) each.

    Parameters
    ----------
    transposed, mirrored, upended
        0 or 1: rows and columns exchanged, then left and right, then top and bottom. Together the eight views.
    angle
        Radians, counter-clockwise as seen.
    x, y, width, height
        The crop's centre and size: -1..1 is the picture from left to right and from top to bottom, 1 all of it.
    brightness, contrast, saturation
        Factors.
    hue
        Radians.
    stain
        Nine numbers by rows: what takes optical densities (red, green, blue), a row, to the changed ones.
    blur
        Standard deviation in pixels of the model's input; 0 is none.
    """

    transposed: Any
    mirrored: Any
    upended: Any
    angle: Any
    x: Any
    y: Any
    width: Any
    height: Any
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any
    blur: Any
    stain: Any

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> Change:
        """From the rows of `Variation.draw`: each field as (b, 1, 1, 1), the stain's nine as a list of such."""
        columns = list(rows.T[:, :, None, None, None])
        plain = [field.name for field in fields(cls)[:-1]]
        return cls(**dict(zip(plain, columns, strict=False)), stain=columns[len(plain) :])

    def row(self) -> torch.Tensor:
        plain = [float(getattr(self, field.name)) for field in fields(self)[:-1]]
        return torch.tensor([*plain, *np.ravel(self.stain).tolist()], dtype=torch.float32)


@dataclass(frozen=True)
class Variation:
    """How the pictures of a run are varied.

    Parameters
    ----------
    size
        (H, W) of the model's input.
    """

    augment: Augment
    size: tuple[int, int]
    seed: int

    @property
    def margin(self) -> float:
        """How much larger than the model's input pictures are read, along a side: the smallest crop is not enlarged,
        or by as little as twice the pixels allow.
        """
        return min(_WIDEST, 1 / math.sqrt(self.augment.smallest_crop))

    def draw(self, pair: int, epoch: int, upright: bool = False) -> torch.Tensor:
        """The change of a pair in an epoch: float32 (22,).

        With `upright`, for a caption that names a side, neither turned nor mirrored, unless `sides` is ignore.
        """
        augment, u = self.augment, np.random.default_rng([self.seed, epoch, pair, 2]).random(_DRAWN)
        upright = upright and self.minds_sides
        quarter = int(4 * u[0]) if augment.rotation != "none" and not upright else 0
        mirrored = [bool(one < 0.5) and augment.flips and not upright for one in u[1:3]]
        if self.size[0] != self.size[1]:
            quarter = quarter // 2 * 2  # a picture that is not square has no quarter turns, only the half one
        turned = quarter in (2, 3), quarter in (1, 2)  # mirrored after an exchange of rows and columns
        any_angle = augment.rotation == "any" and not upright
        return Change(
            transposed=quarter % 2,
            mirrored=turned[0] != mirrored[0],
            upended=turned[1] != mirrored[1],
            angle=(u[3] - 0.5) * math.pi / 2 if any_angle else 0.0,  # beside the quarter turns
            **_crop(augment.smallest_crop, u[4:8]),
            brightness=1 + augment.brightness * _around_0(u[8]),
            contrast=1 + augment.contrast * _around_0(u[9]),
            saturation=1 + augment.saturation * _around_0(u[10]),
            hue=2 * math.pi * augment.hue * _around_0(u[11]),
            blur=augment.blur * u[13] if u[12] < 0.5 else 0.0,
            stain=_stain(1 + augment.stain * _around_0(u[14:17])),
        ).row()

    @torch.no_grad()
    def apply(self, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Change pictures as their rows (b, 22) say, each by itself.

        Parameters
        ----------
        pixels
            uint8 (b, 3, S, S').

        Returns
        -------
        torch.Tensor
            float32 (b, 3, H, W) of 0..255, on the same device.
        """
        with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 has 256 levels for what has 256 already
            change, augment = Change.of_rows(rows), self.augment
            seen = _views(pixels, change) if self._turns else pixels
            seen = _placed(seen, change, self.size) if self._resamples(pixels) else seen.to(torch.float32) / 255
            if augment.stain:
                seen = _stained(seen, change)
            if augment.brightness or augment.contrast:
                seen = _lit(seen, change, pixels)
            if augment.saturation:
                seen = _saturated(seen, change)
            if augment.hue:
                seen = _hued(seen, change)
            if augment.blur:
                seen = _blurred(seen, change, augment.blur)
            return seen * 255

    @property
    def minds_sides(self) -> bool:
        """Whether it matters that a caption names a side."""
        return self._turns and self.augment.sides == "keep"

    @property
    def _turns(self) -> bool:
        return self.augment.flips or self.augment.rotation != "none"

    def _resamples(self, pixels: torch.Tensor) -> bool:
        cut = self.augment.smallest_crop < 1 or self.augment.rotation == "any"
        return cut or tuple(pixels.shape[2:]) != self.size


def seen_by(encoder: Callable[..., Any], variation: Variation | None) -> Callable[..., Any]:
    """`encoder`, shown each picture as the row behind its texts says; itself where nothing is varied."""
    if variation is None:
        return encoder

    def shown(images: torch.Tensor, texts: torch.Tensor, rows: torch.Tensor, *rest: torch.Tensor) -> Any:
        return encoder(variation.apply(images, rows), texts, *rest)

    return shown


def sheet(variation: Variation, pixels: torch.Tensor, rows: torch.Tensor) -> bytes:
    """Pictures above what they become, in rows of eight: a PNG."""
    (height, width), each = variation.size, SHOWN // 2
    became = variation.apply(pixels, rows)
    came = interpolate(pixels.to(torch.float32), (height, width), mode="bilinear", antialias=True)
    pairs = torch.stack([came, became], dim=1).round().clamp(0, 255).to(torch.uint8).cpu()
    gap, lines = max(2, height // 32), math.ceil(len(pairs) / each)
    drawn = np.full(
        (lines * (2 * height + 3 * gap) + gap, min(each, len(pairs)) * (width + gap) + gap, 3), 255, np.uint8
    )
    for number, pair in enumerate(pairs):
        top = gap + number // each * (2 * height + 3 * gap)
        left = gap + number % each * (width + gap)
        for place, picture in enumerate(pair):
            begin = top + place * (height + gap)
            drawn[begin : begin + height, left : left + width] = picture.permute(1, 2, 0).numpy()
    written = BytesIO()
    Image.fromarray(drawn).save(written, "PNG")
    return written.getvalue()


def _around_0(u: Any) -> Any:
    """From 0..1 to -1..1."""
    return 2 * u - 1


def _crop(smallest: float, u: NDArray[np.float64]) -> dict[str, float]:
    """A crop of at least `smallest` of the area that lies within the picture."""
    area = 1 - (1 - smallest) * u[0]
    widest = min(_RATIO, 1 / area)
    ratio = widest ** _around_0(u[1])
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return {
        "x": _around_0(u[2]) * (1 - width),
        "y": _around_0(u[3]) * (1 - height),
        "width": width,
        "height": height,
    }


def _stain(factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3): densities of a pixel to amounts of the stains, each times its factor, and back to densities."""
    changed: NDArray[np.float64] = _AMOUNTS @ np.diag(factors) @ _STAINS
    return changed


def _views(pixels: torch.Tensor, change: Change) -> torch.Tensor:
    """The eight views by moving pixels; `where`, because choosing rows would make the host wait for a GPU."""
    if pixels.shape[2] == pixels.shape[3]:
        pixels = torch.where(change.transposed > 0, pixels.transpose(2, 3), pixels)
    pixels = torch.where(change.mirrored > 0, pixels.flip(3), pixels)
    return torch.where(change.upended > 0, pixels.flip(2), pixels)


def _placed(pixels: torch.Tensor, change: Change, size: tuple[int, int]) -> torch.Tensor:
    """The crop, turned about its centre, at the size of the model: bilinear, mirrored beyond the border; 0..1.

    The grid is made number by number: a matrix product may differ in its last bits from batch to batch.
    """
    rows, columns = pixels.shape[2:]
    y_H1, x_1W = _centres(size[0], pixels.device)[:, None], _centres(size[1], pixels.device)[None, :]
    cos, sin = (part[:, 0] for part in (torch.cos(change.angle), torch.sin(change.angle)))
    width, height, x, y = (part[:, 0] for part in (change.width, change.height, change.x, change.y))
    x_bHW = (x_1W * width * cos - y_H1 * height * sin * (rows / columns)) + x
    y_bHW = (x_1W * width * sin * (columns / rows) + y_H1 * height * cos) + y
    grid = torch.stack([x_bHW, y_bHW], dim=-1)
    placed = grid_sample(pixels.to(torch.float32), grid, "bilinear", padding_mode="reflection", align_corners=False)
    return placed / 255


def _centres(count: int, device: torch.device) -> torch.Tensor:
    """Where the middles of `count` pixels lie in -1..1."""
    return (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * (2 / count) - 1


def _stained(pixels: torch.Tensor, change: Change) -> torch.Tensor:
    red, green, blue = torch.chunk(-torch.log(pixels.clamp(min=_DARKEST)), 3, dim=1)
    to = change.stain
    changed = [red * to[j] + green * to[3 + j] + blue * to[6 + j] for j in range(3)]
    return torch.exp(-torch.cat(changed, dim=1)).clamp(max=1)


def _lit(pixels: torch.Tensor, change: Change, came: torch.Tensor) -> torch.Tensor:
    """Brightness, then contrast about the mean grey of the picture as it `came`.

    That mean is taken of the whole levels before anything else, in whole numbers: a sum of floats may differ in its
    last bits from batch to batch.
    """
    sums = came.sum(dim=(2, 3), keepdim=True, dtype=torch.int64)
    red, green, blue = torch.chunk(sums.to(torch.float64) / (255 * came[0, 0].numel()), 3, dim=1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue).to(torch.float32)  # ITU-R BT.601
    lit, pivot = pixels * change.brightness, grey * change.brightness
    changed: torch.Tensor = ((lit - pivot) * change.contrast + pivot).clamp(0, 1)
    return changed


def _saturated(pixels: torch.Tensor, change: Change) -> torch.Tensor:
    from kornia.enhance import adjust_saturation

    changed: torch.Tensor = adjust_saturation(pixels, change.saturation.reshape(-1))
    return changed.clamp(0, 1)


def _hued(pixels: torch.Tensor, change: Change) -> torch.Tensor:
    from kornia.enhance import adjust_hue

    changed: torch.Tensor = adjust_hue(pixels, change.hue.reshape(-1))
    return changed.clamp(0, 1)


def _blurred(pixels: torch.Tensor, change: Change, largest: float) -> torch.Tensor:
    """Not by `gaussian_blur2d`, which reads its sigmas on the host, and makes it wait for a GPU."""
    from kornia.filters import filter2d_separable, get_gaussian_kernel1d

    taps = 2 * max(1, math.ceil(_REACH * largest)) + 1
    weights = get_gaussian_kernel1d(taps, change.blur.reshape(-1, 1).clamp(min=1e-3))
    blurred: torch.Tensor = filter2d_separable(pixels, weights, weights, "reflect")
    return torch.where(change.blur > 0, blurred, pixels)
