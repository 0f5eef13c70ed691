"""One reader for all: the same pairs come out of every format, with the bytes that were put in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoclip import images, sources
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.files import Piece
from cytoclip.pairs import Pairs
from cytoclip.rows import Columns
from tests import formats
from tests.formats import Drawn


def bytes_of(image: Path | Piece) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    return image.path.read_bytes()[image.offset : image.offset + image.size]


def assert_same(found: Pairs, pairs: list[Drawn], several: bool, tags: bool = True) -> None:
    assert [bytes_of(image) for image in found.images] == [one.picture for one in pairs]
    assert found.captions == tuple(one.captions[0] for one in pairs)
    assert found.more == tuple(one.captions[1:] if several else () for one in pairs)
    assert found.sources == tuple(one.source if tags else None for one in pairs)
    assert found.labels == tuple(one.label if tags else None for one in pairs)
    assert found.groups == (None,) * len(pairs)
    if tags:
        assert found.further()["site"] == tuple(one.site for one in pairs)
        assert found.further()["power"] == ("10",) * len(pairs)
    assert not {"image", "img", "caption", "source", "label"} & set(found.further())
    assert len(set(found.names)) == len(pairs)


def test_how_many_formats_there_are() -> None:
    assert len(formats.WRITERS) == 21
    assert len(formats.ONE_CAPTION) == 6


@pytest.mark.parametrize("several", [False, True], ids=["one caption", "several"])
@pytest.mark.parametrize("name", formats.WRITERS)
def test_every_format_holds_the_same_pairs(tmp_path: Path, name: str, several: bool) -> None:
    if several and name in formats.ONE_CAPTION:
        several = False  # the format holds the first one only
    pairs = formats.drawn(several=several)
    place = formats.WRITERS[name](tmp_path / "data", pairs)
    for _ in range(2):  # the second time from the index, where there is one
        found = sources.read(place)
        assert_same(found, pairs, several, name not in formats.NO_TAGS)
    decoded = np.asarray(images.decode(found.images[3]))
    assert decoded[0, 0].tolist() == [21, 0, 90]


@pytest.mark.parametrize("name", ["tar", "parquet of bytes, plain", "parquet of bytes, compressed", "save_to_disk"])
def test_a_packed_file_is_looked_through_once(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cytoclip import columnar, shards

    place = formats.WRITERS[name](tmp_path / "data", formats.drawn())
    first = sources.read(place)
    for module, function in ((shards, "_pairs"), (columnar, "_parquet"), (columnar, "_arrow")):
        monkeypatch.setattr(module, function, None)
    assert sources.read(place) == first
    with pytest.raises(TypeError):
        sources.read(place, Columns(caption="caption"))  # another question is another index


def test_a_file_that_changed_is_looked_through_again(tmp_path: Path) -> None:
    pairs = formats.drawn()
    place = formats.tar(tmp_path, pairs)
    sources.read(place)
    formats.tar(tmp_path, pairs[::-1])
    assert_same(sources.read(place), pairs[::-1], False)


@pytest.mark.parametrize("name", ["tar", "parquet of bytes, plain", "save_to_disk"])
def test_pictures_are_read_where_they_lie(tmp_path: Path, name: str) -> None:
    found = sources.read(formats.WRITERS[name](tmp_path, formats.drawn()))
    assert {image.path.suffix for image in found.images if isinstance(image, Piece)} <= {".tar", ".parquet", ".arrow"}


def test_a_value_that_repeats_in_a_dictionary_is_found_where_it_was(tmp_path: Path) -> None:
    pairs = formats.drawn(3) * 3
    place = formats.parquet("bytes", compression="none")(tmp_path, pairs)
    found = sources.read(place)
    assert [bytes_of(image) for image in found.images] == [one.picture for one in pairs]
    assert {image.path for image in found.images if isinstance(image, Piece)} == {place}


def test_compressed_pages_are_copied_once_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = formats.parquet("bytes", compression="zstd")(tmp_path, formats.drawn())
    found = sources.read(place, Columns(), Console())
    assert "holds compressed pages: its pictures, about" in capsys.readouterr().err
    (copied,) = {image.path for image in found.images if isinstance(image, Piece)}
    assert copied.parent == tmp_path / ".cytoclip" / "index"
    copied.write_bytes(b"another size")  # damaged: copied anew
    assert [bytes_of(image) for image in sources.read(place).images] == [one.picture for one in formats.drawn()]


def test_no_space_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cytoclip import columnar

    monkeypatch.setattr(columnar, "free_bytes", lambda _: 10)
    with pytest.raises(UserError, match="are to be copied, and 10 B are free"):
        sources.read(formats.parquet("bytes")(tmp_path, formats.drawn()))


def test_a_pattern_of_tables_and_a_folder_of_shards(tmp_path: Path) -> None:
    pairs = formats.drawn()
    formats.parquet("bytes")(tmp_path / "a", pairs[:3]).rename(tmp_path / "a" / "0.parquet")
    formats.parquet("bytes")(tmp_path / "a", pairs[3:]).rename(tmp_path / "a" / "1.parquet")
    assert_same(sources.read(tmp_path / "a" / "*.parquet"), pairs, False)
    formats.tar(tmp_path / "b", pairs)
    assert_same(sources.read(tmp_path / "b"), pairs, False)
    assert_same(sources.read(tmp_path / "b" / "*.tar"), pairs, False)


def test_files_of_several_kinds_are_refused(tmp_path: Path) -> None:
    formats.tar(tmp_path, formats.drawn())
    formats.json_lines(tmp_path, formats.drawn())
    with pytest.raises(UserError, match="files of several kinds: jsonl, tar"):
        sources.read(tmp_path / "*.*")


@pytest.mark.parametrize(
    ("place", "said", "hint"),
    [
        ("pairs.csb", "no such file: .*pairs.csb", "did you mean .*pairs.csv"),
        ("pairs.doc", "of no known format", "a split is a folder"),
        ("pairs.tar.gz", "of no known format", "gzip -d"),
        ("pairs.tgz", "of no known format", "gzip -d"),
        ("pairs.xlsx", "of no known format", 'in Excel: Save As, "CSV UTF-8'),
        ("packed.tar", "is compressed", "gzip -d .*packed.tar"),
        ("{0..3}.tar", "3 of the 4 files .* are not there", r"\*"),
        ("*.parquet", "no files match", "holds 0.tar, empty.csv"),
        ("pair.csv", "cannot be read: No such file", "did you mean .*pairs.csv"),
        ("empty.csv", "is empty", "a header"),
        ("{0..3.tar", "is no pattern", "such as"),
    ],
)  # fmt: skip
def test_a_place_that_is_nothing_is_refused(tmp_path: Path, place: str, said: str, hint: str) -> None:
    (tmp_path / "empty.csv").touch()
    for name in ("pairs.csv", "pairs.doc", "pairs.tar.gz", "pairs.tgz", "pairs.xlsx", "0.tar"):
        (tmp_path / name).write_text("x")
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=said) as caught:
        sources.read(tmp_path / place)
    assert re.search(hint, caught.value.hint)


def test_the_hub_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is stood in for by a folder of Parquet, which `datasets` reads the same way."""
    import datasets

    pairs = formats.drawn()
    place = formats.parquet("struct")(tmp_path / "data", pairs)
    asked: list[Any] = []
    load = datasets.load_dataset

    def instead(name: str, split: str) -> Any:
        asked.append((name, split))
        return load("parquet", data_files=str(place), split="train", cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", instead)
    assert_same(sources.read(Path("hub:owner/name/val")), pairs, False)
    assert_same(sources.read(Path("hub:owner/name")), pairs, False)
    assert asked == [("owner/name", "validation"), ("owner/name", "train")]


@pytest.mark.parametrize("name", ["hub:name", "hub:a/b/c/d", "hub:/x"])
def test_no_name_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="names no data set"):
        sources.read(Path(name))


