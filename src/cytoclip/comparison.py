"""Several models on one page, side by side: which is better, by how much, and what was different about their runs.

Whether a difference is beyond noise is said only of models that ranked the same pairs: their queries are then drawn
together. For runs it is computed from the embeddings that they keep; `evaluation_page` has it from what it measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cytoclip import charts, conclusion, config, files, intervals, pages, record, retrieval
from cytoclip.charts import Chart, Line
from cytoclip.conclusion import Judged, Verdict
from cytoclip.console import Console, duration
from cytoclip.errors import ExitCode, UserError
from cytoclip.intervals import Interval
from cytoclip.pairs import identities
from cytoclip.record import Embedded, Record
from cytoclip.report import DIRECTIONS

MOST_RUNS = 8  # as many colours as there are
_PLACES = ("data.root", "data.train", "data.val", "data.test", "data.replay", "model.name", "output", "validate.keep")


@dataclass(frozen=True)
class Column:
    """One model on the split that all are compared on.

    Parameters
    ----------
    pairs
        The fingerprint of what it ranked; empty where that is not known.
    read
        Its run; None for a model that was evaluated by itself.
    """

    name: str
    one: Judged
    pairs: str
    read: Record | None = None


Noise = Callable[[Column, Column, str, str], Interval | None]  # of one − other, by direction and key


@dataclass(frozen=True)
class Row:
    """One metric: its name, chance, a cell a model, and which have the best number."""

    name: str
    chance: str
    cells: Sequence[str]
    best: Sequence[int]


def write(folders: Sequence[Path], to: Path, split: str | None, console: Console, images: bool | None = None) -> Path:
    """Write the page.

    Raises
    ------
    UserError
        For a folder that is no finished run, too many of them, or a split that not all of them were scored on.
    """
    files.write_text(to, page(folders, split, console, images))
    return to


def page(folders: Sequence[Path], split: str | None, console: Console, images: bool | None = None) -> str:
    """The whole page as HTML; without the places of data where one run, or `images` False, says so."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are too many for a page", f"compare at most {MOST_RUNS}")
    columns = _columns([record.read(folder) for folder in folders], split)
    private = images is False or (images is None and not all(map(_may_show, columns)))
    return drawn(columns, lambda one, other, side, key: _noise(one, other, side, key, console), private)


def drawn(columns: Sequence[Column], noise: Noise, private: bool, facts: Sequence[tuple[str, str]] = ()) -> str:
    """The same from plain data.

    Parameters
    ----------
    noise
        The interval of a difference; None where it cannot be known.
    private
        Whether the places of runs' data are left out.
    facts
        Of how the models were measured, where they are no runs.
    """
    direction, key = _headline(columns)
    both = [side for side in DIRECTIONS if all(side in column.one.best for column in columns)]
    differences = {DIRECTIONS[side]: list(_against_base(columns, side)) for side in both}
    return pages.render(
        "comparison.html",
        names=[column.name for column in columns],
        split=columns[0].one.split,
        verdict=verdict(columns, direction, key, noise),
        doubts=conclusion.doubts([columns[0].one]),
        tables=[(DIRECTIONS[side], list(_rows(columns, side))) for side in both],
        held=[column.name for column in columns if column.one.before],
        against={title: rows for title, rows in differences.items() if rows},
        runs=all(column.read for column in columns),
        curves=list(_curves(columns, direction, key)),
        differences=list(_differences(columns, private)),
        made=list(_facts(columns)),
        facts=facts,
    )


def verdict(columns: Sequence[Column], direction: str, key: str, noise: Noise) -> Verdict:
    """Which is best, and whether it is so beyond noise, on one number."""
    numbers = [column.one.best[direction][key] for column in columns]
    order = sorted(range(len(columns)), key=lambda i: -numbers[i])
    first, second = columns[order[0]], columns[order[1]]
    what = f"{conclusion.named(key)} ({DIRECTIONS[direction]}, {first.one.split})"
    values = [conclusion.value(key, numbers[i]) for i in order[:2]]
    against = f"{what}: {values[0]} of {first.name} against {values[1]} of {second.name}"
    prints = {column.pairs for column in columns} - {""}
    if {column.one.best["pairs"] for column in columns} != {first.one.best["pairs"]} or len(prints) > 1:
        return Verdict(f"{against}; they ranked different pairs, so these numbers cannot be held against each other.",
                       "warning")  # fmt: skip
    low_high = noise(first, second, direction, key)
    if low_high is None:
        return Verdict(f"{against}; whether that is beyond noise is not known ({_why_not(columns)}).", "warning")
    by = numbers[order[0]] - numbers[order[1]]
    told = conclusion.difference(key, by, low_high)
    if low_high[0] <= 0 <= low_high[1]:
        return Verdict(f"{against}, a difference within noise ({told}): neither is shown to be better.", "warning")
    return Verdict(f"{first.name} is the better one. {against}, beyond noise ({told}).", "good")


def _columns(read: Sequence[Record], split: str | None) -> list[Column]:
    scored = [{one.split: one for one in conclusion.judged(each.results)} for each in read]
    common = [name for name in scored[0] if all(name in one for one in scored)]
    if not common or (split and split not in common):
        raise UserError(
            f"not all of the runs were scored on {split or 'one split'}",
            f"all were on {' and '.join(common)}" if common else "compare runs of the same data",
            ExitCode.RUN,
        )
    name = split or common[0]
    prints = [embedded.pairs if embedded else "" for embedded in (each.embedded(name, "best") for each in read)]
    called = names([each.run.path for each in read])
    return [Column(*one) for one in zip(called, (one[name] for one in scored), prints, read, strict=True)]


