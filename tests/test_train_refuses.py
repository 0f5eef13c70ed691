"""What `fit` refuses, before any step and without a trace; what a second start may change; when training must stop."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import BertConfig

from cytoclip import claim, config, files, optim, training, validation
from cytoclip.config import Config, parse
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.kinds import KINDS
from tests.conftest import weights
from tests.test_training import QUIET, Experiment, listing, losses, no_step, stop_after

# Going on, and not going on


def test_another_configuration_is_refused_and_names_the_options(
    done: tuple[Config, training.RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    wanted, _ = done
    before = listing(Path(wanted.output))
    given = wanted.model_dump(mode="json", by_alias=True)
    given["train"] |= {"learning_rate": 5e-4, "seed": 3}
    for ask in (training.fit, training.dry_run):
        with pytest.raises(UserError, match="another configuration") as caught:
            ask(parse(given, "the test"), QUIET)
        assert "train.learning_rate, train.seed" in caught.value.message
        assert caught.value.code is ExitCode.RUN
        assert "another output" in caught.value.hint
    assert listing(Path(wanted.output)) == before


def test_what_may_differ_between_two_starts_does_and_the_log_says_resuming(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, done: tuple[Config, training.RunResult]
) -> None:
    """More workers, other checkpoints, another tracker: the weights are those of the run that was never stopped."""
    first = experiment(checkpoint={"every": 2})
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training.fit(first, QUIET)
    monkeypatch.undo()
    run = Path(first.output)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-2"]
    assert not (run / "results.json").exists()
    second = experiment(
        data={"workers": 1, "cache": True, "cache_budget_gb": 1.0},
        train={"shard": True, "gradient_checkpointing": True},
        checkpoint={"every": 3, "keep_last": 1},
        track={"to": ["tensorboard"]},
        report={"images": False},
    )
    assert config.differences(first, second) == sorted(claim.HARMLESS - {"output"})
    training.fit(second, Console())
    assert f"resuming {run} after step 2" in (run / "train.log").read_text()
    assert [row["step"] for row in losses(run)] == [1, 2, 3, 4]
    chosen = second.train.model_copy(update={"compile": False})  # what auto stands for on a CPU
    assert config.load(run / "config.yaml") == second.model_copy(update={"train": chosen})
    one, two = (weights(where / "model") for where in (run, Path(done[0].output)))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_killed_while_it_read_its_data_starts_again(experiment: Experiment) -> None:
    """Its folder holds a log and a lock but no configuration yet, and is not somebody else's."""
    wanted = experiment(train={"steps": 1})
    run = Path(wanted.output)
    run.mkdir()
    for name in ("train.log", ".lock", ".config.yaml.new"):
        (run / name).write_text("")
    assert training.fit(wanted, QUIET).steps == 1


