"""Batches hold what the order says, whoever decodes them."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cytoclip import batches, captions, checkpoint, images, sources
from cytoclip.batches import Batch, Texts
from cytoclip.console import Bar, Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order, Share, Wording
from cytoclip.pairs import spread
from cytoclip.pictures import PatchDropout, Pictures, Rows
from cytoclip.pixels import prepare

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
Capsys = pytest.CaptureFixture[str]


def pictures_and_tokens(root: Path, base: Path) -> tuple[Pictures, captions.Tokens]:
    pairs = batches.open_split(root / "train", QUIET)
    opened = checkpoint.open_model(str(base))
    return Pictures(pairs.images, opened.pixels), captions.tokenise(opened.tokenizer, pairs.captions, opened.context)


def texts(table: captions.Tokens | Rows) -> Texts:
    """One caption a pair."""
    return Texts(table, Wording(np.arange(len(table)), np.ones(len(table), np.int64), seed=0))


def read_all(pictures: Pictures, tokens: captions.Tokens | None, share: Share, workers: int) -> list[Batch]:
    source = iter(batches.loader(pictures, tokens and texts(tokens), share, workers, CPU))
    return [batches.next_batch(source) for _ in range(len(share))]


def test_batches_are_the_same_whoever_decodes_them(root: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, tokens = pictures_and_tokens(root, base)
    share = Share(Order(48, 6, seed=3), 5, 11, rank=1, size=2)
    alone, helped = (read_all(pictures, tokens, share, workers) for workers in (0, 2))
    monkeypatch.setattr(batches, "_FORKS", False)
    in_threads = read_all(pictures, tokens, share, 2)
    assert [batch.indices.tolist() for batch in alone] == [[row for row, _ in draws] for draws in share]
    for one, two in zip(alone * 2, helped + in_threads, strict=True):
        assert np.array_equal(one.indices, two.indices)
        assert torch.equal(one.images, two.images)
        assert one.texts is not None
        assert two.texts is not None
        assert torch.equal(one.texts, two.texts)
        assert one.images.dtype == torch.uint8
        for index, pixels, ids in zip(one.indices, one.images, one.texts, strict=True):
            assert np.array_equal(pixels, pictures[index, 0][1])
            assert torch.equal(ids[: tokens.lengths()[index]], tokens.batch([index])[0])


def test_loading_processes_are_forked_whatever_pythons_default_is(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.14 has another, with which each of them imports torch first: five seconds, for each validation again."""
    pictures, tokens = pictures_and_tokens(root, base)
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        source = iter(batches.loader(pictures, texts(tokens), Share(Order(48, 12, 0), 0, 2, 0, 1), 1, CPU))
        (process,) = multiprocessing.active_children()
        assert type(process).__name__ == "ForkProcess"
        assert len(batches.next_batch(source).indices) == 12
        del source
        assert not multiprocessing.active_children()
        monkeypatch.setattr(batches, "_FORKS", False)  # as on macOS and Windows
        source = iter(batches.loader(pictures, texts(tokens), Share(Order(48, 12, 0), 0, 2, 0, 1), 2, CPU))
        assert len(batches.next_batch(source).indices) == 12
        assert not multiprocessing.active_children()
        assert sum(thread.name.startswith("pictures") for thread in threading.enumerate()) == 2
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_pictures_alone_have_no_tokens(root: Path, base: Path) -> None:
    pictures, _ = pictures_and_tokens(root, base)
    (batch,) = read_all(pictures, None, Share(Order(48, 6, 0), 0, 1, 0, 1), workers=0)
    assert batch.texts is None
    assert batch.images.shape == (6, 3, 32, 32)


