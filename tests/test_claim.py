"""Who may write into a run folder, and whether what is there is the same experiment still."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cytoclip import checkpoint, claim, config, training, validation
from cytoclip.config import Config, parse
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests.test_training import stop_after

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]


def test_a_run_that_was_moved_is_the_same_run(done: tuple[Config, training.RunResult], tmp_path: Path) -> None:
    wanted, result = done
    shutil.copytree(result.run, tmp_path / "elsewhere")
    moved = wanted.model_copy(update={"output": str(tmp_path / "elsewhere")})
    assert config.differences(wanted, moved) == ["output"]
    assert training.fit(moved, QUIET).last == result.last


@pytest.mark.parametrize(("dropout", "harmless"), [(0.0, True), (0.1, False)])
def test_other_chunks_are_harmless_without_dropout(
    dropout: float, harmless: bool, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout other chunks are other masks, and so another objective."""
    model = {"image_tower": "lora", "lora": {"dropout": dropout}}
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training.fit(experiment(model=model, checkpoint={"every": 2}), QUIET)
    monkeypatch.undo()
    again = experiment(model=model, checkpoint={"every": 2}, train={"micro_batch_size": 5})
    if harmless:
        assert training.fit(again, QUIET).steps == 4
    else:
        with pytest.raises(UserError, match=r"different: train\.micro_batch_size"):
            training.fit(again, QUIET)


