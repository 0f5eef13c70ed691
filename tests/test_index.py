"""An index is the same however it came to be: at once, bit by bit, after a kill, by several processes."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cytoclip import encoder, entries, images, index, index_plan, index_rows, manifest, vector_shards
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.errors import ExitCode, UserError
from cytoclip.index import Built, How
from cytoclip.search import Index
from tests import formats

QUIET = Console(quiet=True)
Rows = dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def made(base: Path) -> Encoder:
    return encoder.load(base)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_all(tmp_path / "pictures")


def draw_all(folder: Path) -> Path:
    """Twelve pictures in three folders, some with a text; they are a minute old."""
    for number in range(12):
        draw(folder / f"class {number % 3}" / f"{number:02}.png", number)
        if number % 2:
            (folder / f"class {number % 3}" / f"{number:02}.txt").write_text(f"a cell of kind {number % 4}\n")
    return folder


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(values).resize((40, 40)).save(path)
    age(path)


def age(path: Path, seconds: float = 60) -> None:
    """A file that has just changed is hashed again each time; so old ones are what a test of the other road needs."""
    os.utime(path, (time.time() - seconds,) * 2)


def built(base: Path, source: Path | str, to: Path, **how: Any) -> Built:
    return index.build(base, source, to, QUIET, How(**how))


def rows(folder: Path) -> Rows:
    """All that an index says of each picture, embeddings apart, by name and file: read with nothing of ours."""
    import pyarrow.parquet as pq

    found: Rows = {}
    said = json.loads((folder / "manifest.json").read_text())
    for shard in said["shards"]:
        table = pq.read_table(folder / "shards" / shard["name"]).drop_columns(["image", "text", "more_text"])
        assert len(table) == shard["rows"]
        for row in table.to_pylist():
            assert found.setdefault(f"{row['name']} {row['file']}", tuple(row.values())) == tuple(row.values())
    assert len(found) == said["pictures"]
    return found


def embeddings(folder: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(image, text) by id."""
    found = manifest.read(folder)
    assert found
    ids, image, text = [], [], []
    for shard in found.shards:
        path = manifest.shard_path(folder, shard.name)
        ids += vector_shards.read(path, shard.rows, found.width)["id"].to_pylist()
        image.append(vector_shards.images(path, shard.rows, found.width))
        column = vector_shards.read(path, shard.rows, found.width, ["text"])["text"]
        text.append(vector_shards.vectors(column, found.width))
    order = np.argsort(ids)
    return np.concatenate(image)[order], np.concatenate(text)[order]


