"""What a GPU computes and what a step costs there: against the CPU, against the card's own matrix rate.

    python bench/gpu.py [--only PART ...] [--to gpu.jsonl] [--batch 32768]
    python bench/gpu.py --rehearse          # all of it in small, on a CPU, to see that it runs

Parts, each in a process of its own with a time limit, so that one that fails ends no other:

- exact: loss and gradients of one step in float64, in chunks on the GPU, against one chunk on the CPU; embeddings in
  float32, with cuDNN's TF32 convolutions and without; the pixels.
- augment: pictures varied on the GPU against the CPU, whole against in chunks, and how many a second.
- runs-cpu, runs-gpu: losses of whole runs of eight steps, of each kind, on either; resumed, copied ahead or not.
- repeats: the same run twice on the GPU, to the last bit or not, and with torch's deterministic algorithms.
- plain: ViT-B/16 with random weights, bf16, all weights training: a step with AdamW in one chunk, up to the largest
  that fits; its floating-point operations as torch counts them, and the card's rate for a matrix product.
- cached: a step of 4,096 in chunks of 512, and one of `--batch` in chunks of 128, pictures in pinned memory as the
  loader leaves them.
- auto: the chunk that `micro_batch_size: auto` finds there, and such a step.
- lora: the same with LoRA on both towers, with the leaner layers of `lean.py` and without.
- run: `train.fit` of that model from the cache, with and without data.augment: what of the speed arrives.
- compiled, lora-compiled: with train.compile.

A JSON line for each measurement as soon as it is there; what is wanted of them at the end (`gpu_card.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import torch
from gpu_card import card
from gpu_cost import REHEARSAL, Line, Scale, auto, cached, compiled, lora, lora_compiled, plain
from gpu_same import augment, exact, repeats, run, runs

LIMITS = {  # seconds; an H200 takes a fifth
    "exact": 120,
    "augment": 120,
    "runs-cpu": 300,
    "runs-gpu": 300,
    "repeats": 200,
    "plain": 200,
    "cached": 600,
    "auto": 600,
    "lora": 200,
    "run": 300,
    "compiled": 300,
    "lora-compiled": 300,
}

PARTS: dict[str, Callable[[Scale], Iterator[Line]]] = {
    "exact": exact, "augment": augment, "runs-cpu": runs, "runs-gpu": runs, "repeats": repeats, "plain": plain,
    "cached": cached,
    "auto": auto, "lora": lora, "run": run, "compiled": compiled, "lora-compiled": lora_compiled,
}  # fmt: skip


def facts(device: torch.device) -> Line:
    names = ("torch", "transformers", "accelerate", "peft", "kornia", "triton")
    found = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    line: Line = {"python": platform.python_version(), "versions": found, "cpus": os.cpu_count()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        line |= {"gpu": card.name, "GB": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--to", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()

    def write(part: str, line: Line) -> None:
        """Lines of children come by the file alone."""
        text = json.dumps({"part": part, **line})
        print(text, flush=True)
        with given.to.open("a") as out:
            out.write(text + "\n")

    if given.child:
        (part,) = given.only
        device = torch.device("cpu" if given.rehearse or part == "runs-cpu" else "cuda")
        scale = Scale(device, **REHEARSAL) if given.rehearse else Scale(device, batch=given.batch)
        began = time.perf_counter()
        for line in PARTS[part](scale):
            write(part, {**line, "at": round(time.perf_counter() - began, 1)})
        return 0
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs it in small on the CPU")
    given.to.unlink(missing_ok=True)
    write("facts", facts(torch.device("cpu" if given.rehearse else "cuda")))
    failed = 0
    for part in given.only:
        command = [sys.executable, *sys.argv, "--child", "--only", part]
        try:
            subprocess.run(command, check=True, timeout=LIMITS[part])
        except subprocess.SubprocessError as error:
            failed += 1
            write(part, {"failed": str(error)[-300:]})
    wanted = card([json.loads(text) for text in given.to.read_text().splitlines()])
    return int(failed > 0 or any(not one["reached"] for one in wanted))


if __name__ == "__main__":
    sys.exit(main())
