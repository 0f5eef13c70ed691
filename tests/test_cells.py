"""The sample set: the picture and the caption say the same thing, and nothing but the seed decides what they say."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from cytoclip.cells import (
    KINDS,
    VALUES,
    Cell,
    Sample,
    Slide,
    allowed,
    attributes,
    describe,
    draw,
    sample,
    slide,
)

Pixels = npt.NDArray[np.float32]

CELL = Cell("parabasal cell", "pair", "clean", "blue-green", "smooth", "medium", "round", "fine")
PLAIN = Slide("slide-00", stain=(1.0, 1.0, 1.0), light=(0.97, 0.97, 0.97), shade=(0.0, 0.0), blur=0.4)
# Kinds whose cells can have the value, where parabasal cells cannot.
KIND_WITH = {"bean-shaped": "macrophage", "lobed": "macrophage", "small": "koilocyte"}
# One kind of each outline.
OUTLINES = list({outline: kind for kind, (outline, _) in KINDS.items()}.values())
# Values of one attribute, two by two.
CHANGES = [(name, *two) for name, values in VALUES.items() for two in itertools.combinations(values, 2)]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(sample(120, seed=3, slides=range(4)))


def test_a_pair_depends_only_on_seed_slides_and_index(samples: list[Sample]) -> None:
    again = list(sample(5, seed=3, slides=range(4)))
    assert again == samples[:5]  # PIL compares pixels
    assert [one.caption for one in sample(5, seed=4, slides=range(4))] != [one.caption for one in again]
    assert [one.caption for one in sample(5, seed=3, slides=range(4, 8))] != [one.caption for one in again]


def test_slides_are_named_by_number_and_differ() -> None:
    assert slide(3, seed=0) == slide(3, seed=0)
    assert slide(3, seed=0).name == "slide-03"
    assert len({slide(index, seed=0).stain for index in range(20)}) == 20
    assert slide(3, seed=0).stain != slide(3, seed=1).stain


def test_a_sample_says_where_it_is_from_and_what_it_is(samples: list[Sample]) -> None:
    assert {one.source for one in samples} == {f"slide-{index:02d}" for index in range(4)}
    for one in samples:
        assert one.label in one.caption
        assert (one.image.mode, one.image.size) == ("RGB", (128, 128))


def test_every_type_is_drawn_and_about_as_often() -> None:
    rng = np.random.default_rng(0)
    drawn = [attributes(rng) for _ in range(1600)]
    kinds = Counter(cell.kind for cell in drawn)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 140  # of 200 expected
    for name, values in VALUES.items():
        assert {getattr(cell, name) for cell in drawn} == set(values), name
    for cell in drawn:
        assert all(getattr(cell, name) in values for name, values in allowed(cell.kind).items())


def test_the_table_of_types_names_only_values_that_exist_once() -> None:
    known = [value for values in VALUES.values() for value in values]
    assert len(known) == len(set(known))
    assert tuple(VALUES) == tuple(field.name for field in fields(Cell)[1:])
    for kind, (_, never) in KINDS.items():
        assert set(never.split(", ")) <= set(known), kind
        assert all(allowed(kind).values()), kind


def test_captions_are_short_and_each_combination_has_its_own() -> None:
    captions = [describe(cell) for kind in KINDS for cell in every_cell(kind)]
    assert len(captions) == sum(math.prod(map(len, allowed(kind).values())) for kind in KINDS)
    assert len(set(captions)) == len(captions) > 50_000
    assert max(map(len, captions)) <= 300
    assert max(len(caption.split()) for caption in captions) <= 45
    assert not [caption for caption in captions if "{" in caption or not caption.endswith(".")]


def test_the_caption_is_plain_english() -> None:
    assert describe(CELL) == (
        "A pair of parabasal cells on a clean background. "
        "Blue-green cytoplasm without inclusions; medium-sized round nuclei with pale, fine chromatin."
    )
    assert "round nucleus with" in describe(replace(CELL, arrangement="single"))
    assert "paired nuclei with" in describe(replace(CELL, arrangement="single", nucleus_shape="paired"))


@pytest.mark.parametrize(("name", "one", "other"), CHANGES)
def test_another_value_gives_another_picture(name: str, one: str, other: str) -> None:
    """The same random numbers and one attribute changed, at the size that a small model sees.

    An attribute that is not drawn changes nothing at all, for each layer has its own random stream. The least change
    is that of pale chromatin to a nucleolus: one grey level, over a picture of which nuclei are a tenth.
    """
    cell = replace(CELL, kind=KIND_WITH.get(one, KIND_WITH.get(other, CELL.kind)))
    changes = [difference(replace(cell, **{name: one}), replace(cell, **{name: other}), seed) for seed in range(2)]
    assert np.mean(changes) > 0.8  # grey levels of 255


def test_each_pair_of_values_was_compared() -> None:
    assert len(CHANGES) == 6 + 10 + 6 + 10 + 3 + 15 + 6


@pytest.mark.parametrize(("kind", "other"), list(itertools.combinations(OUTLINES, 2)))
def test_another_outline_gives_another_picture(kind: str, other: str) -> None:
    changes = [difference(replace(CELL, kind=kind), replace(CELL, kind=other), seed) for seed in range(2)]
    assert np.mean(changes) > 4  # grey levels of 255: macrophages and parabasal cells differ by 4.8


@pytest.mark.parametrize("contents", ["vacuoles", "red granules", "brown pigment", "halo"])
def test_there_is_room_for_what_the_caption_promises(contents: str) -> None:
    """Also in the cells whose nucleus leaves the least cytoplasm: on one pixel in a hundred, and by 25 grey levels."""
    for arrangement, shape in itertools.product(VALUES["arrangement"], ("irregular", "oval", "lobed")):
        cell = Cell("tadpole cell", arrangement, "clean", "pink", contents, "large", shape, "fine")
        changed = np.abs(picture(cell) - picture(replace(cell, contents="smooth"))).mean(axis=2) > 25
        assert changed.mean() > 0.01, cell


def test_colours_are_those_of_the_caption() -> None:
    for cell in (replace(CELL, kind=kind) for kind in ("parabasal cell", "tadpole cell")):
        red, green, blue = stained(replace(cell, cytoplasm="orange"))
        assert red > green + 40 > blue + 80
        red, green, blue = stained(replace(cell, cytoplasm="blue-green"))
        assert min(green, blue) > red + 40
        red, green, blue = stained(replace(cell, cytoplasm="pink"))
        assert red > blue + 20 > green + 40
        red, green, blue = stained(replace(cell, cytoplasm="purple"))
        assert blue > red + 20 > green + 30


def test_a_prominent_nucleolus_is_red_and_one_in_each_nucleus() -> None:
    for arrangement, count in (("single", 1), ("pair", 2), ("cluster", 3), ("sheet", 4)):
        cell = replace(CELL, arrangement=arrangement, chromatin="nucleolus")
        for shape, each in (("round", 1), ("bean-shaped", 1), ("lobed", 1), ("paired", 2)):
            assert spots(is_red(picture(replace(cell, nucleus_shape=shape)))) == count * each
    assert not is_red(picture(CELL)).any()


def test_larger_nuclei_are_larger_and_smudged_ones_darker() -> None:
    dark = {
        (size, chromatin): (picture(replace(CELL, nucleus_size=size, chromatin=chromatin)).max(axis=2) < 110).sum()
        for size in VALUES["nucleus_size"]
        for chromatin in ("fine", "coarse", "smudged")
    }
    assert 1.5 * dark["small", "smudged"] < dark["medium", "smudged"] < dark["large", "smudged"] / 1.5
    for size in VALUES["nucleus_size"]:
        assert 2 * dark[size, "fine"] < dark[size, "coarse"] < dark[size, "smudged"] / 1.5


def test_the_background_stays_behind_the_cells() -> None:
    """A tenth of the mucus, and of the film between debris, shines through the cytoplasm; nothing else does."""
    cell = replace(CELL, arrangement="single", nucleus_size="medium")
    middle = np.s_[34:94, 34:94]
    for background in ("bloody", "mucus", "inflammatory", "debris"):
        changed = np.abs(picture(replace(cell, background=background)) - picture(cell))
        assert changed[middle].mean() < 4 < changed.mean()


def test_a_slide_tints_all_of_its_pictures() -> None:
    rosy = replace(PLAIN, light=(0.97, 0.90, 0.90))
    red, green, blue = np.asarray(draw(CELL, np.random.default_rng(0), rosy), dtype=np.float32)[:9, :9].mean(
        axis=(0, 1)
    )
    assert red > green + 10
    assert red > blue + 10
    strong = np.asarray(draw(CELL, np.random.default_rng(0), replace(PLAIN, stain=(1.3, 1.3, 1.3))), dtype=np.float32)
    assert strong.mean() < picture(CELL).mean() - 5


def test_a_picture_has_the_size_asked_for_and_the_same_scene() -> None:
    cell = replace(CELL, chromatin="smudged")
    large = draw(cell, np.random.default_rng(0), PLAIN, size=256)
    assert large.size == (256, 256)
    assert np.abs(np.asarray(large.resize((128, 128)), dtype=np.float32) - picture(cell)).mean() < 4


def picture(cell: Cell, seed: int = 0) -> Pixels:
    return np.asarray(draw(cell, np.random.default_rng(seed), PLAIN), dtype=np.float32)


def difference(one: Cell, other: Cell, seed: int) -> float:
    """Mean absolute difference at 64 px."""
    pictures = [draw(cell, np.random.default_rng(seed), PLAIN).reduce(2) for cell in (one, other)]
    return float(np.abs(np.subtract(*(np.asarray(one, dtype=np.float32) for one in pictures))).mean())


def every_cell(kind: str) -> list[Cell]:
    return [Cell(kind, *values) for values in itertools.product(*allowed(kind).values())]


def stained(cell: Cell) -> Pixels:
    """Mean colour of the cytoplasm: the pixels that are far from grey, but not as dark as a nucleus."""
    pixels = picture(cell).reshape(-1, 3)
    coloured = (np.ptp(pixels, axis=1) > 40) & (pixels.max(axis=1) > 160)
    assert coloured.mean() > 0.1
    return pixels[coloured].mean(axis=0)


def is_red(pixels: Pixels) -> npt.NDArray[np.bool_]:
    red, green, blue = np.moveaxis(pixels, 2, 0)
    return (red > green + 60) & (red > blue + 30)


def spots(mask: npt.NDArray[np.bool_]) -> int:
    """How many connected areas there are, by flooding one after the other."""
    canvas = Image.fromarray(mask.astype(np.uint8) * 255).copy()  # what is made from an array cannot be written to
    count = 0
    while (found := np.argwhere(np.asarray(canvas))).size:
        ImageDraw.floodfill(canvas, tuple(found[0, ::-1].tolist()), 0)
        count += 1
    return count
