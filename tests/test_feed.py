"""Whole runs on pairs from afar: resumed exactly, on several processes, and refused where that cannot be."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import captions, checkpoint, intake, streams, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.pictures import PatchDropout
from tests import tiny
from tests.conftest import weights
from tests.numerics.nursery import spawn
from tests.test_training import stop_after

Experiment = Callable[..., Config]
QUIET = Console(quiet=True)


def write_shards(split: Path, to: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> str:
    """The pairs of a split in six shards; their address."""
    to.mkdir()
    entries = json.loads((split / "img_text_pair.json").read_text())
    for shard in range(6):
        with tarfile.open(to / f"{shard}.tar", "w") as tar:
            for entry in entries[shard::6]:
                data = (split / "imgs" / entry["img"]).read_bytes()
                change(entry)
                for ending, content in (("png", data), ("json", json.dumps(entry).encode())):
                    info = tarfile.TarInfo(f"{Path(entry['img']).stem}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"file://{to}/{{0..5}}.tar"


@pytest.fixture
def afar(experiment: Experiment, root: Path, tmp_path: Path) -> Experiment:
    """As `experiment`, with its training pairs from afar."""
    address = write_shards(root / "train", tmp_path / "shards")

    def make(**sections: Any) -> Config:
        data = {"root": None, "train": address, "val": str(root / "val"), "workers": 0, **sections.pop("data", {})}
        settings = {"steps": 7, "batch_size": 6, **sections.pop("train", {})}
        return experiment(data=data, train=settings, **sections)

    return make


def losses(wanted: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(wanted.output) / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_exactly_where_it_stopped(
    workers: int, afar: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = afar(data={"workers": workers})
    training.fit(whole, QUIET)
    stopped = afar(data={"workers": workers}, checkpoint={"every": 3}, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            training.fit(stopped, QUIET)
    training.fit(stopped, QUIET)
    assert losses(stopped) == losses(whole)
    assert len(set(losses(whole))) == 7
    found = weights(Path(stopped.output) / "model")
    assert all(np.array_equal(found[name], weight) for name, weight in weights(Path(whole.output) / "model").items())


def test_other_readers_cannot_go_on(afar: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            training.fit(afar(checkpoint={"every": 3}), QUIET)
    with pytest.raises(UserError, match="begun with 1 × 1 readers, and there are 1 × 2 now") as caught:
        training.fit(afar(checkpoint={"every": 3}, data={"workers": 2}), QUIET)
    assert caught.value.code == ExitCode.RUN
    training.fit(afar(checkpoint={"every": 3}, data={"workers": 1}), QUIET)


def test_a_frozen_tower_reads_what_comes(afar: Experiment) -> None:
    wanted = afar(model={"name": afar().model.name, "image_tower": "frozen"})
    training.fit(wanted, QUIET)
    assert all(math.isfinite(loss) for loss in losses(wanted))


@pytest.mark.slow
def test_right_answers_meet_over_processes_and_a_kill_changes_nothing(
    experiment: Experiment, root: Path, tmp_path: Path
) -> None:
    """With one caption for all, every text is right for every image; where those are ignored, nothing is contrasted."""
    same = write_shards(root / "train", tmp_path / "same shards", lambda entry: entry.update(caption="a cell"))
    other = write_shards(root / "train", tmp_path / "other shards")
    runs: dict[str, Config] = {}

    def run(name: str, address: str, die_at: int | None) -> None:
        data = {"root": None, "train": address, "val": str(root / "val"), "workers": 1}
        settings = {"steps": 6, "batch_size": 8, "positives": "ignore"}
        runs[name] = experiment(data=data, train=settings, checkpoint={"every": 2}, output=str(tmp_path / name))
        case = {"config": runs[name].model_dump(mode="json", by_alias=True), "float64": True, "die_at": die_at}
        (tmp_path / "cases.json").write_text(json.dumps([case]))
        spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2, -9 if die_at else 0)

    run("same", same, None)
    assert losses(runs["same"]) == pytest.approx([0.0] * 6, abs=1e-9)
    run("whole", other, None)
    run("killed", other, 4)
    run("killed", other, None)
    assert losses(runs["killed"]) == losses(runs["whole"])
    assert len(set(losses(runs["whole"]))) == 6


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train": {"steps": None, "epochs": 2}}, "train.epochs is 2"),
    ({"data": {"cache": True}}, "data.cache needs training pairs that are here"),
    ({"data": {"replay": [{"root": "somewhere", "weight": 1.0}]}}, "data.replay needs"),
]


@pytest.mark.parametrize(("sections", "said"), REFUSED)
def test_what_needs_pairs_that_are_here_is_refused(sections: Any, said: str, afar: Experiment) -> None:
    with pytest.raises(UserError, match=said):
        training.fit(afar(**sections), QUIET)


def test_a_dry_run_says_what_it_knows(afar: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    planned = training.dry_run(afar(), Console())
    assert (planned.steps, planned.steps_per_epoch, planned.times_seen) == (7, None, None)
    assert "each pair" not in planned.text()
    assert "6 shards" in capsys.readouterr().err


def test_each_process_reads_shards_of_its_own(afar: Experiment, base: Path) -> None:
    """Trap 2: the same pairs in every process would be each other's negatives."""
    wanted, opened, read = afar(), checkpoint.open_model(str(base)), []
    shards = streams.shards(str(wanted.data.train))
    for rank in range(2):
        plan = intake._from_afar(wanted, opened, shards, None, 0, World(torch.device("cpu"), rank, 2)).plan
        came = islice(streams._batches(plan, 0, 1, streams.Position()), 8)
        read.append({name for batch in came for name in batch.names})
    assert len(read[0]) == len(read[1]) == 24
    assert not read[0] & read[1]


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_captions_from_afar_are_read_as_their_family_is(kind: str, afar: Experiment, bases: dict[str, Path]) -> None:
    opened = checkpoint.open_model(str(bases[kind]))
    plan = intake._from_afar(afar(), opened, [], None, 0, World(torch.device("cpu"))).plan
    expected = captions.tokenise(opened.tokenizer, tiny.CAPTIONS, opened.context, opened.encoder.family).batch(range(4))
    assert plan.tokenise(tiny.CAPTIONS).batch(range(4)).equal(expected)
    assert expected.shape[1] == opened.context


def test_patches_are_dropped_from_afar_too(afar: Experiment, base: Path) -> None:
    wanted, opened = afar(train={"patch_dropout": 0.5}), checkpoint.open_model(str(base))
    plan = intake._from_afar(wanted, opened, [], None, 0, World(torch.device("cpu"))).plan
    assert isinstance(plan.dropout, PatchDropout)
    assert len(plan.dropout.keep(0, 0)) == 2
