"""One picture from a file to the numbers a model sees, the same to the last bit as the checkpoint's own processor.

Letters: B pictures, C channels (3), H height, W width.
"""

from __future__ import annotations

import hashlib
import logging
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from cytoclip.errors import ExitCode, UserError, first_few

# Pillow keeps 4 bytes a pixel, and twice that while it converts: 1.6 GB for one picture at this limit. The largest
# single-shot cameras give 150 million pixels; what is larger is a whole slide, which is to be cut into fields first.
MAX_PIXELS = 200_000_000

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else logging's last resort prints its errors on stderr
Image.init()  # registers every format now, in one thread, rather than in the first of many decodes

# All that Pillow opens but EPS, whose reader would start Ghostscript on the file. The commonest first (JPEG stands for
# MPO too); formats without a signature, such as TGA, would take any file for one and are asked only by their ending.
_NO_SIGNATURE = {name for name, (_, accepts) in Image.OPEN.items() if accepts is None}
_COMMON = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000")
FORMATS = tuple(dict.fromkeys((*_COMMON, *sorted(Image.OPEN.keys() - _NO_SIGNATURE - {"EPS"}))))

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}
_FLIP, _FLOP, _90, _180, _270, _TRANSPOSE, _TRANSVERSE = Image.Transpose
_TURNS = {2: _FLIP, 3: _180, 4: _FLOP, 5: _TRANSPOSE, 6: _270, 7: _TRANSVERSE, 8: _90}  # by EXIF 2.32's orientation
_ORIENTATION, _BITS, _PHOTOMETRIC, _RANGES = 274, 258, 262, ((340, 341), (280, 281))  # EXIF and TIFF tags
_FROM_PILLOW = re.compile(r"PIL\.")
_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
_RAGGED = "gives pictures of different sizes (no crop and no fixed size)"
_SCAN_BLOCK = 1024  # files handed to the threads at once: five million futures would take gigabytes


def decode(path: Path) -> Image.Image:
    """Read a file as a plain RGB picture (see `normalise`), completely, or say what is wrong with it.

    Only a regular file is opened, in any format of Pillow's but EPS, and the size that its header claims is checked
    before a pixel is decoded. Safe in threads and forked workers. Pillow's warnings are silent from the first call on.

    Raises
    ------
    UserError
        Whatever the reason: the file, and the short phrase that `scan` reports.
    """
    _hush()
    try:
        with _reading(path) as stream:
            return normalise(_open(stream))
    except Exception as error:  # Pillow's plugins raise nearly every kind for a damaged file
        why = _why(error)
        raise UserError(f"{path}: {why}", _HINTS.get(why, _HINT), ExitCode.DATA) from error


