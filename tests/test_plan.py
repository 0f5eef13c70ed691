"""Lengths, sizes and costs of a run before it runs, and the batches that cannot be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cytoclip import adapters, checkpoint, files, plan, selection, training
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order
from cytoclip.plan import Plan
from tests.conftest import write_split

Experiment = Callable[..., Config]


def planned(wanted: Config, pairs: int = 48, processes: int = 1) -> Plan:
    opened = checkpoint.open_model(wanted.model.name)
    adapters.set_moving(opened.encoder, wanted.model)
    order = Order(pairs, wanted.train.batch_size, 0)
    return plan.plan(wanted, opened, order, World(torch.device("cpu"), 0, processes))


def test_steps_are_what_is_written(experiment: Experiment) -> None:
    found = planned(experiment(train={"steps": 30, "batch_size": 20}))
    assert (found.steps, found.steps_per_epoch) == (30, 2)
    assert found.times_seen == 30 * 20 / 48


def test_epochs_are_full_batches(experiment: Experiment) -> None:
    """The pairs over are dropped each epoch, so three epochs see a pair a little less than three times."""
    found = planned(experiment(train={"steps": None, "epochs": 3, "batch_size": 20}))
    assert (found.steps, found.steps_per_epoch) == (6, 2)
    assert found.times_seen == 2.5
    assert "seen 2.5 times" in found.text()
    assert "6: 3.0 epochs of 2" in found.text()


def test_a_batch_may_be_the_whole_split(experiment: Experiment) -> None:
    assert planned(experiment(train={"batch_size": 48})).steps_per_epoch == 1


def test_fewer_pairs_than_a_batch_names_both_numbers(experiment: Experiment) -> None:
    """Trap 30: there would be no full batch, and training would finish at once."""
    wanted = experiment(train={"batch_size": 52})
    with pytest.raises(UserError, match=r"48 training pairs are fewer than train\.batch_size 52") as caught:
        planned(wanted)
    assert "at most 48" in caught.value.hint
    assert caught.value.code is ExitCode.DATA
    with pytest.raises(UserError) as caught:
        planned(wanted, pairs=47, processes=4)
    assert "at most 44" in caught.value.hint, "the processes must divide what is proposed"


@pytest.mark.parametrize(
    ("batch", "processes", "near"), [(10, 4, "8 or 12"), (9, 4, "8 or 12"), (11, 4, "12 or 8"), (2, 3, "to 3")]
)
def test_an_indivisible_batch_names_the_nearest(batch: int, processes: int, near: str, experiment: Experiment) -> None:
    with pytest.raises(UserError, match=f"{batch} is not divisible by the {processes} processes") as caught:
        plan.check_batch(experiment(train={"batch_size": batch}), processes)
    assert near in caught.value.hint
    for proposed in (int(word) for word in caught.value.hint.replace(",", " ").split() if word.isdigit()):
        plan.check_batch(experiment(train={"batch_size": proposed}), processes)


def test_a_process_holds_its_share_or_a_chunk_of_it(experiment: Experiment) -> None:
    assert plan.held(experiment(), 1) == 12
    assert plan.held(experiment(), 4) == 3
    assert plan.held(experiment(train={"micro_batch_size": 2}), 4) == 2
    assert plan.held(experiment(train={"micro_batch_size": 8}), 4) == 3


def test_sizes_are_those_that_move_of_those_there_are(experiment: Experiment) -> None:
    clip = checkpoint.open_model(experiment().model.name).encoder.clip
    counts = {
        "image tower": sum(p.numel() for p in clip.vision_model.parameters()),
        "text tower": sum(p.numel() for p in clip.text_model.parameters()),
        "projections": 2 * 32 * 16,
        "logit scale": 1,
    }
    found = planned(experiment(model={"image_tower": "frozen"}))
    assert found.sizes == {name: (0 if name == "image tower" else total, total) for name, total in counts.items()}
    assert sum(counts.values()) == sum(p.numel() for p in clip.parameters())
    assert f"0 of {counts['image tower']:,} parameters train" in found.text()


def test_a_frozen_tower_keeps_no_activations_and_a_larger_batch_keeps_more(experiment: Experiment) -> None:
    def activations(batch: int = 12, processes: int = 1, precision: str = "no", **towers: str) -> int:
        wanted = experiment(train={"batch_size": batch, "precision": precision}, model=towers)
        found = planned(wanted, processes=processes)
        moving, total = (sum(column) for column in zip(*found.sizes.values(), strict=True))
        return found.memory - 4 * total - 12 * moving  # weights; gradients and two moments

    both = activations()
    image, text = activations(text_tower="frozen"), activations(image_tower="frozen")
    assert 0 < image < text < both == image + text  # 5 patches against 77 tokens
    assert activations(image_tower="frozen", text_tower="frozen") == 0
    assert activations(image_tower="lora", text_tower="lora") == both
    assert activations(batch=24) == 2 * both == activations(batch=48, processes=2)
    assert activations(precision="bf16") * 81 == both * 49


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_a_layer_keeps_is_what_autograd_keeps(precision: str, experiment: Experiment) -> None:
    """Counted: the storages that the backward pass of three pairs asks for."""
    wanted = experiment(train={"precision": precision})
    opened = checkpoint.open_model(wanted.model.name)
    world = World(torch.device("cpu"), precision=precision)
    weights = {parameter.untyped_storage().data_ptr() for parameter in opened.encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and len(tensor) in (3, 3 * 77, 3 * 5):  # else a weight that was cast
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), world.autocast():
        opened.encoder(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.ones(3, 77, dtype=torch.int64))
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert counted / 3 == pytest.approx(plan.bytes_per_pair(wanted, opened), rel=0.15)


@pytest.mark.parametrize(
    "towers",
    [{}, {"image_tower": "lora", "text_tower": "lora"}, {"image_tower": "lora"}],
    ids=["full", "adapter", "mixed"],
)
@pytest.mark.parametrize("keep", [1, 3])
def test_the_disk_estimate_holds_the_run_folder_at_its_largest(
    towers: dict[str, str], keep: int, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights, which are all that counts in a model of real size: tokenizer and logs are left out here.

    The folder is largest while a new model or checkpoint stands beside the one that it replaces, so it is measured
    whenever one is complete.
    """
    wanted = experiment(
        model=towers,
        train={"steps": 4},
        checkpoint={"every": 1, "keep_last": keep},
        validate={"every": 1},
        track={"to": []},
    )
    sizes: list[int] = []
    syncs = files._sync_tree

    def sync_and_measure(folder: Path) -> None:
        syncs(folder)
        sizes.append(sum(p.stat().st_size for p in Path(wanted.output).rglob("*.safetensors")))

    monkeypatch.setattr(files, "_sync_tree", sync_and_measure)
    monkeypatch.setattr(selection, "score", _growing())  # each validation is the best, so each is saved
    expected = training.dry_run(wanted, Console(quiet=True)).disk
    training.fit(wanted, Console(quiet=True))
    states = [p.stat().st_size for p in RunFolder(Path(wanted.output)).checkpoints.rglob("state.safetensors")]
    assert len(states) == keep
    assert len(sizes) == 4 + 4 + 1  # best and state of each step, and the last model
    assert max(sizes) > max((keep + 1) * states[0], sizes[-1])
    slack = 40_000  # names and shapes in the headers of files, which matter only in a model this small
    assert max(sizes) <= expected + slack
    assert expected < 3 * max(sizes), "an estimate that refuses disks that would do"


def test_embeddings_of_what_is_ranked_are_counted(experiment: Experiment, root: Path, tmp_path: Path) -> None:
    """Of val and test by two models, and the file that is written beside the one it replaces."""
    data = shutil.copytree(root, tmp_path / "data")
    write_split(data / "test", 30, seed=3)
    without, found = (
        training.dry_run(experiment(data={"root": str(place)}), Console(quiet=True)).disk for place in (root, data)
    )
    wanted = experiment(data={"root": str(data)})
    training.fit(wanted, Console(quiet=True))
    sizes = {path.name: path.stat().st_size for path in RunFolder(Path(wanted.output)).embeddings.iterdir()}
    bare = {name: 2 * 16 * 4 * (30 if name.startswith("test") else 20) for name in sizes}
    assert all(0 < sizes[name] - bare[name] < 1000 for name in sizes), "no more than a header beside the rows"
    assert len(sizes) == 4
    assert found - without == 1.5 * (bare["test-before.safetensors"] + bare["test-best.safetensors"])


def _growing() -> Callable[[Any, str], float]:
    """A score that is higher whenever a validation is asked for it first, and lower for the best so far."""
    calls = iter(range(1000))
    return lambda *_: float(-(next(calls) % 2))
