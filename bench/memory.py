"""Peak memory of one exact step against the batch, at fixed chunks, on the CPU: a fresh process a point.

    python bench/memory.py [--batches 64 256 1024 4096] [--chunk 32]

Memory above the process before the step (resident, Linux), without the batch's own pixels and tokens, for the demo's
model. One JSON line last; exit code 1 where the largest batch takes more than 1.25 times the smallest one's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1.25


def point(base: str, batch: int, chunk: int) -> dict[str, float]:
    """Measure in this process: megabytes, and seconds."""
    import time

    import torch

    from cytoclip import checkpoint, loss
    from cytoclip.device import World
    from cytoclip.pairs import Identity

    encoder = checkpoint.open_model(base).encoder.train()
    side, end = encoder.clip.config.vision_config.image_size, encoder.clip.config.text_config.eos_token_id
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(3, end, (batch, 40))
    tokens[:, -1] = end
    each = torch.arange(batch)
    chunks = list(zip(pixels.split(chunk), tokens.split(chunk), strict=True))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before, began = _status("VmRSS"), time.perf_counter()
    loss.contrastive_step(
        encoder,
        loss.Logits(encoder.logit_scale),
        chunks,
        Identity(each, each, -torch.ones_like(each)),
        World(torch.device("cpu")),
    )
    return {"batch": batch, "chunk": chunk, "mb": _status("VmHWM") - before, "seconds": time.perf_counter() - began}


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)  # base and batch: this script's own child
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(given.point[0], int(given.point[1]), given.chunk)))
        return 0
    from cytoclip import demo

    with tempfile.TemporaryDirectory() as base:
        demo.write_base(Path(base), ["a round cell", "two cells on a clean background"], demo.Shape(), seed=0)
        measured = []
        for batch in given.batches:
            command = [sys.executable, __file__, "--point", base, str(batch), "--chunk", str(given.chunk)]
            said = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
            )
            measured.append(json.loads(said.stdout.splitlines()[-1]))
            print(
                "batch {batch:>6} in chunks of {chunk}: {mb:7.1f} MB, {seconds:.1f} s".format(**measured[-1]),
                flush=True,
            )
    ratio = measured[-1]["mb"] / measured[0]["mb"]
    print(json.dumps({"points": measured, "ratio": round(ratio, 3), "limit": LIMIT}))
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
