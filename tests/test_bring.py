"""Splits that keep together what belongs together, and a data root that is whole or not there."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import apart, bring, check, files, sources
from cytoclip.apart import SPLITS, Shares
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.pairs import Pairs
from cytoclip.rows import Columns
from tests import formats
from tests.component_twin import assert_components
from tests.test_formats import bytes_of

QUIET = Console(quiet=True)


def made(count: int, seed: int) -> Pairs:
    """Pairs whose sources, groups and contents repeat at random."""
    drawn = random.Random(seed)
    names = tuple(f"{i}.png" for i in range(count))
    tags = [tuple(drawn.choice([None, f"{k} {drawn.randrange(count)}"]) for _ in names) for k in ("group", "source")]
    contents = tuple(f"content {drawn.choice([i, drawn.randrange(count)])}" for i in range(count))
    images = tuple(Path("/") / name for name in names)
    return Pairs(images, names, names, tags[0], tags[1], (None,) * count, contents)


def taken(pairs: Pairs, rows: list[int]) -> Pairs:
    return Pairs(**{name: tuple(column[row] for row in rows) for name, column in vars(pairs).items()})


def together(pairs: Pairs, i: int, j: int) -> bool:
    columns = (pairs.groups, pairs.sources, pairs.contents)
    return any(column[i] is not None and column[i] == column[j] for column in columns)


@pytest.mark.parametrize("seed", range(4))
def test_components_against_a_search_from_each_pair(seed: int) -> None:
    pairs = made(60, seed)
    found = apart.components(pairs)
    assert len(found) == len(pairs)
    assert_components(found, lambda i, j: together(pairs, i, j))
    assert 1 < len(set(found.tolist())) < 60


@pytest.mark.parametrize("seed", range(4))
def test_a_split_is_a_function_of_contents_and_seed(seed: int) -> None:
    pairs, shares = made(300, seed), Shares(0.2, 0.1, seed)
    split = apart.split(pairs, shares)
    for i, j in zip(*np.triu_indices(300), strict=True):
        assert split[i] == split[j] or not together(pairs, i, j)
    order = random.Random(seed).sample(range(300), 300)
    assert apart.split(taken(pairs, order), shares).tolist() == split[order].tolist()
    assert apart.split(pairs, replace(shares, seed=seed + 1)).tolist() != split.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_shares_are_as_near_as_one_component_more_would_bring_them(seed: int) -> None:
    pairs, shares = made(300, seed), Shares(0.2, 0.1, seed)
    split, component = apart.split(pairs, shares), apart.components(pairs)
    sizes = np.bincount(component)
    in_train = {int(k) for k, s in zip(component, split, strict=True) if s == 0}
    for number, share in ((1, 0.2), (2, 0.1)):
        off = abs((split == number).sum() - share * 300)
        assert off < 15
        assert all(abs((split == number).sum() + sizes[k] - share * 300) >= off for k in in_train)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", formats.WRITERS)
def test_the_same_pairs_come_out_of_every_format(tmp_path: Path, name: str) -> None:
    pairs = formats.drawn(20)
    place, to = formats.WRITERS[name](tmp_path / "from", pairs), tmp_path / "to"
    counts = bring.bring(place, to, Shares(0.2, 0.2), Columns(), QUIET)
    assert sum(counts.values()) == 20
    assert counts["val"] == counts["test"] == 4
    found: dict[str, tuple[Any, ...]] = {}
    by_source = defaultdict(set)
    for split in SPLITS:
        read = sources.read(to / split)
        assert len(read) == counts[split]
        sites = read.further().get("site", (None,) * len(read))
        columns = (read.images, read.captions, read.sources, read.labels, sites)
        for image, caption, source, label, site in zip(*columns, strict=True):
            found[caption] = (bytes_of(image), source, label, site)
            by_source[source].add(split)
    tags = name not in formats.NO_TAGS
    wanted = {p.captions[0]: (p.picture, *((p.source, p.label, p.site) if tags else (None, None, None))) for p in pairs}
    assert found == wanted
    assert not tags or all(len(splits) == 1 for splits in by_source.values())


def test_further_captions_and_groups_are_kept(tmp_path: Path) -> None:
    place = formats.json_lines(tmp_path / "from", formats.drawn(several=True))
    lines = [json.loads(line) | {"group": f"g {i // 2}"} for i, line in enumerate(place.read_text().splitlines())]
    place.write_text("\n".join(json.dumps(line) for line in lines))
    bring.bring(place, tmp_path / "to", Shares(0.5, 0.0), Columns(), QUIET)
    read = [sources.read(tmp_path / "to" / split) for split in ("train", "val")]
    assert sorted(more for one in read for more in one.more) == [(f"another {i}",) for i in range(6)]
    assert {group for one in read for group in one.groups} == {"g 0", "g 1", "g 2"}
    assert not (tmp_path / "to" / "test").exists()


@pytest.mark.parametrize(("key", "said"), [("Patient_ID", True), ("wsi", True), ("magnification", False)])
def test_sources_under_another_name_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, said: bool
) -> None:
    """Renamed, they keep together what belongs together; here half of the patients would be cut."""
    place = formats.json_lines(tmp_path / "from", formats.drawn(20))
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    for name, to in ((key, "cut"), ("source", "whole")):
        rows = [{k: v for k, v in one.items() if k != "source"} | {name: f"p {i // 2}"} for i, one in enumerate(lines)]
        place.write_text("\n".join(json.dumps(row) for row in rows))
        bring.bring(place, tmp_path / to, Shares(0.2, 0.2), Columns(), Console())
        assert (f"what comes from one '{key}'" in capsys.readouterr().err) == (said and to == "cut")
    check.check(tmp_path / "cut", None, None, Console())
    assert (f"what comes from one '{key}'" in capsys.readouterr().err) == said


def with_splits(folder: Path, said: list[str | None], key: str = "split") -> Path:
    place = formats.json_lines(folder, formats.drawn(len(said)))
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    rows = [one | ({} if name is None else {key: name}) for one, name in zip(lines, said, strict=True)]
    place.write_text("\n".join(json.dumps(row) for row in rows))
    return place


@pytest.mark.parametrize("key", ["split", "Split"])
def test_a_column_that_names_splits_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    """Two pairs of a slide each: what is cut is said, and not mended by moving a pair."""
    said: list[str | None] = ["train", "train", "Train", "valid", "test", "test", "validation", "train"]
    counts = bring.bring(with_splits(tmp_path / "from", said, key), tmp_path / "to", Shares(), Columns(), Console())
    assert counts == {"train": 4, "val": 2, "test": 2}
    found = {split: [name[-7:-4] for name in sources.read(tmp_path / "to" / split).names] for split in SPLITS}
    assert found == {"train": ["000", "001", "002", "007"], "val": ["003", "006"], "test": ["004", "005"]}
    printed = capsys.readouterr().err
    assert "splits as column 'split' names them: nothing is shuffled" in printed
    assert "sources (patient, slide, figure) that are in two splits: 2 of 2 pairs in val and train" in printed
    assert "asked" not in printed


@pytest.mark.parametrize("said", [["left", "right"] * 10, ["train"] * 20])
def test_a_column_that_cuts_nothing_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said: list[str | None]
) -> None:
    place = with_splits(tmp_path / "from", said)
    counts = bring.bring(place, tmp_path / "to", Shares(0.2, 0.2), Columns(), Console())
    assert counts == {"train": 12, "val": 4, "test": 4}
    assert "nothing is shuffled" not in capsys.readouterr().err


@pytest.mark.parametrize(("lacking", "shown"), [(None, "empty"), ("extra", "'extra'")])
def test_a_pair_without_a_split_among_others_is_refused(tmp_path: Path, lacking: str | None, shown: str) -> None:
    place = with_splits(tmp_path / "from", ["train", "val", lacking, "train"])
    with pytest.raises(UserError, match=rf"1 pair of .* without a split's name in 'split', .*: .*002.png \({shown}"):
        bring.bring(place, tmp_path / "to", Shares(), Columns(), QUIET)
    assert not (tmp_path / "to").exists()


def test_captions_that_stand_for_none_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = formats.table("csv")(tmp_path / "from", formats.drawn(10))
    rows = place.read_text(encoding="utf-8").splitlines()
    for row, said in ((1, "nan"), (2, "-"), (3, "N/A"), (4, "null")):
        rows[row] = f"{row},pictures/{row - 1:03}.png,slide,{said},1,site,10"
    place.write_text("\n".join(rows), encoding="utf-8")
    bring.bring(place, tmp_path / "to", Shares(0.2, 0.0), Columns(), Console())
    said = "pictures/000.png ('nan'), pictures/001.png ('-'), pictures/002.png ('N/A') and 1 more"
    assert f"4 captions that say nothing or stand for a missing value: {said}" in capsys.readouterr().err


def test_files_are_linked_and_pieces_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = formats.table("csv")(tmp_path / "from", formats.drawn())
    bring.bring(place, tmp_path / "to", Shares(0.4, 0.0), Columns(), Console())
    (copy,) = (tmp_path / "to").rglob("003.png")
    assert copy.samefile(tmp_path / "from" / "pictures" / "003.png")
    said = capsys.readouterr().err
    assert "0 pictures copied, 6 linked" in said
    assert "val: 2 pairs, 0.333 (0.400 asked)" in said


def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    place = formats.table("csv")(tmp_path / "from", formats.drawn())
    bring.bring(place, tmp_path / "to", Shares(0.4, 0.0), Columns(), QUIET)
    (copy,) = (tmp_path / "to").rglob("003.png")
    assert not copy.samefile(tmp_path / "from" / "pictures" / "003.png")
    assert copy.read_bytes() == formats.drawn()[3].picture


def test_a_second_run_is_refused_and_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, to = formats.tar(tmp_path / "from", formats.drawn()), tmp_path / "to"
    write = files.write_json

    def crash(path: Path, value: Any) -> None:
        if path.parent.name == "val":
            raise KeyboardInterrupt
        write(path, value)

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_json", crash)
        with pytest.raises(KeyboardInterrupt):
            bring.bring(place, to, Shares(0.4, 0.0), Columns(), QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["from"]
    bring.bring(place, to, Shares(0.4, 0.0), Columns(), QUIET)
    before = tree(to)
    with pytest.raises(UserError, match="is already there"):
        bring.bring(place, to, Shares(0.4, 0.0), Columns(), QUIET)
    assert tree(to) == before


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (Shares(0.5, 0.5), "leave nothing to train on"),
        (Shares(float("nan"), 0.1), "leave nothing to train on"),
        (Shares(0.2, 0.2), "val, test would be empty: the 6 pairs of .* are 1 with sources"),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, shares: Shares, said: str) -> None:
    pairs = [replace(one, source="the only slide") for one in formats.drawn()]
    with pytest.raises(UserError, match=said):
        bring.bring(formats.tar(tmp_path / "from", pairs), tmp_path / "to", shares, Columns(), QUIET)
    assert not (tmp_path / "to").exists()


def test_names_are_safe_and_unique(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(formats.drawn(1)[0].picture)
    names = ("../a.png", "/a.png", "A.PNG", "a.png/b.png", "x/con.png", "q?:*.png", "é" * 300 + ".png", "dot. ", "p")
    images = tuple(files.Piece(tmp_path / "x", 0, i + 1) for i in range(len(names)))
    none = (None,) * len(names)
    found = bring.safe_names(Pairs(images, names, names, none, none, none))
    assert found[:6] == ["a.png", "a-2.png", "A-3.PNG", "a.png_b.png", "x/_con.png", "q___.png"]
    assert len({name.casefold() for name in found}) == len(names)
    for name in found:
        target = tmp_path / "imgs" / name
        assert ".." not in Path(name).parts
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(exist_ok=False)
    assert found[8] == "p.png"  # by what its bytes begin with


def test_names_that_differ_in_how_an_accent_is_written(tmp_path: Path) -> None:
    """To macOS they are one name: the second picture would take the first one's place."""
    (tmp_path / "x").write_bytes(formats.drawn(1)[0].picture)
    names = ("\u00e9.png", "e\u0301.png", "\u00e9/1.png", "E\u0301/1.png")
    images = tuple(files.Piece(tmp_path / "x", 0, i + 1) for i in range(len(names)))
    none = (None,) * len(names)
    found = bring.safe_names(Pairs(images, names, names, none, none, none))
    assert len({unicodedata.normalize("NFD", name.casefold()) for name in found}) == len(names)
