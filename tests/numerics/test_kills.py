"""Killed twenty times at the worst moments, a run ends as the one that never was: bit for bit, each step once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import weights
from tests.numerics.forked import IN_ALL_PROCESSES, MOMENTS

pytestmark = pytest.mark.slow  # two times 21 attempts of about a second

STEPS, SAVES, VALIDATES, KILLS = 60, 3, 4, 20
LORA = {"text_tower": "lora", "lora": {"dropout": 0.3}}


def kills(seed: int, processes: int) -> list[dict[str, Any]]:
    """Twenty moments, each kind at least once: a few steps, or one or two saves, after the run began again."""
    drawn = random.Random(seed)
    moments = [*MOMENTS, *drawn.choices(list(MOMENTS), k=KILLS - len(MOMENTS))]
    drawn.shuffle(moments)
    return [
        {
            "moment": moment,
            "after": drawn.randint(1, 4) if moment in ("forward", "backward", "optimizer moved") else 1,
            "rank": drawn.randrange(processes) if moment in IN_ALL_PROCESSES else 0,
        }
        for moment in moments
    ]


@pytest.mark.parametrize(("processes", "model"), [(1, {}), (2, LORA)], ids=["one", "two with dropout"])
def test_twenty_kills_change_nothing(
    processes: int, model: dict[str, Any], root: Path, base: Path, tmp_path: Path
) -> None:
    planned = kills(processes, processes)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    never, often = attempts(tmp_path, [
        {"config": experiment(root, base, model, whole), "processes": processes, "kills": []},
        {"config": experiment(root, base, model, cut), "processes": processes, "kills": planned},
    ])  # fmt: skip
    assert [attempt["hit"] for attempt in (*never, *often)] == ["", *[kill["moment"] for kill in planned], ""]
    assert len(planned) == KILLS
    assert {kill["moment"] for kill in planned} == set(MOMENTS)

    assert losses(whole) == losses(cut)
    assert [row["step"] for row in losses(cut)] == list(range(1, STEPS + 1))
    for folder in ("model", "best"):
        one, two = weights(whole / folder), weights(cut / folder)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    assert one["best_step"] == STEPS
    shown = EventAccumulator(str(cut / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, STEPS + 1))
    validated = list(range(0, STEPS + 1, VALIDATES))
    assert [event.step for event in shown.Scalars("val/image_to_text/hit@1")] == validated
    lines = [(folder / "validations.jsonl").read_text() for folder in (whole, cut)]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == validated
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-57", "step-60"]


def attempts(folder: Path, runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What `forked.py` made of the runs."""
    (folder / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.forked", str(folder / "runs.json"), str(folder / "outcomes.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads((folder / "outcomes.json").read_text())
    assert all(not any(run[-1]["codes"]) for run in found), done.stderr
    return found


def experiment(root: Path, base: Path, model: dict[str, Any], output: Path) -> dict[str, Any]:
    return {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base), **model},
        "train": {
            "steps": STEPS, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 5, "schedule": "cosine",
            "precision": "no", "device": "cpu",
        },
        "validate": {"every": VALIDATES, "ks": [1, 5]},
        "checkpoint": {"every": SAVES},
        "track": {"to": ["tensorboard"]},
        "output": str(output),
    }  # fmt: skip


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
