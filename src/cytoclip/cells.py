"""Stained cells drawn from plain words: the sample set that shows a new user what the program does.

Nothing here is a patient. Each picture is drawn from the attributes that its caption names, so a model that learns
the pairs has learned to read the picture.
"""
# H height, W width, C colour channels, K points of a closed contour; x runs right and y down, in pixels

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array = npt.NDArray[np.floating[Any]]
Colour = tuple[float, float, float]

# Every value of every attribute, with the words that the caption says for it. No value is in two tables.
VALUES = {
    "arrangement": {
        "single": "A single {}",
        "pair": "A pair of {}s",
        "cluster": "An overlapping cluster of three {}s",
        "sheet": "A sheet of four {}s",
    },
    "background": {
        "clean": "a clean background",
        "bloody": "a bloody background of red cells",
        "mucus": "a background of mucus streaks",
        "inflammatory": "an inflammatory background of neutrophils",
        "debris": "a dirty background of granular debris",
    },
    "cytoplasm": {
        "blue-green": "Blue-green cytoplasm",
        "orange": "Orange, keratinised cytoplasm",
        "pink": "Pink cytoplasm",
        "purple": "Purple cytoplasm",
    },
    "contents": {
        "smooth": "without inclusions",
        "vacuoles": "with clear vacuoles",
        "red granules": "with red granules",
        "brown pigment": "with clumps of brown pigment",
        "halo": "with a clear perinuclear halo",
    },
    "nucleus_size": {"small": "small", "medium": "medium-sized", "large": "large"},
    "nucleus_shape": {name: name for name in ("round", "oval", "bean-shaped", "irregular", "lobed", "paired")},
    "chromatin": {
        "fine": "pale, fine chromatin",
        "coarse": "coarse, clumped chromatin",
        "smudged": "dark, smudged chromatin",
        "nucleolus": "a prominent red nucleolus",
    },
}


# Of each cell type: its outline, and the values that do not go with it.
KINDS = {
    "superficial squamous cell": ("polygonal", "purple, halo, medium, large, bean-shaped, lobed, nucleolus"),
    "intermediate squamous cell": ("polygonal", "orange, halo, small, large, irregular, lobed, smudged"),
    "koilocyte": ("polygonal", "smooth, vacuoles, red granules, brown pigment, round, lobed, nucleolus"),
    "parabasal cell": ("round", "small, bean-shaped, lobed"),
    "endocervical cell": ("columnar", "orange, halo, lobed, paired"),
    "macrophage": ("ruffled", "orange, halo, large, irregular"),
    "tadpole cell": ("tadpole", "purple, bean-shaped, paired"),
    "plasma cell": ("egg-shaped", "orange, large, irregular, bean-shaped, fine"),
}


@dataclass(frozen=True)
class Cell:
    """What a cytologist would say of one picture; every cell in it is alike.

    `kind` is a key of `KINDS`, each other attribute a key of the table of that name in `VALUES`.
    """

    kind: str
    arrangement: str
    background: str
    cytoplasm: str
    contents: str
    nucleus_size: str
    nucleus_shape: str
    chromatin: str


@dataclass(frozen=True)
class Slide:
    """What the pictures of one slide have in common: nuisance that a model should learn to ignore."""

    name: str  # such as slide-03: the source of its pairs
    stain: Colour  # factor of the absorbance in red, green and blue; 1 is the nominal stain
    light: Colour  # of the empty field, in [0, 1]
    shade: tuple[float, float]  # fraction of the light lost from edge to edge, and the direction of that in radians
    blur: float  # radius of the Gaussian, in pixels of a 128 px picture


@dataclass(frozen=True)
class Sample:
    """One pair of the sample set, its cell type, and the slide it came from."""

    image: Image.Image
    caption: str
    label: str
    source: str


