"""What a run keeps, when it stops, and what it scores beside: patience, `select_by`, `keep`, the embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cytoclip import checkpoint, embeddings, evaluation, outcome, training, validation
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.embeddings import Owner
from cytoclip.errors import ExitCode, UserError
from tests import tiny
from tests.conftest import weights, write_split

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]
# Best at 4; 6, 8 and 10 are no better, and what comes later is never seen.
SCORES = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.3, 8: 0.5, 10: 0.2, 12: 0.8, 14: 0.8, 16: 0.8, 18: 0.8, 20: 0.8}
LONG = {"train": {"steps": 20}, "validate": {"every": 2, "ks": [1], "patience": 3}, "checkpoint": {"every": 3}}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, Any]], None]:
    """Let a validation's score, or a dictionary of hits, be that of its step."""

    def script(by_step: Mapping[int, Any]) -> None:
        begins, notes, looks, at = validation.begin, validation.note, validation.look, [0]

        def begin(job: Any) -> validation.Progress:
            at[0] = 0
            return begins(job)

        def note(job: Any, progress: Any, book: Any) -> bool:
            at[0] = progress.step
            return notes(job, progress, book)

        def look(job: Any) -> validation.Seen:
            hit = by_step[at[0]] if isinstance(by_step[at[0]], dict) else {"hit@1": 0.0, "hit@1_groups": by_step[at[0]]}
            rates = {"image_to_text": hit, "text_to_image": hit, "chance": dict.fromkeys(hit, 0.01)}
            return replace(looks(job), val={"pairs": 20, **rates})

        monkeypatch.setattr(validation, "begin", begin)
        monkeypatch.setattr(validation, "note", note)
        monkeypatch.setattr(validation, "look", look)

    return script


def results(wanted: Config) -> dict[str, Any]:
    """But for what is never the same twice."""
    found: dict[str, Any] = json.loads((Path(wanted.output) / "results.json").read_text())
    return {**found, "seconds": 0}


def lines(wanted: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(wanted.output) / name).read_text().splitlines()]


