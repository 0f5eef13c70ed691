"""Shards come back as they were written, to anybody's Parquet reader too, and others are not taken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from cytoclip import vector_shards
from cytoclip.errors import UserError
from cytoclip.files import Piece
from cytoclip.vector_shards import Header, Row
from tests.test_vectors import WIDTH, drawn

HEADER = Header("a model", ("/data", "/more"))
ROWS = [
    Row(2**53 - 1, 0, "a/é.png", None, None, "é.png", "c" * 64, 2**62, ("one", "2", "3"), "s", "l", "g", '{"k": "v"}'),
    Row(7, 1, "x.tar", 512, 99, "x.tar/b.png", "d" * 64, 0, (), None, None, None, None),
    Row(8, None, "s3://b/x, row 1", None, None, "s3://b/x, row 1", "e" * 64, 5, ("one",), None, None, None, None),
]  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, NDArray[np.float32], list[NDArray[np.float32]]]:
    image_ND, texts = drawn(3), [drawn(len(row.captions), seed=10 + i) for i, row in enumerate(ROWS)]
    path = tmp_path / "shards" / "00000.parquet"
    vector_shards.write(path, HEADER, ROWS, image_ND, texts)
    return path, image_ND, texts


def test_they_come_back(written: tuple[Path, NDArray[np.float32], list[NDArray[np.float32]]]) -> None:
    path, image_ND, texts = written
    assert vector_shards.describe(path) == (HEADER, 3, WIDTH)
    assert np.array_equal(vector_shards.images(path, 3, WIDTH), image_ND)
    for (said, text_CD), row, expected in zip(vector_shards.captions(path, 3, WIDTH), ROWS, texts, strict=True):
        assert tuple(said) == row.captions
        assert np.array_equal(text_CD, expected)
    assert np.array_equal(vector_shards.texts(path, 3, WIDTH, np.array([2, 0])), [texts[2][0], texts[0][0]])
    for found, row in zip(vector_shards.read(path, 3, WIDTH).to_pylist(), ROWS, strict=True):
        assert (found.pop("caption"), *(found.pop("more") or ())) == (row.captions or (None,))
        assert found == {name: value for name, value in row._asdict().items() if name != "captions"}


def test_anybody_reads_them(written: tuple[Path, NDArray[np.float32], list[NDArray[np.float32]]]) -> None:
    path, image_ND, texts = written
    table = pq.read_table(path)
    assert str(table.schema.field("image").type) == f"fixed_size_list<element: float>[{WIDTH}]"
    assert np.array_equal(np.array(table["image"].to_pylist(), np.float32), image_ND)
    assert table["text"].to_pylist()[1] is None
    assert np.array_equal(np.array(table["more_text"].to_pylist()[0], np.float32), texts[0][1:])


def _renamed(table: Any) -> Any:
    return table.rename_columns(["id2" if name == "id" else name for name in table.schema.names])


def _retyped(table: Any) -> Any:
    return table.set_column(0, "id", table["id"].cast(pa.int32(), safe=False))


def _short_text(table: Any) -> Any:
    at = table.schema.get_field_index("more")
    more = pa.array([["two"], None, ["further"]], pa.list_(pa.string()))
    return table.set_column(at, table.schema.field(at), more)


SPOILT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a column renamed": (_renamed, "other columns"),
    "a column of another type": (_retyped, "other columns"),
    "a column less": (lambda table: table.drop_columns(["file"]), "other columns"),
    "a row less": (lambda table: table.slice(1), "2 rows, not 3"),
    "captions without embeddings": (_short_text, "captions and"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_others_are_refused(how: str, written: tuple[Path, NDArray[np.float32], list[NDArray[np.float32]]]) -> None:
    path, change = written[0], SPOILT[how]
    pq.write_table(change[0](pq.read_table(path)), path)
    with pytest.raises(UserError, match=change[1]):
        vector_shards.captions(path, 3, WIDTH)
    if "other" in change[1]:
        assert vector_shards.describe(path) is None


def _all_of(path: Path) -> None:
    vector_shards.images(path, 3, WIDTH)
    vector_shards.captions(path, 3, WIDTH)
    vector_shards.read(path, 3, WIDTH)


def test_what_is_no_parquet_is_refused(
    written: tuple[Path, NDArray[np.float32], list[NDArray[np.float32]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written[0]
    whole = path.read_bytes()
    for spoilt in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2] + bytes(40) + whole[len(whole) // 2 + 40 :]):
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="cannot be used"):
            _all_of(path)
    path.write_bytes(whole)
    monkeypatch.setattr(vector_shards, "_MAX_ROW", -(1 << 30))
    with pytest.raises(UserError, match="larger than it can be"):
        vector_shards.read(path, 3, WIDTH)


def test_an_id_is_that_of_the_place_and_exact_as_a_double() -> None:
    ids = {vector_shards.identity(root, file, offset) for root in (None, 0, 1) for file in "ab" for offset in (None, 0)}
    assert len(ids) == 12
    assert all(0 <= one < 2**53 and int(float(one)) == one for one in ids)
    assert vector_shards.identity(0, "a.png", None) == vector_shards.identity(0, "a.png", None)


def test_a_file_is_named_below_the_first_root_that_holds_it() -> None:
    roots = ["/data", "/data/more"]
    assert vector_shards.relative(Path("/data/more/a.png"), roots) == (0, "more/a.png")
    assert vector_shards.relative(Piece(Path("/data/more/x.tar"), 5, 6), roots[1:]) == (0, "x.tar")
    assert vector_shards.relative(Path("/database/a.png"), roots) is None
