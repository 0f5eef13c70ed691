"""A picture of scores against alpha, as SVG: lines told apart by dashes and words, not by colour alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 500, 48, 380
_OTHERS = 530  # x of the first model that lies on no line
_STYLE = """
text{font:14px system-ui,sans-serif;fill:#1b1f24}
.grid{stroke:#d9dde3;stroke-width:1} .line{fill:none;stroke-width:2.5}
.s0{stroke:#0b5cad} .s1{stroke:#b3470b;stroke-dasharray:8 4} .f0{fill:#0b5cad} .f1{fill:#b3470b}
.floor{stroke-width:2;stroke-dasharray:2 5}
.ground{fill:#fff} .ring{fill:none;stroke:#1b1f24;stroke-width:2}
@media (prefers-color-scheme:dark){text{fill:#e6e8eb} .ground{fill:#14171b} .grid{stroke:#333a43} .ring{stroke:#e6e8eb}
.s0{stroke:#6db3f2} .f0{fill:#6db3f2} .s1{stroke:#f2a071} .f1{fill:#f2a071}}
"""


@dataclass(frozen=True)
class Curve:
    """One score of all models.

    Parameters
    ----------
    name
        What it is.
    points
        (alpha, score) along the line, by alpha.
    others
        (name, score) of models that lie on no line.
    chosen
        The score of the model that was chosen.
    floor
        The lowest score that is allowed, if there is one.
    """

    name: str
    points: Sequence[tuple[float, float]]
    others: Sequence[tuple[str, float]]
    chosen: float
    floor: float | None = None


def svg(curves: Sequence[Curve], alpha: float | None, chosen: str) -> str:
    """The whole file; `alpha` and `chosen`: where the chosen model is on the line, and what it is called."""
    low, high = _range(curves)
    names = [name for name, _ in curves[0].others]
    each = min(44.0, (_WIDTH - _OTHERS) / max(len(names), 1))
    places = {name: round(_OTHERS + each * number, 1) for number, name in enumerate(names)}

    def y(score: float) -> float:
        return round(_BOTTOM - (score - low) / (high - low) * (_BOTTOM - _TOP), 1)

    tall = _BOTTOM + 80 + 20 * len(names)
    parts = [*_grid(low, high, y), *_names(curves, places)]
    for number, curve in enumerate(curves):
        line = " ".join(f"{_x(where)},{y(score)}" for where, score in curve.points)
        parts.append(f'<polyline class="line s{number}" points="{line}"/>')
        dots = [*((_x(where), score) for where, score in curve.points), *((places[n], s) for n, s in curve.others)]
        parts += [f'<circle class="f{number}" cx="{where}" cy="{y(score)}" r="4"/>' for where, score in dots]
        if curve.floor is not None:
            parts.append(f'<path class="floor s{number}" d="M{_LEFT} {y(curve.floor)}H{_RIGHT}"/>')
        at = places[chosen] if alpha is None else _x(alpha)
        parts.append(f'<circle class="ring" cx="{at}" cy="{y(curve.chosen)}" r="9"/>')
    title = f"{' and '.join(curve.name for curve in curves)} between the starting model and the last step"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {tall}" role="img">'
        f"<title>{escape(title)}; chosen: {escape(chosen)}</title><style>{_STYLE}</style>"
        f'<rect class="ground" width="{_WIDTH}" height="{tall}"/>{"".join(parts)}'
        f"{_text(_LEFT, _BOTTOM + 62, f'○ chosen: {chosen}')}</svg>\n"
    )


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Of all scores, with air above and below."""
    scores = [score for curve in curves for _, score in (*curve.points, *curve.others)]
    scores += [curve.floor for curve in curves if curve.floor is not None]
    air = 0.06 * (max(scores) - min(scores)) or 0.01
    return min(scores) - air, max(scores) + air


def _round_values(low: float, high: float) -> list[float]:
    """Between the two, three to eight multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(many * power for many in (1, 2, 5, 10) if many * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _grid(low: float, high: float, y: Callable[[float], float]) -> list[str]:
    parts = []
    for score in _round_values(low, high):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(score)}H{_WIDTH - 16}"/>')
        parts.append(_text(_LEFT - 8, y(score) + 5, f"{score:.4g}", "end"))
    for tenth in range(0, 11, 2):
        parts.append(_text(_x(tenth / 10), _BOTTOM + 20, f"{tenth / 10:g}", "middle"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 40, "alpha: 0 the starting model, 1 the last step", "middle"))
    return parts


def _names(curves: Sequence[Curve], places: Mapping[str, float]) -> list[str]:
    """The legend above, and below the models that lie on no line, by letters."""
    parts, at = [], _LEFT
    for number, curve in enumerate(curves):
        floor = ", dotted: the lowest allowed" if curve.floor is not None else ""
        parts.append(f'<path class="line s{number}" d="M{at} 22h36"/>{_text(at + 44, 27, curve.name + floor)}')
        at += 60 + 8 * len(curve.name + floor)
    for number, (name, where) in enumerate(places.items()):
        letter = chr(ord("A") + number % 26)
        parts.append(_text(where, _BOTTOM + 20, letter, "middle"))
        parts.append(_text(_LEFT, _BOTTOM + 84 + 20 * number, f"{letter}: {name}"))
    return parts


def _x(alpha: float) -> float:
    return round(_LEFT + alpha * (_RIGHT - _LEFT), 1)


def _text(x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(said)}</text>'
