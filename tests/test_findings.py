"""Single findings: what the crop loses, and how a picture under several pairs and captions is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytoclip import findings, looks
from cytoclip.findings import Split, lost
from cytoclip.looks import Look
from cytoclip.pairs import Pairs
from cytoclip.pixels import PixelSpec, prepare

PLAIN = Look("c", None, "JPEG", "RGB", 8, width=100, height=100, spread=40.0)


def spec(resize: int | tuple[int, int] | None, crop: tuple[int, int] | None) -> PixelSpec:
    return PixelSpec(resize, crop, int(Image.Resampling.NEAREST), (0.0,) * 3, (1.0,) * 3, 1.0)


def split(*looks: Look, names: tuple[str, ...] = (), captions: tuple[str, ...] = ()) -> Split:
    names = names or tuple(f"{i}.jpg" for i in range(len(looks)))
    none = (None,) * len(looks)
    captions = captions or tuple(f"caption number {i}" for i in range(len(looks)))
    return Split(Pairs(tuple(map(Path, names)), names, captions, none, none, none), looks)


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((400, 300), spec(60, (60, 60))),
        ((300, 400), spec(60, (60, 60))),
        ((400, 400), spec(80, (60, 60))),
        ((400, 100), spec(50, (50, 25))),
        ((400, 100), spec(60, (80, 40))),
        ((300, 400), spec((60, 60), None)),
        ((300, 400), spec((80, 80), (60, 60))),
        ((200, 120), spec(None, (60, 60))),
        ((40, 120), spec(None, (60, 60))),
    ],
)
def test_the_share_that_a_crop_loses_is_that_of_the_pixels_that_never_arrive(
    size: tuple[int, int], how: PixelSpec
) -> None:
    """Counted: each fiftieth of the picture has a colour of its own, and some do not come out."""
    parts = 50
    red = np.arange(size[0]) * parts // size[0] + 1
    green = np.arange(size[1]) * parts // size[1] + 1
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[..., 0], picture[..., 1] = red[None, :], green[:, None]
    out = prepare(Image.fromarray(picture), how)
    came = [len(set(channel.ravel().tolist()) - {0}) for channel in out[:2]]
    kept = came[0] / len(set(red.tolist())) * came[1] / len(set(green.tolist()))
    assert lost(*size, how) == pytest.approx(1 - kept, abs=0.05)


def test_a_file_that_several_pairs_name_is_one_picture() -> None:
    bad = Look("", "truncated")
    found = findings.of_pictures("train", split(bad, bad, PLAIN, names=("a.jpg", "a.jpg", "b.jpg")))
    assert [(one.kind, one.count, one.of) for one in found] == [("truncated", 1, 2)]


def test_further_captions_of_a_picture_are_read_too() -> None:
    one = split(PLAIN, PLAIN)
    one = replace(one, pairs=replace(one.pairs, more=(("Cell.", "a <i>x</i>"), ())))
    found = findings.of_captions("train", one)
    assert [(f.kind, f.count, f.of) for f in found] == [("one-word", 1, 4), ("html", 1, 4)]


def test_identifiers_are_masked_wherever_a_caption_is_shown() -> None:
    one = split(PLAIN, captions=("<b>DOE^JANE</b> of 12.03.2019",))
    text = repr(findings.of_captions("train", one))
    assert "[name]" in text
    assert "JANE" not in text
    assert "12.03" not in text


@pytest.mark.parametrize(
    ("name", "stored", "wrong"),
    [("a.jpg", "JPEG", False), ("a.JPEG", "MPO", False), ("a.jpg", "PNG", True), ("a", "PNG", False),
     ("a.b/c", "PNG", False), ("a.tif", "TIFF", False), ("a.png", "JPEG", True), ("a.xyz", "PNG", False)]
)  # fmt: skip
def test_endings(name: str, stored: str, wrong: bool) -> None:
    found = findings.of_pictures("train", split(replace(PLAIN, format=stored), names=(name,)))
    assert [one.kind for one in found] == ["wrong-extension"] * wrong


def test_every_problem_of_a_scan_has_a_kind() -> None:
    kinds = {
        "no such file": "missing",
        "empty file": "empty-file",
        "truncated": "truncated",
        "truncated or damaged PNG": "truncated",
        "claims 60000x60000 pixels": "too-large",
        "claims too many pixels": "too-large",
        "permission denied": "undecodable",
        "not a regular file": "undecodable",
        "not a picture of a known format": "undecodable",
        "damaged (bad chunk)": "undecodable",
        "needs more memory than there is": "decoder-died",
        looks.DIED: "decoder-died",
    }
    for problem, kind in kinds.items():
        assert [one.kind for one in findings.of_pictures("val", split(Look("", problem)))] == [kind], problem


def test_pictures_of_nearly_one_colour_are_not_alike() -> None:
    def one(content: str, spread: float) -> Look:
        return replace(PLAIN, content=content, spread=spread, hashes=(5,), thumb=bytes(range(256)))

    def kinds(*looks: Look) -> list[str]:
        two = split(*looks)
        two = replace(two, pairs=replace(two.pairs, contents=tuple(look.content for look in looks)))
        return [finding.kind for finding in findings.find({"train": two}, None)]

    assert kinds(one("a", 40), one("b", 40)) == ["alike"]
    assert kinds(one("a", 1), one("b", 1), one("c", 40)) == ["near-constant"]


@pytest.mark.parametrize(
    ("depth", "used", "spread", "kinds"),
    [
        (8, 8, 40, []),
        (8, 8, 1, ["near-constant"]),
        (16, 16, 40, ["deep"]),
        (16, 15, 40, ["deep"]),
        (16, 14, 40, ["dim"]),
        (16, 12, 1, ["dim"]),
        (16, 0, 0, ["near-constant", "deep"]),
        (16, 16, 1, ["near-constant", "deep"]),
    ],
)
def test_a_picture_of_few_of_its_bits_is_to_be_rescaled_and_not_taken_out(
    depth: int, used: int, spread: float, kinds: list[str]
) -> None:
    found = findings.of_pictures("train", split(replace(PLAIN, depth=depth, used=used, spread=spread)))
    assert [one.kind for one in found] == kinds
    assert [case.note for one in found if one.kind == "dim" for case in one.cases] == [
        f"uses {used} of 16 bits" for kind in kinds if kind == "dim"
    ]
