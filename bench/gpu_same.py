"""Whether a device computes what a CPU does, and whole runs on either: parts of `bench/gpu.py`."""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cost import CLIP, REHEARSAL, Line, Scale, encoder_of, inputs, seconds_of, settings_of
from PIL import Image

from cytoclip import batches, cells, demo, journal, loss, training
from cytoclip.augment import Variation
from cytoclip.config import parse
from cytoclip.console import Console
from cytoclip.data_options import Augment
from cytoclip.device import World
from cytoclip.model import DualEncoder
from cytoclip.pixels import PixelSpec, to_floats

PRESET = {"preset": "microscopy"}


def exact(scale: Scale) -> Iterator[Line]:
    cpu = torch.device("cpu")
    small = Scale(cpu, **{**REHEARSAL, "precision": "no"})
    pixels, tokens, identity = inputs(small, 48)
    encoder = encoder_of(small)
    for dtype, chunk in ((torch.float64, 48), (torch.float64, 7), (torch.float32, 48), (torch.float32, 7)):
        gradients = []
        for device, each in ((cpu, 48), (scale.device, chunk)):
            twin = encoder.to(device, dtype)
            twin.zero_grad()
            chunks = list(zip(pixels.split(each), tokens.split(each), strict=True))
            here = identity.map(partial(torch.Tensor.to, device=device))
            result = loss.contrastive_step(twin, loss.Logits(twin.logit_scale), chunks, here, World(device))
            found = {name: p.grad.to(cpu, copy=True) for name, p in twin.moving().items() if p.grad is not None}
            gradients.append({"loss": result.loss.cpu(), **found})
        one, other = gradients
        assert one.keys() == other.keys()
        worst = max(one, key=lambda name: float((one[name] - other[name]).abs().max()))
        yield {"what": "gradients", "dtype": str(dtype), "chunk": chunk, "tensors": len(one),
               "largest difference": float((one[worst] - other[worst]).abs().max()), "of": worst,
               "loss": float((one["loss"] - other["loss"]).abs())}  # fmt: skip
    yield from convolutions(encoder.float(), pixels, tokens, scale)
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    spec = PixelSpec(16, (16, 16), 3, *CLIP, 1 / 255)
    same = torch.equal(to_floats(every, spec), to_floats(every.to(scale.device), spec).cpu())
    yield {"what": "all 256 values of 3 channels as floats", "bit for bit": same}


def convolutions(encoder: DualEncoder, pixels: torch.Tensor, tokens: torch.Tensor, scale: Scale) -> Iterator[Line]:
    """Embeddings in float32: with what torch lets cuDNN do by default, and as `device.start` has it."""
    with torch.no_grad():
        wanted = encoder.to("cpu").double()(pixels, tokens)
        encoder.to(scale.device).float()
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
            images, texts = encoder(pixels.to(scale.device), tokens.to(scale.device))
            yield {"what": "embeddings in float32 against float64", "convolutions": precision,
                   "images": float((images.cpu() - wanted[0]).abs().max()),
                   "texts": float((texts.cpu() - wanted[1]).abs().max())}  # fmt: skip


def augment(scale: Scale) -> Iterator[Line]:
    kinds = {"preset": Augment(**PRESET), "any angle and blur": Augment(**PRESET, rotation="any", blur=1.5)}
    for name, wanted in kinds.items():
        of = Variation(wanted, (scale.side, scale.side), 0)
        wide = round(scale.side * of.margin)
        rows = torch.stack([of.draw(pair, 3) for pair in range(96)])
        drawn = [np.asarray(one.image.convert("RGB").resize((wide, wide))) for one in cells.sample(96, 0, range(4))]
        pictures = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
        there, here = of.apply(pictures.to(scale.device), rows.to(scale.device)), of.apply(pictures, rows)
        away = (there.cpu() - here).abs()
        line: Line = {"what": name, "pictures": 96, "bit for bit": bool((away == 0).all()),
                "largest difference, levels": float(away.max()), "mean": float(away.mean()),
                "share of values more than half a level off": float((away > 0.5).float().mean())}  # fmt: skip
        for each in (32, 7, 1):
            parts = [of.apply(*(part.to(scale.device) for part in some))
                     for some in zip(pictures.split(each), rows.split(each), strict=True)]  # fmt: skip
            line[f"in chunks of {each}"] = torch.equal(torch.cat(parts), there)
        many = 512 if scale.device.type == "cuda" else 16
        given = [part.to(scale.device).repeat(6, *[1] * (part.ndim - 1))[:many] for part in (pictures, rows)]
        took = seconds_of(lambda of=of, given=given: of.apply(*given), scale, 10)  # type: ignore[misc]
        yield {**line, "pictures/s": round(many / statistics.median(took))}