def sample(count: int, seed: int, slides: range) -> Iterator[Sample]:
    """Draw `count` pairs; the pair at an index depends only on the seed, the slides and the index.

    Captions are drawn independently, so that a few repeat in a large set, as they do in a real one.
    """
    plates = [slide(index, seed) for index in slides]
    for index in range(count):
        rng = np.random.default_rng((seed, _PICTURES, slides.start, len(slides), index))
        plate = plates[rng.integers(len(plates))]
        cell = attributes(rng)
        yield Sample(draw(cell, rng, plate), describe(cell), cell.kind, plate.name)


def slide(index: int, seed: int) -> Slide:
    """The slide of that number: the same for the same seed."""
    rng = np.random.default_rng((seed, _SLIDES, index))
    red, green, blue = (float(value) for value in rng.uniform(0.92, 1.08) * rng.uniform(0.95, 1.05, 3))
    bright, warm = float(rng.uniform(0.95, 0.98)), float(rng.uniform(-0.015, 0.015))
    return Slide(
        name=f"slide-{index:02d}",
        stain=(red, green, blue),
        light=(bright + warm, bright, bright - warm),
        shade=(float(rng.uniform(0, 0.08)), float(rng.uniform(0, 2 * np.pi))),
        blur=float(rng.uniform(0.3, 0.6)),
    )


def attributes(rng: np.random.Generator) -> Cell:
    """Draw a cell whose attributes go together: the type first, then each other attribute evenly within it."""
    kind = list(KINDS)[rng.integers(len(KINDS))]
    return Cell(kind, *(values[rng.integers(len(values))] for values in allowed(kind).values()))


def allowed(kind: str) -> dict[str, list[str]]:
    """The values that each attribute can have in cells of that type, in the order of the fields of `Cell`."""
    never = KINDS[kind][1].split(", ")
    return {field.name: [value for value in VALUES[field.name] if value not in never] for field in fields(Cell)[1:]}


def describe(cell: Cell) -> str:
    """The caption: every attribute in two sentences, and the same words for the same attributes.

    Examples
    --------
    >>> print(describe(Cell("koilocyte", "pair", "clean", "pink", "halo", "large", "oval", "coarse")))
    A pair of koilocytes on a clean background. Pink cytoplasm with a clear perinuclear halo; \
large oval nuclei with coarse, clumped chromatin.
    """
    said = {name: words[getattr(cell, name)] for name, words in VALUES.items()}
    nuclei = "nucleus" if cell.arrangement == "single" and cell.nucleus_shape != "paired" else "nuclei"
    return (
        f"{said['arrangement'].format(cell.kind)} on {said['background']}. {said['cytoplasm']} {said['contents']}; "
        f"{said['nucleus_size']} {said['nucleus_shape']} {nuclei} with {said['chromatin']}."
    )


def draw(cell: Cell, rng: np.random.Generator, slide: Slide, size: int = 128) -> Image.Image:
    """Draw a field of `size` × `size` pixels, RGB.

    Layers are absorbances, which add up in transmitted light (Beer–Lambert): cells that overlap are darker there.
    Each layer has its own random stream, so that another value of one attribute leaves the other layers as they were.
    """
    layout, body, between, inside, kernel, camera = rng.spawn(6)
    bodies = _bodies(cell, layout, size)
    nuclei_HW = _mask(size, [contour for one in bodies for contour in one.nuclei])
    absorbance_HWC, covered_HW = _cytoplasm(bodies, _STAINS[cell.cytoplasm], body, size)
    absorbance_HWC += _background(cell.background, covered_HW, between) * (1 - 0.9 * covered_HW[..., None])
    absorbance_HWC = _contents(cell.contents, bodies, absorbance_HWC, covered_HW, nuclei_HW, inside)
    absorbance_HWC = _nuclei(cell.chromatin, bodies, absorbance_HWC, nuclei_HW, kernel)
    return _photograph(absorbance_HWC, slide, camera)


_PICTURES, _SLIDES = 1, 2  # so that no slide shares its random stream with a picture

