"""Two processes with half a batch each train what one process with the whole batch trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import KEY_BIAS, weights
from tests.numerics.nursery import spawn
from tests.numerics.one_rank import run

TOWERS = [("full", "full"), ("lora", "full"), ("frozen", "full")]
CASES = [(f64, towers) for f64 in (True, False) for towers in TOWERS]


@pytest.fixture(scope="module")
def trained(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, Path]]:
    """The run folders (one process, two processes) of every case; the two processes are started once for all."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {key: _config(root, base, key[1]) for key in CASES}
    for processes in (1, 2):
        listed = [
            {"config": {**config, "output": str(folder / f"{i}-{processes}")}, "float64": key[0], "die_at": None}
            for i, (key, config) in enumerate(configs.items())
        ]
        if processes == 1:
            for case in listed:
                run(case)
        else:
            (folder / "cases.json").write_text(json.dumps(listed))
            spawn("tests.numerics.one_rank", [str(folder / "cases.json")], processes)
    return {key: (folder / f"{i}-1", folder / f"{i}-2") for i, key in enumerate(configs)}


def test_there_are_six_cases(trained: dict[Any, tuple[Path, Path]]) -> None:
    assert len(trained) == 6


@pytest.mark.parametrize("towers", TOWERS, ids="-".join)
def test_in_float64_the_weights_are_equal(towers: tuple[str, str], trained: dict[Any, tuple[Path, Path]]) -> None:
    one, two = (weights(run_folder / "model") for run_folder in trained[True, towers])
    assert one.keys() == two.keys()
    assert one["logit_scale"].dtype == np.float64
    assert max(np.abs(one[name] - two[name]).max() for name in one) < 1e-9


@pytest.mark.parametrize("towers", TOWERS, ids="-".join)
def test_in_float32_losses_and_weights_are_equal_to_rounding(
    towers: tuple[str, str], trained: dict[Any, tuple[Path, Path]]
) -> None:
    """Except attention key biases: their exact gradient is zero, and AdamW turns its rounding into whole steps."""
    folders = trained[False, towers]
    one, two = ([row["loss"] for row in _losses(folder)] for folder in folders)
    assert len(one) == 5
    assert one == pytest.approx(two, rel=1e-5)
    first, second = (weights(folder / "model") for folder in folders)
    compared = [name for name in first if not name.endswith(KEY_BIAS)]
    assert len(compared) == len(first) - 4  # two towers of two layers
    assert max(np.abs(first[name] - second[name]).max() for name in compared) < 1e-5


def test_the_weights_moved(trained: dict[Any, tuple[Path, Path]], base: Path) -> None:
    """So that the equalities above say something; and the logit scale moved as the rest did (trap 3)."""
    before = weights(base)
    for (_, towers), (one, _) in trained.items():
        after = weights(one / "model")
        still = {name for name in before if np.array_equal(before[name], after[name])}
        frozen = {name for name in before if name.startswith("vision_model")} if towers[0] == "frozen" else set()
        assert still >= frozen
        assert "logit_scale" not in still
        if towers[0] != "lora":
            assert still == frozen


def test_rates_and_rows_are_those_of_one_process(trained: dict[Any, tuple[Path, Path]]) -> None:
    """Trap 31: the schedule is not stepped once for each process."""
    for one, two in trained.values():
        assert [row["lr"] for row in _losses(one)] == [row["lr"] for row in _losses(two)]
        assert [row["step"] for row in _losses(two)] == [1, 2, 3, 4, 5]
        results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
        assert [r["processes"] for r in results] == [1, 2]
        assert results[0]["before"] == results[1]["before"]


def _config(root: Path, base: Path, towers: tuple[str, str]) -> dict[str, Any]:
    return {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base), "image_tower": towers[0], "text_tower": towers[1]},
        "train": {
            "steps": 5, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.1,
            "precision": "no", "device": "cpu",
        },
        "validate": {"every": 100, "ks": [1, 5]},
        "checkpoint": {"every": 100},
        "track": {"to": []},
    }  # fmt: skip


def _losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
