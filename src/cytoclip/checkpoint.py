"""The run folder: where things are in it, models that others can open, and the state that a run resumes from.

run/config.yaml  results.json  losses.jsonl  train.log  tensorboard/
run/model/                     the last weights: a Hugging Face folder, or a peft adapter
run/best/                      the same at the best validation
run/checkpoints/step-N/        state.safetensors (what moves, AdamW's moments, random states), state.json
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cytoclip import adapters, files, images, model, towers
from cytoclip.config import Model
from cytoclip.device import RandomState, World
from cytoclip.errors import ExitCode, UserError
from cytoclip.images import PixelSpec
from cytoclip.model import DualEncoder

BESIDE = "cytoclip.safetensors"  # projections and logit scale, beside a peft adapter


@dataclass(frozen=True)
class RunFolder:
    """The names in a run folder."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    model = property(lambda self: self.path / "model")
    best = property(lambda self: self.path / "best")
    results = property(lambda self: self.path / "results.json")
    losses = property(lambda self: self.path / "losses.jsonl")
    log = property(lambda self: self.path / "train.log")
    lock = property(lambda self: self.path / ".lock")
    checkpoints = property(lambda self: self.path / "checkpoints")

    def states(self) -> list[tuple[int, Path]]:
        """(step, folder) of every whole checkpoint, the oldest first."""
        found = [(int(m[1]), p) for p in self.checkpoints.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
        return sorted(found)


@dataclass(frozen=True)
class Opened:
    """A model ready to encode, with what reads its input.

    Parameters
    ----------
    name
        The hub id or absolute folder that it came from.
    plain
        Whether plain transformers opens `name` as it is here: only then can an adapter name it as its base.
    context
        Tokens of a caption at most.
    stretched
        Whether `model.context_length` made that more than the checkpoint's own.
    """

    encoder: DualEncoder
    tokenizer: Any
    image_processor: Any
    pixels: PixelSpec
    context: int
    name: str
    plain: bool
    stretched: bool = False


def open_model(name: str, context_length: int | None = None) -> Opened:
    """Open a hub id, a Hugging Face folder, a peft adapter folder of ours, or a run folder (its best weights).

    Parameters
    ----------
    context_length
        Tokens that the text tower shall read, above the checkpoint's own; see `towers.stretch_context`.

    Raises
    ------
    UserError
        For what cannot be opened, or not be made longer.
    """
    place = locate(name)
    folder = Path(place)
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        read = model.read(place)
        plain = run_of(name) is None  # a run's weights may change under its name
        return _opened(read, place, plain, context_length)
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
    return _opened(replace(read, clip=clip), place, False, context_length)


def locate(name: str) -> str:
    """The folder or hub id that `name` means; a run folder means its `best/`, or `model/` before the first one."""
    folder = Path(name)
    run = RunFolder(folder)
    if not folder.is_dir():
        return name
    if run.config.is_file():
        for inner in (run.best, files.old(run.best), run.model):  # old: while its writer exchanges the two
            if inner.is_dir():
                return str(inner.resolve())
        raise UserError(
            f"{folder} is a run folder without a saved model yet",
            f"run `cytoclip train {run.config}` to its first checkpoint",
            ExitCode.MODEL,
        )
    if not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        raise UserError(
            f"{folder} holds no model: neither config.json nor adapter_config.json nor a run's config.yaml",
            "name a Hugging Face folder, a run folder, or a hub id",
            ExitCode.MODEL,
        )
    return str(folder.resolve())


def run_of(name: str) -> RunFolder | None:
    """The run folder that `name` is, or whose `model/` or `best/` it is."""
    for folder in (Path(name), Path(name).absolute().parent):
        if RunFolder(folder).config.is_file():
            return RunFolder(folder)
    return None


def is_adapter_only(wanted: Model, opened: Opened) -> bool:
    """Whether a peft folder beside a plain base holds everything that trains."""
    towers = {wanted.image_tower, wanted.text_tower}
    return opened.plain and "lora" in towers and "full" not in towers


def save_model(folder: Path, opened: Opened, adapter: PeftModel | None, wanted: Model) -> None:
    """Write a model that plain transformers (or peft) opens, whole or not at all."""
    clip = opened.encoder.clip
    with files.whole_folder(folder) as new:
        if adapter is not None and is_adapter_only(wanted, opened):
            adapter.peft_config["default"].base_model_name_or_path = opened.name
            adapter.save_pretrained(str(new), save_embedding_layers=False)  # or it asks the hub each time
            (new / "README.md").unlink(missing_ok=True)  # peft's empty template
            save_file(adapters.beside_adapter(clip, opened.encoder.family), new / BESIDE)
        else:
            clip.save_pretrained(str(new), state_dict=adapters.merged_state(clip))
        opened.tokenizer.save_pretrained(str(new))
        opened.image_processor.save_pretrained(str(new))


def save_state(
    run: RunFolder, step: int, encoder: DualEncoder, optimizer: Any, world: World, more: dict[str, Any]
) -> None:
    """Write `checkpoints/step-N` and then drop the older ones. Called in all processes; the first one writes.

    Parameters
    ----------
    step
        How many steps are done.
    more
        What else the run must remember, as JSON.
    """
    tensors = _random_states(world)
    if not world.first:
        return
    for name, parameter in encoder.moving().items():
        tensors[f"param.{name}"] = parameter.detach().cpu()
        tensors |= {f"optim.{key}.{name}": value.cpu() for key, value in optimizer.state[parameter].items()}
    with files.whole_folder(run.checkpoints / f"step-{step}") as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / "state.safetensors")
        files.write_json(new / "state.json", {"step": step, **more})
    for folder in run.checkpoints.iterdir():  # the older ones, and what a crash left of one
        if folder.name != f"step-{step}":
            files.remove(folder)


