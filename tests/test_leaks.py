"""What repeats and what leaks, from pairs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cytoclip import jobs, leaks
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import start
from cytoclip.kinds import Finding
from cytoclip.leaks import Face
from cytoclip.pairs import Pairs


def pairs(*rows: tuple[str, str, str | None, str | None], prefix: str = "") -> Pairs:
    """Pairs of (content, caption, group, source), with pictures named by their row."""
    names = tuple(f"{prefix}{i}.png" for i in range(len(rows)))
    contents, captions, groups, sources = (tuple(column) for column in zip(*rows, strict=True))
    none = (None,) * len(rows)
    return Pairs(tuple(map(Path, names)), names, captions, groups, sources, none, contents)  # type: ignore[arg-type]


def told(findings: list[Finding]) -> dict[tuple[str, str], list[str]]:
    return {(one.kind, one.split): [case.text() for case in one.cases] for one in findings}


def test_leaks_name_both_sides_and_never_meet_within_a_split() -> None:
    train = pairs(("a", "1", "g", "s"), ("a", "2", "g", "s"), ("b", "3", None, None), ("c", "", "", ""))
    val = pairs(("b", "4", None, None), ("d", "5", "g", None), ("e", "6", "", ""), prefix="v")
    test = pairs(("a", "7", None, "s"), ("d", "8", None, None), prefix="t")
    assert told(leaks.across({"train": train, "val": val, "test": test})) == {
        ("leak-content", "val and train"): ["val/v0.png = train/2.png"],
        ("leak-group", "val and train"): ["val/v1.png = train/0.png (g)"],
        ("leak-content", "test and train"): ["test/t0.png = train/0.png"],
        ("leak-source", "test and train"): ["test/t0.png = train/0.png (s)"],
        ("leak-content", "test and val"): ["test/t1.png = val/v1.png"],
    }


def test_an_identifier_in_a_source_is_masked() -> None:
    both = pairs(("a", "1", None, "patient 4711001"))
    found = leaks.across({"train": both, "val": replace(both, contents=("b",))})
    assert told(found) == {("leak-source", "val and train"): ["val/0.png = train/0.png ([record number])"]}


def test_repeats_are_counted_once_and_by_the_key_that_the_loss_uses() -> None:
    one = pairs(
        ("a", "A cell.", None, None),
        ("a", "A cell.", None, None),  # the pair again
        ("a", "Another.", None, None),  # its picture again
        ("b", "A\u00a0cell.", None, None),  # its caption again
        ("c", "a cell.", None, None),  # case is kept
    )
    assert told(leaks.within("train", one)) == {
        ("repeated-pairs", "train"): ["train/1.png = train/0.png"],
        ("repeated-pictures", "train"): ["train/2.png = train/0.png"],
        ("repeated-captions", "train"): ["train/3.png = train/0.png"],
    }


def test_alike_pictures_are_told_once_within_and_with_both_sides_between_splits() -> None:
    train = pairs(("a", "1", None, None), ("b", "2", None, None), ("far", "3", None, None), ("flat", "4", None, None))
    val = pairs(("c", "5", None, None), ("a", "6", None, None), ("flat2", "7", None, None), prefix="v")
    hashes = {"a": (0b0, 0b1), "b": (0b11 << 60, 0b11 << 61), "far": (2**50 - 1, 2**50 - 1), "c": (0b111, 0b111)}
    faces = {content: Face(both, bytes(range(256))) for content, both in hashes.items()}
    assert told(leaks.alike({"train": train, "val": val}, faces)) == {
        ("alike", "train"): ["train/1.png = train/0.png (2 of 64 bits differ)"],
        ("alike", "val"): ["val/v1.png = val/v0.png (2 of 64 bits differ)"],
        ("leak-alike", "val and train"): ["val/v0.png = train/0.png (2 of 64 bits differ)"],
    }
    assert leaks.alike({"train": train}, {}) == []
    faces["b"] = Face(hashes["b"], bytes(range(0, 256, 2)) * 2)
    assert [one.split for one in leaks.alike({"train": train, "val": val}, faces)] == ["val and train", "val"]


def test_training_warns_of_leaks_and_points_to_the_check(
    experiment: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The root of these tests has groups of the same names in both splits."""
    wanted = experiment()
    jobs.prepare(wanted, RunFolder(tmp_path / "run"), start("cpu", "no"), Console())
    lines = [line for line in capsys.readouterr().err.splitlines() if "in two splits" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: groups that are in two splits: ")
    assert "val/000.png = train/000.png (group 0)" in lines[0]
    assert lines[0].endswith("`cytoclip check` shows all")


def test_a_replayed_root_may_leak_too_but_not_into_what_is_trained_on() -> None:
    splits = {
        "train": pairs(("a", "1", None, None), ("b", "2", None, None)),
        "val": pairs(("c", "3", None, None), prefix="v"),
        "replay 1": pairs(("c", "4", None, None), ("a", "5", None, None), prefix="r"),
        "replay 2": pairs(("a", "6", None, None), prefix="s"),
    }
    assert told(leaks.across(splits)) == {("leak-content", "replay 1 and val"): ["replay 1/r0.png = val/v0.png"]}


def test_training_names_what_a_replayed_root_leaks(
    experiment: Callable[..., Config], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = experiment(data={"replay": [{"root": str(root / "val"), "weight": 0.5}]})
    jobs.prepare(wanted, RunFolder(tmp_path / "run"), start("cpu", "no"), Console())
    assert "20 of 20 pairs in replay 1 and val" in capsys.readouterr().err
