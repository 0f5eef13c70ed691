"""What most tests stand on: a tiny random CLIP, and drawn pictures with captions. No network, ever."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before anything imports torch; see cli._guarded

import numpy as np
import pytest
import torch

from cytoclip import cells, cli, demo, training
from cytoclip.config import Config, parse
from cytoclip.console import Console
from tests import runs, tiny
from tests.typed import Outcome, Run

if TYPE_CHECKING:
    from tests import served

torch.set_num_threads(1)  # tiny models have no use for more, and the bits are the same on any machine


def pytest_collection_finish() -> None:
    """Whatever imports made stays: a run collects garbage four times, which took as long as the rest of a tiny one."""
    gc.collect()
    gc.freeze()


TINY = demo.Shape(
    image_size=32, patch_size=16, image_width=32, image_layers=2, text_width=32, text_layers=2, heads=2, embedding=16
)

# The attention key biases. Softmax does not see a constant added to a whole row of scores, so their exact gradient is
# zero; what arrives is rounding, which AdamW scales up to steps of the full learning rate.
KEY_BIAS = "k_proj.bias"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 48 training and 20 validation pairs of drawn cells; captions repeat, some with groups."""
    return write_root(tmp_path_factory.mktemp("data"), 48)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `root` with 240 training pairs: from so many even random towers tell something of pairs that were not seen."""
    return write_root(tmp_path_factory.mktemp("many"), 240)


@pytest.fixture(scope="session")
def loose(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs with nothing in common but captions; by source and group all of `root` belongs together."""
    folder = shutil.copytree(root, tmp_path_factory.mktemp("loose"), dirs_exist_ok=True)
    listed = folder / "train" / "img_text_pair.json"
    entries = [{"img": entry["img"], "caption": entry["caption"]} for entry in json.loads(listed.read_text())]
    listed.write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="session")
def base(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random CLIP and a tokenizer trained on the captions of `root`."""
    folder = tmp_path_factory.mktemp("base") / "tiny-clip"
    folder.mkdir()
    entries = json.loads((root / "train" / "img_text_pair.json").read_text())
    demo.write_base(folder, [entry["caption"] for entry in entries], TINY, seed=0)
    return folder


@pytest.fixture(scope="session")
def bases(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny checkpoint of each family."""
    found = {"clip": base}
    for name, make in tiny.MADE.items():
        found[name] = tmp_path_factory.mktemp(name.replace(" ", "-"))
        make(found[name], tiny.CAPTIONS * 4)
    return found


@pytest.fixture
def experiment(root: Path, base: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make the configuration of a run of a few steps; sections are updated by keyword."""

    def make(**sections: Any) -> Config:
        given: dict[str, Any] = {
            "data": {"root": str(root), "workers": 0},
            "model": {"name": str(base)},
            "train": {"steps": 4, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "no"},
            "validate": {"every": 100, "ks": [1, 5]},
            "checkpoint": {"every": 100},
            "track": {"to": []},
            "output": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            given[name] = {**given.get(name, {}), **section} if isinstance(section, dict) else section
        return parse(given, "the test")

    return make


@pytest.fixture(scope="session")
def done(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, training.RunResult]:
    """A finished run of four steps, tracked, that the tests below only look at."""
    wanted = parse(
        {
            "data": {"root": str(root), "workers": 0},
            "model": {"name": str(base)},
            "train": {"steps": 4, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 2, "precision": "no"},
            "validate": {"every": 2, "ks": [1, 5]},
            "output": str(tmp_path_factory.mktemp("train") / "run"),
        },
        "the test",
    )
    return wanted, training.fit(wanted, Console())


@pytest.fixture(scope="session")
def told(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made by hand with all that a report draws on, but for weights; only looked at."""
    folder = tmp_path_factory.mktemp("told") / "run"
    runs.write(folder, root, {"val": (runs.random_embeddings(20, 0.1), runs.random_embeddings(20, 1.5, seed=1))})
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> served.Sample:
    """Drawn cells, a tiny model that knows them by heart, and their index: only looked at."""
    from tests import served

    return served.make(tmp_path_factory.mktemp("served"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process as if it had been typed; an internal error passes through."""

    def typed(*words: str, entry: Callable[[], None] = cli.main, program: str = "cytoclip") -> Outcome:
        monkeypatch.setattr("sys.argv", [program, *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            entry()
        return Outcome(int(caught.value.code or 0), *capsys.readouterr())

    return typed


def write_root(folder: Path, pairs: int) -> Path:
    """So many training pairs and 20 to validate."""
    write_split(folder / "train", pairs, seed=1)
    write_split(folder / "val", 20, seed=2)
    return folder


def write_split(folder: Path, count: int, seed: int) -> list[dict[str, str]]:
    """Draw `count` pairs; every eighth repeats the caption before it, and every sixth shares a group with the next."""
    (folder / "imgs").mkdir(parents=True)
    entries: list[dict[str, str]] = []
    for i, one in enumerate(cells.sample(count, seed, range(seed * 4, seed * 4 + 4))):
        name = f"{i:03}.png"
        one.image.resize((40, 40)).save(folder / "imgs" / name)
        entry = {"img": name, "caption": one.caption, "source": one.source, "label": one.label}
        if i % 8 == 7:
            entry["caption"] = entries[-1]["caption"]
        if i % 6 in (0, 1):
            entry["group"] = f"group {i // 6}"
        entries.append(entry)
    (folder / "img_text_pair.json").write_text(json.dumps(entries))
    return entries


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a saved model, by name."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")
