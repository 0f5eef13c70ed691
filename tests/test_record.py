"""A run folder read back, whole or old, and never more than it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cytoclip import record, soup
from cytoclip.console import Console
from cytoclip.errors import UserError

QUIET = Console(quiet=True)


@pytest.fixture
def copied(told: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(told, tmp_path / "copied"))


def test_everything_is_read(told: Path) -> None:
    read = record.read(told)
    assert read.wanted is not None
    assert read.wanted.train.steps == 40
    assert read.versions == "cytoclip 0.1, torch 2"
    assert read.losses["step"].tolist() == list(range(1, 41))
    assert set(read.curves) == {"step", "hit_at_1", "pairs_per_second", "waiting_for_data", "chance_loss"}
    assert [row["step"] for row in read.validations] == [0, 10, 20, 30, 40]
    assert read.missing == []
    embedded = read.embedded("val", "best")
    assert embedded is not None
    assert (embedded.image_ND.shape, embedded.image_ND.dtype) == ((20, 16), torch.float32)
    assert read.embedded("test", "best") is None
    assert len(record.pairs(read, "val", embedded, QUIET)) == 20


def test_an_older_run_lacks_and_says_so(copied: Path) -> None:
    for name in ("curves.jsonl", "validations.jsonl", "losses.jsonl", "embeddings/best.safetensors"):
        (copied / name).unlink()
    (copied / "config.yaml").write_text("data: {root: x}\nonce: {was: 1}\n")
    read = record.read(copied)
    assert (read.wanted, read.versions) == (None, "")
    assert read.embedded("val", "best") is None
    assert [what.split()[0] for what in read.missing] == ["its", "curves.jsonl", "losses.jsonl", "validations.jsonl"]


def test_cut_lines_and_missing_numbers(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "a": 2}\n{"step": 2, "a": null, "b": 3.5}\n{"step": 3, "c": "text"}\n{"step": 4, "a"')
    found = record.columns(log)
    assert found["step"].tolist() == [1, 2, 3]
    assert np.nan_to_num(found["a"], nan=-1).tolist() == [2, -1, -1]
    assert np.nan_to_num(found["b"], nan=-1).tolist() == [-1, 3.5, -1]
    assert "c" not in found
    assert math.isnan(found["a"][1])


@pytest.mark.parametrize("broken", ["no run", "not finished", "damaged", "no scores"])
def test_what_is_no_finished_run_is_refused(copied: Path, broken: str) -> None:
    if broken == "no run":
        (copied / "config.yaml").unlink()
    elif broken == "not finished":
        (copied / "results.json").unlink()
    else:
        (copied / "results.json").write_text("{" if broken == "damaged" else "{}")
    with pytest.raises(UserError, match=r"no run folder|not finished|damaged"):
        record.read(copied)


def test_a_mistyped_run_has_its_neighbour_and_a_folder_is_not_its_own(copied: Path, tmp_path: Path) -> None:
    """In the report and in the soup."""
    other, mistyped = tmp_path / "not-a-run", copied.with_name(copied.name + "x")
    other.mkdir()
    for read in (record.read, lambda folder: soup.soup(folder, soup.Asked(), QUIET)):
        for folder, hint in ((mistyped, f"did you mean {copied}?"), (other, "name ")):
            with pytest.raises(UserError, match="no run folder") as caught:
                read(folder)
            assert caught.value.hint.startswith(hint)


def test_a_truncated_tensor_file_is_none(copied: Path) -> None:
    place = copied / "embeddings" / "best.safetensors"
    place.write_bytes(place.read_bytes()[:200])
    assert record.read(copied).embedded("val", "best") is None


@pytest.mark.parametrize(
    "wrong", [torch.full((20, 16), torch.nan), torch.ones(19, 16), torch.ones(20), torch.ones(0, 16)]
)
def test_embeddings_that_cannot_be_drawn_are_none(copied: Path, wrong: torch.Tensor) -> None:
    other = torch.ones(0, 16) if not len(wrong) else torch.ones(20, 16)
    save_file({"image": wrong, "text": other}, copied / "embeddings" / "best.safetensors")
    assert record.read(copied).embedded("val", "best") is None


def test_other_pairs_are_refused(copied: Path, root: Path, tmp_path: Path) -> None:
    read = record.read(copied)
    embedded = read.embedded("val", "best")
    assert embedded is not None
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    listed = json.loads((moved / "val" / "img_text_pair.json").read_text())
    listed[3]["caption"] += " indeed"
    (moved / "val" / "img_text_pair.json").write_text(json.dumps(listed))
    (copied / "config.yaml").write_text(f"data: {{root: {moved}}}\n")
    with pytest.raises(UserError, match="the data have changed"):
        record.pairs(record.read(copied), "val", embedded, QUIET)
