"""Each step stands once in the journal, however often the run was cut and begun again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cytoclip import journal as module
from cytoclip.errors import ExitCode, UserError
from cytoclip.journal import Journal, Stopwatch, note

CURVES = {"hit_at_1": 0.5, "pairs_per_second": 120.0, "waiting_for_data": 0.25}


def row(step: int) -> dict[str, float]:
    return {"step": step, "loss": 2.0 + step / 7, "lr": 1e-5}


def write(folder: Path, steps: range, done: int = 0, trackers: tuple[str, ...] = ()) -> Path:
    """A run of some steps that begins after `done`."""
    losses = folder / "losses.jsonl"
    journal = Journal(losses, folder, trackers, done)
    for step in steps:
        journal.step(row(step), CURVES)
    journal.close()
    return losses


def read(losses: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in losses.read_text().splitlines()]


def test_a_line_for_each_step_with_every_bit_of_the_loss(tmp_path: Path) -> None:
    """Resume is checked by comparing these numbers, so no digit may be rounded away."""
    assert read(write(tmp_path, range(1, 4))) == [row(1), row(2), row(3)]


def test_speeds_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    """They are never the same twice; two equal runs have equal losses."""
    losses = write(tmp_path, range(1, 3))
    assert set(read(losses)[0]) == {"step", "loss", "lr"}
    assert read(tmp_path / "curves.jsonl") == [{"step": step, **CURVES} for step in (1, 2)]


def test_validations_stand_once_each_and_the_start_s_is_step_0(tmp_path: Path) -> None:
    scored = {"pairs": 9, "image_to_text": {"hit@1": 0.5}, "text_to_image": {"hit@1": 0.25}, "chance": {}}

    def begun(done: int, steps: Iterable[int]) -> list[dict[str, Any]]:
        journal = Journal(tmp_path / "losses.jsonl", tmp_path, (), done)
        for step in steps:
            journal.validation(step, scored, scored if step else None)
        journal.sync()
        journal.close()
        return read(tmp_path / "validations.jsonl")

    assert [line["step"] for line in begun(0, (0, 2, 4))] == [0, 2, 4]
    assert [line["step"] for line in begun(3, (4, 6))] == [0, 2, 4, 6]
    assert begun(0, (0, 2)) == [{"step": 0, "val": scored}, {"step": 2, "val": scored, "keep": scored}], (
        "killed before its first checkpoint, a run begins with its first validation again"
    )


def test_a_line_is_on_the_disk_when_its_step_is_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "losses.jsonl", tmp_path, (), 0)
    journal.step(row(1), CURVES)
    assert read(tmp_path / "losses.jsonl") == [row(1)]  # before close(), which a kill never reaches
    journal.close()


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    assert read(write(tmp_path, range(6, 9), done=5)) == [row(step) for step in range(1, 9)]


def test_a_run_that_begins_again_from_nothing_has_only_its_own_lines(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    assert read(write(tmp_path, range(1, 3), done=0)) == [row(1), row(2)]


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', "", "{", '{"step": 4, "loss": 2.5'])
def test_a_half_written_last_line_is_dropped(tmp_path: Path, rest: str) -> None:
    losses = write(tmp_path, range(1, 4))
    losses.write_text(losses.read_text() + rest)
    assert read(write(tmp_path, range(4, 6), done=3)) == [row(step) for step in range(1, 6)]


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = write(tmp_path, range(1, 4))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Journal(losses, tmp_path, (), done=1)
    assert read(losses) == [row(1), row(2), row(3)]


def scalars(folder: Path) -> EventAccumulator:
    """What `tensorboard --logdir` of the run folder shows."""
    loaded = EventAccumulator(str(folder / "tensorboard"))
    loaded.Reload()
    return loaded


def test_tensorboard_has_the_rows_the_curves_and_the_validations(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "losses.jsonl", tmp_path, ["tensorboard"], 0)
    for step in (1, 2):
        journal.step(row(step), CURVES)
    scored = {direction: {"hit@1": 0.25, "hit@1_groups": 0.5} for direction in ("image_to_text", "text_to_image")}
    journal.validation(2, {"pairs": 20, "chance": {}, **scored}, {"pairs": 9, "chance": {}, **scored})
    journal.close()
    found = scalars(tmp_path)
    assert sorted(found.Tags()["scalars"]) == [
        "keep/image_to_text/hit@1", "keep/image_to_text/hit@1_groups",
        "keep/text_to_image/hit@1", "keep/text_to_image/hit@1_groups",
        "train/hit_at_1", "train/loss", "train/lr", "train/pairs_per_second", "train/waiting_for_data",
        "val/image_to_text/hit@1", "val/image_to_text/hit@1_groups",
        "val/text_to_image/hit@1", "val/text_to_image/hit@1_groups",
    ]  # fmt: skip
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (1, pytest.approx(row(1)["loss"])), (2, pytest.approx(row(2)["loss"])),
    ]  # fmt: skip
    assert [(event.step, event.value) for event in found.Scalars("val/text_to_image/hit@1_groups")] == [(2, 0.5)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), trackers=("tensorboard",))
    write(tmp_path, range(4, 7), done=3, trackers=("tensorboard",))
    assert [event.step for event in scalars(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_shows_each_step_once_after_a_resume_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of one second sort by the number of the process, which may be lower the second time."""
    for process, steps, done in ((2000, range(1, 6), 0), (1000, range(4, 7), 3)):
        monkeypatch.setattr(module.os, "getpid", lambda process=process: process)
        write(tmp_path, steps, done, trackers=("tensorboard",))
    assert [event.step for event in scalars(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_no_tracker_writes_no_other_file(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    assert {path.name for path in tmp_path.iterdir()} == {"losses.jsonl", "curves.jsonl", "validations.jsonl"}


def test_a_tracker_that_is_not_installed_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("not logged in")

    monkeypatch.setitem(module.LOGGER_TYPE_TO_CLASS, "wandb", missing)
    with pytest.raises(UserError, match=r"track\.to: wandb cannot start: not logged in") as caught:
        Journal(tmp_path / "losses.jsonl", tmp_path, ["wandb"], 0)
    assert caught.value.hint.startswith("pip install wandb")
    assert caught.value.code is ExitCode.SYSTEM
    module.check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"track\.to: trackio cannot start: it is not installed"):
        module.check_trackers(["tensorboard", "trackio"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Let `seconds` pass; gives the time then."""
    now = [500.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> float:
        now[0] += seconds
        return now[0]

    return wait


def test_the_stopwatch_reads_speed_and_waiting_since_its_last_reading(clock: Callable[[float], float]) -> None:
    watch = Stopwatch()
    began = clock(1)
    clock(3)
    watch.waited(began)
    clock(4)
    assert watch.read(64) == {"pairs_per_second": 8.0, "waiting_for_data": 0.375}  # 3 of 8 seconds
    clock(2)
    assert watch.read(64) == {"pairs_per_second": 32.0, "waiting_for_data": 0.0}


def test_the_stopwatch_adds_up_what_it_waited(clock: Callable[[float], float]) -> None:
    watch = Stopwatch()
    for _ in range(2):
        began = clock(1)
        clock(1)
        watch.waited(began)
    assert watch.read(4) == {"pairs_per_second": 1.0, "waiting_for_data": 0.5}


def test_a_reading_at_once_does_not_divide_by_zero(clock: Callable[[float], float]) -> None:
    reading = Stopwatch().read(0)
    assert reading == {"pairs_per_second": 0.0, "waiting_for_data": 0.0}


def test_the_training_line_says_what_chance_would_be() -> None:
    """Trap 37: a loss that stays at ln(batch) has learnt nothing."""
    assert note(row(1), CURVES, 6.238, "ln(batch)") == (
        "loss 2.143 (ln(batch) 6.238), hit@1 in batch 0.50, lr 1.00e-05, 120 pairs/s, 25% waiting for data"
    )
