"""A run made ready: data read, model opened, optimizer built, and what is odd about them said."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from cytoclip import (
    adapters,
    autosize,
    batches,
    cache,
    captions,
    checkpoint,
    config,
    decoded,
    evaluate,
    families,
    features,
    journal,
    model,
    optim,
    order,
    plan,
    repeats,
    shard,
    sources,
    streams,
)
from cytoclip.averages import Averages
from cytoclip.batches import PatchDropout, Pictures, Rows, Texts
from cytoclip.captions import Tokens
from cytoclip.checkpoint import Opened, RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import UserError, counted
from cytoclip.feed import FromAfar, FromDisk
from cytoclip.loss import Encoder
from cytoclip.objectives import Objective
from cytoclip.order import Order, Wording
from cytoclip.pairs import Pairs, fingerprint, identities, joined, spread
from cytoclip.plan import Plan


@dataclass(frozen=True)
class Job:
    """All that stays the same during a run.

    Parameters
    ----------
    start
        The starting model, where the objective is anchored to it.
    feed
        The training pairs, replayed roots behind them, as they come step by step.
    val
        Each caption a pair of its own.
    inputs
        Digests of all that the run was begun with.
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
    feed: FromDisk | FromAfar
    val: Pairs
    inputs: dict[str, str]
    reading: Reading


def prepare(wanted: Config, run: RunFolder, world: World, console: Console, storing: bool = True) -> Job:
    """Read, open and build all that a run needs; `storing` False computes no features, as a dry run wants it."""
    journal.check_trackers(wanted.track.to)
    shards = world.once(lambda: _shards(wanted))
    read = world.once(lambda: _read_splits(wanted))
    opened = checkpoint.open_model(wanted.model.name, wanted.model.context_length)
    image_tower = opened.encoder.clip.config.vision_config.model_type
    families.refuse_unsupported(opened.encoder.family, image_tower, wanted.model, wanted.train)
    objective = _objective(wanted, opened)
    began_from = model.fingerprint(opened.encoder.clip)
    start = copy.deepcopy(opened.encoder).to(world.device).eval().requires_grad_(False) if objective.anchored else None
    torch.manual_seed(wanted.train.seed)  # new weights are the same in every process
    adapter = adapters.set_moving(opened.encoder, wanted.model, bias=objective.kind == "sigmoid")
    optim.refuse_idle(opened.encoder, wanted.train)
    _switch(wanted, opened, console)
    steps = None if shards else _order(wanted, read)
    planned = plan.plan(wanted, opened, steps, world)
    splits = world.once(lambda: _scanned(wanted, read, console))
    opened.encoder.to(world.device).train()
    wanted = _with_chunks(wanted, opened, planned, world, console)
    torch.manual_seed(wanted.train.seed + world.rank)  # dropout is not
    encoder, val = opened.encoder, spread(splits["val"])
    reading = evaluate.reading(opened, val, plan.held(wanted, world.size), world.loaders(wanted.data.workers))
    feed: FromDisk | FromAfar
    truncated = 0
    if steps:
        train = joined([pairs for name, pairs in splits.items() if name not in ("val", "test")])
        place = features.Place(run.path, world, console)
        feed, reading, truncated = _from_disk(wanted, opened, train, val, steps, reading, place, storing)
        if wanted.data.cache:
            folders = {name: folder for name, (folder, _) in read.items()}
            feed, reading = _keeping(wanted, feed, reading, folders, splits, world, console, storing)
    else:
        feed = _from_afar(wanted, opened, shards, reading.workers, world)
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
        feed=feed,
        val=val,
        inputs=_digests(wanted, opened, began_from, splits, world) | ({"shards": repr(shards)} if shards else {}),
        reading=reading,
    )
    _say_what_is_odd(job, truncated)
    return job


def settled(wanted: Config, world: World, run: RunFolder) -> Config:
    """The configuration with what depends on the machine written out; a run that goes on keeps its own chunks."""
    train: dict[str, Any] = {"precision": world.precision}
    if wanted.train.micro_batch_size == "auto" and run.config.is_file():
        train["micro_batch_size"] = config.load(run.config).train.micro_batch_size
    return wanted.model_copy(update={"train": wanted.train.model_copy(update=train)})


def first_line(wanted: Config, world: World) -> str:
    threads = f" with {counted(torch.get_num_threads(), 'thread')}" if world.device.type == "cpu" else ""
    return (
        f"{counted(world.size, 'process', 'processes')} on {world.device.type}{threads}, precision {world.precision} "
        f"(from {world.precision_from}), global batch {wanted.train.batch_size} = {world.size} × "
        f"{wanted.train.batch_size // world.size}"
    )


