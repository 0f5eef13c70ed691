"""What is kept of a row beside picture, caption and tags."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cytoclip import rows, sources
from cytoclip.errors import ExitCode, UserError
from cytoclip.rows import Columns, Gathered, extras


def test_extras_are_short_texts_whole_numbers_and_yes_or_no() -> None:
    row = {
        "img": "a.png", "caption": "a cell", "group": "g", "source": "s", "label": "l", "site": "cervix", "power": 40,
        "stained": True, "width": 3.5, "box": [1, 2], "none": None, "empty": "", "report": "x" * 65, "k" * 65: "y",
        "half": "\ud800", "same": "a.png",
    }  # fmt: skip
    assert extras(row, ("a.png", "a cell")) == (("power", "40"), ("site", "cervix"), ("stained", "True"))
    many = {f"{i:03}": "x" for i in range(200)}
    assert len(extras(many)) == rows.MAX_EXTRA


@pytest.mark.parametrize("count", [256, 257])
def test_a_key_with_too_many_values_is_not_kept_at_all_but_for_patients(tmp_path: Path, count: int) -> None:
    """Whom a split may cut is said by `apart.warn_of_cut_sources`, which sees no more than what is kept."""
    gathered = Gathered(tmp_path, tmp_path)
    for i in range(count):
        gathered.add(i, f"{i}.png", "a cell", {"number": i, "site": f"site {i % 2}", "Patient ID": f"P{i}"})
    found = gathered.pairs().further()
    assert found["Patient ID"] == tuple(f"P{i}" for i in range(count))
    assert found["site"][:3] == ("site 0", "site 1", "site 0")
    assert ("number" in found) == (count == 256)


# Pictures that lie elsewhere


def comma_separated(place: Path, names: list[str]) -> Path:
    with place.with_suffix(".csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["image", "caption"], *([name, f"cell {name}"] for name in names)])
    return place.with_suffix(".csv")


def parquet(place: Path, names: list[str]) -> Path:
    table = pa.table({"image": names, "caption": [f"cell {name}" for name in names]})
    pq.write_table(table, place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


def coco(place: Path, names: list[str]) -> Path:
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    said = [{"image_id": i, "caption": f"cell {name}"} for i, name in enumerate(names)]
    place.with_suffix(".json").write_text(json.dumps({"images": images, "annotations": said}))
    return place.with_suffix(".json")


TABLES = (comma_separated, parquet, coco)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Pictures in a folder, in one below it, and one outside; a link to the folder, and two in it that lead out."""
    folder = tmp_path / "scans"
    (folder / "a").mkdir(parents=True)
    for name in ("scans/1.png", "scans/a/2.png", "secret.png"):
        (tmp_path / name).touch()
    (tmp_path / "linked").symlink_to(folder)
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "tables").mkdir()
    return folder


@pytest.mark.parametrize("write", TABLES)
def test_names_below_a_root_may_be_relative_or_absolute(
    elsewhere: Path, write: Callable[[Path, list[str]], Path]
) -> None:
    linked = elsewhere.parent / "linked"
    names = ["1.png", f"{elsewhere}/a/2.png", f"{linked}/1.png", f"{linked}/a/2.png"]
    place = write(elsewhere.parent / "tables" / "pairs", names)
    for root in (elsewhere, linked, Path(os.path.relpath(linked))):
        found = sources.read(place, Columns(root=root))
        assert found.names == ("1.png", "a/2.png", "1.png", "a/2.png")
        assert found.images == tuple(elsewhere.resolve() / name for name in found.names)
        assert found.captions == tuple(f"cell {name}" for name in names)
        assert not {"image", "file_name"} & set(found.further())


@pytest.mark.parametrize("write", TABLES)
@pytest.mark.parametrize(
    "name", ["{}/../secret.png", "../secret.png", "{}/out.png", "out.png", "{}/up/secret.png", "up/secret.png",
        "{}-2/1.png", "/etc/hostname", "{}/a\0.png"]
)  # fmt: skip
def test_names_do_not_leave_a_root(elsewhere: Path, write: Callable[[Path, list[str]], Path], name: str) -> None:
    (elsewhere.parent / "scans-2").mkdir()
    (elsewhere.parent / "scans-2" / "1.png").touch()
    place = write(elsewhere.parent / "tables" / "pairs", ["1.png", name.format(elsewhere)])
    with pytest.raises(UserError, match=r"leaves scans/|leading out of it") as caught:
        sources.read(place, Columns(root=elsewhere))
    assert caught.value.code is ExitCode.DATA


@pytest.mark.parametrize("write", TABLES)
def test_absolute_names_without_a_root_name_the_option_and_the_folder(
    elsewhere: Path, write: Callable[[Path, list[str]], Path]
) -> None:
    place = write(elsewhere.parent / "tables" / "pairs", [f"{elsewhere}/a/2.png", f"{elsewhere}/1.png"])
    with pytest.raises(UserError, match=r"2 of 2 .* are not pairs: .* is absolute") as caught:
        sources.read(place)
    assert f"data.image_root={elsewhere}, or --image-root with cytoclip bring and check" in caught.value.hint
    sources.read(place, Columns(root=elsewhere))
    place = write(elsewhere.parent / "tables" / "pairs", ["/a/1.png", "/b/2.png"])
    with pytest.raises(UserError, match=r"'/a/1\.png' is absolute") as caught:
        sources.read(place)
    assert "these are below none but /" in caught.value.hint


def test_a_root_that_is_not_there(elsewhere: Path) -> None:
    place = comma_separated(elsewhere.parent / "tables" / "pairs", ["1.png"])
    with pytest.raises(UserError, match=r"no such folder: .*/scan, the root of the pictures of .*csv") as caught:
        sources.read(place, Columns(root=elsewhere.parent / "scan"))
    assert caught.value.hint == f"did you mean {elsewhere}?"
