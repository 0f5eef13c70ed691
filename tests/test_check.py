"""The check of a data root: one planted fault of each kind is found by name, and nothing else is."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from cytoclip import check, looks
from cytoclip.console import Console
from cytoclip.kinds import KINDS, SEVERITIES
from cytoclip.looks import Look, Place
from cytoclip.verdict import Report
from tests import planted

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
    assert len(KINDS) == 37
    assert set(KINDS) - set(kinds) == {"no-validation", "decoder-died"}, "each has a test of its own below"
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
