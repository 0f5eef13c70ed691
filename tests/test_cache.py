"""With the cache a run is the same to the last bit, its size is known first, and no other picture is ever taken."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cytoclip import batches, cache, checkpoint, decoded, files, images, training
from cytoclip.batches import Batch
from cytoclip.config import Config
from cytoclip.console import Bar, Console
from cytoclip.data_options import Data
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order, Share
from cytoclip.pictures import Pictures
from cytoclip.pixels import PixelSpec
from tests.conftest import weights
from tests.numerics.nursery import spawn
from tests.test_training import stop_after

Experiment = Callable[..., Config]
QUIET = Console(quiet=True)
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
SPEC = PixelSpec(32, (32, 32), 3, (0.5,) * 3, (0.2,) * 3, 1 / 255)
ROW = 3 * 32 * 32 + 40  # bytes of a picture with its key and mark


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """A data root without a cache."""
    return shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns(files.CACHE))


class Heard(Console):
    """What was said, and the bars."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.bars: list[tuple[str, int, Bar]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Bar]:
        self.bars.append((title, total, Bar(self, title, total, start)))
        yield self.bars[-1][2]

    def of_cache(self) -> list[str]:
        return [line for line in self.lines if "data.cache" in line]


def part_of(folder: Path, spec: PixelSpec = SPEC) -> cache.Part:
    pairs = batches.open_split(folder, QUIET)
    return cache.Part(folder, pairs.contents, Pictures(pairs.images, spec))


def tables(root: Path) -> dict[str, int]:
    """Filled rows of each split's only table."""
    found = {}
    for split in ("train", "val"):
        for folder in (root / split / files.CACHE / cache.NAME).glob("*"):
            assert split not in found
            found[split] = int(np.count_nonzero(np.fromfile(folder / "marks", "<i8")))
    return found


def run(experiment: Experiment, root: Path, name: str, console: Console | None = None, **sections: Any) -> list[Any]:
    """Losses and scores of a run of three epochs of four steps."""
    given: dict[str, Any] = {"data": {}, "train": {"steps": 12}, "validate": {"every": 4, "ks": [1, 5]}}
    for key, section in sections.items():
        given[key] = {**given.get(key, {}), **section} if isinstance(section, dict) else section
    given["data"] = {"root": str(root), **given["data"]}
    wanted = experiment(**given, output=str(root.parent / name))
    result = training.fit(wanted, console or QUIET)
    losses = [json.loads(line) for line in (root.parent / name / "losses.jsonl").read_text().splitlines()]
    return [losses, result.before, result.best, result.last]


def same_weights(one: Path, other: Path) -> None:
    left, right = weights(one / "model"), weights(other / "model")
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_the_cache_is_the_run_without_it(workers: int, experiment: Experiment, own: Path) -> None:
    """While it is filled, while it is read, and in a second run, which finds it filled."""
    plain = run(experiment, own, "plain")
    assert tables(own) == {}
    for turn in ("filling", "filled"):
        heard, options = Heard(), {"cache": True, "workers": workers}
        assert run(experiment, own, turn, heard, data=options) == plain
        assert tables(own) == {"train": 48, "val": 20}
        there = 68 if turn == "filled" else 0
        assert f"68 decoded pictures take 212 kB, {there} of them are there" in heard.of_cache()[0]
        assert len(heard.of_cache()) == 1


