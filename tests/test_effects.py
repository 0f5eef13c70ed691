"""Each option of training does what its text says, seen in a whole run of a few steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cytoclip import checkpoint, config, features, jobs, outcome, training
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import UserError
from tests import tiny
from tests.conftest import weights

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]


def losses(wanted: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(wanted.output) / "losses.jsonl").read_text().splitlines()]


def log(wanted: Config) -> str:
    return (Path(wanted.output) / "train.log").read_text()


def ran(experiment: Experiment, place: Path, name: str, **sections: Any) -> Config:
    wanted = experiment(output=str(place / name), **sections)
    training.fit(wanted, Console())
    return wanted


# train.ema


def test_averages_are_what_is_validated_and_saved(experiment: Experiment, tmp_path: Path) -> None:
    """By hand from the weights of every step; a decay of 0.5 weighs the last ones 1/2, 1/4, and so on."""
    every = {"validate": {"every": 1}, "checkpoint": {"every": 1, "keep_last": 9}}
    plain = ran(experiment, tmp_path, "plain", **every)
    averaged = ran(experiment, tmp_path, "averaged", **every, train={"ema": 0.5})
    assert losses(plain) == losses(averaged), "what trains is not touched"
    expected = weights(Path(plain.model.name))["text_projection.weight"].astype(np.float64)
    for step in range(1, 5):
        at = load(plain, step)["param.text_projection.weight"]
        assert torch.equal(at, load(averaged, step)["param.text_projection.weight"])
        expected = 0.5 * expected + 0.5 * at.numpy()
    assert np.allclose(weights(Path(averaged.output) / "model")["text_projection.weight"], expected, atol=1e-6)
    scored = json.loads((Path(averaged.output) / "results.json").read_text())["last"]
    again = tiny.scores_of(f"{averaged.output}/model", Path(str(averaged.data.root)) / "val", [1, 5], 12)
    assert again["image_to_text"] == scored["image_to_text"]


def test_averages_go_on_where_they_were(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(experiment, tmp_path, "whole", train={"ema": 0.9}, checkpoint={"every": 2})
    steps = training._step

    def die(job: Any, step: int, *rest: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return steps(job, step, *rest)

    monkeypatch.setattr(training, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        ran(experiment, tmp_path, "cut", train={"ema": 0.9}, checkpoint={"every": 2})
    monkeypatch.undo()
    cut = ran(experiment, tmp_path, "cut", train={"ema": 0.9}, checkpoint={"every": 2})
    one, two = (weights(Path(wanted.output) / "model") for wanted in (whole, cut))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def load(wanted: Config, step: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(wanted.output) / "checkpoints" / f"step-{step}" / "state.safetensors")


# train.anchor


def test_the_anchor_holds_the_embeddings_near_the_starting_model_s(experiment: Experiment, tmp_path: Path) -> None:
    longer = {"steps": 12, "learning_rate": 3e-3}
    free = ran(experiment, tmp_path, "free", train=longer)
    held = ran(experiment, tmp_path, "held", train={**longer, "anchor": {"embeddings": 30.0, "similarities": 30.0}})
    assert losses(free)[0] == pytest.approx(losses(held)[0], abs=1e-6), "it pulls at nothing before the first step"
    start = embedded(free.model.name, free)
    away = {
        name: float((embedded(f"{wanted.output}/model", wanted) - start).norm(dim=1).mean())
        for name, wanted in (("free", free), ("held", held))
    }
    assert away["held"] < 0.5 * away["free"]
    assert away["held"] > 0


@torch.no_grad()
def embedded(name: str, wanted: Config) -> torch.Tensor:
    opened = checkpoint.open_model(name)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return opened.encoder.eval().images(pixels)


# stored features of frozen towers


@pytest.mark.parametrize(("image_tower", "text_tower"), [("frozen", "full"), ("lora", "frozen"), ("frozen", "frozen")])
def test_a_frozen_tower_is_asked_once_and_the_run_is_the_same(
    image_tower: str, text_tower: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the twin that embeds every picture in every step."""
    model = {"image_tower": image_tower, "text_tower": text_tower}
    calls: dict[str, int] = {"images": 0, "texts": 0}
    whole = {"images": checkpoint.DualEncoder.image_features, "texts": checkpoint.DualEncoder.text_features}
    for side, name in (("images", "image_features"), ("texts", "text_features")):

        def counting(self: Any, *given: Any, side: str = side) -> Any:
            calls[side] += len(given[0]) if len(given[0]) > 1 else 0  # a blank pair is tried at opening
            return whole[side](self, *given)

        monkeypatch.setattr(checkpoint.DualEncoder, name, counting)
    monkeypatch.setattr(outcome, "_by_class", lambda _: {})  # whose prompts are other captions
    stored = ran(experiment, tmp_path / "a", "run", model=model, train={"steps": 8})
    split = {name: json.loads((Path(str(stored.data.root)) / name / "img_text_pair.json").read_text())
             for name in ("train", "val")}  # fmt: skip
    different = {"images": 48 + 20, "texts": sum(len({e["caption"] for e in entries}) for entries in split.values())}
    for side, tower in (("images", image_tower), ("texts", text_tower)):
        padding = 12  # the last round is filled up
        assert (calls[side] <= different[side] + 2 * padding) == (tower == "frozen"), side
    calls.update(images=0, texts=0)
    ran(experiment, tmp_path / "a", "again", model=model, train={"steps": 8})
    for side, tower in (("images", image_tower), ("texts", text_tower)):
        assert (calls[side] == 0) == (tower == "frozen"), "found where the first run left them"
    prepare = jobs.prepare
    monkeypatch.setattr(jobs, "prepare", lambda *given, **_: prepare(*given, storing=False))
    asked = ran(experiment, tmp_path / "b", "run", model=model, train={"steps": 8})
    assert not (tmp_path / "b" / features.FOLDER).exists()
    assert losses(stored) == pytest.approx(losses(asked), abs=1e-5)
    one, two = (json.loads((Path(w.output) / "results.json").read_text())["last"] for w in (stored, asked))
    assert one == two
    if image_tower == "frozen":
        begun, ended = weights(Path(stored.model.name)), opened_weights(stored)
        names = [name for name in begun if name.startswith("vision_model")]
        assert len(names) > 30
        assert all(np.array_equal(begun[name], ended[name]) for name in names)


