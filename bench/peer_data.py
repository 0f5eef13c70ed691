"""The same pictures, captions and starting weights for all that `bench/peers.py` compares."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from cytoclip import cells, demo

SIDE = (360, 363)  # width and height of the JPEGs, as those of WBCAtt
TOKENS = (40, 48)  # of a caption, its two ends among them, where nothing else is asked for
HELD_OUT = 16  # validation pairs, which only ours asks for


@dataclass(frozen=True)
class Shape:
    """A CLIP: (patch side, width, layers, heads) of the image tower, (width, layers, heads) of the text tower."""

    image: tuple[int, int, int, int]
    text: tuple[int, int, int]
    embedding: int
    side: int = 224


SHAPES = {
    "23M": Shape((16, 256, 10, 4), (256, 3, 4), 256),
    "B/32": Shape((32, 768, 12, 12), (512, 12, 8), 512),
    "B/16": Shape((16, 768, 12, 12), (512, 12, 8), 512),
    "L/14": Shape((14, 1024, 24, 16), (768, 12, 12), 768),
    "rehearsal": Shape((16, 64, 2, 2), (64, 2, 2), 64, side=64),
}


@dataclass(frozen=True)
class Place:
    """A folder with `data/` in our layout and one `models/NAME` for each shape."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def model(self, name: str) -> Path:
        return self.root / "models" / name.replace("/", "-")

    def pairs(self) -> tuple[list[str], list[str]]:
        """Paths and captions of the training pairs."""
        folder = self.data / "train"
        listed = json.loads((folder / demo.LIST_NAME).read_text())
        return [str(folder / "imgs" / entry["img"]) for entry in listed], [entry["caption"] for entry in listed]


def write(place: Place, pairs: int, names: list[str], tokens: Sequence[int] = TOKENS) -> None:
    """Draw the pairs, with captions of so many tokens, and save a starting model of each name."""
    said = [one.caption for one in cells.sample(64, 0, range(4))]
    drawn = [one.image.convert("RGB") for one in cells.sample(16, 0, range(4))]
    captions, tokenizer = _captions(said, pairs + HELD_OUT, tokens)
    for split, some in {"train": captions[:pairs], "val": captions[pairs:]}.items():
        folder = place.data / split
        (folder / "imgs").mkdir(parents=True)
        files = [f"{i:05}.jpg" for i in range(len(some))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # processes forked behind a tokenizer's threads can hang
            list(pool.map(_draw, [folder / "imgs" / file for file in files], range(len(files)), repeat(drawn)))
        entries = [{"img": file, "caption": caption} for file, caption in zip(files, some, strict=True)]
        (folder / demo.LIST_NAME).write_text(json.dumps(entries))
    for name in names:
        _write_model(place.model(name), SHAPES[name], tokenizer)


def _captions(said: list[str], count: int, tokens: Sequence[int]) -> tuple[list[str], Any]:
    """Sentences about cells, one after the other, cut at a word: each of as many tokens as any other number."""
    random = np.random.default_rng(0)
    long = [", ".join(said[i] for i in random.integers(len(said), size=8)) for _ in range(count)]
    tokenizer = demo.train_tokenizer(long)
    ends = tokenizer(long, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for text, end in zip(long, ends, strict=True):
        wanted = int(random.integers(tokens[0], tokens[1], endpoint=True))
        at = end[wanted - 2][1]  # where the last token that is still wanted ends, the first and the last left out
        found.append(text[: at if text[at : at + 1] in ("", " ") else text.rfind(" ", 0, at)])
    return found, tokenizer


def _draw(file: Path, number: int, drawn: list[Image.Image]) -> None:
    """A field of drawn cells, out of focus and with a sensor's noise: a JPEG as large as one of a photograph."""
    field = Image.new("RGB", (384, 384))
    for k in range(9):
        field.paste(drawn[(number + k * 5) % len(drawn)], (k % 3 * 128, k // 3 * 128))
    blurred = field.resize(SIDE, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    noisy = np.asarray(blurred).astype(np.float32) + np.random.default_rng(number).normal(0, 3, (SIDE[1], SIDE[0], 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, quality=90)


def _write_model(folder: Path, shape: Shape, tokenizer: Any) -> None:
    """Random weights with CLIP's vocabulary of 49,408 rows, of which the tokenizer knows the first thousand."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    patch, width, layers, heads = shape.image
    vision = {"image_size": shape.side, "patch_size": patch, "hidden_size": width, "num_hidden_layers": layers,
              "num_attention_heads": heads, "intermediate_size": 4 * width}  # fmt: skip
    width, layers, heads = shape.text
    text = {"vocab_size": 49408, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * width, "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.embedding)).save_pretrained(
        folder
    )
    size = {"height": shape.side, "width": shape.side}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": shape.side}, crop_size=size), tokenizer).save_pretrained(
        folder
    )
