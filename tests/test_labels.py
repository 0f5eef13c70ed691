"""Labels from a table of any format, and each different picture once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cytoclip import labels
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.pairs import Pairs

QUIET = Console(quiet=True)


def pairs(names: Sequence[str], of: Sequence[str | None] = (), contents: Sequence[str] = ()) -> Pairs:
    none = (None,) * len(names)
    return Pairs(
        tuple(Path("/data") / name for name in names),
        tuple(names),
        tuple(f"caption of {name}" for name in names),
        none,
        none,
        tuple(of) or none,
        tuple(contents),
    )


def table(folder: Path, text: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "image,label\na.png,x\nb.png,\nc.png,3\n"),
        ("labels.csv", "label;img\nx;a.png\n;b.png\n3;c.png\n"),
        ("labels.tsv", "picture\tgrade\na.png\tx\nb.png\t\nc.png\t3\n"),
        ("labels.csv", "a.png,x\nb.png,\nc.png,3\n"),
        ("labels.jsonl", '{"img_name": "a.png", "size": "big", "label": "x"}\n{"img_name": "c.png", "label": 3}\n'),
        ("labels.json", json.dumps([{"file": "a.png", "class": "x"}, {"file": "c.png", "class": 3.0}])),
    ],
)
def test_every_format_gives_the_same_labels(tmp_path: Path, name: str, text: str) -> None:
    assert labels.read([table(tmp_path, text, name)], QUIET) == {"a.png": "x", "c.png": "3"}


def test_several_tables_are_one(tmp_path: Path) -> None:
    files = [
        table(tmp_path, "img,label\na.png,x\n", "1.csv"),
        table(tmp_path, "img,label\nb.png,y\na.png,x\n", "2.csv"),
    ]
    assert labels.read(files, QUIET) == {"a.png": "x", "b.png": "y"}
    assert labels.read([], QUIET) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("img,label\na.png,x\na.png,y\n", "gives 'a.png' the label 'y', after 'x'"),
        ("img,size,colour\na.png,x,y\n", "no column of"),
        ("img,label\na.png,\n", "gives no picture a label"),
        ("img,label\n,x\n", "1 row of"),
        ("", "is empty"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        labels.read([table(tmp_path, text)], QUIET)
    assert said in refused.value.message


def test_rows_that_are_no_objects_are_refused(tmp_path: Path) -> None:
    for text in ("[1, 2]", '[{"img": "a.png", "label": "x"}, 3]', '[{"img": "a.png", "label": {"a": 1}}]', '{"a": 1}'):
        with pytest.raises(UserError):
            labels.read([table(tmp_path, text, "labels.json")], QUIET)


def test_a_table_stands_instead_of_the_pairs_own(capsys: pytest.CaptureFixture[str]) -> None:
    splits = {"val": pairs(["a.png", "b.png"], ["old", "old"]), "train": pairs(["c.png"])}
    found = labels.given(splits, {"a.png": "x", "c.png": "y", "far.png": "x"}, Console())
    assert found["val"].labels == ("x", None)
    assert found["train"].labels == ("y",)
    assert "1 row of the labels name no picture of val and train: 'far.png'" in capsys.readouterr().err
    with pytest.raises(UserError) as refused:
        labels.given(splits, {"imgs/a.png": "x"}, QUIET)
    assert refused.value.message == "none of the pictures that the labels name is in val and train: 'imgs/a.png'"
    assert refused.value.hint == "write names as the data do, such as 'a.png'"


def test_each_different_picture_counts_once(capsys: pytest.CaptureFixture[str]) -> None:
    given = pairs(
        ["a.png", "copy of a.png", "b.png", "copy of b.png", "c.png", "d.png", "copy of d.png"],
        ["x", None, "x", "y", None, None, "z"],
        ["A", "A", "B", "B", "C", "D", "D"],
    )
    found = labels.pictures("val", given, Console())
    assert found.names == ("a.png", "d.png")
    assert found.labels == ("x", "z")
    said = capsys.readouterr().err
    assert "1 picture of 4 in val has no label and is left out: c.png" in said
    assert "1 picture of 4 in val has two labels and is left out: b.png" in said
