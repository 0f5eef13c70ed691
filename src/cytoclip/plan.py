"""What a run will do, before it does it: steps, epochs, what moves, and how much memory and disk it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cytoclip import files
from cytoclip.checkpoint import Opened, is_adapter_only
from cytoclip.config import Config
from cytoclip.console import size
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.order import Order

_FLOAT = 4  # bytes of a float32
_ADAM = 2 * _FLOAT  # two moments a weight
# Bytes that one transformer layer keeps for the backward pass, a token and a unit of width, without the attention
# matrix, which fused attention never stores: counted on ViT-B/16, and under bf16 what a GPU takes (bench/RESULTS.md).
# The 34 of a model that is all in 16 bits (arXiv 2205.05198, section 4.1) are too few: autocast keeps norms and what
# lies between layers in float32, and quick GELU, which is not fused, keeps three parts.
_KEPT, _KEPT_IN_FLOAT32 = 49, 81


@dataclass(frozen=True)
class Plan:
    """The length and the cost of a run.

    Parameters
    ----------
    steps, steps_per_epoch
        Optimizer steps in all, and full batches in one pass over the training split.
    times_seen
        How often each pair is seen, on average. Both None for pairs from afar, which nobody has counted.
    sizes
        (training, all) parameters by part.
    memory, disk
        Bytes: an estimate of what one process holds at its peak, and of the largest the run folder becomes.
    """

    steps: int
    steps_per_epoch: int | None
    times_seen: float | None
    sizes: dict[str, tuple[int, int]]
    memory: int
    disk: int

    def text(self) -> str:
        lines = [f"steps        {self.steps}"]
        if self.steps_per_epoch:
            lines[0] += f": {self.steps / self.steps_per_epoch:.1f} epochs of {self.steps_per_epoch}"
            lines += [f"each pair    seen {self.times_seen:.1f} times"]
        lines += [
            f"{part:<12} {moving:,} of {total:,} parameters train" for part, (moving, total) in self.sizes.items()
        ]
        lines += [
            f"memory       about {size(self.memory)} a process: weights, gradients, AdamW, activations",
            f"disk         about {size(self.disk)} in the run folder at its largest",
        ]
        return "\n".join(lines)


def plan(config: Config, opened: Opened, order: Order | None, world: World, ranked: int = 0) -> Plan:
    """The plan of `config` for the pairs of `order`, after `adapters.set_moving`; None: for pairs from afar.

    `ranked` pairs of the validation and the test split have their embeddings kept.

    Raises
    ------
    UserError
        For fewer pairs than a batch, a batch that the processes don't divide, or epochs of pairs from afar.
    """
    check_batch(config, world.size)
    if order:
        _check_pairs(config, order, world)
    elif config.train.epochs:
        raise UserError(
            f"train.epochs is {config.train.epochs}, and nobody has counted pairs from afar", "set train.steps instead"
        )
    per_epoch = order.steps_per_epoch if order else None
    steps = config.train.steps or (per_epoch or 0) * (config.train.epochs or 0)
    sizes = opened.encoder.sizes()
    moving, total = (sum(column) for column in zip(*sizes.values(), strict=True))
    activations = held(config, world.size) * bytes_per_pair(config, opened)
    copies = (total if config.train.anchor else 0) + (moving if config.train.ema else 0)
    saved = (moving if is_adapter_only(config.model, opened) else total) * _FLOAT
    state = moving * (_FLOAT + _ADAM) + (moving * _FLOAT if config.train.ema else 0)
    kept = 2 * ranked * 2 * opened.encoder.width * _FLOAT  # of the start and of best/, pictures and captions
    return Plan(
        steps=steps,
        steps_per_epoch=per_epoch,
        times_seen=steps * order.own / order.pairs if order else None,
        sizes=sizes,
        memory=total * _FLOAT + moving * (_FLOAT + _ADAM) + copies * _FLOAT + activations,
        # a new one is written before the oldest goes
        disk=(config.checkpoint.keep_last + 1) * state + 3 * saved + kept * 3 // 2,
    )


def check_batch(config: Config, processes: int) -> None:
    """Raise where the processes don't share the global batch evenly: the nearest that they do is in the hint."""
    batch = config.train.batch_size
    rest = batch % processes
    if rest:
        near = sorted({max(batch - rest, processes), batch - rest + processes}, key=lambda b: abs(b - batch))
        raise UserError(
            f"train.batch_size {batch} is not divisible by the {processes} processes",
            f"set train.batch_size to {' or '.join(map(str, near))}",
        )


