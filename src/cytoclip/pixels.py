"""A plain picture to the numbers a model sees, the same to the last bit as the checkpoint's own processor.

Letters: B pictures, C channels (3), H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cytoclip.errors import ExitCode, UserError, first_few

_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
_RAGGED = "gives pictures of different sizes (no crop and no fixed size)"


@dataclass(frozen=True)
class PixelSpec:
    """What a checkpoint's image processor does, as plain numbers: resize, centre crop, rescale, normalise.

    Parameters
    ----------
    resize
        The shortest edge in pixels, or (height, width) whatever the shape; None leaves the size.
    crop
        (height, width) from the centre, padded with black where the picture is smaller.
    resample
        Pillow's number of the filter: 3 is bicubic.
    mean, std
        Per channel, subtracted and divided by after the rescaling.
    rescale
        Factor of the stored values: 1/255 brings them to 0..1.
    pad
        Whether the whole picture is brought into `size` in its own shape, and the rest filled with the median colour
        of its border, instead of `resize` and `crop`: no processor of transformers does that.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    pad: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out; UserError where it would differ from picture to picture."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, tuple):
            return self.resize
        raise _refused("the image processor", _RAGGED)

    @property
    def shortest_read(self) -> int | None:
        """The shortest edge that a picture needs before the resize, or what comes out would be enlarged; None: any."""
        return max(self.resize) if isinstance(self.resize, tuple) else self.resize

    def widened(self, factor: float) -> PixelSpec:
        """The same view in `factor` times as many pixels along a side; itself where pictures are not resized."""
        if self.resize is None:
            return self

        def wide(edges: tuple[int, int]) -> tuple[int, int]:
            return round(edges[0] * factor), round(edges[1] * factor)

        resize = wide(self.resize) if isinstance(self.resize, tuple) else round(self.resize * factor)
        return replace(self, resize=resize, crop=None if self.crop is None else wide(self.crop))

    def fitted(self, crop: str) -> PixelSpec:
        """The same with another policy of `data.crop`, for as many pixels: auto changes nothing.

        center: the shortest edge to the size (the longer one of a size that is not square), then its middle.
        pad: the longest edge to the size, then filled up. squash: to the size, whatever the shape.
        """
        if crop == "auto":
            return self
        if crop == "center":
            return replace(self, resize=max(self.size), crop=self.size, pad=False)
        if crop in ("pad", "squash"):
            return replace(self, resize=self.size, crop=None, pad=crop == "pad")
        raise ValueError(f"no crop policy {crop!r}")

    @classmethod
    def from_processor(cls, processor: Any) -> PixelSpec:
        """Read a transformers image processor, and prove on one picture of noise that the numbers say all it does.

        Raises
        ------
        UserError
            It does something else as well, its pictures differ in size, or its pixels are not ours: a processor on
            torchvision resizes differently (load it with `backend="pil"`).
        """
        name = type(processor).__name__
        steps = {step for step in dir(processor) if step.startswith("do_") and getattr(processor, step) is True}
        if extra := sorted(steps - _STEPS):
            raise _refused(name, f"does more than resize, crop, rescale and normalise: {first_few(extra)}")
        resample = getattr(processor, "resample", None)
        if resample is not None and not isinstance(resample, int):
            raise _refused(name, f"resizes with {resample!r}, which is not a filter of Pillow")
        normalises = "do_normalize" in steps
        spec = cls(
            resize=_edges(processor, "size", "shortest_edge") if "do_resize" in steps else None,
            crop=cast(tuple[int, int], _edges(processor, "crop_size")) if "do_center_crop" in steps else None,
            resample=int(Image.Resampling.BILINEAR if resample is None else resample),  # None as transformers takes it
            mean=_three(processor.image_mean if normalises else 0.0),
            std=_three(processor.image_std if normalises else 1.0),
            rescale=float(processor.rescale_factor) if "do_rescale" in steps else 1.0,
        )
        if spec.crop is None and not isinstance(spec.resize, tuple):
            raise _refused(name, _RAGGED)
        if spec.rescale <= 0 or min(spec.std) <= 0:
            raise _refused(name, f"has rescale_factor {spec.rescale} and image_std {spec.std}: not all above 0")
        _prove(spec, processor, name)
        return spec


def prepare(image_rgb: Image.Image, spec: PixelSpec, exact: bool = True) -> NDArray[np.uint8]:
    """Resize and crop one picture: uint8 (3, H, W), contiguous, bit-equal to transformers' PIL image processor.

    Not `exact`, what the crop leaves is not resized first: a quarter of the work at 4:3, for about one level in a few
    pixels.

    Of a plain picture, as `normalise` gives it. The long edge after a resize to the shortest is rounded down, and the
    crop starts at floor((edge - crop) / 2), below 0 where the picture is smaller: so transformers 5.23. With `pad`, as
    `PixelSpec` says it.
    """
    if spec.pad:
        return _padded(image_rgb, spec)
    target = _resized(image_rgb.size, spec.resize)
    if target != image_rgb.size:
        box = None if exact or spec.crop is None else _box(image_rgb.size, target, spec.crop[::-1])
        image_rgb = image_rgb.resize(spec.crop[::-1] if box and spec.crop else target, spec.resample, box)
    picture_HWC = np.asarray(image_rgb)
    (rows, columns), (height, width) = picture_HWC.shape[:2], spec.size
    top, left = (rows - height) // 2, (columns - width) // 2
    first_row, last_row = max(top, 0), min(top + height, rows)
    first_column, last_column = max(left, 0), min(left + width, columns)
    crop_CHW = np.zeros((3, height, width), dtype=np.uint8)
    crop_CHW[:, first_row - top : last_row - top, first_column - left : last_column - left] = picture_HWC[
        first_row:last_row, first_column:last_column
    ].transpose(2, 0, 1)
    return crop_CHW


