"""The search: what is tried and told, what is left of it, how it goes on; and trials in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cytoclip import config, selection, training, trials, tune, tuned
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.measure import full
from cytoclip.pairs import Pairs
from cytoclip.trials import Ending, Heard, Trial
from cytoclip.tune import Asked
from tests import runs, test_cache

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]
SPACE = "train.learning_rate: {low: 1e-5, high: 1e-1, log: true}\ntrain.ema: [null, 0.5]\n"


@pytest.fixture(scope="module")
def space_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def wanted(loose: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of eight steps whose val and test splits are broken: who looks there fails."""
    data = shutil.copytree(loose, tmp_path_factory.mktemp("search") / "data")
    for split in ("val", "test"):
        shutil.rmtree(data / split, ignore_errors=True)
        (data / split).mkdir()
        (data / split / "img_text_pair.json").write_text("broken")
    return config.parse(
        {
            "data": {"root": str(data), "workers": 0},
            "model": {"name": str(base)},
            "train": {"steps": 8, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "no"},
            "validate": {"every": 100, "ks": [1, 5]},
            "track": {"to": []},
            "output": str(data.parent / "run"),
        },
        "the test",
    )


@pytest.fixture(scope="module")
def searched(wanted: Config, space_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Asked, tuned.Tuned]:
    asked = Asked(tmp_path_factory.mktemp("searched") / "search", trials=5, space=space_file, share=0.25)
    return asked, tune.tune(wanted, asked, QUIET)


def told(asked: Asked) -> list[dict[str, Any]]:
    """What is asked of and said to optuna, of each trial that counts."""
    document = json.loads((asked.to / "tune.json").read_text())
    study = optuna.load_study(
        study_name="tune", storage=JournalStorage(JournalFileBackend(str(asked.to / "trials.log")))
    )
    looks = {one.user_attrs["number"]: one.intermediate_values for one in study.trials if one.state.name != "FAIL"}
    kept = ("number", "state", "chosen", "score")
    return [{key: one[key] for key in kept} | {"looks": looks[one["number"]]} for one in document["trials"]]


def test_the_trials_and_the_best_of_them(searched: tuple[Asked, tuned.Tuned], wanted: Config) -> None:
    asked, found = searched
    scores = [one.score for one in found.trials if one.state == tuned.FINISHED and one.score is not None]
    assert len(found.trials) == 5
    assert scores == sorted(scores, reverse=True)
    (given,) = [one for one in found.trials if not one.chosen]
    assert given.number == 0
    assert len({json.dumps(one.chosen) for one in found.trials}) == 5
    for one in found.trials:
        run = asked.to / one.folder
        there = config.load(run / "config.yaml")
        assert (
            there.data.hold_out
            == config.Config.model_validate(
                wanted.model_dump(by_alias=True) | {"data": {"root": "x", "hold_out": {"share": 0.25}}}
            ).data.hold_out
        )
        assert there.validation.every == 2
        if one.state == tuned.FINISHED:
            results = json.loads((run / "results.json").read_text())
            assert one.score == selection.score(results["best"])
            assert (run / "report.html").is_file()
            assert "test" not in results
        assert (run / "train.log").is_file()
        assert (run / "best").is_dir() == (run / "model").is_dir() == (one is found.best)
        assert not (run / "checkpoints").exists()
        for name, value in one.chosen.items():
            assert getattr(there.train, name.partition(".")[2]) == value
    held = json.loads((asked.to / "held_out.json").read_text())
    assert len(held) == found.pairs
    assert f"trial {found.best.number} is the best of 5 trials on {found.pairs} held-out pairs" in found.table()


def test_chance_stands_beside_the_scores(searched: tuple[Asked, tuned.Tuned]) -> None:
    """It is that of evaluation on the same pairs; a search whose best is not above it has chosen nothing."""
    asked, found = searched
    results = json.loads((asked.to / found.best.folder / "results.json").read_text())
    assert found.chance == pytest.approx(selection.chance(results["best"]))
    assert json.loads((asked.to / "tune.json").read_text())["chance"] == found.chance
    assert re.search(rf"^ *chance +{found.chance:.4f}$", found.table(), flags=re.MULTILINE)
    score = found.best.score
    assert score is not None
    for interval, chance, shown in (((0.2, 0.4), 0.3, False), ((0.3, 0.4), 0.2, True), (None, score, False),
                                    (None, score - 0.01, True)):  # fmt: skip
        one = replace(found, chance=chance, trials=[replace(found.best, interval=interval), *found.trials[1:]])
        assert (f"not shown to be better than chance ({chance:.4f})" in one.table()) == (not shown)


def test_a_k_that_no_trial_can_miss_is_said(wanted: Config, tmp_path: Path) -> None:
    heard = test_cache.Heard()
    asked = Asked(tmp_path / "search", trials=1, share=0.25)
    ks = wanted.validation.model_copy(update={"ks": [1, 11, 12]})
    found = tune.tune(wanted.model_copy(update={"validation": ks}), asked, heard)
    assert found.pairs == 12
    (said,) = [line for line in heard.lines if line.startswith("warning: k = ")]
    assert said.startswith("warning: k = 12 of validate.ks is not below the 12 held-out pairs: hit@12 is 1")


def test_the_best_configuration_is_one_to_train(
    searched: tuple[Asked, tuned.Tuned], wanted: Config, loose: Path
) -> None:
    found = config.load(Path(searched[1].yaml))
    assert found.data.hold_out is None
    expected = {name.partition(".")[2] for name in searched[1].best.chosen}
    assert set(config.differences(found, wanted)) <= {"output", *(f"train.{name}" for name in expected)}
    assert found.output == f"{wanted.output}-tuned"
    assert training.dry_run(
        found.model_copy(update={"data": found.data.model_copy(update={"root": str(loose)})}), QUIET
    )


def test_a_finished_search_is_not_done_again(
    searched: tuple[Asked, tuned.Tuned], wanted: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = searched
    monkeypatch.setattr(training, "fit", None)
    assert tune.tune(wanted, asked, QUIET) == found
    assert tune.tune(wanted, replace(asked, space=None), QUIET) == found


def test_killed_anywhere_it_goes_on_to_the_same_end(
    searched: tuple[Asked, tuned.Tuned],
    wanted: Config,
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, begun = replace(searched[0], to=tmp_path / "search"), 0
    validated, fit = tune._Book.validated, training.fit
    deaths = {"first": (0, 4), "later": (2, 2), "at its end": (3, 8)}

    def counting(*given: Any) -> Any:
        nonlocal begun
        begun += 1
        return fit(*given)

    monkeypatch.setattr(training, "fit", counting)
    for number, step in deaths.values():

        def dying(book: Any, of: int, at: int, score: float, when: tuple[int, int] = (number, step)) -> bool:
            end = validated(book, of, at, score)
            if (of, at) == when:
                raise SystemExit
            return end

        monkeypatch.setattr(tune._Book, "validated", dying)
        with pytest.raises(SystemExit):
            tune.tune(wanted, asked, QUIET)
    monkeypatch.setattr(tune._Book, "validated", validated)
    with (asked.to / "trials.log").open("a") as journal:
        journal.write('{"op_code": 4, "worker')  # a line that was being written
    tune.tune(wanted, asked, QUIET)
    assert told(asked) == told(searched[0])
    assert begun == 5 + 3
    assert sorted(path.name for path in (asked.to / "trials").iterdir()) == [f"{i:03}" for i in range(5)]


def test_more_trials_are_the_same_search_longer(
    searched: tuple[Asked, tuned.Tuned], wanted: Config, tmp_path: Path
) -> None:
    asked = replace(searched[0], to=tmp_path / "search", trials=6)
    shutil.copytree(searched[0].to, asked.to)
    tune.tune(wanted, asked, QUIET)
    by_number = [sorted(told(one), key=lambda x: x["number"]) for one in (asked, searched[0])]
    assert by_number[0][:5] == by_number[1]
    assert len(by_number[0]) == 6


def test_trials_at_once_and_one_whose_process_dies(
    wanted: Config,
    space_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two at a time, with the values that one at a time would have had while none depends on another."""
    asked = Asked(tmp_path / "search", trials=3, jobs=2, space=space_file, share=0.25)
    hear, killed = trials._hear, []

    def killing(worker: Any, heard: Heard) -> None:
        """The process that asks whether trial 1 is to go on dies before it is told."""
        if worker.trial.number == 1 and not killed:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)
        hear(worker, heard)

    monkeypatch.setattr(trials, "_hear", killing)
    found = tune.tune(wanted, asked, Console())
    assert len(killed) == 1
    states = [one.state for one in found.trials]
    assert len(states) == 3
    assert states.count(tuned.FAILED) == 1
    (failed,) = [one for one in found.trials if one.state == tuned.FAILED]
    assert (failed.number, failed.error) == (1, "its process ended by signal 9")
    assert re.search(r"trial 1 failed( [.\d]+)?: its process ended by signal 9", capsys.readouterr().err)
    assert not multiprocessing.active_children()


def scripted(number: int, wanted: Config) -> Iterator[Trial]:
    yield Trial(number, wanted)


def test_what_becomes_of_a_trial(experiment: Experiment, tmp_path: Path) -> None:
    """Finished, ended early, failed."""
    endings: list[tuple[int, Ending]] = []
    heard = Heard(lambda number, step, _: number == 1 and step == 4, lambda *ending: endings.append(ending))
    for number, sections in enumerate([{}, {}, {"model": {"name": str(tmp_path)}}]):
        wanted = experiment(
            validate={"every": 2}, output=str(tmp_path / f"out {number}"), train={"steps": 6}, **sections
        )
        trials.one_by_one(scripted(number, wanted), heard)
    (_, finished), (_, ended), (_, failed) = endings
    best = json.loads((tmp_path / "out 0" / "results.json").read_text())["best"]
    assert finished == Ending(selection.score(best))
    assert ended == Ending()
    assert not (tmp_path / "out 1" / "results.json").exists()
    assert failed.failed is not None
    assert failed.failed.code is ExitCode.MODEL


def test_a_trial_is_worth_its_best_validation(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = {name: {"image_to_text": {"mrr": number}} for name, number in (("best", 0.5), ("last", 0.25))}
    monkeypatch.setattr(training, "fit", lambda *_: SimpleNamespace(**scored))
    heard: list[Ending] = []
    asked = experiment(validate={"select_by": "mrr"})
    trials.one_by_one(scripted(0, asked), Heard(lambda *_: False, lambda _, ending: heard.append(ending)))
    assert heard == [Ending(0.5)]


def test_a_worse_trial_is_ended_early(wanted: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that finished, the median decides; the first of all is never ended."""
    monkeypatch.setattr(tune, "SPARED", 2)
    path = tmp_path / "space.yaml"
    path.write_text("train.max_grad_norm: [1.0, 2.0]")
    heard: list[int] = []

    def scores(trial: Trial, validated: Any) -> Ending:
        """Trial 3 is worse at its second look than the others were; no run is made."""
        for look, score in enumerate([0.2, 0.1 if trial.number == 3 else 0.3], start=1):
            heard.append(trial.number)
            if validated(trial.number, 2 * look, score):
                return Ending()
        monkeypatch.setattr(tuned, "outcome", lambda _, tried, *__: tried)
        return Ending(0.3)

    monkeypatch.setattr(trials, "_run", scores)
    tried: Any = tune.tune(wanted, Asked(tmp_path / "search", 5, space=path, share=0.25), QUIET)
    assert [one.state for one in tried] == ["finished", "finished", "finished", "ended early", "finished"]
    assert tried[3].score == 0.1
    assert heard == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def failing(monkeypatch: pytest.MonkeyPatch, codes: dict[int, ExitCode]) -> None:
    def end(trial: Trial, validated: Any) -> Ending:
        code = codes.get(trial.number)
        return Ending(0.5) if code is None else Ending(failed=UserError("wrong", "mend it", code))

    monkeypatch.setattr(trials, "_run", end)
    monkeypatch.setattr(tuned, "outcome", lambda _, tried, *__: tried)


def test_failed_trials_count_and_are_not_tried_again(
    wanted: Config, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {1: ExitCode.SYSTEM, 2: ExitCode.DIVERGED})
    asked = Asked(tmp_path / "search", 4, space=space_file, share=0.25)
    for _ in range(2):
        tried: Any = tune.tune(wanted, asked, QUIET)
        assert [(one.state, one.error) for one in tried] == [
            ("finished", None), ("failed", "wrong"), ("failed", "wrong"), ("finished", None),
        ]  # fmt: skip


def test_the_search_ends_where_the_first_or_many_in_a_row_fail(
    wanted: Config, space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {0: ExitCode.MODEL})
    asked = Asked(tmp_path / "search", 9, space=space_file, share=0.25)
    with pytest.raises(UserError, match=r"^wrong$") as caught:
        tune.tune(wanted, asked, QUIET)
    assert caught.value.code is ExitCode.MODEL
    failing(monkeypatch, dict.fromkeys(range(2, 9), ExitCode.SYSTEM))
    with pytest.raises(UserError, match="5 trials in a row failed, the last one: wrong"):
        tune.tune(wanted, asked, QUIET)


@pytest.mark.parametrize("by", ["hits", "hit@1", "hit@5", "mrr", "map"])
def test_a_pairs_share_of_the_score(by: str, loose: Path) -> None:
    from cytoclip import batches, retrieval
    from cytoclip.pairs import identities

    pairs: Pairs = batches.open_split(loose / "train", QUIET)
    image_ND, text_ND = (torch.from_numpy(np.asarray(rows)) for rows in runs.random_embeddings(len(pairs), 1.0))
    measured = full(image_ND, text_ND, pairs, [1, 5])
    ranked = retrieval.rank(image_ND, text_ND, identities(pairs), [1, 5])
    assert tuned.column_of(ranked, by).mean() == pytest.approx(selection.score(measured.scores, by), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"train": {"steps": 9}}, {}, "different: train.steps"),
        ({}, {"share": 0.3}, "different: data.hold_out.share"),
        ({}, {"space": "other"}, "different: --space"),
    ],
)
def test_another_search_in_the_same_folder(
    changes: Any, asked: Any, message: str, searched: tuple[Asked, tuned.Tuned], wanted: Config, tmp_path: Path
) -> None:
    given = wanted.model_dump(mode="json", by_alias=True)
    other = config.parse(
        {key: {**of, **changes.get(key, {})} if isinstance(of, dict) else of for key, of in given.items()}, "x"
    )
    (tmp_path / "other").write_text("train.ema: [null, 0.9]\n")
    asked = {key: tmp_path / value if key == "space" else value for key, value in asked.items()}
    with pytest.raises(UserError, match=message) as caught:
        tune.tune(other, replace(searched[0], **asked), QUIET)
    assert caught.value.code is ExitCode.RUN


