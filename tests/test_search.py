"""Every way to search gives what a sort of all cosines gives; what an index from elsewhere says leads nowhere else."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import cytoclip
from cytoclip import encoder, index, ivf, manifest, search
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.errors import ExitCode, UserError
from cytoclip.files import Piece
from cytoclip.search import Hit, Index
from tests import formats
from tests.typed import Run, refused

QUIET = Console(quiet=True)
TEXT = "a large cell with a dark nucleus"


@pytest.fixture(scope="module")
def made(base: Path) -> Encoder:
    return encoder.load(base)


@pytest.fixture(scope="module")
def exact(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact") / "index"
    index.build(base, root, folder, QUIET)
    return folder


@pytest.fixture(scope="module")
def large(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures, as if they were more than are compared one by one."""
    folder = tmp_path_factory.mktemp("large") / "index"
    before = ivf.EXACT, ivf.TARGET
    ivf.EXACT, ivf.TARGET = 10, 1.0
    index.build(base, root, folder, QUIET)
    ivf.EXACT, ivf.TARGET = before
    return folder


@pytest.fixture(params=["exact", "ivf"])
def opened(request: pytest.FixtureRequest, exact: Path, large: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """Either kind; faiss looks through all lists, so that what it finds is what all cosines give."""
    found = Index.open(exact if request.param == "exact" else large)
    assert found.manifest.images.kind == found.manifest.texts.kind == request.param
    if request.param == "ivf":
        monkeypatch.setattr(ivf, "EXACT", 10)
        for one in (found._images, found._captions[1]):
            assert isinstance(one, ivf.Approximate)
            one.probes = one.lists
    return found


@pytest.fixture(scope="module")
def pairs(root: Path) -> list[dict[str, Any]]:
    """What the data say, read with nothing of ours."""
    found = []
    for split in ("train", "val"):
        for entry in json.loads((root / split / "img_text_pair.json").read_text()):
            found.append({**entry, "split": split, "file": root / split / "imgs" / entry["img"]})
    return found


@pytest.fixture(scope="module")
def image_ND(pairs: list[dict[str, Any]], made: Encoder) -> NDArray[np.float32]:
    return made.embed_images([one["file"] for one in pairs])


def argsorted(
    query: NDArray[np.float32], rows: NDArray[np.float32], names: list[Any], k: int, allowed: list[bool] | None = None
) -> list[Any]:
    """The slow twin: every cosine in float64, sorted."""
    scores = rows.astype(np.float64) @ query.astype(np.float64)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if allowed is None or allowed[i]]
    assert len({round(float(scores[i]), 6) for i in order[: k + 1]}) == len(order[: k + 1]), "the twin has ties"
    return [names[i] for i in order[:k]]


def files(hits: list[Hit]) -> list[Any]:
    return [hit.file for hit in hits]


def test_pictures_by_text(
    opened: Index, pairs: list[dict[str, Any]], image_ND: NDArray[np.float32], made: Encoder
) -> None:
    query = made.embed_texts(TEXT)[0]
    hits = opened.search(TEXT, k=6)  # few enough for faiss to be asked
    assert files(hits) == argsorted(query, image_ND, [one["file"] for one in pairs], 6)
    by_file = {one["file"]: one for one in pairs}
    for rank, hit in enumerate(hits, start=1):
        assert isinstance(hit.file, Path)
        one = by_file[hit.file]
        assert (hit.rank, hit.name, hit.caption) == (rank, one["img"], one["caption"])
        assert hit.keys == {key: one[key] for key in ("source", "label", "group", "split") if key in one}
        assert hit.score == pytest.approx(float(query @ made.embed_images(hit.file)[0]), abs=1e-5)


def test_pictures_by_a_picture_and_by_both(
    opened: Index, pairs: list[dict[str, Any]], image_ND: NDArray[np.float32], made: Encoder
) -> None:
    names, file = [one["file"] for one in pairs], pairs[7]["file"]
    hits = opened.search(image=file, k=5)
    assert files(hits) == argsorted(image_ND[7], image_ND, names, 5)
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    for weight in (0.0, 0.3, 0.8, 1.0):
        mixed = weight * image_ND[7] + (1 - weight) * made.embed_texts(TEXT)[0]
        hits = opened.search(TEXT, Image.open(file), k=6, weight=weight)
        assert files(hits) == argsorted(mixed / np.linalg.norm(mixed), image_ND, names, 6)
        assert hits[0].score == pytest.approx(float((image_ND @ (mixed / np.linalg.norm(mixed))).max()), abs=1e-5)


