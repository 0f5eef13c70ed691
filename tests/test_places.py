"""Patterns of names, and what stands for a split."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cytoclip import places
from cytoclip.errors import ExitCode, UserError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_braces_and_stars_name_files_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b-002.tar", "b-010.tar", "a-001.tar", "c/x.tar")
    assert places.expand(tmp_path / "{b,a}-*.tar") == [tmp_path / f"{n}.tar" for n in ("a-001", "b-002", "b-010")]
    assert places.expand(tmp_path / "b-{002..002}.tar") == [tmp_path / "b-002.tar"]
    assert places.expand(tmp_path / "**" / "x.tar") == [tmp_path / "c" / "x.tar"]


@pytest.mark.parametrize("pattern", ["{0..999999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar"])
def test_a_pattern_without_end_is_refused_at_once(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="names more than 100000 files") as caught:
        places.expand(tmp_path / pattern)
    assert caught.value.code is ExitCode.DATA


@pytest.mark.parametrize(
    "pattern", ["a", "{1..3}", "{3..1}", "{08..11}", "{a,b}{1..2}", "x{a,{b,c}y}z", "{a}", "{}", "{-2..1}", "{a,}b"]
)
def test_braces_are_those_of_a_shell(pattern: str) -> None:
    said = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout
    assert list(places.braces(pattern)) == said.strip("\n").split(" ")


def test_a_name_with_signs_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].csv")
    assert not places.is_pattern(tmp_path / "a[1].csv")
    assert places.is_pattern(tmp_path / "a[2].csv")


@pytest.mark.parametrize(
    ("there", "found"),
    [
        (["val/imgs/a.png"], "val"),
        (["val/imgs/a.png", "val.csv"], "val"),  # the original layout comes first
        (["val/a.png", "val.csv"], "val.csv"),  # the table lists what lies in the folder
        (["val/a.png"], "val"),
        (["validation-0.parquet"], "validation-*.parquet"),
        (["val_0.tar", "val_1.tar"], "val_*.tar"),
        (["valid.jsonl"], "valid.jsonl"),
        (["value.csv", "train.csv"], None),
    ],
)
def test_what_stands_for_a_split(tmp_path: Path, there: list[str], found: str | None) -> None:
    touch(tmp_path, *there)
    assert places.split(tmp_path, "val") == (tmp_path / found if found else None)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "train-0.tar")
    with pytest.raises(UserError, match=r"more than one file stands for train in .*: train.csv, train-\*.tar"):
        places.split(tmp_path, "train")


def test_the_splits_of_a_root(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "test/imgs/a.png")
    assert places.splits(tmp_path) == ["train", "test"]
    assert places.splits(tmp_path / "no") == []
    assert places.split(Path("hub:a/b"), "val") == Path("hub:a/b/val")


def test_signs_in_the_names_of_folders_are_no_pattern(tmp_path: Path) -> None:
    """A data root may be called anything: what is there is meant as it is called."""
    root = tmp_path / "data [1] {a,b} *"
    root.mkdir()
    for name in ("train-000.tar", "train-001.tar", "val.csv"):
        (root / name).touch()
    found = places.split(root, "train")
    assert found is not None
    assert places.is_pattern(found)
    assert places.expand(found) == [root / "train-000.tar", root / "train-001.tar"]
    assert places.expand(root / "train-{000..001}.tar") == places.expand(found)
    with pytest.raises(UserError, match="no files match") as error:
        places.expand(root / "*.parquet")
    assert "train-000.tar" in error.value.hint


def test_links_that_lead_in_circles_are_not_followed(tmp_path: Path) -> None:
    """Two such links in one folder are 2**40 paths."""
    (tmp_path / "a" / ".hidden").mkdir(parents=True)
    for name in ("one", "two", "a/three"):
        (tmp_path / name).symlink_to(tmp_path)
    for name in ("0.csv", "a/1.csv", "a/.hidden/2.csv", ".3.csv"):
        (tmp_path / name).touch()
    assert places.expand(tmp_path / "**" / "*.csv") == [tmp_path / "0.csv", tmp_path / "a" / "1.csv"]
    assert places.expand(tmp_path / "*" / ".hidden" / "*.csv") == [tmp_path / "a" / ".hidden" / "2.csv"]
    with pytest.raises(UserError, match="no files match"):
        places.expand(tmp_path / "**" / "*.tsv")
