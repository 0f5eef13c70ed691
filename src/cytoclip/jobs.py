"""A run made ready: data read, model opened, optimizer built, and what is odd about them said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from cytoclip import (
    adapters,
    attention,
    autosize,
    batches,
    buckets,
    captions,
    checkpoint,
    config,
    device,
    evaluation,
    families,
    intake,
    journal,
    last_layer,
    leaks,
    lean,
    model,
    optim,
    plan,
    projection_fit,
    repeats,
    shard,
    texts,
)
from cytoclip.augment import Variation
from cytoclip.averages import Averages
from cytoclip.canonical import Fit
from cytoclip.checkpoint import Opened, RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import UserError, counted
from cytoclip.features import Place
from cytoclip.feed import FromAfar, FromDisk
from cytoclip.intake import Found
from cytoclip.kinds import KINDS
from cytoclip.loss import Encoder
from cytoclip.model import DualEncoder
from cytoclip.objectives import Objective
from cytoclip.pairs import Pairs, fingerprint, spread
from cytoclip.plan import Plan
from cytoclip.repeats import Repeats
from cytoclip.report import Scores

_LOOKED_AT = 2000  # pairs, whether the tokenizer reads their captions
Watcher = Callable[[int, Scores], None]  # hears the step of a validation and its scores


@dataclass(frozen=True)
class Job:
    """All that stays the same during a run.

    Parameters
    ----------
    start
        The starting model, where the objective is anchored to it.
    variation
        How training pictures are varied, if they are.
    feed
        The training pairs, replayed roots behind them, as they come step by step.
    val, reading
        Each caption a pair of its own, and how they are read.
    test
        The same of the test split, where there is one.
    keep
        Pairs of `validate.keep` and how they are read, where it is given.
    inputs
        Digests of all that the run was begun with.
    fitted
        The projections that training begins with, where they are other than those of the starting model.
    watcher
        Hears of each validation after the start, in the first process.
    """

    config: Config
    run: RunFolder
    world: World
    console: Console
    plan: Plan
    opened: Opened
    adapter: PeftModel | None
    objective: Objective
    start: Encoder | None
    optimizer: torch.optim.AdamW
    averages: Averages | None
    scaler: torch.amp.GradScaler
    variation: Variation | None
    feed: FromDisk | FromAfar
    val: Pairs
    reading: Reading
    test: Pairs | None
    keep: tuple[Pairs, Reading] | None
    inputs: dict[str, str]
    fitted: Fit | None = None
    watcher: Watcher | None = None


def prepare(
    wanted: Config, run: RunFolder, world: World, console: Console, storing: bool = True, begins: bool = False
) -> Job:
    """Read, open and build all that a run needs; `storing` False computes no features, as a dry run wants it.

    Only for a run that `begins` are projections fitted.
    """
    journal.check_trackers(wanted.track.to)
    found = world.once(lambda: intake.find(wanted, console))
    opened = _start(wanted, console)
    objective = _objective(wanted, opened)
    began_from = opened.digest()
    start = copy.deepcopy(opened.encoder).to(world.device).eval().requires_grad_(False) if objective.anchored else None
    torch.manual_seed(wanted.train.seed)  # new weights are the same in every process
    adapter = adapters.set_moving(opened.encoder, wanted.model, bias=objective.kind == "sigmoid")
    optim.refuse_idle(opened.encoder, wanted.train)
    steps = intake.order_of(wanted, found)
    planned = plan.plan(wanted, opened, steps, world, _ranked(found))
    wanted = _switch(wanted, opened, planned, world, console)
    splits = world.once(lambda: intake.scanned(wanted, found, console))
    opened.encoder.to(world.device).train()
    if world.device.type == "cpu" and not wanted.train.shard:
        buckets.fill(opened.encoder, captions.pad_of(opened.tokenizer) == opened.tokenizer.eos_token_id)
    wanted = _with_chunks(wanted, opened, planned, world, console)
    torch.manual_seed(wanted.train.seed + world.rank)  # dropout is not
    encoder, val = opened.encoder, spread(splits["val"])
    reading = evaluation.reading(opened, val, plan.held(wanted, world.size), world.loaders(wanted.data.workers))
    place = Place(run.path, world, console)
    ready = intake.open_up(wanted, opened, found, splits, steps, reading, place, storing)
    keep = _keep(wanted, opened, splits, reading, place, storing)
    fits = begins and wanted.model.projections == "fitted"
    fitted = projection_fit.fit(wanted, opened, splits["train"], reading, place) if fits else None
    if wanted.train.shard:
        shard.share_out(encoder, world, console)
    optimizer = optim.build(encoder, wanted.train)
    shard.split_groups(optimizer)
    job = Job(
        config=wanted,
        run=run,
        world=world,
        console=console,
        plan=planned,
        opened=opened,
        adapter=adapter,
        objective=objective,
        start=start,
        optimizer=optimizer,
        averages=Averages(encoder.moving(), wanted.train.ema) if wanted.train.ema else None,
        scaler=_scaler(world, wanted.train.precision),
        variation=ready.variation,
        feed=ready.feed,
        val=val,
        reading=ready.reading,
        test=spread(splits["test"]) if "test" in splits else None,
        keep=keep,
        inputs=_digests(wanted, opened, began_from, found, splits, world),
        fitted=fitted,
    )
    _say_what_is_odd(job, splits, ready.truncated)
    return job


def begin_fitted(job: Job) -> None:
    """Give the model the projections that training begins with, once the starting model has been looked at."""
    if job.fitted is None:
        return
    projection_fit.put(job.fitted, job.opened.encoder)
    if job.averages:
        job.averages.restart()


def typical(job: Job, feed: FromDisk) -> Repeats:
    """What the pairs of a batch repeat, of the first batches of the run."""
    identity = feed.identity.map(lambda ids: ids.cpu().numpy())
    draws = feed.order.draws(0, min(repeats.TYPICAL, job.plan.steps))
    shown = [identity.take(feed.texts.wording.rows(rows, epochs)) for rows, epochs in draws]
    return repeats.typical(shown, job.objective)


def settled(wanted: Config, world: World, run: RunFolder) -> Config:
    """The configuration with what depends on the machine written out; a run that goes on keeps what was chosen."""
    train: dict[str, Any] = {"precision": world.precision}
    if run.config.is_file():
        before = config.load(run.config).train
        train |= {n: getattr(before, n) for n in ("micro_batch_size", "compile") if getattr(wanted.train, n) == "auto"}
    return wanted.model_copy(update={"train": wanted.train.model_copy(update=train)})


def first_line(wanted: Config, world: World) -> str:
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if world.device.type == "cpu" else ""
    return (
        f"{counted(world.size, 'process', 'processes')} on {world.device.type}{threads}, {world.arithmetic}, "
        f"global batch {wanted.train.batch_size} = {world.size} × {wanted.train.batch_size // world.size}"
    )


def _start(wanted: Config, console: Console) -> Opened:
    """The checkpoint to start from, refused where its family cannot do what is asked."""
    opened = checkpoint.open_start(wanted)
    if opened.crop == "pad":
        console.warn("data.crop=pad: plain transformers, which cannot say it, would cut the saved model's pictures")
    image_tower = opened.encoder.clip.config.vision_config.model_type
    families.refuse_unsupported(opened.encoder.family, image_tower, wanted.model, wanted.train)
    if wanted.model.projections == "fitted":
        projection_fit.refuse_hidden_layers(opened)
    return opened


def _keep(
    wanted: Config, opened: Opened, splits: dict[str, Pairs], reading: Reading, place: Place, storing: bool
) -> tuple[Pairs, Reading] | None:
    if intake.KEEP not in splits:
        return None
    pairs = spread(splits[intake.KEEP])
    own = evaluation.reading(opened, pairs, reading.batch_size, reading.workers)
    return pairs, intake.asked_once(wanted, opened, pairs, own, place) if storing else own


def _ranked(found: Found) -> int:
    """Pairs of the held-out splits, each caption one."""
    there = [found.splits[name][1] for name in leaks.HELD_OUT if name in found.splits]
    return sum(len(pairs) + sum(map(len, pairs.more)) for pairs in there)


def _digests(
    wanted: Config, opened: Opened, began_from: str, found: Found, splits: dict[str, Pairs], world: World
) -> dict[str, str]:
    digests = {"model": began_from} | {f"{name} split": fingerprint(pairs) for name, pairs in splits.items()}
    if found.shards:
        digests["shards"] = repr(found.shards)
    if opened.encoder.drops_out():
        digests["train.micro_batch_size (a tower drops out)"] = str(plan.held(wanted, world.size))
    return digests


def _objective(wanted: Config, opened: Opened) -> Objective:
    train, anchor = wanted.train, wanted.train.anchor
    kind = opened.encoder.family.objective if train.objective == "auto" else train.objective
    if kind == "sigmoid" and opened.encoder.logit_bias is None:
        raise UserError(
            f"train.objective: sigmoid needs a logit bias, which {opened.name} does not have",
            "set train.objective=infonce, or start from a SigLIP checkpoint",
        )
    if kind == "sigmoid" and train.label_smoothing:
        raise UserError(
            f"train.label_smoothing: {train.label_smoothing} spreads a softmax's target, and the objective is sigmoid",
            "set train.label_smoothing=0, or train.objective=infonce",
        )
    pulls = (anchor.embeddings, anchor.similarities) if anchor else (0.0, 0.0)
    return Objective(kind, train.positives, train.label_smoothing, *pulls)


def _switch(wanted: Config, opened: Opened, planned: Plan, world: World, console: Console) -> Config:
    """Make the towers compute as asked; the configuration with what `train.compile: auto` stands for."""
    encoder = opened.encoder
    if wanted.model.context_length and not opened.stretched:
        console.say(f"model.context_length: {opened.context} is the checkpoint's own, so nothing is stretched")
    if wanted.train.gradient_checkpointing:
        model.checkpoint_gradients(encoder)
    lean.lighten(encoder.clip)
    if world.device.type == "cpu":
        attention.quicken(encoder.clip)
        device.keep_memory()
    chosen = wanted.train.compile
    if chosen == "auto":
        chosen = lean.compile_if_it_pays(encoder, wanted.train, planned.steps, world.device.type, world.size)
    elif chosen:
        model.compile_towers(encoder)
    if chosen:
        console.say("train.compile: the first steps compile the layers of the towers, which takes a while")
    else:  # compiled, such a layer needs graphs of its own, for ten minutes and more (docs/log.md, 2026-11-26)
        last_layer.shorten(encoder.clip)
    _say_of_statistics(encoder, console)
    return wanted.model_copy(update={"train": wanted.train.model_copy(update={"compile": chosen})})


def _say_of_statistics(encoder: DualEncoder, console: Console) -> None:
    found = encoder.frozen_statistics()
    if found:
        console.say(
            f"{counted(found, 'BatchNorm layer')}: statistics stay those of the checkpoint, or the pairs of a chunk "
            "would depend on each other"
        )


def _with_chunks(wanted: Config, opened: Opened, planned: Plan, world: World, console: Console) -> Config:
    """The configuration with the chunk that `auto` stands for; the smallest that any process found."""
    share = wanted.train.batch_size // world.size
    if wanted.train.micro_batch_size == "auto":
        if world.device.type == "cuda":
            moving = sum(parameter.numel() for parameter in opened.encoder.moving().values())
            # moments, the gradients of the chunks before, embeddings; float32
            reserved = 12 * moving + 24 * wanted.train.batch_size * opened.encoder.width
            reserved += batches.bytes_ahead(share, intake.pixels(wanted, opened).size)
            fits = autosize.trial(opened.encoder, opened.pixels.size, opened.context, reserved, world)
            found, how = autosize.largest(fits, share), "found by trying"
        else:
            found, how = plan.fitting(wanted, opened, planned, world.size), "by the plan's estimate"
        found = -world.largest(-found)
        console.say(f"train.micro_batch_size: auto is {found} here, {how}; the global batch stays as it is")
        wanted = wanted.model_copy(update={"train": wanted.train.model_copy(update={"micro_batch_size": found})})
    held = plan.held(wanted, world.size)
    if held < share:
        console.say(f"in chunks of {held}: each is embedded twice, and the gradient is that of the whole batch")
    return wanted


def _scaler(world: World, precision: str) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    scaler.scale(torch.ones((), device=world.device))  # its first call makes the scale; ours is applied to gradients
    return scaler


def _say_what_is_odd(job: Job, splits: dict[str, Pairs], truncated: int) -> None:
    say, wanted = job.console, job.config
    if isinstance(job.feed, FromDisk):
        _say_what_comes(job, job.feed, truncated)
    else:
        say.say(
            f"training pairs from afar, {counted(len(job.feed.plan.shards), 'shard')}, and {len(job.val)} validation "
            f"pairs, {job.plan.steps} steps of {wanted.train.batch_size}, no more than {job.opened.context} tokens each"
        )
    _say_what_is_not_read(job, "training" if "train" in splits else "validation", splits.get("train", splits["val"]))
    if wanted.model.lora and job.adapter:
        lora = wanted.model.lora
        over = "√rank" if lora.rslora else "rank"
        kind = "DoRA" if lora.dora else "LoRA"
        say.say(f"{kind} rank {lora.rank}, scaling {adapters.scaling(lora):g} (alpha ÷ {over})")
    for k in wanted.validation.ks:
        if k > len(job.val):
            say.warn(f"k = {k} is more than the {len(job.val)} validation pairs: hit@{k} is 1")
    if wanted.train.warmup_steps >= job.plan.steps:
        say.warn(
            f"train.warmup_steps={wanted.train.warmup_steps} of {counted(job.plan.steps, 'step')}: the learning rate "
            "does not pass its peak"
        )


def _say_what_is_not_read(job: Job, name: str, pairs: Pairs) -> None:
    """As `cytoclip check` finds it, on captions from all over the split: their tokenizer takes 100 µs each."""
    rows = range(0, len(pairs), -(-len(pairs) // _LOOKED_AT))
    said = [text for row in rows for text in (pairs.captions[row], *pairs.more[row])]
    unread = texts.unread_among(job.opened.tokenizer, said, job.opened.encoder.family)
    count = sum(text in unread for text in said)
    if count:
        kind = KINDS["unread-script"]
        job.console.warn(
            f"{kind.title}: {count:,} of {len(said):,} {name} captions that were looked at; {kind.fix} "
            f"({texts.READ_BY})"
        )


def _say_what_comes(job: Job, feed: FromDisk, truncated: int) -> None:
    say, steps, context = job.console, job.plan.steps, job.opened.context
    replay = "".join(f" and {each} of {there} replayed ones" for there, each in feed.order.replay)
    say.say(
        f"{feed.order.pairs} training and {len(job.val)} validation pairs, {steps} steps of {feed.order.own}{replay}: "
        f"each pair is seen {job.plan.times_seen:.1f} times"
    )
    repeated, size = typical(job, feed), feed.order.batch_size
    say.say(repeats.line(repeated, size, job.objective))
    lost = repeats.warning(repeated, size)
    if lost:
        say.warn(lost)
    if truncated:
        share = truncated / len(feed.identity)
        say.warn(f"{share:.1%} of the training captions are longer than {context} tokens and lose their end")
    else:
        say.say(f"no training caption is longer than the {context} tokens of the text tower")
