"""Killed and started again is the same run: losses and final weights bit for bit, with LoRA's dropout on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import state
from tests.conftest import weights
from tests.numerics.one_rank import run
from tests.numerics.test_processes import spawn

TOWERS = {"full": {}, "lora with dropout": {"text_tower": "lora", "lora": {"dropout": 0.3}}}
STEPS, EVERY, DIES = 9, 3, 5  # 4 steps an epoch: the kill and the resume fall into different epochs


@pytest.fixture(scope="module")
def folders(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """(uninterrupted, killed in step 6 and resumed after step 3 or 4) run folders; one process dies for each."""
    home = tmp_path_factory.mktemp("resume")
    made = {}
    for i, (name, model) in enumerate(TOWERS.items()):
        whole, cut = home / f"{i}-whole", home / f"{i}-cut"
        run(_case(root, base, model, whole, None))
        (home / "cases.json").write_text(json.dumps([_case(root, base, model, cut, DIES)]))
        died = subprocess.run(
            [sys.executable, "-m", "tests.numerics.one_rank", str(home / "cases.json")],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert died.returncode == -9, died.stderr
        assert not (cut / "results.json").exists()
        states = {step for step, _ in state.listed(cut / "checkpoints")}
        assert states in ({2, 3}, {3, 4})  # 2 and 4 if they were the best validations so far
        assert len(_losses(cut)) == DIES
        run(_case(root, base, model, cut, None))
        made[name] = (whole, cut)
    return made


@pytest.mark.parametrize("name", TOWERS)
def test_losses_are_equal_and_each_step_stands_once(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    whole, cut = (_losses(folder) for folder in folders[name])
    assert whole == cut
    assert [row["step"] for row in cut] == list(range(1, STEPS + 1))
    assert set(cut[0]) == {"step", "loss", "lr", "logit_scale", "gradient_norm"}
    assert all(row["gradient_norm"] > 0 for row in cut)


@pytest.mark.parametrize("name", TOWERS)
def test_final_weights_are_equal_to_the_last_bit(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    whole, cut = (weights(folder / "model") for folder in folders[name])
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(whole[tensor], cut[tensor]) for tensor in whole)


@pytest.mark.parametrize("name", TOWERS)
def test_results_are_equal_but_for_the_time(name: str, folders: dict[str, tuple[Path, Path]]) -> None:
    whole, cut = (json.loads((folder / "results.json").read_text()) for folder in folders[name])
    assert {**whole, "seconds": 0} == {**cut, "seconds": 0}


@pytest.mark.slow  # three groups of two processes, 8 s each
def test_two_processes_with_dropout_go_on_bit_for_bit(root: Path, base: Path, tmp_path: Path) -> None:
    """Trap 8: each process draws masks of its own, and gets its own random state back."""
    model = TOWERS["lora with dropout"]
    for i, (name, die_at) in enumerate((("whole", None), ("cut", DIES), ("cut", None))):
        cases = tmp_path / f"{i}.json"
        cases.write_text(json.dumps([_case(root, base, model, tmp_path / name, die_at)]))
        assert (tmp_path / name / "checkpoints").is_dir() == (i == 2), "the last one goes on"
        spawn("tests.numerics.one_rank", [str(cases)], 2, code=-9 if die_at else 0)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _losses(whole) == _losses(cut)
    one, two = (weights(folder / "model") for folder in (whole, cut))
    assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)


@pytest.mark.slow  # a group of two processes that stops, and one that goes on, 8 s each
def test_a_signal_to_one_process_stops_all_after_the_same_step(root: Path, base: Path, tmp_path: Path) -> None:
    case = {**_case(root, base, {}, tmp_path / "run", 4), "signal": int(signal.SIGTERM), "rank": 1}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2, code=143)
    assert state.newest(tmp_path / "run" / "checkpoints", pytest.fail)[0] == 5  # type: ignore[index]
    assert len(_losses(tmp_path / "run")) == 5
    (tmp_path / "cases.json").write_text(json.dumps([{**case, "die_at": None}]))
    spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2)
    assert [row["step"] for row in _losses(tmp_path / "run")] == list(range(1, STEPS + 1))


def _case(root: Path, base: Path, model: dict[str, Any], output: Path, die_at: int | None) -> dict[str, Any]:
    config = {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base), **model},
        "train": {
            "steps": STEPS, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 2, "schedule": "cosine",
            "precision": "no", "device": "cpu",
        },
        "validate": {"every": 2, "ks": [1, 5]},
        "checkpoint": {"every": EVERY},
        "track": {"to": ["tensorboard"]},
        "output": str(output),
    }  # fmt: skip
    return {"config": config, "float64": False, "die_at": die_at}


def _losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
