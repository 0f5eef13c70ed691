"""What a search varies: the default space fits the run, a file is read or refused, values are put where they belong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cytoclip import config, space
from cytoclip.config import Config
from cytoclip.errors import UserError
from cytoclip.space import Choice, Facts, Span

ALL = Facts(steps=200, projections=True, layers=True, patches=True, repeats=True, softmax=True, joined=True)


def made(**sections: Any) -> Config:
    return config.parse({"data": {"root": "somewhere"}, **sections}, "the test")


def values(of: Choice | Span) -> tuple[Any, ...]:
    return of.values if isinstance(of, Choice) else (of.low, of.high)


@pytest.mark.parametrize(
    ("sections", "varied"),
    [
        ({}, 15),
        ({"model": {"image_tower": "lora", "text_tower": "lora"}}, 17),
        ({"model": {"image_tower": "frozen"}}, 11),
        ({"model": {"image_tower": "frozen", "text_tower": "frozen"}}, 9),
        ({"model": {"projections": "frozen"}, "data": {"root": "x", "augment": {"blur": 1.0}}}, 13),
    ],
)
def test_every_default_value_is_one_that_the_run_takes(sections: dict[str, Any], varied: int) -> None:
    wanted = made(**sections)
    found = space.default(wanted, ALL)
    assert len(found) == varied
    tried = [(name, value) for name, of in found.items() for value in values(of)]
    for name, value in tried:
        assert space.applied(wanted, {name: value}, "the test")
    frozen = {name for name in ("image", "text") if sections.get("model", {}).get(f"{name}_tower") == "frozen"}
    assert not {f"train.{name}_learning_rate" for name in frozen} & set(found)
    for each in itertools.islice(itertools.product(*(values(of) for of in found.values())), 0, 100_000, 997):
        assert space.applied(wanted, dict(zip(found, each, strict=True)), "the test")


def test_what_has_no_effect_is_left_out() -> None:
    whole = set(space.default(made(), ALL))
    left_out = {
        "projections": {"train.projection_learning_rate"},
        "layers": {"train.layer_decay"},
        "patches": {"train.patch_dropout"},
        "repeats": {"train.positives"},
        "softmax": {"train.label_smoothing"},
        "joined": {"model.projections", "model.text_tower"},
    }
    for fact, some in left_out.items():
        assert whole - set(space.default(made(), replace(ALL, **{fact: False}))) == some


def test_of_joined_towers_only_what_the_run_takes_is_varied() -> None:
    """No closed form beside an anchor; no text tower that is frozen where it alone has adapters."""
    anchored = space.default(made(train={"anchor": {"embeddings": 1.0}}), ALL)
    assert "model.projections" not in anchored
    assert "model.text_tower" in anchored
    assert "model.text_tower" not in space.default(made(model={"text_tower": "lora"}), ALL)
    chosen = {"model.text_tower": "frozen", "train.text_learning_rate": 1e-4, "model.projections": "fitted"}
    found = space.applied(made(train={"text_learning_rate": 1e-5}), chosen, "a trial")
    assert (found.model.text_tower, found.train.text_learning_rate) == ("frozen", None)
    assert found.model.projections == "fitted"


def test_rates_hold_the_one_given() -> None:
    for rate in (1e-7, 1e-5, 0.1):
        for name, of in space.default(made(train={"learning_rate": rate}), ALL).items():
            if name.endswith("learning_rate"):
                low, high = values(of)
                assert low < rate < high


@pytest.mark.parametrize(("model", "steps"), [({}, 1), ({}, 2), ({}, 200), ({"image_tower": "lora"}, 10**6)])
def test_the_default_is_read_again_from_its_text(model: dict[str, Any], steps: int, tmp_path: Path) -> None:
    wanted = made(model=model)
    found = space.default(wanted, replace(ALL, steps=steps)) | {"train.batch_size": Span(16, 64, log=True, whole=True)}
    (tmp_path / "space.yaml").write_text(space.text(found))
    assert space.read(tmp_path / "space.yaml", wanted) == found


@pytest.mark.parametrize(
    ("written", "message", "hint"),
    [
        ("train.lr: [1, 2]", "unknown option train.lr in", "did you mean train.learning_rate?"),
        ("validate.every: [1, 2]", "validate.every in .* is the same for all trials", "take it out of the space"),
        ("data.root: [a, b]", "data.root in .* is the same for all trials", "take it out"),
        ("train.ema: [0.9]", r"train.ema: \[0.9\] in .* leaves no choice", "two different values"),
        ("train.ema: [0.9, 0.9]", "leaves no choice", "two different values"),
        ("train.ema: 0.9", "train.ema: 0.9 in .* is neither a list nor a range", "write a list"),
        ("train.ema: {low: 0.9, top: 1}", "is neither a list nor a range", "write a list"),
        ("train.ema: {low: 0.9, high: 0.8}", "is no range", "write a list"),
        ("train.ema: {low: 0, high: 0.8, log: true}", "is no range", "write a list"),
        ("train.ema: {low: a, high: b}", "is no range", "write a list"),
        ("train.batch_size: {low: 2.5, high: 8}", "is not of whole numbers", "write a list"),
        ("train.ema: [0.5, 1.5]", "train.ema: 1.5 is refused", r"train.ema \(number"),
        ("model.lora.rank: [4, 8]", "none of 2 values goes with the configuration", "no tower is lora"),
        ("model: 3", "model: 3 in .* is neither", "write a list"),
        ("[1, 2]", "names no option", "such as train.ema"),
        ("", "names no option", "such as train.ema"),
        ("a: [b", "cannot be read", "mend that line"),
    ],
)
def test_what_a_file_is_refused_for(written: str, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(written)
    with pytest.raises(UserError, match=message) as caught:
        space.read(path, made())
    assert hint.replace("\\", "") in caught.value.hint
    assert str(path) in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such space file"):
        space.read(tmp_path / "none.yaml", made())


def test_a_value_that_goes_only_with_others_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("model.image_tower: [full, frozen]\ndata.augment: [null, {preset: microscopy}]\n")
    frozen = made(model={"image_tower": "frozen"})
    assert len(space.read(path, frozen)) == 2
    with pytest.raises(UserError, match="varies pictures"):
        space.applied(frozen, {"data.augment": {"preset": "microscopy"}}, "trial 3")


def test_values_are_put_where_they_belong() -> None:
    lora = made(model={"image_tower": "lora", "lora": {"rank": 4, "alpha": 8.0}}, train={"epochs": 2})
    found = space.applied(lora, {"model.lora.rank": 16, "data.augment": {"flips": True}, "train.ema": 0.9}, "x")
    assert found.model.lora
    assert (found.model.lora.rank, found.model.lora.alpha) == (16, 32.0)
    assert found.data.augment
    assert (found.data.augment.flips, found.data.augment.blur, found.train.ema) == (True, 0, 0.9)
    both = space.applied(lora, {"model.lora.rank": 16, "model.lora.alpha": 1.0}, "x")
    assert both.model.lora
    assert both.model.lora.alpha == 1
    assert space.applied(lora, {"train.steps": 7}, "x").train.epochs is None
    assert space.applied(lora, {}, "x") == lora


def test_a_line_for_people() -> None:
    chosen = {"train.ema": None, "train.learning_rate": 3.2e-05, "data.augment": {"flips": True}, "model.lora.rank": 4}
    assert space.said(chosen) == "ema=null learning_rate=3.2e-05 augment={flips: true} rank=4"