def test_the_loader_draws_nothing_from_the_global_random_state(root: Path, base: Path) -> None:
    """Else the dropout masks of a run that resumes, which makes a loader more, would be others."""
    pictures, tokens = pictures_and_tokens(root, base)
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()  # type: ignore[index]
    read_all(pictures, tokens, Share(Order(48, 12, 0), 0, 2, 0, 1), workers=0)
    iter(batches.loader(pictures, texts(tokens), Share(Order(48, 12, 0), 0, 2, 0, 1), 1, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before  # type: ignore[index]


@pytest.mark.parametrize(("workers", "forks"), [(0, True), (2, True), (2, False)])
def test_a_picture_that_went_away_after_the_scan_is_named(
    workers: int, forks: bool, root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's exception would reach the user as a traceback of the loader."""
    monkeypatch.setattr(batches, "_FORKS", forks)
    shutil.copytree(root / "train", tmp_path / "train")
    pictures, tokens = pictures_and_tokens(tmp_path, base)
    (tmp_path / "train" / "imgs" / "007.png").unlink()
    with pytest.raises(UserError, match=r"007\.png: no such file") as caught:
        read_all(pictures, tokens, Share(Order(48, 12, 0), 0, 4, 0, 1), workers)
    assert caught.value.code is ExitCode.DATA
    assert "JSON" in caught.value.hint
    began = time.monotonic()
    del caught  # the last that holds the loader, unless the error and a frame of ours hold each other
    gc.collect()
    assert time.monotonic() - began < 4, "workers that only garbage collection ends are waited for, 5 s each"


def split(folder: Path, names: list[str]) -> Path:
    (folder / "imgs").mkdir(parents=True)
    entries = [{"img": name, "caption": f"cell {i}"} for i, name in enumerate(names)]
    (folder / "img_text_pair.json").write_text(json.dumps(entries))
    return folder


def picture(path: Path, grey: int) -> None:
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)


def test_equal_bytes_are_equal_contents(tmp_path: Path) -> None:
    """Under two names, or one file named twice: the same picture. Its pairs are then right for each other."""
    folder = split(tmp_path / "val", ["a.png", "b.png", "a.png", "c.png"])
    for name, grey in (("a.png", 10), ("b.png", 20), ("c.png", 10)):
        picture(folder / "imgs" / name, grey)
    contents = batches.open_split(folder, QUIET).contents
    assert contents[0] == contents[2] == contents[3]
    assert contents[0] != contents[1]


def test_missing_and_damaged_pictures_are_counted_and_named(tmp_path: Path) -> None:
    """Trap 28; every one of them, for mending them one by one takes a start each. A name given twice counts once."""
    folder = split(tmp_path / "val", ["a.png", "gone.png", "cut.png", "text.png", "gone.png", "b.png"])
    for name in ("a.png", "cut.png", "b.png"):
        picture(folder / "imgs" / name, 10)
    whole = (folder / "imgs" / "cut.png").read_bytes()
    (folder / "imgs" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "imgs" / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="3 of 5 pictures") as caught:
        batches.open_split(folder, QUIET)
    for said in ("gone.png (no such file)", "cut.png (truncated", "text.png (not a picture", str(folder / "imgs")):
        assert said in caught.value.message
    assert "a.png" not in caught.value.message
    assert str(folder / "img_text_pair.json") in caught.value.hint
    assert caught.value.code is ExitCode.DATA


def test_many_bad_pictures_are_not_a_screenful(tmp_path: Path) -> None:
    folder = split(tmp_path / "val", [f"{i}.png" for i in range(40)])
    with pytest.raises(UserError, match="40 of 40 pictures") as caught:
        batches.open_split(folder, QUIET)
    assert "and 37 more" in caught.value.message
    assert len(caught.value.message) < 300 + len(str(folder))


def test_the_bar_counts_each_picture_once(tmp_path: Path) -> None:
    """`scan` reports how many are done, a bar wants how many more."""
    folder = split(tmp_path / "val", ["a.png", "b.png", "a.png", "c.png"])
    for grey, name in enumerate(("a.png", "b.png", "c.png")):
        picture(folder / "imgs" / name, grey)
    bars: list[Bar] = []

    class Watching(Console):
        @contextmanager
        def progress(self, title: str, total: int, start: int = 0) -> Iterator[Bar]:
            bars.append(Bar(self, title, total, start))
            yield bars[-1]

    batches.open_split(folder, Watching(quiet=True))
    assert [(bar._total, bar._done) for bar in bars] == [(3, 3)]


def test_pixels_are_those_of_images_prepare(root: Path, base: Path) -> None:
    pictures, _ = pictures_and_tokens(root, base)
    spec = checkpoint.open_model(str(base)).pixels
    file = root / "train" / "imgs" / "003.png"
    assert np.array_equal(pictures[3, 0][1], prepare(images.decode(file), spec))
    assert len(pictures) == 48


def test_chunks_are_views_cut_to_their_own_longest_caption(root: Path, base: Path) -> None:
    opened = checkpoint.open_model(str(base))
    pairs = batches.open_split(root / "val", Console(quiet=True))
    tokens = captions.tokenise(opened.tokenizer, ["cell", "a cell", "two round cells", "cell"], opened.context)
    share = [[(row, 0) for row in range(4)]]
    (batch,) = batches.loader(Pictures(pairs.images, opened.pixels), texts(tokens), share, 0, torch.device("cpu"))
    chunks = batch.chunks(3)
    assert [len(pixels) for pixels, _ in chunks] == [3, 1]
    assert [ids.shape[1] for _, ids in chunks] == [max(tokens.lengths()[:3]), tokens.lengths()[3]]
    assert torch.equal(torch.cat([pixels for pixels, _ in chunks]), batch.images)
    for rows, (_, ids) in zip(([0, 1, 2], [3]), chunks, strict=True):
        assert torch.equal(ids, tokens.batch(rows))
    assert chunks[0][0].data_ptr() == batch.images.data_ptr()


def test_dropped_patches_are_a_function_of_seed_epoch_and_pair() -> None:
    dropout = PatchDropout(patches=16, share=0.5, seed=3)
    kept = {(pair, epoch): tuple(dropout.keep(pair, epoch).tolist()) for pair in range(6) for epoch in range(3)}
    assert all(len(set(keep)) == 8 and list(keep) == sorted(keep) for keep in kept.values())
    assert all(0 <= patch < 16 for keep in kept.values() for patch in keep)
    assert len(set(kept.values())) == len(kept)
    assert kept == {key: tuple(PatchDropout(16, 0.5, 3).keep(*key).tolist()) for key in kept}
    assert tuple(PatchDropout(16, 0.5, 4).keep(0, 0).tolist()) != kept[0, 0]
    assert len(PatchDropout(16, 0.99, 3).keep(0, 0)) == 1, "never none"


def test_each_epoch_drops_other_patches_and_who_stands_in_has_its_own(root: Path, base: Path, tmp_path: Path) -> None:
    dropout, spec = PatchDropout(64, 0.5, seed=3), checkpoint.open_model(str(base)).pixels
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = Pictures([tmp_path / "bad.png", *sorted((root / "train" / "imgs").iterdir())[:4]], spec, dropout)
    for draw, pair in (((1, 0), 1), ((1, 1), 1), ((0, 1, 2, 3), 2)):
        keep = pictures[draw].keep
        assert keep is not None
        assert torch.equal(keep, dropout.keep(pair, draw[1]))
    assert not torch.equal(dropout.keep(1, 0), dropout.keep(1, 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_patches_are_the_same_in_any_share_of_the_batch(workers: int, root: Path, base: Path) -> None:
    opened = checkpoint.open_model(str(base))
    pairs = batches.open_split(root / "train", QUIET)
    tokens = captions.tokenise(opened.tokenizer, pairs.captions, opened.context)
    pictures = Pictures(pairs.images, opened.pixels, PatchDropout(4, 0.5, 0))
    order = Order(48, 12, 0)
    (whole,) = read_all(pictures, tokens, Share(order, 5, 6, 0, 1), workers)
    halves = [read_all(pictures, tokens, Share(order, 5, 6, rank, 2), workers)[0] for rank in (0, 1)]
    assert whole.keep is not None
    assert whole.keep.shape == (12, 2)
    assert torch.equal(whole.keep, torch.cat([half.keep for half in halves if half.keep is not None]))
    assert torch.equal(torch.cat([keep for *_, keep in whole.chunks(5)]), whole.keep)
    assert [len(chunk) for chunk in whole.chunks(5)] == [3, 3, 3]


def test_stored_features_stand_in_the_place_of_pictures_and_captions() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    rows = Rows(table, np.array([3, 3, 0, 1, 2]))
    (batch,) = batches.loader(rows, texts(rows), [[(4, 7), (0, 7), (2, 7)]], 2, CPU)
    assert torch.equal(batch.images, torch.from_numpy(table[[2, 3, 0]]))
    assert torch.equal(batch.texts, batch.images)
    assert batch.lengths is None
    assert [tuple(part.shape) for part in batch.chunks(2)[0]] == [(2, 3), (2, 3)]


def hole(path: Path) -> None:
    """A picture whose bytes are there to the end, but damaged in the middle: the scan takes it for whole."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize(("workers", "forks"), [(0, True), (2, True), (2, False)])
def test_a_bad_picture_gives_way_to_the_first_standby_that_is_good(
    workers: int, forks: bool, root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "_FORKS", forks)
    shutil.copytree(root / "train", tmp_path / "train")
    pictures, tokens = pictures_and_tokens(tmp_path, base)
    share = Share(Order(48, 6, seed=3), 2, 4, rank=0, size=1, skips=True)
    draws = [draw for some in share for draw in some]
    bad = {draws[1][0], draws[4][0], draws[4][2]}  # the fifth one's first standby too
    for row in bad:
        hole(tmp_path / "train" / "imgs" / f"{row:03}.png")
    came = read_all(pictures, tokens, share, workers)
    expected = [next(row for row in (draw[0], *draw[2:]) if row not in bad) for draw in draws]
    assert [row for batch in came for row in batch.indices] == expected
    assert expected[1] == draws[1][2]
    assert expected[4] == draws[4][3]
    for batch in came:
        for index, pixels, ids in zip(batch.indices, batch.images, batch.texts, strict=True):
            assert np.array_equal(pixels, pictures[index, 0][1])
            assert torch.equal(ids[: tokens.lengths()[index]], tokens.batch([index])[0]), (
                "its own caption comes with it"
            )


def test_where_no_standby_is_good_the_picture_is_named(root: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train", tmp_path / "train")
    pictures, _ = pictures_and_tokens(tmp_path, base)
    for row in (1, 2):
        hole(tmp_path / "train" / "imgs" / f"{row:03}.png")
    assert isinstance(pictures[1, 0, 2][1], UserError)
    assert pictures[1, 0, 2, 3][0] == (3, 0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("below\\1.png", "below\\1.png is written with backslashes: write below/1.png in {}/pairs.csv"),
        ("https://a.b/1.png", "https://a.b/1.png is an address: download the pictures, and name their files"),
        ("below/1", "below/1 has no ending, and 1.png is there: write it in {}/pairs.csv"),
        ("other/1.png", "data.image_root (--image-root with cytoclip bring and check) names the folder below which"),
    ],
)
def test_missing_pictures_are_told_where_they_were_looked_for(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "1.png").touch()
    place = tmp_path / "pairs.csv"
    place.write_text(f"image,caption\n{name},a cell\n")
    with pytest.raises(UserError, match=r"1 of 1 pictures in .* cannot be used") as caught:
        batches.open_split(place, QUIET)
    assert caught.value.hint.startswith(f"looked for {tmp_path / name}; {why.format(tmp_path)}")


def test_skipping_says_what_the_scan_found_and_keeps_the_pairs(root: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(root / "train", tmp_path / "train")
    for row in (1, 2):
        (tmp_path / "train" / "imgs" / f"{row:03}.png").write_bytes(b"")
    pairs = batches.scanned(sources.read(tmp_path / "train"), tmp_path / "train", Console(), skips=True)
    assert len(pairs) == 48
    assert pairs.contents[1] != pairs.contents[2], "what nobody can read equals nothing"
    assert "2 of 48 pictures" in (said := capsys.readouterr().err)
    assert "001.png (empty file)" in said


def test_features_of_a_bad_picture_give_way_too() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    table[1] = np.nan
    rows = Rows(table, np.array([3, 1, 0, 1, 2]))
    assert rows[1, 5, 3, 4][0] == (4, 5)
    assert np.array_equal(rows[1, 5, 3, 4][1], table[2])
    failed = rows[1, 5, 3][1]
    assert isinstance(failed, UserError)
    assert "pair 1" in failed.message


def test_further_captions_are_read_in_their_epochs(root: Path, base: Path) -> None:
    pairs = batches.open_split(root / "val", QUIET)
    pairs = replace(pairs, more=(("uno", "un"), *[()] * 18, ("dos",)))
    opened = checkpoint.open_model(str(base))
    tokens = captions.tokenise(opened.tokenizer, spread(pairs).captions, opened.context)
    both = Texts(tokens, Wording.of(pairs, seed=0))
    draws = [[(row, epoch) for row in (0, 1, 19)] for epoch in range(6)]
    read = {0: set(), 1: set(), 19: set()}
    for batch in batches.loader(Pictures(pairs.images, opened.pixels), both, draws, 0, CPU):
        for row, ids, length in zip(batch.indices.tolist(), batch.texts, batch.lengths, strict=True):
            read[row].add(tuple(ids[:length].tolist()))
    alone = [tuple(tokens.batch([row])[0].tolist()) for row in range(23)]
    assert read == {0: set(alone[:3]), 1: {alone[3]}, 19: set(alone[21:])}


@pytest.mark.parametrize("most", [0, 10**9])
def test_batches_are_copied_to_a_device_one_ahead(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that holds nothing, with streams that are played: order, errors, and what is too large to copy."""
    events: list[str] = []

    class Stream:
        def wait_stream(self, _: Any) -> None:
            events.append("waited")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(batches, "_COPIED", most)
    wrong = UserError("wrong", "mend it")

    def made() -> Iterator[Batch | UserError]:
        for i in range(3):
            events.append(f"read {i}")
            yield Batch(np.array([i]), torch.full((1, 3, 4, 4), i, dtype=torch.uint8), texts=torch.zeros(1, 2))
        yield wrong

    assert batches.bytes_ahead(5, (4, 6)) == (2 * 5 * 3 * 24 if most else 0)
    found = batches._on_device(made(), torch.device("meta"))
    first = next(found)
    time.sleep(0.05)
    assert events[:3] == ["read 0", "waited", "read 1"], "the next is on its way while this one is worked on"
    rest = list(found)
    assert [batch.indices.tolist() for batch in (first, *rest[:2]) if isinstance(batch, Batch)] == [[0], [1], [2]]
    assert rest[2] is wrong
    kind = "meta" if most else "cpu"
    assert {batch.images.device.type for batch in (first, *rest) if isinstance(batch, Batch)} == {kind}
    assert {
        batch.texts.device.type for batch in (first, *rest) if isinstance(batch, Batch) and batch.texts is not None
    } == {kind}
