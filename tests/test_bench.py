"""What benches compute by themselves: captions, pairs seen, what is wanted of a GPU's lines, and the shipped recipe."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from cytoclip import cells, config, demo

PROJECT = Path(__file__).parents[1]
PLACES = {"data": {"root": "x"}, "model": {"name": "x"}}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of bench/, which is no package: its files import each other by name."""
    monkeypatch.syspath_prepend(str(PROJECT / "bench"))
    before = set(sys.modules)

    def named(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield named
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == PROJECT / "bench":
            del sys.modules[name]


def test_the_shipped_recipe_is_the_one_that_was_measured(bench: Any) -> None:
    """The first guess of `bench/recipe.py` for all weights, and its budget for all of the training pairs."""
    space, recipe = bench("recipe_space"), bench("recipe")
    (measured,) = space.runs(space.PRIORS["full"][0], recipe.BUDGET, 0, 872)
    shipped = yaml.safe_load((PROJECT / "configs" / "recommended.yaml").read_text())
    off = {"positives": "groups", "label_smoothing": 0.0, "patch_dropout": 0.0, "seed": 0}  # what is so by default
    assert {key: value for key, value in measured["train"].items() if off.get(key) != value} == shipped["train"]
    assert measured["model"] == {key: value for key, value in shipped["model"].items() if key != "name"}
    assert measured["data"] == {key: value for key, value in shipped["data"].items() if key != "root"}


def test_the_recipe_with_lora_in_the_guide_is_the_one_that_was_measured(bench: Any) -> None:
    space, recipe = bench("recipe_space"), bench("recipe")
    (measured,) = space.runs(space.PRIORS["lora"][0], recipe.BUDGET, 0, 872)
    guide = (PROJECT / "docs" / "guide" / "recipes.md").read_text()
    (said,) = (yaml.safe_load(part.split("```")[0]) for part in guide.split("```yaml")[1:])
    shipped = yaml.safe_load((PROJECT / "configs" / "recommended.yaml").read_text())
    whole = config.parse({key: {**shipped[key], **said.get(key, {})} for key in ("data", "model", "train")}, "guide")
    ours = config.parse({key: {**measured[key], **PLACES.get(key, {})} for key in ("data", "model", "train")}, "bench")
    assert whole.data.model_copy(update={"root": "x"}) == ours.data
    assert whole.model.model_copy(update={"name": "x"}) == ours.model
    assert whole.train == ours.train


def test_no_recipe_sees_more_pairs_than_its_budget(bench: Any) -> None:
    space, checked = bench("recipe_space"), 0
    for arm, some in space.PRIORS.items():
        for params in some:
            for more in ({}, {"fitted": False}, {"first": 0.2}, {"batch": 256}):
                changed = params if arm == "baseline" else {**params, **more}
                every = space.runs(changed, 17_440, 0, 872)
                seen = sum(part["train"]["steps"] * part["train"]["batch_size"] for part in every)
                seen += 872 * any(part["model"].get("projections") == "fitted" for part in every)
                assert 17_440 - changed.get("batch", 64) < seen <= 17_440
                checked += 1
    assert checked == 3 * 4 * 4


def test_a_recipe_without_an_option_keeps_what_goes_with_it(bench: Any) -> None:
    space = bench("recipe_space")
    full, lora = (space.PRIORS[arm][0] for arm in ("full", "lora"))
    assert space.without(full, "text_tower")["text_tower"] == "full"
    assert space.without(lora, "text_tower")["text_tower"] == "lora"
    assert space.without(full, "fitted")["projection_rate"] > 10 * full["projection_rate"]
    assert space.without(full, "augment") == {**full, "augment": "none"}


def test_captions_for_buckets_vary_as_written_ones_do(bench: Any) -> None:
    tokens = bench("buckets").captions(400, 20, end=90, pad=0)
    lengths = (tokens == 90).int().argmax(dim=1) + 1
    assert tokens.shape == (400, int(lengths.max()))
    assert (int(lengths.min()), int(lengths.max())) == (5, 77)
    assert 17 <= lengths.median() <= 23
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        assert (row[: length - 1] > 0).all()
        assert not row[length:].any()


def test_captions_are_cut_as_word_after_word_would_cut_them(bench: Any) -> None:
    data = bench("peer_data")
    said = [one.caption for one in cells.sample(16, 0, range(2))]
    found, tokenizer = data._captions(said, 20, data.TOKENS)
    random = np.random.default_rng(0)
    long = [", ".join(said[i] for i in random.integers(len(said), size=8)) for _ in range(20)]
    again = demo.train_tokenizer(long)
    for text, cut in zip(long, found, strict=True):
        wanted, words = random.integers(*data.TOKENS, endpoint=True), text.split()
        while len(again(" ".join(words))["input_ids"]) > wanted:
            words.pop()
        assert cut == " ".join(words)
        assert len(tokenizer(cut)["input_ids"]) <= data.TOKENS[1]


def test_what_is_wanted_of_a_gpu_is_held_against_what_was_measured(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(part: str, batch: int, speed: float, chunk: int = 0, **more: Any) -> dict[str, Any]:
        return {"part": part, "batch": batch, "chunk": chunk or batch, "pairs/s": speed, **more}

    lines = [
        {"part": "facts", "gpu": "a card"},
        {"part": "plain", "matrix TFLOP/s": 800.0, "GFLOP a pair": 100.0},  # 8,000 pairs a second at most
        line("plain", 256, 2000.0),
        line("plain", 512, 3200.0),
        {"part": "plain", "batch": 1024, "chunk": 1024, "fits": False},
        line("compiled", 512, 4000.0),
        line("compiled", 32768, 3000.0, 512),
        line("lora", 256, 2200.0, leaner=False),
        line("lora", 256, 2400.0, leaner=True),
        line("lora", 512, 9999.0, **{"all weights": True}),
        line("lora-compiled", 512, 5600.0),
    ]
    found = {one["what"]: (one["found"], one["reached"]) for one in bench("gpu_card").card(lines)}
    assert found == {
        "share of the matrix rate, plain, 512 pairs": (0.4, False),
        "share of the matrix rate, compiled, 512 pairs": (0.5, True),
        "32768 pairs in chunks of 512, compiled, against one": (0.75, True),
        "LoRA against all weights, plain, 256 pairs": (1.2, False),
        "LoRA against all weights, compiled, 512 pairs": (1.4, True),
    }
    assert capsys.readouterr().out.count("missed") == 2
