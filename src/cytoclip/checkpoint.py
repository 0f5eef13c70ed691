"""The run folder: where things are in it, and models that others can open.

run/config.yaml  results.json  losses.jsonl  curves.jsonl  validations.jsonl  train.log  tensorboard/  report.html
run/model/                     the last weights: a Hugging Face folder, or a peft adapter
run/best/                      the same at the best validation
run/embeddings/                of the held-out splits, by the starting model and by best/ (embeddings.py)
run/checkpoints/step-N/        what a run resumes from (state.py)
run/soup/                      a model mixed from those above (soup.py)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cytoclip import adapters, files, from_open_clip, model
from cytoclip.captions import pad_of
from cytoclip.config import Config, Model
from cytoclip.config import load as load_config
from cytoclip.errors import ExitCode, UserError, neighbour
from cytoclip.model import DualEncoder
from cytoclip.pixels import PixelSpec, to_floats

BESIDE = "cytoclip.safetensors"  # projections and logit scale, beside a peft adapter
CROP = "cytoclip_crop.json"  # the crop policy: transformers' file cannot say pad, and an adapter's base has its own


@dataclass(frozen=True)
class RunFolder:
    """The names in a run folder."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    model = property(lambda self: self.path / "model")
    best = property(lambda self: self.path / "best")
    results = property(lambda self: self.path / "results.json")
    losses = property(lambda self: self.path / "losses.jsonl")
    curves = property(lambda self: self.path / "curves.jsonl")
    validations = property(lambda self: self.path / "validations.jsonl")
    embeddings = property(lambda self: self.path / "embeddings")
    report = property(lambda self: self.path / "report.html")
    soup = property(lambda self: self.path / "soup")
    varied = property(lambda self: self.path / "varied.png")
    log = property(lambda self: self.path / "train.log")
    lock = property(lambda self: self.path / ".lock")
    checkpoints = property(lambda self: self.path / "checkpoints")


@dataclass(frozen=True)
class Opened:
    """A model ready to encode, with what reads its input.

    Parameters
    ----------
    name
        The hub id or absolute folder that it came from.
    plain
        Whether plain transformers opens `name`: only then can an adapter name it as its base.
    stretched
        Whether the text tower reads more tokens than the checkpoint's own.
    crop
        The policy of `data.crop` that it was given, or saved with.
    """

    encoder: DualEncoder
    tokenizer: Any
    image_processor: Any
    pixels: PixelSpec
    context: int
    name: str
    plain: bool
    stretched: bool = False
    crop: str = "auto"

    def digest(self, *further: str) -> str:
        """SHA-256 of what decides an embedding: the weights, how pictures and texts are read, and what is named."""
        return model.digest_of(self.encoder.clip, self.tokenizer, self.pixels, self.context, *further)


def open_model(name: str, context_length: int | None = None) -> Opened:
    """Open a hub id, a Hugging Face folder, a peft adapter folder of ours, a run folder (its best weights), or a
    checkpoint of open_clip (a folder, or `hf-hub:` before the id).

    With `context_length` the text tower of a CLIP is made to read that many tokens.
    """
    opened = _open(name)
    if context_length is None or context_length == opened.context:
        return opened
    read = model.Checkpoint(opened.encoder.clip, opened.tokenizer, opened.image_processor)
    model.stretch_context(read, context_length, opened.name)
    # not plain: an adapter beside the base would lose the stretch
    return replace(opened, context=read.context, plain=False, stretched=True)


def open_start(wanted: Config) -> Opened:
    """The starting model of a run, as training reads it."""
    return with_crop(open_model(wanted.model.name, wanted.model.context_length), wanted.data.crop)


