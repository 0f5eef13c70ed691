"""`model.projections: fitted` in whole runs: when it is done, what it costs, and that nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from cytoclip import batches, canonical, checkpoint, features, jobs, pictures, projection_fit, towers, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.pairs import same_caption_key, spread
from tests.conftest import weights
from tests.test_effects import load, log, losses, ran

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]
NAMES = ("visual_projection.weight", "text_projection.weight")
FITTED = {"projections": "fitted"}


@pytest.fixture
def experiment(experiment: Experiment, many: Path) -> Experiment:
    """On pairs of which a fit learns something."""

    def made(**sections: Any) -> Config:
        return experiment(**{**sections, "data": {"root": str(many), **sections.get("data", {})}})

    return made


def test_the_run_begins_where_the_fit_is(experiment: Experiment, tmp_path: Path) -> None:
    """After a step at no rate the projections are those of the closed form, and all else is what it was."""
    wanted = ran(experiment, tmp_path, "run", model=FITTED, train={"steps": 1, "learning_rate": 1e-12})
    saved, before = weights(tmp_path / "run" / "model"), weights(Path(wanted.model.name))
    found = by_hand(wanted)
    for name, expected in zip(NAMES, (found.image_DP, found.text_DQ), strict=True):
        assert np.allclose(saved[name], expected.numpy(), atol=1e-4)
        assert not np.allclose(saved[name], before[name], atol=1e-3)
    assert all(np.allclose(saved[name], before[name], atol=1e-6) for name in before if name not in NAMES)
    assert found.mrr is not None
    said = rf"projections: fitted to 240 pairs, ridges {found.ridges[0]:g} and {found.ridges[1]:g}: mrr {found.mrr:.4f}"
    assert re.search(said, log(wanted))


def by_hand(wanted: Config) -> canonical.Fit:
    """The fit from features that are embedded one pair at a time."""
    opened = checkpoint.open_model(wanted.model.name)
    pairs = spread(batches.open_split(Path(str(wanted.data.root)) / "train", QUIET))
    pairs = batches.scanned(pairs, Path(str(wanted.data.root)) / "train", QUIET)
    encoder, sides = opened.encoder.eval(), ([], [])
    tokens = projection_fit.captions.tokenise(opened.tokenizer, pairs.captions, opened.context, encoder.family)
    with torch.no_grad():
        for row, file in enumerate(pairs.images):
            picture = pictures.read(file, opened.pixels)
            sides[0].append(encoder.image_features(torch.from_numpy(picture)[None])[0])
            sides[1].append(encoder.text_features(tokens.batch(np.array([row])))[0])
    given = opened.encoder.clip.visual_projection.weight.detach(), opened.encoder.clip.text_projection.weight.detach()
    both = torch.stack(sides[0]), torch.stack(sides[1])
    return canonical.fit(both, given, projection_fit.identities(pairs), canonical.rounds(projection_fit.folds(pairs)))


def test_the_start_is_scored_as_it_was_given(experiment: Experiment, tmp_path: Path) -> None:
    plain = ran(experiment, tmp_path / "a", "run", train={"steps": 1})
    fitted = ran(experiment, tmp_path / "b", "run", model=FITTED, train={"steps": 1})
    one, two = (json.loads((Path(w.output) / "results.json").read_text()) for w in (plain, fitted))
    assert one["before"] == two["before"]
    assert one["last"] != two["last"]


def test_a_run_that_goes_on_is_not_fitted_again(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit the run that was not stopped."""
    sections = {"model": FITTED, "train": {"ema": 0.5}, "checkpoint": {"every": 2}}
    whole = ran(experiment, tmp_path / "a", "run", **sections)
    steps, fits = training._step, projection_fit.fit
    asked: list[int] = []

    def die(job: Any, step: int, *rest: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return steps(job, step, *rest)

    monkeypatch.setattr(projection_fit, "fit", lambda *given: asked.append(1) or fits(*given))
    monkeypatch.setattr(training, "_step", die)
    with pytest.raises(KeyboardInterrupt):
        ran(experiment, tmp_path / "b", "run", **sections)
    monkeypatch.setattr(training, "_step", steps)
    cut = ran(experiment, tmp_path / "b", "run", **sections)
    assert asked == [1]
    assert losses(whole) == losses(cut)
    one, two = (weights(Path(w.output) / "model") for w in (whole, cut))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_averages_begin_at_the_fitted_projections(experiment: Experiment, tmp_path: Path) -> None:
    every = {"validate": {"every": 100}, "checkpoint": {"every": 1, "keep_last": 9}}
    wanted = ran(experiment, tmp_path, "run", model=FITTED, train={"ema": 0.5}, **every)
    expected = by_hand(wanted).image_DP
    for step in range(1, 5):
        expected = 0.5 * expected + 0.5 * load(wanted, step)[f"param.{NAMES[0]}"]
    assert np.allclose(weights(tmp_path / "run" / "model")[NAMES[0]], expected.numpy(), atol=1e-4)


def test_towers_in_training_say_what_frozen_ones_say(experiment: Experiment, tmp_path: Path) -> None:
    """LoRA with dropout begins at the same projections: features are asked for without any chance."""
    kinds: list[dict[str, Any]] = [
        {},
        {"image_tower": "lora", "text_tower": "lora", "lora": {"dropout": 0.5}},
        {"image_tower": "frozen", "text_tower": "frozen"},
    ]
    found = []
    for number, kind in enumerate(kinds):
        wanted = experiment(output=str(tmp_path / str(number) / "run"), model={**FITTED, **kind})
        job = prepared(wanted)
        jobs.begin_fitted(job)
        found.append([getattr(job.opened.encoder.clip, name.split(".")[0]).weight.detach().clone() for name in NAMES])
        assert job.opened.encoder.training
    for other in found[1:]:
        assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(found[0], other, strict=True))


