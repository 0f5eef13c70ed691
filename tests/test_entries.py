"""What is to be indexed: every picture once, with captions or without, of whatever stands at a place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytoclip import entries, sources
from cytoclip.console import Console
from cytoclip.entries import Entry
from cytoclip.errors import UserError
from cytoclip.rows import Columns
from tests import formats

QUIET = Console(quiet=True)


def listed(place: Path, console: Console = QUIET) -> dict[str, Entry]:
    found = entries.listed(place, Columns(), console)
    assert len({entry.place for entry in found}) == len(found)
    return {entry.name: entry for entry in found}


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_of_pairs_all_is_taken_that_the_reader_gives(name: str, tmp_path: Path) -> None:
    place = formats.WRITERS[name](tmp_path, formats.drawn(several=name not in formats.ONE_CAPTION))
    pairs, found = sources.read(place), listed(place)
    assert list(found) == list(pairs.names)
    for i, entry in enumerate(found.values()):
        assert (entry.place, entry.captions) == (pairs.images[i], (pairs.captions[i], *pairs.more[i]))
        assert (entry.source, entry.label, entry.group) == (pairs.sources[i], pairs.labels[i], pairs.groups[i])
        assert [each for each in entry.extra if each[0] != "folder"] == list(pairs.extra[i])


def test_a_plain_folder_is_gone_through_at_any_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = formats.drawn(1)[0].picture
    for name in ("a.png", "b/c.PNG", "b/d/e.jpg", ".hidden/f.png", "b/.g.png", "train/h.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture)
    (tmp_path / "a.txt").write_text(" a cell\n")
    (tmp_path / "b" / "c.txt").write_bytes(b"\xff\xff")
    (tmp_path / "b" / "d" / "e.txt").symlink_to(tmp_path / "gone")
    found = listed(tmp_path, Console())
    assert {name: entry.captions for name, entry in found.items()} == {
        "a.png": ("a cell",), "b/c.PNG": (), "b/d/e.jpg": (), "train/h.png": (),
    }  # fmt: skip
    assert {name: dict(entry.extra) for name, entry in found.items()} == {
        "a.png": {}, "b/c.PNG": {"folder": "b"}, "b/d/e.jpg": {"folder": "b/d"}, "train/h.png": {"folder": "train"},
    }  # fmt: skip
    assert "2 texts of " in capsys.readouterr().err


def test_a_link_out_of_a_plain_folder_is_refused(tmp_path: Path) -> None:
    formats.write_pictures(tmp_path / "outside", formats.drawn(1))
    formats.write_pictures(tmp_path / "data", formats.drawn(2))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside" / "000.png")
    with pytest.raises(UserError, match="leading out of it"):
        listed(tmp_path / "data")


def test_a_data_root_gives_every_split_with_its_name(tmp_path: Path) -> None:
    drawn = formats.drawn(6)
    formats.original(tmp_path / "train", drawn[:3])
    formats.table("csv")(tmp_path, drawn[3:])
    (tmp_path / "pairs.csv").rename(tmp_path / "val.csv")
    found = listed(tmp_path)
    assert [dict(entry.extra)["split"] for entry in found.values()] == ["train"] * 3 + ["val"] * 3
    formats.tar(tmp_path / "shards", drawn)
    for number in range(2):
        (tmp_path / "shards" / f"00{number}.tar").rename(tmp_path / "shards" / f"test-00{number}.tar")
    (tmp_path / "val.csv").rename(tmp_path / "shards" / "val.csv")
    (tmp_path / "pictures").rename(tmp_path / "shards" / "pictures")
    splits = [dict(entry.extra)["split"] for entry in listed(tmp_path / "shards").values()]
    assert splits == ["val"] * 3 + ["test"] * 6


def test_entries_that_are_none_are_said_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    formats.original(tmp_path, formats.drawn(3))
    listing = tmp_path / "img_text_pair.json"
    listing.write_text(listing.read_text()[:-1] + ', {"img": "../x.png", "caption": "out"}, 7]')
    assert len(listed(tmp_path, Console())) == 3
    assert "2 entries of " in capsys.readouterr().err


def test_the_root_is_the_folder_that_holds_the_pictures(tmp_path: Path) -> None:
    formats.tar(tmp_path / "data", formats.drawn(4))
    for source in (tmp_path / "data", tmp_path / "data" / "{000..001}.tar", tmp_path / "data" / "000.tar"):
        assert entries.opened(str(source), Columns(), QUIET).root == (tmp_path / "data").resolve()