def test_captions_by_a_picture_and_by_text_each_different_one_once(
    opened: Index, pairs: list[dict[str, Any]], image_ND: NDArray[np.float32], made: Encoder
) -> None:
    texts = list(dict.fromkeys(one["caption"] for one in pairs))
    assert len(texts) < len(pairs)
    text_MD = made.embed_texts(texts)
    for query, given in ((image_ND[3], {"image": pairs[3]["file"]}), (made.embed_texts(TEXT)[0], {"text": TEXT})):
        for k in (5, len(pairs)):
            hits = opened.search(**given, k=k, kind="captions")
            assert [hit.caption for hit in hits] == argsorted(query, text_MD, texts, min(k, len(texts)))
    by_name = {(one["img"], one["split"]): one["caption"] for one in pairs}
    assert all(by_name[hit.name, hit.keys["split"]] == hit.caption and hit.file is None for hit in hits)


def test_a_filter_is_a_sort_of_what_it_leaves(
    opened: Index, pairs: list[dict[str, Any]], image_ND: NDArray[np.float32], made: Encoder
) -> None:
    query, names = made.embed_texts(TEXT)[0], [one["file"] for one in pairs]
    label = pairs[0]["label"]
    for where in ({"split": "val"}, {"label": label}, {"split": "train", "label": label}):
        allowed = [all(one.get(key) == value for key, value in where.items()) for one in pairs]
        for k in (2, 100):
            hits = opened.search(TEXT, k=k, where=where)
            assert files(hits) == argsorted(query, image_ND, names, k, allowed)
        said = opened.search(TEXT, k=100, where=where, kind="captions")
        wanted = {one["caption"] for one, fits in zip(pairs, allowed, strict=True) if fits}
        assert {hit.caption for hit in said} == wanted
        assert len(said) == len(wanted)
        assert all(hit.keys[key] == value for hit in said for key, value in where.items())


def test_like_leaves_the_picture_itself_out(
    opened: Index, pairs: list[dict[str, Any]], image_ND: NDArray[np.float32]
) -> None:
    (itself,) = opened.search(image=pairs[5]["file"], k=1)
    hits = opened.like(itself.id, k=6)
    assert files(hits) == argsorted(image_ND[5], image_ND, [one["file"] for one in pairs], 7)[1:]
    assert {hit.keys["split"] for hit in opened.like(itself.id, 9, {"split": "val"})} == {"val"}
    with pytest.raises(UserError, match="no picture 12345"):
        opened.like(12345)


def test_more_than_there_are_gives_all(opened: Index, pairs: list[dict[str, Any]]) -> None:
    hits = opened.search(TEXT, k=1000)
    assert len(hits) == len({hit.id for hit in hits}) == len(pairs) == len(opened)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_equal_pictures_tie_and_come_in_the_order_of_their_ids(base: Path, tmp_path: Path) -> None:
    formats.write_pictures(tmp_path / "data", formats.drawn(3))
    for name in "edcba":
        shutil.copy(tmp_path / "data" / "001.png", tmp_path / "data" / f"{name}.png")
    opened = Index.build(base, tmp_path / "data", tmp_path / "index")
    hits = opened.search(image=tmp_path / "data" / "a.png", k=6)
    assert {hit.name for hit in hits} == {"001.png", *(f"{name}.png" for name in "abcde")}
    assert np.ptp([hit.score for hit in hits]) < 1e-6
    again = opened.search(image=tmp_path / "data" / "a.png", k=6)
    assert again == hits
    assert [h.id for h in hits] == [h.id for h in sorted(hits, key=lambda hit: (-hit.score, hit.id))]


def test_a_picture_comes_as_it_was_indexed(opened: Index, pairs: list[dict[str, Any]]) -> None:
    for one in pairs[::9]:
        (hit,) = opened.search(image=one["file"], k=1)
        assert opened.picture(hit.id).tobytes() == Image.open(one["file"]).convert("RGB").tobytes()


