"""What the check proposes and says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cytoclip import captions, check, checkpoint, config, repeats, verdict
from cytoclip.console import Console
from cytoclip.objectives import Objective
from cytoclip.order import Order
from cytoclip.pairs import identities
from cytoclip.verdict import Report

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def report(root: Path, base: Path) -> Report:
    return check.check(root, str(base), 12, QUIET)


def test_the_proposed_configuration_is_one(report: Report, root: Path, base: Path) -> None:
    """Read back from the text with its comments, and complete but for the name of the run folder."""
    given = yaml.safe_load(verdict.proposed_yaml(report))
    assert given == verdict.proposed(report)
    wanted = config.parse({**given, "output": "runs/x"}, "the test")
    assert (wanted.data.root, wanted.model.name) == (str(root), str(base))
    assert (wanted.train.batch_size, wanted.train.positives, wanted.data.crop) == (12, "groups", "auto")


def test_a_path_that_yaml_would_misread_is_quoted(clean_one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a: b # c 'd' \"e\" – é"
    shutil.copytree(clean_one, folder)
    report = check.check(folder, None, None, QUIET)
    assert yaml.safe_load(verdict.proposed_yaml(report))["data"]["root"] == str(folder)


@pytest.fixture(scope="module")
def clean_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide pictures under long Chinese captions, one picture each."""
    root = tmp_path_factory.mktemp("wide") / "data"
    rng = np.random.default_rng(0)
    for name, count in (("train", 20), ("val", 4)):
        (root / name / "imgs").mkdir(parents=True)
        entries = []
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 12, 3), dtype=np.uint8))
            coarse.resize((240, 120)).save(root / name / "imgs" / f"{i}.png")
            entries.append({"img": f"{i}.png", "caption": f"第{i}例{name}骨髓涂片中可见一个巨核细胞" * 6})
        (root / name / "img_text_pair.json").write_text(json.dumps(entries))
    return root


def test_what_is_proposed_follows_from_the_data(clean_one: Path, base: Path) -> None:
    without = verdict.proposed(check.check(clean_one, None, None, QUIET))
    assert without["data"]["crop"] == "pad"
    assert without["model"]["name"] == "OFA-Sys/chinese-clip-vit-base-patch16"
    assert "context_length" not in without["model"]
    assert (without["train"]["batch_size"], without["train"]["warmup_steps"]) == (2, 10)
    report = check.check(clean_one, str(base), None, QUIET)
    assert verdict.proposed(report)["model"]["context_length"] == 248
    assert {one.kind for one in report.findings} == {"cropped-away", "cut-captions", "unread-script"}


@pytest.mark.parametrize(("steps", "proposed"), [(0, 1), (1, 1), (99, 99), (100, None), (101, None)])
def test_a_short_run_is_not_all_warm_up(report: Report, steps: int, proposed: int | None) -> None:
    facts = report.facts | {"train": replace(report.facts["train"], pairs=12 * steps)}
    assert verdict.proposed(replace(report, facts=facts))["train"].get("warmup_steps") == proposed


@pytest.mark.parametrize(("long", "proposed"), [(0, None), (1, None), (5, 96), (100, 96)])
def test_a_longer_context_needs_more_than_one_caption_in_a_hundred(
    report: Report, long: int, proposed: int | None
) -> None:
    lengths = np.array([30] * (200 - long) + [91] * long)
    facts = {"train": replace(report.facts["train"], lengths=lengths)}
    assert verdict.proposed(replace(report, facts=facts))["model"].get("context_length") == proposed


@pytest.mark.parametrize(("pairs", "size"), [(0, 2), (16, 2), (100, 8), (872, 64), (4096, 512), (10**6, 512)])
def test_a_batch_leaves_an_epoch_a_few_steps(pairs: int, size: int) -> None:
    assert verdict.batch_size(pairs) == size
    assert size == 2 or pairs >= 8 * size


def test_the_floor_is_what_training_says(report: Report) -> None:
    pairs = report.splits["train"].pairs
    batches = [identities(pairs).take(rows) for rows, _ in Order(len(pairs), 12, 0).draws(0, repeats.TYPICAL)]
    assert report.repeats == repeats.typical(batches, Objective())
    assert report.repeats is not None
    assert report.repeats.floor > 0
    assert report.floor() in report.text()


def test_token_lengths_are_those_of_training(report: Report, base: Path) -> None:
    opened = checkpoint.open_model(str(base))
    said = report.splits["train"].pairs.captions
    assert report.facts["train"].lengths.tolist() == captions.tokenise(opened.tokenizer, said, 10**6).lengths().tolist()


def test_the_document_is_json_and_says_everything(report: Report) -> None:
    document = json.loads(json.dumps(report.document()))
    assert list(document) == [
        "schema", "data_root", "model", "crop", "verdict", "needs_a_hand", "splits", "findings", "loss", "proposed"
    ]  # fmt: skip
    assert document["needs_a_hand"] is True
    kinds = {one["kind"]: one for one in document["findings"]}
    assert set(kinds) == {"leak-group", "repeated-captions"}
    assert kinds["leak-group"]["count"] == len(kinds["leak-group"]["cases"])
    first = kinds["leak-group"]["cases"][0]
    assert first == {
        "split": "val",
        "name": "000.png",
        "note": "group 0",
        "twin": {"split": "train", "name": "000.png"},
    }
    assert document["splits"]["train"]["pairs"] == 48
    assert document["splits"]["train"]["width"] == {"min": 40, "5%": 40, "median": 40, "95%": 40, "max": 40}
    assert document["loss"]["batch_size"] == 12