def _from_disk(
    wanted: Config,
    opened: Opened,
    train: Pairs,
    val: Pairs,
    steps: Order,
    reading: Reading,
    place: features.Place,
    storing: bool,
) -> tuple[FromDisk, Reading, int]:
    """The training pairs, how those of validation are read, and how many training captions lose their end.

    Features of a frozen tower are stored for both.
    """
    encoder, each, world = opened.encoder, reading.batch_size, place.world
    said, skips = spread(train), wanted.data.on_bad_image == "skip"
    tokens = captions.tokenise(opened.tokenizer, said.captions, opened.context, encoder.family)
    pictures: Pictures | Rows = Pictures(train.images, opened.pixels, _dropout(wanted, opened))
    texts = Texts(tokens, Wording.of(train, wanted.train.seed))
    if storing and wanted.model.image_tower == "frozen":
        pictures, rows = (
            features.of_pictures(encoder, pairs, opened.pixels, each, reading.workers, place, may_skip)
            for pairs, may_skip in ((train, skips), (val, False))
        )
        reading = replace(reading, image_rows=rows)
    if storing and wanted.model.text_tower == "frozen":
        texts = replace(texts, table=features.of_captions(encoder, said, tokens, each, place))
        reading = replace(reading, text_rows=features.of_captions(encoder, val, reading.tokens, each, place))
    identity = identities(said).map(lambda ids: torch.from_numpy(ids).to(world.device))
    feed = FromDisk(pictures, texts, steps, identity, train.names, reading.workers, skips)
    return feed, reading, tokens.truncated


def _from_afar(wanted: Config, opened: Opened, shards: list[str], workers: int, world: World) -> FromAfar:
    def tokenise(said: Sequence[str]) -> Tokens:
        return captions.tokenise(opened.tokenizer, said, opened.context, opened.encoder.family)

    data = wanted.data
    planned = streams.Plan(
        shards=shards,
        columns=streams.Columns(data.image_column, data.caption_column),
        each=wanted.train.batch_size // world.size,
        spec=opened.pixels,
        tokenise=tokenise,
        seed=wanted.train.seed,
        rank=world.rank,
        size=world.size,
        skips=data.on_bad_image == "skip",
        dropout=_dropout(wanted, opened),
    )
    return FromAfar(planned, workers)


def _dropout(wanted: Config, opened: Opened) -> PatchDropout | None:
    dropped = wanted.train.patch_dropout
    return PatchDropout(opened.encoder.patches, dropped, wanted.train.seed) if dropped else None


def _shards(wanted: Config) -> list[str]:
    """Of training pairs from afar; none where they are here."""
    data = wanted.data
    if not data.train or not streams.is_remote(data.train):
        return []
    for option, given in (("replay", data.replay), ("cache", data.cache), ("augment", data.augment)):
        if given:
            raise UserError(
                f"data.{option} needs training pairs that are here, and data.train is {data.train}",
                f"delete data.{option}, or copy the shards to this machine and name their path",
            )
    return streams.shards(data.train)


def _keeping(
    wanted: Config,
    feed: FromDisk,
    reading: Reading,
    folders: dict[str, Path],
    splits: dict[str, Pairs],
    world: World,
    console: Console,
    storing: bool,
) -> tuple[FromDisk, Reading]:
    """With the pictures kept decoded, those of validation too: they are read twice at least, before and after."""
    if wanted.model.image_tower == "frozen" or isinstance(feed.pictures, Rows):
        console.say("data.cache: nothing to keep: the frozen image tower's features are stored, and no picture is read")
        return feed, reading
    val = spread(splits["val"])
    parts = [cache.Part(folders["val"], val.contents, Pictures(val.images, reading.pixels))]
    parts += [
        cache.Part(folders[name], pairs.contents, feed.pictures)
        for name, pairs in splits.items()
        if name not in ("val", "test")
    ]
    world.once(lambda: cache.announce(wanted.data, parts, console))
    if not storing:
        return feed, reading
    of_val, *of_train = (cache.opened(part) for part in parts)
    return replace(feed, pictures=feed.pictures.kept_in(decoded.joined(of_train))), replace(reading, kept=of_val)


