"""What was measured: every metric as plain data, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cytoclip import expected, intervals
from cytoclip.console import aligned
from cytoclip.intervals import Clusters, Interval
from cytoclip.retrieval import Ranked

DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
LOWER_IS_BETTER = ("median_rank", "mean_rank")
_TITLES = {"mrr": "MRR", "map": "mAP", "median_rank": "median rank"}

Scores = dict[str, Any]


def scores(ranked: Mapping[str, Ranked], chance: Ranked) -> Scores:
    """Each direction as JSON: `hit@k` and so on by pair, and `hit@k_groups` where any right answer counts.

    Parameters
    ----------
    ranked
        By `image_to_text` and `text_to_image`, or one of them.
    chance
        What a model that knows nothing scores on the same pairs; the same in both directions.
    """
    found: Scores = {"pairs": len(chance.strict["mrr"])}
    for name, one in {**ranked, "chance": chance}.items():
        found[name] = _flat(expected.summary(one.strict), expected.summary(one.groups))
    return found


def with_intervals(scored: Scores, ranked: Mapping[str, Ranked], drawn: Clusters) -> Scores:
    """The same with a 95 % interval for each number, and what was drawn for it."""
    return {
        **scored,
        "clusters": {"by": drawn.by, "count": drawn.count},
        "intervals": {name: _listed(intervals.intervals(one.flat(), drawn)) for name, one in ranked.items()},
    }


def slice_of(ranked: Mapping[str, Ranked], among: Any, drawn: Clusters) -> Scores:
    """The scores of some queries, each against the whole gallery; (N,) booleans say which. Intervals of hit@k only."""
    found: Scores = {"pairs": int(among.sum())}
    found["intervals"] = {}
    for name, one in ranked.items():
        strict, groups = ({key: column[among] for key, column in part.items()} for part in (one.strict, one.groups))
        found[name] = _flat(expected.summary(strict), expected.summary(groups))
        hits = {key: column for key, column in one.flat().items() if key.startswith("hit@")}
        found["intervals"][name] = _listed(intervals.intervals(hits, drawn, among))
    return found


def difference(
    one: tuple[Scores, Mapping[str, Ranked]], other: tuple[Scores, Mapping[str, Ranked]], drawn: Clusters
) -> Scores:
    """By how much `one` is above `other` on the same pairs, with its interval, and whether zero is outside of that."""
    found: Scores = {}
    for name in one[1]:
        limits = intervals.differences(one[1][name].flat(), other[1][name].flat(), drawn)
        found[name] = {
            key: {
                "by": one[0][name][key] - other[0][name][key],
                "interval": list(limits[key]) if key in limits else None,
                "beyond_noise": key in limits and not limits[key][0] <= 0 <= limits[key][1],
            }
            for key in one[0][name]
        }
    return found


def table(columns: Mapping[str, Scores], ks: Sequence[int]) -> str:
    """The scores side by side, a row for each metric, chance last; by group only where that differs from by pair."""
    first = next(iter(columns.values()))
    pairs, lines = first["pairs"], []
    for direction, title in DIRECTIONS.items():
        if direction not in first:
            continue
        query, gallery = title.split(" → ")
        lines += ["", f"{title}: each of {pairs} {query}s ranks all {pairs} {gallery}s"]
        lines += aligned([["", *columns, "chance"], *_rows(columns, direction, ks)])
    return "\n".join(lines[1:])


def difference_lines(difference: Scores, ks: Sequence[int]) -> list[str]:
    """For each direction its metrics with the interval, and whether that is beyond noise."""
    rows = []
    for direction, found in difference.items():
        for key in [*(f"hit@{k}" for k in ks), "mrr", "median_rank"]:
            one = found[key]
            span = f"[{', '.join(_signed(key, limit) for limit in one['interval'])}]" if one["interval"] else "–"
            verdict = "beyond noise" if one["beyond_noise"] else "within noise" if one["interval"] else "not known"
            rows.append([f"{DIRECTIONS[direction]} {_TITLES.get(key, key)}", _signed(key, one["by"]), span, verdict])
    return aligned([["", "by", "95 %", ""], *rows])


def names(columns: Mapping[str, Scores], direction: str, ks: Sequence[int]) -> dict[str, str]:
    """The metrics that a table shows of a direction, in order, and what it calls them.

    Those by group only where they differ from those by pair, for a model or for chance.
    """
    parts = [part for scored in columns.values() for part in (scored[direction], scored["chance"])]
    strict = [*(f"hit@{k}" for k in ks), "mrr", "median_rank"]
    shown = {key: _TITLES.get(key, key) for key in strict}
    if any(part[f"{key}_groups"] != part[key] for part in parts for key in strict):
        more = [*(f"hit@{k}" for k in ks), *(f"recall@{k}" for k in ks), "mrr", "map", "median_rank"]
        shown |= {f"{key}_groups": f"{_TITLES.get(key, key)} by group" for key in more if f"{key}_groups" in parts[0]}
    return shown


def one_line(scored: Scores, ks: Sequence[int]) -> str:
    """`image → text hit@1 0.1230 hit@10 0.4560; text → image …`."""
    parts = []
    for direction, title in DIRECTIONS.items():
        if direction in scored:
            parts.append(f"{title} " + " ".join(f"hit@{k} {scored[direction][f'hit@{k}']:.4f}" for k in ks))
    return "; ".join(parts)


def number(key: str, value: float) -> str:
    """As a table prints it: a rank to one place, all else to four."""
    return f"{value:.1f}" if key.removesuffix("_groups") in LOWER_IS_BETTER else f"{value:.4f}"


def _signed(key: str, value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "±") + number(key, abs(value))


def _flat(strict: Mapping[str, float], groups: Mapping[str, float]) -> dict[str, float]:
    return {**strict, **{f"{key}_groups": value for key, value in groups.items()}}


def _listed(found: Mapping[str, Interval]) -> dict[str, list[float]]:
    return {key: list(limits) for key, limits in found.items()}


def _rows(columns: Mapping[str, Scores], direction: str, ks: Sequence[int]) -> list[list[str]]:
    first = next(iter(columns.values()))
    rows = []
    for key, title in names(columns, direction, ks).items():
        cells = []
        for scored in columns.values():
            limits = scored.get("intervals", {}).get(direction, {}).get(key)
            span = f" [{', '.join(number(key, limit) for limit in limits)}]" if limits else ""
            cells.append(number(key, scored[direction][key]) + span)
        rows.append([title, *cells, number(key, first["chance"][key])])
    return rows