def test_the_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the datasets library") as caught:
        sources.read(Path("hub:owner/name"))
    assert caught.value.hint == 'pip install "cytoclip[hub]"'


def test_a_hub_that_cannot_be_reached_is_two_lines() -> None:
    with pytest.raises(UserError, match="hub:owner/no-such-name-of-ours cannot be read"):
        sources.read(Path("hub:owner/no-such-name-of-ours"))


def test_long_captions_and_line_ends_of_tables(tmp_path: Path) -> None:
    """A caption may have 1 MiB, as docs/guide/data.md says; Python's own limit is an eighth of it."""
    formats.write_pictures(tmp_path, formats.drawn(1))
    place = tmp_path / "pairs.csv"
    place.write_text('image,caption\n000.png,"' + "a\nlong tale " * 40_000 + '"\n')
    assert len(sources.read(place).captions[0]) == 480_000
    place.write_text("image,caption\r000.png,a cell\r", newline="")
    with pytest.raises(UserError, match="new-line") as caught:
        sources.read(place)
    assert caught.value.hint == "save it with line feeds"


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ('image,caption\n0.png,one\n1.png,"two, open\n2.png,"three, or four",five, six\n', "lines 3 to 4 of",
            "left open in line 3"),
        ('image,caption\n0.png,one\n1.png,"two\n2.png,three\n', "lines 3 to 4 of .* are one row", "close it in line 3"),
        ("image,caption\n0.png,one\n1.png,two, or three\n", "line 3 of .*: a row of 3 values for 2", '"quotes"$'),
    ],
)  # fmt: skip
def test_where_a_row_of_a_table_is_wrong(tmp_path: Path, text: str, said: str, hint: str) -> None:
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        sources.read(tmp_path / "pairs.csv")
    assert re.search(hint, caught.value.hint)


