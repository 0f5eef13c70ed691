"""A step that is not finite stops the run before the optimizer moves, and names the pairs that it was."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoTokenizer

from cytoclip import checkpoint, config, optim, training
from cytoclip.device import World
from cytoclip.diverged import refuse_non_finite
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order
from tests.conftest import weights
from tests.numerics.nursery import spawn
from tests.test_training import QUIET, Experiment, losses

ALONE = World(torch.device("cpu"))
NAMES = ["a.png", "b.png", "c.png", "d.png"]


def embedded(pixels_B1: torch.Tensor, tokens_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels_B1, tokens_B1


def chunks(images: list[float], texts: list[float], each: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pixels_B1, tokens_B1 = (torch.tensor(values)[:, None] for values in (images, texts))
    return list(zip(pixels_B1.split(each), tokens_B1.split(each), strict=True))


def refusal(images: list[float], texts: list[float], world: World = ALONE) -> UserError:
    with pytest.raises(UserError) as caught:
        refuse_non_finite(7, math.nan, math.nan, embedded, chunks(images, texts), NAMES, world)
    assert caught.value.code is ExitCode.DIVERGED
    return caught.value


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_that_is_not_finite_is_refused(loss: float, norm: float) -> None:
    with pytest.raises(UserError, match=f"step 7: the loss is {loss} and the gradient's norm {norm}") as caught:
        refuse_non_finite(7, loss, norm, embedded, chunks([1.0] * 4, [1.0] * 4), NAMES, ALONE)
    assert "train.learning_rate" in caught.value.hint


def test_a_finite_step_is_not_refused_and_embeds_nothing() -> None:
    refuse_non_finite(1, 1e30, 0.0, pytest.fail, chunks([math.nan] * 4, [1.0] * 4), NAMES, ALONE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_pairs_are_named_by_either_side_in_any_chunk(bad: float) -> None:
    error = refusal([1.0, bad, 1.0, 1.0], [1.0, 1.0, 1.0, bad])
    assert "2 of 4 pairs have embeddings that are not: b.png, d.png; nothing was updated" in error.message
    assert error.hint.startswith("look at these pairs")


def test_a_finite_batch_blames_the_gradient_and_a_broken_one_the_weights() -> None:
    assert (
        "every embedding of the batch is finite (a.png, b.png, c.png and 1 more)" in refusal([1] * 4, [1] * 4).message
    )
    error = refusal([math.nan] * 4, [1.0] * 4)
    assert "no pair of the batch has finite embeddings (a.png, b.png, c.png and 1 more)" in error.message
    assert error.hint.startswith("lower train.learning_rate")


def test_the_names_of_other_processes_are_said_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Two(World):
        def listed(self, own: list[Any]) -> list[Any]:
            return [*own, ("far.png", False)]

    assert "2 of 5 pairs have embeddings that are not: a.png, far.png" in refusal(
        [math.nan, 1, 1, 1], [1.0] * 4, Two(torch.device("cpu"))
    ).message  # fmt: skip


def test_a_planted_picture_is_named_and_nothing_moves(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture of the split becomes NaN as floats; the run stops in the step that meets it."""
    opens, builds = checkpoint.open_model, optim.build
    planted: list[torch.Tensor] = []
    moved: list[int] = []

    def plant(name: str, *rest: Any) -> checkpoint.Opened:
        opened = opens(name, *rest)
        plain = opened.encoder.to_floats

        def to_floats(pixels_B3HW: torch.Tensor) -> torch.Tensor:
            floats_B3HW = plain(pixels_B3HW)
            if opened.encoder.training:
                planted[:] = planted or [pixels_B3HW[2].clone()]
                floats_B3HW[(pixels_B3HW == planted[0]).flatten(1).all(dim=1), 0, 3, 4] = math.nan
            return floats_B3HW

        opened.encoder.to_floats = to_floats
        return opened

    def build(*given: Any) -> Any:
        made = builds(*given)
        made.register_step_post_hook(lambda *_: moved.append(1))
        return made

    monkeypatch.setattr(checkpoint, "open_model", plant)
    monkeypatch.setattr(optim, "build", build)
    monkeypatch.setattr(training.alarms, "no_contrast", lambda *_: None)
    wanted = experiment(train={"micro_batch_size": 5})
    with pytest.raises(UserError, match=r"step 1: the loss is nan .*; 1 of 12 pairs .* not: (\d+)\.png;") as caught:
        training.fit(wanted, QUIET)
    row = Order(48, 12, 0).rows(0)[2]
    assert f"not: {row:03}.png;" in caught.value.message
    assert not moved
    assert losses(Path(wanted.output)) == []


@pytest.mark.slow  # a group of two processes, 8 s
def test_the_pair_of_another_process_is_named_once(
    experiment: Experiment, root: Path, base: Path, tmp_path: Path
) -> None:
    """A weight is NaN that only one caption reads, of a pair that the second process holds."""
    row = Order(48, 12, 0).rows(0)[8]
    data, broken = shutil.copytree(root, tmp_path / "data"), shutil.copytree(base, tmp_path / "broken")
    place = data / "train" / "img_text_pair.json"
    entries = json.loads(place.read_text())
    assert not any("%" in entry["caption"] for entry in entries)
    entries[row]["caption"] += " %"
    place.write_text(json.dumps(entries))
    tokenizer = AutoTokenizer.from_pretrained(broken)
    token = tokenizer(entries[row]["caption"])["input_ids"][-2]  # before the end
    held = weights(broken)
    held["text_model.embeddings.token_embedding.weight"][token, 3] = math.nan
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    wanted = experiment(data={"root": str(data)}, model={"name": str(broken)}, train={"device": "cpu"})
    (tmp_path / "broken.yaml").write_text(config.dump(wanted))
    spawn("cytoclip", ["train", str(tmp_path / "broken.yaml")], 2, code=ExitCode.DIVERGED)
    log = (Path(wanted.output) / "train.log").read_text()
    assert log.count("error:") == 1
    assert f"1 of 12 pairs have embeddings that are not: {row:03}.png; nothing was updated" in log
