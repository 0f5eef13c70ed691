"""Our pages in a real browser: nothing is asked for, nothing is cut, and everybody can read and reach all of it.

Needs Debian's chromium (`.ci/browser` installs it); where there is none the tests are skipped, and fail in CI.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from cytoclip import check, check_page, comparison, evaluation_page, files, kinds, record, report_page
from cytoclip.console import Console
from tests import planted, runs, served

QUIET = Console(quiet=True)
PAGES = ("report", "private", "comparison", "check", "evaluation", "alone", "several")
AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with served.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def made(told: Path, root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each kind of page with as much in it as there can be."""
    folder = tmp_path_factory.mktemp("pages")
    whole = Path(shutil.copytree(told, folder / "whole"))
    results = json.loads((whole / "results.json").read_text())
    found = [{"title": f"finding of {one}", "severity": one, "count": 1, "of": 20} for one in kinds.SEVERITIES]
    told_apart = runs.both_told_apart(["a", "b", "a class with a long name"])
    results |= {"classification": told_apart, "findings": {"findings": found}, "skipped": {"a.png": 1}, "floor": 0.3}
    (whole / "results.json").write_text(json.dumps(results))
    ends = {0.0: results["val"]["before"], 1.0: results["val"]["best"]}
    mixed = [{"alpha": alpha, "val": scores, "keep": ends[1 - alpha]} for alpha, scores in ends.items()]
    files.write_json(whole / "soup" / "soup.json", {"mixtures": mixed})
    end = runs.random_embeddings(20, 0.5)
    runs.write(folder / "private", root, {"val": (end, end)}, images=False)
    long = "/somewhere/" + "a-folder-whose-name-is-long" * 3
    data = planted.clean(folder / "data")
    planted.plant(data, list(planted.PLANTS))
    written = {
        "report": report_page.page(record.read(whole), QUIET),
        "private": report_page.page(record.read(folder / "private"), QUIET),
        "comparison": comparison.page([whole, folder / "private"], None, QUIET),
        "check": check_page.page(check.check(data, str(base), 500, QUIET)),
        "evaluation": evaluation_page.page(runs.evaluated(root, ["base", long]), "val", root / "val"),
        "alone": evaluation_page.page(runs.evaluated(root, [long]), "val", root / "val"),
        "several": evaluation_page.page(runs.evaluated(root, ["base", long, "other"]), "val", root / "val"),
    }
    for name, page in written.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture
def opened(browser: Browser, made: dict[str, Path]) -> Iterator[Callable[..., Page]]:
    """Open a page with the network cut off; what it asked for and complained of is told at the end."""
    contexts, asked, said = [], [], []

    def open_(name: str, width: int = 1280, scheme: Any = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(made[name].as_uri(), wait_until="load")
        return page

    yield open_
    for context in contexts:
        context.close()
    asked_for = [one for one in asked if not one.startswith("data:image/jpeg;base64,")]  # pictures inside the page
    assert len(asked_for) == len(contexts)
    assert all(one.startswith("file:") and one.endswith(".html") for one in asked_for)
    assert said == []


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("report", "light"),
        ("report", "dark"),
        ("comparison", "light"),
        ("check", "light"),
        ("evaluation", "light"),
        ("alone", "light"),
        ("several", "light"),
        ("several", "dark"),
    ],
)
def test_axe_finds_nothing(opened: Callable[..., Page], name: str, scheme: str) -> None:
    """All of axe-core's rules (names, roles, headings, contrast) with every part unfolded; in the dark, contrast."""
    page = opened(name, scheme=scheme)
    page.evaluate(OPEN_ALL)
    page.evaluate("document.querySelectorAll('svg').forEach(one => one.replaceChildren())")  # they have their names
    page.evaluate("document.querySelectorAll('.charts tr:nth-child(n + 4)').forEach(one => one.remove())")  # all alike
    page.evaluate(AXE)
    rules = "{runOnly: 'color-contrast'}" if scheme == "dark" else "{}"
    found = page.evaluate(f"axe.run(document, {rules})")
    assert len(found["passes"]) >= (1 if scheme == "dark" else 15)
    nodes = [(one["id"], node) for one in found["violations"] for node in one["nodes"]]
    wrong = [(rule, node["html"][:200], node["failureSummary"]) for rule, node in nodes]
    assert wrong == []


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_the_screen(opened: Callable[..., Page], name: str) -> None:
    page = opened(name)
    page.evaluate(OPEN_ALL)
    for width in (320, 390, 768):
        served.resize(page, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", ["report", "comparison", "check"])
def test_the_keyboard_reaches_and_opens_everything(opened: Callable[..., Page], name: str) -> None:
    page = opened(name)
    wanted = page.evaluate("document.querySelectorAll('summary, a[href], [tabindex=\"0\"]').length")
    page.evaluate("""() => {
        window.reached = new Set();
        document.addEventListener('focusin', event => window.reached.add(event.target));
    }""")
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('details:not([open]) > summary')"):
            page.keyboard.press("Enter")
    assert page.evaluate("window.reached.size") == wanted
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_table_has_the_numbers_of_results_json(opened: Callable[..., Page], told: Path) -> None:
    val = json.loads((told / "results.json").read_text())["val"]
    page = opened("report")
    tables = page.locator("table.scores").all()
    assert len(tables) == 3
    for table, direction in zip(tables[:2], ("image_to_text", "text_to_image"), strict=True):
        found = {row[0]: row[1:] for row in _cells(table)}
        best, before = val["best"][direction], val["before"][direction]
        assert len(found) == len(best)
        for key, value in best.items():
            name = key.removesuffix("_groups").replace("_", " ").replace("mrr", "MRR").replace("map", "mAP")
            chance, was, now, difference, _ = found[name + (" by group" if key.endswith("_groups") else "")]
            scale = 1 if "rank" in key else 100
            told_by = val["difference"][direction][key]
            for cell, number, ends in (
                (chance, val["best"]["chance"][key], []),
                (was, before[key], val["before"]["intervals"][direction][key]),
                (now, value, val["best"]["intervals"][direction][key]),
                (difference, told_by["by"], told_by["interval"]),
            ):
                printed = [float(one) for one in re.findall(r"[-+]?\d+\.\d", cell.replace("−", "-"))]
                assert printed == [pytest.approx(scale * one, abs=0.0500001) for one in (number, *ends)], (key, cell)


def _cells(table: Any) -> list[list[str]]:
    script = "table => [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText))"
    return list(table.evaluate(script))


def test_paper_shows_what_is_folded_and_light_colours(opened: Callable[..., Page]) -> None:
    page = opened("report", scheme="dark")
    inside = ", ".join(f"main > details:not([open]) {tag}" for tag in ("table", "img", "pre"))
    folded = f"[...document.querySelectorAll('{inside}')].map(one => one.checkVisibility())"
    assert set(page.evaluate(folded)) == {False}
    assert len(page.evaluate(folded)) > 20
    page.emulate_media(media="print")
    assert set(page.evaluate(folded)) == {True}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_phone_shows_every_cell_of_the_scores(opened: Callable[..., Page]) -> None:
    page = opened("report", 320)
    right = "[...document.querySelectorAll('table.scores td')].map(cell => cell.getBoundingClientRect().right)"
    ends = page.evaluate(right)
    assert len(ends) > 100
    assert max(ends) <= 320