def assert_same(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for found, expected in zip(embeddings(one), embeddings(other), strict=True):
        assert np.allclose(found, expected, atol=2e-6)  # the rounding of another batch


def test_every_picture_is_embedded_as_the_encoder_does(
    pictures: Path, base: Path, made: Encoder, tmp_path: Path
) -> None:
    result = built(base, pictures, tmp_path / "index", batch_size=5)
    assert (result.embedded, result.kept, result.removed, result.skipped) == (12, 0, 0, 0)
    assert (result.manifest.pictures, result.manifest.captions, result.manifest.roots) == (12, 2, [str(pictures)])
    found = rows(tmp_path / "index")
    names = sorted(p.relative_to(pictures).as_posix() for p in pictures.rglob("*.png"))
    assert sorted(row[3] for row in found.values()) == names
    image, text = embeddings(tmp_path / "index")
    by_id = sorted((row[0], row[3], row[8]) for row in found.values())
    assert np.allclose(image, made.embed_images([pictures / name for _, name, _ in by_id]), atol=2e-6)
    for (_, name, caption), text_D in zip(by_id, text, strict=True):
        expected = f"a cell of kind {int(Path(name).stem) % 4}" if int(Path(name).stem) % 2 else None
        assert caption == expected
        assert np.allclose(text_D, made.embed_texts(caption)[0] if caption else 0, atol=2e-6)
    extra = {row[3].split("/")[0]: json.loads(row[12]) for row in found.values()}
    assert extra == {f"class {number}": {"folder": f"class {number}"} for number in range(3)}


def test_again_nothing_is_opened_and_nothing_written(
    pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(base, pictures, tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.*")}
    monkeypatch.setattr(index_rows, "_look", lambda *_: pytest.fail("a picture was looked at"))
    result = built(base, pictures, tmp_path / "index")
    assert (result.embedded, result.kept) == (0, 12)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.*")}
    del before[tmp_path / "index" / ".lock"], after[tmp_path / "index" / ".lock"]
    assert after == before


@pytest.mark.parametrize("seed", range(6))
def test_bit_by_bit_is_as_at_once(
    seed: int, pictures: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random changes over several runs, small shards, then everything anew."""
    rng, to = np.random.default_rng(seed), tmp_path / "index"
    monkeypatch.setattr(index_rows, "ROWS", 5)
    monkeypatch.setattr(index_plan, "FEW", 2)
    for step in range(4):
        built(base, pictures, to, batch_size=3)
        there = sorted(pictures.rglob("*.png"))
        for path in rng.permutation(there)[:4]:  # type: ignore[arg-type]  # numpy takes paths as objects
            what = rng.integers(6)
            if what == 0:
                path.unlink()
            elif what == 1:
                draw(path, int(rng.integers(1000, 2000)))
            elif what == 2:  # the same bytes, another time
                age(path, 30)
            elif what == 3:
                path.with_suffix(".txt").write_text(f"said at {step}")
            elif what == 4:
                path.rename(path.with_name(f"moved {step} {path.name}"))
            else:
                shutil.copyfile(path, path.with_name(f"copy {step} {path.name}"))
                age(path.with_name(f"copy {step} {path.name}"))
    draw(pictures / "new.png", 99)
    last = built(base, pictures, to, batch_size=3)
    fresh = built(base, pictures, tmp_path / "fresh")
    assert fresh.kept == 0
    assert last.embedded < fresh.embedded
    assert_same(to, tmp_path / "fresh")
    assert {p.name for p in (to / "shards").iterdir()} == {shard.name for shard in last.manifest.shards}


def test_what_is_said_of_each_change(pictures: Path, base: Path, tmp_path: Path) -> None:
    to, there = tmp_path / "index", sorted(pictures.rglob("*.png"))
    built(base, pictures, to)
    there[0].unlink()
    draw(there[1], 500)
    there[2].with_suffix(".txt").write_text("another")
    there[3].rename(there[3].with_name("renamed.png"))
    draw(pictures / "new.png", 501)
    result = built(base, pictures, to)
    assert (result.embedded, result.kept, result.removed, result.skipped) == (2, 10, 2, 0)


def test_a_file_that_was_young_is_hashed_again(pictures: Path, base: Path, made: Encoder, tmp_path: Path) -> None:
    """Two changes within one tick of the clock leave the same size and time: neither may be trusted."""
    path = sorted(pictures.rglob("*.png"))[0]
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path.with_suffix(".bmp"))
    facts = path.with_suffix(".bmp").stat()
    built(base, pictures, tmp_path / "index")
    Image.new("RGB", (8, 8), (0, 200, 0)).save(path.with_suffix(".bmp"))
    os.utime(path.with_suffix(".bmp"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.with_suffix(".bmp").stat().st_size == facts.st_size
    assert built(base, pictures, tmp_path / "index").embedded == 1
    hit = Index.open(tmp_path / "index").search(image=path.with_suffix(".bmp"), k=1)[0]
    assert hit.score == pytest.approx(1, abs=1e-5)


def test_a_picture_that_is_listed_and_gone_is_left_out(base: Path, tmp_path: Path) -> None:
    """It was young when it was indexed, so nothing is known of its time of change; nor is anything now."""
    formats.original(tmp_path / "data", formats.drawn(3))
    built(base, tmp_path / "data", tmp_path / "index")
    (tmp_path / "data" / "imgs" / "001.png").unlink()
    result = built(base, tmp_path / "data", tmp_path / "index")
    assert (result.manifest.pictures, result.embedded, result.skipped) == (2, 0, 1)


def test_bad_pictures_are_said_counted_and_left_out(
    pictures: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sorted(pictures.rglob("*.png"))
    (pictures / "cut.png").write_bytes(whole[0].read_bytes()[:60])
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "text.jpg").write_text("no picture")
    result = index.build(base, pictures, tmp_path / "index", Console())
    assert (result.embedded, result.skipped, result.manifest.skipped) == (12, 3, 3)
    said = capsys.readouterr().err
    assert "3 pictures cannot be used and are left out" in said
    assert "empty.jpg (empty file)" in said
    assert len(rows(tmp_path / "index")) == 12
    for path in whole:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not one picture can be used"):
        built(base, pictures, tmp_path / "other")
    assert manifest.read(tmp_path / "other") is None


def test_another_model_is_refused_and_makes_it_anew_when_told_to(
    pictures: Path, base: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    to = tmp_path / "index"
    built(base, pictures, to)
    before = (to / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="with other weights") as caught:
        built(bases["siglip"], pictures, to)
    assert "--rebuild" in caught.value.hint
    assert caught.value.code is ExitCode.MODEL
    with pytest.raises(UserError, match="at precision no"):
        built(base, pictures, to, precision="bf16")
    assert (to / "manifest.json").read_bytes() == before
    result = built(bases["siglip"], pictures, to, rebuild=True)
    assert (result.embedded, result.kept) == (12, 0)
    built(bases["siglip"], pictures, tmp_path / "fresh")
    image, _ = embeddings(to)
    assert np.allclose(image, embeddings(tmp_path / "fresh")[0], atol=2e-6)
    assert len(list((to / "shards").iterdir())) == 1


def test_rebuild_by_the_same_model_embeds_all(pictures: Path, base: Path, tmp_path: Path) -> None:
    built(base, pictures, tmp_path / "index")
    assert built(base, pictures, tmp_path / "index", rebuild=True).embedded == 12


def test_what_is_damaged_is_made_anew_when_told_to(pictures: Path, base: Path, tmp_path: Path) -> None:
    to = tmp_path / "index"
    built(base, pictures, to)
    (to / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no index that can be used") as caught:
        built(base, pictures, to)
    assert "--rebuild" in caught.value.hint
    assert built(base, pictures, to, rebuild=True).embedded == 12, "nobody knows which shards were of the index"
    (path,) = (to / "shards").iterdir()
    path.write_bytes(path.read_bytes()[:200] + bytes(500) + path.read_bytes()[700:])
    with pytest.raises(UserError, match="cannot be used") as caught:
        Index.open(to)
    assert "--rebuild" in caught.value.hint
    assert built(base, pictures, to, rebuild=True).embedded == 12
    assert len(Index.open(to).search("a cell", k=100)) == 12


def test_a_damaged_shard_that_no_manifest_names_is_as_good_as_none(pictures: Path, base: Path, tmp_path: Path) -> None:
    to = tmp_path / "index"
    built(base, pictures, to)
    (path,) = (to / "shards").iterdir()
    whole = path.read_bytes()
    (to / "shards" / "99.parquet").write_bytes(whole[:200] + bytes(500) + whole[700:])
    assert built(base, pictures, to).embedded == 0
    assert [one.name for one in (to / "shards").iterdir()] == [path.name]


def test_an_index_that_is_made_anew_forgets_folders_that_are_gone(pictures: Path, base: Path, tmp_path: Path) -> None:
    to, moved = tmp_path / "index", tmp_path / "moved"
    built(base, pictures, to)
    pictures.rename(moved)
    assert built(base, moved, to).manifest.roots == [str(pictures), str(moved)]
    assert built(base, moved, to, rebuild=True).manifest.roots == [str(moved)]
    assert Index.open(to, roots=[moved]).search("a cell", k=1)[0].file


def test_only_a_folder_of_ours_is_written_to(pictures: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds what is no index: class 0"):
        built(base, pictures, pictures)
    site = tmp_path / "site"
    (site / "shards").mkdir(parents=True)
    (site / "shards" / "mine.txt").write_text("mine")
    (site / "manifest.json").write_text('{"name": "a page"}')
    (site / "index.html").write_text("")
    with pytest.raises(UserError, match="holds what is no index: index"):
        built(base, pictures, site, rebuild=True)
    assert (site / "shards" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        built(base, pictures, tmp_path / "file")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "shards").symlink_to(pictures)
    with pytest.raises(UserError, match="is a link"):
        built(base, pictures, tmp_path / "linked")
    with pytest.raises(UserError, match="no such folder"):
        built(base, tmp_path / "nowhere", tmp_path / "index")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no pairs"):
        built(base, tmp_path / "bare", tmp_path / "index")


@pytest.mark.parametrize("name", sorted(formats.WRITERS))
def test_every_format_is_indexed(name: str, base: Path, made: Encoder, tmp_path: Path) -> None:
    assert len(formats.WRITERS) == 21
    drawn = formats.drawn(several=name not in formats.ONE_CAPTION)
    place = formats.WRITERS[name](tmp_path / "data", drawn)
    result = built(base, place, tmp_path / "index")
    assert (result.manifest.pictures, result.skipped) == (len(drawn), 0)
    assert result.manifest.captions == len({caption for one in drawn for caption in one.captions})
    opened = Index.open(tmp_path / "index")
    by_content = {}
    for one in drawn:
        (hit,) = opened.search(image=one.picture, k=1)
        assert hit.score == pytest.approx(1, abs=1e-5)
        assert opened.picture(hit.id).tobytes() == images.decode(one.picture).tobytes()
        by_content[hit.id] = one
        assert hit.caption == one.captions[0].strip()
        if name not in formats.NO_TAGS:
            assert (hit.keys["source"], hit.keys["label"], hit.keys["site"]) == (one.source, one.label, one.site)
    assert len(by_content) == len(drawn)
    assert built(base, place, tmp_path / "index").embedded == 0


def test_a_picture_that_is_listed_for_each_caption_is_one(base: Path, tmp_path: Path) -> None:
    drawn = formats.drawn(2)
    formats.write_pictures(tmp_path / "data" / "imgs", drawn)
    listed = [{"img": drawn[i % 2].name, "caption": f"caption {i}"} for i in range(5)]
    (tmp_path / "data" / "img_text_pair.json").write_text(json.dumps(listed))
    result = built(base, tmp_path / "data", tmp_path / "index")
    assert (result.manifest.pictures, result.manifest.captions) == (2, 5)


def test_a_data_root_is_indexed_with_all_its_splits(root: Path, base: Path, tmp_path: Path) -> None:
    assert built(base, root, tmp_path / "index").manifest.pictures == 68
    opened = Index.open(tmp_path / "index")
    assert opened.keys["split"] == ["train", "val"]
    assert len(opened.search("a cell", k=100, where={"split": "val"})) == 20


def test_shards_at_an_address_are_read_and_known_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = formats.drawn(8)
    formats.tar(tmp_path / "data", drawn)
    address = f"file://{tmp_path / 'data'}/{{000..001}}.tar"
    result = built(base, address, tmp_path / "index")
    assert (result.manifest.pictures, result.embedded, result.manifest.roots) == (8, 8, [])
    opened = Index.open(tmp_path / "index")
    (hit,) = opened.search(image=drawn[3].picture, k=1)
    assert (hit.file, hit.caption) == (None, drawn[3].captions[0])
    with pytest.raises(UserError, match="is not below"):
        opened.picture(hit.id)
    again = built(base, address, tmp_path / "index")
    assert (again.embedded, again.kept, again.removed) == (0, 8, 0)
    fewer = built(base, f"file://{tmp_path / 'data'}/000.tar", tmp_path / "index")
    assert (fewer.manifest.pictures, fewer.embedded, fewer.removed) == (4, 0, 4)


def test_processes_share_the_shards_at_an_address(pictures: Path, tmp_path: Path) -> None:
    """Trap 2: each picture once, whoever embeds it."""
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        (tmp_path / "caption.txt").write_text(f"cell {number}")
        with tarfile.open(tmp_path / f"{number // 3}.tar", "a") as tar:
            tar.add(path, f"{number}.png")
            tar.add(tmp_path / "caption.txt", f"{number}.txt")
    source = entries.Source([], None, [f"file://{tmp_path}/{shard}.tar" for shard in range(4)])
    alone = [work.entry.captions[0] for work in index._from_afar(source, 0, 1, How())]
    assert sorted(alone) == sorted(f"cell {number}" for number in range(12))
    for size in (2, 3):
        shares = [
            [work.entry.captions[0] for work in index._from_afar(source, rank, size, How())] for rank in range(size)
        ]
        assert sorted(text for share in shares for text in share) == sorted(alone)
