"""Search a million vectors: how long a query takes, how many of the ten nearest it finds, and what the index costs.

    python bench/index.py [--vectors 1000000] [--width 512] [--folder DIR]

Vectors are drawn, not embedded, but as CLIP's lie: 4,000 clusters of very different sizes in 100 groups, with a
spectrum that falls off, all in one narrow cone (two random pictures have a cosine of about 0.8), and texts in another
cone that is far from it (a cosine of about 0.3). Queries are drawn anew from both: none is in the index. The shards are
written as `cytoclip index` writes them; what is timed is what it does after embedding, then opening the index in this
process and asking it one query after another, hits with names and captions included; beside the time on the clock,
which other processes lengthen, that of the processor. Truth is every cosine. A card, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip import index_faiss, manifest, vector_shards
from cytoclip.console import Console, size
from cytoclip.manifest import Manifest, Model, Shard
from cytoclip.search import Index
from cytoclip.vector_shards import ROWS, Header, Row

GROUPS, CLUSTERS = 100, 40
SCALES = (0.7, 0.5, 0.5)  # of a group, of a cluster in it, of a picture in that
HELD_OUT = 200


class Drawn:
    """A mixture to draw vectors of length 1 from, (n, D)."""

    def __init__(self, width: int) -> None:
        rng = np.random.default_rng(0)
        self.spectrum = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
        self.groups = rng.standard_normal((GROUPS, width), dtype=np.float32)
        self.clusters = rng.standard_normal((GROUPS, CLUSTERS, width), dtype=np.float32)
        weights = rng.pareto(1.2, GROUPS * CLUSTERS) + 0.1
        self.weights = weights / weights.sum()
        self.cones = 0.12 * rng.standard_normal((2, width), dtype=np.float32)

    def draw(self, count: int, rng: np.random.Generator, texts: bool = False) -> tuple[NDArray[np.float32], list[int]]:
        of = rng.choice(len(self.weights), count, p=self.weights)
        group, own = of // CLUSTERS, of % CLUSTERS
        noise = rng.standard_normal((count, len(self.spectrum)), dtype=np.float32)
        parts = (self.groups[group], self.clusters[group, own], noise)
        rows = self.spectrum * sum(scale * part for scale, part in zip(SCALES, parts, strict=True))
        if texts:
            rows = self.cones[1] + 0.5 * rows + 0.02 * rng.standard_normal(rows.shape, dtype=np.float32)
        else:
            rows = self.cones[0] + rows
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), of.tolist()


def write_shards(folder: Path, drawn: Drawn, count: int) -> list[Shard]:
    """Each picture has its cluster's caption, of which there are 4,000."""
    rng = np.random.default_rng(1)
    texts = [drawn.draw(1, rng, texts=True)[0] for _ in range(len(drawn.weights))]
    shards = []
    for begin in range(0, count, ROWS):
        vectors_ND, of = drawn.draw(min(ROWS, count - begin), rng)
        rows = [
            Row(vector_shards.identity(0, f"{begin + i}.jpg", None), 0, f"{begin + i}.jpg", None, None,
                f"{begin + i}.jpg", f"{begin + i:064x}", 1, (f"a picture of cluster {cluster}",), None,
                f"group {cluster // CLUSTERS}", None, None)
            for i, cluster in enumerate(of)
        ]  # fmt: skip
        name = f"{begin // ROWS:05}.parquet"
        vector_shards.write(manifest.shard_path(folder, name), Header("drawn", ("/nowhere",)), rows, vectors_ND,
                            [texts[cluster] for cluster in of])  # fmt: skip
        shards.append(Shard(name, len(rows)))
    return shards


