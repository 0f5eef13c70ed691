"""What the runs of `bench/recipe.py` come to: final recipes on val, held against each other pair by pair.

Letters: N pairs, R resamples.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import batches, embeddings, intervals, retrieval
from cytoclip.console import Console, aligned
from cytoclip.pairs import identities, spread

KS = (1, 10, 50)
MOST = 12  # finals in one file of embeddings: 1 MB each
GOALS = (("full", "baseline"), ("lora", "baseline"), ("full", "given"), ("lora", "full"), ("full quarter", "baseline"),
         ("lora quarter", "baseline"), ("baseline", "given"))  # fmt: skip
Line = dict[str, Any]


def summary(lines: list[Line], home: Path, to: Path) -> tuple[str, Line]:
    """A card for people and the same as JSON; embeddings of final runs are packed beside it."""
    final = [x for x in lines if x["stage"] == "final" and "failed" not in x]
    failed = [x["failed"] for x in lines if "failed" in x]
    there = [x for x in final if (home / "final" / f"{x.get('embeddings')}.safetensors").is_file()]
    found: Line = {"runs": len(lines), "failed": len(failed), "ended": sum("ended" in x for x in lines)}
    found["first failures"] = sorted(set(failed))[:3]
    found["chosen"] = {x["arm"]: x["params"] for x in final}
    found["search"] = {arm: _searched(lines, arm) for arm in ("baseline", "full", "lora")}
    found["without"] = _without(lines)
    if there:
        found["final"], found["against"] = _measured(there, home)
        _pack(there, home, to)
    (to / "summary.json").write_text(json.dumps(found))
    rows = [["", "runs", "hit@1", "hit@10", "95 %", "hit@50"]]
    for arm, one in found.get("final", {}).items():
        span = "{:.3f}–{:.3f}".format(*one["interval"])
        rows.append(
            [arm, str(one["runs"]), *(f"{one[k]:.3f}" for k in ("hit@1", "hit@10")), span, f"{one['hit@50']:.3f}"]
        )
    against = [["hit@10", "times", "95 %", "more by", "95 %"]]
    for name, one in found.get("against", {}).items():
        times, by = ("{:.3f}–{:.3f}".format(*one[k]) for k in ("times interval", "by interval"))
        against.append([name, f"{one['times']:.3f}", times, f"{one['by']:+.3f}", by])
    lost = [["without", "score", "runs"], *([k, f"{v[0]:+.4f}", str(v[1])] for k, v in found["without"].items())]
    return "\n".join([*aligned(rows), "", *aligned(against), "", *aligned(lost)]), found


def _searched(lines: list[Line], arm: str) -> Line:
    of = [x for x in lines if x["stage"] == "search" and x["arm"] == arm and "failed" not in x]
    whole = sorted((x for x in of if "ended" not in x), key=lambda x: -x["score"])
    return {"trials": len(of), "whole": len(whole), "best": [round(x["score"], 4) for x in whole[:5]]}


def _without(lines: list[Line]) -> dict[str, tuple[float, int]]:
    """By how much the score changes without an option, mean over the cuts on which both were run."""
    scores: dict[tuple[str, int], float] = {}
    for line in lines:
        if line["cut"] is not None and "score" in line and "ended" not in line:
            scores[json.dumps(line["params"], sort_keys=True), line["cut"]] = line["score"]
    best = {x["arm"]: json.dumps(x["params"], sort_keys=True) for x in lines if x["stage"] == "final"}
    by: dict[str, list[float]] = {}
    for line in lines:
        whole = scores.get((best.get(line["arm"], ""), line["cut"]))
        if line["stage"] == "without" and "score" in line and whole is not None:
            by.setdefault(line["name"], []).append(line["score"] - whole)
    return {name: (mean(some), len(some)) for name, some in sorted(by.items(), key=lambda item: mean(item[1]))}


def _measured(final: list[Line], home: Path) -> tuple[Line, Line]:
    pairs = spread(batches.open_split(home / "data" / "val", Console(quiet=True)))
    identity, drawn = identities(pairs), intervals.clusters(pairs)
    columns: dict[str, list[dict[str, NDArray[np.float64]]]] = {}
    for line in final:
        image_ND, text_ND = embeddings.read(home / "final" / f"{line['embeddings']}.safetensors")
        ranked = retrieval.rank(image_ND, text_ND, identity, KS)
        both = {
            f"hit@{k}{short}": np.mean([ranked[s].strict[f"hit@{k}"] for s in sides], axis=0)
            for k in KS
            for short, sides in (("", list(ranked)), *((f" {side}", [side]) for side in ranked))
        }
        columns.setdefault(line["arm"], []).append(both)
    means = {arm: {k: np.mean([one[k] for one in some], axis=0) for k in some[0]} for arm, some in columns.items()}
    found: Line = {}
    for arm, column in means.items():
        found[arm] = {k: round(float(value.mean()), 4) for k, value in column.items()}
        found[arm]["runs"] = len(columns[arm])
        found[arm]["each hit@10"] = [round(float(one["hit@10"].mean()), 4) for one in columns[arm]]
        found[arm]["interval"] = _rounded(intervals.intervals({"hit@10": column["hit@10"]}, drawn)["hit@10"])
    weights_RN = intervals.weights(drawn.count).astype(np.float64)[:, drawn.of]
    against = {}
    for one, other in GOALS:
        if one in means and other in means:
            a_N, b_N = means[one]["hit@10"], means[other]["hit@10"]
            ratio_R = (weights_RN @ a_N) / np.maximum(weights_RN @ b_N, 1e-9)
            by_R = (weights_RN @ (a_N - b_N)) / weights_RN.sum(1)
            against[f"{one} / {other}"] = {
                "times": round(float(a_N.mean() / b_N.mean()), 4),
                "times interval": _rounded(np.percentile(ratio_R, (2.5, 97.5))),
                "by": round(float((a_N - b_N).mean()), 4),
                "by interval": _rounded(np.percentile(by_R, (2.5, 97.5))),
            }
    return found, against


def _pack(final: list[Line], home: Path, to: Path) -> None:
    from safetensors.torch import load_file, save_file

    for begin in range(0, len(final), MOST):
        tensors = {}
        for line in final[begin : begin + MOST]:
            for side, rows in load_file(home / "final" / f"{line['embeddings']}.safetensors").items():
                tensors[f"{line['name']}/{side}"] = rows
        save_file(tensors, to / f"final-{begin // MOST + 1}.safetensors")


def _rounded(span: Any) -> list[float]:
    return [round(float(end), 4) for end in span]
