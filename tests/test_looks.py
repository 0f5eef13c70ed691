"""One look at a file: what it says, that it is remembered, and that copies of a picture look alike."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cytoclip import cells, images, leaks, looks, similar
from cytoclip.console import Console
from cytoclip.files import Piece, cache_folder
from cytoclip.leaks import Face
from cytoclip.pairs import Pairs

QUIET = Console(quiet=True)
REAL = Path(__file__).parents[2] / "shared" / "data" / "wbcatt_demo"


@pytest.fixture(scope="session")
def cell() -> Image.Image:
    return next(cells.sample(1, 3, range(2))).image


def test_a_look_at_a_plain_picture(cell: Image.Image, tmp_path: Path) -> None:
    cell.resize((90, 60)).save(tmp_path / "a.png")
    look = looks.look(tmp_path / "a.png")
    assert (look.problem, look.format, look.mode, look.depth) == (None, "PNG", "RGB", 8)
    assert (look.width, look.height, look.orientation) == (90, 60, 1)
    assert (look.transparent, look.several, look.personal) == (False, False, ())
    assert look.content == images.scan([tmp_path / "a.png"], 1)[0].content
    grey = np.asarray(cell.resize((90, 60)).convert("L"))
    assert look.spread == pytest.approx(grey.std(), abs=0.01)


def exif(tag: int, value: object) -> Image.Exif:
    made = Image.Exif()
    made[tag] = value
    return made


def text(key: str, value: str) -> PngInfo:
    made = PngInfo()
    made.add_text(key, value)
    return made


SAVED: dict[str, tuple[Callable[[Image.Image, Path], None], dict[str, object]]] = {
    "16-bit grey": (
        lambda cell, to: Image.fromarray(np.asarray(cell.convert("L")).astype(np.uint16) * 257).save(to, "PNG"),
        {"mode": "I;16", "depth": 16},
    ),
    "float": (lambda cell, to: cell.convert("F").save(to, "TIFF"), {"mode": "F", "depth": 32}),
    "bilevel": (lambda cell, to: cell.convert("1").save(to, "PNG"), {"mode": "1", "depth": 1}),
    "cmyk": (lambda cell, to: cell.convert("CMYK").save(to, "JPEG"), {"mode": "CMYK", "depth": 8}),
    "an alpha that hides nothing": (
        lambda cell, to: cell.convert("RGBA").save(to, "PNG"),
        {"mode": "RGBA", "transparent": False},
    ),
    "an alpha that does": (
        lambda cell, to: Image.merge("RGBA", (*cell.split(), Image.new("L", cell.size, 254))).save(to, "PNG"),
        {"transparent": True},
    ),
    "a palette with a transparent entry": (
        lambda cell, to: cell.quantize(8).save(to, "PNG", transparency=0),
        {"mode": "P", "transparent": True},
    ),
    "16-bit grey with a transparent value": (
        lambda _, to: Image.fromarray(np.full((9, 9), 700, np.uint16)).save(to, "PNG", transparency=700),
        {"transparent": True},
    ),
    "turned": (
        lambda cell, to: cell.resize((90, 60)).save(to, "JPEG", exif=exif(274, 6)),
        {"orientation": 6, "width": 60, "height": 90},
    ),
    "an orientation that is none": (
        lambda cell, to: cell.save(to, "JPEG", exif=exif(274, 77)),
        {"orientation": 1},
    ),
    "two pages": (
        lambda cell, to: cell.save(to, "TIFF", save_all=True, append_images=[cell]),
        {"several": True, "format": "TIFF"},
    ),
    "an artist": (lambda cell, to: cell.save(to, "JPEG", exif=exif(315, "J. Doe")), {"personal": ("EXIF Artist",)}),
    "a day": (
        lambda cell, to: cell.save(to, "TIFF", tiffinfo={306: "2019:03:12 10:00:00"}),
        {"personal": ("EXIF DateTime (date)",)},
    ),
    "a blank day": (lambda cell, to: cell.save(to, "JPEG", exif=exif(306, "0000:00:00 00:00:00")), {"personal": ()}),
    "a telling description": (
        lambda cell, to: cell.save(to, "JPEG", exif=exif(270, "PatientName: Doe, case no. 88123")),
        {"personal": ("EXIF ImageDescription",)},
    ),
    "a camera's description": (lambda cell, to: cell.save(to, "JPEG", exif=exif(270, "OLYMPUS")), {"personal": ()}),
    "a text chunk": (
        lambda cell, to: cell.save(to, "PNG", pnginfo=text("Patient Name", "Doe^Jane")),
        {"personal": ("PNG Patient Name",)},
    ),
    "a program's address and day": (
        lambda cell, to: cell.save(
            to, "PNG", pnginfo=text("Software", "Matplotlib, https://matplotlib.org/2019-03-12")
        ),
        {"personal": ()},
    ),
    "XMP with a day": (
        lambda cell, to: cell.save(
            to, "JPEG", xmp=b'<x xmlns:r="http://www.w3.org/1999/02/22-rdf#" xmp:CreateDate="2019-03-12T10:00:00"/>'
        ),
        {"personal": ("JPEG xmp (date)",)},
    ),
    "XMP without": (
        lambda cell, to: cell.save(to, "JPEG", xmp=b'<x xmlns:r="http://www.w3.org/1999/02/22-rdf#" a="b"/>'),
        {"personal": ()},
    ),
    "a comment": (lambda cell, to: cell.save(to, "JPEG", comment=b"MRN 4711001"), {"personal": ("JPEG comment",)}),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_stored(name: str, cell: Image.Image, tmp_path: Path) -> None:
    save, expected = SAVED[name]
    save(cell, tmp_path / "picture")
    look = looks.look(tmp_path / "picture")
    assert look.problem is None
    assert {key: getattr(look, key) for key in expected} == expected
    assert "Doe" not in repr(look), "the value itself is never kept"


def test_pieces_of_a_file_and_bad_ones(cell: Image.Image, tmp_path: Path) -> None:
    written = io.BytesIO()
    cell.save(written, "PNG")
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        info = tarfile.TarInfo("a.png")
        info.size = len(written.getvalue())
        shard.addfile(info, io.BytesIO(written.getvalue()))
    with tarfile.open(tmp_path / "shard.tar") as shard:
        offset = shard.getmembers()[0].offset_data
    (tmp_path / "plain.png").write_bytes(written.getvalue())
    (tmp_path / "cut.png").write_bytes(written.getvalue()[:500])
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    places = [
        Piece(tmp_path / "shard.tar", offset, info.size),
        *(tmp_path / f"{name}.png" for name in ("plain", "cut", "pipe", "loop", "gone")),
    ]
    found = looks.look_at(places, tmp_path, QUIET)
    assert found[0] == found[1] == looks.look(places[1])
    assert [look.problem for look in found[2:]] == [scan.problem for scan in images.scan(places[2:], 1)]
    assert all(look.problem for look in found[2:])


def test_what_has_not_changed_is_not_read_again(
    cell: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        cell.rotate(18 * i).save(tmp_path / f"{i}.png")
    places = [*sorted(tmp_path.glob("*.png")), tmp_path / "gone.png"]
    first = looks.look_at(places, tmp_path, QUIET)
    kept = cache_folder(tmp_path) / "looks.parquet"
    assert kept.is_file()
    asked: list[int] = []
    in_processes = looks._in_processes

    def counted(places, waiting):
        asked.extend(waiting)
        return in_processes(places, waiting)

    monkeypatch.setattr(looks, "_in_processes", counted)
    assert looks.look_at(places, tmp_path, QUIET) == first
    assert asked == [20], "only what is not there is looked for again"
    cell.save(places[3])
    asked.clear()
    second = looks.look_at(places, tmp_path, QUIET)
    assert asked == [3, 20]
    assert [one == other for one, other in zip(first, second, strict=True)].count(False) == 1
    first_bytes = bytearray(places[5].read_bytes())
    first_bytes[-1] ^= 1  # as long as before, and changed at another time
    places[5].write_bytes(first_bytes)
    os.utime(places[5], ns=(1, 1))
    asked.clear()
    third = looks.look_at(places, tmp_path, QUIET)
    assert asked == [5, 20]
    assert third[5].content != second[5].content
    second = third
    kept.write_bytes(kept.read_bytes()[:-40])
    assert looks.look_at(places, tmp_path, QUIET) == second, "a damaged memory is no memory"
    monkeypatch.setattr(looks, "_VERSION", "another")
    asked.clear()
    assert looks.look_at(places, tmp_path, QUIET) == second
    assert len(asked) == 21


def test_what_was_seen_before_an_interruption_is_kept(
    cell: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell.save(tmp_path / "a.png")
    cell.rotate(90).save(tmp_path / "b.png")
    places = [tmp_path / "a.png", tmp_path / "b.png"]

    def one_then_stop(places, waiting):
        yield 0, looks.look(places[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(looks, "_in_processes", one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        looks.look_at(places, tmp_path, QUIET)
    monkeypatch.setattr(looks, "_in_processes", lambda places, _: ((i, looks.look(places[i])) for i in [1]))
    assert looks.look_at(places, tmp_path, QUIET) == [looks.look(place) for place in places]


def faces(pictures: list[Image.Image]) -> list[Face]:
    """As a look at a file makes them."""
    found = []
    for picture in pictures:
        written = io.BytesIO()
        picture.save(written, "PNG")
        facts = looks._facts(Image.open(io.BytesIO(written.getvalue())))
        found.append(Face(facts["hashes"], facts["thumb"]))
    return found


def pairs(count: int) -> Pairs:
    names, none = tuple(map(str, range(count))), (None,) * count
    return Pairs(tuple(map(Path, names)), names, names, none, none, none)


def compressed(picture: Image.Image, quality: int) -> Image.Image:
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=quality)
    return Image.open(written).convert("RGB")


def resized(picture: Image.Image, factor: float) -> Image.Image:
    return picture.resize((round(picture.width * factor), round(picture.height * factor)))


def cut(picture: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = picture.size
    return picture.crop(
        (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
    )


# kind of copy -> how it is made, and the least share of copies that must be found
COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
    **{f"JPEG quality {q}": (lambda picture, q=q: compressed(picture, q), 1.0) for q in (95, 75, 50)},
    **{f"resized {f}": (lambda picture, f=f: resized(picture, f), 1.0) for f in (0.5, 0.75, 1.5, 2.0)},
    "half the size, quality 60": (lambda picture: compressed(resized(picture, 0.5), 60), 1.0),
    "1 % cut off all sides": (lambda picture: cut(picture, 0.01, 0.01, 0.01, 0.01), 0.98),
    "2 % cut off all sides": (lambda picture: cut(picture, 0.02, 0.02, 0.02, 0.02), 0.95),
    "1 % cut off two sides": (lambda picture: cut(picture, 0.01, 0.01, 0, 0), 0.98),
    "2 % cut off two sides": (lambda picture: cut(picture, 0.02, 0, 0, 0.02), 0.98),
    "2 % cut off one side": (lambda picture: cut(picture, 0, 0, 0.02, 0), 0.98),
}


def recall(pictures: list[Image.Image]) -> dict[str, float]:
    """The share of copies of each kind that are told to look like the picture that they were made from."""
    names = [str(i) for i in range(len(pictures))]
    splits = {"train": pairs(len(pictures))}
    splits["val"] = replace(splits["train"], contents=tuple(f"copy {name}" for name in names))
    known = dict(zip(names, faces(pictures), strict=True))
    found = {}
    for kind, (copy, _) in COPIES.items():
        copies = zip(splits["val"].contents, faces([copy(picture) for picture in pictures]), strict=True)
        alike = [one for one in leaks.alike(splits, known | dict(copies)) if one.kind == "leak-alike"]
        right = sum(case.name == case.twin.name for one in alike for case in one.cases if case.twin)
        found[kind] = right / len(pictures)
    return found


def test_copies_of_drawn_cells_are_found_and_different_ones_are_not() -> None:
    pictures = [one.image for one in cells.sample(20, 11, range(8))]
    found = recall(pictures)
    assert len(found) == 13
    assert {kind: share for kind, share in found.items() if share < COPIES[kind][1]} == {}
    assert leaks.alike({"train": pairs(20)}, dict(zip(map(str, range(20)), faces(pictures), strict=True))) == []


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real image-caption pairs are not beside this checkout")
def test_no_two_real_micrographs_are_alike_and_their_copies_are_found() -> None:
    """Without the thumbs, too: the nearest hashes of the 1124 are 8 bits apart."""
    places = sorted(REAL.glob("*/imgs/*.jpg"))
    seen = [looks.look(place) for place in places]
    assert len(seen) == 1124
    sets = np.array([0 if "train" in place.parts else 1 for place in places])
    assert (similar.nearest(np.array([look.hashes for look in seen], np.uint64), sets, 2)[0] == -1).all()
    found = recall([images.decode(place) for place in places[::28]])
    assert {kind: share for kind, share in found.items() if share < COPIES[kind][1]} == {}


def test_no_damage_of_a_file_raises_or_takes_long(cell: Image.Image, tmp_path: Path) -> None:
    """Bytes of whole files changed, cut and repeated at random, metadata included."""
    small, rng, kept = cell.resize((48, 40)), np.random.default_rng(0), []
    marked = exif(270, "case no. 88123")
    marked[306] = "2019:03:12 10:00:00"
    options = {"JPEG": {"exif": marked}, "PNG": {"exif": marked, "pnginfo": text("a", "b")}, "TIFF": {}, "GIF": {},
               "WEBP": {"exif": marked}, "BMP": {}, "PPM": {}, "JPEG2000": {}, "ICO": {}, "TGA": {}}  # fmt: skip
    began = time.perf_counter()
    for kind, given in options.items():
        written = io.BytesIO()
        small.save(written, kind, **given)
        whole = np.frombuffer(written.getvalue(), np.uint8)
        for _ in range(25):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), rng.choice([200, len(whole)])), 6)] = rng.integers(0, 256, 6)
            damaged = damaged[: rng.choice([len(whole), rng.integers(1, len(whole))])]
            place = tmp_path / f"x.{kind.lower()}"
            place.write_bytes(damaged.tobytes())
            kept.append(looks.look(place))
    assert time.perf_counter() - began < 60
    assert len(kept) == 250
    assert 20 < sum(look.problem is None for look in kept) < 230
    assert all(look.content for look in kept)


def _deep_colours(to: Path, highest: int) -> None:
    """A PNG of 16 bits a channel, which Pillow does not write; its alpha is full."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.full((9, 9, 4), highest, ">u2")
    pixels[..., 3] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 16, 6, 0, 0, 0))
    to.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("highest", "used"), [(0, 0), (255, 8), (4095, 12), (16383, 14), (16384, 15), (65535, 16)])
def test_the_bits_that_are_used_of_16(highest: int, used: int, tmp_path: Path) -> None:
    """In grey of every ending, and in colour, of which Pillow keeps the upper 8 bits alone."""
    grey = Image.fromarray(np.array([[0, highest]], np.uint16))
    for ending in ("png", "tif", "pgm"):
        grey.save(tmp_path / f"a.{ending}")
        assert looks.look(tmp_path / f"a.{ending}").used == used, ending
    _deep_colours(tmp_path / "b.png", highest)
    seen = looks.look(tmp_path / "b.png")
    assert (seen.mode, seen.depth, seen.used) == ("RGBA", 16, max(used, 8))


def test_bits_are_not_counted_where_the_range_is_declared(tmp_path: Path) -> None:
    """Then it is scaled from that range, and nothing is dark."""
    grey = Image.fromarray(np.array([[0, 4095]], np.uint16))
    grey.save(tmp_path / "a.tif", tiffinfo={280: 0, 281: 4095})
    seen = looks.look(tmp_path / "a.tif")
    assert (seen.depth, seen.used) == (16, 16)
