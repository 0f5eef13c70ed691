"""What `normalise` makes of pictures whose result was worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cytoclip.images import decode, normalise
from tests.test_images import drawn


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(*one) for one in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: bytes, width: int, bits: int, order: str = "<", **tags: tuple[int, int]) -> bytes:
    """One row of one channel. `tags` are number=(type, value), the number after an underscore."""
    entries = {256: (3, width), 257: (3, 1), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 0), 277: (3, 1)}
    entries |= {278: (3, 1), 279: (4, len(values))} | {int(name[1:]): entry for name, entry in tags.items()}
    start = 8 + 2 + 12 * len(entries) + 4
    entries[273] = (4, start)
    body = b"".join(
        struct.pack(f"{order}HHI", number, kind, 1)
        + (struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value))
        for number, (kind, value) in sorted(entries.items())
    )
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + body + struct.pack(f"{order}I", 0) + values


def levels(data: bytes, tmp_path: Path, suffix: str = ".img") -> list[int]:
    """The first row of red, through a file; the picture must be grey."""
    path = tmp_path / f"one{suffix}"
    path.write_bytes(data)
    row = np.asarray(decode(path))[0]
    assert (row == row[:, :1]).all()
    return row[:, 0].tolist()


STORED = np.array([[1, 2, 3], [4, 5, 6]])
UPRIGHT = {  # what a viewer shows, by the standard's names of the sides of row 0 and column 0
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("kind", ["PNG", "PNG 16", "PNG palette", "TIFF", "TIFF packed", "WEBP", "JPEG", "in memory"])
def test_exif_orientation(kind: str, tmp_path: Path) -> None:
    block = 16 if kind == "JPEG" else 1
    for orientation, expected in UPRIGHT.items():
        stored = np.kron(STORED, np.ones((block, block), int)) * 40
        image = Image.fromarray(stored.astype(np.uint8)).convert("RGB")
        if kind == "PNG 16":
            image = Image.fromarray((stored * 257).astype(np.uint16))
        elif kind == "PNG palette":
            image = image.quantize(8)
            image.info["transparency"] = 7  # a colour that is not there: the way through RGBA
        exif = Image.Exif()
        exif[274] = orientation
        options = {"WEBP": {"lossless": True}, "TIFF packed": {"compression": "tiff_lzw"}}.get(kind, {})
        path = tmp_path / f"{orientation}"
        if kind != "in memory":
            image.save(path, kind.split()[0], exif=exif, **options)
            plain = decode(path)
        else:
            image.info["exif"] = exif.tobytes()
            plain = normalise(image)
        for seen in (plain, normalise(plain), normalise(plain.copy())):  # not turned again
            assert seen.mode == "RGB"
            shown = np.asarray(seen)[block // 2 :: block, block // 2 :: block, 0]
            np.testing.assert_allclose(shown, np.array(expected) * 40, atol=3 if kind == "JPEG" else 0)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(STORED.astype(np.uint8)).convert("RGB")
    for number, exif in enumerate((b"Exif\0\0nonsense, no TIFF", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"\0")):
        path = tmp_path / f"{number}.png"
        image.save(path, exif=exif)
        np.testing.assert_array_equal(np.asarray(decode(path))[..., 0], STORED)
        path = tmp_path / f"{number}.jpg"
        image.save(path, exif=exif)
        assert decode(path).size == (3, 2)


RAMP, RAMP_8 = (0, 257, 32896, 65535, 128, 129, 65406, 65407), [0, 1, 128, 255, 0, 1, 254, 255]


def test_16_bits_are_scaled(tmp_path: Path) -> None:
    little, big = struct.pack("<8H", *RAMP), struct.pack(">8H", *RAMP)
    assert levels(png(8, 1, 16, 0, b"\0" + big), tmp_path) == RAMP_8
    assert levels(tiff(little, 8, 16), tmp_path) == RAMP_8
    assert levels(tiff(big, 8, 16, ">"), tmp_path) == RAMP_8
    assert levels(b"P5 8 1 65535\n" + big, tmp_path) == RAMP_8
    assert levels(b"P5 2 1 65535\n" + struct.pack(">2H", 257, 32896), tmp_path) == [1, 128]  # not its own range
    packed = io.BytesIO()
    Image.fromarray(np.array([RAMP], np.uint16)).save(packed, "TIFF", compression="tiff_adobe_deflate")
    assert levels(packed.getvalue(), tmp_path) == RAMP_8
    for mode in ("I;16", "I;16B", "I;16L"):
        image = Image.frombytes(mode, (8, 1), big if mode == "I;16B" else little)
        assert np.asarray(normalise(image))[0, :, 1].tolist() == RAMP_8


def test_16_bit_tiff_is_scaled_by_the_range_it_declares(tmp_path: Path) -> None:
    values = (0, 1000, 2048, 4095, 5000)
    little = struct.pack("<5H", *values)
    assert levels(tiff(little, 5, 16, _280=(3, 0), _281=(3, 4095)), tmp_path) == [0, 62, 128, 255, 255]
    assert levels(tiff(little, 5, 16, _280=(3, 1000), _281=(3, 4095)), tmp_path) == [0, 0, 86, 255, 255]
    assert levels(tiff(little, 5, 16, _281=(3, 4095)), tmp_path) == [0, 4, 8, 16, 19]  # half a range declares none
    assert levels(tiff(little, 5, 16, _280=(3, 9), _281=(3, 9)), tmp_path) == [0, 4, 8, 16, 19]
    twelve = bytes([0x00, 0x03, 0xE8, 0x80, 0x0F, 0xFF])  # 0, 1000, 2048, 4095 of 12 bits each
    assert levels(tiff(twelve, 4, 12), tmp_path) == [0, 62, 128, 255]


def test_white_is_zero_at_every_depth(tmp_path: Path) -> None:
    assert levels(tiff(bytes([0, 128, 255]), 3, 8, _262=(3, 0)), tmp_path) == [255, 127, 0]
    assert levels(tiff(struct.pack("<3H", 0, 257, 65535), 3, 16, _262=(3, 0)), tmp_path) == [255, 254, 0]


def test_32_bits_are_scaled_by_their_own_range(tmp_path: Path) -> None:
    floats = struct.pack("<6f", -1.0, 0.0, 1.0, 0.5, float("nan"), float("inf"))
    assert levels(tiff(floats, 6, 32, _339=(3, 3)), tmp_path) == [0, 128, 255, 191, 0, 255]
    integers = struct.pack("<4i", -100, 0, 100_000, 49_950)
    assert levels(tiff(integers, 4, 32, _339=(3, 2)), tmp_path) == [0, 0, 255, 128]
    signed = struct.pack("<3h", -1000, 0, 1000)
    assert levels(tiff(signed, 3, 16, _339=(3, 2)), tmp_path) == [0, 128, 255]
    with np.errstate(all="raise"):
        for value in (3.0, float("nan")):
            assert levels(tiff(struct.pack("<2f", value, value), 2, 32, _339=(3, 3)), tmp_path) == [0, 0]


def test_wide_integers_are_exact() -> None:
    """The twin in fractions, at the edges between two levels, where float64 could err."""
    edges = [(2 * level + 1) * (2**32 - 1) // 510 for level in range(255)]
    values = [-(2**31) + edge + step for edge in edges for step in (-1, 0, 1)] + [-(2**31), 2**31 - 1]
    seen = np.asarray(normalise(Image.fromarray(np.array([values], np.int32))))[0, :, 0].tolist()
    slow = [int(Fraction((value + 2**31) * 255, 2**32 - 1) + Fraction(1, 2)) for value in values]
    assert seen == slow


def test_16_bit_colour_is_the_high_byte_as_pillow_reads_it(tmp_path: Path) -> None:
    triples = b"".join(struct.pack(">3H", value, value, value) for value in (0, 255, 257, 32896, 65535))
    assert levels(png(5, 1, 16, 2, b"\0" + triples), tmp_path) == [0, 0, 1, 128, 255]
    pairs = struct.pack(">6H", 0, 65535, 32896, 65535, 0, 0)
    assert levels(png(3, 1, 16, 4, b"\0" + pairs), tmp_path) == [0, 128, 255]  # grey with alpha, on white


def test_transparent_value_of_every_depth(tmp_path: Path) -> None:
    def keyed(depth: int, row: bytes, width: int, *key: int) -> list[int]:
        colour = 2 if len(key) == 3 else 0
        body = struct.pack(f">{len(key)}H", *key)
        return levels(png(width, 1, depth, colour, b"\0" + row, (b"tRNS", body)), tmp_path)

    assert keyed(1, bytes([0b01000000]), 2, 0) == [255, 255]
    assert keyed(1, bytes([0b01000000]), 2, 1) == [0, 255]
    assert keyed(2, bytes([0b00011011]), 4, 1) == [0, 255, 170, 255]
    assert keyed(4, bytes([0x05, 0xA0]), 3, 5) == [0, 255, 170]
    assert keyed(8, bytes([0, 5, 9]), 3, 5) == [0, 255, 9]
    assert keyed(8, bytes([0, 0, 0, 5, 5, 5]), 2, 5, 5, 5) == [0, 255]
    assert keyed(16, struct.pack(">3H", 257, 258, 65535), 3, 258) == [1, 255, 255]
    assert keyed(16, struct.pack(">6H", *[0x0203] * 3, *[0x0302] * 3), 2, 0x0203, 0x0203, 0x0203) == [255, 3]


def test_transparency_in_memory() -> None:
    def seen(image: Image.Image, transparency: Any) -> list[Any]:
        image.info["transparency"] = transparency
        before = dict(image.info)
        row = np.asarray(normalise(image))[0, :, 0].tolist()
        assert image.info == before
        return row

    grey = Image.frombytes("L", (3, 1), bytes([0, 1, 200]))
    assert seen(grey.copy(), 1) == [0, 255, 200]
    assert seen(grey.copy(), bytes([255, 0])) == [0, 255, 200]
    assert seen(grey.copy(), bytes([0, 255])) == [255, 1, 200]
    assert seen(grey.convert("RGB"), (1, 1, 1)) == [0, 255, 200]
    assert seen(grey.convert("RGB"), bytes([1, 1, 1])) == [0, 255, 200]
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    assert seen(palette.copy(), 1) == [10, 255, 30]
    assert seen(palette.copy(), bytes([255, 255, 0])) == [10, 20, 255]
    assert seen(palette.copy(), (20, 20, 20)) == [10, 255, 30]
    assert seen(Image.frombytes("1", (2, 1), bytes([0b01000000])), 0) == [255, 255]
    assert seen(Image.frombytes("1", (2, 1), bytes([0b01000000])), bytes([0])) == [255, 255]
    with_alpha = Image.frombytes("P", (2, 1), bytes([0, 1]))
    with_alpha.putpalette([10, 10, 10, 255, 20, 20, 20, 0], "RGBA")
    assert np.asarray(normalise(with_alpha))[0, :, 0].tolist() == [10, 255]


def test_half_transparent_on_white() -> None:
    for mode, pixel in (
        ("RGBA", (200, 0, 100, 128)),
        ("LA", (100, 128)),
        ("RGBa", (100, 0, 50, 128)),
        ("La", (50, 128)),
    ):
        shown = normalise(Image.new(mode, (2, 2), pixel)).getpixel((1, 1))
        expected = (227, 127, 177) if "RGB" in mode.upper() else (177, 177, 177)
        assert np.abs(np.subtract(shown, expected)).max() <= (1 if mode[-1] == "a" else 0), mode
    mask = Image.new("PA", (1, 1), (0, 128))
    mask.putpalette([200, 0, 100])
    assert normalise(mask).getpixel((0, 0)) == (227, 127, 177)


def test_other_colour_spaces() -> None:
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 255, 0): (255, 255, 0)}
    inks |= {(0, 0, 0, 255): (0, 0, 0), (0, 0, 0, 0): (255, 255, 255), (255, 255, 0, 0): (0, 0, 255)}
    for ink, colour in inks.items():
        assert normalise(Image.new("CMYK", (1, 1), ink)).getpixel((0, 0)) == colour
    assert normalise(Image.new("YCbCr", (1, 1), (76, 85, 255))).getpixel((0, 0)) == (254, 0, 0)
    assert normalise(Image.new("HSV", (1, 1), (0, 255, 255))).getpixel((0, 0)) == (255, 0, 0)
    assert normalise(Image.new("LAB", (1, 1), (255, 128, 128))).mode == "RGB"
    assert normalise(Image.new("RGBX", (1, 1), (9, 8, 7, 0))).getpixel((0, 0)) == (9, 8, 7)


def test_first_page(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (5, 4), colour) for colour in ("red", "green", "blue")]
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        path = tmp_path / f"pages.{kind}"
        pages[0].save(
            path, kind, save_all=True, append_images=pages[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode(path).getpixel((2, 2)) == (255, 0, 0), kind
        with Image.open(path) as last:
            last.seek(2)
            assert normalise(last).getpixel((2, 2)) == (255, 0, 0), kind


def test_a_plain_picture_is_not_copied() -> None:
    image = drawn("RGB", (10, 10))
    assert normalise(image) is image
