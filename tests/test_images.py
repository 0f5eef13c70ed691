"""Pixels against transformers and against pictures worked out by hand; every way in which a file can be bad."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cytoclip import images
from cytoclip.errors import ExitCode, UserError
from cytoclip.images import PixelSpec, decode, normalise, prepare, scan, to_floats

CLIP = CLIPImageProcessorPil()
SIZES = ((1, 1), (4000, 300), (300, 4000), (224, 224), (223, 225), (37, 53))  # width, height
SAVED_AS = {
    "RGB": ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"),
    "L": ("JPEG", "PNG", "TIFF", "BMP", "GIF"),
    "LA": ("PNG", "TIFF"),
    "RGBA": ("PNG", "TIFF", "WEBP"),
    "P": ("PNG", "TIFF", "BMP", "GIF"),
    "P with one transparent colour": ("PNG", "GIF"),
    "P with an alpha per colour": ("PNG",),
    "1": ("PNG", "TIFF", "BMP"),
    "CMYK": ("JPEG", "TIFF"),
    "I;16": ("PNG", "TIFF"),
}


def drawn(mode: str, size: tuple[int, int]) -> Image.Image:
    """Noise over slopes: every value occurs, and a shift by one pixel shows."""
    rng = np.random.default_rng(size[0] * 7 + size[1])
    height, width = size[1], size[0]
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    slope = (np.arange(height)[:, None, None] * 3 + np.arange(width)[None, :, None] * 2) // 8
    pixels = ((slope + rng.integers(0, 200, (height, width, 4))) % 256).astype(np.uint8)
    image = Image.fromarray(pixels).convert("CMYK") if mode == "CMYK" else Image.fromarray(pixels)
    if mode.startswith("P"):
        image = image.convert("RGB").resize((max(1, width // 9), max(1, height // 9))).resize(size, 0)
        image = image.quantize(32, method=Image.Quantize.FASTOCTREE)
        colours = len(image.getcolors())
        if "one" in mode:
            image.info["transparency"] = colours // 2
        elif "alpha" in mode:
            image.info["transparency"] = bytes(range(7, 7 + 5 * colours, 5))
        return image
    if mode in ("LA", "L", "1", "RGB"):
        return image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")
    return image


def plain_slowly(image: Image.Image) -> Image.Image:
    """The twin of `normalise` for these modes, in whole numbers."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.repeat(table_of_fractions()[np.asarray(image)][..., None], 3, axis=2))
    rgba = np.asarray(image.convert("RGBA")).astype(int)
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return Image.fromarray(((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5).astype(np.uint8))


@cache
def table_of_fractions() -> np.ndarray:
    return np.array([int(Fraction(value * 255, 65535) + Fraction(1, 2)) for value in range(65536)], np.uint8)


def crop_of(processor: Any, image: Image.Image) -> np.ndarray:
    return processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]


def assert_equal_to(processor: Any, spec: PixelSpec, plain: Image.Image, reference: Image.Image) -> None:
    ours = prepare(plain, spec)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert ours.flags.writeable
    assert ours.shape == (3, *spec.size)
    np.testing.assert_array_equal(ours, crop_of(processor, reference))
    floats = to_floats(torch.from_numpy(ours)[None], spec)
    theirs = processor(images=reference, return_tensors="np")["pixel_values"]
    assert floats.dtype == torch.float32
    np.testing.assert_array_equal(floats.numpy(), theirs)


# --- equal to transformers


def test_every_mode_format_and_size_gives_the_processors_pixels(tmp_path: Path) -> None:
    cases = [
        (mode, kind, size)
        for mode, kinds in SAVED_AS.items()
        for kind in kinds
        for size in SIZES
        if max(size) < 4000 or (kind == kinds[0] and mode in ("RGB", "L", "RGBA", "I;16"))
    ]
    assert len(cases) == 30 * 4 + 4 * 2
    spec = PixelSpec.from_processor(CLIP)
    for number, (mode, kind, size) in enumerate(cases):
        path = tmp_path / f"{number}.{kind.lower()}"
        drawn(mode, size).save(path, kind)
        with Image.open(path) as stored:
            reference = plain_slowly(stored)
        plain = decode(path)
        assert (plain.mode, plain.size) == ("RGB", size), (mode, kind)
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(reference), err_msg=f"{mode} {kind} {size}")
        assert_equal_to(CLIP, spec, plain, reference)
        path.unlink()


def test_transformers_composites_transparency_as_we_do() -> None:
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image = Image.fromarray(np.stack([colour, 255 - colour, colour, alpha], axis=2))
    spec = PixelSpec.from_processor(CLIP)
    np.testing.assert_array_equal(prepare(normalise(image), spec), crop_of(CLIP, image))
    np.testing.assert_array_equal(np.asarray(normalise(image)), np.asarray(plain_slowly(image)))


