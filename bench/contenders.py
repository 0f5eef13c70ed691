"""One process that trains in one of the ways that `bench/peers.py` compares, and stops where it is told to.

Each way is a whole training run from JPEG files to optimizer steps, with the loader and loop that its users have; the
only thing put in is a gate (`bench/peer_gate.py`) after each optimizer step.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before anything imports huggingface_hub

import torch
from peer_gate import Gate, Task, serve
from PIL import Image
from torch.utils.data import DataLoader, Dataset

RATE, WARM_UP = 1e-5, 100  # learning rate and warm-up steps, of all
ROWS = 250_000  # to which the list of pairs is repeated for those who start a loader anew in each epoch


def ours(task: Task, gate: Gate, cache: bool = False, chunks: bool = False, compiled: bool = False) -> None:
    """`training.fit`; the gate stands behind its step."""
    from cytoclip import config, training
    from cytoclip.console import Console

    step = training._step

    def gated(*given: Any) -> Any:
        done = step(*given)
        gate()
        return done

    training._step = gated
    never = 10**6
    share = {"micro_batch_size": task.chunk} if chunks else {}
    wanted = config.made(
        {
            "data": {"root": str(task.here.data), "workers": task.workers, "cache": cache},
            "model": {"name": str(task.here.model(task.model))},
            "train": {"steps": never, "batch_size": task.batch, "learning_rate": RATE, "warmup_steps": WARM_UP,
                      "precision": task.precision, "device": task.device, "compile": compiled, **share},
            "validate": {"every": never, "ks": [1]},
            "checkpoint": {"every": never},
            "track": {"to": []},
            "output": str(_fresh(task, "ours")),
        }
    )  # fmt: skip
    if cache:
        _fill_cache(task)
    try:
        training.fit(wanted, Console(quiet=True))
    finally:
        training._step = step


def _fill_cache(task: Task) -> None:
    """What `cytoclip check --cache` does, so that no segment is of the first epoch."""
    from cytoclip import batches, cache, checkpoint
    from cytoclip.console import Console
    from cytoclip.pictures import Pictures

    quiet, spec = Console(quiet=True), checkpoint.open_model(str(task.here.model(task.model))).pixels
    for split in ("train", "val"):
        pairs = batches.open_split(task.here.data / split, quiet)
        bad = cache.fill(cache.Part(task.here.data / split, pairs.contents, Pictures(pairs.images, spec)),
                         max(1, task.workers), quiet)  # fmt: skip
        assert not bad


def original(task: Task, gate: Gate) -> None:
    """The original's way: a processor for each pair, captions padded to 77, transformers' loss, AdamW, accelerate."""
    from accelerate import Accelerator
    from transformers import CLIPModel, get_constant_schedule_with_warmup

    accelerator = Accelerator(mixed_precision=task.precision, cpu=task.device == "cpu")
    processor, (files, captions) = processor_of(task), task.here.pairs()
    loader = DataLoader(Pairs(files, captions, processor), task.batch, shuffle=True, num_workers=task.workers,
                        pin_memory=task.device == "cuda")  # fmt: skip
    model = CLIPModel.from_pretrained(task.here.model(task.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = get_constant_schedule_with_warmup(optimizer, WARM_UP)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    while True:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch, return_loss=True).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            gate()


class Pairs(Dataset[dict[str, torch.Tensor]]):
    """Files and captions, through the transformers processor one pair at a time."""

    def __init__(self, files: list[str], captions: list[str], processor: Any) -> None:
        self.files, self.captions, self.processor = files, captions, processor

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index %= len(self.files)
        image = Image.open(self.files[index]).convert("RGB")
        found = self.processor(text=self.captions[index], images=image, return_tensors="pt", padding="max_length",
                               truncation=True, max_length=77)  # fmt: skip
        return {name: value[0] for name, value in found.items()}


def trainer(task: Task, gate: Gate, **options: Any) -> None:
    """transformers' Trainer in the way of its contrastive image-text example.

    Captions are tokenised once, padded to the longest that is allowed; pictures are transformed one at a time, by
    torchvision where it is there, else by the checkpoint's processor. Everything else is the Trainer's own choice.
    """
    from transformers import CLIPModel, Trainer, TrainingArguments

    processor, (files, captions) = processor_of(task), task.here.pairs()
    tokens = processor.tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    arguments = TrainingArguments(
        output_dir=str(_fresh(task, "trainer")),
        remove_unused_columns=False,
        **_trainer_arguments(task),
        **options,
    )
    model = CLIPModel.from_pretrained(task.here.model(task.model))
    Trainer(
        model=model,
        args=arguments,
        train_dataset=Tokenised(files, tokens, transform_of(task)),
        data_collator=collate,
        callbacks=[callback(gate)],
    ).train()


class Tokenised(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, files: list[str], tokens: Any, transform: Callable[[str], torch.Tensor]) -> None:
        self.files, self.tokens, self.transform = files, tokens, transform

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index %= len(self.files)
        row = {name: self.tokens[name][index] for name in ("input_ids", "attention_mask")}
        return {"pixel_values": self.transform(self.files[index]), **row}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, "return_loss": True}


def sentence_transformers(task: Task, gate: Gate, cached: bool = False) -> None:
    """sentence-transformers' trainer on the same CLIP, (image, caption) pairs; its loss, or the one in chunks."""
    from datasets import Dataset as Table
    from datasets import Image as Picture
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

    files, captions = task.here.pairs()
    times = -(-ROWS // len(files))
    pairs = Table.from_dict({"image": files * times, "caption": captions * times}).cast_column("image", Picture())
    model = SentenceTransformer(str(task.here.model(task.model)), device=task.device)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(_fresh(task, "st")),
        **_trainer_arguments(task),
    )
    loss = MultipleNegativesRankingLoss(model)
    if cached:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=task.chunk)
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=loss, callbacks=[callback(gate)]
    ).train()