def truth(drawn: NDArray[np.float32], opened: Index) -> tuple[NDArray[np.int64], float]:
    """Ids of the ten nearest of each query by all cosines, and the seconds that one query takes so."""
    from cytoclip import vectors

    held, ids = opened._images.held, opened._rows.ids  # type: ignore[union-attr]
    best = np.empty((len(drawn), 0), np.float32)
    rows = np.empty((len(drawn), 0), np.int64)
    for begin, block_ND in vectors.blocks(held):
        scores = drawn @ block_ND.T
        top = np.argpartition(-scores, 10, 1)[:, :10]
        best, rows = np.hstack([best, np.take_along_axis(scores, top, 1)]), np.hstack([rows, top + begin])
    order = np.argsort(-best, 1)[:, :10]
    seconds = []
    for query_D in drawn[:5]:
        began = time.perf_counter()
        vectors.nearest(held, ids, query_D, 10, None)
        seconds.append(time.perf_counter() - began)
    return ids[np.take_along_axis(rows, order, 1)], float(np.median(seconds))


def asked(opened: Index, queries: NDArray[np.float32], exact: NDArray[np.int64]) -> dict[str, float]:
    for query_D in queries[:20]:
        opened.near(query_D, 10)
    seconds, work, shares = [], [], []
    for query_D, wanted in zip(queries, exact, strict=True):
        began, busy = time.perf_counter(), time.process_time()
        hits = opened.near(query_D, 10)
        seconds.append(time.perf_counter() - began)
        work.append(time.process_time() - busy)
        shares.append(len({hit.id for hit in hits} & set(wanted.tolist())) / 10)
    return {
        "median ms": 1000 * float(np.median(seconds)),
        "processor ms": 1000 * float(np.median(work)),
        "p95 ms": 1000 * float(np.quantile(seconds, 0.95)),
        "recall@10": float(np.mean(shares)),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; gone at the end if absent")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder, drawn = Path(made) / "index", Drawn(given.width)
        shards = write_shards(folder, drawn, given.vectors)
        before, began, busy = peak(), time.perf_counter(), time.process_time()
        side = index_faiss.make(folder, shards, given.width, lambda _: np.empty((0, given.width), np.float32), None,
                                Console())  # fmt: skip
        building, worked, memory = time.perf_counter() - began, time.process_time() - busy, peak()
        manifest.write(folder, Manifest(Model("drawn", "", "drawn", "no"), given.width, given.vectors,
            side.texts.vectors, 0, ["/nowhere"], shards, len(shards), side.images, side.texts, side.generation, "",
            {}))  # fmt: skip
        began = time.perf_counter()
        opened = Index.open(folder)
        opening = time.perf_counter() - began
        rng, found, exact_seconds = np.random.default_rng(2), {}, 0.0
        for kind in ("images", "texts"):
            queries, _ = drawn.draw(HELD_OUT, rng, kind == "texts")
            exact, exact_seconds = truth(queries, opened)
            found[kind] = asked(opened, queries, exact)
        sizes = {"shards": weight(folder / "shards"), "faiss": weight(folder / "faiss")}
    for kind, one in found.items():
        print(
            f"{kind}: median {one['median ms']:.1f} ms ({one['processor ms']:.1f} of a processor), "
            f"95 % below {one['p95 ms']:.1f} ms, "
            f"recall@10 {one['recall@10']:.3f}; exact {1000 * exact_seconds:.0f} ms"
        )
    print(
        f"{given.vectors:,} × {given.width}: {side.images.parameters}, lists made and measured in {building:.0f} s "
        f"({worked:.0f} of a processor) "
        f"(peak {size(memory)}, before {size(before)}), opened in {opening:.1f} s; shards {size(sizes['shards'])}, "
        f"faiss {size(sizes['faiss'])}"
    )
    print(json.dumps({"vectors": given.vectors, "width": given.width, "kind": side.images.kind,
        **side.images.parameters, "measured": side.images.recall, "queries": found, "exact ms": 1000 * exact_seconds,
        "build seconds": building, "build processor seconds": worked, "open seconds": opening,
        "peak bytes": peak(), "bytes": sizes, "threads": torch.get_num_threads()}))  # fmt: skip


if __name__ == "__main__":
    main()