PROCESSORS: dict[str, Any] = {
    "clip": CLIP,
    "clip 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "odd crops": CLIPImageProcessorPil(size={"shortest_edge": 225}, crop_size={"height": 223, "width": 101}),
    "crop larger than the picture": CLIPImageProcessorPil(
        size={"shortest_edge": 50}, crop_size={"height": 64, "width": 77}
    ),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 96, "width": 61}),
    "resize to a shape, then crop": CLIPImageProcessorPil(
        size={"height": 90, "width": 120}, crop_size={"height": 81, "width": 80}
    ),
    "siglip": SiglipImageProcessorPil(size={"height": 384, "width": 256}),
    "bilinear": SiglipImageProcessorPil(resample=2),
    "not normalised": CLIPImageProcessorPil(do_normalize=False),
    "not rescaled": CLIPImageProcessorPil(do_rescale=False),
    "to -1..1 by 127.5": CLIPImageProcessorPil(
        rescale_factor=1 / 127.5, image_mean=[1.0, 1.0, 1.0], image_std=[1.0, 1.0, 1.0]
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_we_accept_is_reproduced(name: str) -> None:
    assert len(PROCESSORS) == 11
    spec = PixelSpec.from_processor(PROCESSORS[name])
    for size in ((1, 1), (400, 31), (31, 400), (224, 224), (223, 225), (37, 53), (65, 76), (336, 335)):
        image = drawn("RGB", size)
        assert_equal_to(PROCESSORS[name], spec, image, image)


def test_floats_equal_the_processors_for_every_value_there_is() -> None:
    every = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (3, 256, 1)).copy()
    for processor in PROCESSORS.values():
        spec = PixelSpec.from_processor(processor)
        ours = to_floats(torch.from_numpy(every)[None], spec).numpy()[0]
        theirs = processor(
            images=every, do_resize=False, do_center_crop=False, input_data_format="channels_first", return_tensors="np"
        )["pixel_values"][0]
        np.testing.assert_array_equal(ours, theirs)


def test_to_floats_leaves_its_input_and_works_on_no_pictures() -> None:
    spec = PixelSpec.from_processor(CLIP)
    pixels = torch.full((2, 3, 4, 5), 7, dtype=torch.uint8)
    assert to_floats(pixels, spec).shape == (2, 3, 4, 5)
    assert (pixels == 7).all()
    assert to_floats(pixels[:0], spec).shape == (0, 3, 4, 5)


def test_the_model_sees_the_whole_contrast() -> None:
    """Trap 1: divided by 255 twice, the floats of noise have a standard deviation of 0.005."""
    spec = PixelSpec.from_processor(CLIP)
    floats = to_floats(torch.from_numpy(prepare(drawn("RGB", (300, 260)), spec))[None], spec)
    assert floats.std() > 0.5
    assert floats.max() - floats.min() > 2


def test_numbers_of_a_processor_are_read() -> None:
    spec = PixelSpec.from_processor(CLIP)
    assert (spec.resize, spec.crop, spec.resample, spec.size) == (224, (224, 224), 3, (224, 224))
    assert (spec.mean, spec.std) == (tuple(CLIP.image_mean), tuple(CLIP.image_std))
    assert PixelSpec.from_processor(PROCESSORS["siglip"]).size == (384, 256)
    plain_dict = CLIPImageProcessorPil()
    plain_dict.size, plain_dict.crop_size = {"shortest_edge": 224}, {"height": 224, "width": 224}
    assert PixelSpec.from_processor(plain_dict) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301 - it goes to the workers


class Mirrors(CLIPImageProcessorPil):
    def resize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        return super().resize(image[..., ::-1], *args, **kwargs)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "do_pad": (lambda: CLIPImageProcessorPil(do_pad=True, pad_size={"height": 300, "width": 300}), "do_pad"),
    "two edges": (lambda: CLIPImageProcessorPil(size={"shortest_edge": 224, "longest_edge": 500}), "longest_edge"),
    "longest edge": (lambda: CLIPImageProcessorPil(size={"longest_edge": 500}), "longest_edge"),
    "nothing fixes the size": (lambda: CLIPImageProcessorPil(do_center_crop=False), "different sizes"),
    "neither resized nor cropped": (lambda: CLIPImageProcessorPil(do_resize=False, do_center_crop=False), "different"),
    "no deviation": (lambda: CLIPImageProcessorPil(image_std=[0.5, 0.0, 0.5]), "image_std"),
    "a step without a name": (Mirrors, "Mirrors gives other pixels"),
    "crop_pct": (lambda: ConvNextImageProcessorPil(size={"shortest_edge": 224}), "ConvNextImageProcessorPil"),
    "not Pillow's filter": (lambda: with_attribute(resample="bicubic"), "bicubic"),
    "one number": (lambda: with_attribute(size=224), "size 224"),
    "not a processor": (
        lambda: SimpleNamespace(do_resize=True, size={"height": 8, "width": 8}, resample=3),
        "does not take a picture",
    ),
}