def test_frozen_towers_are_not_asked_twice(experiment: Experiment, tmp_path: Path) -> None:
    wanted = experiment(model={**FITTED, "image_tower": "frozen", "text_tower": "frozen"})
    prepared(wanted)
    kept = list((tmp_path / features.FOLDER).glob("*.npy"))
    assert len(kept) == 4  # pictures and captions of train and of val


def prepared(wanted: Config) -> jobs.Job:
    world = training.device.start("cpu", "no")
    run = checkpoint.RunFolder(Path(wanted.output))
    return jobs.prepare(jobs.settled(wanted, world, run), run, world, QUIET, begins=True)


def test_projections_that_know_more_stay(experiment: Experiment, tmp_path: Path) -> None:
    """Fitted to these pairs before, they have seen what is held out of the fit now."""
    taught = ran(experiment, tmp_path / "a", "run", model=FITTED, train={"steps": 1, "learning_rate": 1e-12})
    again = ran(
        experiment, tmp_path / "b", "run", model={**FITTED, "name": f"{taught.output}/model"},
        train={"steps": 1, "learning_rate": 1e-12},
    )  # fmt: skip
    assert "those of the model stay, which know more" in log(again)
    one, two = (weights(Path(w.output) / "model") for w in (taught, again))
    assert all(np.allclose(one[name], two[name], atol=1e-6) for name in NAMES)