def load_state(folder: Path, encoder: DualEncoder, optimizer: Any, world: World) -> dict[str, Any]:
    """Put weights, moments and random states back, and return what `save_state` was told to remember."""
    try:
        tensors = load_file(folder / "state.safetensors")
        more: dict[str, Any] = files.read_json(folder / "state.json")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read: {error}", "delete that folder to start over", ExitCode.RUN
        ) from None
    moving = encoder.moving()
    saved = {name.removeprefix("param.") for name in tensors if name.startswith("param.")}
    if saved != set(moving):
        raise UserError(
            f"the checkpoint {folder} holds other parameters than this model trains",
            "delete that folder to start over, or name another output",
            ExitCode.RUN,
        )
    with torch.no_grad():
        for name, parameter in moving.items():
            parameter.copy_(tensors[f"param.{name}"])
            optimizer.state[parameter] = {
                key: _moment(parameter, key, tensors[f"optim.{key}.{name}"])
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    _set_random_states(tensors, world)
    return more


def _opened(read: model.Checkpoint, place: str, plain: bool, context_length: int | None) -> Opened:
    pixels = PixelSpec.from_processor(read.image_processor)
    if read.image_size and pixels.size != (read.image_size, read.image_size):
        raise UserError(
            f"{place}: its image processor makes {pixels.size} pixels but its image tower reads {read.image_size}",
            "set size and crop_size in preprocessor_config.json to the model's image_size",
            ExitCode.MODEL,
        )
    stretched = context_length is not None and towers.stretch_context(read, context_length)
    encoder = DualEncoder(read.clip, partial(images.to_floats, spec=pixels), pixels.size, read.tokenizer.pad_token_id)
    tokens_1L = torch.tensor(read.tokenizer(["a"], truncation=True, max_length=read.context)["input_ids"])
    towers.check_pair(place, encoder, tokens_1L, pixels.size)
    return Opened(
        encoder=encoder,
        tokenizer=read.tokenizer,
        image_processor=read.image_processor,
        pixels=pixels,
        context=read.context,
        name=place,
        plain=plain and not stretched,
        stretched=stretched,
    )


def _moment(parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """Where AdamW wants it: the step counter beside the parameter only for the fused kernel on CUDA."""
    here = key == "step" and parameter.device.type != "cuda"
    return value.clone() if here else value.to(parameter.device, copy=True)


def _random_states(world: World) -> dict[str, torch.Tensor]:
    states = {kind: state for kind, state in vars(RandomState.of(world.device)).items() if state is not None}
    gathered = {kind: world.gather(state[None].to(world.device)).cpu() for kind, state in states.items()}
    return {f"random.{kind}.{rank}": row for kind, rows in gathered.items() for rank, row in enumerate(rows)}


def _set_random_states(tensors: dict[str, torch.Tensor], world: World) -> None:
    """Each process gets its own back; one that was not there before draws from a state of its own."""
    torch.manual_seed(world.rank)
    cpu, cuda = tensors.get(f"random.cpu.{world.rank}"), tensors.get(f"random.cuda.{world.rank}")
    if cpu is not None:
        RandomState(cpu, cuda).restore(world.device)