def with_attribute(**values: Any) -> Any:
    processor = CLIPImageProcessorPil()
    for name, value in values.items():
        setattr(processor, name, value)
    return processor


@pytest.mark.parametrize("name", REFUSED)
def test_a_processor_that_cannot_be_reproduced_is_refused(name: str) -> None:
    assert len(REFUSED) == 11
    make, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as caught:
        PixelSpec.from_processor(make())
    assert caught.value.code == ExitCode.MODEL


# --- pictures by hand


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
    assert levels(tiff(struct.pack("<2f", 3, 3), 2, 32, _339=(3, 3)), tmp_path) == [0, 0]
    assert levels(tiff(struct.pack("<2f", float("nan"), float("nan")), 2, 32, _339=(3, 3)), tmp_path) == [0, 0]


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


# --- bad files


def encoded(kind: str, size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    data = io.BytesIO()
    drawn("RGB", size).save(data, kind, **options)
    return data.getvalue()


def bomb() -> bytes:
    return png(60000, 60000, 8, 2, b"\0")


BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "empty file"),
    "cut.jpg": (encoded("JPEG")[:-200], "truncated"),
    "cut_early.jpg": (encoded("JPEG")[:40], "truncated"),
    "cut.png": (encoded("PNG")[:-600], "truncated"),
    "cut_early.png": (encoded("PNG")[:20], "truncated"),
    "garbled.png": (b"\x89PNG\r\n\x1a\n" + b"\xff" * 90, "truncated or damaged PNG"),
    "cut.tif": (encoded("TIFF")[:-600], "truncated"),
    "cut.bmp": (encoded("BMP")[:-600], "truncated"),
    "text.jpg": (b"a picture of a cell\n" * 9, "not a picture of a known format"),
    "script.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not a picture of a known format",
    ),
    "bomb.png": (bomb(), "claims 60000x60000 pixels"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0),
        "claims",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_fault(name: str, tmp_path: Path) -> None:
    assert len(BAD) == 12
    data, problem = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        decode(path)
    assert str(path) in caught.value.message
    assert problem in caught.value.message
    assert caught.value.hint
    assert caught.value.code == ExitCode.DATA
    (found,) = scan([path], threads=1)
    assert found.problem is not None
    assert problem in found.problem
    assert len(found.problem) < 100
    assert found.content == (hashlib.sha256(data).hexdigest() if data else "")