_STAINS = {"blue-green": (118, 198, 190), "orange": (247, 164, 68), "pink": (242, 146, 178), "purple": (180, 152, 214)}
# Radius of an inclusion and distance between two, as fractions of the field, and their colour.
_GRAINS = {"red granules": (0.015, 0.053, (206, 38, 58)), "brown pigment": (0.027, 0.085, (124, 78, 22))}
_COUNT = {"single": 1, "pair": 2, "cluster": 3, "sheet": 4}
# By number of cells, as fractions of the field: the radius of a cell, and that of the ring their centres lie on.
_RING = {1: (0.37, 0.0), 2: (0.26, 0.235), 3: (0.265, 0.21), 4: (0.22, 0.295)}
# Long cells stand side by side, as columnar epithelium does: the radius, and the distance from one to the next.
_ROW = {1: (0.37, 0.0), 2: (0.33, 0.36), 3: (0.275, 0.27), 4: (0.235, 0.245)}
_LONG = ("columnar", "tadpole")
_RATIO = {"small": 0.29, "medium": 0.42, "large": 0.58}  # radius of the nucleus over that of the cell
_SHIFT = {"columnar": -0.45, "tadpole": -0.5, "egg-shaped": -0.36}  # of the nucleus along the cell, in cell radii
_OVERSAMPLE = 3  # masks are drawn this much larger and averaged: smooth edges
_ANGLES = np.linspace(0, 2 * np.pi, 72, endpoint=False)


class _Body(NamedTuple):
    outline: Array  # (K, 2)
    nuclei: list[Array]  # (K, 2) each
    centre: Array  # (2,) of the nucleus
    nucleus: float  # radius of the nucleus
    radius: float  # of the cell


def _bodies(cell: Cell, rng: np.random.Generator, size: int) -> list[_Body]:
    """Where the cells lie, and their contours."""
    form, count, turn = KINDS[cell.kind][0], _COUNT[cell.arrangement], rng.uniform(0, 2 * np.pi)
    radius, reach = (_ROW if form in _LONG else _RING)[count]
    places = np.arange(count)
    if form in _LONG:
        centres = np.stack([0 * places, (places - (count - 1) / 2) * reach], axis=1) @ _rotation(turn)
    else:
        centres = reach * _rays(turn + places * 2 * np.pi / count)
    bodies = []
    for centre in size * (0.5 + centres + rng.uniform(-0.012, 0.012, (count, 2))):
        spin = _rotation(turn + rng.uniform(-0.12, 0.12) if form in _LONG else rng.uniform(0, 2 * np.pi))
        grown = size * radius * rng.uniform(0.95, 1.05)
        nucleus = grown * _RATIO[cell.nucleus_size] * (0.82 if form in _LONG else 1.0)
        middle = centre + grown * np.array([_SHIFT.get(form, 0.0), rng.uniform(-0.05, 0.05)]) @ spin
        outline = centre + grown * _outline(form, rng) @ spin
        spin = spin @ _rotation(rng.uniform(-0.5, 0.5))
        nuclei = [middle + nucleus * contour @ spin for contour in _nucleus(cell.nucleus_shape, rng)]
        bodies.append(_Body(outline, nuclei, middle, nucleus, grown))
    return bodies


def _rotation(angle: float) -> Array:
    return _rays(angle + np.array([0, np.pi / 2]))


def _rays(angles: Array) -> Array:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _wobble(rng: np.random.Generator, amount: float, *waves: int) -> Array:
    """(K, 1) relative radius of an organic outline: a few Fourier terms of random phase."""
    terms = [np.sin(wave * _ANGLES + rng.uniform(0, 2 * np.pi)) / wave for wave in waves]
    return np.asarray(1 + amount * np.sum(terms, axis=0)[:, None])