def test_keys_have_the_most_frequent_value_first(opened: Index, pairs: list[dict[str, Any]]) -> None:
    assert set(opened.keys) == {"source", "label", "group", "split"}
    assert opened.keys["split"] == ["train", "val"]
    counts = [sum(one["label"] == label for one in pairs) for label in opened.keys["label"]]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == len({one["label"] for one in pairs})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "nothing to search for"),
        ({"text": "  "}, "is empty"),
        ({"text": TEXT, "k": 0}, "k = 0"),
        ({"text": TEXT, "k": 10_001}, "k = 10001"),
        ({"text": TEXT, "weight": 1.5}, "weight 1.5"),
        ({"text": TEXT, "weight": float("nan")}, "weight nan"),
        ({"text": TEXT, "where": {"lable": "x"}}, "has a lable"),
        ({"text": TEXT, "where": {"split": "vall"}}, "split=vall"),
        ({"text": TEXT, "kind": "caption"}, r"kind 'caption' is none of images, captions"),
        ({"text": [TEXT, TEXT]}, "is no text to search for"),
        ({"text": TEXT, "where": "split=val"}, "where='split=val' is no mapping"),
        ({"text": TEXT, "where": {"split": 5}}, "is no mapping of texts"),
        ({"text": TEXT, "k": "3"}, "k = '3'"),
        ({"text": TEXT, "weight": "half"}, "weight half"),
        ({"image": [np.zeros((9, 9), np.uint8)] * 2}, "2 pictures to search for"),
        ({"image": b"no picture"}, "not a picture"),
        ({"image": "nowhere.png"}, "no such file"),
    ],
)
def test_what_cannot_be_searched_is_said(exact: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Index.open(exact).search(**given)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (np.ones(5), r"an embedding of shape \(5,\) is none of this index, which has 16 dimensions"),
        (np.ones((1, 16)), r"of shape \(1, 16\)"),
        (np.zeros(16), "of length 0 has no direction"),
        (np.full(16, np.nan), "of length nan"),
        ("a cell", "an embedding 'a cell' is none"),
        (None, "is none of this index"),
    ],
)
def test_what_is_no_embedding_is_said(exact: Path, query: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Index.open(exact).near(query)
    with pytest.raises(UserError, match="kind 'caption' is none of images, captions") as caught:
        Index.open(exact).near(np.ones(16, np.float32), kind="caption")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean captions?"


def test_of_an_embedding_the_direction_counts(exact: Path, made: Encoder) -> None:
    """A score is a cosine, however long the query is."""
    found, query = Index.open(exact), made.embed_texts(TEXT)[0]
    expected = [(hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in found.search(TEXT, k=5)]
    for one in (query, 7 * query, query.tolist(), torch.from_numpy(query)):
        assert [(hit.id, hit.score) for hit in found.near(one, k=5)] == expected  # type: ignore[arg-type]


def test_opposite_directions_have_no_middle(exact: Path, monkeypatch: pytest.MonkeyPatch, made: Encoder) -> None:
    opened = Index.open(exact)
    monkeypatch.setattr(Encoder, "embed_images", lambda *_: -made.embed_texts(TEXT))
    with pytest.raises(UserError, match="opposite"):
        opened.search(TEXT, b"")


def test_threads_search_at_once(opened: Index, pairs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [files(opened.search(image=one["file"], k=5)) for one in pairs[:8]]
    fresh, wrong, loads = Index.open(opened.folder), [], []  # its model is not open yet
    real = encoder.load
    monkeypatch.setattr(encoder, "load", lambda *given: (loads.append(given), real(*given))[1])

    def look(number: int) -> None:
        for _ in range(3):
            if files(fresh.search(image=pairs[number]["file"], k=5)) != expected[number]:
                wrong.append(number)
            fresh.search(TEXT, kind="captions")

    threads = [threading.Thread(target=look, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(loads) == 1


def test_the_model_is_opened_when_it_is_needed_and_must_be_the_one(
    exact: Path, base: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    opened = Index.open(exact, model=bases["siglip"])
    assert opened.like(int(opened._rows.ids[0])), "needs no model"
    with pytest.raises(UserError, match="is not the model that made") as caught:
        opened.search(TEXT)
    assert caught.value.code is ExitCode.MODEL
    moved = shutil.copytree(base, tmp_path / "moved")
    assert Index.open(exact, model=moved).search(TEXT, k=3) == Index.open(exact).search(TEXT, k=3)
    copied = shutil.copytree(exact, tmp_path / "index")
    found = manifest.read(copied)
    assert found
    manifest.write(copied, replace(found, model=replace(found.model, name=str(tmp_path / "gone"))))
    with pytest.raises(UserError, match="gone"):
        Index.open(copied).search(TEXT)


def test_pictures_that_moved_are_found_with_their_root(exact: Path, root: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(root, tmp_path / "moved")
    opened = Index.open(exact, roots=[moved])
    (hit,) = opened.search(TEXT, k=1)
    assert isinstance(hit.file, Path)
    assert hit.file.is_relative_to(moved)
    opened.picture(hit.id)
    for roots, said in (([moved, moved], "2 roots given, and the index has 1"), ([tmp_path / "no"], "no such folder")):
        with pytest.raises(UserError, match=said):
            Index.open(exact, roots=roots)
    away = Index.open(exact, roots=[tmp_path])
    (hit,) = away.search(TEXT, k=1)
    assert hit.file is None
    with pytest.raises(UserError, match="is not below") as caught:
        away.picture(hit.id)
    assert "--root" in caught.value.hint


def test_a_picture_of_other_bytes_is_not_shown(exact: Path, root: Path, tmp_path: Path) -> None:
    """So an index from somebody else shows none of this machine's pictures, wherever its roots point."""
    moved = shutil.copytree(root, tmp_path / "moved")
    opened = Index.open(exact, roots=[moved])
    (hit,) = opened.search(TEXT, k=1)
    assert isinstance(hit.file, Path)
    Image.new("RGB", (8, 8)).save(hit.file)
    with pytest.raises(UserError, match="is not what was indexed"):
        opened.picture(hit.id)


def test_a_piece_is_read_from_its_file_alone(base: Path, tmp_path: Path) -> None:
    drawn = formats.drawn(4)
    opened = Index.build(base, formats.tar(tmp_path / "data", drawn), tmp_path / "index")
    (hit,) = opened.search(image=drawn[2].picture, k=1)
    assert isinstance(hit.file, Piece)
    assert hit.document()["file"] == str(tmp_path / "data" / "001.tar")
    assert hit.document()["piece"] == {"offset": hit.file.offset, "size": hit.file.size}
    assert opened.picture(hit.id).getpixel((0, 0)) == (14, 0, 90)


def test_nothing_there_is_said_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no index") as caught:
        Index.open(tmp_path / "nowhere")
    assert "cytoclip index MODEL SOURCE" in caught.value.hint


def test_the_class_is_offered_by_the_package() -> None:
    assert cytoclip.Index is Index


def test_the_command_prints_a_table_or_one_document(
    run: Run, exact: Path, pairs: list[dict[str, Any]], base: Path
) -> None:
    outcome = run("search", str(exact), TEXT, "-k", "3")
    assert (outcome.code, outcome.err) == (0, "")
    expected = Index.open(exact).search(TEXT, k=3)
    lines = outcome.out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"  1  {expected[0].score:.4f}  {expected[0].name}  source=")
    assert lines[0].endswith(str(expected[0].caption))
    file = str(pairs[4]["file"])
    words = ["search", str(exact), TEXT, "--image", file, "--weight", "0.7", "--where", "split=train", "--json"]
    document = json.loads(run(*words).out)
    assert (document["schema"], document["text"], document["weight"]) == (1, TEXT, 0.7)
    assert document["where"] == {"split": "train"}
    hits = Index.open(exact).search(TEXT, file, weight=0.7, where={"split": "train"})
    assert document["hits"] == [json.loads(json.dumps(hit.document())) for hit in hits]
    said = json.loads(run("search", str(exact), "--image", file, "--captions", "--model", str(base), "--json").out)
    assert said["hits"][0]["caption"] == Index.open(exact).search(image=file, kind="captions")[0].caption


def test_the_command_refuses_in_two_lines(run: Run, exact: Path, tmp_path: Path) -> None:
    assert "nothing to search for" in refused(run("search", str(exact)))[0]
    assert "is not key=value" in refused(run("search", str(exact), TEXT, "--where", "label"))[0]
    message, hint = refused(run("search", str(exact), TEXT, "--where", "splt=val"))
    assert ("has a splt" in message, hint) == (True, "did you mean split?")
    assert "no such file" in refused(run("search", str(exact), "--image", "no.png"), ExitCode.DATA)[0]
    assert "is no index" in refused(run("search", str(tmp_path), TEXT), ExitCode.DATA)[0]
    _, hint = refused(run("search", str(exact.with_name(exact.name + "x")), TEXT), ExitCode.DATA)
    assert hint == f"did you mean {exact}?"
    (tmp_path / "cell.png").write_bytes(b"")
    message, hint = refused(run("search", str(exact), str(tmp_path / "cell.png")))
    assert "was given as words" in message
    assert hint == f"search with --image {tmp_path / 'cell.png'}"
    assert refused(run("search", str(exact), "big", "monocyte"))[1].startswith("put several words in quotes; ")


def test_the_index_command_says_what_it_did(run: Run, root: Path, base: Path, tmp_path: Path) -> None:
    words = ["index", str(base), str(root / "val"), "--to", str(tmp_path / "index")]
    outcome = run(*words)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{tmp_path / 'index'}: 20 pictures, ")
    assert "20 embedded, 0 kept, 0 removed, 0 left out" in outcome.out
    document = json.loads(run(*words, "--json").out)
    assert (document["embedded"], document["kept"], document["index"]["pictures"]) == (0, 20, 20)


def test_filters_are_one_value_a_key() -> None:
    assert search.filters(("a=b=c", "d=", "a=b=c"), "--where") == {"a": "b=c", "d": ""}
    for written, message in (
        (("a",), "is not key=value"),
        (("=b",), "is not key=value"),
        (("a=1", "a=2"), "no hit is both"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            search.filters(written, "--where")
        assert caught.value.hint