@pytest.mark.timeout(30)  # a pipe that is opened waits for ever
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "file").write_bytes(b"x")
    expected = {
        tmp_path / "pipe.png": "not a regular file",
        tmp_path: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "missing.png": "no such file",
        tmp_path / "file" / "below.png": "no such file",
        tmp_path / "loop.png": "damaged",
        tmp_path / "nul\0.png": "damaged",
    }
    for path, result in zip(expected, scan(list(expected), threads=2), strict=True):
        assert result.problem is not None
        assert expected[path] in result.problem, path
        assert result.content == ""
        with pytest.raises(UserError, match=re.escape(expected[path])):
            decode(path)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as root here, and root may read everything: the refusal is played."""

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setattr(Path, "open", refuses)
    assert scan([path], threads=1)[0].problem == "permission denied"
    with pytest.raises(UserError, match="permission denied"):
        decode(path)


def test_the_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG", (90, 70)))
    monkeypatch.setattr(images, "MAX_PIXELS", 90 * 70)
    assert decode(path).size == (90, 70)
    monkeypatch.setattr(images, "MAX_PIXELS", 90 * 70 - 1)
    monkeypatch.setattr(images, "normalise", lambda _: pytest.fail("decoded"))
    with pytest.raises(UserError, match="claims 90x70 pixels"):
        decode(path)
    assert scan([path], threads=1)[0].problem == "claims 90x70 pixels"


def test_scan_finds_what_decode_finds_wherever_a_file_is_cut(tmp_path: Path) -> None:
    kinds = {
        "JPEG": {},
        "PNG": {},
        "TIFF": {},
        "TIFF packed": {"compression": "jpeg"},
        "BMP": {},
        "GIF": {},
        "WEBP": {},
    }
    kinds |= {
        "JPEG progressive": {"progressive": True},
        "PPM": {},
        "JPEG2000": {},
        "TIFF lzw": {"compression": "tiff_lzw"},
    }
    if features.check("avif"):
        kinds["AVIF"] = {}
    paths, whole = [], 0
    for kind, options in kinds.items():
        data = encoded(kind.split()[0], **options)
        for cut in (*range(1, 40, 9), *range(50, len(data), len(data) // 7), len(data) - 20, len(data) - 1, len(data)):
            paths.append(tmp_path / f"{len(paths)}.{kind}")
            paths[-1].write_bytes(data[:cut])
    assert len(paths) >= 11 * 15
    for path, found in zip(paths, scan(paths, threads=4), strict=True):
        said = None
        try:
            decode(path)
        except UserError as error:
            said = error.message.removeprefix(f"{path}: ")
        assert found.problem == said, path
        whole += said is None
    assert len(kinds) <= whole < len(paths) / 3


def test_a_marker_before_trailing_bytes_is_still_a_picture(tmp_path: Path) -> None:
    for kind in ("JPEG", "PNG"):
        path = tmp_path / kind
        path.write_bytes(encoded(kind) + b"\0" * 100)
        assert scan([path], threads=1)[0].problem is None
        assert decode(path).size == (90, 70)


def test_whole_jpeg_and_png_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / kind for kind in ("JPEG", "PNG")]
    for path in paths:
        path.write_bytes(encoded(path.name))
    monkeypatch.setattr(images, "normalise", lambda _: pytest.fail("decoded"))
    assert [found.problem for found in scan(paths, threads=1)] == [None, None]


def test_scan_keeps_the_order_and_hashes_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_SCAN_BLOCK", 4)
    paths = []
    for number in range(11):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(encoded("JPEG", (20 + number % 5, 20)))
    paths[6] = tmp_path / "missing.jpg"
    done: list[int] = []
    results = scan(paths, threads=3, progress=done.append)
    assert done == list(range(1, 12))
    for path, found in zip(paths, results, strict=True):
        if path.name == "missing.jpg":
            assert (found.content, found.problem) == ("", "no such file")
        else:
            assert (found.content, found.problem) == (hashlib.sha256(path.read_bytes()).hexdigest(), None)
    assert results[0] == results[5] == results[10]
    assert len({found.content for found in results}) == 6
    assert scan(paths, threads=1) == results
    assert scan([], threads=0) == []


def test_an_interrupt_stops_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG"))

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan([path] * 50, threads=2, progress=stop)


# --- silence, threads, processes


def odd_files(folder: Path) -> list[Path]:
    """Files at which Pillow warns, logs or lets a C library speak."""
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\xff\xff\0\0\0\x10"
    many = tiff(bytes(40), 4, 8, _277=(3, 10))
    frames = png(2, 1, 8, 0, b"\0\1\2", (b"acTL", struct.pack(">II", 0, 0)))
    broken = bytearray(encoded("TIFF", compression="jpeg"))
    broken[200:900] = b"\x55" * 700
    lzw = bytearray(encoded("TIFF", compression="tiff_lzw"))
    lzw[200:900] = b"\xaa" * 700
    files = {"exif.jpg": encoded("JPEG", exif=b"Exif\0\0" + exif), "samples.tif": many, "frames.png": frames}
    files |= {
        "bomb.png": bomb(),
        "large.png": png(10000, 9500, 1, 0, b"\0"),
        "jpeg.tif": bytes(broken),
        "lzw.tif": bytes(lzw),
    }
    files["entries.tif"] = tiff(bytes(3), 3, 8, _270=(2, 0xFFFFFF), _305=(2, 0xFFFFFF))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def try_all(paths: list[Path], read: Callable[[Path], Any]) -> None:
    for path in paths:
        try:
            read(path)
        except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue


def test_nothing_is_printed_for_odd_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = odd_files(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's handler would hide that logging's last resort prints
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        try_all(paths, lambda path: Image.open(path).load())
    assert len(heard) >= 3, "these files no longer make Pillow warn"
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        try_all(paths, decode)
        scan(paths, threads=4)
        warnings.warn("others are still heard", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["others are still heard"]
    assert capfd.readouterr() == ("", "")


def test_threads_and_forked_workers_give_the_same(tmp_path: Path) -> None:
    spec = PixelSpec.from_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    )
    paths = []
    for number, kind in enumerate(("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP") * 4):
        paths.append(tmp_path / f"{number}.{kind}")
        drawn("RGB", (60 + number, 50)).save(paths[-1], kind)

    def one(path: Path) -> torch.Tensor:
        return torch.from_numpy(prepare(decode(path), spec))

    serial = torch.stack([one(path) for path in paths])
    with ThreadPoolExecutor(8) as pool:
        assert torch.equal(torch.stack(list(pool.map(one, paths))), serial)
    loader: DataLoader[Any] = DataLoader(
        paths,  # type: ignore[arg-type]
        batch_size=5,
        num_workers=2,
        collate_fn=lambda batch: torch.stack([one(path) for path in batch]),
        multiprocessing_context="fork",
    )
    assert torch.equal(torch.cat(list(loader)), serial)
