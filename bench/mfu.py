"""Share of the physical limit: a step's model FLOPs a second over what the machine's matrix products reach.

    python bench/mfu.py [--models 23M B/32] [--rounds 5] [--compile] [--end-to-end]
    python bench/mfu.py --device cuda --models B/16 --compile --end-to-end

In each round, one after the other, so that whatever else the machine does falls on all alike: a square product
in the precision of the step (the machine's rate; bf16 where the device has it, else float32), the products of the step
by themselves in the shapes and layouts that the step has, and the step: pictures to gradients in one chunk, clipping,
AdamW. Model FLOPs are of one forward and one backward pass with the plain loss, counted by torch (`bench/flops.py`,
against a hand count in tests/test_bench_flops.py); what is executed beyond them is said apart. With --end-to-end also
`training.fit` from JPEG files and from the cache, as `bench/peers.py` does.

A card for people, and one JSON line last; exit code 1 where the step on a CPU reaches less than 60 % of the rate that
its products reach alone, or a GPU end to end from the cache less than 40 % of its rate.
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

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as `cli` and the peers have it

import flops
import torch
from peer_data import SHAPES, Place, write
from peer_gate import Task
from peers import BATCH, facts, on_cpu, on_gpu

from cytoclip import adapters, attention, checkpoint, device, last_layer, lean, loss, optim
from cytoclip.config import Model, Train
from cytoclip.device import DTYPES, World
from cytoclip.model import DualEncoder, compile_towers
from cytoclip.pairs import Identity

TOKENS = 48
SQUARE = {"cpu": 1024, "cuda": 8192}
LIMITS = {"cpu": ("of the same products alone", 0.6), "cuda": ("cached, end to end, of the rate", 0.4)}


def encoder_of(folder: Path, world: World, compiled: bool = False) -> DualEncoder:
    """As a run has it (`jobs.prepare`), all weights moving, not yet compiled."""
    encoder = checkpoint.open_model(str(folder)).encoder
    adapters.set_moving(encoder, Model())
    lean.lighten(encoder.clip)
    if not compiled:
        last_layer.shorten(encoder.clip)
    if world.device.type == "cpu":
        attention.quicken(encoder.clip)
        device.keep_memory()
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


def measure(encoder: DualEncoder, given: Any, world: World, rounds: int, compiled: bool) -> dict[str, float]:
    where, pixels = world.device, given[0]
    few = min(8, len(pixels))  # with whole attention in float32 a batch would not fit
    model_flops = flops.of_model(encoder, given[0][:few], given[1][:few]) * len(pixels) / few
    step = step_of(encoder, given, world)
    with flops.Products() as noted:
        step()
    executed = flops.counted(step)
    if compiled:
        compile_towers(encoder)
    step()
    products = flops.alone(noted.found, where)
    side = SQUARE[where.type]
    a, b = (torch.randn(side, side, device=where, dtype=DTYPES.get(world.precision)) for _ in range(2))
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
        "rate GFLOP/s": round(rate / 1e9, 1),
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
    parser.add_argument("--end-to-end", action="store_true", help="training.fit too")
    parser.add_argument(
        "--workers", type=int, help="loader processes of that; default: 1, on a GPU two less than cores"
    )
    parser.add_argument("--log", type=Path, default=Path("mfu.log"), help="what whole runs print")
    given = parser.parse_args()
    if given.workers is None:
        given.workers = max(1, (os.cpu_count() or 1) - 2) if given.device == "cuda" else 1
    about, results = facts(given.device == "cuda"), []
    world = World(torch.device(given.device), precision=about["precision"])
    with tempfile.TemporaryDirectory() as folder:
        pairs = (2048 if given.device == "cuda" else 256) if given.end_to_end else 32
        write(Place(Path(folder)), pairs, given.models)
        for name in given.models:
            batch = given.batch or BATCH[given.device].get(name, 16)
            encoder = encoder_of(Place(Path(folder)).model(name), world, given.compile)
            found = measure(encoder, inputs(encoder, batch, world.device), world, given.rounds, given.compile)
            del encoder
            if given.end_to_end:
                task = Task(folder, name, batch, batch, given.workers, given.device, world.precision, 2)
                found |= end_to_end(task, given, found)
            results.append({"model": name, "batch": batch, "compiled": given.compile, **found})
            print("\n".join(f"  {key:<28} {value}" for key, value in results[-1].items()) + "\n", flush=True)
    limited, least = LIMITS[given.device]
    print(json.dumps({**about, "load after": round(os.getloadavg()[0], 1), "results": results, "limit": least}))
    return int(any(result.get(limited, least) < least for result in results))


def end_to_end(task: Task, given: argparse.Namespace, step: dict[str, float]) -> dict[str, Any]:
    names = {
        (False, False): "ours", (False, True): "ours, compiled",
        (True, False): "ours, cached pictures", (True, True): "ours, cached and compiled",
    }  # fmt: skip
    kinds = {"files": names[False, given.compile], "cached": names[True, given.compile]}
    if given.device == "cuda":
        until = time.perf_counter() + 60 * len(kinds)
        ways = on_gpu([task], {task.model: list(kinds.values())}, until, given.log)[task.model]
    else:
        ways = on_cpu(task, list(kinds.values()), given.rounds, 2, given.log)
    limit, found = step["rate GFLOP/s"] / step["GFLOP a pair"], {}
    for kind, way in zip(kinds, ways, strict=True):
        if way.speeds:
            speed = statistics.median(way.speeds)
            found[f"{kind}, end to end, pairs/s"] = round(speed, 2)
            found[f"{kind}, end to end, of the rate"] = round(speed / limit, 3)
        else:
            found[f"{kind}, end to end, failed"] = way.failed
    return found


if __name__ == "__main__":
    sys.exit(main())
