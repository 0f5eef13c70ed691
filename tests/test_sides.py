"""Which captions name a side of their picture."""

from __future__ import annotations

import pytest

from cytoclip.sides import names_side

NAMED = [
    "A koilocyte in the upper left corner", "Right: a nucleus", "bottom-right", "the lower half",
    "LEFTMOST cell", "at 3 o'clock", "cells on the top", "a fibre that runs horizontally",
    "links oben eine Zelle", "in der linken Hälfte", "cellule en haut à gauche",
    "una célula arriba a la derecha", "célula no canto superior direito", "in basso a destra", "клетка слева",
    "в верхней части", "左上角有一个细胞", "上方的细胞", "왼쪽 세포", "northwest of the nucleus", "below it",
]  # fmt: skip
FREE = [
    "A koilocyte with a perinuclear halo", "copyright 2020", "lowercase letters", "a stop codon",
    "bright field", "an uppercut", "toppled", "basal cells", "an abscess", "hautement différencié", "sinister",
    "上皮细胞", "Obendorf", "high-grade lesion", "destruction of tissue", "linked nuclei",
]  # fmt: skip


@pytest.mark.parametrize("caption", NAMED)
def test_a_side_is_named(caption: str) -> None:
    assert names_side(caption)


@pytest.mark.parametrize("caption", FREE)
def test_no_side_is_named(caption: str) -> None:
    assert not names_side(caption)
