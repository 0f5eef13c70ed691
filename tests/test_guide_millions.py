"""What docs/guide/millions.md says of options, numbers and refusals, against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cytoclip import intake, places, streams
from cytoclip.config import parse
from cytoclip.console import Console
from cytoclip.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "millions.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def test_one_experiment_for_each_road() -> None:
    here, afar = (parse(block, "the page").data.train or "" for block in BLOCKS)
    assert not places.is_remote(here)
    assert places.is_remote(afar)
    assert f"blocks of {streams.BLOCK}" in PAGE


@pytest.mark.parametrize(
    ("option", "value"),
    [("cache", True), ("replay", [{"root": "more", "weight": 1.0}])],
)
def test_what_it_says_is_refused_from_afar(option: str, value: object) -> None:
    (row,) = (line for line in PAGE.splitlines() if line.endswith("| refused |"))
    assert f"`data.{option}`" in row
    afar = BLOCKS[1]
    wanted = parse({**afar, "data": {**afar["data"], option: value}}, "the page")
    with pytest.raises(UserError, match=f"data.{option} needs training pairs that are here"):
        intake.find(wanted, Console(quiet=True))
