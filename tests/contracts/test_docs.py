"""Pages that are made from code are as fresh as the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs import render

ROOT = Path(__file__).parents[2]


def test_every_rendered_page_is_current() -> None:
    """Run `make docs` when this is red."""
    names = ["commands.md", "config.md", "families.md", "findings.md", "modules.md", "results.md"]
    assert [page.name for page in render.PAGES] == names
    for page, rendered in render.PAGES.items():
        assert page.read_text(encoding="utf-8") == rendered(), f"{page} is stale: run make docs"


def test_check_tells_a_stale_page_from_a_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "reference" / "page.md"
    monkeypatch.setattr(render, "PAGES", {page: lambda: "new\n"})
    monkeypatch.chdir(tmp_path)
    assert render.main(check=True) == 1  # not there
    assert not page.exists()
    assert render.main(check=False) == 0
    assert page.read_text() == "new\n"
    assert render.main(check=True) == 0
    page.write_text("old\n")
    capsys.readouterr()
    assert render.main(check=True) == 1
    assert capsys.readouterr().err == "reference/page.md is stale: run make docs\n"
    assert page.read_text() == "old\n"


def test_links_name_files_that_are_there() -> None:
    """As they are read on GitHub; `docs/hooks.py` bends them for the site."""
    written = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")]
    links = [
        (page, target)
        for page in written
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 50
    assert [f"{page.relative_to(ROOT)}: {to}" for page, to in links if not (page.parent / to).exists()] == []


def test_every_name_stands_once_in_the_reference_of_python() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    said = re.findall(r"^(?:## |::: ).+$", page, flags=re.MULTILINE)
    assert len(said) > 10
    assert len(set(said)) == len(said)
