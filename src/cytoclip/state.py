"""The state that a run resumes from: written whole, found out where it is damaged, put back to the last bit.

checkpoints/step-N/state.safetensors   param.NAME, optim.KEY.NAME, random.KIND.RANK, extra.NAME
checkpoints/step-N/state.json          what else the run remembers
checkpoints/step-N/manifest.json       size and SHA-256 of the two, written last
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cytoclip import files
from cytoclip.device import RandomState, World, placed
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.model import DualEncoder

TENSORS, MORE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_OURS = re.compile(r"\.*step-\d+(\.(new|old|gone))*")  # a checkpoint, or what a crash left of one


def listed(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, damaged or not, the oldest first."""
    found = [(int(m[1]), p) for p in checkpoints.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))]
    return sorted(found)


def newest(checkpoints: Path, warn: Callable[[str], None]) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is as it was written; None where there is none at all.

    Parameters
    ----------
    warn
        Told of each checkpoint that is skipped, and why.

    Raises
    ------
    UserError
        Where there are checkpoints and none can be used: to start over is the user's choice.
    """
    found = listed(checkpoints)
    for step, folder in reversed(found):
        problem = _problem(step, folder)
        if problem is None:
            return step, folder
        warn(f"the checkpoint {folder} is skipped: {problem}")
    if found:
        raise UserError(
            f"{checkpoints} holds {counted(len(found), 'checkpoint')} and none can be used; step {found[-1][0]}: "
            f"{_problem(*found[-1])}",
            "delete that folder to start over, or name another output",
            ExitCode.RUN,
        )
    return None


def whole(checkpoints: Path, warn: Callable[[str], None]) -> dict[int, Path]:
    """The folder of each step whose checkpoint is as it was written; `warn` is told of the others."""
    found = {}
    for step, folder in listed(checkpoints):
        problem = _problem(step, folder)
        if problem is None:
            found[step] = folder
        else:
            warn(f"the checkpoint {folder} is skipped: {problem}")
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What of a checkpoint is validated and saved, by the name of the parameter: its moving averages where it has some.

    Moments are not read.
    """
    with safe_open(folder / TENSORS, "pt") as file:
        names = list(file.keys())
        return {
            name.removeprefix(prefix): file.get_tensor(name)
            for prefix in ("param.", "extra.")  # `averages.py`: of the same parameters
            for name in names
            if name.startswith(prefix)
        }


def save_state(
    checkpoints: Path,
    step: int,
    encoder: DualEncoder,
    optimizer: torch.optim.Optimizer,
    world: World,
    more: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor] | None = None,
    keep: int = 2,
) -> None:
    """Write `step-N` and then drop the older ones. Called in all processes; the first one writes.

    Parameters
    ----------
    step
        How many steps are done.
    more
        What else the run must remember, as JSON.
    extra
        What else it must remember, as tensors by name.
    keep
        How many checkpoints stay, this one among them.

    Raises
    ------
    UserError
        For a disk that is full or cannot be written: the checkpoints before this one are whole then.
    """
    tensors = _random_states(world)
    for name, tensor in _held(encoder, optimizer, extra or {}):
        whole = _whole(tensor)  # in all processes, which is how the parts of a sharded one meet
        if world.first:
            tensors[name] = whole.detach().cpu().contiguous()
    world.once(lambda: _write(checkpoints, step, tensors, more, keep))