def _read_splits(wanted: Config) -> dict[str, tuple[Path, Pairs]]:
    found = {name: wanted.data.split(name) for name in ("train", "val", "test")}
    for number, replay in enumerate(wanted.data.replay, start=1):
        root = Path(replay.root)
        found[f"replay {number}"] = root if (root / sources.LIST_NAME).is_file() else root / "train"
    return {
        name: (folder, sources.read(folder))
        for name, folder in found.items()
        if folder and not (name == "train" and streams.is_remote(str(wanted.data.train)))
    }


def _scanned(wanted: Config, read: dict[str, tuple[Path, Pairs]], console: Console) -> dict[str, Pairs]:
    """Only training may go on without a picture: a number of validation is one of all of its pairs."""
    skips = wanted.data.on_bad_image == "skip"
    return {
        name: batches.scanned(pairs, folder, console, skips and name not in ("val", "test"))
        for name, (folder, pairs) in read.items()
    }


def _order(wanted: Config, read: dict[str, tuple[Path, Pairs]]) -> Order:
    batch = wanted.train.batch_size
    each = order.replayed(batch, [replay.weight for replay in wanted.data.replay])
    there = [len(pairs) for name, (_, pairs) in read.items() if name.startswith("replay")]
    return Order(len(read["train"][1]), batch, wanted.train.seed, tuple(zip(there, each, strict=True)))


def _digests(wanted: Config, opened: Opened, began_from: str, splits: dict[str, Pairs], world: World) -> dict[str, str]:
    found = {"model": began_from} | {f"{name} split": fingerprint(pairs) for name, pairs in splits.items()}
    if opened.encoder.drops_out():
        found["train.micro_batch_size (a tower drops out)"] = str(plan.held(wanted, world.size))
    return found


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


def _switch(wanted: Config, opened: Opened, console: Console) -> None:
    if wanted.model.context_length and not opened.stretched:
        console.say(f"model.context_length: {opened.context} is the checkpoint's own, so nothing is stretched")
    if wanted.train.gradient_checkpointing:
        model.checkpoint_gradients(opened.encoder)
    if wanted.train.compile:
        model.compile_towers(opened.encoder)
        console.say("train.compile: the first steps compile the layers of the towers, which takes a while")
    found = opened.encoder.frozen_statistics()
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
            reserved = 8 * moving + 24 * wanted.train.batch_size * opened.encoder.width  # moments, embeddings; float32
            reserved += batches.bytes_ahead(share, opened.pixels.size)
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


def _say_what_is_odd(job: Job, truncated: int) -> None:
    say, wanted = job.console, job.config
    if isinstance(job.feed, FromDisk):
        _say_what_comes(job, job.feed, truncated)
    else:
        say.say(
            f"training pairs from afar, {counted(len(job.feed.plan.shards), 'shard')}, and {len(job.val)} validation "
            f"pairs, {job.plan.steps} steps of {wanted.train.batch_size}, no more than {job.opened.context} tokens each"
        )
    if wanted.model.lora and job.adapter:
        lora = wanted.model.lora
        over = "√rank" if lora.rslora else "rank"
        kind = "DoRA" if lora.dora else "LoRA"
        say.say(f"{kind} rank {lora.rank}, scaling {adapters.scaling(lora):g} (alpha ÷ {over})")
    for k in wanted.validation.ks:
        if k > len(job.val):
            say.warn(f"k = {k} is more than the {len(job.val)} validation pairs: hit@{k} is 1")
    if wanted.train.warmup_steps >= job.plan.steps:
        say.warn(f"{wanted.train.warmup_steps} warm-up steps of {job.plan.steps}: the peak learning rate is not passed")


def _say_what_comes(job: Job, feed: FromDisk, truncated: int) -> None:
    say, steps, context = job.console, job.plan.steps, job.opened.context
    replay = "".join(f" and {each} of {there} replayed ones" for there, each in feed.order.replay)
    say.say(
        f"{feed.order.pairs} training and {len(job.val)} validation pairs, {steps} steps of {feed.order.own}{replay}: "
        f"each pair is seen {job.plan.times_seen:.1f} times"
    )
    identity = feed.identity.map(lambda ids: ids.cpu().numpy())
    draws = feed.order.draws(0, min(repeats.TYPICAL, steps))
    shown = [identity.take(feed.texts.wording.rows(rows, epochs)) for rows, epochs in draws]
    say.say(repeats.line(repeats.typical(shown, job.objective), feed.order.batch_size, job.objective))
    if truncated:
        share = truncated / len(identity)
        say.warn(f"{share:.1%} of the training captions are longer than {context} tokens and lose their end")
    else:
        say.say(f"no training caption is longer than the {context} tokens of the text tower")