def opened_weights(wanted: Config) -> dict[str, np.ndarray]:
    clip = checkpoint.open_model(f"{wanted.output}/model").encoder.clip
    return {name: tensor.detach().numpy() for name, tensor in clip.state_dict().items()}


def test_features_of_another_tower_or_other_pixels_are_not_taken(experiment: Experiment, tmp_path: Path) -> None:
    first = ran(experiment, tmp_path, "one", model={"image_tower": "frozen"})
    folder = tmp_path / features.FOLDER
    before = {path.name for path in folder.iterdir()}
    assert len(before) == 2, "train and val"
    ran(experiment, tmp_path, "two", model={"image_tower": "frozen", "name": f"{first.output}/model"})
    assert {path.name for path in folder.iterdir()} == before, "the frozen tower's bytes are the same"
    full = ran(experiment, tmp_path, "three")
    ran(experiment, tmp_path, "four", model={"image_tower": "frozen", "name": f"{full.output}/model"})
    assert len({path.name for path in folder.iterdir()} - before) == 2


def test_features_of_other_pixels_another_precision_and_other_settings_are_not_taken(
    experiment: Experiment, base: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["vision_config"]["hidden_act"] = "gelu"  # the weights stay
    (other / "config.json").write_text(json.dumps(settings))
    cases: list[dict[str, Any]] = [
        {},
        {"data": {"crop": "squash"}},
        {"train": {"precision": "bf16"}},
        {"model": {"name": str(other)}},
    ]
    counts = []
    for number, case in enumerate(cases):
        frozen = {**case, "model": {"image_tower": "frozen", **case.get("model", {})}}
        ran(experiment, tmp_path, str(number), **{**frozen, "train": {"steps": 1, **case.get("train", {})}})
        counts.append(len(list((tmp_path / features.FOLDER).iterdir())))
    assert counts == [2, 4, 6, 8]


def test_features_are_the_same_for_any_share_of_the_work(base: Path, root: Path, tmp_path: Path) -> None:
    """Two processes played one after the other: each computes its own rows, in as many rounds as the other."""
    cuts = {
        (size, count): [
            features.Place(tmp_path, World(torch.device("cpu"), rank, size), QUIET)._cuts(count, 4)
            for rank in range(size)
        ]
        for size in (1, 2, 3)
        for count in (1, 4, 7, 8, 9, 25)
    }
    for (size, count), shares in cuts.items():
        assert len({len(rounds) for rounds, _ in shares}) == 1, "or one would wait for ever in a gather"
        assert len({len(cut) for rounds, _ in shares for cut in rounds}) == 1
        together = [
            row for parts in zip(*(rounds for rounds, _ in shares), strict=True) for cut in parts for row in cut
        ]
        assert together[:count] == list(range(count)), (size, count)


# data.replay


def test_replayed_pairs_are_in_every_batch(experiment: Experiment, root: Path, tmp_path: Path) -> None:
    replay = [{"root": str(root / "val"), "weight": 0.5}]
    wanted = ran(experiment, tmp_path, "run", data={"replay": replay}, validate={"every": 2})
    assert "steps of 8 and 4 of 20 replayed ones: each pair is seen 0.7 times" in log(wanted)
    found = json.loads((Path(wanted.output) / "checkpoints" / "step-4" / "state.json").read_text())
    assert "replay 1 split" in found["inputs"]
    alone = ran(experiment, tmp_path, "alone", train={"batch_size": 8})
    assert losses(wanted) != losses(alone)


@pytest.mark.parametrize(
    ("weight", "said"), [(1e9, "leaves 0 of the 12"), (4.0, "has 20 pairs, and each batch takes 32")]
)
def test_a_replay_that_cannot_be_is_refused(weight: float, said: str, experiment: Experiment, root: Path) -> None:
    batch = {"batch_size": 40 if weight == 4.0 else 12}
    with pytest.raises(UserError, match=said):
        training.fit(experiment(data={"replay": [{"root": str(root / "val"), "weight": weight}]}, train=batch), QUIET)


# train.patch_dropout, label_smoothing, objective


def test_patch_dropout_is_the_same_in_any_chunks(experiment: Experiment, tmp_path: Path) -> None:
    dropped = ran(experiment, tmp_path, "dropped", train={"patch_dropout": 0.5})
    chunked = ran(experiment, tmp_path, "chunked", train={"patch_dropout": 0.5, "micro_batch_size": 5})
    plain = ran(experiment, tmp_path, "plain")
    assert losses(dropped) == pytest.approx(losses(chunked), abs=1e-4)
    assert losses(dropped)[0] != pytest.approx(losses(plain)[0], abs=1e-4)


def test_label_smoothing_and_the_sigmoid_s_refusals(experiment: Experiment, tmp_path: Path) -> None:
    smoothed = ran(experiment, tmp_path, "smoothed", train={"label_smoothing": 0.2})
    plain = ran(experiment, tmp_path, "plain")
    assert losses(smoothed)[0] != losses(plain)[0]
    floors = [float(re.search(r"below (\S+) ", log(wanted))[1]) for wanted in (smoothed, plain)]  # type: ignore[index]
    assert floors[0] > floors[1] > 0
    with pytest.raises(UserError, match="needs a logit bias"):
        training.fit(experiment(output=str(tmp_path / "x"), train={"objective": "sigmoid"}), QUIET)


# micro_batch_size: auto, gradient_checkpointing, context_length


def test_auto_chunks_are_said_and_kept(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cytoclip.plan.fitting", lambda *_: 4)
    wanted = ran(experiment, tmp_path, "run", train={"micro_batch_size": "auto"})
    assert "micro_batch_size: auto is 4 here, by the plan's estimate" in log(wanted)
    assert "in chunks of 4" in log(wanted)
    run = RunFolder(Path(wanted.output))
    assert config.load(run.config).train.micro_batch_size == 4
    monkeypatch.setattr("cytoclip.plan.fitting", lambda *_: 2)
    assert jobs.settled(wanted, World(torch.device("cpu")), run).train.micro_batch_size == 4, "a run keeps its chunks"
    training.fit(wanted, QUIET)


def test_checkpointing_and_a_longer_context_train(experiment: Experiment, tmp_path: Path) -> None:
    plain = ran(experiment, tmp_path, "plain")
    kept = ran(experiment, tmp_path, "kept", train={"gradient_checkpointing": True})
    assert losses(kept) == pytest.approx(losses(plain), abs=1e-5)
    longer = ran(experiment, tmp_path, "longer", model={"context_length": 120})
    assert "no training caption is longer than the 120 tokens" in log(longer)
    assert checkpoint.open_model(longer.output).context == 120
    assert "so nothing is stretched" not in log(longer)
    same = ran(experiment, tmp_path, "same", model={"context_length": 77}, train={"steps": 1})
    assert "model.context_length: 77 is the checkpoint's own, so nothing is stretched" in log(same)


# families


@pytest.fixture(scope="module")
def others(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    captions = [entry["caption"] for entry in json.loads((root / "train" / "img_text_pair.json").read_text())]
    found = {}
    for name, make in tiny.MADE.items():
        found[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        make(found[name], captions)
    return found


LATER = [pytest.param(model, marks=pytest.mark.slow) for model in ({}, {"image_tower": "frozen"})]  # 12 s


@pytest.mark.parametrize("model", [{"image_tower": "lora", "text_tower": "lora"}, *LATER], ids=str)
@pytest.mark.parametrize("kind", tiny.MADE)
def test_every_family_trains_learns_and_opens_again(
    kind: str, model: dict[str, str], others: dict[str, Path], experiment: Experiment, tmp_path: Path
) -> None:
    wanted = ran(
        experiment, tmp_path, "run",
        model={"name": str(others[kind]), **model}, train={"steps": 30, "micro_batch_size": 7, "learning_rate": 3e-3},
    )  # fmt: skip
    found = losses(wanted)
    assert len(found) == 30
    assert np.mean(found[-5:]) < np.mean(found[:5])
    said = "knowing nothing" if kind.startswith("siglip") else "ln(batch)"
    assert f"groups; {said}: " in log(wanted)
    result = json.loads((Path(wanted.output) / "results.json").read_text())
    again = tiny.scores_of(f"{wanted.output}/model", Path(str(wanted.data.root)) / "val", [1, 5], 7)
    for direction in ("image_to_text", "text_to_image"):
        shares = {key: value for key, value in result["last"][direction].items() if "rank" not in key}
        tipped = {key: again[direction][key] for key in shares}
        assert tipped == pytest.approx(shares, abs=0.051), "one pair of 20 may tip"
    if kind.startswith("siglip"):
        bias = checkpoint.open_model(f"{wanted.output}/model").encoder.logit_bias
        assert bias is not None
        assert float(bias.detach()) != pytest.approx(-12.9, abs=1e-4), "it trains and is saved"


def test_a_tower_with_dropout_keeps_its_chunks(others: dict[str, Path], experiment: Experiment, tmp_path: Path) -> None:
    """BERT drops out by default: with other chunks a run that goes on would draw other masks."""
    one = {"model": {"name": str(others["two towers"])}, "output": str(tmp_path / "run")}
    training.fit(experiment(**one, train={"steps": 2}), QUIET)
    with pytest.raises(UserError, match=r"begun with another train\.micro_batch_size"):
        training.fit(experiment(**one, train={"steps": 4, "micro_batch_size": 5}), QUIET)
    training.fit(experiment(**one, train={"steps": 4}), QUIET)


# data.crop


def test_a_run_is_evaluated_by_the_crop_that_it_was_trained_with(experiment: Experiment, tmp_path: Path) -> None:
    """Opened again, the saved model gives the validation's own numbers, and reads pictures by the run's policy."""
    wide = Path(shutil.copytree(str(experiment().data.root), tmp_path / "wide"))  # the drawn ones are square
    for file in sorted(wide.glob("*/imgs/*")):
        image = Image.open(file)
        image.resize((image.width * 2, image.height)).save(file)
    own = ran(experiment, tmp_path, "own", data={"root": str(wide)})
    padded = ran(experiment, tmp_path, "padded", data={"root": str(own.data.root), "crop": "pad"})
    assert losses(own) != losses(padded)
    assert "would cut" in log(padded)
    scored = json.loads((Path(padded.output) / "results.json").read_text())["last"]
    again = tiny.scores_of(f"{padded.output}/model", Path(str(own.data.root)) / "val", [1, 5], 12)
    assert again["image_to_text"] == scored["image_to_text"]
    assert checkpoint.open_model(f"{padded.output}/model").pixels.pad
