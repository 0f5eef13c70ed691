"""What an index from elsewhere says leads nowhere else, and ends in two lines where it is no index."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cytoclip import index, ivf
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.search import Index
from tests.test_search import TEXT, files

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def exact(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "index"
    index.build(base, root, folder, QUIET)
    return folder


@pytest.fixture
def large(root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same pictures, as if they were more than are compared one by one."""
    monkeypatch.setattr(ivf, "EXACT", 10)
    index.build(base, root, tmp_path / "large", QUIET)
    return tmp_path / "large"


def rewritten(index: Path, to: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """A copy of an index whose rows say something else."""
    shutil.copytree(index, to)
    (path,) = (to / "shards").iterdir()
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return to


@pytest.mark.parametrize(
    "named",
    [
        {"file": "../outside.png"},
        {"file": "train/../../outside.png"},
        {"file": "{outside}"},
        {"file": "link.png"},
        {"file": "linked/outside.png"},
        {"file": "train"},
        {"file": "pipe"},
        {"file": ""},
        {"file": "a\0b"},
        {"file": "x" * 5000},
        {"root": 1},
        {"root": -1},
        {"root": None},
        {"piece_offset": -5, "piece_size": 10},
        {"piece_offset": 0, "piece_size": 1 << 60},
        {"piece_offset": 0, "piece_size": 0},
    ],
    ids=repr,
)
def test_no_name_leads_out_of_the_roots(named: dict[str, Any], exact: Path, root: Path, tmp_path: Path) -> None:
    place, outside = shutil.copytree(root, tmp_path / "data"), tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (place / "link.png").symlink_to(outside)
    (place / "linked").symlink_to(tmp_path)
    os.mkfifo(place / "pipe")
    content = hashlib.sha256(outside.read_bytes()).hexdigest()  # the worst case: it knows the bytes

    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row.update({key: value.format(outside=outside) if key == "file" else value for key, value in named.items()})
            row["content"] = content

    opened = Index.open(rewritten(exact, tmp_path / "index", change), roots=[place])
    hits = opened.search(TEXT, k=3)
    assert files(hits) == [None] * 3
    with pytest.raises(UserError, match="is not below"):
        opened.picture(hits[0].id)


def _vector(rows: list[dict[str, Any]]) -> None:
    rows[3]["image"] = [float("nan")] * 16


def _longer(rows: list[dict[str, Any]]) -> None:
    rows[3]["image"] = [7.0] * 16


def _fewer(rows: list[dict[str, Any]]) -> None:
    del rows[3]


@pytest.mark.parametrize(
    ("change", "said"), [(_vector, "not of length 1"), (_longer, "not of length 1"), (_fewer, "67 rows, not 68")]
)
def test_shards_that_are_damaged_are_refused(
    change: Callable[[list[dict[str, Any]]], None], said: str, exact: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        Index.open(rewritten(exact, tmp_path / "index", change))


def test_keys_that_are_no_json_are_none(exact: Path, tmp_path: Path) -> None:
    values = ["[" * 100_000, "{", "7", '{"a": 1, "b": ["c"], "d": "e", "label": "hidden"}', '{"x": null}']

    def change(rows: list[dict[str, Any]]) -> None:
        for row, value in zip(rows, values * 20, strict=False):
            row["extra"] = value

    opened = Index.open(rewritten(exact, tmp_path / "index", change))
    assert set(opened.keys) == {"source", "label", "group", "d"}
    assert "hidden" not in opened.keys["label"]


def test_a_link_in_place_of_a_file_is_refused(exact: Path, large: Path, tmp_path: Path) -> None:
    for number, (source, inner) in enumerate(
        [(exact, "shards/00000.parquet"), (exact, "manifest.json"), (large, "faiss/*/images.f32"),
         (large, "faiss/*/images.safetensors"), (large, "faiss/*/captions.safetensors")]
    ):  # fmt: skip
        copied = shutil.copytree(source, tmp_path / str(number))
        (path,) = copied.glob(inner)
        path.rename(tmp_path / f"{number} moved")
        path.symlink_to(tmp_path / f"{number} moved")
        with pytest.raises(UserError, match=r"regular file|no file of"):
            Index.open(copied)