def test_no_more_than_so_many_pairs_are_looked_at(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(projection_fit, "MOST", 30)
    wanted = experiment(model=FITTED)
    world = training.device.start("cpu", "no")
    run = checkpoint.RunFolder(Path(wanted.output))
    jobs.prepare(jobs.settled(wanted, world, run), run, world, Console(), begins=True)
    assert "fitted to 30 pairs" in capsys.readouterr().err


def test_folds_have_nothing_in_common(root: Path, loose: Path) -> None:
    pairs = spread(batches.open_split(loose / "train", QUIET))
    fold_N = projection_fit.folds(pairs)
    assert fold_N is not None
    assert np.bincount(fold_N).min() >= 4
    where: dict[str, set[int]] = {}
    for caption, fold in zip(pairs.captions, fold_N, strict=True):
        where.setdefault(same_caption_key(caption), set()).add(int(fold))
    assert {len(each) for each in where.values()} == {1}
    assert len(where) < len(pairs), "captions repeat"
    tied = replace(pairs, sources=("one slide",) * len(pairs))
    assert np.array_equal(projection_fit.folds(tied), fold_N), "by caption alone where all come from one source"
    assert projection_fit.folds(replace(pairs, captions=("the same",) * len(pairs))) is None
    # Each picture with two captions of its own, sources of four: only what goes by all of them keeps them together.
    own = replace(pairs, captions=tuple(f"caption {i}" for i in range(len(pairs))), groups=("",) * len(pairs))
    for tied in (
        replace(own, contents=tuple(str(i // 2) for i in range(len(pairs)))),
        replace(own, sources=tuple(str(i // 4) for i in range(len(pairs)))),
        replace(own, groups=tuple(str(i // 3) for i in range(len(pairs)))),
    ):
        fold_N = projection_fit.folds(tied)
        assert fold_N is not None
        for each in (tied.contents, tied.sources, tied.groups):
            some = {value: {int(f) for v, f in zip(each, fold_N, strict=True) if v == value} for value in each if value}
            assert all(len(folds) == 1 for folds in some.values())


def test_what_cannot_be_compared_is_not_fitted(experiment: Experiment, many: Path, tmp_path: Path) -> None:
    """Of one caption nothing can be held out: the projections stay, and the run says so."""
    root = shutil.copytree(many, tmp_path / "alike")
    listed = root / "train" / "img_text_pair.json"
    listed.write_text(json.dumps([{**entry, "caption": "a cell"} for entry in json.loads(listed.read_text())]))
    wanted = ran(
        experiment, tmp_path, "run", data={"root": str(root)}, model=FITTED, train={"steps": 1, "learning_rate": 1e-12}
    )
    assert "those of the model stay: 240 pairs are too few or too alike to compare a fit on" in log(wanted)
    before, after = weights(Path(wanted.model.name)), weights(tmp_path / "run" / "model")
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in NAMES)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"anchor": {"embeddings": 1.0}}}, "anchor pulls towards the starting model"),
        ({"data": {"root": None, "train": "https://x.org/{0..3}.tar", "val": "v"}}, "looks at training pairs before"),
    ],
    ids=["anchor", "from afar"],
)
def test_what_cannot_be_fitted_is_refused(sections: dict[str, Any], message: str, experiment: Experiment) -> None:
    with pytest.raises(UserError, match=message):
        experiment(model=FITTED, **sections)


def test_a_family_without_projections_is_refused(experiment: Experiment, bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model\.projections: fitted, but SigLIP.* has no projections"):
        training.fit(experiment(model={**FITTED, "name": str(bases["siglip"])}), QUIET)


@pytest.mark.parametrize("family", ["clip", "chinese_clip", "two towers"])
def test_every_family_with_projections_is_fitted(
    family: str, experiment: Experiment, bases: dict[str, Path], tmp_path: Path
) -> None:
    wanted = ran(experiment, tmp_path, "run", model={**FITTED, "name": str(bases[family])}, train={"steps": 1})
    assert "model.projections: " in log(wanted)


def test_joined_towers_at_chance_are_told_of_it(experiment: Experiment, bases: dict[str, Path], tmp_path: Path) -> None:
    """Those alone: a model from scratch has more to learn than its projections."""
    told = "training begins where a closed form brings them"
    towers = {"name": str(bases["two towers"])}
    assert told in log(ran(experiment, tmp_path / "a", "run", model=towers, train={"steps": 1}))
    assert told not in log(ran(experiment, tmp_path / "b", "run", model={**towers, **FITTED}, train={"steps": 1}))
    assert told not in log(ran(experiment, tmp_path / "c", "run", train={"steps": 1}))


def test_a_projection_with_a_hidden_layer_is_refused_and_not_recommended(
    bases: dict[str, Path], experiment: Experiment, tmp_path: Path
) -> None:
    """As BiomedCLIP has it."""
    folder = shutil.copytree(bases["two towers"], tmp_path / "deep")
    parts = AutoConfig.from_pretrained(folder)
    made = towers.TwoTowersConfig.from_vision_text_configs(parts.vision_config, parts.text_config, projection_dim=16)
    made.text_hidden = 24
    torch.manual_seed(0)
    (folder / "model.safetensors").unlink()
    towers.TwoTowers(made).save_pretrained(folder)
    said = "fitted replaces linear layers, and the text_projection of .* has a hidden layer"
    with pytest.raises(UserError, match=said) as caught:
        training.fit(experiment(model={"name": str(folder), **FITTED}), QUIET)
    assert caught.value.hint == "set model.projections=full"
    wanted = ran(experiment, tmp_path, "full", model={"name": str(folder)}, train={"steps": 1})
    assert "projections=fitted" not in log(wanted)
