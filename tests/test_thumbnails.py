"""Thumbnails: small, without metadata, within their budget."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from cytoclip.thumbnails import Thumbnails


def made(folder: Path, name: str = "a.jpg", **given: object) -> Path:
    Image.effect_noise((640, 320), 60).convert("RGB").save(folder / name, **given)
    return folder / name


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_pixels_and_nothing_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    picture = opened(Thumbnails(10**6).of(made(tmp_path, exif=exif, comment=b"Jane Doe")))
    assert picture.size == (160, 80)
    assert not picture.getexif()
    assert b"Jane" not in picture.fp.read() if picture.fp else True
    assert "comment" not in picture.info


def test_the_budget_counts_each_mention(tmp_path: Path) -> None:
    one, other = made(tmp_path), made(tmp_path, "b.jpg")
    size = len(Thumbnails(10**6).of(one))
    few = Thumbnails(2 * size + 10)
    assert [bool(few.of(each)) for each in (one, one, one, other)] == [True, True, False, False]
    assert Thumbnails(size - 1).of(one) == ""


def test_a_file_that_is_no_picture_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    assert Thumbnails(10**6).of(tmp_path / "a.jpg") == ""
    assert Thumbnails(10**6).of(tmp_path / "none.jpg") == ""
