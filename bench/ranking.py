"""Ranking a split in both directions: one pass over the scores against sorting row blocks with torch.sort.

    python bench/ranking.py [--pairs 40000] [--width 512] [--blocks 4] [--kind different|captions|groups]

Embeddings are random, each caption near its picture. What is compared with makes blocks of 1,000 rows of scores and
sorts them, for each direction by itself, as the original project's evaluation did; `--blocks` of them are timed in
each direction and the rest is reckoned from these. Ours is timed whole, all metrics included, its memory above the
imports and the embeddings beside it. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line sets it, before torch starts its threads

import numpy as np
import torch

from cytoclip import expected, retrieval
from cytoclip.console import size
from cytoclip.pairs import Identity

BLOCK = 1000


def sorted_blocks(query_ND: torch.Tensor, gallery_ND: torch.Tensor, blocks: int) -> float:
    """Seconds for all rows, reckoned from the first blocks."""
    began = time.perf_counter()
    for block_BD in query_ND.split(BLOCK)[:blocks]:
        torch.sort(block_BD @ gallery_ND.T, dim=1, descending=True)
    return (time.perf_counter() - began) / blocks * len(query_ND) / BLOCK


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--kind", choices=("different", "captions", "groups"), default="different")
    given = parser.parse_args()
    count = given.pairs
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(count, given.width, generator=generator))
    text = torch.nn.functional.normalize(image + 0.08 * torch.randn(count, given.width, generator=generator))
    own = np.arange(count)
    caption, group = own, np.full(count, -1)
    if given.kind == "captions":  # each shared by two pictures
        caption = own // 2
        text = text[torch.from_numpy(caption * 2)]
    if given.kind == "groups":
        group = own // 5
    before, began = peak(), time.perf_counter()
    ranked = retrieval.rank(image, text, Identity(caption, own, group), (1, 10, 50))
    ours, memory = time.perf_counter() - began, peak() - before
    found = {name: expected.summary(one.groups) for name, one in ranked.items()}
    sorting = sorted_blocks(image, text, given.blocks) + sorted_blocks(text, image, given.blocks)
    print(
        f"{count:,} × {count:,} at {given.width} dimensions, {given.kind}: {ours:.1f} s, {size(memory)} above imports "
        f"and embeddings; torch.sort in blocks of {BLOCK}, both directions: {sorting:.0f} s; {sorting / ours:.1f} ×"
    )
    print(json.dumps({"pairs": count, "kind": given.kind, "seconds": round(ours, 2), "bytes": memory,
        "peak bytes": peak(), "torch.sort seconds": round(sorting, 1), "ratio": round(sorting / ours, 2),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "hit@10": {name: one["hit@10"] for name, one in found.items()}}))  # fmt: skip


if __name__ == "__main__":
    main()
