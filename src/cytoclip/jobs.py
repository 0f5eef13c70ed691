"""A run made ready: data read, model opened, optimizer built, and what is odd about them said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from cytoclip import adapters, batches, captions, checkpoint, evaluate, families, journal, model, optim, plan, sources
from cytoclip.batches import Order
from cytoclip.captions import Tokens
from cytoclip.checkpoint import Opened, RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import counted
from cytoclip.pairs import Pairs, fingerprint
from cytoclip.plan import Plan


@dataclass(frozen=True)
class Job:
    """All that stays the same during a run."""

    config: Config
    run: RunFolder
    world: World
    console: Console
    plan: Plan
    opened: Opened
    adapter: PeftModel | None
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    train: Pairs
    tokens: Tokens
    order: Order
    val: Pairs
    inputs: dict[str, str]
    reading: Reading


def prepare(wanted: Config, run: RunFolder, world: World, console: Console) -> Job:
    journal.check_trackers(wanted.track.to)
    read = world.once(lambda: _read_splits(wanted))
    opened = checkpoint.open_model(wanted.model.name, wanted.model.context_length)
    tower = opened.encoder.image_tower.config.model_type
    families.refuse_unsupported(opened.encoder.family, tower, wanted.model, wanted.train)
    began_from = model.fingerprint(opened.encoder.clip)
    torch.manual_seed(wanted.train.seed)  # new weights are the same in every process
    adapter = adapters.set_moving(opened.encoder, wanted.model)
    planned = plan.plan(wanted, opened, len(read["train"][1]), world)
    splits = world.once(lambda: {n: batches.scanned(pairs, folder, console) for n, (folder, pairs) in read.items()})
    opened.encoder.to(world.device).train()
    torch.manual_seed(wanted.train.seed + world.rank)  # dropout is not
    tokens = captions.tokenise(opened.tokenizer, splits["train"].captions, opened.context, opened.encoder.family)
    job = Job(
        config=wanted,
        run=run,
        world=world,
        console=console,
        plan=planned,
        opened=opened,
        adapter=adapter,
        optimizer=optim.build(opened.encoder.moving(), wanted.train),
        scaler=_scaler(world, wanted.train.precision),
        train=splits["train"],
        tokens=tokens,
        order=Order(len(splits["train"]), wanted.train.batch_size, wanted.train.seed),
        val=splits["val"],
        inputs={"model": began_from} | {f"{name} split": fingerprint(pairs) for name, pairs in splits.items()},
        reading=evaluate.reading(
            opened, splits["val"], plan.held(wanted, world.size), world.loaders(wanted.data.workers)
        ),
    )
    _say_what_is_odd(job)
    return job


def _scaler(world: World, precision: str) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    scaler.scale(torch.ones((), device=world.device))  # its first call makes the scale; ours is applied to gradients
    return scaler


def settled(wanted: Config, world: World) -> Config:
    """The configuration with what depends on the machine written out."""
    return wanted.model_copy(update={"train": wanted.train.model_copy(update={"precision": world.precision})})


def first_line(wanted: Config, world: World) -> str:
    each, held = wanted.train.batch_size // world.size, plan.held(wanted, world.size)
    chunks = "" if held == each else f", in chunks of {held}"
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if world.device.type == "cpu" else ""
    return (
        f"{counted(world.size, 'process', 'processes')} on {world.device.type}{threads}, precision {world.precision} "
        f"(from {world.precision_from}), global batch {wanted.train.batch_size} = {world.size} × {each}{chunks}"
    )


def _read_splits(wanted: Config) -> dict[str, tuple[Path, Pairs]]:
    found = {name: wanted.data.split(name) for name in ("train", "val", "test")}
    return {name: (folder, sources.read(folder)) for name, folder in found.items() if folder}


def _say_what_is_odd(job: Job) -> None:
    say, wanted = job.console, job.config
    say.say(
        f"{len(job.train)} training and {len(job.val)} validation pairs, {job.plan.steps} steps of "
        f"{wanted.train.batch_size}: each pair is seen {job.plan.times_seen:.1f} times"
    )
    if wanted.model.context_length and not job.opened.stretched:
        say.say(f"model.context_length {wanted.model.context_length} is the checkpoint's own: nothing to stretch")
    if frozen := model.frozen_statistics(job.opened.encoder):
        say.say(f"{counted(frozen, 'batch norm')} keep their statistics: they would couple the pairs of a chunk")
    if wanted.model.lora and job.adapter:
        lora = wanted.model.lora
        say.say(f"LoRA rank {lora.rank}, scaling {lora.alpha / lora.rank:g} (alpha ÷ rank)")
    if job.tokens.truncated:
        share = job.tokens.truncated / len(job.tokens)
        say.warn(f"{share:.1%} of the training captions are longer than {job.opened.context} tokens and lose their end")
    for k in wanted.validation.ks:
        if k > len(job.val):
            say.warn(f"k = {k} is more than the {len(job.val)} validation pairs: hit@{k} is 1")
    if wanted.train.warmup_steps >= job.plan.steps:
        say.warn(f"{wanted.train.warmup_steps} warm-up steps of {job.plan.steps}: the peak learning rate is not passed")
