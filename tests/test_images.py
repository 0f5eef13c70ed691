"""Pixels and floats equal transformers' PIL processor to the last bit; what cannot be reproduced is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cytoclip.errors import ExitCode, UserError
from cytoclip.images import decode, normalise
from cytoclip.pixels import PixelSpec, prepare, to_floats

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
