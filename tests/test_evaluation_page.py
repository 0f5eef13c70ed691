"""The page of `cytoclip evaluate`: the numbers of the document, and nothing that may not leave."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import conclusion, evaluation_page, measure
from cytoclip.evaluation import Compared
from tests import runs
from tests.test_check_page import Reader

SIDES = {"image_to_text": "image → text", "text_to_image": "text → image"}


def page(found: Compared, root: Path, images: bool | None = None) -> str:
    made = evaluation_page.page(found, "val", root / "val", images)
    read = Reader(made)
    assert read.open == []
    assert not {"script", "link", "iframe"} & set(read.tags)
    assert all(one.startswith(("data:image/jpeg;base64,", "#")) for one in read.asked)
    assert {one[1:] for one in read.asked if one.startswith("#")} <= set(re.findall(r'id="([a-z]+)"', made))
    return made


def verdict(made: str) -> tuple[str, str]:
    ((colour, text),) = re.findall(r'class="verdict (\w+)">(.*?)</p>', made)
    return colour, html.unescape(text)


def rows(made: str, start: str) -> dict[str, list[str]]:
    """Of the table whose caption begins so: cells without markup, by the row's name."""
    (table,) = re.findall(rf"<caption>{start}.*?</table>", made, re.DOTALL)
    listed = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in listed]
    bare = [[" ".join(re.sub(r"<.*?>", "", cell).split()) for cell in row] for row in cells]
    return {row[0]: row[1:] for row in bare}


def printed(key: str, number: float, ends: list[float] | None = None) -> str:
    scale, unit = (1, "") if "rank" in key else (100, " %")
    return f"{scale * number:,.1f}{unit}" + (f" [{scale * ends[0]:,.1f}, {scale * ends[1]:,.1f}]" if ends else "")


def named(key: str) -> str:
    name = key.removesuffix("_groups").replace("_", " ").replace("mrr", "MRR").replace("map", "mAP")
    return name + (" by group" if key.endswith("_groups") else "")


def test_one_model_against_a_base_has_the_numbers_of_the_document(root: Path) -> None:
    found = runs.evaluated(root, ["base", "runs/first"])
    made = page(found, root)
    base, model = found.document("val")["models"]
    for side, title in SIDES.items():
        table = rows(made, f"{title}: each of 20 ")
        assert table["metric"] == ["chance", "base", "model", "difference", "beyond noise"]
        assert len(table) == len(model[side]) + 1
        for key, value in model[side].items():
            told = model["difference"][side][key]
            cells = table[named(key)]
            assert cells[0] == printed(key, model["chance"][key])
            assert cells[1] == printed(key, base[side][key], base["intervals"][side][key])
            assert cells[2] == printed(key, value, model["intervals"][side][key])
            scale = 1 if "rank" in key else 100
            numbers = [float(one) for one in re.findall(r"[-+]?\d+\.\d", cells[3].replace("−", "-"))]
            assert numbers == [pytest.approx(scale * one, abs=0.0500001) for one in (told["by"], *told["interval"])]
            assert (cells[4] == "within noise") == (not told["beyond_noise"]), key
    colour, text = verdict(made)
    assert "of the base (chance" in text
    judged = model["difference"]["image_to_text"]["hit@10_groups"]
    assert (colour, "within noise" in text) == (("good", False) if judged["beyond_noise"] else ("warning", True))
    assert "<h1>runs/first</h1>" in made
    for part in ("slices", "embeddings", "gallery", "run"):
        assert f'id="{part}"' in made
    assert "cosine, base: mean" in made
    assert "(base: " in made
    assert str(root) in made
    assert "run folder" not in made
    assert "4 sources, drawn 1,000 times: with so few they are too narrow" in made
    assert "On val, intervals are drawn from 4 sources: with so few they are too narrow." in made


def test_one_model_alone_is_held_against_chance(root: Path) -> None:
    found = runs.evaluated(root, ["runs/first"], [str(root)])
    found = replace(found, embedded={"runs/first": runs.random_embeddings(20, 3.0)})
    found.measured["runs/first"] = measure.full(*found.embedded["runs/first"], found.pairs, runs.KS)
    made = page(found, root)
    colour, text = verdict(made)
    assert "better than chance (" in text
    assert colour == "good"
    table = rows(made, "image → text: each of 20 ")
    assert table["metric"] == ["chance", "model"]
    scores = found.measured["runs/first"].scores
    assert table["hit@10"][1] == printed("hit@10", scores["image_to_text"]["hit@10"],
                                         scores["intervals"]["image_to_text"]["hit@10"])  # fmt: skip
    for word in ("base", "difference", "before"):
        assert word not in re.sub(r"data:[^\"]*|<style>.*?</style>", "", made, flags=re.DOTALL)


def test_a_model_that_knows_nothing_is_said_to(root: Path) -> None:
    found = runs.evaluated(root, ["m"])
    found.embedded["m"] = torch.ones(20, 2) / 2**0.5, torch.ones(20, 2) / 2**0.5
    found.measured["m"] = measure.full(*found.embedded["m"], found.pairs, runs.KS)
    colour, text = verdict(page(found, root))
    assert "not shown to be better than chance (" in text
    assert colour == "error"