def to_floats(pixels: torch.Tensor, spec: PixelSpec) -> torch.Tensor:
    """Rescale and normalise on the tensor's device: (B, 3, H, W) of 0..255, uint8 as they are decoded or float32 as
    `augment` leaves them, to float32 of the same shape.

    Equal to transformers' processor to the last bit on a CPU for every value and checkpoint tried (the test goes
    through all 256 x 3): transformers multiplies by 1/255 in float64 and rounds once, and so does a float32 division
    by 255, where a float32 multiplication would be off by up to 2.4e-7.
    """

    def on_device(values: Sequence[float]) -> torch.Tensor:
        # filled there: a copy from the host would wait for the queue of a GPU, and a Python number as divisor is
        # turned into a multiplication on CUDA
        filled = [torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values]
        return torch.stack(filled)

    floats = pixels.to(torch.float32, copy=True)
    return floats.div_(on_device([1 / spec.rescale])).sub_(on_device(spec.mean)).div_(on_device(spec.std))


def _refused(name: str, what: str) -> UserError:
    hint = "use a checkpoint with a CLIP or SigLIP image processor of one fixed size, loaded with backend='pil'"
    return UserError(f"{name} {what}", hint, ExitCode.MODEL)


def _edges(processor: Any, option: str, alone: str = "") -> int | tuple[int, int]:
    """The (height, width) of an option, or the one edge that may stand `alone`."""
    value = getattr(processor, option, None)
    edges = dict(value) if isinstance(value, Iterable) else {}  # a dict, or transformers' SizeDict
    if set(edges) == {alone}:
        return int(edges[alone])
    if set(edges) != {"height", "width"}:
        raise _refused(type(processor).__name__, f"has {option} {edges or value}, which is not reproduced here")
    return int(edges["height"]), int(edges["width"])


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = np.broadcast_to(np.asarray(values, dtype=np.float64), (3,)).tolist()
    return red, green, blue


def _prove(spec: PixelSpec, processor: Any, name: str) -> None:
    """Compare with the processor itself: a step that has no name we know shows in the pixels."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 160, 3), dtype=np.uint8))
    ours = to_floats(torch.from_numpy(prepare(noise, spec))[None], spec).numpy()
    try:
        theirs = np.asarray(processor(images=noise, return_tensors="np")["pixel_values"])
    except Exception as error:  # whatever another processor asks for, it is not one of ours
        raise _refused(name, f"does not take a picture ({error})") from error
    if theirs.shape != ours.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise _refused(name, "gives other pixels than a plain resize, crop, rescale and normalise with its numbers")


def _padded(image_rgb: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """The whole picture in the middle of (3, H, W), around it the median of its border, each channel by itself.

    The border, not one colour for all: what lies around a field is white on a slide and black beside a round one. The
    median, because cells on the border are the fewer pixels.
    """
    (width, height), (rows, columns) = image_rgb.size, spec.size
    scale = min(rows / height, columns / width)
    target = min(columns, max(1, round(width * scale))), min(rows, max(1, round(height * scale)))
    if target != image_rgb.size:
        image_rgb = image_rgb.resize(target, resample=spec.resample)
    picture_HWC = np.asarray(image_rgb)
    border = [picture_HWC[0], picture_HWC[-1], picture_HWC[:, 0], picture_HWC[:, -1]]
    colour = np.median(np.concatenate(border), axis=0).astype(np.uint8)
    padded_CHW = np.empty((3, rows, columns), dtype=np.uint8)
    padded_CHW[:] = colour[:, None, None]
    top, left = (rows - target[1]) // 2, (columns - target[0]) // 2
    padded_CHW[:, top : top + target[1], left : left + target[0]] = picture_HWC.transpose(2, 0, 1)
    return padded_CHW


def _box(
    size: tuple[int, int], target: tuple[int, int], crop: tuple[int, int]
) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of the crop in a picture that is to be made smaller, to `target`; None: it is not."""
    left, top = ((there - kept) // 2 for there, kept in zip(target, crop, strict=True))
    across, down = (before / after for before, after in zip(size, target, strict=True))
    if min(left, top) < 0 or min(across, down) < 1:
        return None
    return left * across, top * down, (left + crop[0]) * across, (top + crop[1]) * down


def _resized(size: tuple[int, int], resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) after the resize, from (width, height) before: Pillow's order, unlike `PixelSpec`'s."""
    if resize is None:
        return size
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize
