"""What a run comes to: the test split asked once and never selected on, results.json as documented."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import checkpoint, classify, embeddings, encode, outcome, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.pairs import Pairs
from tests import tiny
from tests.conftest import weights, write_split
from tests.numerics.nursery import spawn

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]
LORA = {"image_tower": "lora", "text_tower": "lora"}


@pytest.fixture(scope="module")
def tested(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data root with a test split."""
    folder = shutil.copytree(root, tmp_path_factory.mktemp("tested"), dirs_exist_ok=True)
    write_split(folder / "test", 14, seed=5)
    return folder


def results(wanted: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(wanted.output) / "results.json").read_text())
    return found


@pytest.mark.parametrize("towers", [{}, LORA], ids=["full", "adapter"])
def test_the_test_split_is_scored_with_the_start_and_with_best(
    towers: dict[str, str], experiment: Experiment, tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `evaluate` scores them; embedded twice, after the last step, and what validation embedded is not again."""
    encodes, steps = encode.encode, training._step
    asked: list[int] = []

    def counting(encoder: Any, pairs: Pairs, *rest: Any) -> Any:
        asked.append(len(pairs))
        return encodes(encoder, pairs, *rest)

    def marking(*given: Any) -> Any:
        asked.append(0)
        return steps(*given)

    monkeypatch.setattr(encode, "encode", counting)
    monkeypatch.setattr(training, "_step", marking)
    wanted = experiment(data={"root": str(tested)}, model=towers, validate={"every": 2, "ks": [1, 5]})
    result = training.fit(wanted, Console())
    assert asked == [20, 0, 0, 20, 0, 0, 20, 14, 14]
    monkeypatch.undo()
    found = results(wanted)["test"]
    for side, model in (("before", wanted.model.name), ("best", f"{wanted.output}/best")):
        again = tiny.scores_of(model, tested / "test", [1, 5])
        for direction in ("image_to_text", "text_to_image"):
            assert {key: found[side][direction][key] for key in again[direction]} == again[direction]
    assert result.test == found
    assert "the test split, asked once, at the end:" in result.table()
    assert training.fit(wanted, QUIET) == result
    assert sorted(path.name for path in (Path(wanted.output) / "embeddings").iterdir()) == [
        "before.safetensors", "best.safetensors", "test-before.safetensors", "test-best.safetensors",
    ]  # fmt: skip


def test_another_test_split_changes_nothing_but_its_own_scores(
    experiment: Experiment, root: Path, tested: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(root, tmp_path / "data")
    write_split(other / "test", 17, seed=6)
    runs = []
    for name, data in (("none", root), ("one", tested), ("other", other)):
        runs.append(experiment(data={"root": str(data)}, validate={"every": 1}, output=str(tmp_path / name)))
        training.fit(runs[-1], QUIET)
    none, one, two = (results(wanted) for wanted in runs)
    assert "test" not in none
    assert one["test"] != two["test"]
    for key in ("best_step", "before", "last", "best", "val", "stopped_early"):
        assert none[key] == one[key] == two[key], key
    for folder in ("best", "model"):
        first, second, third = (weights(Path(wanted.output) / folder) for wanted in runs)
        assert all(np.array_equal(first[n], second[n]) and np.array_equal(first[n], third[n]) for n in first)


def test_training_warns_of_what_leaks_into_the_test_split(experiment: Experiment, root: Path, tmp_path: Path) -> None:
    data = shutil.copytree(root, tmp_path / "data")
    shutil.copytree(root / "train", data / "test")
    training.fit(experiment(data={"root": str(data)}), Console())
    log = (tmp_path / "run" / "train.log").read_text()
    assert "48 of 48 pairs in test and train: test/000.png = train/000.png" in log


def test_results_have_the_keys_of_the_schema(experiment: Experiment, tested: Path, root: Path) -> None:
    wanted = experiment(
        data={"root": str(tested)}, validate={"every": 2, "ks": [1, 5], "keep": str(root), "select_by": "hit@5"}
    )
    training.fit(wanted, QUIET)
    found = results(wanted)
    assert found["from_hub"] is False
    assert set(found) == {
        "schema", "steps", "best_step", "ks", "select_by", "stopped_early", "before", "last", "best", "val", "test",
        "keep", "seconds", "pairs_seen", "processes", "device", "hardware", "versions", "skipped", "floor", "from_hub",
        "classification",
    }  # fmt: skip
    assert (found["schema"], found["select_by"], found["stopped_early"], found["skipped"]) == (1, "hit@5", False, {})
    for split in ("val", "test"):
        assert set(found[split]) >= {"before", "best"}
    for side in ("before", "best"):
        for direction in ("image_to_text", "text_to_image", "chance"):
            full = found["val"][side][direction]
            assert {key: full[key] for key in found[side][direction]} == found[side][direction]
    assert set(found["hardware"]) == {"cpu", "cores", "memory_gb"}
    assert found["hardware"]["memory_gb"] > 0.1
    assert found["versions"]["torch"] == torch.__version__


def test_embeddings_that_are_not_there_or_others_are_made_again(
    experiment: Experiment, tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may have deleted them, or copied those of another run; then the models are asked again."""
    wanted = experiment(data={"root": str(tested)}, validate={"every": 2, "ks": [1, 5]})
    training.fit(wanted, QUIET)
    whole, folder = results(wanted), Path(wanted.output) / "embeddings"
    kept = {path.name: [rows.clone() for rows in embeddings.read(path)] for path in folder.iterdir()}
    (Path(wanted.output) / "results.json").unlink()
    shutil.copy(folder / "test-best.safetensors", folder / "best.safetensors")
    (folder / "before.safetensors").unlink()
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("a step was taken"))
    training.fit(wanted, QUIET)
    assert {**results(wanted), "seconds": 0} == {**whole, "seconds": 0}
    for name, both in kept.items():
        for one, other in zip(both, embeddings.read(folder / name), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_a_starting_model_that_changed_meanwhile_is_said_and_nothing_is_lost(
    experiment: Experiment, tested: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    wanted = experiment(data={"root": str(tested)}, model={"name": str(own)})
    held_out = outcome._held_out

    def change(*given: Any) -> Any:
        opened = checkpoint.open_model(str(own))
        opened.encoder.clip.logit_scale.data += 1
        opened.encoder.clip.save_pretrained(own)
        return held_out(*given)

    monkeypatch.setattr(outcome, "_held_out", change)
    with pytest.raises(UserError, match=f"{own} has other weights or settings than when") as caught:
        training.fit(wanted, QUIET)
    assert caught.value.code is ExitCode.RUN
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    shutil.copytree(base, own, dirs_exist_ok=True)
    monkeypatch.setattr(training, "_step", lambda *_: pytest.fail("a step was taken"))
    assert training.fit(wanted, QUIET).steps == 4


@pytest.mark.slow  # a group of two processes, 8 s
def test_two_processes_come_to_the_results_of_one(
    experiment: Experiment, tested: Path, root: Path, tmp_path: Path
) -> None:
    def case(output: str) -> dict[str, Any]:
        wanted = experiment(
            data={"root": str(tested)}, model=LORA, train={"steps": 8, "device": "cpu"}, output=str(tmp_path / output),
            validate={"every": 2, "ks": [1, 5], "keep": str(root / "train"), "patience": 2},
        )  # fmt: skip
        return {"config": wanted.model_dump(mode="json", by_alias=True), "float64": True, "die_at": None}

    for output, processes in (("one", 1), ("two", 2)):
        (tmp_path / "cases.json").write_text(json.dumps([case(output)]))
        spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], processes)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    for key in ("steps", "best_step", "stopped_early", "before", "last", "best", "val", "test", "keep"):
        assert one[key] == two[key], key
    lines = [(tmp_path / name / "validations.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] == lines[1]


def test_labels_are_told_apart_before_and_after(
    experiment: Experiment, tested: Path, root: Path, tmp_path: Path
) -> None:
    """As `cytoclip classify` does with the two models: on test where there is one, else on val."""
    for place, split in ((tested, "test"), (root, "val")):
        wanted = experiment(data={"root": str(place)}, validate={"every": 2}, output=str(tmp_path / split))
        training.fit(wanted, QUIET)
        found = results(wanted)["classification"]
        assert found["split"] == split
        for side, model in (("before", wanted.model.name), ("best", f"{wanted.output}/best")):
            asked = classify.Asked(split=split, probe=False)
            alone = json.loads(json.dumps(classify.classify(model, place, asked, QUIET, 12, 0)))
            assert {key: alone[key] for key in found[side]} == found[side]
            assert len(found[side]["classes"]) >= 2


def test_without_labels_nothing_is_told_apart(experiment: Experiment, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "plain")
    for split in ("train", "val"):
        place = tmp_path / "plain" / split / "img_text_pair.json"
        entries = [{**entry, "label": "one"} for entry in json.loads(place.read_text())]
        place.write_text(json.dumps(entries))
    wanted = experiment(data={"root": str(tmp_path / "plain")}, train={"steps": 2})
    training.fit(wanted, QUIET)
    assert "classification" not in results(wanted)
