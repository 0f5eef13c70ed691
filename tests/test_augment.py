"""Pictures varied for training: the twins are loops over pixels in float64, from the formulas alone."""

from __future__ import annotations

import colorsys
import io
import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from cytoclip import augment
from cytoclip.augment import Change, Variation
from cytoclip.data_options import MICROSCOPY, Augment, Data

SIZE = (24, 24)
NEUTRAL: dict[str, Any] = {
    "transposed": 0, "mirrored": 0, "upended": 0, "angle": 0, "x": 0, "y": 0, "width": 1, "height": 1, "brightness": 1,
    "contrast": 1, "saturation": 1, "hue": 0, "blur": 0, "stain": np.eye(3),
}  # fmt: skip
EVERYTHING = Augment(preset="microscopy", rotation="any", blur=1.5)


def variation(size: tuple[int, int] = SIZE, seed: int = 0, **options: Any) -> Variation:
    return Variation(Augment(**options), size, seed)


def changed(name: str, value: Any, pixels: torch.Tensor, **options: Any) -> np.ndarray:
    """One picture (3, H, W), changed in one way by a given number, as (3, H, W) of 0..1."""
    row = Change(**{**NEUTRAL, name: value}).row()
    return variation(tuple(pixels.shape[1:]), **options).apply(pixels[None], row[None])[0].numpy() / 255  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def drawn(of: Variation, count: int, **named: Any) -> list[dict[str, float]]:
    names = [*NEUTRAL][:-1]
    return [dict(zip(names, of.draw(pair, 0, **named).tolist(), strict=False)) for pair in range(count)]


def test_a_draw_is_a_function_of_seed_epoch_and_pair_alone() -> None:
    keys = list(itertools.product((0, 1), (0, 1), (0, 1, 2**62)))
    rows = {key: Variation(EVERYTHING, SIZE, key[0]).draw(key[2], key[1]) for key in keys}
    torch.manual_seed(1)
    np.random.seed(1)
    for key in reversed(keys):
        assert torch.equal(rows[key], Variation(EVERYTHING, SIZE, key[0]).draw(key[2], key[1]))
    assert len({tuple(row.tolist()) for row in rows.values()}) == len(keys) == 12
    assert all(row.shape == (22,) and row.dtype == torch.float32 for row in rows.values())


def test_what_is_drawn_for_one_option_does_not_depend_on_the_others() -> None:
    whole = drawn(Variation(Augment(preset="microscopy"), SIZE, 0), 20)
    for name in ("brightness", "contrast", "saturation", "hue", "blur"):
        alone = drawn(variation(**{name: MICROSCOPY[name]}), 20)
        assert [one[name] for one in alone] == [one[name] for one in whole]
    turned = drawn(variation(rotation="right", flips=True), 20)
    views = ("transposed", "mirrored", "upended")
    assert [[one[name] for name in views] for one in turned] == [[one[name] for name in views] for one in whole]


def test_the_eight_views_are_numpys_to_the_last_bit_and_equally_often() -> None:
    picture = noise(3, *SIZE)
    views = [np.rot90(flipped, turns, (1, 2)) for flipped in (picture.numpy(), picture.numpy()[:, :, ::-1])
             for turns in range(4)]  # fmt: skip
    of = variation(rotation="right", flips=True)
    rows = torch.stack([of.draw(pair, 0) for pair in range(1600)])
    counts: Counter[int] = Counter()
    for made in of.apply(picture.expand(1600, -1, -1, -1), rows).numpy():
        (which,) = [i for i, view in enumerate(views) if np.array_equal(made, view.astype(np.float32))]
        counts[which] += 1
    assert sorted(counts) == list(range(8))
    assert max(abs(count - 200) for count in counts.values()) < 4 * math.sqrt(200)


@pytest.mark.parametrize(("options", "views"), [({"rotation": "right"}, 4), ({"flips": True}, 4)])
def test_turns_alone_and_mirrors_alone(options: dict[str, Any], views: int) -> None:
    picture, of = noise(3, *SIZE), variation(**options)
    made = of.apply(picture.expand(64, -1, -1, -1), torch.stack([of.draw(pair, 0) for pair in range(64)]))
    different = {one.numpy().tobytes() for one in made}
    assert len(different) == views
    quarter = np.rot90(picture.numpy(), 1, (1, 2)).astype(np.float32).tobytes()
    assert (quarter in different) == ("rotation" in options)


def test_quarter_turns_go_counter_clockwise() -> None:
    for turns, (transposed, mirrored, upended) in enumerate([(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0)]):
        picture = noise(1, 3, *SIZE)
        row = Change(**NEUTRAL | {"transposed": transposed, "mirrored": mirrored, "upended": upended}).row()
        made = variation(rotation="right").apply(picture, row[None])[0]
        assert np.array_equal(made.numpy(), np.rot90(picture[0].numpy(), turns, (1, 2)))
    draws = drawn(variation(rotation="right"), 200)
    assert {(one["transposed"], one["mirrored"], one["upended"]) for one in draws} == {
        (0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 0)}  # fmt: skip