def killed(wanted: Config, in_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = training._step

    def die(job: Any, step: int, *rest: Any) -> Any:
        if step + 1 == in_step:
            raise KeyboardInterrupt
        return steps(job, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_step", die)
        with pytest.raises(KeyboardInterrupt):
            training.fit(wanted, QUIET)


def assert_same_run(one: Config, other: Config) -> None:
    assert results(one) == results(other)
    for name in ("losses.jsonl", "validations.jsonl"):
        assert lines(one, name) == lines(other, name)
    for folder in ("model", "best"):
        first, second = (weights(Path(wanted.output) / folder) for wanted in (one, other))
        assert all(np.array_equal(first[name], second[name]) for name in first)
    for name in ("before", "best"):
        first, second = (embeddings.read(Path(w.output) / "embeddings" / f"{name}.safetensors") for w in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# validate.patience


def test_a_run_ends_when_patience_has_run_out(experiment: Experiment, scripted: Any) -> None:
    scripted(SCORES)
    wanted = experiment(**LONG)
    result = training.fit(wanted, Console())
    found = results(wanted)
    assert (result.steps, result.best_step) == (found["steps"], found["best_step"]) == (10, 4)
    assert (found["stopped_early"], found["pairs_seen"]) == (True, 120)
    assert [line["step"] for line in lines(wanted, "losses.jsonl")] == list(range(1, 11))
    assert [line["step"] for line in lines(wanted, "validations.jsonl")] == [0, 2, 4, 6, 8, 10]
    assert (Path(wanted.output) / "checkpoints" / "step-10").is_dir()
    log = (Path(wanted.output) / "train.log").read_text()
    assert "stopped early after step 10 of 20: validate.patience is 3, and the best validation is that of step 4" in log
    assert training.fit(wanted, Console()) == result
    assert "is finished: 10 steps" in (Path(wanted.output) / "train.log").read_text()


def test_more_steps_for_a_run_that_ended_early_are_the_same_run(
    experiment: Experiment, scripted: Any, tmp_path: Path
) -> None:
    """It would have ended at the same validation, however many steps had been asked for."""
    scripted(SCORES)
    grown, whole = ({**LONG, "output": str(tmp_path / name)} for name in ("grown", "whole"))
    training.fit(experiment(**grown), QUIET)
    longer = {"train": {"steps": 30}}
    training.fit(experiment(**grown | longer), QUIET)
    training.fit(experiment(**whole | longer), QUIET)
    assert_same_run(experiment(**grown), experiment(**whole))
    assert results(experiment(**grown))["stopped_early"] is True


@pytest.mark.parametrize("in_step", [5, 8, 10])
def test_killed_and_resumed_it_ends_at_the_same_step(
    in_step: int, experiment: Experiment, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(SCORES)
    whole, cut = (experiment(**LONG, output=str(tmp_path / name)) for name in ("whole", "cut"))
    training.fit(whole, QUIET)
    killed(cut, in_step, monkeypatch)
    training.fit(cut, QUIET)
    assert_same_run(whole, cut)


def test_from_before_the_best_one_and_from_just_before_its_end_it_ends_at_the_same_step(
    experiment: Experiment, scripted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(SCORES)
    whole, cut = (experiment(**LONG, output=str(tmp_path / name)) for name in ("whole", "cut"))
    training.fit(whole, QUIET)
    killed(cut, 6, monkeypatch)
    shutil.rmtree(Path(cut.output) / "checkpoints" / "step-4")  # best/ is of step 4, and the run is sent back to 3
    with monkeypatch.context() as patched:
        patched.setattr(outcome, "results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            training.fit(cut, QUIET)
    assert not (Path(cut.output) / "results.json").exists()
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("a step was taken"))
    training.fit(cut, QUIET)
    assert_same_run(whole, cut)


def test_a_validation_that_is_not_due_costs_no_patience(experiment: Experiment, scripted: Any) -> None:
    """That of the last step: a longer run would not have had it."""
    scripted({**SCORES, 11: 0.0})
    wanted = experiment(**{**LONG, "train": {"steps": 11}, "validate": {"every": 2, "ks": [1], "patience": 4}})
    training.fit(wanted, QUIET)
    found = results(wanted)
    assert (found["steps"], found["stopped_early"]) == (11, False)
    state = json.loads((Path(wanted.output) / "checkpoints" / "step-11" / "state.json").read_text())
    assert state["waited"] == 3


# validate.select_by


@pytest.mark.parametrize(("by", "best"), [("hits", 4), ("hit@1", 2), ("mrr", 3)])
def test_the_best_is_the_best_by_the_number_that_is_asked_for(
    by: str, best: int, experiment: Experiment, scripted: Any
) -> None:
    def hits(one: float, five: float, mrr: float) -> dict[str, float]:
        return {"hit@1": 0.0, "hit@5": 0.0, "hit@1_groups": one, "hit@5_groups": five, "mrr_groups": mrr}

    by_step = {0: (0, 0, 0), 1: (0.1, 0.1, 0.1), 2: (0.5, 0.3, 0.1), 3: (0.2, 0.3, 0.4), 4: (0.4, 0.9, 0.3)}
    scripted({step: hits(*numbers) for step, numbers in by_step.items()})
    wanted = experiment(validate={"every": 1, "select_by": by})
    assert training.fit(wanted, QUIET).best_step == best
    assert results(wanted)["select_by"] == by


# validate.keep


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second data root, of other cells."""
    folder = tmp_path_factory.mktemp("kept")
    write_split(folder / "val", 16, seed=77)
    return folder


@pytest.mark.parametrize("towers", [{}, {"image_tower": "frozen", "text_tower": "frozen"}], ids=["full", "frozen"])
def test_what_is_kept_is_scored_at_the_start_and_at_each_validation(
    towers: dict[str, str], experiment: Experiment, kept: Path, tmp_path: Path
) -> None:
    """As `evaluate` scores it; a split itself may be named; nothing else of the run changes."""
    sections: dict[str, Any] = {"model": towers, "validate": {"every": 2, "ks": [1, 5]}}
    plain = experiment(**sections, output=str(tmp_path / "plain"))
    training.fit(plain, QUIET)
    made = []
    for name, place in (("root", kept), ("split", kept / "val")):
        asked = {**sections, "validate": {**sections["validate"], "keep": str(place)}}
        made.append(experiment(**asked, output=str(tmp_path / name)))
        training.fit(made[-1], Console())
        assert lines(made[-1], "losses.jsonl") == lines(plain, "losses.jsonl")
        assert results(made[-1])["best"] == results(plain)["best"]
    one, other = (lines(wanted, "validations.jsonl") for wanted in made)
    assert one == other
    assert [line["step"] for line in one] == [0, 2, 4]
    found = results(made[0])
    for place, expected in ((made[0].model.name, one[0]["keep"]), (f"{made[0].output}/best", found["keep"]["best"])):
        again = tiny.scores_of(place, kept / "val", [1, 5])
        assert again["image_to_text"] == pytest.approx(expected["image_to_text"], abs=1e-9)
    assert found["keep"] == {"root": str(kept), "before": one[0]["keep"], "best": one[found["best_step"] // 2]["keep"]}
    assert "; keep: image → text hit@1" in (Path(made[0].output) / "train.log").read_text()
    assert "keep and" not in (Path(made[0].output) / "train.log").read_text(), "it may be in any split"
    assert "keep" not in results(plain)


def test_a_run_does_not_go_on_with_another_kept_root(
    experiment: Experiment, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(kept, tmp_path / "own")
    wanted = experiment(validate={"every": 1, "ks": [1], "keep": str(own)})
    killed(wanted, 3, monkeypatch)
    shutil.rmtree(own / "val")
    write_split(own / "val", 16, seed=78)
    with pytest.raises(UserError, match="begun with another keep split"):
        training.fit(wanted, QUIET)


def test_a_kept_root_without_a_val_split_is_refused(experiment: Experiment, kept: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "train").mkdir(parents=True)
    shutil.copytree(kept / "val", tmp_path / "other" / "train", dirs_exist_ok=True)
    with pytest.raises(UserError, match="no split 'val' in") as caught:
        training.fit(experiment(validate={"keep": str(tmp_path / "other")}), QUIET)
    assert caught.value.code is ExitCode.DATA
    with pytest.raises(UserError, match="no such folder"):
        training.fit(experiment(validate={"keep": str(tmp_path / "nowhere")}), QUIET)


# embeddings/


def test_embeddings_are_those_of_the_start_and_of_best(done: tuple[Config, training.RunResult]) -> None:
    from cytoclip import batches, encode, pairs
    from cytoclip.device import World

    run = checkpoint.RunFolder(Path(done[0].output))
    val = pairs.spread(batches.open_split(Path(str(done[0].data.root)) / "val", QUIET))
    for name, model in (("before", done[0].model.name), ("best", str(run.best))):
        opened = checkpoint.open_model(model)
        reading = evaluation.reading(opened, val, 12, 0)
        expected = encode.encode(opened.encoder, val, reading, World(torch.device("cpu")), QUIET)
        path = run.embeddings / f"{name}.safetensors"
        found = embeddings.read(path)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == torch.float32
            assert torch.allclose(one, other, atol=1e-6)
            assert torch.allclose(one.norm(dim=1), torch.ones(len(val)))
        with safe_open(path, "pt") as file:
            said = file.metadata()
        assert (said["pairs"], Path(said["model"])) == (pairs.fingerprint(val), Path(model).absolute())
        assert embeddings.are_of(path, Owner(**said))