def _outline(form: str, rng: np.random.Generator) -> Array:
    """(K, 2) unit contour of a cell, its long axis along x."""
    soft = _wobble(rng, 0.06, 2, 3, 5)
    circle = _rays(_ANGLES)
    cos, sin = circle.T
    if form == "polygonal":
        corners = int(rng.integers(5, 7))
        angles = (np.arange(corners) + rng.uniform(-0.22, 0.22, corners)) * 2 * np.pi / corners
        along = _ANGLES / (2 * np.pi) * corners
        edges = rng.uniform(1.05, 1.3, (corners, 1)) * _rays(angles)
        edge = np.stack([np.interp(along, np.arange(corners), line, period=corners) for line in edges.T], axis=1)
        # Squamous cells have corners, but no sharp ones.
        return np.asarray(np.mean([np.roll(edge, shift, axis=0) for shift in range(-3, 4)], axis=0) * soft)
    if form == "ruffled":
        return np.asarray(circle * soft * _wobble(rng, 0.75, 7, 11))
    if form == "egg-shaped":
        return np.asarray(circle * np.array([1.15, 0.82]) * soft)
    if form == "columnar":
        along = np.sign(cos) * np.abs(cos) ** 0.55
        across = np.sign(sin) * np.abs(sin) ** 0.75 * (0.56 + 0.08 * along)
        return np.asarray(np.stack([1.18 * along, across], axis=1) * (soft + 1) / 2)
    if form == "tadpole":
        width = 0.72 * np.abs(sin) * (1 / (1 + np.exp(7 * (-cos - 0.05))) + 0.16)  # head at -1, end of the tail at 1
        return np.asarray(np.stack([0.05 - 1.25 * cos, np.sign(sin) * width], axis=1) * soft)
    return circle * soft


