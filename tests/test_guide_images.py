"""What docs/guide/images.md shows and says, against the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from docs import pictures

from cytoclip import augment, cells, images
from cytoclip.config import parse
from cytoclip.data_options import MICROSCOPY, Augment, Data

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "docs" / "guide" / "images.md").read_text(encoding="utf-8")
README = (PROJECT / "README.md").read_text(encoding="utf-8")


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


def test_the_pictures_of_the_docs_are_what_the_code_draws() -> None:
    shown_on = {"microscopy.png": PAGE, "sample-set.png": README}
    assert shown_on.keys() == pictures.DRAWN.keys()
    for name, draw in pictures.DRAWN.items():
        assert f"images/{name}" in shown_on[name]
        shown, drawn = (
            np.asarray(images.decode(data)).astype(int) for data in ((pictures.IMAGES / name).read_bytes(), draw())
        )
        assert shown.shape == drawn.shape
        assert np.abs(shown - drawn).max() <= 2, "python -m docs.pictures"


def test_a_contact_sheet_has_room_for_every_picture_and_caption() -> None:
    page = pictures.contact_sheet(list(cells.sample(7, 0, range(4))), columns=3)
    assert page.mode == "RGB"
    assert page.width == 3 * 250
    assert page.height % 3 == 0
    assert page.height // 3 > 250 + 3 * 16
    ink = np.asarray(page.convert("L")) < 128
    row = page.height // 3
    for index in range(7):
        left, top = index % 3 * 250, index // 3 * row
        assert ink[top + 250 : top + row, left + 6 : left + 244].any()  # the caption
        assert not ink[:, left + 246 : left + 250].any()  # and it keeps to its column
    assert not ink[2 * row :, 250:].any()
