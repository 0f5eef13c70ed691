"""The site is built without a warning, and its pages ask nothing of another server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs import hooks

HERE = Path(__file__).parents[1]
_SOURCE = r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//"""
_LINK = r"""<link[^>]+rel=["']?(?:stylesheet|preconnect|icon)["']?[^>]*href=["']?(?:https?:)?//"""
ASKS = re.compile(f"{_SOURCE}|{_LINK}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {page.parent.relative_to(site).as_posix() for page in site.rglob("index.html")}
    guides = {f"guide/{page.stem}" for page in (HERE / "docs" / "guide").glob("*.md")}
    assert guides <= pages
    assert {".", "reference/python", "reference/commands", "measured", "changelog", "contributing", "design"} <= pages
    assert not list(site.rglob("*.py"))


def test_the_reference_has_public_names_with_their_parameters(site: Path) -> None:
    text = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    for name in ("encoder.load", "encoder.Encoder.embed_images", "library.train", "library.evaluate"):
        assert f'id="cytoclip.{name}"' in text, name
    assert "batch_size" in text
    assert "Encoder._pixels" not in text


def test_pages_ask_nothing_of_other_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert [page for page in pages if ASKS.search(page.read_text(encoding="utf-8"))] == []
    assert ASKS.search('<script src="https://x.org/a.js"></script>'), "the pattern finds one"


def test_links_between_files_become_links_between_pages() -> None:
    assert hooks.bent("[a](docs/guide/data.md) [b](CHANGELOG.md) [c](bench/RESULTS.md) [d](docs/design.md#layers)") == (
        "[a](guide/data.md) [b](changelog.md) [c](measured.md) [d](design.md#layers)"
    )
    assert (
        hooks.bent("![x](docs/images/a.png) [y](https://x.org/docs/a)")
        == "![x](images/a.png) [y](https://x.org/docs/a)"
    )