def with_crop(opened: Opened, crop: str) -> Opened:
    """The same model reading pictures by a policy of `data.crop`; auto leaves it as it was opened.

    Its image processor says the same, so that plain transformers does too; for pad, which it cannot say, center.
    """
    if crop == "auto":
        return opened
    said = opened.pixels.fitted("center" if crop == "pad" else crop)
    processor = copy.deepcopy(opened.image_processor)
    processor.do_resize, processor.do_center_crop = True, said.crop is not None
    if said.crop is not None:
        processor.size = {"shortest_edge": said.resize}
        processor.crop_size = dict(zip(("height", "width"), said.crop, strict=True))
    else:
        processor.size = dict(zip(("height", "width"), said.size, strict=True))
    return replace(opened, pixels=opened.pixels.fitted(crop), image_processor=processor, crop=crop)


def _open(name: str) -> Opened:
    place = locate(name)
    opened = _read(place, name)
    if not (Path(place) / CROP).is_file():
        return opened
    try:
        return with_crop(opened, str(files.read_json(Path(place) / CROP)["crop"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{Path(place) / CROP} cannot be read: {error}", "train it again", ExitCode.MODEL) from None


def _read(place: str, name: str) -> Opened:
    folder = Path(place)
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        read = model.read(place)
        if from_open_clip.is_one(name):
            called = name if name.startswith(from_open_clip.HUB) else str(Path(name).resolve())
            return _opened(read, read.clip, called, plain=False)
        return _opened(read, read.clip, place, plain=run_of(name) is None)  # a run's weights may change under its name
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / BESIDE).is_file():
        raise UserError(
            f"{folder} has an adapter but not both of adapter_model.safetensors and {BESIDE}",
            "name the model/ or best/ folder that cytoclip train wrote, whole",
            ExitCode.MODEL,
        )
    try:
        base = str(files.read_json(adapter)["base_model_name_or_path"])
        beside = load_file(folder / BESIDE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be read: {type(error).__name__}: {error}", "train it again", ExitCode.MODEL
        ) from None
    read = model.read(base)
    clip: Any = adapters.read_adapter(folder, read.clip)
    expected = adapters.beside_adapter(clip, read.family)
    if {n: t.shape for n, t in beside.items()} != {n: t.shape for n, t in expected.items()}:
        raise UserError(
            f"{folder / BESIDE} does not fit {base}: it holds {', '.join(sorted(beside))}",
            "train it again, from the base that is there now",
            ExitCode.MODEL,
        )
    clip.load_state_dict(beside, strict=False)
    return _opened(read, clip, place, plain=False)


def locate(name: str) -> str:
    """The folder or hub id that `name` means: a run folder its `best/`, or `model/` before the first one; a checkpoint
    of open_clip what was made of it.
    """
    folder = Path(name)
    run = RunFolder(folder)
    if from_open_clip.is_one(name):
        return str(from_open_clip.converted(name))
    if not folder.is_dir():
        _refuse_slip(name)
        return name
    if run.config.is_file():
        for inner in (run.best, files.old(run.best), run.model):  # old: while its writer exchanges the two
            if inner.is_dir():
                return str(inner.resolve())
        raise _without_model(run)
    if not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json, open_clip_config.json or a run's "
            "config.yaml",
            "name a Hugging Face folder, a run folder, or a hub id",
            ExitCode.MODEL,
        )
    return str(folder.resolve())


def _without_model(run: RunFolder) -> UserError:
    wanted = load_config(run.config)
    first = min(wanted.validation.every, wanted.train.steps or wanted.validation.every)
    return UserError(
        f"{run.path} is a run folder without a saved model yet: models are saved at validations, the first of which "
        f"comes at step {first:,}, or at the end of a shorter run",
        f"`cytoclip train {run.config}` goes on; in a new run validate.every=N brings it sooner",
        ExitCode.MODEL,
    )


def _refuse_slip(name: str) -> None:
    """Raise `UserError` for a path that is not there, rather than look for it on the hub: runs/frist, a/b/c, ./here."""
    near = neighbour(Path(name))
    is_path = name.startswith((".", "~")) or name.count("/") > 1
    if is_path or (near is not None and run_of(str(near)) is not None):
        hint = f"did you mean {near}?" if near else "give a hub id (owner/name), a Hugging Face folder or a run folder"
        raise UserError(f"no such folder: {name}", hint, ExitCode.MODEL)


def run_of(name: str) -> RunFolder | None:
    """The run folder that `name` is, or whose `model/`, `best/` or `soup/model/` it is."""
    beside = Path(name).absolute().parent
    for folder in (Path(name), beside, *([beside.parent] if beside == RunFolder(beside.parent).soup else [])):
        if RunFolder(folder).config.is_file():
            return RunFolder(folder)
    return None


def is_adapter_only(wanted: Model, opened: Opened) -> bool:
    """Whether a peft folder beside a plain base holds everything that trains."""
    towers = {wanted.image_tower, wanted.text_tower}
    return opened.plain and "lora" in towers and "full" not in towers


def save_model(folder: Path, opened: Opened, adapter: PeftModel | None, wanted: Model) -> None:
    """Write a model that plain transformers (or peft) opens, whole or not at all."""
    with files.whole_folder(folder) as new:
        fill(new, opened, adapter, wanted)


def fill(folder: Path, opened: Opened, adapter: PeftModel | None = None, wanted: Model | None = None) -> None:
    """The same into a folder that is there; whole weights, unless an adapter can stand for them."""
    clip = opened.encoder.clip
    if adapter is not None and wanted is not None and is_adapter_only(wanted, opened):
        adapter.peft_config["default"].base_model_name_or_path = opened.name
        adapter.save_pretrained(str(folder), save_embedding_layers=False)  # or it asks the hub each time
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
        save_file(adapters.beside_adapter(clip, opened.encoder.family), folder / BESIDE)
    else:
        clip.save_pretrained(str(folder), state_dict=adapters.merged_state(clip))
    fill_reading(folder, opened)


def fill_reading(folder: Path, opened: Opened) -> None:
    """What reads pictures and texts, beside weights of any kind."""
    opened.tokenizer.save_pretrained(str(folder))
    opened.image_processor.save_pretrained(str(folder))
    write_crop(folder, opened)


def write_crop(folder: Path, opened: Opened) -> None:
    """The crop policy, where it is not the checkpoint's own."""
    if opened.crop != "auto":
        files.write_json(folder / CROP, {"crop": opened.crop})


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights in a model folder; of nothing where there is none."""
    return " ".join(files.sha256(file) for file in sorted(folder.glob("*.safetensors")))


def _opened(read: model.Checkpoint, clip: Any, place: str, plain: bool) -> Opened:
    pixels = PixelSpec.from_processor(read.image_processor)
    if read.family.fixed_size and pixels.size != (read.image_size, read.image_size):
        raise UserError(
            f"{place}: its image processor makes {pixels.size} pixels but its image tower reads {read.image_size}",
            "set size and crop_size in preprocessor_config.json to the model's image_size",
            ExitCode.MODEL,
        )
    encoder = DualEncoder(clip, lambda pixels_B3HW: to_floats(pixels_B3HW, pixels), pad_of(read.tokenizer), pixels.size)
    _try_blank_pair(encoder, read.tokenizer, place)
    return Opened(encoder, read.tokenizer, read.image_processor, pixels, read.context, place, plain)


@torch.no_grad()
def _try_blank_pair(encoder: DualEncoder, tokenizer: Any, place: str) -> None:
    """Any two towers may have been joined, and SigLIP saved without its head: what gives no vectors is refused here."""
    was_training = encoder.training
    encoder.eval()
    try:
        pixels = torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)
        embedded = encoder(pixels, torch.tensor([tokenizer("a")["input_ids"]]))
        problem = "" if all(side.shape == (1, encoder.width) for side in embedded) else "its towers do not pool"
    except Exception as error:  # whatever the two models say to it
        problem = " ".join(str(error).split())[:160] or type(error).__name__
    finally:
        encoder.train(was_training)
    if problem:
        raise UserError(
            f"{place}: one blank picture of {encoder.image_size} pixels and one caption do not pass: {problem}",
            "join towers of transformers that have a pooler_output, with an image processor of a size that they take",
            ExitCode.MODEL,
        )