REPEATS: dict[str, dict[str, Any]] = {
    "whole": {},
    "bf16": {"train": {"precision": "bf16"}},
    "lora": {"model": {"image_tower": "lora", "text_tower": "lora"}},
}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in chunks": {"train": {"micro_batch_size": 5}},
    "varied": {"data": {"augment": PRESET, "cache": True}},
    "any angle, blur": {"data": {"augment": {**PRESET, "rotation": "any", "blur": 1.5}}},
    "lora": {"model": {"image_tower": "lora", "text_tower": "lora"}, "train": {"micro_batch_size": 8}},
    "image tower frozen": {"model": {"image_tower": "frozen"}},
    "anchor, averages, patches dropped, layers computed again": {
        "train": {"anchor": {"embeddings": 1.0, "similarities": 1.0}, "ema": 0.9, "patch_dropout": 0.25,
                  "gradient_checkpointing": True, "label_smoothing": 0.1, "micro_batch_size": 8},
    },
    "bf16": {"data": {"augment": PRESET, "cache": True, "workers": 2},
             "train": {"precision": "bf16", "micro_batch_size": 8}},
}  # fmt: skip
ON_A_GPU: dict[str, dict[str, Any]] = {
    "whole, again": {},
    "copied in chunks": RUNS["varied"],
    "auto": {"train": {"micro_batch_size": "auto"}},
    "fp16": {"train": {"precision": "fp16"}},
    "lora with dropout": {
        "model": {"image_tower": "lora", "text_tower": "lora", "lora": {"dropout": 0.2}},
        "train": {"micro_batch_size": 8},
    },
}


def runs(scale: Scale) -> Iterator[Line]:
    kind = scale.device.type
    every = {**RUNS, **(ON_A_GPU if kind == "cuda" else {})}
    with _experiment(96, demo.Shape()) as make:
        for name, sections in every.items():
            wanted = make(name, {"train": {"device": kind}}, sections)
            try:
                with _copied(0 if name == "copied in chunks" else batches._COPIED):
                    training.fit(wanted, Console(quiet=True))
                yield {"run": name, "losses": _losses(wanted.output)}
            except Exception as error:
                yield {"run": name, "failed": f"{type(error).__name__}: {error}"}
        for name, sections in (("resumed", {}), ("resumed, lora in chunks", RUNS["lora"])):
            wanted = make(name, {"train": {"device": kind}, "checkpoint": {"every": 4, "keep_last": 9}}, sections)
            training.fit(wanted, Console(quiet=True))
            whole, run = _losses(wanted.output), Path(wanted.output)
            (run / "results.json").unlink()
            newest = max(p for p in (run / "checkpoints").iterdir() if p.is_dir())
            shutil.rmtree(newest)
            training.fit(wanted, Console(quiet=True))
            yield {"run": name, "bit for bit": _losses(wanted.output) == whole, "losses": whole,
                   "after": _losses(wanted.output)}  # fmt: skip


def repeats(scale: Scale) -> Iterator[Line]:
    """Each run twice: whether it is the same to the last bit, and with which of torch's switches."""
    switches = {
        "as it is": lambda: None,
        "cuDNN deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
        "all deterministic": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    }
    with _experiment(96, demo.Shape()) as make:
        for switch, turn in switches.items():
            turn()
            for kind, sections in REPEATS.items():
                pair = []
                for again in range(2):
                    wanted = make(f"{switch}-{kind}-{again}", {"train": {"device": scale.device.type}}, sections)
                    began = time.perf_counter()
                    training.fit(wanted, Console(quiet=True))
                    pair.append(_losses(wanted.output))
                took = round(time.perf_counter() - began, 2)
                yield {"run": kind, "torch": switch, "bit for bit": pair[0] == pair[1], "seconds": took}