def open_clip(task: Task, gate: Gate, compiled: bool = False) -> None:
    """open_clip's own loop, `open_clip_train.train.train_one_epoch`, on its own model of the same shape."""
    import open_clip as library
    from open_clip.transform import image_transform
    from open_clip_train.data import CsvDataset
    from open_clip_train.train import train_one_epoch

    device = torch.device(task.device)
    files, captions = task.here.pairs()
    table = _fresh(task, "open_clip").with_suffix(".tsv")
    rows = "".join(f"{file}\t{caption}\n" for file, caption in zip(files, captions, strict=True))
    table.write_text("filepath\ttitle\n" + rows * -(-ROWS // len(files)))
    tokenizer = processor_of(task).tokenizer
    vision, text, width = _open_clip_shape(task)

    def tokenise(said: list[str]) -> torch.Tensor:
        rows: torch.Tensor = tokenizer(said, padding="max_length", truncation=True, max_length=77,
                                       return_tensors="pt")["input_ids"]  # fmt: skip
        return rows

    data = CsvDataset(str(table), image_transform(vision["image_size"], is_train=True), "filepath", "title",
                      tokenizer=tokenise)  # fmt: skip
    loader: Any = DataLoader(data, batch_size=task.batch, shuffle=True, num_workers=task.workers, pin_memory=True,
                             drop_last=True)  # fmt: skip
    loader.num_samples, loader.num_batches = len(data), len(loader)
    model: Any = library.CLIP(width, vision, text, output_dict=True).to(device)
    rest = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.2}],
                                  lr=RATE, betas=(0.9, 0.98), eps=1e-6)  # fmt: skip
    steps = iter(range(10**9))

    def schedule(_: int) -> None:
        """Called before each step; the gate belongs behind the step before."""
        if next(steps):
            gate()

    precision = "amp_bf16" if task.precision == "bf16" else "fp32"
    asked = {"device": task.device, "precision": precision, "distill": False, "accum_freq": 1, "horovod": False,
             "skip_scheduler": False, "grad_clip_norm": 1.0, "rank": 0, "local_rank": 0, "log_every_n_steps": 100,
             "log_local": False, "batch_size": task.batch, "world_size": 1, "wandb": False}  # fmt: skip
    train_one_epoch(
        torch.compile(model) if compiled else model,
        {"train": _Data(loader)},
        library.ClipLoss(local_loss=True, gather_with_grad=True),
        0,
        optimizer,
        None,
        schedule,
        None,
        _Named(asked),
    )


