"""The embedded default: a drawn sample set, a small CLIP with random weights, and the YAML that joins them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from cytoclip import cells, files
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.sources import LIST_NAME

Entry = dict[str, str]

TRAIN_SLIDES, TRAIN_PER_SLIDE = range(10), 300
VAL_SLIDES, VAL_PER_SLIDE = range(10, 13), 120
VAL_PAIRS = 300  # all with different captions


@dataclass(frozen=True)
class Shape:
    """The size of a small CLIP; the demo's has about 1.3 million weights."""

    image_size: int = 64
    patch_size: int = 8
    image_width: int = 128
    image_layers: int = 4
    text_width: int = 128
    text_layers: int = 2
    heads: int = 2
    embedding: int = 128


def prepare(folder: Path, seed: int, console: Console) -> Path:
    """Fill `folder` with `data/`, `base/` and `demo.yaml`, and return the path of the YAML.

    What is there already from an earlier call is kept, so a demo that was stopped goes on.
    """
    places = {  # in JSON's quotes, which are YAML's: a folder may be called `my, demo`
        name: json.dumps(f"{folder.as_posix()}/{name}", ensure_ascii=False) for name in ("data", "base", "run")
    }
    recipe, text = folder / "demo.yaml", _RECIPE.format(seed=seed, **places)
    if recipe.is_file() and recipe.read_text(encoding="utf-8") != text:
        raise UserError(f"{folder} holds another demo", "name another folder with --to, or delete it", ExitCode.RUN)
    files.write_text(recipe, text)
    if not (folder / "data").is_dir():
        with files.whole_folder(folder / "data") as new:
            write_data(new, seed, console)
    if not (folder / "base").is_dir():
        listed = json.loads((folder / "data" / "train" / LIST_NAME).read_text(encoding="utf-8"))
        with files.whole_folder(folder / "base") as new:
            write_base(new, [entry["caption"] for entry in listed], Shape(), seed)
    return recipe


def write_data(root: Path, seed: int, console: Console) -> None:
    """Draw the sample set in the layout of the original project: slides of val are never in train."""
    lists: dict[str, list[Entry]] = {"train": [], "val": []}
    for split in lists:
        (root / split / "imgs").mkdir(parents=True)
    work = [("train", slide, TRAIN_PER_SLIDE) for slide in TRAIN_SLIDES]
    work += [("val", slide, VAL_PER_SLIDE) for slide in VAL_SLIDES]
    with (
        console.progress("drawing cells", sum(count for *_, count in work)) as bar,
        ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
    ):
        drawn = pool.map(
            _draw_slide, *zip(*((root / split, slide, count, seed) for split, slide, count in work), strict=True)
        )
        for (split, _, count), entries in zip(work, drawn, strict=True):
            lists[split] += entries
            bar.advance(count)
    lists["val"] = _different_captions(lists["val"], VAL_PAIRS, root / "val" / "imgs")
    for split, entries in lists.items():
        files.write_json(root / split / LIST_NAME, entries)


def write_base(folder: Path, captions: Iterable[str], shape: Shape, seed: int) -> None:
    """A Hugging Face folder: a CLIP with random weights, its image processor, a tokenizer trained on `captions`."""
    transformers_logging.disable_progress_bar()
    tokenizer = train_tokenizer(captions)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 77,
        **ends,
    }
    vision = {
        "image_size": shape.image_size,
        "patch_size": shape.patch_size,
        "hidden_size": shape.image_width,
        "intermediate_size": 4 * shape.image_width,
        "num_hidden_layers": shape.image_layers,
        "num_attention_heads": shape.heads,
    }
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.embedding)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    side = shape.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )


def train_tokenizer(captions: Iterable[str], size: int = 1000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `<end>` comes last, so both ways in which CLIP text towers pool find it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=size,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<pad>"],
        ),
    )
    tokenizer.add_special_tokens(["<start>", "<end>"])
    start, end = tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<end>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<start>",  # noqa: S106
        eos_token="<end>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        model_max_length=77,
    )


def _draw_slide(split: Path, slide: int, count: int, seed: int) -> list[Entry]:
    entries = []
    for i, one in enumerate(cells.sample(count, seed, range(slide, slide + 1))):
        name = f"{one.source}/{i:04}.jpg"
        file = split / "imgs" / name
        file.parent.mkdir(exist_ok=True)
        one.image.save(file, quality=92)
        entries.append({"img": name, "caption": one.caption, "source": one.source, "label": one.label})
    return entries


def _different_captions(entries: list[Entry], count: int, imgs: Path) -> list[Entry]:
    """The first entry of each caption, `count` of them spread evenly; the pictures of the others are deleted."""
    first = list({entry["caption"]: entry for entry in reversed(entries)}.values())
    kept = sorted(first[:: max(1, len(first) // count)][:count], key=lambda entry: entry["img"])
    names = {entry["img"] for entry in kept}
    for entry in entries:
        if entry["img"] not in names:
            (imgs / entry["img"]).unlink()
    return kept


_RECIPE = """\
# The demo: a small CLIP from scratch on the drawn sample set. `cytoclip demo` wrote this file and trained on it;
# `cytoclip train` on it, from the same folder and with another output=, does that again.
data: {{root: {data}}}
model: {{name: {base}}}
train:
  steps: 200
  batch_size: 128
  learning_rate: 1.0e-3
  weight_decay: 0.05
  schedule: cosine
  warmup_steps: 20
  seed: {seed}
validate: {{every: 100, ks: [1, 5, 10]}}
checkpoint: {{every: 100}}
output: {run}
"""