def normalise(image: Image.Image) -> Image.Image:
    """Make a picture plain: its first page, upright, RGB, opaque.

    - EXIF's rotation is applied; EXIF that cannot be read asks for none.
    - One channel of 16 bits is scaled from the range that its storage declares to 0..255, halves rounded up: TIFF's
      (S)MinSampleValue and (S)MaxSampleValue where both are there, else 0..2**BitsPerSample-1.
    - 32-bit integers, signed 16-bit TIFF (which Pillow widens) and floats declare no range: without these tags the
      picture's own minimum..maximum is used, and a picture of one value is black. A 16-bit PGM declares 0..65535.
    - Transparency is composited on white, as transformers does; for 16-bit grey with a transparent value as well.
    - Everything else (CMYK, YCbCr, LAB, HSV, palette, bilevel, grey) becomes RGB as Pillow converts it. Colour
      profiles are not applied; transformers does not apply them either.

    Pillow itself reads 16-bit colour, and 16-bit grey with alpha, as the high byte of each sample: there the result
    is floor(value / 256), at most 1 below what scaling would give. The depth of a PNG's transparent value is known
    only before `image` is loaded. Where `image` is plain already it is returned itself.
    """
    image.seek(0)
    _key_at_eight_bits(image)
    image.load()
    turn = _turn(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        plain = Image.fromarray(_grey(image)).convert("RGB")
    elif image.has_transparency_data:
        plain = _on_white(image)
    else:
        plain = image if image.mode == "RGB" else image.convert("RGB")
    if turn is not None:
        plain = plain.transpose(turn)
        plain.info = {}  # or the orientation would be applied again
    return plain


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
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out; UserError where it would differ from picture to picture."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.resize, tuple):
            return self.resize
        raise _refused("the image processor", _RAGGED)

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


def prepare(image_rgb: Image.Image, spec: PixelSpec) -> NDArray[np.uint8]:
    """Resize and crop one picture: uint8 (3, H, W), contiguous, bit-equal to transformers' PIL image processor.

    Of a plain picture, as `normalise` gives it. The long edge after a resize to the shortest is rounded down, and the
    crop starts at floor((edge - crop) / 2), below 0 where the picture is smaller: so transformers 5.23.
    """
    target = _resized(image_rgb.size, spec.resize)
    if target != image_rgb.size:
        image_rgb = image_rgb.resize(target, resample=spec.resample)
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
    """Rescale and normalise on the tensor's device: uint8 (B, 3, H, W) to float32 of the same shape.

    Equal to transformers' processor to the last bit on a CPU for every value and checkpoint tried (the test goes
    through all 256 x 3): transformers multiplies by 1/255 in float64 and rounds once, and so does a float32 division
    by 255, where a float32 multiplication would be off by up to 2.4e-7.
    """

    def on_device(values: Sequence[float]) -> torch.Tensor:
        # filled there: a copy from the host would wait for the queue of a GPU, and a Python number as divisor is
        # turned into a multiplication on CUDA
        filled = [torch.full((1, 1), value, dtype=torch.float32, device=pixels.device) for value in values]
        return torch.stack(filled)

    floats = pixels.to(torch.float32)
    return floats.div_(on_device([1 / spec.rescale])).sub_(on_device(spec.mean)).div_(on_device(spec.std))


@dataclass(frozen=True, slots=True)
class Scan:
    """What one look at a file found."""

    content: str  # SHA-256 of its bytes, hexadecimal: equal for equal files; empty where they cannot be read
    problem: str | None  # a short phrase ("truncated"), or None for a picture that can be used


def scan(paths: Sequence[Path], threads: int, progress: Callable[[int], None] | None = None) -> list[Scan]:
    """Look at every file once before any work is lost: hash, header, claimed size, and whether its end is there.

    JPEG and PNG are taken for whole when the last bytes are their end marker; where they are not, and for every
    other format, the picture is decoded as `decode` does. A hole in the middle of a JPEG or PNG is not found.
    In the order of `paths`; no file raises, whatever is wrong with it.

    Parameters
    ----------
    threads
        Files read at a time: hashing and decoding release Python's lock, so all cores work.
    progress
        Called in this thread with the number of files done.
    """
    results: list[Scan] = []
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="scan") as pool:
        for start in range(0, len(paths), _SCAN_BLOCK):
            for result in pool.map(_scan_one, paths[start : start + _SCAN_BLOCK]):  # left early (Ctrl-C), map cancels
                results.append(result)
                if progress is not None:
                    progress(len(results))
    return results


class _UnusableError(Exception):
    """Carries the phrase for what is wrong with a file."""


_HINT = "replace the file or take its pair out of the JSON; every format that Pillow opens but EPS is read"
_HINTS = {
    "no such file": "check the name in the JSON: it is relative to imgs/, and capitals matter",
    "permission denied": "make the file readable for this user",
    "not a regular file": "name a picture file: folders, pipes and devices are not opened",
}


def _hush() -> None:
    """Silence Pillow's warnings: a bad file is our error, an odd tag is nobody's concern.

    `warnings.catch_warnings` is not for threads, so the filter stays; pytest and others drop it, so it is looked for.
    """
    if not any(entry[3] == _FROM_PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_FROM_PILLOW.pattern)


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    facts = path.stat()  # before opening: opening a pipe would wait for its writer
    if not stat.S_ISREG(facts.st_mode):
        raise _UnusableError("not a regular file")
    if facts.st_size == 0:
        raise _UnusableError("empty file")
    with path.open("rb") as stream:
        yield stream


