"""Training in fp16: gradients are clipped in their own units, and the loss scale goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cytoclip import training
from cytoclip.config import Config
from cytoclip.console import Console
from tests.test_training import losses, stop_after

QUIET = Console(quiet=True)


def scaler(run: Config) -> Any:
    return json.loads((Path(run.output) / "checkpoints" / "step-8" / "state.json").read_text())["scaler"]


def test_a_norm_is_that_of_the_gradient_and_a_resumed_run_keeps_its_loss_scale(
    experiment: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps 8 and 9: the loss scale is 65,536 at first, and would be in the norm and the clip, or begin anew."""
    half = {"precision": "fp16", "steps": 8}
    whole, stopped = (
        experiment(train=half, checkpoint={"every": 4}, output=str(tmp_path / name)) for name in ("whole", "stopped")
    )
    training.fit(whole, QUIET)
    norms = [row["gradient_norm"] for row in losses(whole.output)]
    assert None in norms, "the first scale is too large for some step"
    assert 1 < max(norm for norm in norms if norm) < 1000
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            training.fit(stopped, QUIET)
    training.fit(stopped, QUIET)
    assert scaler(stopped) == scaler(whole)
    assert losses(stopped.output) == losses(whole.output)
