"""The check of a data root: one planted fault of each kind is found by name, and nothing else is."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cytoclip import check, files, images, looks, verdict
from cytoclip.check import Asked
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.kinds import KINDS, SEVERITIES
from cytoclip.looks import Look, Place
from cytoclip.rows import Columns
from cytoclip.verdict import Report
from tests import planted
from tests.test_cache import Heard, run, same_weights, tables

Experiment = Callable[..., Config]
QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.clean(tmp_path_factory.mktemp("clean") / "data")


@pytest.fixture
def bed(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "data"))


def found(report: Report) -> dict[str, list[str]]:
    assert len({one.kind for one in report.findings}) == len(report.findings), "a kind is found in one split only"
    return {
        one.kind: [f"{case.split}/{case.name}" + (f" = {case.twin.split}/{case.twin.name}" if case.twin else "")
                   for case in one.cases]
        for one in report.findings
    }  # fmt: skip


def test_a_clean_set_reports_nothing(clean: Path, base: Path) -> None:
    report = check.check(clean, str(base), None, QUIET)
    assert found(report) == {}
    assert not report.needs_a_hand
    assert report.verdict() == "Ready: nothing here needs a hand."


def test_every_planted_fault_is_found_by_kind_count_and_name_and_nothing_else(bed: Path, base: Path) -> None:
    kinds = list(planted.PLANTS)
    assert len(KINDS) == 41
    others = {"no-validation", "decoder-died", "nothing-to-learn", "little-to-learn"}
    assert set(KINDS) - set(kinds) == others, "each has a test of its own below"
    expected = planted.plant(bed, kinds)
    report = check.check(bed, str(base), 500, QUIET)
    assert found(report) == expected
    assert report.needs_a_hand
    severities = [one.severity for one in report.findings]
    assert severities == sorted(severities, key=list(SEVERITIES).index)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in planted.PLANTS if kind != "few-pairs"])
def test_each_fault_alone(kind: str, bed: Path, base: Path) -> None:
    expected = planted.plant(bed, [kind])
    report = check.check(bed, str(base), None, QUIET)
    assert found(report) == expected
    assert report.needs_a_hand == (KINDS[kind].severity != "note")
    assert KINDS[kind].fix in report.text()


def test_pictures_within_shards_are_checked_like_files(bed: Path) -> None:
    """WebDataset shards beside a folder: a leak between the two, and a damaged member."""
    with tarfile.open(bed / "test.tar", "w") as shard:
        for name, data in (("same", (bed / "train" / "imgs" / "00.jpg").read_bytes()), ("cut", b"\xff\xd8\xff\xe0")):
            for member, content in ((f"{name}.jpg", data), (f"{name}.txt", f"The caption of {name}.".encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    report = check.check(bed, None, None, QUIET)
    kinds = {one.kind: [case.text() for case in one.cases] for one in report.findings}
    assert set(kinds) == {"leak-content", "truncated"}
    assert kinds["leak-content"] == ["test/test.tar/same.jpg = train/00.jpg"]
    assert kinds["truncated"][0].startswith("test/test.tar/cut.jpg")


def test_no_validation_split(bed: Path) -> None:
    shutil.rmtree(bed / "val")
    assert found(check.check(bed, None, None, QUIET)) == {"no-validation": []}


@pytest.mark.parametrize(("captions", "kind"), [(1, "nothing-to-learn"), (3, "little-to-learn"), (20, None)])
def test_captions_that_tell_few_pictures_apart(captions: int, kind: str | None, bed: Path) -> None:
    listed = bed / "train" / "img_text_pair.json"
    entries = json.loads(listed.read_text())
    said = [{**entry, "caption": f"A cell of kind {i % captions}."} for i, entry in enumerate(entries)]
    listed.write_text(json.dumps(said))
    report = check.check(bed, None, 24, QUIET)
    assert set(found(report)) == {"repeated-captions", *([kind] if kind else [])}
    assert report.needs_a_hand == (kind is not None)
    assert ("repeats take" in report.text()) == (kind is not None)
    assert report.verdict().startswith("Not ready") == (kind == "nothing-to-learn")


def test_a_process_that_dies_is_its_files_problem(bed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked, so that the workers have the patched function."""
    whole = looks.look

    def deadly(place: Place) -> Look:
        if Path(str(place)).name in ("05.jpg", "21.jpg"):
            os.kill(os.getpid(), 9)
        return whole(place)

    context = multiprocessing.get_context("fork")
    context.set_forkserver_preload = lambda _: None  # type: ignore[method-assign, assignment]
    monkeypatch.setattr(looks, "look", deadly)
    monkeypatch.setattr(looks.multiprocessing, "get_context", lambda _: context)
    (bed / "val" / "imgs" / "05.jpg").rename(bed / "val" / "imgs" / "a.jpg")
    entries = (bed / "val" / "img_text_pair.json").read_text()
    (bed / "val" / "img_text_pair.json").write_text(entries.replace('"05.jpg"', '"a.jpg"'))
    assert found(check.check(bed, None, None, QUIET)) == {"decoder-died": ["train/05.jpg", "train/21.jpg"]}
    monkeypatch.setattr(looks, "look", whole)
    assert found(check.check(bed, None, None, QUIET)) == {}, "a death is not remembered: there may be memory now"