def load_state(
    folder: Path, encoder: DualEncoder, optimizer: torch.optim.Optimizer, world: World
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Put weights, moments and random states back; `more` (and `step`) and `extra` of `save_state`, on the CPU.

    Raises
    ------
    UserError
        For a checkpoint that cannot be read, or holds other parameters than the model trains.
    """
    try:
        tensors = load_file(folder / TENSORS)
        more: dict[str, Any] = files.read_json(folder / MORE)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the checkpoint {folder} cannot be read: {error}", "delete that folder to start over", ExitCode.RUN
        ) from None
    moving = encoder.moving()
    saved = {name: tensor.shape for name, tensor in _part(tensors, "param.").items()}
    if saved != {name: parameter.shape for name, parameter in moving.items()}:
        raise UserError(
            f"the checkpoint {folder} holds other parameters than this model trains",
            "delete that folder to start over, or name another output",
            ExitCode.RUN,
        )
    moments: dict[str, dict[str, torch.Tensor]] = {name: {} for name in moving}
    for name, tensor in _part(tensors, "optim.").items():
        key, _, of = name.partition(".")
        moments[of][key] = tensor
    for name, parameter in moving.items():
        _put(parameter, tensors[f"param.{name}"])
        if moments[name]:  # none: it never had a gradient
            optimizer.state[parameter] = {key: _moment(parameter, key, m) for key, m in moments[name].items()}
    _set_random_states(tensors, world)
    return more, _part(tensors, "extra.")


def _problem(step: int, folder: Path) -> str | None:
    """Why the checkpoint of `step` in `folder` cannot be used, or None."""
    try:
        manifest = files.read_json(folder / MANIFEST)
        written = {name: (int(file["size"]), str(file["sha256"])) for name, file in manifest["files"].items()}
        if manifest["step"] != step:
            return f"it is that of step {manifest['step']}"
        there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
        if not there == set(written) == {TENSORS, MORE}:
            return f"it holds {', '.join(sorted(there)) or 'nothing'}, but should hold {TENSORS} and {MORE}"
        for name, (size, digest) in written.items():
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} of {size} bytes"
            if files.sha256(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or what that lists cannot be read: {type(error).__name__}: {error}"
    return None


def _held(
    encoder: DualEncoder, optimizer: torch.optim.Optimizer, extra: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in encoder.moving().items():
        yield f"param.{name}", parameter
        # Looked up without being made: a parameter that never had a gradient has no moments.
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optim.{key}.{name}", value
    for name, tensor in extra.items():
        yield f"extra.{name}", tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded (a DTensor)."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _write(checkpoints: Path, step: int, tensors: dict[str, torch.Tensor], more: Mapping[str, Any], keep: int) -> None:
    with files.whole_folder(checkpoints / f"step-{step}") as new:
        save_file(tensors, new / TENSORS)
        files.write_json(new / MORE, {"step": step, **more})
        written = {
            name: {"size": (new / name).stat().st_size, "sha256": files.sha256(new / name)} for name in (TENSORS, MORE)
        }
        files.write_json(new / MANIFEST, {"step": step, "files": written})
    # A later step than this one was damaged, or this run would have gone on from it.
    kept = {folder for at, folder in listed(checkpoints) if at <= step}
    kept = set(sorted(kept, key=lambda folder: int(folder.name.removeprefix("step-")))[-keep:])
    for folder in checkpoints.iterdir():
        if folder not in kept and _OURS.fullmatch(folder.name):
            files.remove(folder)


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _put(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    parameter.copy_(placed(tensor, parameter))


def _moment(parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """Where AdamW wants it: the step counter beside the parameter only for the fused kernel on CUDA."""
    if key != "step":
        return placed(value, parameter)
    return value.to(parameter.device, copy=True) if parameter.device.type == "cuda" else value.clone()


def _random_states(world: World) -> dict[str, torch.Tensor]:
    states = {kind: state for kind, state in vars(RandomState.of(world.device)).items() if state is not None}
    gathered = {kind: world.gather(state[None].to(world.device)).cpu() for kind, state in states.items()}
    return {f"random.{kind}.{rank}": row for kind, rows in gathered.items() for rank, row in enumerate(rows)}


def _set_random_states(tensors: Mapping[str, torch.Tensor], world: World) -> None:
    """Each process gets its own back; one that was not there before draws from a state of its own."""
    torch.manual_seed(world.rank)
    cpu, cuda = tensors.get(f"random.cpu.{world.rank}"), tensors.get(f"random.cuda.{world.rank}")
    if cpu is not None:
        RandomState(cpu, cuda).restore(world.device)
