"""Killed and started again is the same run: losses and final weights bit for bit, with LoRA's dropout on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cytoclip import selection, state, training, validation
from cytoclip.config import parse
from cytoclip.console import Console
from tests.conftest import weights
from tests.numerics.nursery import spawn
from tests.numerics.one_rank import run

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


@pytest.mark.parametrize("name", TOWERS)
def test_from_the_checkpoint_before_a_damaged_one_it_comes_to_the_same_end(
    name: str, root: Path, base: Path, folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Stopped in step 6, its newest checkpoint cut short: best/, losses and curves are ahead of the one before.

    Every validation up to the stop is the best, so best/ is of a step that the older checkpoint does not know.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with each_the_best():
        run(_case(root, base, TOWERS[name], whole, None))
        with pytest.raises(_Stop):
            run_until(DIES, _case(root, base, TOWERS[name], cut, None))
        (kept, _), (newest, folder) = state.listed(cut / "checkpoints")
        assert (kept, newest) == (3, 4)
        (folder / state.TENSORS).write_bytes((folder / state.TENSORS).read_bytes()[:-1])
        run(_case(root, base, TOWERS[name], cut, None))
    _assert_equal(whole, cut)
    assert _losses(whole) == _losses(folders[name][0])
    shown = EventAccumulator(str(cut / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_best_and_its_scores_belong_together_at_every_checkpoint(
    root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back at step 3, best/ is of step 4: what is remembered as the best is forgotten, not said of other weights."""
    case = _case(root, base, {}, tmp_path / "run", None)
    with each_the_best():
        with pytest.raises(_Stop):
            run_until(DIES, case)
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    monkeypatch.setattr(selection, "score", lambda *_: 0.0)  # nothing is better than what is remembered
    assert run(case).best_step == 4


@pytest.mark.parametrize("name", TOWERS)
def test_a_finished_run_goes_on_to_more_steps_as_if_they_were_asked_at_once(
    name: str, root: Path, base: Path, tmp_path: Path
) -> None:
    def case(output: str, steps: int) -> dict[str, Any]:
        made = _case(root, base, TOWERS[name], tmp_path / output, None)
        made["config"]["train"] |= {"steps": steps, "schedule": "constant"}
        return made

    run(case("whole", STEPS))
    assert run(case("grown", DIES)).steps == DIES
    with pytest.raises(_Stop):
        run_until(STEPS - 1, case("grown", STEPS))
    assert not (tmp_path / "grown" / "results.json").exists(), "it would say that the longer run is finished"
    assert run(case("grown", STEPS)).steps == STEPS
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert _losses(whole) == _losses(grown)
    one, two = (weights(folder / "model") for folder in (whole, grown))
    assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)
    assert "steps: 9" in (grown / "config.yaml").read_text()
    shown = EventAccumulator(str(grown / "tensorboard"))
    shown.Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(1, STEPS + 1))


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


@pytest.mark.slow  # a group of two processes, 8 s
def test_one_process_goes_on_where_two_stopped(root: Path, base: Path, tmp_path: Path) -> None:
    """The same pairs in the same batches: losses as of two processes but for the order of sums."""
    two, one = tmp_path / "two", tmp_path / "one"
    (tmp_path / "cases.json").write_text(json.dumps([_case(root, base, {}, two, None)]))
    spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2)
    (tmp_path / "cases.json").write_text(json.dumps([_case(root, base, {}, one, DIES)]))
    spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2, code=-9)
    assert state.newest(one / "checkpoints", pytest.fail)[0] in (3, 4)  # type: ignore[index]
    run(_case(root, base, {}, one, None))
    assert [row["step"] for row in _losses(one)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in _losses(one)] == pytest.approx([row["loss"] for row in _losses(two)], rel=1e-5)
    assert [row["lr"] for row in _losses(one)] == [row["lr"] for row in _losses(two)]
    first = _losses(one)[4]["loss"]
    assert any(abs(row["loss"] - first) > 1e-2 for row in _losses(one)), "else other batches would pass too"


class _Stop(Exception):  # noqa: N818 - it is no error
    pass


def run_until(step: int, case: dict[str, Any]) -> None:
    """Stop as a kill in step `step` + 1 would, without a process of its own."""
    steps = training._step

    def stop(job: Any, at: int, *rest: Any) -> Any:
        if at == step:
            raise _Stop
        return steps(job, at, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "_step", stop)
        training.fit(parse(case["config"], "the case"), Console(quiet=True))


@contextmanager
def each_the_best() -> Iterator[None]:
    """Each validation is better than those before it."""
    notes = validation.note

    def note(job: Any, progress: Any, book: Any) -> bool:
        selection.score = lambda scores, *_: float(scores is progress.last)
        return notes(job, progress, book)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selection, "score", None)  # note's is undone with it
        patched.setattr(validation, "note", note)
        yield


def _assert_equal(whole: Path, cut: Path) -> None:
    assert _losses(whole) == _losses(cut)
    for folder in ("model", "best"):
        one, two = weights(whole / folder), weights(cut / folder)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[tensor], two[tensor]) for tensor in one)
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


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
