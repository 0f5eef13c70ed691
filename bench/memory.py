"""Peak memory against the batch, ours beside the plain step: a fresh process a point.

    python bench/memory.py [--batches 256 1024 4096 16384 65536] [--chunk 32] [--plain 256 1024]
    python bench/memory.py --loss 32768 65536 131072 [--width 512] [--plain-loss 8192] [--device cuda]

- step: one exact step of the demo's model as a run has it (bf16 where the device has it, else float32; leaner layers;
  AdamW, which has its moments), at fixed chunks; the plain one has all pairs in one graph and the whole matrix of
  scores, twice, as most people write it.
- loss: `objectives.contrast` alone, from embeddings to their gradient; the plain one is cross-entropy of the scores and
  its backward pass. What others say of theirs, for a batch of 32k / 64k / 128k on 8 GPUs: 16.7 / 66.1 / out of memory
  for whole scores, 2.3 / 8.6 / 33.6 for OpenCLIP's share of them, 0.2 / 0.4 / 0.7 GB for Inf-CL (its README).

Memory above the process before, without the batch's own pixels and tokens, or embeddings where the loss is alone:
resident on a CPU (Linux), the allocator's on a GPU. What a step keeps of embeddings and their gradients, 24 bytes a
pair and dimension (docs/design.md), is in it, and grows with the batch. One JSON line last; exit code 1 where the rest
of it is more than 1.25 times as much for the largest batch as for the smallest, ours, or one of ours failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LIMIT = 1.25


@dataclass(frozen=True)
class Point:
    """What one process measures: a `step` of `batch` pairs in chunks (0: the plain one), or the `loss` alone."""

    what: str
    batch: int
    chunk: int
    width: int
    device: str
    base: str = ""

    @property
    def ours(self) -> bool:
        return self.chunk > 0


def measured(point: Point) -> dict[str, Any]:
    """Measure in this process: megabytes, and seconds."""
    import torch

    work = (_step if point.what == "step" else _loss)(point)
    if point.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated() / 1e6, time.perf_counter()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
        before, began = _status("VmRSS"), time.perf_counter()
        work()
        peak = _status("VmHWM")
    return {**asdict(point), "mb": round(peak - before, 1), "seconds": round(time.perf_counter() - began, 2)}


def _step(point: Point) -> Callable[[], Any]:
    import torch
    from mfu import encoder_of
    from peers import precision_of
    from torch.nn import functional

    from cytoclip import loss, optim
    from cytoclip.config import Train
    from cytoclip.device import World
    from cytoclip.pairs import Identity

    where = torch.device(point.device)
    world = World(where, precision=precision_of(point.device))
    encoder = encoder_of(Path(point.base), world)
    optimizer, moving = optim.build(encoder, Train(learning_rate=1e-6)), encoder.moving()
    side, end = encoder.clip.config.vision_config.image_size, encoder.clip.config.text_config.eos_token_id
    pixels = torch.randint(0, 256, (point.batch, 3, side, side), dtype=torch.uint8, device=where)
    tokens = torch.randint(3, end, (point.batch, 40), device=where)
    tokens[:, -1] = end
    each = torch.arange(point.batch, device=where)

    def plain(pixels: torch.Tensor, tokens: torch.Tensor, each: torch.Tensor) -> None:
        with world.autocast():
            images, texts = encoder(pixels, tokens)
        scores = encoder.logit_scale.exp() * images.float() @ texts.float().T
        ((functional.cross_entropy(scores, each) + functional.cross_entropy(scores.T, each)) / 2).backward()

    def ours(pixels: torch.Tensor, tokens: torch.Tensor, each: torch.Tensor) -> None:
        chunks = list(zip(pixels.split(point.chunk), tokens.split(point.chunk), strict=True))
        identity = Identity(each, each, -torch.ones_like(each))
        loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), chunks, identity, world)

    def step(pairs: int) -> None:
        optimizer.zero_grad()
        (ours if point.ours else plain)(pixels[:pairs], tokens[:pairs], each[:pairs])
        optim.clip(moving, 1.0)
        optimizer.step()

    def with_moments() -> None:
        step(min(point.batch, 2 * (point.chunk or 32)))  # AdamW makes them in its first one
        step(point.batch)

    return with_moments


def _loss(point: Point) -> Callable[[], Any]:
    import torch
    from torch.nn import functional

    from cytoclip import objectives
    from cytoclip.device import World
    from cytoclip.pairs import Identity

    where = torch.device(point.device)
    images, texts = (
        functional.normalize(torch.randn(point.batch, point.width, device=where), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale, each = torch.tensor(3.0, device=where), torch.arange(point.batch, device=where)

    def plain() -> None:
        scores = scale.exp() * images @ texts.T
        ((functional.cross_entropy(scores, each) + functional.cross_entropy(scores.T, each)) / 2).backward()

    def ours() -> None:
        identity = Identity(each, each, -torch.ones_like(each))
        with torch.no_grad():
            objectives.contrast((images, texts), scale, None, identity, World(where), objectives.Objective(), None)

    return ours if point.ours else plain


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1000


def asked(point: Point) -> dict[str, Any]:
    """`point` measured in a process of its own; `failed` where it does not fit."""
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(asdict(point))],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000", **os.environ},
    )
    kind = "ours" if point.ours else "plain"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1][:100]
        print(f"{point.what:<5} {point.batch:>7} {kind:<6} does not fit: {last}", flush=True)
        return {**asdict(point), "failed": last}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{point.what:<5} {point.batch:>7} {kind:<6} {found['mb']:>10.1f} MB {found['seconds']:>8.1f} s", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*")
    parser.add_argument("--plain", type=int, nargs="*")
    parser.add_argument("--loss", type=int, nargs="*")
    parser.add_argument("--plain-loss", type=int, nargs="*")
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # a Point: this script's own child
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measured(Point(**json.loads(given.point)))))
        return 0
    lists = given.batches, given.plain, given.loss, given.plain_loss
    if all(one is None for one in lists):
        lists = [256, 1024, 4096, 16384, 65536], [256, 1024], [32768], [8192]
    batches, plain, losses, plain_losses = ([] if one is None else one for one in lists)
    from peers import precision_of

    from cytoclip import demo

    precision = precision_of(given.device)
    print(f"precision {precision}", flush=True)
    with tempfile.TemporaryDirectory() as base:
        demo.write_base(Path(base), ["a round cell", "two cells on a clean background"], demo.Shape(), seed=0)
        step, alone = ("step", given.width, given.device, base), ("loss", given.width, given.device, "")
        rows = [(step, n, given.chunk) for n in batches] + [(step, n, 0) for n in plain]
        rows += [(alone, n, 1) for n in losses] + [(alone, n, 0) for n in plain_losses]
        found = [asked(Point(what, n, chunk, width, device, base)) for (what, width, device, base), n, chunk in rows]
    ours = [row for row in found if row["what"] == "step" and row["chunk"] and "mb" in row]
    rest = [row["mb"] - 24 * row["batch"] * demo.Shape().embedding / 1e6 for row in ours]
    ratio = rest[-1] / rest[0] if rest else 1.0
    failed = any(row["chunk"] and "failed" in row for row in found)
    points = [{key: value for key, value in row.items() if key != "base"} for row in found]
    print(json.dumps({"precision": precision, "points": points, "ratio": round(ratio, 3), "limit": LIMIT}))
    return int(ratio > LIMIT or failed)


if __name__ == "__main__":
    sys.exit(main())
