"""Twenty losses of the demo's model are those in the tree: to the last bit on the kind of machine they are from."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.numerics.golden import BATCH, FILE, STEPS

pytestmark = pytest.mark.slow  # two processes that each import everything: 10 s each

KEPT = json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("golden") / "losses.json")


def test_losses_are_the_golden_ones(whole: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    other = [f"{key} {whole[key]}, not {KEPT[key]}" for key in KEPT if key != "losses" and whole[key] != KEPT[key]]
    with capsys.disabled():
        print(f"\ngolden losses: {'within 1e-4: ' + '; '.join(other) if other else 'exactly, on the same machine'}")
    assert len(whole["losses"]) == STEPS
    assert whole["losses"] == (pytest.approx(KEPT["losses"], rel=1e-4) if other else KEPT["losses"])


def test_they_begin_above_chance_and_fall() -> None:
    """A file written from a broken product would hold that."""
    assert len(KEPT["losses"]) == STEPS
    assert math.log(BATCH) - 0.5 < KEPT["losses"][0] < math.log(BATCH) + 2
    assert sum(KEPT["losses"][-3:]) < sum(KEPT["losses"][:3]) - 1


def test_chunks_give_the_same_losses(whole: dict[str, Any], tmp_path: Path) -> None:
    chunked = measured(tmp_path / "losses.json", "8")
    assert chunked["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def measured(target: Path, *chunk: str) -> dict[str, Any]:
    """What `golden.py` writes, from a process of its own: threads and random states are as it sets them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.golden", str(target), *chunk],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(target.read_text())
    return found