def test_a_folder_with_other_files_is_refused_and_left_alone(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    wanted = experiment()
    run = Path(wanted.output)
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    for ask in (training.fit, training.dry_run):
        with pytest.raises(UserError, match="no run of ours") as caught:
            ask(wanted, QUIET)
        assert caught.value.code is ExitCode.RUN
    assert listing(run) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(("place", "said"), [("file", "is a file"), ("file/run", "cannot write")])
def test_an_output_that_cannot_be_a_folder_is_refused(
    place: str, said: str, experiment: Experiment, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=said) as caught:
        training.fit(experiment(output=str(tmp_path / place)), QUIET)
    assert caught.value.code in (ExitCode.RUN, ExitCode.SYSTEM)
    assert listing(tmp_path) == {"file": b"mine"}


def test_an_output_where_no_folder_can_be_made_is_refused(experiment: Experiment) -> None:
    """Whoever is root may write into /proc, and is told there that the new folder is not found."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(UserError, match=r"cannot write /proc/cytoclip/\.lock") as caught:
        training.fit(experiment(output="/proc/cytoclip"), QUIET)
    assert caught.value.code is ExitCode.SYSTEM


def test_a_run_folder_in_use_is_refused(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs in one folder would overwrite each other's checkpoints. The lock stays with who holds it."""
    no_step(monkeypatch)
    wanted = experiment()
    run = Path(wanted.output)
    run.mkdir()
    with FileLock(run / ".lock"):
        with pytest.raises(UserError, match="in use by another process") as caught:
            training.fit(wanted, QUIET)
        assert (run / ".lock").exists()
    assert caught.value.code is ExitCode.RUN


def test_no_space_on_the_disk_is_said_before_any_work(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    monkeypatch.setattr(files, "free_bytes", lambda _: 10)
    wanted = experiment(output=str(tmp_path / "runs" / "x"))
    for ask in (training.fit, training.dry_run):
        with pytest.raises(UserError, match=r"disk has 10 B free") as caught:
            ask(wanted, QUIET)
        assert caught.value.code is ExitCode.SYSTEM
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_takes_no_folder_away_that_was_there(experiment: Experiment, tmp_path: Path) -> None:
    """An empty output folder may be the mount of a disk, and its parent the user's."""
    (tmp_path / "mine" / "run").mkdir(parents=True)
    for place in ("mine/run", "mine/new/er"):
        with pytest.raises(UserError):
            training.fit(experiment(train={"batch_size": 49}, output=str(tmp_path / place)), QUIET)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "run"]


def test_what_a_stopped_run_has_written_need_not_be_free_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run that stopped on a nearly full disk could not go on."""
    wanted = experiment(checkpoint={"every": 2})
    whole = training.dry_run(wanted, QUIET).disk
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        training.fit(wanted, QUIET)
    monkeypatch.undo()
    written = sum(map(len, listing(Path(wanted.output)).values()))
    assert written > 1_000_000
    monkeypatch.setattr(files, "free_bytes", lambda _: whole - written + 100)
    assert training.fit(wanted, QUIET).steps == 4


def test_a_dry_run_writes_nothing_and_takes_no_step(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path, base: Path
) -> None:
    no_step(monkeypatch)
    before = listing(root), listing(base)
    planned = training.dry_run(experiment(output=str(tmp_path / "runs" / "x")), Console())
    assert (planned.steps, planned.steps_per_epoch) == (4, 4)
    assert list(tmp_path.iterdir()) == []
    assert (listing(root), listing(base)) == before


# What goes wrong in the middle


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad step would make every weight NaN; the checkpoint before it is whole, and the run goes on from there."""
    contrast, builds = training.contrastive_step, optim.build
    calls, moved = [0], [0]
    held: list[torch.nn.Parameter] = []
    values: list[torch.Tensor] = []

    def poisoned(encoder: Any, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            with torch.no_grad():
                encoder.clip.visual_projection.weight[0, 0] = math.nan
            held.extend(encoder.moving().values())
            values.extend(p.detach().clone() for p in held)
        return contrast(encoder, *rest)

    def build(*given: Any) -> Any:
        made = builds(*given)
        made.register_step_post_hook(lambda *_: moved.__setitem__(0, moved[0] + 1))
        return made

    monkeypatch.setattr(training, "contrastive_step", poisoned)
    monkeypatch.setattr(optim, "build", build)
    wanted = experiment(checkpoint={"every": 1})
    with pytest.raises(UserError, match="step 3: the loss is nan") as caught:
        training.fit(wanted, QUIET)
    assert caught.value.code is ExitCode.DIVERGED
    assert "learning_rate" in caught.value.hint
    assert moved == [2]
    assert len(values) > 60
    assert all(torch.equal(p.detach().nan_to_num(7), v.nan_to_num(7)) for p, v in zip(held, values, strict=True))
    run = Path(wanted.output)
    assert [row["step"] for row in losses(run)] == [1, 2]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-1", "step-2"]
    monkeypatch.undo()
    assert training.fit(wanted, QUIET).steps == 4


def test_a_learning_rate_that_diverges_is_caught(experiment: Experiment) -> None:
    with pytest.raises(UserError) as caught:
        training.fit(experiment(train={"learning_rate": 1e30, "steps": 6, "max_grad_norm": None}), QUIET)
    assert caught.value.code in (ExitCode.DIVERGED, ExitCode.MODEL)
    assert "finite" in caught.value.message or "nan" in caught.value.message


def test_an_infinite_gradient_stops_too(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "clip", lambda *_: torch.tensor(math.inf))
    with pytest.raises(UserError, match=r"step 1: .* norm inf") as caught:
        training.fit(experiment(), QUIET)
    assert caught.value.code is ExitCode.DIVERGED


# What is refused before the first step


def change_list(split: Path, change: Callable[[list[Any]], Any]) -> None:
    place = split / "img_text_pair.json"
    place.write_text(json.dumps(change(json.loads(place.read_text()))))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


BAD_DATA: dict[str, tuple[Callable[[Path], object], str, ExitCode]] = {
    "no train folder": (lambda r: shutil.rmtree(r / "train"), "no such folder.*train", ExitCode.DATA),
    "no val folder": (lambda r: shutil.rmtree(r / "val"), "no such folder.*val", ExitCode.DATA),
    "no imgs folder": (lambda r: shutil.rmtree(r / "train" / "imgs"), "no imgs folder", ExitCode.DATA),
    "no list": (lambda r: (r / "train" / "img_text_pair.json").unlink(), "no img_text_pair.json", ExitCode.DATA),
    "a list that is no list": (
        lambda r: change_list(r / "train", lambda entries: {"pairs": entries}), "an object, not a list", ExitCode.DATA,
    ),
    "an empty split": (lambda r: change_list(r / "train", lambda _: []), "empty list", ExitCode.DATA),
    "an empty val split": (lambda r: change_list(r / "val", lambda _: []), "val.*empty list", ExitCode.DATA),
    "a caption missing": (
        lambda r: change_list(r / "train", lambda e: [*e[:-1], {"img": "000.png"}]), "entry 47: no 'caption'",
        ExitCode.DATA,
    ),
    "a truncated picture": (lambda r: cut(r / "train" / "imgs" / "005.png"), "005.png .*truncated", ExitCode.DATA),
    "a truncated val picture": (lambda r: cut(r / "val" / "imgs" / "005.png"), "val.*005.png", ExitCode.DATA),
    "a picture missing": (lambda r: (r / "train" / "imgs" / "005.png").unlink(), "005.png .no such", ExitCode.DATA),
    "fewer pairs than a batch": (lambda r: change_list(r / "train", lambda e: e[:7]), "7 training.* 12", ExitCode.DATA),
    "an end token in a val caption": (
        lambda r: change_list(r / "val", lambda e: [{**e[0], "caption": "a <end> cell"}, *e[1:]]), "one end token",
        ExitCode.DATA,
    ),
    "a broken test split": (lambda r: (r / "test").mkdir(), "no img_text_pair.json in .*test", ExitCode.DATA),
}  # fmt: skip


def test_there_are_fourteen_kinds_of_bad_data() -> None:
    assert len(BAD_DATA) == 14


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_refused_before_any_step_and_leaves_no_folder(
    kind: str, experiment: Experiment, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    monkeypatch.setattr(validation, "look", lambda _: pytest.fail("the model was run"))
    spoil, said, code = BAD_DATA[kind]
    data = shutil.copytree(root, tmp_path / "data")
    spoil(data)
    refused(experiment(data={"root": str(data)}, output=str(tmp_path / "runs" / "x")), said, code)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def refused(wanted: Config, said: str, code: ExitCode) -> None:
    with pytest.raises(UserError) as caught:
        training.fit(wanted, QUIET)
    assert re.search(said, caught.value.message), caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.lines().partition("\n")[2]
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "bert"}, "a 'bert' checkpoint, not a CLIP-like one"),
        ({"name": "nowhere/at-all"}, "cannot open the checkpoint nowhere/at-all"),
        ({"name": "empty"}, "holds no model"),
        ({"image_tower": "lora", "lora": {"targets": ["query"]}}, "'query' matches no linear layer of vision_model"),
    ],
    ids=["bert", "not there", "empty folder", "lora targets"],
)
def test_a_model_that_cannot_train_is_refused_and_leaves_no_folder(
    model: dict[str, Any], said: str, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 35 among them: adapters on layers that are not there would train nothing."""
    no_step(monkeypatch)
    monkeypatch.chdir(tmp_path)
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    refused(experiment(model=model, output=str(tmp_path / "runs" / "x")), said, ExitCode.MODEL)
    assert {p.name for p in tmp_path.iterdir()} == {"bert", "empty"}


def test_odd_things_are_said_but_not_refused(
    experiment: Experiment, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(root, tmp_path / "data")
    change_list(data / "train", lambda e: [{**e[0], "caption": "cell " * 200}, *e[1:]])
    wanted = experiment(
        data={"root": str(data)}, train={"warmup_steps": 9}, validate={"ks": [1, 30]},
        model={"image_tower": "lora", "lora": {"rank": 4, "alpha": 1.0}},
    )  # fmt: skip
    training.dry_run(wanted, Console())
    said = capsys.readouterr().err
    assert "warning: 2.1% of the training captions are longer than 77 tokens" in said
    assert "warning: k = 30 is more than the 20 validation pairs" in said
    assert "warning: train.warmup_steps=9 of 4 steps" in said
    assert "LoRA rank 4, scaling 0.25" in said, "trap 12"
    assert "warning: groups that are in two splits" in said
    assert said.count("warning:") == 4


def test_captions_that_teach_next_to_nothing_are_said_before_the_first_step(
    experiment: Experiment, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trap 37's cause, and not only that the loss stays: one caption for all, or a script that nobody reads."""
    data = shutil.copytree(root, tmp_path / "data")
    for caption, kind in (("a cell", "nothing-to-learn"), ("骨髓涂片中可见一个巨核细胞", "unread-script")):
        change_list(data / "train", lambda e, said=caption: [{**one, "caption": said} for one in e])
        training.dry_run(experiment(data={"root": str(data)}), Console())
        said = capsys.readouterr().err
        assert f"warning: {KINDS[kind].title}" in said
        assert KINDS[kind].fix in said
        assert ("48 of 48 training captions" in said) == (kind == "unread-script")
    assert "repeats take 100% of what a batch of 12 could teach" in said
