"""A checkpoint is written whole or not at all, a damaged one is found out, and the one before it is as good as new.

Killing and resuming bit for bit is in `tests/numerics/test_resume.py` and `tests/numerics/test_kills.py`.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from cytoclip import files, state, training
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.state import MANIFEST, MORE, TENSORS
from tests.conftest import weights
from tests.test_training import QUIET, Experiment, losses, no_step, stop_after

ALONE = World(torch.device("cpu"))


class Encoder(nn.Module):
    """Three parameters: a matrix, a bias that no loss reaches, and a scale without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.unused = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def moving(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def train_a_step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (self.scale * (self.weight @ torch.arange(3.0)).square().sum()).backward()
        optimizer.step()


def made() -> tuple[Encoder, torch.optim.Optimizer]:
    encoder = Encoder()
    return encoder, torch.optim.AdamW(encoder.parameters(), lr=0.1)


def saved(checkpoints: Path, *steps: int, keep: int = 9) -> Path:
    encoder, optimizer = made()
    for step in steps:
        state.save_state(checkpoints, step, encoder, optimizer, ALONE, {}, keep=keep)  # type: ignore[arg-type]
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# There and back


def test_all_comes_back_and_a_parameter_without_a_gradient_has_no_moments(tmp_path: Path) -> None:
    one, first = made()
    one.train_a_step(first)
    given = {"ema.weight": torch.randn(2, 2), "count": torch.tensor(3)}
    state.save_state(tmp_path, 1, one, first, ALONE, {"scores": [0.1 + 0.2]}, given)  # type: ignore[arg-type]
    drawn = torch.randn(3)
    other, second = made()
    more, extra = state.load_state(tmp_path / "step-1", other, second, ALONE)  # type: ignore[arg-type]
    assert more == {"step": 1, "scores": [0.1 + 0.2]}
    assert extra.keys() == given.keys()
    assert all(torch.equal(extra[name], given[name]) for name in given)
    assert torch.equal(torch.randn(3), drawn)
    assert other.unused not in second.state
    for _ in range(2):
        one.train_a_step(first)
        other.train_a_step(second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(other.weight, Encoder().weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """It belongs elsewhere, and must not be half loaded: by a name more, or by a shape."""
    saved(tmp_path, 1)
    renamed, wider = Encoder(), Encoder()
    renamed.more = nn.Parameter(torch.zeros(1))
    wider.unused = nn.Parameter(torch.zeros(4))
    for encoder in (renamed, wider):
        before = encoder.weight.detach().clone()
        with pytest.raises(UserError, match="other parameters") as caught:
            state.load_state(tmp_path / "step-1", encoder, made()[1], ALONE)  # type: ignore[arg-type]
        assert caught.value.code is ExitCode.RUN
        assert torch.equal(encoder.weight, before)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parameters_are_saved_whole_and_put_back_in_parts(mesh: Any, tmp_path: Path) -> None:
    plain, first = made()
    plain.train_a_step(first)
    state.save_state(tmp_path / "plain", 1, plain, first, ALONE, {})  # type: ignore[arg-type]
    sharded = Encoder()
    sharded.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
    second = torch.optim.AdamW(sharded.parameters())
    state.load_state(tmp_path / "plain" / "step-1", sharded, second, ALONE)  # type: ignore[arg-type]
    for tensor in (sharded.weight, second.state[sharded.weight]["exp_avg"]):
        assert isinstance(tensor, DTensor)
        assert tensor.placements == (Shard(0),)
    assert torch.equal(sharded.weight.full_tensor(), plain.weight)
    state.save_state(tmp_path / "sharded", 1, sharded, second, ALONE, {})  # type: ignore[arg-type]
    one, two = ((tmp_path / kind / "step-1" / TENSORS).read_bytes() for kind in ("plain", "sharded"))
    assert one == two


# Which are kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_what_a_crash_left_is_removed(tmp_path: Path, keep: int) -> None:
    for left in (".step-7.new", ".step-2.gone", "..step-1.gone.gone", ".step-4.old"):
        (tmp_path / left).mkdir()
    (tmp_path / "notes").mkdir()
    saved(tmp_path, 2, 8, 9, 10, keep=keep)
    assert names(tmp_path) == sorted(["notes", *[f"step-{step}" for step in (8, 9, 10)[-keep:]]])


def test_later_steps_than_the_one_saved_were_damaged_and_go(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6, 9)
    saved(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-3", "step-4"]


# Which is used


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-9]), "state.safetensors has .* of"),
    "one bit": (lambda f: flip(f / TENSORS), "state.safetensors is not what was written"),
    "one bit of the rest": (lambda f: flip(f / MORE), "state.json is not what was written"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "it has no manifest.json"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "it holds state.json, but should hold state.safetensors and"),
    "another file": (lambda f: (f / "optimizer.pt").write_bytes(b""), "it holds optimizer.pt, state.json, state.safe"),
    "half a manifest": (lambda f: (f / MANIFEST).write_text('{"step": 6, "fi'), "cannot be read: JSONDecodeError"),
    "no list": (lambda f: edit_manifest(f, lambda m: m.pop("files")), "cannot be read: KeyError"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "cannot be read: TypeError"),
    "another step's": (lambda f: edit_manifest(f, lambda m: m.update(step=3)), "it is that of step 3"),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "it has no manifest.json"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "cannot be read: NotADirectoryError"),
}


