"""One, two and four processes on one machine's cores: pairs a second of the same run, and what they say to each other.

    python bench/scaling.py [--processes 1 2 4] [--batch 64] [--steps 6] [--rounds 5]

The demo's model, `contrastive_step`, the sum of gradients, clipping and AdamW, gloo over the loopback; one thread for
each process, and for one process also all cores as threads. In each round every number of processes has its turn. On
two cores four processes cannot be faster than two: what is seen there is what the exchange costs.
A card, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def work(base: str, batch: int, steps: int) -> None:
    """One of torchrun's processes: time `steps` steps after two; the first one prints."""
    import torch

    from cytoclip import checkpoint, device, loss, optim
    from cytoclip.config import Train
    from cytoclip.pairs import Identity

    world = device.start("cpu")
    encoder = checkpoint.open_model(base).encoder.train()
    optimizer, moving = optim.build(encoder, Train(learning_rate=1e-6)), encoder.moving()
    side, end = encoder.clip.config.vision_config.image_size, encoder.clip.config.text_config.eos_token_id
    own = batch // world.size
    pixels = torch.randint(0, 256, (own, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(3, end, (own, 40))
    tokens[:, -1] = end
    each = torch.arange(batch)
    identity, took = Identity(each, each, -torch.ones_like(each)), []
    for _ in range(2 + steps):
        world.wait()
        began = time.perf_counter()
        optimizer.zero_grad()
        loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), [(pixels, tokens)], identity, world)
        world.sum_gradients(moving.values())
        optim.clip(moving, 1.0)
        optimizer.step()
        world.wait()
        took.append(time.perf_counter() - began)
    if world.first:
        print(json.dumps({"pairs/s": batch / statistics.median(took[2:])}))


def run(base: str, processes: int, threads: int, given: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--child", base, "--batch", str(given.batch), "--steps", str(given.steps)]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
    found: float = json.loads(done.stdout.strip().splitlines()[-1])["pairs/s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        work(given.child, given.batch, given.steps)
        return
    from cytoclip import demo

    cores = os.cpu_count() or 1
    ways = {f"{n} × 1 thread": (n, 1) for n in given.processes} | {f"1 × {cores} threads": (1, cores)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as base:
        demo.write_base(Path(base), ["a round cell", "two cells on a clean background"], demo.Shape(), seed=0)
        for _ in range(given.rounds):
            for name, (processes, threads) in ways.items():
                speeds[name].append(run(base, processes, threads, given))
    first, rows = next(iter(speeds.values())), {}
    for name, each in speeds.items():
        ratio = statistics.median(one / other for one, other in zip(each, first, strict=True))
        rows[name] = {"pairs/s": round(statistics.median(each), 1), "times one": round(ratio, 2)}
        print(f"  {name:<14} {rows[name]['pairs/s']:>8} pairs/s  {ratio:.2f} ×")
    load: Any = round(os.getloadavg()[0], 1)
    print(json.dumps({"cores": cores, "load": load, "batch": given.batch, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
