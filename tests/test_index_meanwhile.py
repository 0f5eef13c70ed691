"""An index while it is made: killed, shared out, searched meanwhile; and a large one brought up to date."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cytoclip import demo, files, index, ivf, manifest, vector_shards
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.search import Index
from tests import group
from tests.conftest import TINY
from tests.test_index import assert_same, built, draw, draw_all


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_all(tmp_path / "pictures")


FORKING = """
import json, os, signal, sys
import transformers.models.clip.modeling_clip
from cytoclip import index, index_rows, vector_shards
from cytoclip.console import Console
from tests.group import free_port

base, source, killed, shared = sys.argv[1:]
port = str(free_port())

def forked(to, killed=False, **variables):
    child = os.fork()
    if not child:
        os.environ.update(variables)
        if killed:
            real, index_rows.ROWS = vector_shards.write, 4
            vector_shards.write = lambda *given: (real(*given), os.kill(os.getpid(), signal.SIGKILL))
        index.build(base, source, to, Console(quiet=True), index.How(batch_size=2))
        os._exit(0)
    return child

signals = [os.waitpid(forked(killed, killed=True), 0)[1] for _ in range(2)]
ranks = [forked(shared, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
         for rank in range(2)]
print(json.dumps({"signals": signals, "codes": [os.waitpid(rank, 0)[1] for rank in ranks]}))
"""


def test_killed_or_shared_it_is_as_one_process_makes_it(base: Path, tmp_path: Path) -> None:
    """One process imports everything once; its children build: two that are killed -9, then two that share the work.

    Each is killed when a shard more is whole; what a kill leaves half-written is gone at the end.
    """
    pictures, killed, shared, alone = (tmp_path / name for name in ("pictures", "killed", "shared", "alone"))
    draw_all(pictures)
    (pictures / "cut.png").write_bytes(b"no picture")
    words = [str(path) for path in (base, pictures, killed, shared)]
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *words], cwd=group.PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    built(base, pictures, alone)

    assert said["signals"] == [signal.SIGKILL, signal.SIGKILL]
    assert manifest.read(killed) is None
    with pytest.raises(UserError, match="is no index"):
        Index.open(killed)
    (killed / "shards" / ".00009.parquet.1.new").write_bytes(b"half")
    assert len(list((killed / "shards").glob("0*.parquet"))) == 2
    assert built(base, pictures, killed).embedded == 12 - 2 * 4
    assert_same(killed, alone)
    assert len(list((killed / "shards").iterdir())) == 3

    assert said["codes"] == [0, 0]
    found = manifest.read(shared)
    assert found
    assert ([shard.rows for shard in found.shards], found.skipped) == ([6, 6], 1)
    assert_same(shared, alone)


def test_a_search_meanwhile_sees_the_old_index_or_the_new_one_whole(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "index"
    built(base, pictures, to)
    before = Index.open(to)
    real, seen = vector_shards.write, []

    def looking(*given: Any) -> None:
        seen.append(len(Index.open(to)))
        real(*given)
        seen.append(len(Index.open(to)))

    monkeypatch.setattr(vector_shards, "write", looking)
    for path in sorted(pictures.rglob("*.png"))[:5]:
        path.unlink()
    built(base, pictures, to)
    assert seen == [12, 12]
    assert len(Index.open(to)) == 7
    assert len(before.search("a cell", k=100)) == 12
    assert len(before.search("a cell", k=100, kind="captions")) == 2, "what was open is read to its end"


def test_opening_goes_on_with_the_new_index_where_the_old_one_goes_away(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the manifest and the shards, another process puts a new index in place and deletes the old."""
    to = tmp_path / "index"
    built(base, pictures, to)
    real, times = manifest.read, []

    def read(folder: Path) -> manifest.Manifest | None:
        found = real(folder)
        if not times:
            times.append(1)
            sorted(pictures.rglob("*.png"))[0].unlink()
            monkeypatch.setattr(manifest, "read", real)
            built(base, pictures, to)
            monkeypatch.setattr(manifest, "read", read)
        return found

    monkeypatch.setattr(manifest, "read", read)
    assert len(Index.open(to)) == 11


def test_two_writers_do_not_meet(pictures: Path, base: Path, tmp_path: Path) -> None:
    to = tmp_path / "index"
    with files.lock(to / ".lock", UserError("", "")), pytest.raises(UserError, match="by another process"):
        built(base, pictures, to)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf, "EXACT", 6)
    monkeypatch.setattr(ivf, "TARGET", 1.0)