def _why_not(columns: Sequence[Column]) -> str:
    runs = any(column.read for column in columns)
    return "embeddings or pairs are missing" if runs else "all pairs are of one source"


def names(folders: Sequence[Path]) -> list[str]:
    """The folder's, or with the folder above it where two are called the same."""
    places = [folder.resolve() for folder in folders]
    short = [place.name for place in places]
    if len(set(short)) == len(short):
        return short
    longer = [f"{place.parent.name}/{place.name}" for place in places]
    return longer if len(set(longer)) == len(longer) else [f"{n}: {name}" for n, name in enumerate(short, 1)]


def _headline(columns: Sequence[Column]) -> tuple[str, str]:
    """As of one run, on a number that all of them have; by group where that differs in any."""
    by_group = [column for column in columns if conclusion.differs_by_group(column.one)]
    direction, key = conclusion.headline((by_group or columns)[0].one)
    if all(key in column.one.best.get(direction, {}) for column in columns):
        return direction, key
    shared = [k for k in columns[0].one.best[direction] if all(k in c.one.best.get(direction, {}) for c in columns)]
    if not shared:
        raise UserError("the runs have no metric in common", "validate them with the same validate.ks", ExitCode.RUN)
    return direction, shared[0]


def _rows(columns: Sequence[Column], direction: str) -> Iterator[Row]:
    tables = [{row.name: row for row in conclusion.rows(column.one, direction)} for column in columns]
    numbers = [{conclusion.named(key): (key, value) for key, value in c.one.best[direction].items()} for c in columns]
    for name, row in tables[0].items():
        if all(name in table for table in tables):
            key = numbers[0][name][0]
            values = np.array([number[name][1] for number in numbers])
            best = np.flatnonzero(values == (values.min() if conclusion.is_rank(key) else values.max())).tolist()
            yield Row(name, row.chance, [table[name].best for table in tables], best)


def _against_base(columns: Sequence[Column], direction: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each metric with the difference of each model that has a base, and what that is worth."""
    tables = [{row.name: row for row in conclusion.rows(c.one, direction)} for c in columns if c.one.before]
    for name in tables[0] if tables else ():
        if all(name in table for table in tables):
            yield name, [(table[name].difference, table[name].change) for table in tables]


def _noise(one: Column, other: Column, direction: str, key: str, console: Console) -> Interval | None:
    """The interval of one − other where both ranked the same pairs, which are still there."""
    embedded = _embedded(one), _embedded(other)
    if embedded[0] is None or embedded[1] is None or one.read is None or not one.pairs:
        return None
    try:
        pairs = record.pairs(one.read, one.one.split, embedded[0], console)
    except UserError:
        return None
    k = re.search(r"@(\d+)", key)
    left, right = (
        retrieval.rank(each.image_ND, each.text_ND, identities(pairs), [int(k[1]) if k else 1])[direction]
        for each in (embedded[0], embedded[1])
    )
    return intervals.differences(left.flat(), right.flat(), intervals.clusters(pairs)).get(key)


def _embedded(column: Column) -> Embedded | None:
    return column.read.embedded(column.one.split, "best") if column.read else None


def _may_show(column: Column) -> bool:
    return column.read is None or column.read.wanted is None or column.read.wanted.report.images


def _curves(columns: Sequence[Column], direction: str, key: str) -> Iterator[Chart]:
    lines = []
    runs = [(column.name, column.read) for column in columns if column.read]
    for name, read in runs:
        rows = [row for row in read.validations if key in row.get("val", {}).get(direction, {})]
        values = [100 * row["val"][direction][key] for row in rows]
        lines.append(Line(name, np.array([row["step"] for row in rows], np.float64), np.array(values)))
    if any(len(line.x) for line in lines):
        yield charts.curves(f"{conclusion.named(key)} (%) of val, {DIRECTIONS[direction]}", lines, dots=True)
    losses = [Line(n, read.losses["step"], read.losses["loss"]) for n, read in runs if "loss" in read.losses]
    if losses:
        yield charts.curves("loss", losses)


def _differences(columns: Sequence[Column], private: bool) -> Iterator[tuple[str, list[str]]]:
    """Each option in which the runs differ, with its value in each."""
    wanted = [column.read.wanted for column in columns if column.read]
    known = [one for one in wanted if one is not None]
    names = sorted({name for other in known[1:] for name in config.differences(known[0], other)} - {"output"})
    for name in names:
        hidden = private and name in _PLACES
        yield (
            name,
            ["–" if one is None else "…" if hidden else _option(one.model_dump(by_alias=True), name) for one in wanted],
        )


def _option(given: dict[str, Any], name: str) -> str:
    value: Any = given
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "null" if value is None else str(value)


def _facts(columns: Sequence[Column]) -> Iterator[tuple[str, list[str]]]:
    results = [column.read.results for column in columns if column.read]
    if not results:
        return
    yield "steps", [f"{one['steps']:,}; best at {one['best_step']:,}" for one in results]
    yield "time of training", [duration(one["seconds"]) if "seconds" in one else "–" for one in results]
    yield "processes", [f"{one.get('processes', '–')} on {one.get('device', '–')}" for one in results]
    direction, key = _headline(columns)
    before = [conclusion.value(key, c.one.before[direction][key]) if c.one.before else "–" for c in columns]
    yield f"{conclusion.named(key)} before, {DIRECTIONS[direction]}", before
