"""A clean data root of drawn cells, and one fault of each kind to plant in it."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cytoclip import cells

PAIRS = {"train": 48, "val": 12}


def clean(root: Path) -> Path:
    """Different pictures, captions and sources; JPEGs of 96×96."""
    number = 0
    for split, count in PAIRS.items():
        (root / split / "imgs").mkdir(parents=True)
        entries = []
        for i, one in enumerate(cells.sample(count, 5, range(number, number + 4))):
            one.image.resize((96, 96)).save(root / split / "imgs" / f"{i:02}.jpg", quality=90)
            entries.append({"img": f"{i:02}.jpg", "caption": one.caption, "source": f"{split} {one.source}"})
        (root / split / "img_text_pair.json").write_text(json.dumps(entries))
        number += 4
    return root


@dataclass
class Bed:
    """Where a fault is planted: pair `i` of the training split, or beside it."""

    root: Path
    train: list[dict[str, str]]
    val: list[dict[str, str]]
    i: int

    @property
    def entry(self) -> dict[str, str]:
        return self.train[self.i]

    @property
    def file(self) -> Path:
        return self.root / "train" / "imgs" / self.entry["img"]

    @property
    def picture(self) -> Image.Image:
        return Image.open(self.file).convert("RGB")

    def replace(self, ending: str, save: Callable[[Path], object]) -> None:
        """Another file in place of the pair's."""
        self.file.unlink()
        self.entry["img"] = self.entry["img"].replace(".jpg", ending)
        save(self.file)


def _pages(bed: Bed) -> None:
    one, two = bed.picture, bed.picture.rotate(90)
    bed.replace(".tif", lambda to: one.save(to, save_all=True, append_images=[two]))


def _deep(bed: Bed) -> None:
    grey = np.asarray(bed.picture.convert("L")).astype(np.uint16) * 257
    bed.replace(".png", lambda to: Image.fromarray(grey).save(to))


def _dim(bed: Bed) -> None:
    """As a camera of 12 bits writes it."""
    grey = np.asarray(bed.picture.convert("L")).astype(np.uint16) * 16
    bed.replace(".png", lambda to: Image.fromarray(grey).save(to))


def _see_through(bed: Bed) -> None:
    layer = bed.picture.convert("RGBA")
    layer.putpixel((3, 3), (0, 0, 0, 0))
    bed.replace(".png", layer.save)


def _exif(bed: Bed, tag: int, value: object) -> None:
    picture = bed.picture
    exif = Image.Exif()
    exif[tag] = value
    picture.save(bed.file, quality=90, exif=exif)


def _other_ending(bed: Bed) -> None:
    bed.picture.save(bed.file, "PNG")


def _flat(bed: Bed) -> None:
    noise = np.random.default_rng(0).integers(200, 206, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bed.file)


