"""What was measured: hit rates as plain data, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cytoclip.retrieval import HitRates

DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}

Scores = dict[str, Any]


def scores(measured: Mapping[str, HitRates], chance: HitRates) -> Scores:
    """Hit rates of each direction as JSON: `hit@k` by pair, and `hit@k_groups` where any right answer counts.

    Parameters
    ----------
    measured
        By `image_to_text` and `text_to_image`, or one of them.
    chance
        What a model that knows nothing scores on the same pairs; the same in both directions.
    """
    return {
        "pairs": chance.queries,
        **{name: _flat(rates) for name, rates in measured.items()},
        "chance": _flat(chance),
    }


def table(columns: Mapping[str, Scores], ks: Sequence[int]) -> str:
    """The scores side by side, a row for each k, chance last; rows by group only where they differ from by pair."""
    first = next(iter(columns.values()))
    pairs, chance = first["pairs"], first["chance"]
    lines = []
    for direction, title in DIRECTIONS.items():
        if direction not in first:
            continue
        query, gallery = title.split(" → ")
        lines += ["", f"{title}: each of {pairs} {query}s ranks all {pairs} {gallery}s"]
        rows = [
            (f"hit@{k}", *(column[direction][f"hit@{k}"] for column in columns.values()), chance[f"hit@{k}"])
            for k in ks
        ]
        by_group = [
            (
                f"hit@{k} by group",
                *(column[direction][f"hit@{k}_groups"] for column in columns.values()),
                chance[f"hit@{k}_groups"],
            )
            for k in ks
        ]
        if [row[1:] for row in rows] != [row[1:] for row in by_group]:
            rows += by_group
        lines += _aligned(["", *columns, "chance"], rows)
    return "\n".join(lines[1:])


def one_line(scored: Scores, ks: Sequence[int]) -> str:
    """`image → text hit@1 0.1230 hit@10 0.4560; text → image …`."""
    parts = []
    for direction, title in DIRECTIONS.items():
        if direction in scored:
            parts.append(f"{title} " + " ".join(f"hit@{k} {scored[direction][f'hit@{k}']:.4f}" for k in ks))
    return "; ".join(parts)


def _flat(rates: HitRates) -> dict[str, float]:
    strict = {f"hit@{k}": rates.strict[k] for k in rates.ks}
    return strict | {f"hit@{k}_groups": rates.groups[k] for k in rates.ks}


def _aligned(titles: list[str], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    cells = [titles, *([row[0], *(f"{value:.4f}" for value in row[1:])] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    return [
        (
            "  " + row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in cells
    ]
