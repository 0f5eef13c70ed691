"""Several runs side by side: who is better, and whether that can be said at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import comparison, measure, record
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests import runs
from tests.conftest import write_split
from tests.test_check_page import Reader

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def three(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of the same pairs: weak, strong, and one that is weak in another way."""
    folder = tmp_path_factory.mktemp("three")
    start = runs.random_embeddings(20, 0.0)
    for name, together, seed in (("weak", 0.0, 1), ("strong", 3.0, 2), ("other", 0.0, 3)):
        end = runs.random_embeddings(20, together, seed)
        runs.write(folder / name, root, {"val": (start, end)}, steps=30 if name == "other" else 40)
    return [folder / name for name in ("weak", "strong", "other")]


def verdict(page: str) -> tuple[str, str]:
    ((colour, text),) = re.findall(r'class="verdict (\w+)">(.*?)</p>', page)
    return colour, text


def test_the_better_one_is_named_beyond_noise(three: list[Path]) -> None:
    page = comparison.page(three, None, QUIET)
    colour, text = verdict(page)
    assert colour == "good"
    assert text.startswith("strong is the better one. hit@10 by group (image → text, val): ")
    assert "beyond noise (+" in text
    read = Reader(page)
    assert read.open == []
    assert read.asked == []
    assert "script" not in read.tags


def test_within_noise_neither_is_better(three: list[Path]) -> None:
    colour, text = verdict(comparison.page([three[0], three[2]], None, QUIET))
    assert colour == "warning"
    assert "within noise" in text
    assert "neither is shown to be better" in text


def test_other_pairs_cannot_be_held_against_each_other(three: list[Path], tmp_path: Path) -> None:
    write_split(tmp_path / "data" / "val", 20, seed=9)
    runs.write(tmp_path / "run", tmp_path / "data", {"val": (runs.random_embeddings(20, 0.0),) * 2})
    colour, text = verdict(comparison.page([three[1], tmp_path / "run"], None, QUIET))
    assert colour == "warning"
    assert "they ranked different pairs" in text
    assert "beyond" not in text


@pytest.mark.parametrize("gone", ["embeddings", "config.yaml"])
def test_without_embeddings_or_pairs_noise_is_not_known(three: list[Path], tmp_path: Path, gone: str) -> None:
    copied = [Path(shutil.copytree(one, tmp_path / one.name)) for one in three[:2]]
    for one in copied:
        if gone == "embeddings":
            shutil.rmtree(one / "embeddings")
        else:
            (one / "config.yaml").write_text("data: {root: nowhere}\n")
    colour, text = verdict(comparison.page(copied, None, QUIET))
    assert colour == "warning"
    assert "is not known" in text


def test_differences_of_the_configuration_and_the_best_of_each_row(three: list[Path]) -> None:
    page = comparison.page(three, None, QUIET)
    (row,) = re.findall(r'<tr><th scope="row">train.steps</th>(.*?)</tr>', page)
    assert re.findall(r"<td>(\d+)</td>", row) == ["40", "40", "30"]
    assert '<th scope="row">output</th>' not in page
    best = [json.loads((one / "results.json").read_text())["val"]["best"] for one in three]
    (row, _) = re.findall(r'<tr><th scope="row">median rank by group</th>(.*?)</tr>', page)
    marked = [" class=" in cell for cell in re.findall(r"<td[^>]*>", row)][1:]
    assert marked.index(True) == int(np.argmin([one["image_to_text"]["median_rank_groups"] for one in best]))


def test_noise_is_that_of_an_evaluation(three: list[Path]) -> None:
    """The runs' own embeddings, ranked again, and drawn by cluster."""
    reads = [record.read(folder) for folder in three[:2]]
    one, other = comparison._columns(reads, None)
    embedded = [read.embedded("val", "best") for read in reads]
    assert embedded[0] is not None
    assert embedded[1] is not None
    pairs = record.pairs(reads[0], "val", embedded[0], QUIET)
    full = [measure.full(each.image_ND, each.text_ND, pairs, [5]) for each in embedded if each]
    for direction in ("image_to_text", "text_to_image"):
        found = measure.difference(*full)[direction]
        for key in ("hit@5", "hit@5_groups", "recall@5_groups", "mrr", "median_rank_groups"):
            assert comparison._noise(one, other, direction, key, QUIET) == tuple(found[key]["interval"]), key


def test_runs_of_one_name_are_told_apart(three: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(three[0], tmp_path / name / "run")
    assert "<h1>a/run · b/run</h1>" in comparison.page([tmp_path / "a" / "run", tmp_path / "b" / "run"], None, QUIET)


def test_what_cannot_be_compared_is_refused(three: list[Path]) -> None:
    with pytest.raises(UserError, match="too many"):
        comparison.page([three[0]] * 9, None, QUIET)
    with pytest.raises(UserError, match="not all of the runs were scored on test"):
        comparison.page(three, "test", QUIET)


def test_a_run_that_may_not_show_its_places_keeps_them(root: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(root, tmp_path / "Jane Doe"))
    start: Any = runs.random_embeddings(20, 0.0)
    runs.write(tmp_path / "one", data, {"val": (start, start)}, images=False)
    runs.write(tmp_path / "two", root, {"val": (start, start)})
    place = tmp_path / "one" / "config.yaml"
    place.write_text(place.read_text().replace("replay: []", f"replay: [{{root: {data}, weight: 0.5}}]"))
    page = comparison.page([tmp_path / "one", tmp_path / "two"], None, QUIET)
    assert '<th scope="row">data.replay</th><td>…</td><td>…</td>' in page
    assert '<th scope="row">data.root</th><td>…</td><td>…</td>' in page
    assert "Jane" not in page