def _nucleus(shape: str, rng: np.random.Generator) -> list[Array]:
    """Unit contours of one nucleus; the areas are alike, so that shape and size can be told apart."""
    soft = _rays(_ANGLES) * _wobble(rng, 0.05, 2, 3)
    if shape == "oval":
        return [soft * np.array([1.38, 0.70])]
    if shape == "irregular":
        return [_rays(_ANGLES) * _wobble(rng, 0.6, 3, 4, 5, 7)]
    if shape == "paired":
        return [np.array([side, 0.0]) + 0.70 * soft for side in (-0.78, 0.78)]
    along = np.linspace(-1, 1, len(_ANGLES) // 2)
    if shape == "bean-shaped":
        return [1.05 * _arc(0.50 * (1 - along**4) ** 0.5, np.pi * 0.42)]
    if shape == "lobed":
        return [1.15 * _arc(0.10 + 0.46 * np.abs(np.sin(1.5 * np.pi * (along + 1))), np.pi * 0.72)]
    return [soft]


def _arc(half: Array, span: float) -> Array:
    """(K, 2) contour of a bent band of that half width along its length, over `span` radians either side."""
    ray = _rays(np.linspace(-span, span, len(half)))
    band = np.vstack([ray * (0.82 + half)[:, None], (ray * (0.82 - half)[:, None])[::-1]])
    return np.asarray(band - (band.min(axis=0) + band.max(axis=0)) / 2)


def _cytoplasm(bodies: list[_Body], rgb: Colour, rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """(H, W, C) absorbance of the cell bodies, and (H, W) how far each pixel is covered by one."""
    thickness, covered = np.zeros((2, size, size), dtype=np.float32)
    for body in bodies:
        mask = _mask(size, [body.outline])
        rim = mask * (1 - _blurred(mask, size / 60))
        thickness += mask * (0.62 + 0.38 * _blurred(mask, size / 14)) + 0.45 * rim
        covered = np.maximum(covered, mask)
    grain = 1 + 0.08 * _noise(rng, size, 40) + 0.10 * _noise(rng, size, 12)
    return _stained(np.minimum(thickness, 1.4) * grain, rgb), covered


def _stained(amount: Array, rgb: Colour) -> Array:
    """(H, W, C) absorbance of an (H, W) amount of stain, where an amount of 1 turns white light to that colour."""
    return np.asarray(amount[..., None] * -np.log(np.asarray(rgb, dtype=np.float32) / 255))


def _mask(size: int, contours: Sequence[Array], dots: Array | None = None) -> Array:
    """(H, W) in [0, 1]: what the contours, and the dots (x, y, radius), cover."""
    canvas = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for contour in contours:
        pen.polygon((contour * _OVERSAMPLE).ravel().tolist(), fill=255)
    for x, y, radius in [] if dots is None else (dots * _OVERSAMPLE).tolist():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(canvas.reduce(_OVERSAMPLE), dtype=np.float32) / 255


def _blurred(mask: Array, radius: float) -> Array:
    picture = Image.fromarray((mask * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.BoxBlur(radius)), dtype=np.float32) / 255


def _noise(rng: np.random.Generator, size: int, bumps: int) -> Array:
    """(H, W) smooth noise of about unit variance, with so many bumps along a side."""
    coarse = Image.fromarray(rng.standard_normal((bumps, bumps), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _background(kind: str, covered: Array, rng: np.random.Generator) -> Array:
    """(H, W, C) absorbance of what lies between the cells."""
    size, free = len(covered), 1 - covered
    if kind == "mucus":
        return _mucus(rng, size)
    if kind == "bloody":
        dots = _dots(free, 0.052 * size, 0.125 * size, rng, spread=0.08)
        pale = _blurred(_mask(size, [], dots * (1, 1, 0.45)), size / 90)
        return _stained(_mask(size, [], dots) * (1 - 0.65 * pale), (226, 92, 78))
    if kind == "inflammatory":
        dots = _dots(free, 0.056 * size, 0.145 * size, rng, spread=0.08)
        turns = rng.uniform(0, 2 * np.pi, (len(dots), 1)) + np.array([0, 1, 2]) * rng.uniform(1.3, 2.2, (len(dots), 1))
        lobes = dots[:, None, :2] + 0.5 * dots[:, None, 2:] * _rays(turns)
        dark = _mask(size, [], np.column_stack([lobes.reshape(-1, 2), np.repeat(dots[:, 2] * 0.42, 3)]))
        return _stained(0.4 * _mask(size, [], dots), (196, 166, 196)) + _stained(dark, (66, 52, 120))
    if kind == "debris":
        grains = 0.9 * _mask(size, [], _dots(free, 0.011 * size, 0.038 * size, rng, spread=0.4))
        return _stained(grains + 0.22 * np.clip(1 + 0.6 * _noise(rng, size, 9), 0, 2), (150, 132, 96))
    return np.zeros((size, size, 3), dtype=np.float32)


def _dots(free: Array, radius: float, pitch: float, rng: np.random.Generator, spread: float = 0.25) -> Array:
    """(number, 3) dots (x, y, radius ± spread) on the free pixels: a turned grid, jittered so that no one sees it."""
    size = len(free)
    steps = np.arange(-0.75 * size, 0.75 * size, pitch)
    grid = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) @ _rotation(rng.uniform(0, np.pi))
    spots = size / 2 + grid + rng.uniform(-0.38, 0.38, grid.shape) * pitch
    spots = spots[((spots >= 0) & (spots < size)).all(axis=1)]
    column, row = spots.astype(int).T
    spots = spots[_blurred(free, radius)[row, column] > 0.75]
    return np.column_stack([spots, radius * rng.uniform(1 - spread, 1 + spread, len(spots))])


def _mucus(rng: np.random.Generator, size: int) -> Array:
    """(H, W, C) absorbance of streaks that run roughly one way."""
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    along, turn = np.linspace(-0.75, 0.75, 24), _rotation(rng.uniform(0, np.pi))
    for offset in np.linspace(-0.6, 0.6, 13) + rng.uniform(-0.03, 0.03, 13):
        wave = 0.04 * np.sin(along * rng.uniform(3, 7) + rng.uniform(0, 2 * np.pi))
        line = size * (0.5 + np.stack([along, offset + wave], axis=1) @ turn)
        wide = max(1, round(size * rng.uniform(0.01, 0.045)))
        pen.line(line.ravel().tolist(), fill=int(rng.integers(150, 256)), width=wide)
    streaks = np.asarray(canvas.filter(ImageFilter.BoxBlur(size / 100)), dtype=np.float32) / 255
    return _stained(0.12 + streaks, (160, 160, 214))


def _contents(
    kind: str, bodies: list[_Body], absorbance: Array, covered: Array, nuclei: Array, rng: np.random.Generator
) -> Array:
    """The absorbance with what the cytoplasm holds; all of it stays inside the cells and off their nuclei."""
    size, scale, free = len(covered), bodies[0].radius, np.clip(covered - nuclei, 0, 1)
    if kind == "halo":
        reach = [(1.15 * body.nucleus + 0.2 * body.radius) * _wobble(rng, 0.12, 2, 3, 5) for body in bodies]
        rings = [body.centre + far * _rays(_ANGLES) for body, far in zip(bodies, reach, strict=True)]
        clear = _mask(size, rings) * covered
        dense = _blurred(clear, size / 40) * (1 - clear) * covered  # cytoplasm is condensed around a halo
        return absorbance * (1 - 0.88 * clear + 0.5 * dense)[..., None]
    if kind == "vacuoles":
        clear = _mask(size, [], _dots(free, max(0.135 * scale, 0.028 * size), 0.2 * scale + 0.03 * size, rng)) * covered
        rim = clear * (1 - _blurred(clear, size / 60))
        return absorbance * (1 - 0.92 * clear + 0.5 * rim)[..., None]
    if kind in _GRAINS:
        radius, pitch, rgb = _GRAINS[kind]
        return absorbance + _stained(_mask(size, [], _dots(free, radius * size, pitch * size, rng)) * covered, rgb)
    return absorbance


def _nuclei(chromatin: str, bodies: list[_Body], absorbance: Array, mask: Array, rng: np.random.Generator) -> Array:
    """The absorbance with the nuclei in place of the cytoplasm below them."""
    size = len(mask)
    if chromatin == "smudged":
        mask = np.maximum(mask * 0.9, _blurred(mask, size / 80))
        amount = np.full_like(mask, 1.75)
    else:
        membrane = 0.9 * (1 - _blurred(mask, size / 80))
        clumps = 1.6 * np.clip(1.6 * _noise(rng, size, 30), 0, 1) - 0.1
        amount = 0.55 + membrane + (clumps if chromatin == "coarse" else 0.1 * _noise(rng, size, 64))
    stained = absorbance * (1 - 0.85 * mask[..., None]) + _stained(mask * amount, (74, 72, 146))
    if chromatin == "nucleolus":
        # Halfway between two opposite points of the contour, which is inside the nucleus even where it is bent.
        ends = [len(_ANGLES) // 4, 3 * len(_ANGLES) // 4]
        dots = [(*one[ends].mean(axis=0), 0.36 * body.nucleus) for body in bodies for one in body.nuclei]
        red = _mask(size, [], np.array(dots)) * mask
        stained = stained * (1 - 0.9 * red[..., None]) + _stained(red, (190, 16, 44))
    return np.asarray(stained)


def _photograph(absorbance: Array, slide: Slide, rng: np.random.Generator) -> Image.Image:
    """The light that comes through, as the camera of that slide sees it."""
    size, along = len(absorbance), np.linspace(-0.5, 0.5, len(absorbance), dtype=np.float32)
    loss, angle = slide.shade
    light = 1 - loss * (0.5 + math.cos(angle) * along[None, :] + math.sin(angle) * along[:, None])
    light = light + 0.008 * rng.standard_normal((size, size), dtype=np.float32)
    lamp, stain = np.array((slide.light, slide.stain), dtype=np.float32)
    seen = np.clip(light[..., None] * lamp * np.exp(-absorbance * stain), 0, 1)
    picture = Image.fromarray((seen * 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(slide.blur * size / 128))
