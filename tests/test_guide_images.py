"""What docs/guide/images.md shows and says, against the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from docs import pictures

from cytoclip import augment, images
from cytoclip.config import parse
from cytoclip.data_options import MICROSCOPY, Augment, Data

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "images.md").read_text(encoding="utf-8")


def test_its_experiment_is_one_and_its_numbers_are_the_presets() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert parse(yaml.safe_load(block), "the page").data.augment == Augment(preset="microscopy")
    (beside,) = re.findall(r"`augment: (\{preset: microscopy, .*?\})`", PAGE)
    assert Augment(**yaml.safe_load(beside)).rotation == "any"
    assert f"{MICROSCOPY['smallest_crop']:.0%}".replace("%", " %") in PAGE
    assert augment.Variation(Augment(smallest_crop=0.01), (8, 8), 0).margin == 2**0.5


def test_every_policy_of_the_crop_is_in_its_table() -> None:
    policies = Data.model_fields["crop"].annotation.__args__  # type: ignore[union-attr]
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE) == list(policies)


def test_its_picture_is_what_the_code_draws() -> None:
    for name, draw in pictures.DRAWN.items():
        assert f"images/{name}" in PAGE
        shown, drawn = (
            np.asarray(images.decode(data)).astype(int) for data in ((pictures.IMAGES / name).read_bytes(), draw())
        )
        assert shown.shape == drawn.shape
        assert np.abs(shown - drawn).max() <= 2, "python -m docs.pictures"