def run(scale: Scale) -> Iterator[Line]:
    """A whole run from the cache, its last steps."""
    tiny = scale.width != 768
    batch, shape = (16, demo.Shape()) if tiny else (256, demo.Shape(image_size=224, patch_size=16))
    with _experiment(3 * batch, shape, None if tiny else scale) as make:
        for name, data in (("varied", {"augment": PRESET}), ("plain", {})):
            wanted = make(
                name, {"data": {"cache": True, **data, "workers": None},
                       "train": {"device": scale.device.type, "precision": "bf16", "batch_size": batch, "steps": 18}},
            )  # fmt: skip
            began = time.perf_counter()
            with _noted() as curves:
                training.fit(wanted, Console(quiet=True))
            last = curves[-8:]
            yield {"run": name, "batch": batch, "seconds": round(time.perf_counter() - began, 1),
                   **{key: round(statistics.median(one[key] for one in last), 4)
                      for key in ("pairs_per_second", "waiting_for_data", "memory_gb") if key in last[0]}}  # fmt: skip


@contextmanager
def _copied(most: int) -> Iterator[None]:
    before, batches._COPIED = batches._COPIED, most
    try:
        yield
    finally:
        batches._COPIED = before


@contextmanager
def _noted() -> Iterator[list[dict[str, float]]]:
    """What each step of a run says of its speed."""
    found: list[dict[str, float]] = []
    before = journal.note

    def note(row: Any, curves: Any, chance_loss: float, name: str) -> str:
        found.append(curves)
        return before(row, curves, chance_loss, name)

    journal.note = note
    try:
        yield found
    finally:
        journal.note = before


@contextmanager
def _experiment(pairs: int, shape: demo.Shape, large: Scale | None = None) -> Iterator[Any]:
    """Drawn pairs and a CLIP in a folder: what makes configurations of runs on them, later sections over earlier."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        captions = [caption for split, count in (("train", pairs), ("val", 32))
                    for caption in _write_split(folder / "data" / split, count, shape.image_size)]  # fmt: skip
        demo.write_base(folder / "base", captions, shape, seed=0)
        if large:
            _write_large(folder / "base", large)

        def make(name: str, *sections: dict[str, Any]) -> Any:
            given: dict[str, Any] = {
                "data": {"root": f"{folder}/data", "workers": 0},
                "model": {"name": f"{folder}/base"},
                "train": {"steps": 8, "batch_size": 32, "learning_rate": 1e-4, "warmup_steps": 2, "precision": "no"},
                "validate": {"every": 100, "ks": [1, 5]},
                "checkpoint": {"every": 100},
                "track": {"to": []},
                "output": f"{folder}/runs/{name}",
            }
            for some in sections:
                given.update({key: {**given.get(key, {}), **value} for key, value in some.items()})
            return parse(given, "the bench")

        yield make


def _write_split(folder: Path, count: int, side: int) -> list[str]:
    """Each of 64 drawn cells comes again with other noise."""
    (folder / "imgs").mkdir(parents=True)
    random, entries = np.random.default_rng(len(folder.name)), []
    drawn = list(cells.sample(min(count, 64), len(folder.name), range(4)))
    pixels = [np.asarray(one.image.convert("RGB").resize((side * 4 // 3, side * 4 // 3)), np.int16) for one in drawn]
    for i in range(count):
        noisy = pixels[i % len(drawn)] + random.integers(-6, 7, pixels[0].shape, np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "imgs" / f"{i:04}.jpg", quality=90)
        entries.append({"img": f"{i:04}.jpg", "caption": drawn[i % len(drawn)].caption})
    (folder / "img_text_pair.json").write_text(json.dumps(entries))
    return [entry["caption"] for entry in entries]


def _write_large(base: Path, scale: Scale) -> None:
    from transformers import CLIPModel

    small = json.loads((base / "config.json").read_text())["text_config"]
    ids = {key: small[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    CLIPModel(settings_of(scale, **ids)).save_pretrained(base)


def _losses(run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "losses.jsonl").read_text().splitlines()]