def _open(stream: BufferedReader) -> ImageFile.ImageFile:
    """The header only. Not `Image.open`, which warns on stderr and raises without telling width and height."""
    prefix = stream.read(16)
    recognised = ""
    by_ending = Image.EXTENSION.get(Path(stream.name).suffix.lower(), "")
    for name in (*FORMATS, by_ending) if by_ending in _NO_SIGNATURE else FORMATS:
        plugin, accepts = Image.OPEN.get(name, (None, None))  # a Pillow may be built without WebP
        if plugin is None or (accepts is not None and accepts(prefix) is not True):
            continue
        recognised = name
        stream.seek(0)
        try:
            image = plugin(stream, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # what Image.open takes for "try the next format"
            continue
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _UnusableError(f"claims {width}x{height} pixels")
        return image
    raise _UnusableError(f"truncated or damaged {recognised}" if recognised else "not a picture of a known format")


def _why(error: Exception) -> str:
    if isinstance(error, _UnusableError):
        return str(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, Image.DecompressionBombError):  # inside a plugin, for a part of the picture
        return "claims too many pixels"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    text = " ".join(str(error).split())[:80]
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return "truncated"
    return f"damaged ({text})" if re.search("[a-z]", text) else "damaged"  # libtiff gives a bare number


def _key_at_eight_bits(image: Image.Image) -> None:
    """Bring a PNG's transparent value to the depth that Pillow brings its pixels to (2, 4 and 16 bits to 8)."""
    tile = getattr(image, "tile", None)
    depth = tile[0].args if tile else None
    key = image.info.get("transparency")
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if depth == "L;2" else 17)
    elif isinstance(key, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata raises nearly every kind, and the pixels are whole
        return None


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """One channel of more than 8 bits as (H, W) of 0..255, white where it is transparent."""
    values_HW = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    low, high = _range(image, tags) or _own_range(values_HW)
    if values_HW.dtype.itemsize == 2:
        grey_HW = _levels(np.arange(65536), low, high)[values_HW]  # a look-up is ten times faster than arithmetic
    else:
        grey_HW = _levels(values_HW, low, high)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts 8 bits, and leaves 16 and 32 as they are
        grey_HW = 255 - grey_HW
    key = image.info.get("transparency")
    return grey_HW if key is None else np.where(values_HW == key, np.uint8(255), grey_HW)


def _range(image: Image.Image, tags: Any) -> tuple[float, float] | None:
    """The range that the storage declares, if any."""
    for lowest, highest in _RANGES:
        if lowest in tags and highest in tags:
            low, high = (float(np.ravel(tags[tag])[0]) for tag in (lowest, highest))
            if low < high:
                return low, high
    if image.mode.startswith("I;16"):
        return 0, 2 ** int(np.ravel(tags.get(_BITS, 16))[0]) - 1
    if image.mode == "I" and image.format in ("PPM", "PNG"):  # older Pillows read 16-bit PNG so
        return 0, 65535
    return None


def _own_range(values_HW: NDArray[Any]) -> tuple[float, float]:
    finite = values_HW[np.isfinite(values_HW)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _levels(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """low..high to 0..255, halves up; exact for integers of 32 bits, as float64 holds 255 times any of them."""
    steps = np.clip(np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low), low, high) - low
    return cast(NDArray[np.uint8], np.floor(steps * 255 / ((high - low) or 1) + 0.5).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    key = image.info.get("transparency")
    if isinstance(key, bytes) and image.mode in ("1", "L"):  # an alpha per level, as a palette has: Pillow refuses it
        image = image.convert("L")
        image.putalpha(image.point(list(key[:256].ljust(256, b"\xff"))))
    elif key is not None and image.mode in ("RGB", "P") and isinstance(key, bytes if image.mode == "RGB" else tuple):
        image = image.copy()  # a colour as bytes, or of a palette: Pillow knows it only as the tuple of an RGB picture
        del image.info["transparency"]
        image = image.convert("RGB")
        image.info["transparency"] = tuple(key)
    elif image.mode == "La":
        image = image.convert("LA")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")


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


def _scan_one(path: Path) -> Scan:
    _hush()
    content = ""
    try:
        with _reading(path) as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()  # in chunks: the file never lies in memory
            stream.seek(max(0, stream.tell() - 12))
            tail = stream.read(12)
            stream.seek(0)
            image = _open(stream)
            end = _ENDS.get(image.format or "")
            if end is None or not tail.endswith(end):
                normalise(image)
    except Exception as error:  # the point of the scan is to go on
        return Scan(content, _why(error))
    return Scan(content, None)
