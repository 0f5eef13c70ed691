"""The nearest of very many vectors by faiss: lists around centroids, of which the nearest are looked through.

Letters: N vectors, D dimensions, L lists, Q queries.

Each vector lies in the list of its nearest centroid (an inverted file), as 8 bits a dimension. A query looks through
the lists of its nearest centroids; the 200 best by these codes are scored exactly, from the float32 vectors. How many
lists that must be is measured: queries whose exact neighbours are known.

faiss's own file is not used: it would be parsed by C++ that is not made for files from others. What an index needs is
kept as plain arrays, whose sizes and bounds are checked before faiss is handed them.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cytoclip import vectors
from cytoclip.errors import ExitCode, UserError
from cytoclip.vectors import Found, Vectors, damaged

EXACT = 50_000  # vectors up to which all are compared
CANDIDATES = 200  # that are scored exactly
TARGET = 0.97  # recall@10 that the number of lists is chosen for
QUERIES = 200  # of each kind, by which it is measured
_TIMES = 4  # candidates for each hit that is asked for, where that is more
_SAMPLE = 64  # vectors for each centroid that k-means sees
_ROUNDS = 10  # of k-means
_PARTS = 16  # the number of lists is found to within one in so many
_TENSORS = {"centroids": "F32", "ranges": "F32", "sizes": "I64", "rows": "I64", "codes": "U8", "keys": "I64"}


@dataclass(frozen=True)
class Quantiser:
    """What cuts vectors into lists and codes.

    Parameters
    ----------
    centroids_LD
        Of length 1.
    ranges
        float32 (2D,): the least value of each dimension, then how far its values reach.
    """

    centroids_LD: NDArray[np.float32]
    ranges: NDArray[np.float32]


def library() -> Any:
    """faiss.

    Raises
    ------
    UserError
        Where it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise UserError(
            f"an index of more than {EXACT} vectors needs faiss", "pip install 'cytoclip[search]'", ExitCode.SYSTEM
        ) from None
    return faiss


def lists_for(count: int) -> int:
    """√N, as a power of two: then a query compares about as many centroids as it finds vectors in a list."""
    return int(2 ** round(np.log2(max(count, 4)) / 2))


def train(sample_ND: NDArray[np.float32], lists: int) -> Quantiser:
    """Centroids by spherical k-means, and the ranges of the codes."""
    index = _empty(sample_ND.shape[1], lists)
    index.cp.spherical, index.cp.niter, index.cp.max_points_per_centroid = True, _ROUNDS, 2 * _SAMPLE
    index.cp.min_points_per_centroid = 1  # or it warns on stderr
    index.train(sample_ND)
    centroids_LD = index.quantizer.reconstruct_n(0, lists)
    return Quantiser(centroids_LD, library().vector_to_array(index.sq.trained))


def sample_of(held: Vectors, lists: int) -> NDArray[np.float32]:
    """As many of them as training needs, drawn the same each time."""
    count = min(len(held), lists * _SAMPLE)
    return held.take(np.sort(np.random.default_rng(0).choice(len(held), count, replace=False)))


def sort_into_lists(
    path: Path,
    held: Vectors,
    keys: NDArray[np.int64],
    quantiser: Quantiser,
    before: Mapping[str, Any] | None,
    progress: Callable[[int], None],
) -> None:
    """Write the lists of all vectors.

    Parameters
    ----------
    keys
        int64 (N,): equal for equal vectors; those that `before`, the arrays of an older file by the same quantiser,
        has are not computed again.
    progress
        Called with the numbers of vectors done.
    """
    faiss = library()
    coder, finder = _coder(quantiser), faiss.IndexFlatIP(quantiser.centroids_LD.shape[1])
    finder.add(quantiser.centroids_LD)
    list_of = np.empty(len(held), np.int64)
    codes = np.empty((len(held), quantiser.centroids_LD.shape[1]), np.uint8)
    known = _known(before, keys)
    for begin, block_ND in vectors.blocks(held):
        here = slice(begin, begin + len(block_ND))
        new = known[here] < 0
        if before is not None:
            old = known[here][~new]
            list_of[here][~new], codes[here][~new] = before["list_of"][old], before["codes"][old]
        if new.any():
            list_of[here][new] = finder.search(block_ND[new], 1)[1][:, 0]
            codes[here][new] = coder.sa_encode(np.ascontiguousarray(block_ND[new]))
        progress(len(block_ND))
    order = np.argsort(list_of, kind="stable")
    save_file(
        {
            "centroids": quantiser.centroids_LD,
            "ranges": quantiser.ranges,
            "sizes": np.bincount(list_of, minlength=len(quantiser.centroids_LD)).astype(np.int64),
            "rows": order.astype(np.int64),
            "codes": codes[order],
            "keys": keys[order],
        },
        path,
    )


