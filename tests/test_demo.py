"""The demo's data, base and recipe on a reduced size; the real command, and that it learns, as a slow test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from cytoclip import batches, checkpoint, config, demo
from cytoclip.console import Console
from tests.conftest import TINY

QUIET = Console(quiet=True)
PYTHON = Path(sys.executable)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TRAIN_SLIDES": range(2), "TRAIN_PER_SLIDE": 8, "VAL_SLIDES": range(2, 4), "VAL_PER_SLIDE": 8, "VAL_PAIRS": 10,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)


def read(root: Path, split: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((root / split / "img_text_pair.json").read_text())
    return found


@pytest.mark.usefixtures("_small")
def test_the_sample_set_is_laid_out_as_users_lay_out_theirs(tmp_path: Path) -> None:
    demo.write_data(tmp_path, 0, QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "val"]
    for split, count in (("train", 16), ("val", 10)):
        entries = read(tmp_path, split)
        assert len(entries) == count
        assert all(set(entry) == {"img", "caption", "source", "label"} for entry in entries)
        listed = {entry["img"] for entry in entries}
        there = {str(p.relative_to(tmp_path / split / "imgs")) for p in (tmp_path / split / "imgs").rglob("*.jpg")}
        assert listed == there, "pictures and list differ"
        pairs = batches.open_split(tmp_path / split, QUIET)
        assert len(set(pairs.contents)) == count
        assert Image.open(pairs.images[0]).mode == "RGB"


@pytest.mark.usefixtures("_small")
def test_validation_has_other_slides_and_a_caption_once(tmp_path: Path) -> None:
    """A repeated caption would be a tie, and a slide in both splits a leak."""
    demo.write_data(tmp_path, 0, QUIET)
    train, val = read(tmp_path, "train"), read(tmp_path, "val")
    assert len({entry["caption"] for entry in val}) == len(val) == 10
    sources = [{entry["source"] for entry in entries} for entries in (train, val)]
    assert [len(some) for some in sources] == [2, 2]
    assert not sources[0] & sources[1]
    assert all(entry["label"] for entry in (*train, *val))
    assert len({entry["label"] for entry in train}) > 1


@pytest.mark.usefixtures("_small")
def test_a_seed_draws_the_same_bytes_again_and_another_one_others(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        demo.write_data(folder, seed, QUIET)
    one, again, other = (
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in folders
    )
    assert len(one) == 28
    assert one == again
    assert not {data for name, data in one.items() if name.endswith("jpg")} & set(other.values())


def test_fewer_different_captions_than_wanted_are_all_kept(tmp_path: Path) -> None:
    imgs = tmp_path
    entries = [{"img": f"{i}.jpg", "caption": f"cell {i % 3}"} for i in range(7)]
    for entry in entries:
        (imgs / entry["img"]).touch()
    kept = demo._different_captions(entries, 5, imgs)
    assert kept == entries[:3]
    assert sorted(p.name for p in imgs.iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_plain_transformers_opens_the_base(base: Path) -> None:
    """It is an ordinary checkpoint: nothing of ours is needed to read it."""
    clip, tokenizer = CLIPModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert clip.config.vision_config.image_size == TINY.image_size
    ids = tokenizer("a round nucleus").input_ids
    text = clip.config.text_config
    assert (ids[0], ids[-1]) == (text.bos_token_id, text.eos_token_id) == (tokenizer.bos_token_id, len(tokenizer) - 1)
    assert text.vocab_size == len(tokenizer)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a round nucleus"
    processor = CLIPProcessor.from_pretrained(base, backend="pil")
    read = processor(text=["cell"], images=[Image.new("RGB", (50, 40))], return_tensors="pt")
    with torch.no_grad():
        assert clip(**read).logits_per_image.shape == (1, 1)


def test_every_text_comes_back_from_its_tokens(base: Path) -> None:
    """Bytes are the alphabet, so no caption has an unknown token, whatever its script."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text in ("a cell", "5 μm, naïve", "细胞", "🔬"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert tokenizer("CELL").input_ids == tokenizer("cell").input_ids


def test_the_base_is_the_same_for_a_seed(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        demo.write_base(tmp_path / name, ["a cell", "a nucleus"], TINY, seed)
    one, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other"))
    assert one == again
    assert one != other


@pytest.mark.usefixtures("_small")
def test_prepare_writes_a_recipe_that_loads_and_keeps_what_is_there(tmp_path: Path) -> None:
    """A demo that was stopped goes on with the same pictures, and a user's change to them stays."""
    folder = tmp_path / "my, demo: {it}'s #1"  # what YAML would read as something else
    recipe = demo.prepare(folder, 0, QUIET)
    wanted = config.load(recipe)
    assert wanted.data.root == (folder / "data").as_posix()
    assert wanted.output == (folder / "run").as_posix()
    assert wanted.train.seed == 0
    assert checkpoint.open_model(wanted.model.name).pixels.size == (64, 64)
    before: dict[str, Any] = {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files_of(folder)}
    assert {p.name for p in folder.iterdir()} == {"data", "base", "demo.yaml"}
    (folder / "data" / "note.txt").write_text("mine")
    assert demo.prepare(folder, 0, QUIET) == recipe
    after = {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files_of(folder)}
    assert after.pop(str(folder / "data" / "note.txt"))[0] == b"mine"
    assert after.pop(str(recipe))[0] == before.pop(str(recipe))[0]
    assert after == before
    assert len(before) == 16 + 10 + 2 + 5  # pictures, lists, base


@pytest.mark.usefixtures("_small")
def test_a_demo_that_died_while_drawing_draws_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*given: object) -> None:
        raise KeyboardInterrupt

    chooses = demo._different_captions
    monkeypatch.setattr(demo, "_different_captions", dies)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare(tmp_path / "demo", 0, QUIET)
    monkeypatch.setattr(demo, "_different_captions", chooses)
    assert not (tmp_path / "demo" / "data").exists()
    demo.prepare(tmp_path / "demo", 0, QUIET)
    assert len(read(tmp_path / "demo" / "data", "val")) == 10


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow  # draws 3,360 pictures and trains 200 steps: minutes
@pytest.mark.timeout(1200)
def test_the_demo_finds_the_right_caption_far_above_chance(tmp_path: Path) -> None:
    """What a new user sees first must work from a clean folder, with one command, and visibly learn."""
    made = subprocess.run(
        [PYTHON.with_name("cytoclip"), "demo", "--to", "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    data, results = tmp_path / "demo" / "data", json.loads((tmp_path / "demo" / "run" / "results.json").read_text())
    val = read(data, "val")
    assert len(read(data, "train")) >= 2000
    assert max(Counter(entry["caption"] for entry in val).values()) == 1
    assert len(val) >= 250
    assert results["best"]["pairs"] == len(val)
    chance = results["best"]["chance"]["hit@1"]
    assert chance == pytest.approx(1 / len(val))
    assert results["best"]["image_to_text"]["hit@1"] >= 25 * chance
    assert results["before"]["image_to_text"]["hit@1"] < 5 * chance
    assert "image → text" in made.stdout
    assert "run folder: demo/run" in made.stdout