def test_quotes_that_close_and_inches_are_no_fault(tmp_path: Path) -> None:
    place = tmp_path / "pairs.csv"
    place.write_text('image,caption\n0.png,5" wide\n' + "1.png,a cell\n" * 97 + '2.png,"of\ntwo lines"\n')
    assert sources.read(place).captions[-1] == "of\ntwo lines"
    place.write_text('image,caption\n0.png,"of\ntwo lines"\n1.png,5" wide\n')
    assert sources.read(place).captions == ("of\ntwo lines", '5" wide')


@pytest.mark.parametrize(
    ("encoding", "said"), [("latin-1", "line 3 of .* is not UTF-8"), ("utf-16", "is UTF-16, not UTF-8")]
)
def test_other_encodings_are_told_how_to_save(tmp_path: Path, encoding: str, said: str) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption\n0.png,a cell\n1.png,na\xefve\n", encoding=encoding)
    with pytest.raises(UserError, match=said) as caught:
        sources.read(tmp_path / "pairs.csv")
    assert caught.value.hint == 'save it as UTF-8; in Excel: Save As, "CSV UTF-8 (comma delimited)"'


@pytest.mark.parametrize("held", ["dictionary", "view", "plain"])
def test_kinds_of_columns_that_arrow_has(tmp_path: Path, held: str) -> None:
    pairs = formats.drawn()
    columns = {"image": pa.array([p.picture for p in pairs]), "caption": pa.array([p.captions[0] for p in pairs])}
    if held == "dictionary":
        columns = {name: column.dictionary_encode() for name, column in columns.items()}
    if held == "view":
        columns = {
            "image": columns["image"].cast(pa.binary_view()),
            "caption": columns["caption"].cast(pa.string_view()),
        }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    found = sources.read(tmp_path / "a.parquet")
    assert found.captions == tuple(p.captions[0] for p in pairs)
    for piece, one in zip(found.images, pairs, strict=True):
        assert isinstance(piece, Piece)
        assert piece.path.read_bytes()[piece.offset : piece.offset + piece.size] == one.picture


def test_another_column_of_pictures_does_not_take_the_place_of_one_in_use(tmp_path: Path) -> None:
    """Compressed pages are copied: a run that reads one column goes on while another run begins with the other."""
    pairs = formats.drawn()
    table = {
        "first": [p.picture for p in pairs],
        "second": [p.picture for p in reversed(pairs)],
        "caption": ["a cell"] * 6,
    }
    place = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(table), place, compression="zstd")
    running = sources.read(place, Columns("first", "caption"))
    other = sources.read(place, Columns("second", "caption"))
    assert [bytes_of(image) for image in running.images] == table["first"]
    assert [bytes_of(image) for image in other.images] == table["second"]
    assert sources.read(place, Columns("first", "caption")) == running
