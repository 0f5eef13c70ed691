"""Real micrographs beside the checkout, where they are: they are not ours to ship, so the suite does without them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from cytoclip import batches, training
from cytoclip.config import Config
from cytoclip.console import Console

DATA = Path(__file__).parents[2] / "shared" / "data" / "wbcatt_tiny"
QUIET = Console(quiet=True)

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real image-caption pairs are not beside this checkout")


def test_real_pairs_are_read_whole() -> None:
    for split, count in (("train", 64), ("val", 32)):
        pairs = batches.open_split(DATA / split, QUIET)
        assert len(pairs) == len(set(pairs.contents)) == len(set(pairs.captions)) == count


def test_a_small_model_learns_from_real_pairs(experiment: Callable[..., Config]) -> None:
    wanted = experiment(
        data={"root": str(DATA)},
        train={"steps": 150, "batch_size": 32, "learning_rate": 3e-3, "schedule": "cosine"},
        validate={"every": 150, "ks": [1, 10]},
    )
    result = training.fit(wanted, QUIET)
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (result.run / "losses.jsonl").open()]
    assert abs(losses[0] - math.log(32)) < 1
    assert sum(losses[-5:]) / 5 < math.log(32) - 0.5
    assert result.last["pairs"] == 32
