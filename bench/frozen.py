"""Pairs a second with a frozen image tower: stored features against a forward pass of the tower in every step.

    python bench/frozen.py MODEL DATA_ROOT [section.key=value ...]

MODEL is a hub id or a folder; the text tower trains whole. Medians over the steps after the first; the time to compute
the features once is said beside them. One JSON line last.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from cytoclip import config, device, jobs, training
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.feed import Read

STEPS = 6


def measure(wanted: Config, storing: bool) -> tuple[float, float]:
    """(pairs a second, seconds before the first step)."""
    world, began = device.start(wanted.train.device, wanted.train.precision), time.perf_counter()
    job = jobs.prepare(wanted, RunFolder(Path(wanted.output)), world, Console(), storing)
    before = time.perf_counter() - began
    took = []
    began = time.perf_counter()
    for step, arrival in enumerate(job.feed.arrivals(0, STEPS, world, Read())):
        training._step(job, step, arrival)
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
    return wanted.train.batch_size / statistics.median(took[1:]), before


def main(model: str, root: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            f"data: {{root: {root}}}\nmodel: {{name: {model}, image_tower: frozen}}\n"
            f"train: {{steps: {STEPS}, batch_size: 128, warmup_steps: 1}}\noutput: {folder}/run\n"
        )
        wanted = config.load(recipe, overrides)
        (embedding, _), (stored, once) = (measure(wanted, storing) for storing in (False, True))
    print(
        json.dumps(
            {
                "embedding in every step, pairs/s": round(embedding, 1),
                "stored, pairs/s": round(stored, 1),
                "ratio": round(stored / embedding, 1),
                "seconds before the first step, features computed": round(once, 1),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