def test_several_models_stand_side_by_side(root: Path) -> None:
    found = runs.evaluated(root, ["base", "runs/first", "runs/second"])
    made = page(found, root)
    base, *models = found.document("val")["models"]
    for side, title in SIDES.items():
        table = rows(made, f"{title}; the best of each row is marked")
        assert table["metric"] == ["chance", "base", "runs/first", "runs/second"]
        against = rows(made, f"{title}, with 95 % intervals")
        assert against["metric"] == ["runs/first", "runs/second"]
        for key in base[side]:
            cells = [cell.removeprefix("★ best: ") for cell in table[named(key)][1:]]
            assert cells == [printed(key, one[side][key], one["intervals"][side][key]) for one in (base, *models)]
            assert ["within noise" in cell for cell in against[named(key)]] == [
                not one["difference"][side][key]["beyond_noise"] for one in models
            ], key
    _, text = verdict(made)
    best, second = sorted((base, *models), key=lambda one: -one["image_to_text"]["hit@10_groups"])[:2]
    assert f"of {best['model']} against " in text
    told = measure.difference(found.measured[best["model"]], found.measured[second["model"]])
    one = told["image_to_text"]["hit@10_groups"]
    assert ("beyond noise (" in text) == one["beyond_noise"]
    assert f"({conclusion.difference('hit@10', one['by'], one['interval'])})" in text
    for word in ("The runs", "What was different", "Curves"):
        assert f"<h2>{word}</h2>" not in made


def test_several_models_without_a_base(root: Path) -> None:
    made = page(runs.evaluated(root, ["a", "b"]), root)
    assert "Differences to the base" not in made
    assert rows(made, "image → text; the best")["metric"] == ["chance", "a", "b"]


def test_equally_good_ones_are_all_marked(root: Path) -> None:
    found = runs.evaluated(root, ["a", "b"])
    found.measured["b"] = found.measured["a"]
    table = rows(page(found, root), "image → text; the best")
    assert all(cell.startswith("★") for cells in list(table.values())[1:] for cell in cells[1:])


def test_one_source_has_no_intervals_and_the_page_says_so(root: Path) -> None:
    data = runs.evaluated(root, ["base", "m", "n"])
    pairs = replace(data.pairs, sources=("one",) * 20)
    measured = {title: measure.full(*both, pairs, runs.KS) for title, both in data.embedded.items()}
    differences = {title: measure.difference(measured[title], measured["base"]) for title in ("m", "n")}
    found = replace(data, pairs=pairs, measured=measured, differences=differences)
    assert "is not known (all pairs are of one source)" in verdict(page(found, root))[1]
    assert "none: 1 source says nothing of others" in page(found, root)
    kept = {key: {title: value[title] for title in ("base", "m")} for key, value in
            (("names", found.names), ("measured", measured), ("embedded", found.embedded))}  # fmt: skip
    alone = replace(found, **kept, differences={"m": differences["m"]})
    assert "whether that is beyond noise was not measured" in verdict(page(alone, root))[1]


@pytest.mark.parametrize("titles", [["{}"], ["base", "{}"], ["base", "{}", "m"]])
def test_hostile_names_stay_text(root: Path, titles: list[str]) -> None:
    evil = "<script>alert(1)</script>{{ 7 * 7 }}\"'><img src=x onerror=alert(2)>"
    named = [evil if title == "{}" else title for title in titles]
    made = page(runs.evaluated(root, named, [evil] * len(named)), root)
    assert "{{ 7 * 7 }}" in made
    assert "<img src=x" not in made
    assert evaluation_page.page(runs.evaluated(root, ["m"]), evil, Path(evil)).count("<script") == 0


def private_run(folder: Path, root: Path, images: bool) -> str:
    runs.write(folder, root, {"val": (runs.random_embeddings(20, 0.1),) * 2}, images=images)
    return str(folder)


@pytest.mark.parametrize("of", ["base", "model", "other"])
def test_a_run_that_may_not_be_shown_takes_the_pictures_away(root: Path, tmp_path: Path, of: str) -> None:
    """Be it the model, its base or one of several; what may leave does not need to."""
    data = Path(shutil.copytree(root, tmp_path / "Jane Doe" / "data"))
    own = private_run(tmp_path / "Jane Doe" / "run", data, images=False)
    names = {"base": [own, "hub/model"], "model": ["hub/base", own], "other": ["hub/base", "hub/model", own]}[of]
    found = runs.evaluated(data, ["base", *names[1:]], names)
    made = page(found, data)
    assert "data:image" not in made
    words = ["Jane", str(tmp_path), *found.pairs.captions, *found.pairs.names, *filter(None, found.pairs.sources)]
    assert not [word for word in words if word in made]
    assert ("report.images is false, or --no-images was given" in made) == (of != "other")
    if of != "other":
        assert "data:image" in page(found, data, images=True), "as `cytoclip report --images` does"


def test_pictures_stay_away_when_asked(root: Path, tmp_path: Path) -> None:
    shown = private_run(tmp_path / "run", root, images=True)
    found = runs.evaluated(root, ["base", shown], ["hub/base", shown])
    assert page(found, root).count("data:image") > 30
    made = page(found, root, images=False)
    assert "data:image" not in made
    assert "<h1>run</h1>" in made
    assert str(tmp_path) not in made


def test_folders_of_one_name_are_told_apart(root: Path, tmp_path: Path) -> None:
    places = [private_run(tmp_path / name / "run", root, images=False) for name in "ab"]
    made = page(runs.evaluated(root, places), root)
    assert rows(made, "image → text; the best")["metric"] == ["chance", "a/run", "b/run"]
    (tmp_path / "run").mkdir()
    called = evaluation_page._called(runs.evaluated(root, ["run", str(tmp_path / "run")]), images=False)
    assert list(called.values()) == ["1: run", "2: run"]


def test_embeddings_that_are_not_finite_cost_only_what_needs_them(root: Path) -> None:
    found: Any = runs.evaluated(root, ["base", "m"])
    found.embedded["m"] = (torch.full((20, 16), torch.nan), found.embedded["m"][1])
    made = page(found, root)
    assert 'id="gallery"' not in made
    assert "not all embeddings are finite" in made
    assert json.dumps(found.document("val"))
