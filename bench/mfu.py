"""Share of the physical limit: a step's model FLOPs a second over what the machine's matrix products reach.

    python bench/mfu.py [--models 23M B/32] [--rounds 5] [--compile] [--end-to-end]
    python bench/mfu.py --device cuda --models B/16 --batch 512 --compile

In each round, one after the other, so that whatever else the machine does falls on all alike: a square product in bf16
(the machine's rate), the products of the step by themselves in the shapes and layouts that the step has, and the step:
pictures to gradients in one chunk, clipping, AdamW. Model FLOPs are of one forward and one backward pass with the plain
loss, counted by torch (`bench/flops.py`, against a hand count in tests/test_bench_flops.py); what is executed beyond
them is said apart. With --end-to-end also `training.fit` from JPEG files and from the cache, as `bench/peers.py` does.

A card for people, and one JSON line last; exit code 1 where, on a CPU, the step reaches less than 60 % of the rate that
its products reach alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flops
import torch
from peer_data import SHAPES, Place, write
from peers import BATCH, facts, on_cpu

from cytoclip import adapters, attention, checkpoint, device, lean, loss, optim
from cytoclip.config import Model, Train
from cytoclip.device import World
from cytoclip.model import DualEncoder, compile_towers
from cytoclip.pairs import Identity

TOKENS = 48
SQUARE = {"cpu": 1024, "cuda": 8192}
LIMIT = 0.6  # of the rate that the same products reach alone, on a CPU


def encoder_of(folder: Path, world: World, compiled: bool) -> DualEncoder:
    """As a run has it (`jobs.prepare`), all weights moving."""
    encoder = checkpoint.open_model(str(folder)).encoder
    adapters.set_moving(encoder, Model())
    lean.lighten(encoder.clip)
    if world.device.type == "cpu":
        attention.quicken(encoder.clip)
        device.keep_memory()
    if compiled:
        compile_towers(encoder)
    return encoder.to(world.device).train()


def inputs(encoder: DualEncoder, pairs: int, where: torch.device) -> tuple[torch.Tensor, torch.Tensor, Identity]:
    end, each = encoder.clip.config.text_config.eos_token_id, torch.arange(pairs, device=where)
    pixels = torch.randint(0, 256, (pairs, 3, *encoder.image_size), dtype=torch.uint8, device=where)
    tokens = torch.randint(1, end - 1, (pairs, TOKENS), device=where)
    tokens[:, -1] = end
    return pixels, tokens, Identity(each, each, -torch.ones_like(each))


def step_of(encoder: DualEncoder, given: Any, world: World) -> Callable[[], None]:
    optimizer, moving = optim.build(encoder, Train(learning_rate=1e-6)), encoder.moving()
    pixels, tokens, identity = given

    def step() -> None:
        optimizer.zero_grad()
        loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), [(pixels, tokens)], identity, world)
        optim.clip(moving, 1.0)
        optimizer.step()

    return step


def seconds_of(work: Callable[[], Any], where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(encoder: DualEncoder, given: Any, world: World, rounds: int) -> dict[str, float]:
    where, pixels = world.device, given[0]
    model_flops = flops.of_model(encoder, *given[:2])
    step = step_of(encoder, given, world)
    for _ in range(2):
        step()
    with flops.Products() as noted:
        step()
    executed = flops.counted(step)
    products = flops.alone(noted.found, where)
    side = SQUARE[where.type]
    a, b = (torch.randn(side, side, device=where).bfloat16() for _ in range(2))
    times = 10

    def each_alone() -> None:
        for product, count in products:
            for _ in range(count):
                product()

    def square() -> None:
        for _ in range(times):
            torch.mm(a, b)

    found: dict[str, list[float]] = {"square": [], "alone": [], "step": []}
    for number in range(rounds + 1):
        for name, work in (("square", square), ("alone", each_alone), ("step", step)):
            took = seconds_of(work, where)
            if number:
                found[name].append(took)
    rate = 2 * side**3 * times / statistics.median(found["square"])
    ratios = [one / other for one, other in zip(found["alone"], found["step"], strict=True)]
    took = statistics.median(found["step"])
    return {
        "GFLOP a pair": round(model_flops / len(pixels) / 1e9, 2),
        "executed beyond them": round(executed / model_flops - 1, 3),
        "pairs/s": round(len(pixels) / took, 2),
        "bf16 rate GFLOP/s": round(rate / 1e9, 1),
        "of the rate": round(model_flops / took / rate, 3),
        "products alone of the rate": round(model_flops / statistics.median(found["alone"]) / rate, 3),
        "of the same products alone": round(statistics.median(ratios), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["23M", "B/32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--end-to-end", action="store_true", help="on a CPU, training.fit too")
    given = parser.parse_args()
    world = World(torch.device(given.device), precision="bf16")
    about, results = facts(given.device == "cuda"), []
    with tempfile.TemporaryDirectory() as folder:
        write(Place(Path(folder)), 256 if given.end_to_end else 32, given.models)
        for name in given.models:
            batch = given.batch or BATCH[given.device].get(name, 16)
            encoder = encoder_of(Place(Path(folder)).model(name), world, given.compile)
            found = measure(encoder, inputs(encoder, batch, world.device), world, given.rounds)
            del encoder
            if given.end_to_end:
                found |= end_to_end(folder, name, batch, given.rounds, found)
            results.append({"model": name, "batch": batch, "compiled": given.compile, **found})
            print("\n".join(f"  {key:<28} {value}" for key, value in results[-1].items()) + "\n", flush=True)
    print(json.dumps({**about, "load after": round(os.getloadavg()[0], 1), "results": results, "limit": LIMIT}))
    return int(given.device == "cpu" and min(r["of the same products alone"] for r in results) < LIMIT)


def end_to_end(folder: str, name: str, batch: int, rounds: int, step: dict[str, float]) -> dict[str, float]:
    from peer_gate import Task

    task = Task(folder, name, batch, batch, 1, "cpu", 2)
    ways = on_cpu(task, ["ours", "ours, cached pictures"], rounds, 2, Path(os.devnull))
    speeds = {way.name: statistics.median(way.speeds) for way in ways}
    limit = step["bf16 rate GFLOP/s"] / step["GFLOP a pair"]
    return {f"{name}, end to end, of the rate": round(speed / limit, 3) for name, speed in speeds.items()} | {
        f"{name}, end to end, pairs/s": round(speed, 2) for name, speed in speeds.items()
    }


if __name__ == "__main__":
    sys.exit(main())