@pytest.fixture
def own(root: Path, tmp_path: Path) -> Path:
    """The data root of training runs, without a cache."""
    return Path(shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns(files.CACHE)))


@pytest.mark.parametrize("crop", ["auto", "pad"])
def test_a_run_after_the_cache_was_filled_decodes_nothing(
    crop: str, experiment: Experiment, own: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is the run's: one that differed would show as a decoded picture, or as another table."""
    plain = run(experiment, own, "plain", data={"crop": crop})
    heard = Heard()
    check.check(own, str(base), None, heard, Asked(crop=crop, keeps=True))
    assert "68 decoded pictures take 212 kB, 0 of them are there" in heard.of_cache()[0]
    assert tables(own) == {"train": 48, "val": 20}

    def refuse(place: Any, *more: Any) -> Any:
        raise AssertionError(f"{place} was decoded")

    monkeypatch.setattr(images, "decode", refuse)
    assert run(experiment, own, "kept", data={"crop": crop, "cache": True}) == plain
    assert tables(own) == {"train": 48, "val": 20}
    same_weights(own.parent / "plain", own.parent / "kept")


def test_bad_pictures_are_findings_while_the_others_are_kept(
    experiment: Experiment, own: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that can no longer be decoded once it was looked at; a run that skips them reads the same tables."""
    pictures = own / "train" / "imgs"
    (pictures / "003.png").write_bytes(b"")
    (pictures / "004.png").unlink()
    gone, decode = pictures / "005.png", images.decode

    def fails(place: Any, *more: Any) -> Any:
        if place == gone.resolve():
            raise UserError(f"{place}: truncated", "replace the file", ExitCode.DATA)
        return decode(place, *more)

    monkeypatch.setattr(images, "decode", fails)
    check.check(own, None, None, QUIET)  # what was looked at is remembered
    heard = Heard()
    report = check.check(own, str(base), None, heard, Asked(keeps=True))
    assert {one.kind for one in report.findings} >= {"missing", "empty-file"}
    assert "warning: 1 picture could not be kept" in heard.lines[-1]
    assert "005.png: truncated" in heard.lines[-1]
    assert tables(own) == {"train": 45, "val": 20}
    monkeypatch.undo()
    run(experiment, own, "skipping", data={"cache": True, "on_bad_image": "skip"})
    assert tables(own) == {"train": 46, "val": 20}


def test_a_cache_needs_a_checkpoint(own: Path) -> None:
    with pytest.raises(UserError, match="--cache without --model") as error:
        check.check(own, None, None, QUIET, Asked(keeps=True))
    assert "--model" in error.value.hint
    assert tables(own) == {}


def test_pictures_are_held_against_the_crop_that_is_asked_for(own: Path, base: Path) -> None:
    """`base` cuts 32×32 from the middle: of 24×96 it keeps a quarter, and pad and squash keep all."""
    for split in ("train", "val"):
        for picture in (own / split / "imgs").iterdir():
            Image.open(picture).resize((24, 96)).save(picture)

    def kinds(crop: str) -> tuple[set[str], str, float | None]:
        report = check.check(own, str(base), None, QUIET, Asked(crop=crop))
        found = {one.kind for one in report.findings} & {"cropped-away", "enlarged"}
        assert report.document()["crop"] == crop
        return found, verdict.proposed(report)["data"]["crop"], report.facts["train"].lost

    assert kinds("auto") == ({"cropped-away", "enlarged"}, "pad", 0.75)
    assert kinds("center") == ({"cropped-away", "enlarged"}, "center", 0.75)
    assert kinds("squash") == ({"enlarged"}, "squash", 0)
    assert kinds("pad") == (set(), "pad", 0), "its long side is longer than 32"


def test_columns_that_are_not_guessed_are_named(own: Path) -> None:
    for split in ("train", "val"):
        folder = own / split
        with (folder / "metadata.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(
                [["file_name", "text", "second"], *([f"imgs/{i:03}.png", "a cell", f"the cell {i}"] for i in range(20))]
            )
        (folder / "img_text_pair.json").unlink()
        (folder / "imgs").rename(folder / "pictures")
        (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text().replace("imgs/", "pictures/"))
    assert check.check(own, None, None, QUIET).splits["train"].pairs.captions[3] == "a cell"
    report = check.check(own, None, None, QUIET, Asked(columns=Columns(None, "second")))
    assert report.splits["train"].pairs.captions[3] == "the cell 3"


def test_what_is_no_data_root_says_what_may_be_meant(bed: Path, tmp_path: Path) -> None:
    (tmp_path / "a pairs.csv").touch()
    for place, said, hint in (
        (bed / "train", "holds no train", f"name the folder that holds the splits: {bed}"),
        (
            tmp_path / "a pairs.csv",
            "is no folder of splits",
            f"make one of it: `cytoclip bring '{tmp_path / 'a pairs.csv'}' --to",
        ),
        (tmp_path / "dat", "no such folder", f"did you mean {bed}?"),
        (tmp_path / "*.tar", "no files match", "holds a pairs.csv, data"),
        (tmp_path / "*.csv", "is no folder of splits", "cytoclip bring"),
        (tmp_path, "holds no train, val or test split", "name the folder"),
    ):
        with pytest.raises(UserError, match=said) as error:
            check.check(place, None, None, QUIET)
        assert hint in error.value.hint