def read_quantiser(path: Path, width: int) -> tuple[Quantiser, dict[str, Any]] | None:
    """The quantiser of a file, and what `sort_into_lists` takes as `before`; None where it cannot be used."""
    try:
        file = _checked(ListsFile(path), None, width)
    except UserError:
        return None
    sizes = file.get_tensor("sizes")
    arrays = {"keys": file.get_tensor("keys"), "codes": file.get_tensor("codes")}
    quantiser = Quantiser(file.get_tensor("centroids"), file.get_tensor("ranges"))
    return quantiser, {**arrays, "list_of": np.repeat(np.arange(len(sizes)), sizes)}


class ListsFile:
    """A file of lists, opened: what is deleted meanwhile can still be read.

    Raises
    ------
    UserError
        Where there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise damaged(path, "it is no regular file")
            self.file: Any = safe_open(path, "np")
        except (OSError, SafetensorError) as error:
            raise damaged(path, " ".join(str(error).split())[:200]) from None


class Approximate:
    """Vectors with the lists that they are in; any number of threads may search.

    Parameters
    ----------
    held
        The float32 vectors.
    ties
        As of `vectors.nearest`.
    probes
        Lists that a query looks through.

    Raises
    ------
    UserError
        Where the file is no such lists of these vectors.
    """

    def __init__(self, lists: ListsFile, held: Vectors, width: int, ties: NDArray[np.int64], probes: int) -> None:
        faiss, file = library(), _checked(lists, len(held), width)
        sizes, rows, codes = file.get_tensor("sizes"), file.get_tensor("rows"), file.get_slice("codes")
        self.held, self.ties, self.lists = held, ties, len(sizes)
        self.probes = min(max(1, probes), self.lists)
        self._index = _empty(width, self.lists)
        self._index.quantizer.add(file.get_tensor("centroids"))
        faiss.copy_array_to_vector(file.get_tensor("ranges"), self._index.sq.trained)
        self._index.is_trained, self._index.ntotal = True, len(held)
        begin = 0
        for number, size in enumerate(sizes.tolist()):
            if size:
                own, code = rows[begin : begin + size], np.ascontiguousarray(codes[begin : begin + size])
                self._index.invlists.add_entries(number, size, faiss.swig_ptr(own), faiss.swig_ptr(code))
            begin += size

    def __len__(self) -> int:
        return len(self.held)

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors at `rows`."""
        return self.held.take(rows)

    def nearest(self, query_D: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        """As `vectors.nearest`, of most of them: exactly where few are allowed or many are asked for."""
        count = len(self) if allowed is None else int(np.count_nonzero(allowed))
        if count <= EXACT or k * 10 > count:
            return vectors.nearest(self.held, self.ties, query_D, k, allowed)
        probes = min(self.lists, -(-self.probes * len(self) // count))  # as many vectors that are allowed
        while True:
            (rows,) = self.candidates(query_D[None], max(CANDIDATES, _TIMES * k), probes, allowed)
            rows = rows[rows >= 0]
            if len(rows) >= k or probes == self.lists:
                return vectors.best(self.held, self.ties, query_D, rows, k)
            probes = min(self.lists, 2 * probes)

    def candidates(
        self, queries_QD: NDArray[np.float32], count: int, probes: int, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """The rows (Q, count) that are best by their codes, in the nearest `probes` lists; -1 where there are fewer."""
        faiss, options = library(), {}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        asked = faiss.SearchParametersIVF(nprobe=probes, **options)
        rows: NDArray[np.int64] = self._index.search(queries_QD, count, params=asked)[1]
        return rows


def tune(made: Approximate, queries: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]) -> dict[str, float]:
    """Set `probes` to the least that reaches the target for every kind of query, and say the recall@10 of each.

    Parameters
    ----------
    queries
        By kind: vectors (Q, D), and of each the row that is itself and does not count, or -1.
    """
    truth = {kind: _exact(made, *both) for kind, both in queries.items()}

    def measured(probes: int) -> dict[str, float]:
        made.probes = probes
        return {kind: round(_recall(made, *both, truth[kind]), 4) for kind, both in queries.items()}

    few, many = 0, 1
    found = measured(many)
    while min(found.values(), default=1.0) < TARGET and many < made.lists:
        few, many = many, min(made.lists, 2 * many)
        found = measured(many)
    while many - few > max(1, few // _PARTS):
        between = measured((few + many) // 2)
        if min(between.values(), default=1.0) < TARGET:
            few = made.probes
        else:
            many, found = made.probes, between
    made.probes = many
    return found


def _exact(made: Approximate, queries_QD: NDArray[np.float32], own: NDArray[np.int64]) -> NDArray[np.float32]:
    """The least cosine (Q,) of the ten nearest of each query, all of them in one pass."""
    kept_scores = np.empty((len(own), 0), np.float32)
    for begin, block_ND in vectors.blocks(made.held):
        scores_QN = queries_QD @ block_ND.T
        itself = np.flatnonzero((own >= begin) & (own < begin + len(block_ND)))
        scores_QN[itself, own[itself] - begin] = -2
        kept_scores = np.hstack([kept_scores, scores_QN])
        kept_scores = -np.partition(-kept_scores, min(9, kept_scores.shape[1] - 1), 1)[:, :10]
    least: NDArray[np.float32] = kept_scores.min(1)
    return least


def _recall(
    made: Approximate, queries_QD: NDArray[np.float32], own: NDArray[np.int64], tenth: NDArray[np.float32]
) -> float:
    """recall@10: by cosine, since of equal pictures any will do."""
    shares = []
    found = made.candidates(queries_QD, CANDIDATES, made.probes)
    for query_D, rows, itself, least in zip(queries_QD, found, own.tolist(), tenth.tolist(), strict=True):
        _, scores = vectors.best(made.held, made.ties, query_D, rows[(rows >= 0) & (rows != itself)], 10)
        shares.append(np.count_nonzero(scores >= least - 1e-6) / 10)
    return float(np.mean(shares))


def _empty(width: int, lists: int) -> Any:
    faiss = library()
    return faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
    )


def _coder(quantiser: Quantiser) -> Any:
    faiss = library()
    coder = faiss.IndexScalarQuantizer(
        quantiser.centroids_LD.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    faiss.copy_array_to_vector(quantiser.ranges, coder.sq.trained)
    coder.is_trained = True
    return coder


def _known(before: Mapping[str, Any] | None, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where `before` has each key, -1 for nowhere."""
    if before is None or not len(before["keys"]):
        return np.full(len(keys), -1, np.int64)
    order = np.argsort(before["keys"], kind="stable")
    at = np.minimum(np.searchsorted(before["keys"], keys, sorter=order), len(order) - 1)
    return np.where(before["keys"][order[at]] == keys, order[at], -1)


def _checked(lists: ListsFile, count: int | None, width: int) -> Any:
    """The file, once its arrays are known to fit each other: faiss believes what it is given."""
    path, file = lists.path, lists.file
    try:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
        kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
        number, held = shapes.get("sizes", (0,))[0], shapes.get("rows", (0,))[0] if count is None else count
        wanted = {"centroids": (number, width), "ranges": (2 * width,), "sizes": (number,), "rows": (held,),
                  "codes": (held, width), "keys": (held,)}  # fmt: skip
        if shapes != wanted or kinds != _TENSORS or not number:
            raise damaged(path, "its arrays are of other shapes")
        sizes, rows = file.get_tensor("sizes"), file.get_tensor("rows")
        finite = all(np.isfinite(file.get_tensor(name)).all() for name in ("centroids", "ranges"))
    except (OSError, SafetensorError, IndexError) as error:
        raise damaged(path, " ".join(str(error).split())[:200]) from None
    if not finite or (sizes < 0).any() or (sizes > held).any() or sizes.sum() != held:
        raise damaged(path, "its lists do not hold its vectors")
    if not np.array_equal(np.bincount(rows[(rows >= 0) & (rows < held)], minlength=held), np.ones(held, np.int64)):
        raise damaged(path, "its lists do not hold each vector once")
    return file