def _bomb(bed: Bed) -> None:
    """A hundred bytes that claim 60000×60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    bed.replace(".png", lambda to: to.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels))


def _alike(bed: Bed) -> None:
    (copy := bed.root / "train" / "imgs" / "alike.jpg").parent.mkdir(exist_ok=True)
    bed.picture.resize((120, 120)).save(copy, quality=60)
    bed.train.append({"img": "alike.jpg", "caption": "Another sentence, about the very same field of view."})


def _leaked(bed: Bed) -> None:
    shutil.copy(bed.file, bed.root / "val" / "imgs" / "leaked.jpg")
    bed.val.append({"img": "leaked.jpg", "caption": "A field that was seen in training, byte for byte."})


def _leaked_alike(bed: Bed) -> None:
    picture = bed.picture
    picture.crop((1, 1, 96, 96)).resize((70, 70)).save(bed.root / "val" / "imgs" / "again.jpg", quality=70)
    bed.val.append({"img": "again.jpg", "caption": "A field that was seen in training, cropped and smaller."})


def _both(bed: Bed, key: str) -> None:
    bed.entry[key] = bed.val[3][key] = "MRN 4711001 of both"


def _unreadable(bed: Bed) -> None:
    (bed.root / "test" / "imgs").mkdir(parents=True)
    (bed.root / "test" / "img_text_pair.json").write_text("[{")


# kind -> what plants it, and the names that the check must give, {} for the pair's picture
PLANTS: dict[str, tuple[Callable[[Bed], object], list[str]]] = {
    "unreadable-split": (_unreadable, ["test/"]),
    "no-pair": (lambda bed: bed.val.append({"img": bed.entry["img"], "caption": " "}), ["val/entry 12"]),
    "few-pairs": (lambda _: None, []),  # by the batch size that is asked for
    "leak-content": (_leaked, ["val/leaked.jpg = train/{}"]),
    "leak-alike": (_leaked_alike, ["val/again.jpg = train/{}"]),
    "leak-source": (lambda bed: _both(bed, "source"), ["val/03.jpg = train/{}"]),
    "leak-group": (lambda bed: (bed.val[3].setdefault("group", ""), _both(bed, "group")), ["val/03.jpg = train/{}"]),
    "missing": (lambda bed: bed.file.unlink(), ["train/{}"]),
    "empty-file": (lambda bed: bed.file.write_bytes(b""), ["train/{}"]),
    "truncated": (lambda bed: bed.file.write_bytes(bed.file.read_bytes()[:900]), ["train/{}"]),
    "undecodable": (lambda bed: bed.file.write_bytes(b"no picture at all " * 9), ["train/{}"]),
    "too-large": (_bomb, ["train/{}"]),
    "wrong-extension": (_other_ending, ["train/{}"]),
    "unnamed": (lambda bed: shutil.copy(bed.file, bed.file.parent / "left over.jpg"), ["train/left over.jpg"]),
    "several-pages": (_pages, ["train/{}"]),
    "near-constant": (_flat, ["train/{}"]),
    "cropped-away": (lambda bed: bed.picture.resize((96, 60)).save(bed.file), ["train/{}"]),
    "enlarged": (lambda bed: bed.picture.resize((30, 30)).save(bed.file), ["train/{}"]),
    "dim": (_dim, ["train/{}"]),
    "deep": (_deep, ["train/{}"]),
    "other-colours": (lambda bed: bed.picture.convert("CMYK").save(bed.file), ["train/{}"]),
    "transparent": (_see_through, ["train/{}"]),
    "turned": (lambda bed: _exif(bed, 274, 6), ["train/{}"]),
    "empty-caption": (lambda bed: bed.entry.update(caption="\u200b – …"), ["train/{}"]),
    "unread-script": (lambda bed: bed.entry.update(caption="骨髓涂片中可见一个巨核细胞"), ["train/{}"]),
    "mojibake": (lambda bed: bed.entry.update(caption="A naÃ¯ve lymphocyte, 8 Âµm wide"), ["train/{}"]),
    "html": (lambda bed: bed.entry.update(caption="A <b>large</b> cell &amp; a small one"), ["train/{}"]),
    "no-value": (lambda bed: bed.entry.update(caption="N/A "), ["train/{}"]),
    "one-word": (lambda bed: bed.entry.update(caption="Koilocyte."), ["train/{}"]),
    "cut-captions": (lambda bed: bed.entry.update(caption="a very long story of one cell " * 30), ["train/{}"]),
    "personal-captions": (lambda bed: bed.entry.update(caption="Smear of DOE^JANE, 12.03.2019"), ["train/{}"]),
    "personal-metadata": (lambda bed: _exif(bed, 315, "Jane Doe"), ["train/{}"]),
    "dated-metadata": (lambda bed: _exif(bed, 306, "2019:03:12 10:00:00"), ["train/{}"]),
    "repeated-pairs": (lambda bed: bed.train.append(dict(bed.entry)), ["train/{} = train/{}"]),
    "alike": (_alike, ["train/alike.jpg = train/{}"]),
    "repeated-pictures": (
        lambda bed: bed.train.append({"img": bed.entry["img"], "caption": "The same field in other words."}),
        ["train/{} = train/{}"],
    ),
    "repeated-captions": (
        lambda bed: bed.entry.update(caption=bed.train[0]["caption"]),
        ["train/{} = train/00.jpg"],
    ),
}


def plant(root: Path, kinds: list[str]) -> dict[str, list[str]]:
    """Plant one fault of each of `kinds`, each in a pair of its own; the names that must be found, by kind."""
    lists = {name: json.loads((root / name / "img_text_pair.json").read_text()) for name in PAIRS}
    expected = {}
    for i, kind in enumerate(kinds, start=1):
        bed = Bed(root, lists["train"], lists["val"], i)
        does, names = PLANTS[kind]
        does(bed)
        expected[kind] = [name.replace("{}", bed.entry["img"]) for name in names]
    for name, entries in lists.items():
        (root / name / "img_text_pair.json").write_text(json.dumps(entries))
    return expected
