"""The search page in a real browser: what is found, what is said, who can reach it, and that nothing is asked for."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from cytoclip import desk
from cytoclip.search import Hit, Index
from cytoclip.serve import Where
from tests import served

AXE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
Opened = Callable[..., Page]
# Gradio's own words in the console, which say nothing of our page.
CHATTER = ("[svelte-i18n]", "Autofocus processing was blocked")


@pytest.fixture(scope="module")
def index(sample: served.Sample) -> Index:
    return Index.open(sample.index)


@pytest.fixture(scope="module")
def address(index: Index) -> Iterator[str]:
    with served.server(index) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with served.chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Browser, address: str) -> Iterator[Opened]:
    """Open the page as another user each time; what it asked elsewhere, and complained of, is told at the end."""
    contexts: list[Any] = []
    asked: list[str] = []
    said: list[str] = []

    def open_(width: int = 1280, scheme: Any = "light", at: str = address, **how: Any) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce", **how
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(at)
        expect(text_of(page)).to_be_visible()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
    refused = "status of 4"  # the browser's word for what we refused on purpose
    assert [one for one in said if not one.startswith(CHATTER) and refused not in one] == []


def text_of(page: Page) -> Any:
    return page.get_by_label("Text", exact=True)


def shows(page: Page, hits: list[Hit]) -> None:
    """Wait for these pictures, in this order and no others."""
    expect(page.locator("#results .hit .name")).to_have_text([hit.name for hit in hits])


def shows_first(page: Page, name: str) -> None:
    expect(page.locator("#results .hit .name").first).to_have_text(name)


def shown_width(shown: Locator) -> int:
    """Pixels of its picture, once that has come."""
    return int(shown.locator("img").evaluate("async image => { await image.decode(); return image.naturalWidth; }"))


def search(page: Page, text: str) -> None:
    text_of(page).fill(text)
    text_of(page).press("Enter")
    expect(page.locator("#results .said")).to_contain_text(text[:40])


def drop(page: Page, zone: str, file: Path, name: str = "") -> None:
    """Let go of a file above a drop zone, as a mouse does."""
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(f"#{zone} .zone", event, {"dataTransfer": carried(page, file, name or file.name)})


def carried(page: Page, file: Path, name: str) -> Any:
    """What a browser carries when a file is dragged or copied."""
    script = """([name, base64]) => {
        const bytes = Uint8Array.from(atob(base64), one => one.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, {type: 'image/png'}));
        return transfer;
    }"""
    return page.evaluate_handle(script, [name, base64.b64encode(file.read_bytes()).decode()])


def test_a_query_shows_the_right_cells_first(opened: Opened, index: Index, sample: served.Sample) -> None:
    page = opened()
    expect(page.locator("#results")).to_contain_text("Nothing asked yet")
    expect(page.locator("#results")).to_contain_text("press Enter")
    entry = sample.entries[10]
    search(page, entry["caption"])
    expected = index.search(entry["caption"], k=24)
    assert expected[0].name == entry["img"]
    shows(page, expected)
    first = page.locator("#results .hit").first
    expect(first.locator(".caption")).to_have_text(entry["caption"])
    expect(first.locator(".score")).to_contain_text(f"{expected[0].score:.3f}")
    keys = [f"{key}: {value}" for key, value in expected[0].keys.items()]
    assert first.locator(".keys li").all_text_contents() == keys
    first.locator("img").scroll_into_view_if_needed()
    assert shown_width(first) == 96
    spoken = page.locator("[role=status].unseen").first
    expect(spoken).to_contain_text(f"24 pictures nearest to “{entry['caption']}”")
    text_of(page).fill("")
    text_of(page).press("Enter")
    expect(page.locator("#results")).to_contain_text("Nothing asked yet")
    expect(spoken).to_have_text("Nothing asked yet")


def test_a_dropped_picture_is_searched_and_weighed_against_a_text(
    opened: Opened, index: Index, sample: served.Sample
) -> None:
    page = opened()
    assert sample.picture(8).suffix == ".tif"  # which no browser shows
    drop(page, "drop-query", sample.picture(8))
    expect(page.locator("#results .said")).to_contain_text("nearest to the picture")
    shows_first(page, sample.entries[8]["img"])
    held = page.locator("#drop-query .held")
    expect(held).to_contain_text("008.tif · 96×96")
    assert shown_width(held) == 96
    weight = page.get_by_label("range slider for Weight of the picture")
    expect(weight).to_have_count(0)
    search(page, sample.entries[3]["caption"])
    asked = {"text": sample.entries[3]["caption"], "image": sample.picture(8), "k": 24}
    shows(page, index.search(**asked))
    for wanted, key in ((0.0, "Home"), (1.0, "End")):
        page.get_by_role("slider").press(key)
        page.get_by_role("slider").dispatch_event("pointerup")
        shows(page, index.search(**asked, weight=wanted))
    held.get_by_role("button").click()
    expect(page.locator("#results .said")).not_to_contain_text("the picture")
    shows(page, index.search(sample.entries[3]["caption"], k=24))


def test_a_picture_is_pasted_where_it_can_be_seen(opened: Opened, sample: served.Sample) -> None:
    page = opened()
    paste = """transfer => document.body.dispatchEvent(
        new ClipboardEvent('paste', {clipboardData: transfer, bubbles: true, cancelable: true}))"""
    page.evaluate(paste, carried(page, sample.picture(5), "copied.png"))
    shows_first(page, sample.entries[5]["img"])
    expect(page.locator("#drop-query .held")).to_contain_text("copied.png")
    page.get_by_role("tab", name="Score captions").click()
    page.evaluate(paste, carried(page, sample.picture(6), "other.png"))
    expect(page.locator("#drop-scored .held")).to_contain_text("other.png")
    expect(page.locator("#drop-query .held")).to_contain_text("copied.png")


def test_a_wrong_file_says_so(opened: Opened, sample: served.Sample, tmp_path: Path) -> None:
    page = opened()
    wrong = page.locator("#drop-query .wrong")
    (tmp_path / "notes.png").write_text("a letter, not a picture")
    drop(page, "drop-query", tmp_path / "notes.png")
    expect(wrong).to_contain_text("notes.png: this is no picture that can be read: not a picture of a known format.")
    Image.new("L", (7200, 7000)).save(tmp_path / "slide.png")
    page.locator("#file-query").set_input_files(tmp_path / "slide.png")
    expect(wrong).to_contain_text("slide.png: this is no picture that can be read: claims 7200x7000 pixels")
    (tmp_path / "large.tif").write_bytes(b"\0" * (desk.UPLOAD_BYTES + 1))
    page.locator("#file-query").set_input_files(tmp_path / "large.tif")
    expect(wrong).to_contain_text("large.tif has 20,000,001 bytes, and 20,000,000 are allowed.")
    shows(page, [])
    hostile = "<img src=x onerror=window.ran=1>.png"
    drop(page, "drop-query", tmp_path / "notes.png", hostile)
    expect(wrong).to_contain_text(hostile)
    page.locator("#file-query").set_input_files(sample.picture(2))
    expect(page.locator("#results .said")).to_contain_text("nearest to the picture")
    expect(wrong).to_be_empty()
    assert page.evaluate("window.ran") is None


def test_menus_narrow_what_is_found(opened: Opened, index: Index, sample: served.Sample) -> None:
    page = opened()
    caption, label = sample.entries[0]["caption"], sample.entries[5]["label"]
    search(page, caption)
    choose(page, "label", label)
    expect(page.locator("#results .said")).to_contain_text(f"label {label}")
    shows(page, index.search(caption, k=24, where={"label": label}))
    choose(page, "Find", "Captions")
    expect(page.locator("#results .lines li").first).to_be_visible()
    hits = index.search(caption, k=24, kind="captions", where={"label": label})
    told = page.locator("#results .lines li").all_inner_texts()
    assert [one.split(maxsplit=1)[1] for one in told] == [hit.caption for hit in hits]


def choose(page: Page, menu: str, value: str) -> None:
    page.get_by_label(menu, exact=True).click()
    page.get_by_role("option", name=value, exact=True).click()


def test_more_like_this_and_enlarging(opened: Opened, index: Index, sample: served.Sample) -> None:
    page = opened()
    search(page, sample.entries[4]["caption"])
    first = index.search(sample.entries[4]["caption"], k=24)
    dialog = page.locator("dialog.large")
    page.locator("#results .open").nth(1).click()
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text(first[1].name)
    assert dialog.locator("img").get_attribute("src") == f"image/{first[1].id}"
    dialog.get_by_role("button", name="The next one").click()
    expect(dialog).to_contain_text(first[2].name)
    dialog.get_by_role("button", name="More like this").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#results .said")).to_contain_text("most like")
    alike = index.like(first[2].id, k=24)
    shows(page, alike)
    label = alike[3].keys["label"]
    choose(page, "label", label)  # a menu goes on about what is shown
    expect(page.locator("#results .said")).to_contain_text(f"label {label}")
    shows(page, index.like(first[2].id, k=24, where={"label": label}))
    choose(page, "label", "any")
    choose(page, "Find", "Captions")
    expect(page.locator("#results .said")).to_contain_text("nearest to")
    nearest = index.search(None, index.picture(first[2].id), k=24, kind="captions")
    told = page.locator("#results .lines li").all_inner_texts()
    assert [one.split(maxsplit=1)[1] for one in told] == [hit.caption for hit in nearest]


def test_the_keyboard_is_enough(opened: Opened, index: Index, sample: served.Sample) -> None:
    page = opened()
    expect(text_of(page)).to_be_focused()
    page.keyboard.type(sample.entries[2]["caption"])
    page.keyboard.press("Enter")
    expect(page.locator("#results .hit").first).to_be_visible()
    hits = index.search(sample.entries[2]["caption"], k=24)
    order = tab_until(page, "document.activeElement.matches('#results .hit:first-child .open')")
    assert order.index("file-query") < order.index("go")
    page.keyboard.press("Enter")
    dialog = page.locator("dialog.large")
    expect(dialog).to_contain_text(hits[0].name)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(dialog).to_contain_text(hits[2].name)
    page.keyboard.press("ArrowLeft")
    expect(dialog).to_contain_text(hits[1].name)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator(f"#results .hit[data-id='{hits[1].id}'] .open")).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('.more')")
    page.keyboard.press("Enter")
    expect(page.locator("#results .said")).to_be_focused()
    shows(page, index.like(hits[1].id, k=24))


def tab_until(page: Page, there: str) -> list[str]:
    """Press Tab until `there` is true; the ids that were passed, of what has one."""
    passed = []
    for _ in range(60):
        page.keyboard.press("Tab")
        passed.append(page.evaluate("document.activeElement.id"))
        if page.evaluate(there):
            return passed
    raise AssertionError(passed)


def test_what_the_data_say_is_shown_and_never_run(opened: Opened, sample: served.Sample) -> None:
    page = opened()
    text_of(page).fill(served.HOSTILE)
    text_of(page).press("Enter")
    expect(page.locator("#results .said")).to_contain_text(served.HOSTILE)
    text_of(page).fill("")  # with it another picture may come first: the model has never read such words
    drop(page, "drop-query", sample.picture(served.PAIRS))
    shows_first(page, "hostile.tif")
    expect(page.locator("#results .hit .caption").first).to_have_text(served.HOSTILE)
    page.locator("#results .open").first.click()
    expect(page.locator("dialog.large")).to_contain_text(served.HOSTILE)
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Score captions").click()
    page.locator("#file-scored").set_input_files(sample.picture(0))
    expect(page.locator("#drop-scored .held")).to_be_visible()
    page.get_by_label("Captions, one a line").fill(served.HOSTILE)
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("table.scored tbody th")).to_have_text(served.HOSTILE)
    assert page.evaluate("window.ran") is None


def test_two_users_at_once_see_their_own(opened: Opened, index: Index, sample: served.Sample) -> None:
    one, other = opened(), opened()
    for step in range(4):
        asked = [sample.entries[step]["caption"], sample.entries[12 + step]["caption"]]
        for page, caption in zip((one, other), asked, strict=True):
            text_of(page).fill(caption)
            text_of(page).press("Enter")
        for page, caption in zip((one, other), asked, strict=True):
            expect(page.locator("#results .said")).to_contain_text(caption)
            shows(page, index.search(caption, k=24))
    drop(one, "drop-query", sample.picture(0))
    drop(other, "drop-query", sample.picture(1))
    for page, number in ((one, 0), (other, 1)):
        text_of(page).fill("")
        text_of(page).press("Enter")
        expect(page.locator("#results .said")).to_contain_text("pictures nearest to the picture")
        shows_first(page, sample.entries[number]["img"])


def test_captions_are_scored_against_a_picture(opened: Opened, index: Index, sample: served.Sample) -> None:
    page = opened()
    page.get_by_role("tab", name="Score captions").click()
    expect(page.locator("#scores")).to_contain_text("Nothing scored yet")
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#scores")).to_contain_text("there is no picture to score")
    drop(page, "drop-scored", sample.picture(6))
    expect(page.locator("#drop-scored .held")).to_be_visible()
    captions = [sample.entries[i]["caption"] for i in (3, 6, 9)]
    page.get_by_label("Captions, one a line").fill("\n\n".join([*captions, captions[0]]))
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("table.scored tbody tr")).to_have_count(3)
    expect(page.get_by_role("status").filter(has_text="Most likely:")).to_contain_text(captions[1])
    shares = index.encoder.probabilities(sample.picture(6), captions)[0]
    expected = sorted(zip(captions, shares, strict=True), key=lambda one: -one[1])
    assert expected[0][0] == captions[1]
    rows = [re.split(r"\t", row.strip()) for row in page.locator("table.scored tbody tr").all_inner_texts()]
    assert [(row[0], row[1]) for row in rows] == [(caption, f"{100 * share:.1f} %") for caption, share in expected]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Opened, sample: served.Sample, scheme: str) -> None:
    page = opened(scheme=scheme)
    rules = "{runOnly: 'color-contrast'}" if scheme == "dark" else "{}"
    audit(page, rules)
    drop(page, "drop-query", sample.picture(8))
    expect(page.locator("#results .said")).to_contain_text("nearest to the picture")  # or it is renewed in the audit
    search(page, sample.entries[1]["caption"])
    expect(page.locator("#results .said")).to_contain_text("and the picture")
    audit(page, rules)
    page.locator("#results .open").first.click()
    expect(page.locator("dialog.large")).to_be_visible()
    audit(page, rules)
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Score captions").click()
    page.locator("#file-scored").set_input_files(sample.picture(0))
    page.get_by_label("Captions, one a line").fill("one\ntwo")
    expect(page.locator("#drop-scored .held")).to_be_visible()
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("table.scored")).to_be_visible()
    audit(page, rules)
    page.goto(page.url.rstrip("/") + "/docs")
    audit(page, rules)


def audit(page: Page, rules: str) -> None:
    """axe-core's rules on all that is there now; in the dark, contrast."""
    page.wait_for_function("!document.querySelector('.pending, .generating')")  # Gradio fades what is being renewed
    page.evaluate(AXE)
    found = page.evaluate(f"axe.run(document, {rules})")
    assert len(found["passes"]) >= (10 if rules == "{}" else 1)
    nodes = [(one["id"], node) for one in found["violations"] for node in one["nodes"]]
    assert [(rule, node["html"][:200], node["failureSummary"]) for rule, node in nodes] == []


def test_no_page_is_wider_than_the_screen(opened: Opened, sample: served.Sample) -> None:
    page = opened(width=390)
    search(page, sample.entries[1]["caption"])
    drop(page, "drop-query", sample.picture(8), "a-file-whose-name-is-very-long" * 4 + ".tif")
    expect(page.locator("#results .said")).to_contain_text("and the picture")
    for width in (320, 390, 768):
        served.resize(page, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator("#results .open").first.click()
    served.resize(page, 320, height=700)
    box = page.locator("dialog.large").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 320


def test_a_password_opens_the_page_too(opened: Opened, index: Index, sample: served.Sample) -> None:
    who: Any = {"username": "me", "password": "correct horse"}
    with served.server(index, Where(port=0, password="correct horse")) as closed:  # noqa: S106
        page = opened(at=closed, http_credentials=who)
        drop(page, "drop-query", sample.picture(4))
        expect(page.locator("#results .hit .name").first).to_have_text(sample.entries[4]["img"])
        page.context.close()
