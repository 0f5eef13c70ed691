"""The losses of twenty steps, as a file in the tree: whatever changes them changes what the product computes.

    python -m tests.numerics.golden                       # writes tests/numerics/golden/demo.json anew
    python -m tests.numerics.golden LOSSES.json [CHUNK]   # writes there; CHUNK is train.micro_batch_size

A model of the demo's size on drawn cells, in float32 on one thread of a CPU. A change that means to change losses
writes the file anew and says why in its message.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cytoclip import demo, files, training
from cytoclip.config import parse
from cytoclip.console import Console
from tests.conftest import write_split

FILE = Path(__file__).parent / "golden" / "demo.json"
STEPS, BATCH, PAIRS = 20, 32, 96  # three batches an epoch


def main(target: Path = FILE, chunk: int | None = None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = trained(Path(folder), chunk)
    files.write_json(target, {**machine(), "losses": losses})


def trained(folder: Path, chunk: int | None) -> list[float]:
    """The loss of each step."""
    captions = [entry["caption"] for entry in write_split(folder / "data" / "train", PAIRS, seed=1)]
    write_split(folder / "data" / "val", 20, seed=2)
    (folder / "base").mkdir()
    demo.write_base(folder / "base", captions, demo.Shape(), seed=0)
    given: dict[str, Any] = {
        "data": {"root": str(folder / "data"), "workers": 0},
        "model": {"name": str(folder / "base")},
        "train": {
            "steps": STEPS, "batch_size": BATCH, "micro_batch_size": chunk, "learning_rate": 2e-4, "warmup_steps": 5,
            "schedule": "cosine", "precision": "no", "device": "cpu",
        },
        "validate": {"every": STEPS, "ks": [1]},
        "track": {"to": []},
        "output": str(folder / "run"),
    }  # fmt: skip
    training.fit(parse(given, "the golden run"), Console(quiet=True))
    return [json.loads(line)["loss"] for line in (folder / "run" / "losses.jsonl").read_text().splitlines()]


def machine() -> dict[str, str]:
    """What has to be equal for the same sums in the same order: kernels are chosen by it."""
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    said = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*: (.+)$", listed, re.MULTILINE))
    return {
        "torch": str(torch.__version__),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(f"{key} {value}" for key, value in sorted(said.items())) or platform.processor(),
    }


if __name__ == "__main__":
    main(*(Path(given) if i == 0 else int(given) for i, given in enumerate(sys.argv[1:])))  # type: ignore[arg-type]