def test_what_is_refused_before_the_first_trial(
    experiment: Experiment, loose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, asked = experiment(data={"root": str(loose)}), Asked(tmp_path / "search", 2)
    asked.to.mkdir()
    (asked.to / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds files that are no search of ours"):
        tune.tune(wanted, asked, QUIET)
    (asked.to / "mine.txt").unlink()
    with pytest.raises(UserError, match=r"fewer than train\.batch_size"):
        tune.tune(experiment(data={"root": str(loose)}, train={"batch_size": 46}), asked, QUIET)
    assert not (asked.to / "search.json").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="was started by a launcher"):
        tune.tune(wanted, asked, QUIET)
    monkeypatch.setattr(tune.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="cytoclip tune needs optuna") as caught:
        tune.tune(wanted, asked, QUIET)
    assert caught.value.hint == "pip install 'cytoclip[tune]'"


def test_the_default_space_of_each_family(bases: dict[str, Path], experiment: Experiment, loose: Path) -> None:
    expected = {  # projections, layers, patches, softmax
        "clip": (True, True, True, True),
        "siglip": (False, True, True, False),
        "siglip2": (False, True, True, False),
        "chinese_clip": (True, True, True, True),
        "two towers": (True, True, True, True),
    }
    assert set(bases) == set(expected)
    from cytoclip import batches

    pairs = batches.open_split(loose / "train", QUIET)
    for name, base in bases.items():
        facts = tune._facts(experiment(model={"name": str(base)}), pairs, 100)
        assert (facts.projections, facts.layers, facts.patches, facts.softmax) == expected[name]
        assert facts.repeats
    unlike = pairs.take(sorted({caption: row for row, caption in enumerate(pairs.captions)}.values()))
    assert not tune._facts(experiment(), unlike, 100).repeats