def _check_pairs(config: Config, order: Order, world: World) -> None:
    batch, pairs = config.train.batch_size, order.pairs
    if order.own < 1:
        raise UserError(
            f"data.replay leaves {order.own} of the {batch} pairs of a batch to the training split",
            "lower the weights of data.replay, or raise train.batch_size",
        )
    if pairs < order.own:
        raise UserError(
            f"{pairs} training pairs are fewer than train.batch_size {batch}: there would be no full batch"
            if not order.replay
            else f"{pairs} training pairs are fewer than the {order.own} of them in each batch of {batch}",
            f"set train.batch_size to at most {pairs - pairs % world.size}"
            if pairs >= max(2, world.size)
            else "a batch needs two pairs, and one for each process: add pairs",
            ExitCode.DATA,
        )
    for replay, (there, each) in zip(config.data.replay, order.replay, strict=True):
        if there < each:
            raise UserError(
                f"data.replay: {replay.root} has {there} pairs, and each batch takes {each} of them",
                "lower its weight, or add pairs",
                ExitCode.DATA,
            )


def fitting(config: Config, opened: Opened, planned: Plan, processes: int) -> int:
    """The largest power of two of pairs that, by the estimate, fits into half of the memory that is free now."""
    share = config.train.batch_size // processes
    fixed = planned.memory - held(config, processes) * bytes_per_pair(config, opened)
    room = (psutil.virtual_memory().available // 2 - fixed) // processes
    most = max(1, room // max(bytes_per_pair(config, opened), 1))
    return int(min(share, 2 ** (int(most).bit_length() - 1)))


def check_disk(planned: Plan, run: Path) -> None:
    """Raise where the disk that holds the run folder has no room for what it will grow by."""
    free = files.free_bytes(run)
    needed = planned.disk - sum(p.stat().st_size for p in run.rglob("*") if p.is_file())  # a resumed run has some
    if free < needed:
        raise UserError(
            f"{run} needs about {size(needed)} more and its disk has {size(free)} free",
            "free some space, or set output to a folder on another disk",
            ExitCode.SYSTEM,
        )


def held(config: Config, processes: int) -> int:
    """Pairs that one process holds at once, in training and in evaluation: never more than its share of the batch."""
    share = config.train.batch_size // processes
    chunk = config.train.micro_batch_size
    return min(share if chunk is None or chunk == "auto" else chunk, share)


def bytes_per_pair(config: Config, opened: Opened) -> int:
    """Bytes kept for the backward pass of one pair; a frozen tower keeps none."""
    settings = opened.encoder.clip.config
    vision, text = settings.vision_config, settings.text_config
    patches = opened.encoder.patches * (1 - config.train.patch_dropout) + 1
    towers: list[tuple[str, Any, float]] = [
        (config.model.image_tower, vision, patches),
        (config.model.text_tower, text, opened.context),
    ]
    kept = [tokens * t.hidden_size * _kept(config, t) for mode, t, tokens in towers if mode != "frozen"]
    return int(sum(kept))


def _kept(config: Config, tower: Any) -> int:
    """Bytes a token and a unit of width, over all layers; with checkpointing, the inputs of all and the rest of one."""
    layers = int(tower.num_hidden_layers)
    kept = _KEPT_IN_FLOAT32 if config.train.precision == "no" else _KEPT
    return layers * _FLOAT + kept if config.train.gradient_checkpointing else layers * kept