@pytest.mark.usefixtures("large")
def test_a_large_index_brought_up_to_date_is_as_made_at_once(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "index"
    first = built(base, pictures, to)
    assert first.manifest.images.kind == "ivf"
    assert first.manifest.images.recall.keys() == {"images", "texts"}
    assert (to / "faiss" / first.manifest.faiss / "images.f32").stat().st_size == 12 * 16 * 4
    draw(pictures / "new.png", 77)
    trained: list[int] = []
    real = ivf.train
    monkeypatch.setattr(ivf, "train", lambda *given: (trained.append(1), real(*given))[1])
    second = built(base, pictures, to)
    assert trained == [], "the centroids of before serve an index that is hardly larger"
    assert [p.name for p in (to / "faiss").iterdir()] == [second.manifest.faiss] != [first.manifest.faiss]
    built(base, pictures, tmp_path / "fresh")
    opened = [Index.open(place) for place in (to, tmp_path / "fresh")]
    for kind in ("images", "captions"):
        one, other = (
            [(h.id, h.caption, round(h.score, 5)) for h in each.search("a cell", kind=kind)] for each in opened
        )  # type: ignore[arg-type]
        assert one == other
        assert one


@pytest.mark.usefixtures("large")
def test_lists_of_another_model_s_vectors_are_not_gone_on_with(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, to = tmp_path / "other", tmp_path / "index"
    other.mkdir()
    demo.write_base(other, ["a cell of kind 1", "a cell of kind 3"], TINY, seed=5)
    built(base, pictures, to)
    given: list[object] = []
    real = ivf.sort_into_lists
    monkeypatch.setattr(ivf, "sort_into_lists", lambda *all_: (given.append(all_[4]), real(*all_))[1])
    built(other, pictures, to, rebuild=True)
    assert given == [None]
    built(other, pictures, to, rebuild=True)
    assert len(given) == 2
    assert given[1] is not None, "the same model's are"


@pytest.mark.usefixtures("large")
def test_what_is_missing_or_damaged_in_the_faiss_folder_is_made_again(
    pictures: Path, base: Path, tmp_path: Path
) -> None:
    to = tmp_path / "index"
    made = built(base, pictures, to).manifest
    for spoil in (
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "images.f32").unlink(),
        lambda folder: (folder / "captions.safetensors").write_bytes(b"?"),
    ):
        spoil(to / "faiss" / made.faiss)
        with pytest.raises(UserError, match="cannot be used"):
            Index.open(to).search("a cell", kind="captions")
        assert replace(built(base, pictures, to).manifest, created="") == replace(made, created="")
        assert len(Index.open(to).search("a cell", kind="captions")) == 2


@pytest.mark.usefixtures("large")
def test_without_captions_recall_is_measured_with_texts_made_of_names(
    pictures: Path, base: Path, tmp_path: Path
) -> None:
    for path in pictures.rglob("*.txt"):
        path.unlink()
    result = built(base, pictures, tmp_path / "index")
    assert result.manifest.images.recall.keys() == {"images", "names"}
    assert result.manifest.captions == 0


def test_progress_is_said_with_the_time_left(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cytoclip import console

    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    index.build(base, pictures, tmp_path / "index", Console())
    said = capsys.readouterr().err
    assert "12 pictures of " in said
    assert "embedding pictures 12/12, 0:00 left" in said
