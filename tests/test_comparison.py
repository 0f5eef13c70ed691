"""Several runs side by side: who is better, and whether that can be said at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import comparison, record, retrieval
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.pairs import identities
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


def test_hits_are_those_of_the_metric(three: list[Path]) -> None:
    read = record.read(three[0])
    embedded = read.embedded("val", "best")
    assert embedded is not None
    pairs = record.pairs(read, "val", embedded, QUIET)
    for direction, sides in (("image_to_text", (embedded.image_ND, embedded.text_ND)),
                             ("text_to_image", (embedded.text_ND, embedded.image_ND))):  # fmt: skip
        rates = retrieval.hit_rates(*sides, identities(pairs), [1, 10])
        for key, value in (("hit@1", rates.strict[1]), ("hit@10_groups", rates.groups[10])):
            hits = comparison._hits(embedded, pairs, direction, key)
            assert len(hits) == 20
            assert hits.mean() == pytest.approx(value)


def test_the_interval_draws_clusters() -> None:
    """20 equal pairs of one cluster tell no more than one: the interval is as wide as that of one pair a cluster."""
    drawn = np.random.default_rng(0).normal(size=30)
    alone = comparison.paired_interval(drawn, np.zeros(30), np.arange(30))
    repeated = comparison.paired_interval(np.repeat(drawn, 20), np.zeros(600), np.repeat(np.arange(30), 20))
    assert repeated == pytest.approx(alone)
    naive = comparison.paired_interval(np.repeat(drawn, 20), np.zeros(600), np.arange(600))
    assert naive[1] - naive[0] < (alone[1] - alone[0]) / 3
    error = drawn.std() / np.sqrt(30)
    assert alone == pytest.approx((drawn.mean() - 1.96 * error, drawn.mean() + 1.96 * error), abs=0.08)


def test_unequal_clusters_are_put_together_whole() -> None:
    """The slow and obvious way: the rows of the clusters that are drawn, one behind another, and their mean."""
    cluster = np.repeat(np.arange(5), [1, 2, 3, 10, 40])
    one, other = np.random.default_rng(0).normal(size=(2, 56)) + cluster
    again, means = np.random.default_rng(0), []
    for _ in range(comparison.RESAMPLES):
        rows = np.concatenate([np.flatnonzero(cluster == drawn) for drawn in again.integers(0, 5, 5)])
        means.append((one[rows] - other[rows]).mean())
    assert comparison.paired_interval(one, other, cluster) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))


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
    page = comparison.page([tmp_path / "one", tmp_path / "two"], None, QUIET)
    assert '<th scope="row">data.root</th><td>…</td><td>…</td>' in page
    assert "Jane" not in page