def test_there_are_twelve_kinds_of_damage() -> None:
    assert len(DAMAGE) == 12


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_with_a_reason(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, 3, 6)
    spoil, why = DAMAGE[kind]
    said: list[str] = []
    assert state.newest(tmp_path, said.append) == (6, tmp_path / "step-6")
    assert said == []
    spoil(tmp_path / "step-6")
    assert state.newest(tmp_path, said.append) == (3, tmp_path / "step-3")
    assert len(said) == 1
    assert said[0].startswith(f"the checkpoint {tmp_path / 'step-6'} is skipped: ")
    assert re.search(why, said[0]), said[0]


def test_where_none_can_be_used_it_says_so_and_where_there_is_none_the_run_begins(tmp_path: Path) -> None:
    assert state.newest(tmp_path / "nowhere", pytest.fail) is None
    saved(tmp_path, 3, 6)
    for folder in tmp_path.iterdir():
        flip(folder / TENSORS)
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"2 checkpoints and none can be used; step 6: .* not what was written"
    ) as caught:
        state.newest(tmp_path, said.append)
    assert len(said) == 2
    assert "start over" in caught.value.hint


def test_a_run_does_not_begin_anew_by_itself(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = experiment(checkpoint={"every": 1})
    stopped(wanted, 2, monkeypatch)
    run = Path(wanted.output)
    before = losses(run)
    for folder in (run / "checkpoints").iterdir():
        flip(folder / TENSORS)
    with monkeypatch.context() as no:
        no_step(no)
        with pytest.raises(UserError, match="none can be used"):
            training.fit(wanted, QUIET)
    assert losses(run) == before
    shutil.rmtree(run / "checkpoints")
    assert training.fit(wanted, QUIET).steps == 4


def test_the_log_names_what_was_skipped(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = experiment(checkpoint={"every": 1})
    stopped(wanted, 3, monkeypatch)
    run = Path(wanted.output)
    flip(run / "checkpoints" / "step-3" / TENSORS)
    training.fit(wanted, Console())
    log = (run / "train.log").read_text()
    assert f"warning: the checkpoint {run / 'checkpoints' / 'step-3'} is skipped" in log
    assert f"resuming {run} after step 2" in log


# A full disk


@pytest.mark.parametrize("by", ["safetensors", "json", "fsync"])
def test_a_full_disk_costs_one_checkpoint(
    by: str, experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two lines, the checkpoint before it as it was, and the same end once there is room again."""
    whole = experiment(checkpoint={"every": 1}, output=str(tmp_path / "whole"))
    training.fit(whole, QUIET)
    wanted = experiment(checkpoint={"every": 1})
    run = Path(wanted.output)
    with monkeypatch.context() as full:
        fill_the_disk(by, full)
        with pytest.raises(UserError, match="no space left on the disk while writing") as caught:
            training.fit(wanted, QUIET)
    assert caught.value.code is ExitCode.SYSTEM
    assert len(caught.value.lines().splitlines()) == 2
    assert names(run / "checkpoints") == ["step-1"]
    assert state.newest(run / "checkpoints", pytest.fail) == (1, run / "checkpoints" / "step-1")
    training.fit(wanted, QUIET)
    assert losses(run) == losses(whole.output)
    one, two = weights(run / "model"), weights(Path(whole.output) / "model")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def fill_the_disk(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second checkpoint on, the writer of its tensors, of its JSON, or the last sync finds no room."""
    error = {
        "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        "json": OSError(errno.ENOSPC, "No space left on device"),
        "fsync": OSError(errno.ENOSPC, "No space left on device"),
    }[by]
    place, name = {"safetensors": (state, "save_file"), "json": (files, "write_json"), "fsync": (files, "_sync_tree")}[
        by
    ]
    writes = getattr(place, name)

    def full(*given: Any) -> Any:
        target = next(part for part in given if isinstance(part, Path))
        if "step-2" in str(target):
            if by == "safetensors":
                target.write_bytes(b"half")
            raise error
        return writes(*given)

    monkeypatch.setattr(place, name, full)


def stopped(wanted: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(step, patched)
        with pytest.raises(KeyboardInterrupt):
            training.fit(wanted, QUIET)
