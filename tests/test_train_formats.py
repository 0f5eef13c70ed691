"""Training on every kind of place equals training on the same pairs in the original layout, step by step."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytoclip import evaluation, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests import formats, tiny
from tests.formats import put

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`root` as a data root of tar shards for training and a JSON-lines table for validation."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        entries = json.loads((root / "train" / "img_text_pair.json").read_text())[shard * 16 : shard * 16 + 16]
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as archive:
            for entry in entries:
                key = entry["img"].removesuffix(".png")
                put(archive, f"{key}.png", (root / "train" / "imgs" / entry["img"]).read_bytes())
                put(archive, f"{key}.json", json.dumps(entry).encode())
    (folder / "val").symlink_to(root / "val" / "imgs")
    entries = json.loads((root / "val" / "img_text_pair.json").read_text())
    (folder / "pictures").mkdir()
    for entry in entries:
        (folder / "pictures" / entry["img"]).write_bytes((root / "val" / "imgs" / entry["img"]).read_bytes())
    lines = (json.dumps(entry | {"img": f"pictures/{entry['img']}"}) for entry in entries)
    (folder / "val.jsonl").write_text("\n".join(lines))
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("apart", [False, True], ids=["a root of shards and a table", "a pattern"])
def test_losses_and_scores_are_those_of_the_folder(
    experiment: Callable[..., Config], shards: Path, root: Path, tmp_path: Path, apart: bool
) -> None:
    twin = training.fit(experiment(output=str(tmp_path / "twin")), QUIET)
    data: dict[str, Any] = {"root": str(shards)}
    if apart:
        data = {"root": None, "train": str(shards / "train-{000..002}.tar"), "val": str(root / "val")}
    found = training.fit(experiment(data=data), QUIET)
    assert losses(found.run) == losses(twin.run)
    assert len(losses(found.run)) == 4
    assert (
        json.loads((found.run / "results.json").read_text())["last"]
        == json.loads((twin.run / "results.json").read_text())["last"]
    )


def test_replayed_pairs_come_from_any_place(experiment: Callable[..., Config], shards: Path, root: Path) -> None:
    replay = [{"root": str(shards / "train-00*.tar"), "weight": 1.0}, {"root": str(shards), "weight": 1.0}]
    result = training.fit(experiment(data={"replay": replay}), QUIET)
    assert len(losses(result.run)) == 4


def test_evaluation_of_a_table(shards: Path, root: Path, base: Path) -> None:
    places = [evaluation.split_folder(folder, "val") for folder in (shards, root)]
    assert places[0].name == "val.jsonl"
    scores = [tiny.scores_of(base, place, [1, 5]) for place in places]
    assert scores[0] == scores[1]


def test_a_wrong_column_is_said_before_the_first_step(
    experiment: Callable[..., Config], tmp_path: Path, root: Path
) -> None:
    place = formats.table("csv")(tmp_path / "data", formats.drawn(12))
    data = {"root": None, "train": str(place), "val": str(root / "val"), "caption_column": "captoin"}
    with pytest.raises(UserError, match="no column 'captoin'") as caught:
        training.fit(experiment(data=data), QUIET)
    assert caught.value.hint == "did you mean caption?"


_READER = """
import sys, time
from pathlib import Path
import numpy as np
from cytoclip import images, sources


def kilobytes(which):  # not getrusage: its peak is inherited from the process that started this one
    return int(next(line for line in open("/proc/self/status") if line.startswith(which)).split()[1])


began = kilobytes("VmRSS")
start = time.monotonic()
pairs = sources.read(Path(sys.argv[1]))
took = time.monotonic() - start
for row in np.random.default_rng(int(sys.argv[2])).permutation(len(pairs))[:2000]:
    red, green, blue = np.asarray(images.decode(pairs.images[row]))[0, 0]
    assert pairs.captions[row] == f"cell {int(red) + 256 * int(green) + 65536 * int(blue)}", row
print(len(pairs), (kilobytes("VmHWM") - began) / 1024, took)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's own peak is asked of Linux")
@pytest.mark.slow  # 200,000 members are written and read by two processes: about a minute
def test_many_pairs_in_many_shards_are_read_by_two_processes_in_bounded_memory(tmp_path: Path) -> None:
    """Both make the index at once, and then read it; each holds all pairs, less than a kilobyte each."""
    from io import BytesIO

    from PIL import Image

    for shard in range(50):
        with tarfile.open(tmp_path / f"{shard:03}.tar", "w") as archive:
            for number in range(shard * 4000, shard * 4000 + 4000):
                stream = BytesIO()
                Image.new("RGB", (2, 2), (number % 256, number // 256 % 256, number // 65536)).save(stream, "BMP")
                put(archive, f"{number:06}.bmp", stream.getvalue())
                put(archive, f"{number:06}.txt", f"cell {number}".encode())
    for _ in range(2):
        command = [sys.executable, "-c", _READER, str(tmp_path / "{000..049}.tar")]
        readers = [
            subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for seed in range(2)
        ]
        for reader in readers:
            out, err = reader.communicate(timeout=300)
            assert reader.returncode == 0, err
            count, megabytes, _ = np.array(out.split(), float)
            assert count == 200_000
            assert 50 < megabytes < 150, out  # 200,000 pairs cannot be nothing: the measure works
