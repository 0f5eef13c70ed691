"""Pictures a second out of the loader: ours decoding, ours from the cache, and what others do.

    python bench/loader.py [--pairs 384] [--rounds 5] [--workers 2]

JPEGs like photographs (drawn cells, out of focus, with a sensor's noise) at 360×363 and 1024×768 are made in a
temporary folder, with a CLIP processor of 224×224 and a tokenizer. Each way yields whole batches of 64 with captions:

- plain: a PyTorch Dataset that opens the file with Pillow and calls the transformers processor for each pair, the
  tokenizer with it, and a DataLoader around it: what most people write. Its image processor is the one on Pillow,
  which is transformers' own choice where torchvision is not installed, as here.
- webdataset: the same per pair, out of a tar by webdataset's pipeline.
- ours: `batches.loader`, decoding in full; with data.reduced_decode; and from a cache that is filled, each row compared
  with its checksum once.

A round goes once through all pairs each way, so that whatever else the machine does falls on all alike. The workers of
the others live on between rounds; ours are started in each, which is counted. Medians over the rounds, and ratios to
plain within each round.
A card for people, and one JSON line last.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from cytoclip import batches, cache, captions, cells, checkpoint, demo
from cytoclip.batches import Pictures, Texts
from cytoclip.console import Console
from cytoclip.order import Draw, Wording
from cytoclip.pairs import Pairs

SIZES = ((360, 363), (1024, 768))
BATCH = 64
CPU = torch.device("cpu")
SHAPE = demo.Shape(224, 32, 32, 1, 32, 1, 2, 16)  # only its processor and tokenizer are used
Way = Callable[[], Iterable[int]]


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> list[str]:
    """JPEGs of quality 90 in `imgs/`, and their captions."""
    (folder / "imgs").mkdir(parents=True)
    random, entries = np.random.default_rng(0), []
    drawn = list(cells.sample(16, 0, range(4)))
    for i in range(count):
        fields = [drawn[(i + k * 5) % len(drawn)].image.convert("RGB") for k in range(12)]
        field = Image.new("RGB", (512, 384))
        for k, tile in enumerate(fields):
            field.paste(tile, (k % 4 * 128, k // 4 * 128))
        field = field.resize(size, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
        noisy = np.asarray(field).astype(np.float32) + random.normal(0, 3, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "imgs" / f"{i:05}.jpg", quality=90)
        entries.append({"img": f"{i:05}.jpg", "caption": drawn[i % len(drawn)].caption})
    (folder / "img_text_pair.json").write_text(json.dumps(entries))
    return [entry["caption"] for entry in entries]


class Plain(Dataset[dict[str, torch.Tensor]]):
    """What most people write."""

    def __init__(self, pairs: Pairs, processor: Any) -> None:
        self.pairs, self.processor = pairs, processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        path = self.pairs.images[index]
        assert isinstance(path, Path)
        return processed(self.processor, Image.open(path).convert("RGB"), self.pairs.captions[index])


def processed(processor: Any, image: Image.Image, caption: str) -> dict[str, torch.Tensor]:
    found = processor(
        text=caption, images=image, return_tensors="pt", padding="max_length", truncation=True, max_length=77
    )
    return {name: value[0] for name, value in found.items()}


def plain(pairs: Pairs, processor: Any, workers: int) -> Way:
    """A persistent DataLoader, as trainers have it: its workers live on between the rounds."""
    loader = DataLoader(Plain(pairs, processor), BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    return lambda: (len(batch["pixel_values"]) for batch in loader)


def by_webdataset(pairs: Pairs, processor: Any, workers: int, folder: Path) -> Way:
    import webdataset

    shards = []
    for number in range(workers):
        shards.append(str(folder / f"{number}.tar"))
        with tarfile.open(shards[-1], "w") as shard:
            for i in range(number, len(pairs), workers):
                for ending, data in (("jpg", Path(pairs.images[i]).read_bytes()), ("txt", pairs.captions[i].encode())):
                    member = tarfile.TarInfo(f"{i:05}.{ending}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))

    def mapped(sample: tuple[Image.Image, str]) -> dict[str, torch.Tensor]:
        return processed(processor, *sample)

    read = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None)
    read = read.shuffle(64).decode("pilrgb").to_tuple("jpg", "txt").map(mapped)
    loader = DataLoader(read, BATCH, num_workers=workers, persistent_workers=True)
    return lambda: (len(batch["pixel_values"]) for batch in loader)


def ours(pictures: Pictures, texts: Texts, workers: int) -> Way:
    """A loader for each round: in training one goes on over all epochs, but would here decode while the others run."""
    count, random = len(pictures), np.random.default_rng(0)

    def epoch() -> Iterable[int]:
        rows = random.permutation(count).tolist()
        draws: list[list[Draw]] = [
            [(row, 0) for row in rows[begin : begin + BATCH]] for begin in range(0, count, BATCH)
        ]
        source = iter(batches.loader(pictures, texts, draws, workers, CPU))
        for _ in draws:
            yield len(batches.next_batch(source).images)

    return epoch


def ways(folder: Path, base: Path, workers: int) -> dict[str, Way]:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

    quiet = Console(quiet=True)
    pairs, opened = batches.open_split(folder, quiet), checkpoint.open_model(str(base))
    size = {"height": 224, "width": 224}
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=size), AutoTokenizer.from_pretrained(str(base))
    )
    tokens = captions.tokenise(opened.tokenizer, pairs.captions, opened.context, opened.encoder.family)
    texts, pictures = Texts(tokens, Wording.of(pairs, 0)), Pictures(pairs.images, opened.pixels)
    part = cache.Part(folder, pairs.contents, pictures)
    assert not cache.fill(part, workers, quiet)
    return {
        "plain": plain(pairs, processor, workers),
        "webdataset": by_webdataset(pairs, processor, workers, folder),
        "ours": ours(pictures, texts, workers),
        "ours, reduced": ours(Pictures(pairs.images, opened.pixels, reduced=True), texts, workers),
        "ours, cached": ours(pictures.kept_in(cache.opened(part)), texts, workers),
    }


def measure(found: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Pictures a second of each way in each round, after one that warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, way in found.items():
            began = time.perf_counter()
            count = sum(way())
            if number:
                speeds[name].append(count / (time.perf_counter() - began))
    return speeds


def report(size: tuple[int, int], kilobytes: float, speeds: dict[str, list[float]]) -> dict[str, Any]:
    print(f"\n{size[0]}×{size[1]}, {kilobytes:.0f} kB a file")
    rows = {}
    for name, each in speeds.items():
        ratios = [one / other for one, other in zip(each, speeds["plain"], strict=True)]
        rows[name] = {"pictures/s": round(statistics.median(each)), "times plain": round(statistics.median(ratios), 2)}
        low, high = min(ratios), max(ratios)
        print(f"  {name:<24} {rows[name]['pictures/s']:>7} pictures/s  {rows[name]['times plain']:>6} × plain "
              f"({low:.2f} to {high:.2f})")  # fmt: skip
    return {"size": f"{size[0]}x{size[1]}", "kB": round(kilobytes), **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    names = ("cytoclip", "torch", "transformers", "pillow", "numpy", "webdataset")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {given.workers} workers, Python {platform.python_version()}, "
          + ", ".join(f"{name} {version}" for name, version in versions.items()))  # fmt: skip
    results = []
    with tempfile.TemporaryDirectory() as place:
        for size in SIZES:
            folder, base = Path(place) / f"{size[0]}", Path(place) / f"base{size[0]}"
            said = write_pictures(folder, given.pairs, size)
            base.mkdir()
            demo.write_base(base, said, SHAPE, seed=0)
            files = list((folder / "imgs").iterdir())
            kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
            results.append(report(size, kilobytes, measure(ways(folder, base, given.workers), given.rounds)))
    print(json.dumps({"cores": os.cpu_count(), "workers": given.workers, "versions": versions, "results": results}))


if __name__ == "__main__":
    sys.exit(main())