def test_a_filled_cache_is_all_that_is_read(experiment: Experiment, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(experiment, own, "plain", data={"cache": True})

    def refuse(place: Any) -> Any:
        raise AssertionError(f"{place} was decoded")

    monkeypatch.setattr(images, "decode", refuse)
    assert run(experiment, own, "read", data={"cache": True}) == plain


def test_a_run_that_stops_while_the_cache_is_filled_goes_on_exactly(
    experiment: Experiment, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(experiment, own, "plain")
    stop_after(2, monkeypatch)
    options: dict[str, Any] = {"data": {"cache": True}, "checkpoint": {"every": 1}}
    with pytest.raises(KeyboardInterrupt):
        run(experiment, own, "stopped", **options)
    assert 24 <= tables(own)["train"] < 48, "a part is there"
    monkeypatch.undo()
    assert run(experiment, own, "stopped", **options) == plain


@pytest.mark.parametrize("first", [False, True])
def test_a_run_that_goes_on_with_or_without_the_cache_is_the_same_run(
    first: bool, experiment: Experiment, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decides no number, so a run that waits for its pictures need not begin anew to have one."""
    plain = run(experiment, own, "plain")
    stop_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, own, "changed", data={"cache": first}, checkpoint={"every": 5})
    monkeypatch.undo()
    other = {"cache": not first, "cache_budget_gb": 1.0}
    assert run(experiment, own, "changed", data=other, checkpoint={"every": 5}) == plain
    same_weights(own.parent / "plain", own.parent / "changed")


def test_damaged_rows_are_decoded_again_and_said(experiment: Experiment, own: Path) -> None:
    plain = run(experiment, own, "plain", data={"cache": True})
    (pixels,) = own.glob(f"train/{files.CACHE}/{cache.NAME}/*/pixels")
    whole = bytearray(pixels.read_bytes())
    whole[5000] ^= 255
    whole[3072 * 20 : 3072 * 21] = bytes(3072)
    pixels.write_bytes(whole)
    heard = Heard()
    assert run(experiment, own, "mended", heard, data={"cache": True}) == plain
    assert heard.of_cache()[1:] == ["warning: data.cache: 2 damaged pictures decoded again; is the disk sound?"]
    heard = Heard()
    run(experiment, own, "after", heard, data={"cache": True})
    assert len(heard.of_cache()) == 1


def test_replayed_roots_have_caches_of_their_own(experiment: Experiment, own: Path) -> None:
    options = {"replay": [{"root": str(own / "val"), "weight": 0.5}]}
    plain = run(experiment, own, "plain", data=options)
    assert run(experiment, own, "kept", data={**options, "cache": True}) == plain
    assert tables(own) == {"train": 48, "val": 20}, "of validation and of the replay, in one table"


def test_a_frozen_image_tower_needs_none(experiment: Experiment, own: Path) -> None:
    heard = Heard()
    run(experiment, own, "frozen", heard, data={"cache": True}, model={"image_tower": "frozen"}, train={"steps": 2})
    assert heard.of_cache() == [
        "data.cache: nothing to keep: the frozen image tower's features are stored, and no picture is read"
    ]
    assert tables(own) == {}


def test_a_dry_run_says_the_size_and_writes_nothing(experiment: Experiment, own: Path) -> None:
    heard = Heard()
    training.dry_run(experiment(data={"root": str(own), "cache": True}), heard)
    assert "68 decoded pictures take 212 kB" in heard.of_cache()[0]
    assert tables(own) == {}
    assert not list(own.rglob(files.CACHE))


def test_a_budget_refuses_before_anything_is_written(experiment: Experiment, own: Path) -> None:
    with pytest.raises(UserError, match=r"takes 212 kB, more than the 211 kB of data\.cache_budget_gb") as caught:
        run(experiment, own, "small", data={"cache": True, "cache_budget_gb": 0.000211})
    assert caught.value.code is ExitCode.DATA
    assert not list(own.rglob(files.CACHE))
    run(experiment, own, "enough", data={"cache": True, "cache_budget_gb": 0.000213}, train={"steps": 4})
    assert tables(own) == {"train": 48, "val": 20}


def test_without_a_budget_a_fifth_of_the_disk_stays_free(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is filled already is not asked for again."""
    part = part_of(own / "train")
    monkeypatch.setattr(files, "free_bytes", lambda _: 48 * ROW)
    with pytest.raises(UserError, match=r"needs 149 kB more .* more than 80% of the 149 kB that are free"):
        cache.announce(Data(root="x"), [part], QUIET)
    cache.announce(Data(root="x", cache_budget_gb=1), [part], QUIET)
    monkeypatch.setattr(files, "free_bytes", lambda _: 60 * ROW)
    cache.announce(Data(root="x"), [part], QUIET)
    with pytest.raises(UserError, match="needs 212 kB more"):
        cache.announce(Data(root="x"), [part, part_of(own / "val")], QUIET)
    assert cache.fill(part, 0, QUIET) == []
    cache.announce(Data(root="x"), [part, part_of(own / "val")], QUIET)


def test_a_changed_picture_is_another_one(own: Path) -> None:
    """The same name with other bytes; the rest of the cache stays."""
    assert cache.fill(part_of(own / "train"), 0, QUIET) == []
    changed = own / "train" / "imgs" / "007.png"
    Image.open(changed).rotate(180).save(changed)
    part = part_of(own / "train")
    kept = part.pictures.kept_in(cache.opened(part))
    assert kept.kept is not None
    assert kept.kept.missing().tolist() == [7]
    assert all(np.array_equal(kept[i, 0][1], part.pictures[i, 0][1]) for i in range(48))
    assert kept.kept.missing().tolist() == []


def test_settings_that_change_the_stored_pixels_are_others_and_only_those(own: Path) -> None:
    part = part_of(own / "train")
    assert part_of(own / "train", replace(SPEC, mean=(0.1,) * 3, std=(0.9,) * 3, rescale=1.0)).folder == part.folder
    other = [replace(SPEC, resize=40), replace(SPEC, crop=(30, 32)), replace(SPEC, resample=2)]
    assert len({part_of(own / "train", spec).folder for spec in (SPEC, *other)}) == 4
    cache.opened(part)
    assert "crop=(32, 32)" in json.loads((part.folder / "about.json").read_text())["settings"]


def test_caches_of_other_settings_stay_and_their_size_is_said(own: Path) -> None:
    old, heard = part_of(own / "train", replace(SPEC, resample=2)), Heard()
    cache.fill(old, 0, QUIET)
    cache.announce(Data(root="x"), [part_of(own / "train")], heard)
    assert len(heard.lines) == 2
    assert "of other settings lie in" in heard.lines[1]
    size = sum(path.stat().st_blocks * 512 for path in old.folder.iterdir())
    assert f"{size / 1000:.3g} kB" in heard.lines[1]
    assert old.folder.is_dir()


@pytest.mark.parametrize("workers", [0, 2])
def test_filling_counts_goes_on_and_names_what_cannot_be(workers: int, own: Path) -> None:
    part, heard = part_of(own / "train"), Heard()
    (own / "train" / "imgs" / "031.png").write_bytes(b"not a picture")
    kept = part.pictures.kept_in(cache.opened(part))
    for row in range(10):
        kept[row, 0]
    failed = cache.fill(part, workers, heard)
    assert [error.message for error in failed] == [f"{own}/train/imgs/031.png: not a picture of a known format"]
    ((title, total, bar),) = heard.bars
    assert (str(own / "train") in title, total, bar._done) == (True, 38, 38)
    assert kept.kept is not None
    assert kept.kept.missing().tolist() == [31]
    assert len(cache.fill(part, workers, QUIET)) == 1
    for row in set(range(48)) - {31}:
        assert np.array_equal(kept[row, 0][1], part.pictures[row, 0][1])


def test_two_processes_fill_one_cache_at_once(own: Path) -> None:
    part = part_of(own / "train")
    group = [FORK.Process(target=cache.fill, args=(part, 0, QUIET)) for _ in range(2)]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [0, 0]
    assert tables(own) == {"train": 48}
    kept = part.pictures.kept_in(cache.opened(part))
    assert all(np.array_equal(kept[i, 0][1], part.pictures[i, 0][1]) for i in range(48))
    assert kept.kept is not None
    assert kept.kept.mended() == 0


def test_a_split_that_is_a_file_or_a_pattern_has_its_cache_beside_it(own: Path) -> None:
    places = [own / "train", own / "train" / "img_text_pair.json", own / "train" / "{00..09}.tar"]
    assert len({replace(part_of(own / "train"), beside=place).folder for place in places}) == 1


def test_who_may_not_write_there_has_it_at_home(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    part = part_of(own / "train")
    assert cache.fill(part, 0, QUIET) == []
    assert tmp_path / "home" in part.folder.parents
    assert tables(own) == {}


def test_a_full_disk_is_no_bad_picture(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped as one, it would silently give way to another that is kept already."""
    part = part_of(own / "train")
    kept = part.pictures.kept_in(cache.opened(part))

    def full(table: Any, row: int, picture: Any) -> None:
        with files.disk_errors(table.folder):
            raise OSError(errno.ENOSPC, "full")

    assert kept.kept is not None
    kept.kept.write(4, part.pictures[4, 0][1])
    monkeypatch.setattr(decoded.Table, "write", full)
    failed = kept[3, 0, 4, 5][1]
    assert isinstance(failed, UserError)
    assert failed.code is ExitCode.SYSTEM
    with pytest.raises(UserError, match="no space left"):
        cache.fill(part, 0, QUIET)


def loaded(pictures: Pictures, share: Share | list[Any], workers: int) -> list[Batch]:
    source = iter(batches.loader(pictures, None, share, workers, CPU))
    return [batches.next_batch(source) for _ in range(len(share))]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_processes_decode_until_an_epoch_has_filled_it_then_threads_read(
    workers: int, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, decoding, parts = part_of(own / "train"), batches._decoding, []

    def noted(pictures: Any, texts: Any, share: Any, *rest: Any) -> Any:
        parts.append((share.first, share.last))
        return decoding(pictures, texts, share, *rest)

    share = Share(Order(48, 12, seed=3), 2, 15, rank=0, size=1)
    plain = loaded(part.pictures, share, 0)
    monkeypatch.setattr(batches, "_decoding", noted)
    for expected in ([(2, 4), (4, 8)], []):  # half an epoch is not enough
        parts.clear()
        found = loaded(part.pictures.kept_in(cache.opened(part)), share, workers)
        assert parts == expected
        for one, two in zip(plain, found, strict=True):
            assert np.array_equal(one.indices, two.indices)
            assert torch.equal(one.images, two.images)


def test_a_picture_that_was_never_decoded_is_when_threads_read(own: Path) -> None:
    """One of 48 missing is nearly none; and a picture that is bad is named as ever, or its standby comes."""
    part = part_of(own / "train")
    (own / "train" / "imgs" / "031.png").rename(own / "031.png")
    cache.fill(part, 0, QUIET)
    pictures = part.pictures.kept_in(cache.opened(part))
    with pytest.raises(UserError, match=r"031\.png: no such file"):
        loaded(pictures, [[(30, 0), (31, 0)]], 1)
    (batch,) = loaded(pictures, [[(30, 0), (31, 0, 8)]], 1)
    assert batch.indices.tolist() == [30, 8]
    assert torch.equal(batch.images[1], torch.from_numpy(part.pictures[8, 0][1]))
    (own / "031.png").rename(own / "train" / "imgs" / "031.png")
    (batch,) = loaded(pictures, [[(30, 0), (31, 0)]], 1)
    assert torch.equal(batch.images[1], torch.from_numpy(part.pictures[31, 0][1]))
    assert pictures.kept is not None
    assert pictures.kept.missing().tolist() == []


@pytest.mark.slow  # 10 s
def test_two_processes_of_a_run_share_it(experiment: Experiment, own: Path, tmp_path: Path) -> None:
    """Each opens it, and fills and reads its own part."""
    listed = []
    for name, options in (("plain", {}), ("filling", {"cache": True}), ("filled", {"cache": True})):
        data = {"root": str(own), **options}
        wanted = experiment(data=data, train={"steps": 12}, output=str(tmp_path / name))
        listed.append({"config": wanted.model_dump(mode="json", by_alias=True), "float64": False, "die_at": None})
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2)
    plain, filling, filled = ((tmp_path / name / "losses.jsonl").read_text() for name in ("plain", "filling", "filled"))
    assert plain == filling == filled
    assert tables(own) == {"train": 48, "val": 20}


@pytest.mark.slow  # 6 s
@pytest.mark.parametrize("kept", [False, True])
def test_memory_does_not_grow_over_eight_epochs(kept: bool, base: Path, tmp_path: Path) -> None:
    """Of this process and its loading ones, after each epoch of 288 pictures of 224×224 (43 MB decoded)."""
    (tmp_path / "imgs").mkdir()
    entries = []
    for i in range(288):
        noise = np.random.default_rng(i).integers(0, 256, (300, 400, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "imgs" / f"{i}.jpg")
        entries.append({"img": f"{i}.jpg", "caption": f"cell {i}"})
    (tmp_path / "img_text_pair.json").write_text(json.dumps(entries))
    part = part_of(tmp_path, replace(checkpoint.open_model(str(base)).pixels, resize=224, crop=(224, 224)))
    pictures = part.pictures.kept_in(cache.opened(part)) if kept else part.pictures
    me, share = psutil.Process(), Share(Order(288, 16, seed=0), 0, 9 * 18, rank=0, size=1)
    source, held = iter(batches.loader(pictures, None, share, 2, CPU)), []
    for step in range(len(share)):
        batches.next_batch(source)
        if step % 18 == 17:
            held.append(sum(process.memory_info().rss for process in (me, *me.children(recursive=True))))
    if kept:  # the processes that filled it are gone
        assert held[1] < held[0]
    batch, told = 16 * 3 * 224 * 224, [f"{size / 1e6:.1f} MB" for size in held]
    # Three batches are read ahead, others are in hand, and the allocator keeps some: it settles in the first epochs
    # (up to six batches were seen, on a busy machine as late as in the fifth), and then nothing may come on top.
    assert held[-1] - held[1 if kept else 0] < 8 * batch, told
    assert held[-1] - held[-3] < 2 * batch, told


def test_other_decoders_have_tables_of_their_own(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pixels may differ: a folder of data may be shared by machines, and kept over an update."""
    part = cache.Part(tmp_path, (), Pictures([], checkpoint.open_model(str(base)).pixels))
    before = part.folder
    monkeypatch.setattr("cytoclip.images.VERSION", "decoder 2")
    assert part.folder != before
