"""What it saves to embed captions in buckets: steps of one model with and without, in turns.

    python bench/buckets.py [--model B/32] [--batch 64] [--rounds 5] [--median 20]

Captions as they are written: lengths log-normal about the median (in tokens, spread .6), cut to 5 and to 77. A step is
that of a run on a CPU, all weights, bf16 where the processor has it, else float32. The median of the ratios of
neighbouring steps, and what is computed: tokens of the one rectangle, of the buckets and of the captions. One JSON line
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import mfu
import numpy as np
import torch
from peer_data import SHAPES, Place, write
from peers import facts

from cytoclip import buckets
from cytoclip.device import World
from cytoclip.pairs import Identity


def captions(batch: int, median: float, end: int, pad: int) -> torch.Tensor:
    """Token ids (batch, longest), each row ended and then padded."""
    random = np.random.default_rng(0)
    lengths = random.lognormal(np.log(median), 0.6, batch).clip(5, 77).astype(int).tolist()
    tokens = torch.full((batch, max(lengths)), pad)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.from_numpy(random.integers(pad + 1, end - 1, length - 1))
        row[length - 1] = end
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="B/32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--median", type=float, default=20)
    given, about = parser.parse_args(), facts(gpu=False)
    world = World(torch.device("cpu"), precision=about["precision"])
    with tempfile.TemporaryDirectory() as folder:
        write(Place(Path(folder)), 1, [given.model])
        encoder = mfu.encoder_of(Place(Path(folder)).model(given.model), world)
    end, each = encoder.clip.config.text_config.eos_token_id, torch.arange(given.batch)
    tokens = captions(given.batch, given.median, end, encoder.pad)
    pixels = torch.randint(0, 256, (given.batch, 3, *encoder.image_size), dtype=torch.uint8)
    step = mfu.step_of(encoder, (pixels, tokens, Identity(each, each, -torch.ones_like(each))), world)
    ways: dict[str, Any] = {"rectangle": encoder.text_features}
    buckets.fill(encoder, padded_by_end=end == encoder.pad)
    ways["buckets"] = encoder.text_features
    took: dict[str, list[float]] = {name: [] for name in ways}
    computed = dict.fromkeys(ways, 0)

    def count(_: Any, __: Any, named: dict[str, Any]) -> None:
        computed[name] += named["input_ids"].numel()

    counting = encoder.text_tower.register_forward_pre_hook(count, with_kwargs=True)
    for number in range(given.rounds + 1):
        for name, way in ways.items():
            encoder.text_features = way
            seconds = mfu.seconds_of(step, world.device)
            if number:
                took[name].append(seconds)
        counting.remove()
    speeds = {name: round(given.batch / statistics.median(some), 2) for name, some in took.items()}
    ratio = statistics.median(a / b for a, b in zip(took["rectangle"], took["buckets"], strict=True))
    said = int((tokens != encoder.pad).sum())
    print(f"{given.model}, batch {given.batch}, captions of {tokens.shape[1]} tokens at most: pairs/s {speeds}, "
          f"{ratio:.3f} times in turns; tokens computed {computed}, of captions {said}")  # fmt: skip
    print(json.dumps({**about, "model": given.model, "batch": given.batch, "pairs/s": speeds, "ratio": round(ratio, 3),
                      "tokens": {**computed, "captions": said}}))  # fmt: skip


if __name__ == "__main__":
    main()