@pytest.mark.parametrize(
    "model", [{}, {"image_tower": "lora", "text_tower": "lora", "lora": {"dropout": 0.1}}], ids=["full", "dropout"]
)
def test_layers_that_are_computed_again_change_no_bit(
    model: dict[str, Any], experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of losses and weights, dropout's masks among them: so a run may go on with it, or without."""
    how = {"model": model, "checkpoint": {"every": 2}}
    whole = experiment(**how, output=str(tmp_path / "whole"))
    training.fit(whole, QUIET)
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training.fit(experiment(**how), QUIET)
    monkeypatch.undo()
    again = experiment(**how, train={"gradient_checkpointing": True})
    switched: list[bool] = []
    switch = checkpoint.model.checkpoint_gradients
    monkeypatch.setattr(checkpoint.model, "checkpoint_gradients", lambda one: (switch(one), switched.append(True)))
    training.fit(again, QUIET)
    assert switched == [True]
    one, two = (checkpoint.RunFolder(Path(each.output)) for each in (whole, again))
    assert losses_of(one) == losses_of(two)
    assert len(losses_of(one)) == 4
    for name, tensor in checkpoint.open_model(str(one.model)).encoder.clip.state_dict().items():
        assert torch.equal(tensor, checkpoint.open_model(str(two.model)).encoder.clip.state_dict()[name])


def losses_of(run: checkpoint.RunFolder) -> list[float]:
    return [json.loads(line)["loss"] for line in run.losses.read_text().splitlines()]


@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"validate": {"every": 7}}, "the run goes on with validate.every=100; else name another output"),
        ({"validate": {"ks": [2]}, "train": {"seed": 1}}, "the run goes on with train.seed=0 validate.ks=[1,5]; else"),
        ({"validate": {"patience": 2}}, "the run goes on with validate.patience=null; else name"),
        ({"model": {"image_tower": "lora"}}, "name another output, or delete that folder"),
    ],
)
def test_what_a_run_goes_on_with_is_said(
    changed: dict[str, Any], hint: str, experiment: Experiment, tmp_path: Path
) -> None:
    run = checkpoint.RunFolder(tmp_path)
    run.config.write_text(config.dump(experiment()))
    with pytest.raises(UserError, match="another configuration; different") as caught:
        claim.refuse_other_run(run, experiment(**changed))
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("length", ["steps", "epochs"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_may_grow_where_the_steps_behind_stay_as_they_are(
    length: str, schedule: str, done: tuple[Config, training.RunResult], tmp_path: Path
) -> None:
    given = done[0].model_dump(mode="json", by_alias=True)
    given["train"] |= {"steps": None, "epochs": None, "schedule": schedule, length: 4}
    run = checkpoint.RunFolder(tmp_path)
    run.config.write_text(config.dump(parse(given, "the test")))

    def ask(number: int, **more: Any) -> bool:
        asked = parse({**given, "train": {**given["train"], length: number, **more}}, "the test")
        claim.refuse_other_run(run, asked)
        return claim.is_longer(run, asked)

    assert not ask(4)
    with pytest.raises(UserError, match=rf"train\.{length} 4, more than 3: it may grow, not shrink"):
        ask(3)
    with pytest.raises(UserError, match=r"another configuration; different: .*train\.seed"):
        ask(5, seed=7)
    with pytest.raises(UserError, match=r"different: train\.epochs, train\.steps"):
        ask(5, **{"steps": 5, "epochs": None} if length == "epochs" else {"steps": None, "epochs": 5})
    if schedule == "constant":
        assert ask(5)
    else:
        with pytest.raises(UserError, match=f"with schedule {schedule} the learning rate of each step depends"):
            ask(5)


def test_a_finished_run_without_checkpoints_does_not_begin_anew(
    done: tuple[Config, training.RunResult], tmp_path: Path
) -> None:
    """It would throw the finished model away; the result stays, and so does the configuration."""
    wanted, result = done
    shutil.copytree(result.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    given = wanted.model_dump(mode="json", by_alias=True) | {"output": str(tmp_path / "run")}
    longer = parse({**given, "train": {**given["train"], "steps": 6}}, "the test")
    with pytest.raises(UserError, match="no checkpoints left to go on from"):
        training.fit(longer, QUIET)
    again = training.fit(parse(given, "the test"), QUIET)
    assert again.last == result.last


@pytest.mark.parametrize(
    ("what", "how"), [("train split", "one less"), ("model", "weights"), ("model", "settings"), ("model", "pixels")]
)
def test_a_run_does_not_go_on_with_other_inputs(
    what: str, how: str, root: Path, base: Path, tmp_path: Path, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list loses a pair, or the base becomes another, between a stop and the same command again."""
    shutil.copytree(root, tmp_path / "data")
    shutil.copytree(base, tmp_path / "base")
    wanted = experiment(
        data={"root": str(tmp_path / "data")}, model={"name": str(tmp_path / "base")}, checkpoint={"every": 2}
    )
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training.fit(wanted, QUIET)
    monkeypatch.undo()
    settings = {"settings": ("config.json", "layer_norm_eps"), "pixels": ("preprocessor_config.json", "image_mean")}
    if how in settings:
        name, key = settings[how]
        written = json.loads((tmp_path / "base" / name).read_text())
        (written.get("vision_config") or written)[key] = {"settings": 0.1, "pixels": [0.1, 0.9, 0.3]}[how]
        (tmp_path / "base" / name).write_text(json.dumps(written))
    elif what == "model":
        file = tmp_path / "base" / "model.safetensors"
        weights = load_file(file)
        save_file(weights | {"logit_scale": weights["logit_scale"] + 1e-3}, file, {"format": "pt"})
    else:
        file = tmp_path / "data" / "train" / "img_text_pair.json"
        file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    with pytest.raises(UserError, match=f"was begun with another {what}"):
        training.fit(wanted, QUIET)


def test_a_run_is_finished_only_when_its_model_is_saved(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`results.json` is what makes a run finished, so it comes last."""
    wanted = experiment()
    saves = checkpoint.save_model

    def fail_at_the_end(folder: Path, *rest: Any) -> None:
        if folder.name == "model":
            raise OSError("the disk went away")
        saves(folder, *rest)

    monkeypatch.setattr(checkpoint, "save_model", fail_at_the_end)
    with pytest.raises(OSError, match="went away"):
        training.fit(wanted, QUIET)
    assert not (Path(wanted.output) / "results.json").exists()
    monkeypatch.undo()
    training.fit(wanted, QUIET)
    assert (Path(wanted.output) / "results.json").exists()


def test_what_ended_a_run_stands_in_its_log(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise UserError("a picture went away", "put it back")

    monkeypatch.setattr(training, "_step", gone)
    wanted = experiment()
    with pytest.raises(UserError):
        training.fit(wanted, Console())
    assert "error: a picture went away" in (Path(wanted.output) / "train.log").read_text()


def test_a_damaged_result_is_a_message(done: tuple[Config, training.RunResult], tmp_path: Path) -> None:
    wanted, result = done
    shutil.copytree(result.run, tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        training.fit(wanted.model_copy(update={"output": str(tmp_path / "run")}), QUIET)


def test_an_adapter_on_a_run_is_saved_whole(
    done: tuple[Config, training.RunResult], experiment: Experiment, tmp_path: Path
) -> None:
    """A run's weights may change under its name, which would change the adapter's model without a word."""
    lora = {"image_tower": "lora", "text_tower": "lora"}
    for i, name in enumerate((done[1].run, done[1].run / "best")):
        result = training.fit(experiment(model={"name": str(name), **lora}, output=str(tmp_path / f"{i}")), QUIET)
        assert (result.run / "model" / "model.safetensors").is_file()
        assert not (result.run / "model" / "adapter_config.json").exists()


def test_speed_is_that_of_the_steps_alone(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a validation is not charged to the step after it."""
    speeds: list[float] = []
    reads = training.journal.Stopwatch.read

    def noted(watch: Any, pairs: int) -> dict[str, float]:
        reading = reads(watch, pairs)
        if pairs:
            speeds.append(reading["pairs_per_second"])
        return reading

    def slow(job: Any) -> Any:
        import time

        time.sleep(1.0)
        return looks(job)

    looks = validation.look
    monkeypatch.setattr(training.journal.Stopwatch, "read", noted)
    monkeypatch.setattr(validation, "look", slow)
    training.fit(experiment(validate={"every": 1, "ks": [1]}), QUIET)
    assert len(speeds) == 4
    assert min(speeds) > 12 / 1.0


def test_harmless_options_exist() -> None:
    assert {option.name for option in config.options()} >= claim.HARMLESS


def test_fp16_that_never_takes_a_step_is_caught(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is halved at each gradient that is not finite; below 1 it was not the scale's fault."""
    steps = training.contrastive_step

    def broken(encoder: Any, logits: Any, *rest: Any) -> Any:
        result = steps(encoder, logits, *rest)
        logits.scale.grad = torch.full_like(logits.scale, float("nan"))
        return result

    monkeypatch.setattr(training, "contrastive_step", broken)
    with pytest.raises(UserError, match="nothing was updated"):
        training.fit(experiment(train={"precision": "fp16", "steps": 40}), QUIET)


def test_the_parser_is_the_one_that_runs_use(done: tuple[Config, training.RunResult]) -> None:
    given = done[0].model_dump(mode="json", by_alias=True)
    assert parse(given, "the test") == done[0]
