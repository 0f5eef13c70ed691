"""What is kept of a row beside picture, caption and tags."""

from __future__ import annotations

from pathlib import Path

import pytest

from cytoclip import rows
from cytoclip.rows import Gathered, extras


def test_extras_are_short_texts_whole_numbers_and_yes_or_no() -> None:
    row = {
        "img": "a.png", "caption": "a cell", "group": "g", "source": "s", "label": "l", "site": "cervix", "power": 40,
        "stained": True, "width": 3.5, "box": [1, 2], "none": None, "empty": "", "report": "x" * 65, "k" * 65: "y",
        "half": "\ud800", "same": "a.png",
    }  # fmt: skip
    assert extras(row, ("a.png", "a cell")) == (("power", "40"), ("site", "cervix"), ("stained", "True"))
    many = {f"{i:03}": "x" for i in range(200)}
    assert len(extras(many)) == rows.MAX_EXTRA


@pytest.mark.parametrize("count", [256, 257])
def test_a_key_with_too_many_values_is_not_kept_at_all_but_for_patients(tmp_path: Path, count: int) -> None:
    """Whom a split may cut is said by `apart.warn_of_cut_sources`, which sees no more than what is kept."""
    gathered = Gathered(tmp_path, tmp_path)
    for i in range(count):
        gathered.add(i, f"{i}.png", "a cell", {"number": i, "site": f"site {i % 2}", "Patient ID": f"P{i}"})
    found = gathered.pairs().further()
    assert found["Patient ID"] == tuple(f"P{i}" for i in range(count))
    assert found["site"][:3] == ("site 0", "site 1", "site 0")
    assert ("number" in found) == (count == 256)