class _Data:
    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader

    def set_epoch(self, epoch: int) -> None:
        """Nothing: one process."""


class _Named:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _open_clip_shape(task: Task) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The same shape in open_clip's words, quick GELU as in transformers' CLIP left to it: its own default is GELU."""
    from transformers import CLIPConfig

    found = CLIPConfig.from_pretrained(task.here.model(task.model))
    vision, text = found.vision_config, found.text_config
    return (
        {"layers": vision.num_hidden_layers, "width": vision.hidden_size, "patch_size": vision.patch_size,
         "head_width": vision.hidden_size // vision.num_attention_heads, "image_size": vision.image_size},
        {"context_length": 77, "vocab_size": text.vocab_size, "width": text.hidden_size,
         "heads": text.num_attention_heads, "layers": text.num_hidden_layers},
        found.projection_dim,
    )  # fmt: skip


def processor_of(task: Task) -> Any:
    from transformers import CLIPProcessor

    return CLIPProcessor.from_pretrained(task.here.model(task.model))


def transform_of(task: Task) -> Callable[[str], torch.Tensor]:
    """From a file to what the tower reads, as the contrastive example has it where torchvision is there."""
    images = processor_of(task).image_processor
    try:
        from torchvision.io import ImageReadMode, read_image
        from torchvision.transforms import CenterCrop, ConvertImageDtype, InterpolationMode, Normalize, Resize
    except (ImportError, RuntimeError):

        def by_processor(file: str) -> torch.Tensor:
            pixels: torch.Tensor = images(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"][0]
            return pixels

        return by_processor
    side = images.crop_size["height"]
    steps = torch.nn.Sequential(
        Resize([side], interpolation=InterpolationMode.BICUBIC, antialias=True),
        CenterCrop(side),
        ConvertImageDtype(torch.float),
        Normalize(images.image_mean, images.image_std),
    )

    def by_torchvision(file: str) -> torch.Tensor:
        with torch.no_grad():
            pixels: torch.Tensor = steps(read_image(file, mode=ImageReadMode.RGB))
        return pixels

    return by_torchvision


def callback(gate: Gate) -> Any:
    from transformers import TrainerCallback

    class Behind(TrainerCallback):  # type: ignore[misc]  # the trainer wants a subclass
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate()

    return Behind()


def _trainer_arguments(task: Task) -> dict[str, Any]:
    """What both trainers are told: the same batches, rate and precision, no reports, no checkpoints."""
    return {
        "per_device_train_batch_size": task.batch,
        "dataloader_num_workers": task.workers,
        "dataloader_drop_last": True,
        "learning_rate": RATE,
        "warmup_steps": WARM_UP,
        "bf16": task.precision == "bf16",
        "use_cpu": task.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 500,
        "disable_tqdm": True,
        "num_train_epochs": 100.0,
    }


def _fresh(task: Task, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=task.place)) / "run"


WAYS: dict[str, Callable[[Task, Gate], None]] = {
    "ours": ours,
    "ours, compiled": lambda task, gate: ours(task, gate, compiled=True),
    "ours, cached pictures": lambda task, gate: ours(task, gate, cache=True),
    "ours, cached and compiled": lambda task, gate: ours(task, gate, cache=True, compiled=True),
    "ours, in chunks": lambda task, gate: ours(task, gate, chunks=True),
    "the original's way": original,
    "transformers Trainer": trainer,
    "transformers Trainer, compiled": lambda task, gate: trainer(task, gate, torch_compile=True),
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, cached loss": lambda task, gate: sentence_transformers(task, gate, cached=True),
    "open_clip": open_clip,
    "open_clip, compiled": lambda task, gate: open_clip(task, gate, compiled=True),
}


if __name__ == "__main__":
    serve(WAYS[sys.argv[1]])
