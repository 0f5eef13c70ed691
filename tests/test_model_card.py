"""Cards: what the hub reads from them, what they must never say, and code in them that runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from cytoclip import checkpoint, model_card, record, report_page, training
from cytoclip.config import Config, parse
from cytoclip.console import Console

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def results(told: Path) -> dict[str, Any]:
    return dict(json.loads((told / "results.json").read_text()))


def card(results: dict[str, Any], name: str = "openai/clip-vit-base-patch16", best: bool = True) -> str:
    wanted = parse({"data": {"root": "/home/jane/data"}, "model": {"name": name}, "output": "/home/jane/run"}, "a test")
    return model_card.card(results, wanted, best, adapter=False, family="clip")


def test_the_hub_reads_it_and_its_numbers(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(results))
    read = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert read.data.base_model == "openai/clip-vit-base-patch16"
    assert read.data.library_name == "transformers"
    assert read.data.license is None
    assert read.data.tags == ["cytoclip", "image-text-retrieval", "clip"]
    found = {(one.task_name, one.metric_type): one for one in read.data.eval_results or []}
    best = results["val"]["best"]
    assert len(found) == 8
    for direction, title in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
        for key, name in (("hit@1", "hit@1"), ("hit@10_groups", "hit@10_by_group")):
            one = found[f"Retrieval, {title}", name]
            assert one.metric_value == best[direction][key]
            assert one.metric_args == {"interval_95": best["intervals"][direction][key]}
            assert one.dataset_split == "val"
    again = eval_results_to_model_index("fine-tuned with cytoclip", read.data.eval_results or [])
    assert again[0]["results"]


@pytest.mark.parametrize(("count", "doubted"), [(3, True), (20, False)])
def test_intervals_of_few_sources_are_doubted_at_the_headline(
    results: dict[str, Any], count: int, doubted: bool
) -> None:
    best = results["val"]["best"] | {"clusters": {"by": "source", "count": count}}
    text = card(results | {"val": results["val"] | {"best": best}})
    said = "On val, intervals are drawn from 3 sources: with so few they are too narrow."
    assert (said in text.partition("| metric |")[0]) == doubted


def test_no_place_name_or_caption(told: Path, results: dict[str, Any]) -> None:
    read = record.read(told)
    embedded = read.embedded("val", "best")
    assert embedded is not None
    pairs = record.pairs(read, "val", embedded, QUIET)
    text = card(results | {"skipped": {"jane.png": 1}}, name="/home/jane/model")
    assert "jane" not in text
    assert "/home" not in text
    assert str(told) not in model_card.card(results, read.wanted, True, False, "clip")
    assert not [word for word in (*pairs.captions, *pairs.names) if word in text]
    assert "base_model" not in text


@pytest.mark.parametrize("name", ["/home/jane/model", "./model", "../a/b", "~/model", "a/b/c", "C:\\model", "gone"])
def test_only_a_hub_id_is_a_base(name: str) -> None:
    wanted = parse({"data": {"root": "x"}, "model": {"name": name}, "output": "y"}, "a test")
    assert model_card.base_id(wanted, {"from_hub": True}) is None


def test_a_folder_is_no_hub_id_wherever_the_card_is_written() -> None:
    wanted = parse({"data": {"root": "x"}, "model": {"name": "runs/first"}, "output": "y"}, "a test")
    assert model_card.base_id(wanted, {"from_hub": False}) is None
    assert model_card.base_id(wanted, {}) is None, "an older run does not say"
    assert model_card.base_id(wanted, {"from_hub": True}) == "runs/first"


def test_the_card_of_the_last_step_has_its_own_numbers(results: dict[str, Any]) -> None:
    last = json.loads(json.dumps(results["best"]))
    last["image_to_text"]["hit@1"] = 0.123
    other = results | {"best_step": 20, "last": last}
    text = card(other, best=False)
    assert "The weights of step 40 of 40" in text
    assert "12.3 %" in text
    assert "value: 0.123" in text
    assert "The weights of step 20 of 40" in card(other)
    assert "12.3 %" not in card(other)


def test_a_run_without_a_readable_configuration_has_a_card(results: dict[str, Any]) -> None:
    assert "a checkpoint that is not on the hub" in model_card.card(results, None, True, False, "")


@pytest.mark.parametrize("tower", ["full", "lora"])
def test_the_code_in_it_opens_the_model(
    experiment: Callable[..., Config], tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is what the card says, with the base's id replaced, as there is no hub here."""
    wanted = experiment(model={"image_tower": tower, "text_tower": tower}, train={"steps": 1, "warmup_steps": 1})
    training.fit(wanted, QUIET)
    folder = Path(wanted.output) / "model"
    text = (folder / "README.md").read_text()
    assert ("library_name: peft" in text) == (tower == "lora")
    assert wanted.model.name not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert ("PeftModel" in code) == (tower == "lora")
    monkeypatch.chdir(folder)
    said: dict[str, Any] = {}
    exec(code.replace("the checkpoint it began from", wanted.model.name), said)  # noqa: S102 - our own
    opened = checkpoint.open_model(str(folder)).encoder.clip.state_dict()
    there = said["model"].state_dict()
    assert all((there[name] - tensor).abs().max() < 1e-6 for name, tensor in opened.items())


def test_cards_are_written_where_there_are_none(done: tuple[Config, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree(done[0].output, tmp_path / "run"))
    os.remove(run / "best" / "README.md")  # noqa: PTH107
    (run / "model" / "README.md").unlink()
    report_page.rebuild(run, QUIET)
    assert "# Image-text model" in (run / "best" / "README.md").read_text()
    (run / "best" / "README.md").write_text("mine")
    report_page.rebuild(run, QUIET)
    assert (run / "best" / "README.md").read_text() == "mine"
