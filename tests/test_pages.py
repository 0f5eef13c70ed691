"""Templates: all of ours forbid requests and escape what they are given."""

from __future__ import annotations

from importlib import resources

import jinja2
import pytest

from cytoclip import pages

WHOLE = ["api_page.html", "check_page.html", "comparison.html", "report_page.html"]
# Of the search page, whose server sends the policy with every answer (guard.py).
PARTS = [
    "drop_zone.html",
    "scores.html",
    "search_empty.html",
    "search_head.html",
    "search_hits.html",
    "search_problem.html",
]


def test_every_page_has_the_policy_and_no_script() -> None:
    there = {one.name for one in resources.files("cytoclip").iterdir() if one.name.endswith(".html")}
    assert there == {*WHOLE, *PARTS, "page_parts.html", "page_style.html"}
    for name in WHOLE:
        text = pages._source(name)
        assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
        assert '<html lang="en">' in text
    assert not any("<script" in pages._source(name) or "|safe" in pages._source(name) for name in there)
    assert "url(" not in pages._source("page_style.html")


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        pages.render("report_page.html")
