"""One picture from a file to a plain RGB one, whatever the file is; and what is wrong with it, if anything.

Letters: H height, W width.
"""

from __future__ import annotations

import hashlib
import logging
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageFile, features

from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece

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

# What pixels depend on beside a file's bytes. The number is raised with every change of `decode` that changes a pixel.
_CODECS = ("jpg", "libjpeg_turbo", "jpg_2000", "webp", "libtiff", "avif")
VERSION = ", ".join(
    ["decoder 1", f"Pillow {PIL.__version__}", *(f"{name} {features.version(name)}" for name in _CODECS)]
)

_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82"}
_FLIP, _FLOP, _90, _180, _270, _TRANSPOSE, _TRANSVERSE = Image.Transpose
_TURNS = {2: _FLIP, 3: _180, 4: _FLOP, 5: _TRANSPOSE, 6: _270, 7: _TRANSVERSE, 8: _90}  # by EXIF 2.32's orientation
_ORIENTATION, _BITS, _PHOTOMETRIC, _RANGES = 274, 258, 262, ((340, 341), (280, 281))  # EXIF and TIFF tags
_FROM_PILLOW = re.compile(r"PIL\.")
_Found = TypeVar("_Found")
_SCAN_BLOCK = 1024  # files handed to the threads at once: five million futures would take gigabytes


def decode(
    place: Path | Piece | bytes,
    at_least: int | None = None,
    most: int | None = None,
    formats: Sequence[str] = FORMATS,
) -> Image.Image:
    """Read a file, or the bytes of one, as a plain RGB picture (see `normalise`), completely, or say what is wrong.

    With `at_least`, a JPEG comes at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size whose edges have as many pixels:
    libjpeg leaves out the high frequencies of each block of 8×8, so the pixels are nearly those of a full decode that
    is resized to it, in a fraction of the time.

    Only a regular file is opened, in one of `formats` (by default any of Pillow's but EPS), and what its header claims
    is held against `most` pixels, by default `MAX_PIXELS`, before one is decoded. Safe in threads and forked workers.
    Pillow's warnings are silent from the first call on.

    Raises
    ------
    UserError
        Whatever the reason: the file, and the short phrase that `scan` reports.
    """
    _hush()
    try:
        with _reading(place) as stream:
            image = _open(stream, most, formats)
            if at_least is not None:
                image.draft(None, (at_least, at_least))  # the mode stays; does nothing but for JPEG
            return normalise(image)
    except Exception as error:  # Pillow's plugins raise nearly every kind for a damaged file
        why = _why(error)
        where = "a picture" if isinstance(place, bytes) else place
        raise UserError(f"{where}: {why}", _HINTS.get(why, _HINT), ExitCode.DATA) from error


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


@dataclass(frozen=True, slots=True)
class Scan:
    """What one look at a file found."""

    content: str  # SHA-256 of its bytes, hexadecimal: equal for equal files; empty where they cannot be read
    problem: str | None  # a short phrase ("truncated"), or None for a picture that can be used


def scan(places: Sequence[Path | Piece], threads: int, progress: Callable[[int], None] | None = None) -> list[Scan]:
    """Look at every file once before any work is lost: hash, header, claimed size, and whether its end is there.

    JPEG and PNG are taken for whole when the last bytes are their end marker; where they are not, and for every
    other format, the picture is decoded as `decode` does. A hole in the middle of a JPEG or PNG is not found.
    In the order of `places`; no file raises, whatever is wrong with it.

    Parameters
    ----------
    threads
        Files read at a time: hashing and decoding release Python's lock, so all cores work.
    progress
        Called in this thread with the number of files done.
    """
    results: list[Scan] = []
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="scan") as pool:
        for start in range(0, len(places), _SCAN_BLOCK):
            for result in pool.map(_scan_one, places[start : start + _SCAN_BLOCK]):  # left early (Ctrl-C), map cancels
                results.append(result)
                if progress is not None:
                    progress(len(results))
    return results


def content_of(place: Path | Piece | bytes) -> str:
    """SHA-256 of a file's bytes, hexadecimal; empty where they cannot be read."""
    try:
        with _reading(place) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError, _UnusableError):
        return ""


def examine(place: Path | Piece | bytes, look: Callable[[ImageFile.ImageFile], _Found]) -> tuple[Scan, _Found | None]:
    """Hash a file and hand its picture, not decoded yet, to `look`: what `scan` would say, and what `look` found.

    Whatever `look` raises is the file's problem, as it is when a picture is decoded.
    """
    _hush()
    content = ""
    try:
        with _reading(place) as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            found = look(_open(stream))
    except Exception as error:  # Pillow's plugins raise nearly every kind for a damaged file
        return Scan(content, _why(error)), None
    return Scan(content, None), found


def stored_range(image: Image.Image) -> tuple[float, float] | None:
    """The range that the storage of one channel of more than 8 bits declares, if any: it becomes black and white."""
    tags = getattr(image, "tag_v2", {})
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


class _UnusableError(Exception):
    """Carries the phrase for what is wrong with a file."""


MISSING = "no such file"
READ = "every format that Pillow opens but EPS is read"
_HINT = f"replace the file or take its pair out of the JSON; {READ}"
_HINTS = {
    MISSING: "check the name in the JSON: it is relative to imgs/, and capitals matter",
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
def _reading(place: Path | Piece | bytes) -> Iterator[BufferedReader | BytesIO]:
    if isinstance(place, bytes):
        if not place:
            raise _UnusableError("empty file")
        yield BytesIO(place)
        return
    path = place.path if isinstance(place, Piece) else place
    facts = path.stat()  # before opening: opening a pipe would wait for its writer
    if not stat.S_ISREG(facts.st_mode):
        raise _UnusableError("not a regular file")
    if facts.st_size == 0:
        raise _UnusableError("empty file")
    with path.open("rb") as stream:
        if isinstance(place, Piece):
            stream.seek(place.offset)
            yield BytesIO(stream.read(place.size))
        else:
            yield stream


def _open(
    stream: BufferedReader | BytesIO, most: int | None = None, formats: Sequence[str] = FORMATS
) -> ImageFile.ImageFile:
    """The header only. Not `Image.open`, which warns on stderr and raises without telling width and height."""
    prefix = stream.read(16)
    recognised = ""
    by_ending = Image.EXTENSION.get(Path(getattr(stream, "name", "")).suffix.lower(), "")
    for name in (*formats, by_ending) if by_ending in _NO_SIGNATURE else formats:
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
        if width * height > (MAX_PIXELS if most is None else most):
            raise _UnusableError(f"claims {width}x{height} pixels")
        return image
    raise _UnusableError(f"truncated or damaged {recognised}" if recognised else "not a picture of a known format")


def _why(error: Exception) -> str:
    if isinstance(error, _UnusableError):
        return str(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return MISSING
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
    low, high = stored_range(image) or _own_range(values_HW)
    if values_HW.dtype.itemsize == 2:
        grey_HW = _levels(np.arange(65536), low, high)[values_HW]  # a look-up is ten times faster than arithmetic
    else:
        grey_HW = _levels(values_HW, low, high)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts 8 bits, and leaves 16 and 32 as they are
        grey_HW = 255 - grey_HW
    key = image.info.get("transparency")
    return grey_HW if key is None else np.where(values_HW == key, np.uint8(255), grey_HW)


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


def _scan_one(place: Path | Piece) -> Scan:
    _hush()
    content = ""
    try:
        with _reading(place) as stream:
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
