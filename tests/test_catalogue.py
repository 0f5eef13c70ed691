"""What is said of pictures and captions, by row: as one finds it by looking at every row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytoclip import catalogue, manifest, vector_shards
from cytoclip.errors import UserError
from cytoclip.manifest import Shard
from cytoclip.pairs import same_caption_key
from cytoclip.vector_shards import Header, Row
from tests.test_vectors import WIDTH, drawn

TEXTS = ["one", " one ", "two", "ﬁne", "fine", "three"]


def write(folder: Path, said: list[list[list[str]]]) -> list[Shard]:
    """Shards of pictures with these captions; a caption's embedding is a function of its text."""
    shards, number = [], 0
    for at, captions in enumerate(said):
        rows = []
        for own in captions:
            extra = {"even": str(number % 2 == 0), **({"rare": "yes"} if number == 1 else {})}
            rows.append(
                Row(1000 - number, 0, f"{number}.png", None, None, f"{number}.png", "", 1, tuple(own),
                    f"slide {number // 2}", None, None, json.dumps(extra))
            )  # fmt: skip
            number += 1
        texts = [np.concatenate([drawn(0), *(vector(text) for text in own)]) for own in captions]
        shards.append(Shard(f"{at:05}.parquet", len(rows)))
        path = manifest.shard_path(folder, shards[-1].name)
        vector_shards.write(path, Header("m", ("/",)), rows, drawn(len(rows), seed=at), texts)
    return shards


def vector(text: str) -> np.ndarray:
    return drawn(1, seed=sum(map(ord, text)))


@settings(max_examples=30, deadline=None)
@given(
    said=st.lists(
        st.lists(st.lists(st.sampled_from(TEXTS), max_size=3), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_each_different_caption_is_one_with_all_its_pictures(
    tmp_path_factory: pytest.TempPathFactory, said: list[list[list[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards = write(folder, said)
    having = catalogue.havings(catalogue.tables(folder, shards, WIDTH))
    flat = [own for captions in said for own in captions]
    keys = list(dict.fromkeys(same_caption_key(text) for own in flat for text in own))
    assert len(having) == len(keys)
    assert len(set(having.ties.tolist())) == len(keys)
    for number, key in enumerate(keys):
        wanted = [row for row, own in enumerate(flat) for text in own if same_caption_key(text) == key]
        assert having.rows_of(number).tolist() == wanted
        first = flat[having.first_row[number]][having.first_which[number]]
        assert same_caption_key(first) == key
        assert having.first_row[number] == wanted[0]
    vectors = [*catalogue.caption_vectors(folder, shards, WIDTH, having)]
    expected = [vector(flat[row][which]) for row, which in zip(having.first_row, having.first_which, strict=True)]
    assert np.array_equal(np.concatenate([drawn(0), *vectors]), np.concatenate([drawn(0), *expected]))


def test_rows_are_found_by_id_and_by_what_is_said_of_them(tmp_path: Path) -> None:
    shards = write(tmp_path, [[["one"], []], [["two", "three"], ["one"], []]])
    rows = catalogue.Rows(_joined(tmp_path, shards))
    assert [rows.row(1000 - number) for number in range(5)] == [0, 1, 2, 3, 4]
    for missing in (995, 1001, -(2**60)):
        with pytest.raises(UserError, match="no picture"):
            rows.row(missing)
    assert [rows.captions(row) for row in range(5)] == [["one"], [], ["two", "three"], ["one"], []]
    assert rows.keys(1) == {"source": "slide 0", "even": "False", "rare": "yes"}
    assert rows.keys(4) == {"source": "slide 2", "even": "True"}
    assert rows.values["source"] == {"slide 0": 2, "slide 1": 2, "slide 2": 1}
    assert rows.values["rare"] == {"yes": 1}
    assert set(rows.values) == {"source", "even", "rare"}
    assert rows.having("even", "True").tolist() == [True, False, True, False, True]


def _joined(folder: Path, shards: list[Shard]) -> object:
    import pyarrow as pa

    return pa.concat_tables(list(catalogue.tables(folder, shards, WIDTH))).combine_chunks()
