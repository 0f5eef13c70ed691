"""The page: whole, small, with nothing of the data taken for markup, and without it where that is asked."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import conclusion, config, record, report_page
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests import runs
from tests.conftest import write_split
from tests.test_check_page import Reader

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def page(told: Path) -> str:
    return report_page.page(record.read(told), QUIET)


@pytest.fixture
def copied(told: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(told, tmp_path / "copied"))


def changed(folder: Path, **keys: Any) -> str:
    """The page of a run whose results.json has other keys."""
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | keys))
    return report_page.page(record.read(folder), QUIET)


def test_the_page_is_whole_asks_for_nothing_and_is_small(page: str) -> None:
    read = Reader(page)
    assert read.open == []
    pictures = [one for one in read.asked if not one.startswith("#")]
    assert len(pictures) > 30
    assert all(one.startswith("data:image/jpeg;base64,") for one in pictures)
    assert not {"script", "link", "iframe", "object", "form"} & set(read.tags)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 5e6
    assert "Not in this run folder" not in page
    assert {one[1:] for one in read.asked if one.startswith("#")} <= set(re.findall(r'id="([a-z]+)"', page))


@pytest.mark.parametrize(("count", "doubted"), [(3, True), (20, False)])
def test_intervals_of_few_sources_are_doubted_before_the_first_of_them(count: int, doubted: bool, copied: Path) -> None:
    val = json.loads((copied / "results.json").read_text())["val"]
    best = val["best"] | {"clusters": {"by": "source", "count": count}}
    above = changed(copied, val=val | {"best": best}).partition('id="scores"')[0]
    assert ("On val, intervals are drawn from 3 sources: with so few they are too narrow." in above) == doubted


def test_headings_are_in_order(page: str) -> None:
    levels = [int(tag[1]) for tag in Reader(page).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_numbers_are_those_of_results_json(page: str, told: Path) -> None:
    val = json.loads((told / "results.json").read_text())["val"]
    for direction in ("image_to_text", "text_to_image"):
        for key, best in val["best"][direction].items():
            low, high = val["best"]["intervals"][direction][key]
            scale, unit = (1, "") if "rank" in key else (100, " %")
            cell = f"{scale * best:.1f}{unit} <small>[{scale * low:.1f}, {scale * high:.1f}]</small>"
            assert cell in page, key
    assert conclusion.verdict(conclusion.judged({"val": val})[0]).text in page


def test_an_old_run_has_a_page_that_says_what_is_missing(done: tuple[Any, Any], tmp_path: Path) -> None:
    """Only what a run had before there were reports."""
    wanted, _ = done
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.yaml", "results.json", "losses.jsonl"):
        shutil.copy(Path(wanted.output) / name, old / name)
    results = json.loads((old / "results.json").read_text())
    flat = (
        "steps",
        "best_step",
        "before",
        "last",
        "best",
        "ks",
        "seconds",
        "pairs_seen",
        "processes",
        "device",
        "skipped",
    )
    (old / "results.json").write_text(json.dumps({key: results[key] for key in flat}))
    page = report_page.page(record.read(old), QUIET)
    assert "was not measured" in page or "better than chance" in page
    missing = re.findall(r"Not in this run folder, and so not here: (.*?)\.</p>", page)[0]
    for what in ("curves.jsonl", "validations.jsonl", "embeddings of val", "intervals"):
        assert what in missing
    assert ">loss</h3>" in page
    assert Reader(page).open == []


def test_data_that_are_gone_cost_only_what_needs_them(copied: Path) -> None:
    (copied / "config.yaml").write_text("data: {root: nowhere}\n")
    page = report_page.page(record.read(copied), QUIET)
    assert "the pairs of val (" in page
    assert 'id="gallery"' not in page
    assert 'id="slices"' in page


def test_private_pages_hold_no_picture_caption_name_or_place(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "Jane Doe"
    shutil.copytree(root, data)
    embeddings = runs.random_embeddings(20, 0.5), runs.random_embeddings(20, 1.5)
    pairs = runs.write(tmp_path / "shared", data, {"val": embeddings}, images=False)
    skipped = {"Jane Doe/1.png": 2}
    findings = {"findings": [{"title": "odd pictures", "severity": "warning", "count": 2, "of": 20, "split": "val",
                              "detail": "Jane Doe", "cases": [{"name": "Jane Doe"}]}]}  # fmt: skip
    page = changed(tmp_path / "shared", skipped=skipped, findings=findings)
    assert "data:image" not in page
    assert "<img" not in page
    assert "report.images is false" in page
    assert "Jane" not in page
    assert str(tmp_path) not in page
    words = [*pairs.captions, *pairs.names, *(source for source in pairs.sources if source)]
    assert not [word for word in words if word in page]
    assert "odd pictures: 2 of 20 in val" in page
    assert "number 1" in page  # a slice by source
    assert any(label in page for label in pairs.labels if label)


def test_hostile_names_captions_and_numbers_stay_text(root: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(root, tmp_path / "data"))
    listed = json.loads((data / "val" / "img_text_pair.json").read_text())
    evil = "<script>alert(1)</script>{{ 7 * 7 }}\"'><img src=x onerror=alert(2)>"
    for i, entry in enumerate(listed):
        entry |= {"caption": f"{evil} {i}", "label": evil if i % 2 else "b", "source": evil}
    (data / "val" / "img_text_pair.json").write_text(json.dumps(listed))
    folder = tmp_path / "<script>run"
    runs.write(folder, data, {"val": (runs.random_embeddings(20, 0.5), runs.random_embeddings(20, 1.5))})
    page = changed(folder, select_by=evil, skipped={evil: 1}, hardware={"cpu": evil, "cores": 2, "memory_gb": 8.0},
                   versions={evil: evil},
                   classification=runs.both_told_apart([evil, "b"]),
                   findings={"findings": [{"title": evil, "severity": evil, "count": 1, "of": 1}]})  # fmt: skip
    read = Reader(page)
    assert "script" not in read.tags
    assert "{{ 7 * 7 }}" in page
    assert all(one.startswith(("data:image/jpeg", "#")) for one in read.asked)


def test_classification_is_a_table_and_a_matrix(copied: Path) -> None:
    found = runs.both_told_apart(["a", "b", "c"])
    page = changed(copied, classification=found)
    for name, best in found["best"]["zero_shot"].items():
        (row,) = re.findall(rf'rowheader">{name.replace("_", " ")}</th>(.*?)</tr>', page, re.IGNORECASE)
        cells = re.findall(r'data-is="(.*?)">(.*?)</td>', row)
        assert [cell[0] for cell in cells] == ["chance", "before", "after"]
        assert cells[0][1] == f"{100 * best['chance']:.1f} %"
        for (_, cell), one in zip(cells[1:], (found["before"]["zero_shot"][name], best), strict=True):
            low, high = one["interval"]
            assert cell == f"{100 * one['value']:.1f} % <small>[{100 * low:.1f}, {100 * high:.1f}]</small>"
    assert f"confusion, after. {np.trace(found['best']['confusion']):.4g} of 60 on the diagonal" in page


def test_what_is_undefined_of_a_classification_is_a_dash(copied: Path) -> None:
    found = runs.both_told_apart(["a", "b"])
    found["best"]["zero_shot"]["auroc"] = {"value": None, "interval": None, "chance": None, "why": "one class"}
    found["best"]["zero_shot"]["accuracy"]["interval"] = None
    page = changed(copied, classification=found)
    assert re.search(r'AUROC</th><td role="cell" data-is="chance">–</td>.*?data-is="after">–</td>', page)
    assert re.search(r'>accuracy</th>.*?data-is="after">\d+\.\d %</td>', page)


def test_one_cluster_has_no_intervals_and_no_word_of_noise(copied: Path) -> None:
    val = json.loads((copied / "results.json").read_text())["val"]
    for side in ("image_to_text", "text_to_image"):
        val["best"]["intervals"][side] = val["before"]["intervals"][side] = {}
        for told in val["difference"][side].values():
            told |= {"interval": None, "beyond_noise": False}
    page = changed(copied, val=val)
    assert "whether that is beyond noise was not measured" in page
    assert ">within noise<" not in page


def test_the_test_split_is_judged_first_and_either_can_be_asked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, count, seed in (("val", 8, 1), ("test", 6, 2)):
        write_split(data / name, count, seed)
    splits = {name: (runs.random_embeddings(n, 0.1), runs.random_embeddings(n, 2.0)) for name, n in
              (("val", 8), ("test", 6))}  # fmt: skip
    runs.write(tmp_path / "run", data, splits)
    read = record.read(tmp_path / "run")
    page = report_page.page(read, QUIET)
    assert "6 pairs of test" in re.findall(r'class="verdict[^>]*>(.*?)</p>', page)[0]
    assert "Retrieval gallery, test" in page
    assert page.index("<h3>test") < page.index("<h3>val")
    assert "Retrieval gallery, val" in report_page.page(read, QUIET, "val")
    (tmp_path / "run" / "results.json").write_text(json.dumps({k: v for k, v in read.results.items() if k != "test"}))
    with pytest.raises(UserError, match="was not scored on test"):
        report_page.page(record.read(tmp_path / "run"), QUIET, "test")


def test_size_is_bounded(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is long: steps, values of a slice, skipped pictures."""
    steps, noise = range(1, 200_001), np.random.default_rng(0).normal(size=200_000)
    with (copied / "losses.jsonl").open("w") as stream:
        stream.writelines(f'{{"step": {i}, "loss": {x:.4f}, "lr": 1e-3, "logit_scale": 4.6}}\n' for i, x in zip(
            steps, noise, strict=True))  # fmt: skip
    results = json.loads((copied / "results.json").read_text())
    one = next(iter(results["val"]["best"]["slices"]["label"].values()))
    results["val"]["best"]["slices"]["source"] = {f"slide {i}": one for i in range(5_000)}
    results["val"]["best"]["slices"] |= {f"key {i}": {f"value {j}": one for j in range(50)} for i in range(100)}
    names = [f"class {i}" for i in range(30)]
    many = runs.both_told_apart(names)
    findings = {"findings": [{"title": "t" * 50, "severity": "note", "count": 1, "of": 2}] * 3_000}
    skipped = {f"{i}.png": 1 for i in range(20_000)}
    page = changed(copied, val=results["val"], findings=findings, classification=many, skipped=skipped)
    assert ">confusion, after</h3>" in page
    assert ">confusion, after</h3>" not in changed(copied, classification=runs.both_told_apart([*names, "one more"]))
    assert len(page.encode()) < 5e6 - report_page.BUDGET + sum(map(len, Reader(page).asked))
    monkeypatch.setattr(report_page, "BUDGET", 30_000)
    small = report_page.page(record.read(copied), QUIET)
    assert 0 < sum(len(one) for one in Reader(small).asked if one.startswith("data:")) <= 30_000


def test_a_run_ends_with_its_page_and_cards(done: tuple[config.Config, Any]) -> None:
    run = Path(done[0].output)
    page = (run / "report.html").read_text()
    assert Reader(page).open == []
    assert (run / "best" / "README.md").is_file()
    assert (run / "model" / "README.md").is_file()
    assert "report: " in (run / "train.log").read_text()


def test_a_page_that_fails_is_a_warning(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail(*_: Any) -> str:
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "page", fail)
    report_page.write(copied, Console())
    assert capsys.readouterr().err == (
        f"warning: report.html was not written (RuntimeError: no ink); `cytoclip report {copied}` tries again\n"
    )
    assert not (copied / "report.html").exists()
