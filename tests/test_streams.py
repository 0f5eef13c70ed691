"""Shards from afar: every pair once an epoch, whoever reads, and on from anywhere as if nothing had happened."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from cytoclip import streams
from cytoclip.augment import Variation
from cytoclip.captions import Tokens
from cytoclip.data_options import Augment
from cytoclip.errors import UserError
from cytoclip.pairs import Identity, Pairs, identities, right_answers
from cytoclip.pictures import PatchDropout
from cytoclip.pixels import PixelSpec
from cytoclip.streams import Arrived, Columns, Plan, Position, Stream

SPEC = PixelSpec((8, 8), None, 3, (0.0,) * 3, (1.0,) * 3, 1 / 255)
SHARDS, EACH = 7, 9
START = Position()


def picture(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """63 pairs in 7 shards; their picture is their number; every third shares a caption, every fifth has a group."""
    found = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members = {}
        for i in range(EACH):
            number = shard * EACH + i
            members[f"{number:03}.png"] = picture(number // 2 * 2)
            caption = "shared" if number % 3 == 0 else f"caption {number}"
            about = {"caption": caption, **({"group": "five"} if number % 5 == 0 else {})}
            members[f"{number:03}.json"] = json.dumps(about).encode()
        write_tar(found / f"{shard:03}.tar", members)
    return found


def tokenise(captions: Sequence[str]) -> Tokens:
    return Tokens(np.array([len(text) for text in captions], np.int32), np.arange(len(captions)) + 1, 0, 0)


def planned(folder: Path, **changed: Any) -> Plan:
    found = streams.shards(f"file://{folder}/{{000..006}}.tar")
    return replace(Plan(found, Columns(), 1, SPEC, tokenise, seed=3, rank=0, size=1), **changed)


def reader(plan: Plan, number: int, readers: int, begin: Position = START) -> Iterator[Arrived]:
    return streams._batches(plan, number, readers, begin)


def numbers(batches: Sequence[Arrived]) -> list[int]:
    return [int(name.rpartition(" ")[2]) for batch in batches for name in batch.names]


def until(batches: Iterator[Arrived], epoch: int) -> list[Arrived]:
    found = []
    for batch in batches:
        if batch.position.epoch == epoch:
            return found
        found.append(batch)
    raise AssertionError("no end")


@pytest.mark.parametrize(("size", "readers"), [(1, 1), (1, 3), (2, 2), (7, 1)])
def test_each_pair_comes_once_an_epoch(folder: Path, size: int, readers: int) -> None:
    epochs = []
    for epoch in range(2):
        every = [
            batch
            for rank in range(size)
            for number in range(readers)
            for batch in until(
                reader(planned(folder, rank=rank, size=size), number, readers, Position(epoch)), epoch + 1
            )
        ]
        assert sorted(numbers(every)) == list(range(SHARDS * EACH))
        epochs.append(numbers(every))
    assert epochs[0] != epochs[1]


def test_shards_and_their_pairs_are_shuffled_anew_each_epoch_and_by_the_seed(folder: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return numbers(until(reader(planned(folder, seed=seed), 0, 1, Position(epoch)), epoch + 1))

    orders = [order(seed, epoch) for seed in (3, 4) for epoch in (0, 1)]
    assert orders[0] == order(3, 0)
    by_shard = [[row // EACH for row in one][::EACH] for one in orders]
    within = [sorted(zip([row // EACH for row in one], one, strict=True), key=lambda row: row[0]) for one in orders]
    assert len({tuple(one) for one in by_shard}) == len({tuple(one) for one in within}) == 4


@pytest.mark.parametrize("block", [1, 4, 512])
def test_it_goes_on_from_anywhere(folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: the same reader without a stop. Batches of 4 out of shards of 9 end within shards and blocks."""
    monkeypatch.setattr(streams, "BLOCK", block)
    plan = planned(folder, each=4)
    whole = list(islice(reader(plan, 1, 2), 20))
    assert {batch.position.epoch for batch in whole} >= {0, 1, 2}
    for stop in range(1, 20):
        rest = list(islice(reader(plan, 1, 2, whole[stop - 1].position), 20 - stop))
        assert [batch.names for batch in rest] == [batch.names for batch in whole[stop:]]
        assert [batch.position for batch in rest] == [batch.position for batch in whole[stop:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_take_turns_and_go_on_with_whose_turn_it_is(folder: Path, workers: int) -> None:
    plan, readers = planned(folder, each=4), max(workers, 1)

    def read(count: int, behind: Sequence[Position] = (), first: int = 0) -> list[Arrived]:
        source = DataLoader(Stream(plan, behind, first), batch_size=None, num_workers=workers)
        return list(islice(iter(source), count))

    whole = read(9)
    assert [batch.reader for batch in whole] == [step % readers for step in range(9)]
    for stop in (3, 4):
        behind = [Position()] * readers
        for batch in whole[:stop]:
            behind[batch.reader] = Position(*batch.position)
        rest = read(9 - stop, behind, stop % readers)
        assert [batch.names for batch in rest] == [batch.names for batch in whole[stop:]]


def test_a_batch_holds_pixels_tokens_and_who_is_right_for_whom(folder: Path) -> None:
    """The relation is that of the same pairs read whole; hashes of different readers meet."""
    every = [batch for number in (0, 1) for batch in until(reader(planned(folder), number, 2), 1)]
    rows = numbers(every)
    assert all(int(batch.batch.images[0, 0, 0, 0]) == row // 2 * 2 for batch, row in zip(every, rows, strict=True))
    said = ["shared" if row % 3 == 0 else f"caption {row}" for row in rows]
    assert [int(batch.batch.texts[0, 0]) for batch in every] == [len(text) for text in said]
    blank = (None,) * len(rows)
    pairs = Pairs(
        (folder,) * len(rows), tuple(map(str, rows)), tuple(said),
        tuple("five" if row % 5 == 0 else None for row in rows), blank, blank,
        contents=tuple(str(row // 2) for row in rows),
    )  # fmt: skip
    expected = right_answers(identities(pairs), identities(pairs))
    fields = ("caption", "image", "group")
    mine = Identity(*(np.concatenate([getattr(batch.identity, name) for batch in every]) for name in fields))
    assert np.array_equal(right_answers(mine, mine), expected)
    assert expected.sum() > len(rows) * 3


def test_what_does_not_fill_a_batch_is_dropped_at_the_end_of_an_epoch(folder: Path) -> None:
    batches = until(reader(planned(folder, each=10), 0, 1), 1)
    assert len(batches) == 6
    assert all(len(batch.names) == len(batch.batch.images) == 10 for batch in batches)


def test_shards_too_small_for_a_batch_are_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="63 pairs in the shards of one of 1 readers do not fill its 64"):
        next(reader(planned(folder, each=64), 0, 1))
    with pytest.raises(UserError, match="0 pairs"):
        next(reader(planned(folder), 7, 8))


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    members = {f"{i}.png": picture(i)[: 40 if i == 2 else None] for i in range(4)}
    texts = {f"{i}.txt": b"text" for i in range(4)}
    write_tar(tmp_path / "000.tar", dict(sorted({**members, **texts}.items())))
    return tmp_path


def test_a_bad_picture_is_an_error_or_the_next_pair_comes_instead(damaged: Path) -> None:
    plan = replace(planned(damaged), shards=[f"file://{damaged}/000.tar"], each=3)
    with pytest.raises(UserError, match=r"000.tar, row 2: a picture: trunc"):
        next(reader(plan, 0, 1))
    (failed,) = islice(Stream(plan), 1)
    assert isinstance(failed, UserError)
    (batch,) = islice(reader(replace(plan, skips=True), 0, 1), 1)
    assert sorted(numbers([batch])) == [0, 1, 3]
    later = list(islice(reader(replace(plan, skips=True), 0, 1), 4))
    assert {name[-1] for batch in later for name in batch.skipped} == {"2"}


def test_patches_are_dropped_by_pair_and_epoch(folder: Path) -> None:
    plan = planned(folder, each=3, dropout=streams.PatchDropout(16, 0.5, 3))
    one, again = (next(reader(plan, 0, 1)).batch.keep for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == (3, 8)
    assert len({tuple(row.tolist()) for row in one}) == 3


def test_of_several_captions_one_is_drawn_each_epoch(tmp_path: Path) -> None:
    texts = ["one", "three", "fifteen"]
    write_tar(tmp_path / "0.tar", {"0.png": picture(0), "0.json": json.dumps({"caption": texts}).encode()})
    plan = replace(planned(tmp_path), shards=[f"file://{tmp_path}/0.tar"])
    said = [int(batch.batch.texts[0, 0]) for batch in islice(reader(plan, 0, 1), 6)]
    assert sorted(said[:3]) == sorted(said[3:]) == sorted(map(len, texts))


def test_shards_are_found_by_braces_by_pattern_and_in_a_folder(folder: Path) -> None:
    expected = [f"file://{folder}/{i:03}.tar" for i in range(SHARDS)]
    for address in (f"file://{folder}/{{000..006}}.tar", f"file://{folder}/*.tar", f"file://{folder}"):
        assert streams.shards(address) == expected


def test_any_file_system_of_fsspec_and_parquet_too(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    memory = fsspec.filesystem("memory")
    with memory.open("/pairs/0.parquet", "wb") as stream:
        pictures = [{"bytes": picture(i), "path": None} for i in range(5)]
        pq.write_table(pa.table({"image": pictures, "caption": [f"text {i}" for i in range(5)]}), stream)
    found = list(streams.samples(streams.shards("memory://pairs")[0], Columns()))
    assert [sample.captions for sample in found] == [(f"text {i}",) for i in range(5)]
    assert [sample.picture for sample in found] == [picture(i) for i in range(5)]


REFUSED = [
    ("file://{}/none*.tar", Columns(), "no shards"),
    ("nowhere://a/{{0..3}}.tar", Columns(), "cannot be opened"),
    ("file://{}/000.txt", Columns(), "none of a known kind"),
    ("file://{}/999.tar", Columns(), "cannot be read"),
    ("file://{}/000.tar", Columns(image="pgn"), "has no pgn"),
    ("file://{}/000.tar", Columns(caption="png"), "has in png not text"),
    ("file://{}/names.csv", Columns(), "has no bytes of a picture in image, caption"),
    ("file://{}/other.csv", Columns(), "has no bytes of a picture in a, b"),
]


@pytest.mark.parametrize(("address", "columns", "said"), REFUSED)
def test_what_cannot_be_read_says_where_and_why(folder: Path, address: str, columns: Columns, said: str) -> None:
    (folder / "names.csv").write_text("image,caption\na.png,text\n")
    (folder / "other.csv").write_text("a,b\na.png,text\n")
    with pytest.raises(UserError) as caught:
        next(streams.samples(streams.shards(address.format(folder))[0], columns))
    assert said in caught.value.message
    assert caught.value.hint


def test_the_library_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="datasets library") as caught:
        next(streams.samples(f"file://{folder}/000.tar", Columns()))
    assert "cytoclip[hub]" in str(caught.value.hint)


def right_for_each_other(batch: Arrived) -> set[tuple[int, int]]:
    """Numbers of the pairs, the lower one first."""
    right, rows = right_answers(batch.identity, batch.identity), numbers([batch])
    return {(rows[i], rows[j]) for i, j in np.argwhere(right).tolist() if rows[i] < rows[j]}


def test_an_empty_group_is_none_and_captions_are_compared_as_on_disk(tmp_path: Path) -> None:
    said = [("a  cell", ""), ("a cell ", "g"), ("another", ""), ("a third", None), ("a fourth", "g")]
    members = {}
    for i, (caption, group) in enumerate(said):
        about = {"caption": caption, **({} if group is None else {"group": group})}
        members |= {f"{i}.png": picture(i), f"{i}.json": json.dumps(about).encode()}
    write_tar(tmp_path / "0.tar", members)
    plan = planned(tmp_path, shards=[f"file://{tmp_path}/0.tar"], each=5)
    assert right_for_each_other(next(reader(plan, 0, 1))) == {(0, 1), (1, 4)}


def test_groups_are_as_plain_as_on_disk(tmp_path: Path) -> None:
    """A column of numbers with one missing is floats: 7.0 is group 7, and what is missing is no group."""
    for name, groups, kind in (("0", [7, 8], pa.int64()), ("1", [7.0, math.nan, math.nan], pa.float64())):
        rows = [{"bytes": picture(3 * int(name) + i), "path": None} for i in range(len(groups))]
        said = [f"caption {name} {i}" for i in range(len(groups))]
        parquet.write_table(
            pa.table({"image": rows, "caption": said, "group": pa.array(groups, kind)}), tmp_path / f"{name}.parquet"
        )
    plan = planned(tmp_path, shards=[f"file://{tmp_path}/{i}.parquet" for i in range(2)], each=5)
    batch = next(reader(plan, 0, 1))
    right = right_answers(batch.identity, batch.identity)
    together = {(batch.names[i], batch.names[j]) for i, j in np.argwhere(right).tolist() if i < j}
    assert [sorted(name.rpartition("/")[2] for name in two) for two in together] == [
        ["0.parquet, row 0", "1.parquet, row 0"]
    ]


@pytest.mark.parametrize("group", [True, ["a"], 0.5])
def test_a_group_that_is_neither_text_nor_number_is_named(group: Any, tmp_path: Path) -> None:
    about = json.dumps({"caption": "a nucleus", "group": group}).encode()
    write_tar(tmp_path / "0.tar", {"0.png": picture(0), "0.json": about})
    with pytest.raises(UserError, match=r"0: its group is .*, not a text or whole number"):
        next(reader(planned(tmp_path, shards=[f"file://{tmp_path}/0.tar"], each=1), 0, 1))


def test_what_comes_from_afar_changes_with_the_epoch(tmp_path: Path) -> None:
    members = {}
    for i in range(3):
        members |= {f"{i}.png": picture(i), f"{i}.txt": b"a nucleus"}
    write_tar(tmp_path / "0.tar", members)
    dropout, variation = PatchDropout(64, 0.5, 3), Variation(Augment(rotation="any"), (8, 8), 3)
    shards = [f"file://{tmp_path}/0.tar"]
    plan = planned(tmp_path, shards=shards, each=3, dropout=dropout, variation=variation)
    for epoch in range(2):
        batch = next(reader(plan, 0, 1, Position(epoch))).batch
        assert batch.keep is not None
        assert batch.changes is not None
        for pair, keep, change in zip(batch.indices.tolist(), batch.keep, batch.changes, strict=True):
            assert torch.equal(keep, dropout.keep(pair, epoch))
            assert torch.equal(change, variation.draw(pair, epoch))
