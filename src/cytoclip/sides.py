"""Whether a caption names a side of its picture: then to turn or to mirror the picture would make the caption wrong."""

from __future__ import annotations

import re

# Latin and Cyrillic words whole, with the endings that make an adjective or an adverb of them. "Right" also means
# correct and "top" also begins "on top of": one picture turned too rarely costs less than one caption made wrong.
_WORDS = """
    left(most|wards?|sided|hand)? right(most|wards?|sided|hand)? upper(most)? lower(most)? top(most)? bottom(most)?
    above below upwards? downwards? horizontal(ly)? vertical(ly)? (counter|anti)?clockwise o['’]clock
    north(ern|(east|west)(ern)?)? south(ern|(east|west)(ern)?)?
    links rechts oben unten oberhalb unterhalb (linke|rechte|obere|untere)[nrsm]? senkrecht waagerecht
    gauche droite? haut bas supérieure?s? inférieure?s? dessus dessous
    izquierd[ao]s? derech[ao]s? arriba abajo (superior|inferior)(es)? encima debajo
    esquerd[ao]s? direit[ao]s? acima abaixo (superior|inferior)e?s?
    sinistr[aoe] destr[aoe] alto basso superior[ei] inferior[ei] sopra sotto
    слева справа сверху снизу (лев|прав|верхн|нижн)[а-я]{2,3}
"""
_NAMED = re.compile(rf"\b({'|'.join(_WORDS.split())})\b|[左右]|[上下][方部侧側面]|[왼오][른]?쪽", re.IGNORECASE)


def names_side(caption: str) -> bool:
    """Whether a caption says left, right, upper, lower or the like, in any of nine languages.

    Examples
    --------
    >>> names_side("A koilocyte in the upper left corner"), names_side("A koilocyte with a perinuclear halo")
    (True, False)
    """
    return _NAMED.search(caption) is not None
