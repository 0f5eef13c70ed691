"""What is wanted of the lines of `bench/gpu.py`: each target beside what was measured, and a JSON line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Line = dict[str, Any]
PARTS = (("plain", "lora"), ("compiled", "lora-compiled"))  # of all weights, and of adapters


def card(lines: list[Line]) -> list[Line]:
    """Print the targets whose parts were measured; each with `wanted`, `found` and whether it is `reached`."""
    found = [*_shares(lines), *_chunks(lines), *_adapters(lines)]
    for one in found:
        print(f"  {one['what']:<60} {one['found']:.3f}, wanted {one['wanted']}{'' if one['reached'] else ': missed'}")
    print(json.dumps({"targets": found}), flush=True)
    return found


def _shares(lines: list[Line]) -> Iterator[Line]:
    facts = next((line for line in lines if "matrix TFLOP/s" in line), None)
    for part, _ in PARTS:
        best = max(_whole(lines, part).values(), key=_speed, default=None)
        if facts and best:
            most = facts["matrix TFLOP/s"] * 1e3 / facts["GFLOP a pair"]  # pairs a second, were there nothing else
            yield _target(f"share of the matrix rate, {part}, {best['batch']} pairs", _speed(best) / most, 0.45)


def _chunks(lines: list[Line]) -> Iterator[Line]:
    for line in lines:
        part = "plain" if line["part"] == "cached" else line["part"]
        whole = _whole(lines, part).get(line.get("chunk", 0))
        if part in dict(PARTS) and whole and "pairs/s" in line and line["batch"] > line["chunk"]:
            what = f"{line['batch']} pairs in chunks of {line['chunk']}, {part}, against one"
            yield _target(what, _speed(line) / _speed(whole), 0.72)


def _adapters(lines: list[Line]) -> Iterator[Line]:
    for part, lora in PARTS:
        one, other = _whole(lines, part), _whole(lines, lora)
        if shared := one.keys() & other.keys():
            batch = max(shared)
            what = f"LoRA against all weights, {part}, {batch} pairs"
            yield _target(what, _speed(other[batch]) / _speed(one[batch]), 1.3)


def _whole(lines: list[Line], part: str) -> dict[int, Line]:
    """By batch what a part measured in one chunk that fitted, as a run has it: leaner, of its own weights."""
    return {
        line["batch"]: line
        for line in lines
        if line["part"] == part and line.get("batch") == line.get("chunk") and "pairs/s" in line
        if line.get("leaner", True) and "all weights" not in line
    }


def _speed(line: Line) -> float:
    return float(line["pairs/s"])


def _target(what: str, found: float, wanted: float) -> Line:
    return {"what": what, "found": round(found, 3), "wanted": wanted, "reached": found >= wanted}
