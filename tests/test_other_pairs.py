"""Whole runs in which a pair comes with another caption in each epoch, or another pair in its place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import sources, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.order import Order, Wording
from cytoclip.pairs import Pairs, identities, right_answers
from tests.conftest import weights
from tests.numerics.nursery import spawn
from tests.test_training import stop_after

Experiment = Callable[..., Config]
ORDER = Order(pairs=48, batch_size=12, seed=0)  # as in the experiments below: four steps an epoch
QUIET = Console(quiet=True)


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> tuple[Path, list[int], dict[int, int]]:
    """A data root with three bad pictures, two of which the scan does not see; and who stands in in the first epoch."""
    shutil.copytree(root, tmp_path / "damaged")
    tables = zip((ORDER.rows(step) for step in range(4)), ORDER.standbys(0, 4), strict=True)
    standbys = {row: table[:, i] for rows, table in tables for i, row in enumerate(rows)}
    identity = identities(sources.read(root / "train"))
    right = right_answers(identity, identity)
    telling = next(  # whose stand-in, unlike itself, has a right answer in the batch
        int(row)
        for rows in map(ORDER.rows, range(4))
        for row in rows
        if row != 5 and right[standbys[row][0], rows].any() and right[row, rows].sum() == 1
    )
    bad = [5, telling, int(standbys[5][0])]  # the next in line is bad too
    for row in bad:
        path = tmp_path / "damaged" / "train" / "imgs" / f"{row:03}.png"
        data = path.read_bytes()
        path.write_bytes(b"" if row == telling else data[:60] + bytes(20) + data[80:])
    stands_in = {row: next(int(other) for other in standbys[row] if other not in bad) for row in bad}
    return tmp_path / "damaged", bad, stands_in


def losses(wanted: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(wanted.output) / "losses.jsonl").read_text().splitlines()]


def as_if(root: Path, to: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """The data root with its training list changed."""
    shutil.copytree(root, to)
    place = to / "train" / "img_text_pair.json"
    entries = json.loads(place.read_text())
    change(entries)
    place.write_text(json.dumps(entries))
    return to


@pytest.mark.parametrize("image_tower", ["full", "frozen"])
def test_another_pair_stands_in_for_a_bad_picture(
    image_tower: str, experiment: Experiment, root: Path, damaged: Any, tmp_path: Path, capsys: Any
) -> None:
    """Twin: the same run on a list in which the entries that stand in have taken the places of the bad ones."""
    folder, bad, stands_in = damaged

    def replaced(entries: list[dict[str, Any]]) -> None:
        before = list(entries)
        for row, other in stands_in.items():
            entries[row] = before[other]

    tower = {"name": experiment().model.name, "image_tower": image_tower}
    twin = experiment(
        data={"root": str(as_if(root, tmp_path / "twin", replaced))}, model=tower, output=str(tmp_path / "twin run")
    )
    training.fit(twin, QUIET)
    wanted = experiment(data={"root": str(folder), "on_bad_image": "skip"}, model=tower)
    capsys.readouterr()
    training.fit(wanted, Console())
    assert losses(wanted) == losses(twin)
    assert all(np.array_equal(mine, weights(tmp_path / "twin run" / "model")[name]) for name, mine in weights(
        Path(wanted.output) / "model").items())  # fmt: skip
    results = json.loads((Path(wanted.output) / "results.json").read_text())
    assert results["skipped"] == {f"{row:03}.png": 1 for row in bad}
    said = capsys.readouterr().err
    assert "3 pictures could not be used, and others stood in 3 times" in said
    assert "1 of 48 pictures" in said, "what the scan sees is said at the start"


@pytest.mark.slow
def test_two_processes_let_the_same_pairs_stand_in(experiment: Experiment, damaged: Any, tmp_path: Path) -> None:
    """Each process decodes its own half, and both must know who is right for whom in the whole batch."""
    folder, bad, _ = damaged
    found = {}
    for processes in (1, 2):
        wanted = experiment(data={"root": str(folder), "on_bad_image": "skip"}, output=str(tmp_path / f"{processes}"))
        case = {"config": wanted.model_dump(mode="json", by_alias=True), "float64": True, "die_at": None}
        (tmp_path / "cases.json").write_text(json.dumps([case]))
        spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], processes)
        found[processes] = losses(wanted)
        results = json.loads((Path(wanted.output) / "results.json").read_text())
        assert results["skipped"] == {f"{row:03}.png": 1 for row in bad}
    assert found[2] == pytest.approx(found[1], rel=1e-9)


def test_what_is_skipped_is_remembered_over_a_stop(experiment: Experiment, damaged: Any, monkeypatch: Any) -> None:
    folder, bad, _ = damaged
    wanted = experiment(data={"root": str(folder), "on_bad_image": "skip"}, train={"steps": 8}, checkpoint={"every": 3})
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            training.fit(wanted, QUIET)
    training.fit(wanted, QUIET)
    skipped = json.loads((Path(wanted.output) / "results.json").read_text())["skipped"]
    assert skipped == {f"{row:03}.png": 2 for row in bad}


def test_by_default_a_bad_picture_ends_the_run(experiment: Experiment, damaged: Any) -> None:
    folder, _, _ = damaged
    with pytest.raises(UserError, match="1 of 48"):
        training.fit(experiment(data={"root": str(folder)}), QUIET)


def test_a_bad_picture_of_validation_ends_the_run_always(experiment: Experiment, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "damaged")
    (tmp_path / "damaged" / "val" / "imgs" / "003.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"003\.png"):
        training.fit(experiment(data={"root": str(tmp_path / "damaged"), "on_bad_image": "skip"}), QUIET)


@pytest.mark.parametrize("text_tower", ["full", "frozen"])
def test_each_epoch_reads_the_caption_that_is_drawn_for_it(
    text_tower: str, experiment: Experiment, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: one epoch on a list with one caption each, those drawn; the relation of right answers is theirs too."""
    entries = json.loads((root / "train" / "img_text_pair.json").read_text())
    more = tuple((entries[(i + 5) % 48]["caption"], f"another {i}") if i % 3 == 0 else () for i in range(48))
    reads = sources.read

    def read(folder: Path, *rest: Any) -> Pairs:
        found = reads(folder, *rest)
        return replace(found, more=more) if folder == root / "train" else found

    pairs = replace(reads(root / "train"), more=more)
    drawn = Wording.of(pairs, seed=0).rows(np.arange(48), np.zeros(48, np.int64))
    every = [text for one, others in zip(pairs.captions, more, strict=True) for text in (one, *others)]

    def written(listed: list[dict[str, Any]]) -> None:
        for entry, row in zip(listed, drawn, strict=True):
            entry["caption"] = every[row]

    tower = {"name": experiment().model.name, "text_tower": text_tower}
    twin = experiment(
        data={"root": str(as_if(root, tmp_path / "twin", written))}, model=tower, output=str(tmp_path / "twin run")
    )
    training.fit(twin, QUIET)
    monkeypatch.setattr(sources, "read", read)
    wanted = experiment(model=tower, train={"steps": 8})
    training.fit(wanted, QUIET)
    # features of a frozen tower are computed in other batches there, which differ in their last bits
    assert losses(wanted)[:4] == pytest.approx(losses(twin), rel=0 if text_tower == "full" else 1e-5)
    monkeypatch.undo()
    plain = experiment(model=tower, train={"steps": 8}, output=str(tmp_path / "plain run"))
    training.fit(plain, QUIET)
    assert losses(plain)[4:] != losses(wanted)[4:]
