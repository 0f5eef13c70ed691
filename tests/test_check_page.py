"""The page: whole, within its size, and with nothing of the data taken for markup."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cytoclip import check, check_page
from cytoclip.console import Console
from tests import planted

QUIET = Console(quiet=True)


class Reader(HTMLParser):
    """Tags that were opened and not closed, addresses that a browser would ask for, and handlers."""

    VOID = frozenset({"meta", "br", "img", "line", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.asked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, _: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a root with a fault of each kind."""
    root = planted.clean(tmp_path_factory.mktemp("page") / "data")
    planted.plant(root, list(planted.PLANTS))
    return check_page.page(check.check(root, str(base), 500, QUIET))


def test_the_page_is_whole_asks_for_nothing_and_is_small(page: str) -> None:
    read = Reader(page)
    assert read.open == []
    assert len(read.asked) >= 25
    assert all(one.startswith("data:image/jpeg;base64,") for one in read.asked)
    assert "script" not in read.tags
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page
    assert len(page.encode()) < 1e6
    assert page.count('role="img"') == 4
    assert read.tags.count("details") == 41  # 37 findings, and the numbers of 4 charts


def test_a_thumbnail_is_what_it_is_of_and_has_no_metadata(page: str) -> None:
    found = re.findall(r"base64,([\w+/=]+)", page)
    pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]
    assert all(max(picture.size) <= 160 for picture in pictures)
    assert not any(picture.getexif() for picture in pictures)
    assert "Jane Doe" not in page
    assert "DOE^JANE" not in page


def test_hostile_names_and_captions_stay_text(base: Path, tmp_path: Path) -> None:
    root = planted.clean(tmp_path / "data <script>alert(1)</script>")
    place = root / "train" / "img_text_pair.json"
    entries = json.loads(place.read_text())
    name = "\"><img src=x onerror='alert(1)'>.jpg"
    shutil.move(root / "train" / "imgs" / "00.jpg", root / "train" / "imgs" / name)
    entries[0] |= {"img": name, "caption": "{{ 7 * 7 }} <script>alert(2)</script>"}
    entries[1]["caption"] = "\x1b[31m"
    place.write_text(json.dumps(entries))
    report = check.check(root, str(base), None, QUIET)
    page = check_page.page(report)
    assert "script" not in Reader(page).tags
    assert "{{ 7 * 7 }} &lt;script&gt;" in page
    assert "\x1b" not in report.text()


def test_thumbnails_stop_at_the_budget(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = planted.clean(tmp_path / "data")
    planted.plant(root, list(planted.PLANTS))
    report = check.check(root, str(base), None, QUIET)
    monkeypatch.setattr(check_page, "BUDGET", 20_000)
    page = check_page.page(report)
    assert 0 < sum(map(len, Reader(page).asked)) <= 20_000
