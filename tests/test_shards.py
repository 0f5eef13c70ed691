"""Tar headers against tarfile's own reading, and shards that are no list of pairs."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import pytest

from cytoclip import shards, sources
from cytoclip.errors import UserError
from tests import formats
from tests.formats import put

PNG = formats.drawn(1)[0].picture


def write(folder: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in members.items():
            put(archive, name, data)
    return folder / "a.tar"


def refused(place: Path) -> str:
    with pytest.raises(UserError) as caught:
        sources.read(place)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form: int) -> None:
    drawn = random.Random(form)
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w", format=form) as archive:
        for number in range(60):
            longest = 80 if form == tarfile.USTAR_FORMAT else 300
            name = f"{number}/" + ("e" if longest == 80 else "é") * drawn.randrange(0, longest // 2)
            put(archive, name + "n" * drawn.randrange(1, 30), bytes(drawn.randrange(0, 2000)))
            link = tarfile.TarInfo(f"link {number}")
            link.type, link.linkname = drawn.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "x" * drawn.randrange(1, 99)
            archive.addfile(link)
            other = tarfile.TarInfo(f"other {number}")
            other.type = drawn.choice([tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
            archive.addfile(other)
    with tarfile.open(place) as archive:
        twin = [(one.name, one.offset_data, one.size) for one in archive if one.isreg()]
    with place.open("rb") as stream:
        assert [tuple(one) for one in shards.members(stream, place.stat().st_size, place)] == twin
    assert len(twin) == 60


def test_texts_beside_a_json(tmp_path: Path) -> None:
    caption = {"caption": "a cell", "group": 3, "source": "s", "label": None}
    members = {
        "x/1.jpg": PNG, "x/1.txt": b" one \n", "x/1.cls": b"2\n",
        "2.txt": b"two", "2.png": PNG,
        "3.png": PNG, "3.mask.png": PNG, "3.json": json.dumps(caption).encode(), "3.npy": b"?",
        "README": b"no key", ".DS_Store": b"",
    }  # fmt: skip
    found = sources.read(write(tmp_path, members))
    assert found.names == ("a.tar/x/1.jpg", "a.tar/2.png", "a.tar/3.png")
    assert found.captions == ("one", "two", "a cell")
    assert found.labels == ("2", None, None)
    assert (found.groups[2], found.sources[2]) == ("3", "s")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"1.txt": b"no picture"}, "'1': it has no picture"),
        ({"1.png": PNG}, "'1': it has no caption"),
        ({"1.png": PNG, "1.txt": b" "}, "its caption is empty"),
        ({"1.png": b"", "1.txt": b"c"}, "its picture is empty"),
        ({"1.png": PNG, "1.txt": b"\xff\xfe"}, "its txt is not UTF-8"),
        ({"1.png": PNG, "1.json": b"{"}, "its .json is not JSON"),
        ({"1.png": PNG, "1.json": b"[" * 100_000}, "its .json is not JSON"),
        ({"1.png": PNG, "1.json": b"[]"}, "its .json is not an object"),
        ({"1.png": PNG, "1.json": b'{"caption": 3}'}, "its caption is a number, not a text"),
        ({"1.png": PNG, "1.jpg": PNG, "1.txt": b"c"}, "it has 2 pictures, png, jpg"),
        ({"1.png": PNG, "1.PNG": PNG, "1.txt": b"c"}, "it holds '1.PNG' twice"),
        ({"1.png": PNG, "1.txt": bytes(2_000_000)}, "its txt has 2000000 bytes"),
    ],
)
def test_keys_that_are_no_pairs_are_counted(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    message = refused(write(tmp_path, {"0.png": PNG, "0.txt": b"fine", **members}))
    assert message.startswith(f"1 of 2 keys of {tmp_path / 'a.tar'} are not pairs: key '1': ")
    assert said in message


def header(size: int, kind: bytes = tarfile.REGTYPE, name: str = "1.png") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


PAIR = header(512) + b"\x89PNG".ljust(512) + header(6, name="1.txt") + b"a cell".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no pairs"),
        (b"x" * 100, "is not a tar"),
        (b"x" * 5000, "is not a tar"),
        (bytes(10240), "holds no pairs"),
        (header(10**12) + bytes(512), "'1.png' claims 1000000000000 bytes"),  # a bomb of one header
        (header(2**63, name="1.txt") + bytes(512), "claims"),
        (header(10**9, tarfile.GNUTYPE_LONGNAME) + bytes(512), "claims 1000000000 bytes"),
        (header(100_000, tarfile.GNUTYPE_LONGNAME) + bytes(200_000), "holds a name of 100000 bytes"),
        (header(100_000, tarfile.XHDTYPE) + bytes(200_000), "holds a name of 100000 bytes"),
        (header(20, tarfile.XHDTYPE) + b"99 path=x".ljust(512, b"\0"), "holds a damaged pax header"),
        (header(512, tarfile.GNUTYPE_SPARSE) + bytes(1024), "with holes"),
        (header(600) + bytes(512), "cut off"),
        (header(100)[:200], "is not a tar"),
        (header(512) + bytes(512) + header(5)[:300] + b"?" * 212, "is damaged at byte 1024"),
        (PAIR + header(512)[:100], "is cut off at byte 2148"),  # within a header
        (PAIR[:-300], "is cut off at byte 1748"),  # within what fills a block
    ],
)
def test_a_tar_that_is_none_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert said in refused(tmp_path / "a.tar")


def test_a_bomb_of_members_takes_no_more_than_the_file(tmp_path: Path) -> None:
    """A million empty members are half a gigabyte; as a file with holes they are nothing, and end at the first hole."""
    with (tmp_path / "a.tar").open("wb") as stream:
        stream.write(header(0))
        stream.truncate(10**12)
    assert "holds no pairs" in refused(tmp_path / "a.tar") or "no caption" in refused(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/outside.png"])
def test_a_members_name_is_a_label_and_leads_nowhere(tmp_path: Path, name: str) -> None:
    place = write(tmp_path, {name: PNG, name.replace(".png", ".txt"): b"c"})
    found = sources.read(place)
    assert [image.path for image in found.images] == [place]  # type: ignore[union-attr]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cytoclip", "a.tar"]


def test_links_within_a_tar_are_not_followed(tmp_path: Path) -> None:
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("1.txt"), io.BytesIO())
    assert "it has no picture" in refused(place)