def test_a_picture_that_is_not_square_has_the_half_turn_only() -> None:
    of, picture = variation((20, 30), rotation="right"), noise(3, 20, 30)
    rows = torch.stack([of.draw(pair, 0) for pair in range(32)])
    made = {one.numpy().tobytes() for one in of.apply(picture.expand(32, -1, -1, -1), rows)}
    assert made == {np.rot90(picture.numpy(), turns, (1, 2)).astype(np.float32).tobytes() for turns in (0, 2)}


def test_where_a_pixel_comes_from_in_a_crop_turned_by_any_angle() -> None:
    """A picture whose red is its column and whose green is its row says where each pixel was taken; not square."""
    rows, columns, size = 60, 90, (40, 60)
    picture = torch.zeros(3, rows, columns, dtype=torch.uint8)
    picture[0], picture[1] = torch.arange(columns)[None, :], torch.arange(rows)[:, None]
    angle, x, y, width, height = 0.3, 0.2, -0.1, 0.5, 0.6
    row = Change(**NEUTRAL | {"angle": angle, "x": x, "y": y, "width": width, "height": height}).row()
    made = variation(size, rotation="any").apply(picture[None], row[None])[0].numpy()
    checked = 0
    for i, j in itertools.product(range(size[0]), range(size[1])):
        right = (j + 0.5 - size[1] / 2) * columns * width / size[1]  # of the crop's centre, in pixels of the picture
        down = (i + 0.5 - size[0] / 2) * rows * height / size[0]
        at_column = columns / 2 * (1 + x) + right * math.cos(angle) - down * math.sin(angle) - 0.5
        at_row = rows / 2 * (1 + y) + right * math.sin(angle) + down * math.cos(angle) - 0.5
        if 0 <= at_column <= columns - 1 and 0 <= at_row <= rows - 1:
            assert made[:2, i, j] == pytest.approx([at_column, at_row], abs=2e-3)
            checked += 1
    assert checked == 2400


def test_beyond_the_border_the_picture_is_mirrored() -> None:
    picture = noise(3, *SIZE)
    made = variation(smallest_crop=0.5).apply(picture[None], Change(**NEUTRAL | {"x": 1.0}).row()[None])[0]
    half = SIZE[1] // 2
    assert torch.allclose(made[:, :, half:], picture[:, :, half:].flip(2).float(), atol=1e-2)


def test_crops_lie_in_the_picture_and_keep_their_share() -> None:
    draws = drawn(variation(smallest_crop=0.3), 2000)
    areas = [one["width"] * one["height"] for one in draws]
    ratios = [one["width"] / one["height"] for one in draws]
    assert 0.3 - 1e-6 <= min(areas) < 0.32
    assert 0.98 < max(areas) <= 1 + 1e-6
    assert 0.75 - 1e-6 <= min(ratios) < 0.78
    assert 1.29 < max(ratios) <= 4 / 3 + 1e-6
    assert max(abs(one["x"]) + one["width"] for one in draws) <= 1 + 1e-6
    assert max(abs(one["y"]) + one["height"] for one in draws) <= 1 + 1e-6
    assert max(abs(one["x"]) for one in draws) > 0.3


def test_what_is_read_is_wider_by_the_smallest_crop_up_to_twice_the_pixels() -> None:
    assert variation(flips=True).margin == 1
    assert variation(smallest_crop=0.6).margin == pytest.approx(1 / math.sqrt(0.6))
    assert variation(smallest_crop=0.1).margin == pytest.approx(math.sqrt(2))
    wide = variation(flips=True).apply(noise(2, 3, 30, 30), torch.stack([Change(**NEUTRAL).row()] * 2))
    assert wide.shape == (2, 3, *SIZE)


def test_brightness_and_contrast_are_the_formula() -> None:
    picture = noise(3, 6, 7)
    x = picture.numpy() / 255
    made = changed("brightness", 1.3, picture, brightness=0.5)
    assert made == pytest.approx(np.clip(x * 1.3, 0, 1), abs=1e-5)
    grey = float((0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).mean())
    made = changed("contrast", 1.4, picture, contrast=0.5)
    assert made == pytest.approx(np.clip(grey + 1.4 * (x - grey), 0, 1), abs=1e-5)


def test_saturation_and_hue_are_the_standard_librarys() -> None:
    picture = noise(3, 6, 7)
    saturated, turned = (changed(name, value, picture, **{name: 0.5}) for name, value in
                         (("saturation", 0.6), ("hue", 2 * math.pi * 0.1)))  # fmt: skip
    for i, j in itertools.product(range(6), range(7)):
        h, s, v = colorsys.rgb_to_hsv(*(picture[:, i, j].numpy() / 255))
        assert saturated[:, i, j] == pytest.approx(colorsys.hsv_to_rgb(h, s * 0.6, v), abs=1e-4)
        assert turned[:, i, j] == pytest.approx(colorsys.hsv_to_rgb((h + 0.1) % 1, s, v), abs=1e-4)


