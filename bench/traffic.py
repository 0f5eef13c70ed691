"""What the processes of a step say to each other, in bytes, on paper: for 8 to 1,024 GPUs.

    python bench/traffic.py [--parameters 149620737] [--moving 149620737] [--batch 32768] [--width 512] [--micro 512]

A step of B pairs over W processes, embeddings of D numbers, m parameters that move, all float32 (4 bytes). A ring sends
(W − 1)/W of the whole from each process for a gather, and twice that for a sum:

    gather of the texts             4 · B · D · (W − 1)/W
    scattered sum of their gradient 4 · B · D · (W − 1)/W
    sums a pair                     4 · 6 · B · (W − 1)/W          (right answers, candidates; a column's largest, sum)
    sum of gradients                4 · 2 · m · (W − 1)/W
    sum of the loss and its like    a few numbers

With `train.shard`, in chunks of `--micro` pairs, each chunk gathers all M parameters for each of its three passes (two
forward, one backward; two where there is one chunk), and scatters what its backward pass found of the sum:

    gathers of parameters           4 · M · passes · chunks · (W − 1)/W
    scattered sums of gradients     4 · m · chunks · (W − 1)/W

The plain way, a gather of both embeddings with gradient, is twice the first two lines.
A card, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys

FLOAT = 4


def sent(processes: int, batch: int, width: int, moving: int) -> dict[str, float]:
    """MB that each process sends in a step, and receives."""
    ring = (processes - 1) / processes
    return {
        "embeddings": FLOAT * 2 * batch * width * ring / 1e6,
        "sums": FLOAT * 6 * batch * ring / 1e6,
        "gradients": FLOAT * 2 * moving * ring / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=149_620_737, help="M: of ViT-B/16")
    parser.add_argument("--moving", type=int, help="m; default: all")
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--micro", type=int, default=512, help="pairs of a chunk, for train.shard")
    given = parser.parse_args()
    moving, rows = given.moving or given.parameters, []
    print(f"B = {given.batch:,}, D = {given.width}, m = {moving:,}: MB that each process sends in a step")
    print(
        f"{'GPUs':>6} {'pairs each':>11} {'embeddings':>11} {'sums':>6} {'gradients':>10} {'in all':>8} {'sharded':>9}"
    )
    for power in range(3, 11):
        processes = 2**power
        parts = sent(processes, given.batch, given.width, moving)
        chunks = -(-given.batch // processes // given.micro)
        gathers = FLOAT * given.parameters * (2 if chunks == 1 else 3) * chunks * (processes - 1) / processes / 1e6
        sharded = parts["embeddings"] + parts["sums"] + parts["gradients"] / 2 * chunks + gathers
        row = {"gpus": processes, "pairs each": given.batch // processes, **parts, "in all": sum(parts.values()),
               "chunks": chunks, "sharded": sharded}  # fmt: skip
        rows.append({key: round(value, 2) for key, value in row.items()})
        print(f"{processes:>6} {row['pairs each']:>11,} {parts['embeddings']:>11.1f} {parts['sums']:>6.2f} "
              f"{parts['gradients']:>10.1f} {row['in all']:>8.1f} {sharded:>9.1f}")  # fmt: skip
    print(json.dumps({"batch": given.batch, "width": given.width, "moving": moving, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
