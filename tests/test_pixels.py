"""The crop policies; that `auto` is the checkpoint's own is held by test_images.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from cytoclip.pixels import PixelSpec, prepare, to_floats

SIZE = 32
SHAPES = [(97, 160), (160, 97), (32, 32), (20, 9), (1, 300), (300, 1), (33, 32)]


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def own() -> PixelSpec:
    """A checkpoint that looks at the middle of a larger picture: no policy is the same as its own."""
    return PixelSpec.from_processor(CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SIZE))


@pytest.mark.parametrize("shape", SHAPES)
def test_center_and_squash_are_what_transformers_does_with_those_numbers(own: PixelSpec, shape: tuple[int, int]):
    said = {
        "center": CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE),
        "squash": CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False),
    }
    for crop, processor in said.items():
        spec = own.fitted(crop)
        ours = to_floats(torch.from_numpy(prepare(_noise(*shape), spec))[None], spec).numpy()
        assert np.array_equal(ours, processor(images=_noise(*shape), return_tensors="np")["pixel_values"]), crop


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_keeps_the_whole_picture_in_its_shape(own: PixelSpec, shape: tuple[int, int]):
    height, width = shape
    padded_HWC = prepare(_noise(*shape), own.fitted("pad")).transpose(1, 2, 0)
    assert padded_HWC.shape == (SIZE, SIZE, 3)
    rows, columns = (max(1, round(SIZE * edge / max(shape))) for edge in (height, width))
    whole_HWC = np.asarray(_noise(*shape).resize((columns, rows), resample=own.resample))
    edge = [tuple(whole_HWC[y, x]) for y in range(rows) for x in (0, columns - 1)]
    edge += [tuple(whole_HWC[y, x]) for x in range(columns) for y in (0, rows - 1)]
    expected_HWC = np.full((SIZE, SIZE, 3), np.median(np.array(edge), axis=0).astype(np.uint8), dtype=np.uint8)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    for y in range(rows):
        for x in range(columns):
            expected_HWC[top + y, left + x] = whole_HWC[y, x]
    assert np.array_equal(padded_HWC, expected_HWC)


def test_auto_is_the_checkpoints_own_and_the_four_differ(own: PixelSpec):
    assert own.fitted("auto") == own
    four = [prepare(_noise(97, 160), own.fitted(crop)).tobytes() for crop in ("auto", "center", "pad", "squash")]
    assert len(set(four)) == 4


def test_an_unknown_policy_is_refused(own: PixelSpec):
    with pytest.raises(ValueError, match="no crop policy"):
        own.fitted("stretch")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("crop", ["auto", "center", "pad", "squash"])
def test_without_the_edges_it_is_the_same_to_a_level(own: PixelSpec, shape: tuple[int, int], crop: str):
    """The way of data.reduced_decode, which does not resize what the crop cuts off."""
    spec = own.fitted(crop)
    exact, quick = (prepare(_noise(*shape), spec, way).astype(np.int64) for way in (True, False))
    assert np.abs(exact - quick).max() <= 1
    assert (exact != quick).mean() < 0.005


def test_a_wider_view_is_the_same_field_in_more_pixels(own: PixelSpec):
    for spec in (own, *(own.fitted(crop) for crop in ("center", "pad", "squash"))):
        wide = spec.widened(1.5)
        assert wide.size == (48, 48)
        assert wide.fitted("auto") == wide
        smooth = _noise(3, 5).resize((200, 120), Image.Resampling.BICUBIC)
        field, wider = (Image.fromarray(prepare(smooth, one).transpose(1, 2, 0)) for one in (spec, wide))
        difference = np.asarray(wider.resize((32, 32), Image.Resampling.BICUBIC)).astype(int) - np.asarray(field)
        assert np.abs(difference).mean() < 5, "half a pixel apart, where a crop begins at a rounded one"
    unresized = PixelSpec(None, (32, 32), 3, (0, 0, 0), (1, 1, 1), 1 / 255)
    assert unresized.widened(1.5) == unresized
    assert unresized.shortest_read is None