def test_a_stain_fades_without_the_others() -> None:
    """A pixel mixed from known amounts, remixed with the changed ones; glass without stain stays white."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = np.random.default_rng(0).uniform(0, 0.6, (3, 4, 5))
    amounts[:, 0, 0] = 0
    factors = np.array([0.8, 1.1, 1.0])
    before = np.exp(-np.einsum("shw,sc->chw", amounts, stains))
    after = np.exp(-np.einsum("shw,sc->chw", amounts * factors[:, None, None], stains))
    picture = torch.from_numpy(np.round(before * 255).astype(np.uint8))
    made = changed("stain", augment._stain(factors), picture, stain=0.2)
    assert made == pytest.approx(after, abs=0.006), "the picture was rounded to whole levels"
    assert made[:, 0, 0] == pytest.approx(1, abs=1e-5)
    assert np.abs(before - after).max() > 0.03


def test_a_blur_is_gaussian() -> None:
    picture = noise(3, 15, 15)
    made = changed("blur", 1.2, picture, blur=1.5)
    reach = 5  # three times the largest
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * 1.2**2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(picture.numpy() / 255, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
    for i, j in itertools.product(range(15), range(15)):
        expected = (padded[:, i : i + 2 * reach + 1, j : j + 2 * reach + 1] * weights).sum(axis=(1, 2))
        assert made[:, i, j] == pytest.approx(expected, abs=1e-5)
    assert changed("blur", 0.0, picture, blur=1.5) == pytest.approx(picture.numpy() / 255, abs=1e-7)


def test_changes_that_change_nothing_change_nothing() -> None:
    picture = noise(1, 3, *SIZE)
    made = Variation(EVERYTHING, SIZE, 0).apply(picture, Change(**NEUTRAL).row()[None])
    assert torch.allclose(made, picture.clamp(min=1).float(), atol=0.02), "no optical density is infinite: black is 1"
    assert torch.equal(variation(flips=True).apply(picture, Change(**NEUTRAL).row()[None]), picture.float())


@pytest.mark.parametrize("augmented", [EVERYTHING, Augment(preset="microscopy")])
def test_a_picture_is_changed_the_same_in_any_chunks(augmented: Augment) -> None:
    of = Variation(augmented, SIZE, 0)
    pictures, rows = noise(48, 3, 31, 31), torch.stack([of.draw(pair, 3) for pair in range(48)])
    whole = of.apply(pictures, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(of.apply(pictures, rows), whole), "not in bfloat16"
    for each in (16, 7, 1):
        parts = [of.apply(*some) for some in zip(pictures.split(each), rows.split(each), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float32
    assert 0 <= float(whole.min()) < float(whole.max()) <= 255
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(of.apply(pictures[:1].expand(9, -1, -1, -1),
                                                                                rows[:9]), 2))  # fmt: skip


def test_a_caption_that_names_a_side_keeps_its_picture_upright() -> None:
    views = ("transposed", "mirrored", "upended", "angle")
    upright = drawn(Variation(EVERYTHING, SIZE, 0), 50, upright=True)
    assert all(one[name] == 0 for one in upright for name in views)
    assert all(one["width"] < 1 for one in upright), "cropped it may be"
    free = drawn(Variation(EVERYTHING, SIZE, 0), 50)
    assert [one["brightness"] for one in upright] == [one["brightness"] for one in free]
    ignored = Augment(**{**EVERYTHING.model_dump(), "sides": "ignore"})
    assert drawn(Variation(ignored, SIZE, 0), 50, upright=True) == free
    assert all(any(one[name] != 0 for one in free) for name in views)


def test_the_preset_fills_in_what_is_not_written() -> None:
    assert Augment(preset="microscopy").model_dump() == {**Augment.model_construct().model_dump(), **MICROSCOPY,
                                                         "preset": "microscopy"}  # fmt: skip
    assert Augment(preset="microscopy", hue=0.1, flips=False).hue == 0.1
    assert not Augment(preset="microscopy", flips=False).flips
    with pytest.raises(ValidationError, match="it changes nothing"):
        Augment(sides="ignore")
    with pytest.raises(ValidationError, match="for pictures that are changed anyway"):
        Data(root="data", reduced_decode=True)


def test_a_sheet_shows_each_picture_above_what_it_becomes() -> None:
    of, pictures = variation(rotation="right", flips=True), noise(11, 3, *SIZE)
    rows = torch.stack([of.draw(pair, 0) for pair in range(11)])
    sheet = np.asarray(Image.open(io.BytesIO(augment.sheet(of, pictures, rows))))
    became = of.apply(pictures, rows).numpy().astype(np.uint8)
    gap = 2
    for number in range(11):
        top = gap + number // 8 * (2 * SIZE[0] + 3 * gap)
        left = gap + number % 8 * (SIZE[1] + gap)
        for place, expected in enumerate((pictures[number].numpy(), became[number])):
            begin = top + place * (SIZE[0] + gap)
            found = sheet[begin : begin + SIZE[0], left : left + SIZE[1]]
            assert np.array_equal(found, expected.transpose(1, 2, 0)), (number, place)
