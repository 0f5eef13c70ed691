"""What a run wrote down as it went, as charts: its loss beside that of knowing nothing, its scores over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import charts, conclusion
from cytoclip.charts import Chart, Line
from cytoclip.record import Record
from cytoclip.report import DIRECTIONS

Floats = NDArray[np.float64]


def drawn(record: Record, key: str) -> list[Chart]:
    """Every curve that the run has numbers for; `key` is the metric that the verdict names."""
    return [*_scores(record, key), *_steps(record), *_soup(record, key)]


def _scores(record: Record, key: str) -> Iterator[Chart]:
    rows = record.validations
    chance = (record.results["best"].get("chance") or {}).get(key)
    for direction, title in DIRECTIONS.items():
        lines = _over_steps(rows, "val", direction, _kin(rows, direction, key))
        if lines:
            yield charts.curves(f"validation, {title}", lines, _level(key, chance), dots=True)
    kept = [row for row in rows if row.get("keep")]
    if not kept:
        return
    steps = np.array([row["step"] for row in kept], np.float64)
    val, keep = (np.array([_mean(row[name], key) for row in kept], np.float64) for name in ("val", "keep"))
    name = conclusion.named(key)
    lines = [Line("this data", steps, val), Line("what is kept", steps, keep)]
    yield charts.curves(f"{name} (%) here and on the data to keep", lines, dots=True)
    title = f"the trade: {name} (%) here, over that on the data to keep"
    trade = [Line("validations in their order", keep, val)]
    yield charts.curves(title, trade, x_name="data to keep", dots=True, ends=("start", "end"))


def _steps(record: Record) -> Iterator[Chart]:
    losses, curves = record.losses, record.curves
    if "loss" in losses:
        levels = _loss_levels(record)
        yield charts.curves("loss", [Line("loss", losses["step"], losses["loss"])], levels)
    if "hit_at_1" in curves:
        yield charts.curves("hit@1 in the batch", [Line("hit@1", curves["step"], curves["hit_at_1"])])
    if "lr" in losses:
        yield charts.curves("learning rate", [Line("learning rate", losses["step"], losses["lr"])])
    if "logit_scale" in losses:
        temperature = np.exp(-losses["logit_scale"])
        yield charts.curves("temperature, exp(−logit scale)", [Line("temperature", losses["step"], temperature)])
    if "pairs_per_second" in curves:
        yield charts.curves("pairs a second", [Line("pairs/s", curves["step"], curves["pairs_per_second"])])


def _soup(record: Record, key: str) -> Iterator[Chart]:
    """Scores between the starting model (α = 0) and the best one (α = 1), from soup/soup.json."""
    found = record.soup.values() if isinstance(record.soup, dict) else ()
    rows = next((rows for rows in found if isinstance(rows, list) and rows and _is_mixed(rows[0])), [])
    rows = sorted((row for row in rows if _is_mixed(row)), key=lambda row: float(row["alpha"]))
    lines = []
    for name, said in (("val", "this data"), ("keep", "what is kept")):
        there = [row for row in rows if row.get(name)]
        if there:
            x = np.array([row["alpha"] for row in there], np.float64)
            lines.append(Line(said, x, np.array([_mean(row[name], key) for row in there], np.float64)))
    if lines:
        title = f"soup: {conclusion.named(key)} (%) between start (0) and end (1)"
        yield charts.curves(title, lines, x_name="α", dots=True)


def _loss_levels(record: Record) -> list[tuple[str, float]]:
    known = record.curves.get("chance_loss")
    chance = None if known is None else float(known[-1])
    wanted = record.wanted
    if chance is None and wanted is not None and wanted.train.objective != "sigmoid":
        chance = math.log(wanted.train.batch_size)
    levels = [] if chance is None or not math.isfinite(chance) else [("knowing nothing", chance)]
    floor = record.results.get("floor")
    return levels + ([("floor", float(floor))] if isinstance(floor, int | float) else [])


def _over_steps(rows: list[dict[str, Any]], name: str, direction: str, keys: list[str]) -> list[Line]:
    there = [row for row in rows if direction in (row.get(name) or {})]
    steps = np.array([row["step"] for row in there], np.float64)
    return [
        Line(conclusion.named(key) + " (%)", steps, np.array([100 * row[name][direction][key] for row in there]))
        for key in keys
    ]


def _kin(rows: list[dict[str, Any]], direction: str, key: str) -> list[str]:
    """The hits that are counted as `key` is, at most four."""
    there = (row["val"][direction] for row in rows if direction in (row.get("val") or {}))
    scores: dict[str, float] = next(there, {})
    ending = "_groups" if key.endswith("_groups") else ""
    return [name for name in scores if name.startswith("hit@") and name.endswith("_groups") == bool(ending)][:4]


def _mean(scores: Mapping[str, Any], key: str) -> float:
    """Over the directions, in percent; NaN where a set was scored by other k."""
    found = [scores[direction].get(key, math.nan) for direction in DIRECTIONS if direction in scores]
    return 100 * sum(found) / len(found) if found else math.nan


def _level(key: str, chance: float | None) -> list[tuple[str, float]]:
    return [] if chance is None else [(f"chance of {conclusion.named(key)}", 100 * chance)]


def _is_mixed(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("alpha"), int | float)
