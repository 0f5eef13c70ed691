"""Lists of faiss find nearly what a full sort finds, say how nearly, and are handed nothing that could hurt it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from cytoclip import ivf, vectors
from cytoclip.errors import UserError
from cytoclip.ivf import Approximate, ListsFile
from cytoclip.vectors import Held
from tests.test_vectors import WIDTH, drawn, sorted_all

COUNT, LISTS = 3000, 32


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is meant for more than 50,000 vectors works on a few thousand."""
    monkeypatch.setattr(ivf, "EXACT", 100)


@pytest.fixture(scope="module")
def clustered() -> NDArray[np.float32]:
    centres, rng = drawn(40, 5), np.random.default_rng(6)
    rows = centres[rng.integers(0, 40, COUNT)] + 0.12 * rng.standard_normal((COUNT, WIDTH)).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def lists(clustered: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lists") / "rows.safetensors"
    done: list[int] = []
    quantiser = ivf.train(ivf.sample_of(Held(clustered), LISTS), LISTS)
    ivf.sort_into_lists(path, Held(clustered), np.arange(COUNT), quantiser, None, done.append)
    assert sum(done) == COUNT
    return path


@pytest.fixture
def made(clustered: NDArray[np.float32], lists: Path) -> Approximate:
    return Approximate(ListsFile(lists), Held(clustered), WIDTH, np.arange(COUNT), 4)


def exact(rows: NDArray[np.float32], query: NDArray[np.float32], k: int, allowed: Any = None) -> list[int]:
    everyone = np.ones(len(rows), bool) if allowed is None else allowed
    return [row for row, _ in sorted_all(rows, np.arange(len(rows)), query, everyone)[:k]]


def test_through_all_lists_the_nearest_are_those_of_a_full_sort(
    made: Approximate, clustered: NDArray[np.float32]
) -> None:
    made.probes = LISTS
    for query in drawn(20, 7):
        found, scores = made.nearest(query, 10)
        assert found.tolist() == exact(clustered, query, 10)
        assert scores == pytest.approx((clustered[found].astype(np.float64) * query).sum(1), abs=0)


def test_what_is_said_of_recall_is_what_a_full_sort_finds(made: Approximate, clustered: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(8)
    own, far = rng.choice(COUNT, 100, replace=False), drawn(100, 9)
    said = ivf.tune(made, {"images": (clustered[own], own), "texts": (far, np.full(100, -1))})
    assert min(said.values()) >= ivf.TARGET
    assert 1 < made.probes < LISTS
    shares = []
    for query in far:
        rows = made.candidates(query[None], ivf.CANDIDATES, made.probes)[0]
        found = vectors.best(made.held, made.ties, query, rows[rows >= 0], 10)[0]
        shares.append(len({*found.tolist()} & {*exact(clustered, query, 10)}) / 10)
    assert said["texts"] == pytest.approx(np.mean(shares), abs=1e-3)
    probes = made.probes
    made.probes = probes // 2
    fewer = ivf._recall(made, far, np.full(100, -1), ivf._exact(made, far, np.full(100, -1)))
    assert fewer < said["texts"], "the number of lists made no difference"


def test_of_equal_vectors_any_counts_for_recall(tmp_path: Path) -> None:
    rows = np.repeat(drawn(30, 3), 50, axis=0)
    path = tmp_path / "rows.safetensors"
    ivf.sort_into_lists(path, Held(rows), np.arange(1500), ivf.train(rows, 8), None, lambda _: None)
    made = Approximate(ListsFile(path), Held(rows), WIDTH, np.arange(1500), 1)
    own = np.arange(0, 1500, 50)
    assert ivf.tune(made, {"images": (rows[own], own)}) == {"images": 1.0}
    assert made.probes == 1


@pytest.mark.parametrize(("share", "probes"), [(0.9, 12), (0.2, 3), (0.02, 1), (0.001, 1), (0.0, 1)])
def test_a_filter_leaves_the_nearest_of_what_is_allowed(
    made: Approximate, clustered: NDArray[np.float32], share: float, probes: int
) -> None:
    """The fewer are allowed, the more lists are looked through; of few all are compared."""
    made.probes = probes
    allowed, hits = np.random.default_rng(10).random(COUNT) < share, []
    for query in drawn(20, 11):
        found, _ = made.nearest(query, 10, allowed)
        assert allowed[found].all()
        wanted = exact(clustered, query, 10, allowed)
        assert len(found) == len(wanted)
        hits.append(len({*found.tolist()} & {*wanted}) / max(1, len(wanted)))
    assert np.mean(hits) >= (0.95 if allowed.any() else 0)


def test_a_filter_whose_pictures_all_lie_far_away_still_finds_k(
    made: Approximate, clustered: NDArray[np.float32]
) -> None:
    query = clustered[0]
    allowed = clustered @ query < -0.35
    made.probes = 1
    assert ivf.EXACT < allowed.sum() < COUNT / 4
    found, _ = made.nearest(query, 10, allowed)
    assert len(found) == 10
    assert allowed[found].all()


@pytest.mark.parametrize("k", [1, 200, 400, COUNT, COUNT + 5])
def test_many_hits_are_as_many_as_there_are(made: Approximate, clustered: NDArray[np.float32], k: int) -> None:
    query = drawn(1, 12)[0]
    found, scores = made.nearest(query, k)
    assert len(found) == len(set(found.tolist())) == min(k, COUNT)
    assert (np.diff(scores) <= 0).all()
    if k >= COUNT / 10:
        assert found.tolist() == exact(clustered, query, k)


def test_what_was_known_before_is_not_computed_again(
    clustered: NDArray[np.float32], lists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another set with most of the same pictures, in another order: the same file as from nothing."""
    order = np.random.default_rng(13).permutation(COUNT)[: COUNT - 500]
    rows, keys = np.concatenate([clustered[order], drawn(300, 14)]), np.concatenate([order, np.arange(300) + COUNT])
    found = ivf.read_quantiser(lists, WIDTH)
    assert found
    quantiser, before = found
    counted: list[int] = []
    real = ivf._coder(quantiser)

    class Counting:
        def sa_encode(self, block: NDArray[np.float32]) -> Any:
            counted.append(len(block))
            return real.sa_encode(block)

    monkeypatch.setattr(ivf, "_coder", lambda _: Counting())
    for path, known in ((tmp_path / "again", before), (tmp_path / "anew", None)):
        ivf.sort_into_lists(path, Held(rows), keys, quantiser, known, lambda _: None)
    assert counted == [300, len(rows)]
    again, anew = load_file(tmp_path / "again"), load_file(tmp_path / "anew")
    assert again.keys() == anew.keys() == ivf._TENSORS.keys()
    assert all(np.array_equal(again[name], anew[name]) for name in anew)


def test_the_number_of_lists_goes_with_the_root() -> None:
    assert [ivf.lists_for(count) for count in (1, 50_001, 1_000_000, 10_000_000)] == [2, 256, 1024, 4096]


def _shorter(name: str) -> Callable[[dict[str, Any]], None]:
    def spoil(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name][:-1].copy()

    return spoil


def _put(name: str, at: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(arrays: dict[str, Any]) -> None:
        arrays[name][at] = value

    return spoil


def _other(name: str, kind: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].astype(kind)

    return spoil


SPOILT = {
    **{f"{name} shorter": _shorter(name) for name in ivf._TENSORS},
    **{f"{name} of another kind": _other(name, np.float64) for name in ivf._TENSORS},
    "a row far outside": _put("rows", 3, 1 << 60),
    "a row below zero": _put("rows", 3, -5),
    "a row twice": _put("rows", slice(0, 2), 7),
    "a list of minus one": _put("sizes", slice(0, 2), np.array([-1, 1 << 40])),
    "a list beyond the end": _put("sizes", 0, COUNT + 1),
    "lists that wrap around": _put("sizes", slice(0, 3), np.array([1 << 62, 1 << 62, -(1 << 63)])),
    "a centroid that is no number": _put("centroids", (0, 0), np.nan),
    "a range without end": _put("ranges", 0, np.inf),
    "one array less": lambda arrays: arrays.pop("codes"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_lists_are_refused(how: str, lists: Path, tmp_path: Path, clustered: NDArray[np.float32]) -> None:
    """What faiss is handed decides where it reads and writes: a made-up file must end before."""
    arrays = {name: array.copy() for name, array in load_file(lists).items()}
    SPOILT[how](arrays)
    path = tmp_path / "spoilt.safetensors"
    save_file(arrays, path)
    with pytest.raises(UserError, match="cannot be used"):
        Approximate(ListsFile(path), Held(clustered), WIDTH, np.arange(COUNT), 4)
    if how != "keys of another kind":
        assert ivf.read_quantiser(path, WIDTH) is None


def test_what_is_no_such_file_is_refused(tmp_path: Path, clustered: NDArray[np.float32], lists: Path) -> None:
    path = tmp_path / "lists"
    for spoil in (
        lambda: None,
        lambda: path.write_bytes(b"no safetensors"),
        lambda: path.write_bytes(lists.read_bytes()[:-9]),
        lambda: (path.unlink(), path.symlink_to(lists)),
    ):
        spoil()
        with pytest.raises(UserError, match="cannot be used"):
            Approximate(ListsFile(path), Held(clustered), WIDTH, np.arange(COUNT), 4)
    assert ivf.read_quantiser(path, WIDTH) is None


def test_without_faiss_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="needs faiss") as caught:
        ivf.library()
    assert "pip install 'cytoclip[search]'" in caught.value.hint
