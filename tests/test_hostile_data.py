"""Whatever lies where pairs are expected: our error or pairs, nothing touched outside, in bounded time and memory."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cytoclip import decoded, files, images, looks, sources
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.files import Piece
from tests import formats
from tests.formats import put

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
WORDS = st.sampled_from(["img", "image", "caption", "images", "annotations", "id", "image_id", "file_name", "group",
    "a.png", "../a.png", "/etc/hostname", "a\0.png", "\ud800.png", "C:\\a.png", ""]) | st.text(max_size=8)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
PNG = formats.drawn(1)[0].picture


def outcome(place: Path) -> Any:
    """Pairs whose pictures are all within the place's folder, or our error; anything else fails the test."""
    try:
        found = sources.read(place)
    except UserError as error:
        found = error
    if isinstance(found, UserError):
        assert found.lines().count("\n") == 1
        assert len(found.message) < 3000
        return found
    for image in found.images:
        path = image.path if isinstance(image, Piece) else image
        assert Path(os.path.realpath(path)).is_relative_to(place.parent.resolve())
    return found


def fuzzed(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "in" / name
        (place.parent / "imgs").mkdir(parents=True)
        place.write_bytes(data)
        outcome(place)
        assert {p.name for p in Path(folder).iterdir()} == {"in"}
        assert {p.name for p in place.parent.iterdir()} <= {"imgs", name, ".cytoclip"}


@FUZZ
@given(VALUES)
def test_any_json(value: Any) -> None:
    data = json.dumps(value).encode()
    for name in ("img_text_pair.json", "pairs.json", "pairs.jsonl"):
        fuzzed(name, data)


@FUZZ
@given(st.lists(st.dictionaries(st.sampled_from(["image", "caption", "group"]), VALUES), max_size=4))
def test_any_rows(rows: list[Any]) -> None:
    fuzzed("pairs.jsonl", b"\n".join(json.dumps(row).encode() for row in rows))
    fuzzed("pairs.json", json.dumps({"images": rows, "annotations": rows}).encode())


@FUZZ
@given(st.text(alphabet=st.sampled_from('a,;\t|"\n\r \0.png/é'), max_size=80), st.binary(max_size=8))
def test_any_csv(text: str, tail: bytes) -> None:
    for name in ("pairs.csv", "pairs.tsv"):
        fuzzed(name, b"image,caption\n" + text.encode() + tail)
        fuzzed(name, text.encode() + tail)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A good file of each packed format, to be damaged."""
    folder = tmp_path_factory.mktemp("good")
    tar = formats.tar(folder, formats.drawn()).with_name("000.tar")
    parquet = formats.parquet("bytes")(folder, formats.drawn())
    arrow = next(formats.saved(folder, formats.drawn()).glob("*.arrow"))
    return {"a.tar": tar.read_bytes(), "a.parquet": parquet.read_bytes(), "a.arrow": arrow.read_bytes()}


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.arrow"])
@FUZZ
@given(data=st.data())
def test_any_damage(written: dict[str, bytes], name: str, data: Any) -> None:
    whole = bytearray(written[name])
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + 4] = data.draw(st.binary(max_size=8))
    cut = data.draw(st.none() | st.integers(0, len(whole)))
    fuzzed(name, bytes(whole[:cut]))


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.jsonl", "pairs.json", "a.tar", "a.parquet", "metadata.csv"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    began = time.monotonic()
    assert isinstance(outcome(tmp_path / name), UserError)
    outcome(tmp_path)
    assert time.monotonic() - began < 5


def test_a_pipe_and_a_device_beside_pictures(tmp_path: Path) -> None:
    formats.texts(tmp_path / "x", formats.drawn())
    (tmp_path / "x" / "000.txt").unlink()
    os.mkfifo(tmp_path / "x" / "000.txt")
    (tmp_path / "x" / "001.txt").unlink()
    (tmp_path / "x" / "001.txt").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"2 of 6 pictures .* its .txt is not a regular file"):
        sources.read(tmp_path / "x")


@pytest.mark.parametrize("name", ["csv", "json lines", "parquet of paths", "coco", "texts", "imagefolder"])
def test_links_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "private.png").write_bytes(PNG)
    place = formats.WRITERS[name](tmp_path / "data", formats.drawn())
    (picture,) = (tmp_path / "data").rglob("003.png")
    picture.unlink()
    picture.symlink_to(tmp_path / "private.png")
    with pytest.raises(UserError, match=r"1 link below .* leading out of it"):
        sources.read(place)


def test_a_text_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("a secret")
    formats.texts(tmp_path / "x", formats.drawn())
    (tmp_path / "x" / "000.txt").unlink()
    (tmp_path / "x" / "000.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match="leads out of the folder"):
        sources.read(tmp_path / "x")


def test_a_linked_cache_folder_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = formats.tar(tmp_path / "data", formats.drawn())
    (tmp_path / "outside").mkdir()
    (tmp_path / "data" / ".cytoclip").symlink_to(tmp_path / "outside")
    sources.read(place)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_within_the_cache_folder_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    place = formats.tar(tmp_path / "data", formats.drawn())
    (tmp_path / "outside").mkdir()
    (tmp_path / "data" / ".cytoclip").mkdir()
    for name in ("index", "pictures"):
        (tmp_path / "data" / ".cytoclip" / name).symlink_to(tmp_path / "outside")
    sources.read(place)
    decoded.opened(files.cache_folder(tmp_path / "data") / "pictures" / "0", (3, 2, 2), [decoded.key_of("a")])
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["", "contents", "marks", "pixels", "lock", "about.json"])
def test_a_table_of_pictures_from_elsewhere_leads_nowhere(tmp_path: Path, name: str) -> None:
    """A file that a link in it leads to is neither read nor made longer, and a pipe is not waited for."""
    table, outside = tmp_path / "data" / "table", tmp_path / "outside"
    keys = [decoded.key_of(str(i)) for i in range(3)]
    decoded.opened(tmp_path / "else", (3, 2, 2), keys)
    table.mkdir(parents=True)
    if name:
        outside.write_text("precious")
        (table / name).symlink_to(outside)
    else:
        table.rmdir()
        table.symlink_to(tmp_path / "else")
    for ask in (decoded.keys_there, lambda folder: decoded.opened(folder, (3, 2, 2), keys)):
        with pytest.raises(UserError, match="no part of a cache") as error:
            ask(table)
        assert str(table) in error.value.hint
    if name:
        assert outside.read_text() == "precious"
        (table / name).unlink()
        os.mkfifo(table / name)
        with pytest.raises(UserError, match="no part of a cache"):
            decoded.opened(table, (3, 2, 2), keys)


def test_looks_from_elsewhere_are_taken_only_whole(tmp_path: Path) -> None:
    """What a data set brings along as looked at already may hold anything."""
    picture = tmp_path / "a.png"
    picture.write_bytes(PNG)
    quiet = Console(quiet=True)
    good = looks.look_at([picture], tmp_path, quiet)
    kept = tmp_path / ".cytoclip" / "looks.parquet"
    table = parquet.read_table(kept)
    told = {
        "hashes": [["zz"] * 6, ["0" * 16], [], ["f" * 17] * 6, None],
        "thumb": [b"", b"abc", None], "width": [0, -5, None], "personal": [None, [None]], "content": [None],
        "mode": [None], "spread": [None], "transparent": [None],
    }  # fmt: skip
    for name, values in told.items():
        for value in values:
            column = pa.array([value], table.schema.field(name).type)
            parquet.write_table(
                table.set_column(table.schema.get_field_index(name), table.schema.field(name), column), kept
            )
            assert looks.look_at([picture], tmp_path, quiet) == good, (name, value)
    parquet.write_table(table.set_column(0, "path", pa.array([7])), kept)
    assert looks.look_at([picture], tmp_path, quiet) == good
    parquet.write_table(pa.concat_tables([table] * 100), kept)
    assert looks._read(kept, 99) == {}
    assert len(looks._read(kept, 100)) == 1
    kept.unlink()
    os.mkfifo(kept)
    assert looks.look_at([picture], tmp_path, quiet) == good


def test_an_index_from_elsewhere_cannot_lead_out(tmp_path: Path) -> None:
    """Offsets are checked against the file, and the file is never named by the index."""
    place = formats.tar(tmp_path, formats.drawn()).with_name("000.tar")
    good = sources.read(place)
    (index,) = (tmp_path / ".cytoclip" / "index").glob("*.index")
    header, *lines = index.read_text().splitlines()
    for bad in ([10**12, 5], [-5, 5], [0, 10**12], [0, 0], ["0", 5], [0.5, 1], [True, 1]):
        name, _, _, *rest = json.loads(lines[0])
        index.write_text("\n".join([header, json.dumps([name, *bad, *rest]), *lines[1:]]) + "\n")
        assert sources.read(place) == good
    for text in ("", "{", "[]", "null", header, "[" * 100_000, header.replace("true", "1") + "\n7\n"):
        index.write_text(text)
        assert sources.read(place) == good


def test_a_line_without_end_and_deep_json_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'image,caption\na.png,"' + b"x" * 5_000_000)
    (tmp_path / "b.csv").write_bytes(b'image,caption\na.png,"' + b"x\n" * 5_000_000)
    (tmp_path / "c.jsonl").write_bytes(b"[" * 900_000)
    (tmp_path / "d.json").write_bytes(b"[" * 5_000_000)
    (tmp_path / "e.jsonl").write_bytes(b" " * 5_000_000)
    tracemalloc.start()
    for name in ("a.csv", "b.csv", "c.jsonl", "e.jsonl", "d.json"):
        assert isinstance(outcome(tmp_path / name), UserError), name
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


def test_a_small_png_that_claims_to_be_huge_within_a_tar(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    claimed = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + claimed + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert len(bomb) < 100
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        put(archive, "1.png", bomb)
        put(archive, "1.txt", b"a bomb")
    (image,) = sources.read(tmp_path / "a.tar").images
    with pytest.raises(UserError, match="claims 60000x60000 pixels"):
        images.decode(image)
