"""The data of a run made ready: its splits found, read and scanned, and the feed that brings them to the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cytoclip import (
    batches,
    cache,
    captions,
    decoded,
    evaluation,
    features,
    leaks,
    order,
    places,
    sources,
    split_reader,
    streams,
)
from cytoclip.augment import Variation
from cytoclip.batches import Texts
from cytoclip.captions import Tokens
from cytoclip.checkpoint import Opened
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import UserError, counted
from cytoclip.features import Place
from cytoclip.feed import FromAfar, FromDisk
from cytoclip.order import Order, Wording
from cytoclip.pairs import Pairs, identities, joined, spread
from cytoclip.pictures import PatchDropout, Pictures, Rows, Varied
from cytoclip.pixels import PixelSpec
from cytoclip.rows import Columns
from cytoclip.sides import names_side

KEEP = "keep"  # the name of `validate.keep` among the splits
_REPLAY = "replay"  # a replayed root's name begins with it, and its number follows


@dataclass(frozen=True)
class Found:
    """What the configuration names.

    Parameters
    ----------
    shards
        Addresses of training pairs from afar; none where they are here.
    splits
        Of each split that is here, of each replayed root, and of `validate.keep`: where it is, and its pairs.
    """

    shards: list[str]
    splits: dict[str, tuple[Path, Pairs]]


def find(wanted: Config, console: Console) -> Found:
    """List the pairs of all splits; no picture is opened."""
    return Found(_shards(wanted), _read_splits(wanted, console))


def kept_split(root: Path) -> Path:
    """What `validate.keep` names: the val split of a data root, or a split itself."""
    return root if sources.is_split(root) else evaluation.split_folder(root, "val")


def scanned(wanted: Config, found: Found, console: Console) -> dict[str, Pairs]:
    """The splits with every picture's bytes read once; leaks between them, replayed roots' too, are said.

    Only training may go on without a picture: a number of validation is one of all of its pairs. What is kept is no
    part of the experiment: its pairs may be in any split.
    """
    skips = wanted.data.on_bad_image == "skip"
    splits = {
        name: batches.scanned(pairs, folder, console, skips and name in _of_training(found.splits))
        for name, (folder, pairs) in found.splits.items()
    }
    for line in leaks.warnings({name: pairs for name, pairs in splits.items() if name != KEEP}):
        console.warn(line)
    return splits


def order_of(wanted: Config, found: Found) -> Order | None:
    """In which order the training pairs come; None where they come as their shards have them."""
    if found.shards:
        return None
    batch = wanted.train.batch_size
    each = order.replayed(batch, [replay.weight for replay in wanted.data.replay])
    there = [len(pairs) for name, (_, pairs) in found.splits.items() if name.startswith(_REPLAY)]
    return Order(len(found.splits["train"][1]), batch, wanted.train.seed, tuple(zip(there, each, strict=True)))


def pixels(wanted: Config, opened: Opened) -> PixelSpec:
    """How training pictures are read: wider than the model's input where crops are random."""
    variation = _variation(wanted, opened)
    return opened.pixels.widened(variation.margin) if variation else opened.pixels


@dataclass(frozen=True)
class Intake:
    """The pairs of a run as they are read.

    Parameters
    ----------
    feed
        The training pairs, replayed roots behind them, as they come step by step.
    reading
        How those of validation are read.
    variation
        How training pictures are varied; None: not.
    truncated
        Training captions that lose their end; of pairs from afar, nobody knows.
    """

    feed: FromDisk | FromAfar
    reading: Reading
    variation: Variation | None = None
    truncated: int = 0


def open_up(
    wanted: Config,
    opened: Opened,
    found: Found,
    splits: dict[str, Pairs],
    steps: Order | None,
    reading: Reading,
    place: Place,
    storing: bool,
) -> Intake:
    """The feed of a run; with `storing`, features of a frozen tower are stored first, or decoded pictures kept."""
    variation = _variation(wanted, opened)
    if steps is None:
        feed = _from_afar(wanted, opened, found.shards, variation, reading.workers, place.world)
        return Intake(feed, reading, variation)
    ready = _from_disk(wanted, opened, splits, steps, variation, reading, place, storing)
    return _keeping(wanted, ready, found, splits, place, storing) if wanted.data.cache else ready


def asked_once(wanted: Config, opened: Opened, pairs: Pairs, reading: Reading, place: Place) -> Reading:
    """How a split that is ranked again and again is read: where a tower is frozen, from its stored features."""
    encoder, each = opened.encoder, reading.batch_size
    if wanted.model.image_tower == "frozen":
        rows = features.of_pictures(encoder, pairs, opened.pixels, each, reading.workers, place)
        reading = replace(reading, image_rows=rows)
    if wanted.model.text_tower == "frozen":
        reading = replace(reading, text_rows=features.of_captions(encoder, pairs, reading.tokens, each, place))
    return reading


def _from_disk(
    wanted: Config,
    opened: Opened,
    splits: dict[str, Pairs],
    steps: Order,
    variation: Variation | None,
    reading: Reading,
    place: Place,
    storing: bool,
) -> Intake:
    encoder, each, world = opened.encoder, reading.batch_size, place.world
    train = joined([splits[name] for name in _of_training(splits)])
    said, skips = spread(train), wanted.data.on_bad_image == "skip"
    tokens = captions.tokenise(opened.tokenizer, said.captions, opened.context, encoder.family)
    wording = Wording.of(train, wanted.train.seed)
    varied = _varied(variation, said.captions, wording, place.console) if variation else None
    spec, reduced = pixels(wanted, opened), wanted.data.reduced_decode
    pictures: Pictures | Rows = Pictures(train.images, spec, _dropout(wanted, opened), varied, reduced)
    texts = Texts(tokens, wording)
    if storing and wanted.model.image_tower == "frozen":
        pictures = features.of_pictures(encoder, train, opened.pixels, each, reading.workers, place, skips)
    if storing and wanted.model.text_tower == "frozen":
        texts = replace(texts, table=features.of_captions(encoder, said, tokens, each, place))
    if storing:
        reading = asked_once(wanted, opened, spread(splits["val"]), reading, place)
    identity = identities(said).map(lambda ids: torch.from_numpy(ids).to(world.device))
    feed = FromDisk(pictures, texts, steps, identity, train.names, reading.workers, skips)
    return Intake(feed, reading, variation, tokens.truncated)


def _varied(variation: Variation, said: Sequence[str], wording: Wording, console: Console) -> Varied:
    """Captions are looked through only where it matters: 50 µs each."""
    if not variation.minds_sides:
        return Varied(variation, wording, np.zeros(len(said), bool))
    sided = np.array([names_side(caption) for caption in said])
    console.say(
        f"data.augment: {sided.sum()} of {counted(len(said), 'caption')} name a side (left, upper, …): their pictures "
        "are neither turned nor mirrored"
        if sided.any()
        else "data.augment: no caption names a side (left, upper, …), so all pictures are turned and mirrored"
    )
    return Varied(variation, wording, sided)


def _from_afar(
    wanted: Config, opened: Opened, shards: list[str], variation: Variation | None, workers: int, world: World
) -> FromAfar:
    def tokenise(said: Sequence[str]) -> Tokens:
        return captions.tokenise(opened.tokenizer, said, opened.context, opened.encoder.family)

    data = wanted.data
    planned = streams.Plan(
        shards=shards,
        columns=Columns(data.image_column, data.caption_column),
        each=wanted.train.batch_size // world.size,
        spec=pixels(wanted, opened),
        tokenise=tokenise,
        seed=wanted.train.seed,
        rank=world.rank,
        size=world.size,
        skips=data.on_bad_image == "skip",
        dropout=_dropout(wanted, opened),
        variation=variation,
        reduced=data.reduced_decode,
    )
    return FromAfar(planned, workers)


def _variation(wanted: Config, opened: Opened) -> Variation | None:
    augment = wanted.data.augment
    return Variation(augment, opened.pixels.size, wanted.train.seed) if augment else None


def _dropout(wanted: Config, opened: Opened) -> PatchDropout | None:
    dropped = wanted.train.patch_dropout
    return PatchDropout(opened.encoder.patches, dropped, wanted.train.seed) if dropped else None


def _shards(wanted: Config) -> list[str]:
    """Of training pairs from afar; none where they are here."""
    data = wanted.data
    if not data.train or not places.is_remote(data.train):
        return []
    for option, given in (("replay", data.replay), ("cache", data.cache)):
        if given:
            raise UserError(
                f"data.{option} needs training pairs that are here, and data.train is {data.train}",
                f"delete data.{option}, or copy the shards to this machine and name their path",
            )
    return streams.shards(data.train)


def _keeping(
    wanted: Config, ready: Intake, found: Found, splits: dict[str, Pairs], place: Place, storing: bool
) -> Intake:
    """With the pictures kept decoded, those of validation too: they are read twice at least, before and after."""
    feed, reading, console = ready.feed, ready.reading, place.console
    if (
        wanted.model.image_tower == "frozen"
        or not isinstance(feed, FromDisk)
        or not isinstance(feed.pictures, Pictures)
    ):
        console.say("data.cache: nothing to keep: the frozen image tower's features are stored, and no picture is read")
        return ready
    val = spread(splits["val"])
    parts = [cache.Part(found.splits["val"][0], val.contents, Pictures(val.images, reading.pixels))]
    parts += [cache.Part(found.splits[name][0], splits[name].contents, feed.pictures) for name in _of_training(splits)]
    place.world.once(lambda: cache.announce(wanted.data, parts, console))
    if not storing:
        return ready
    of_val, *of_train = (cache.opened(part) for part in parts)
    kept = replace(feed, pictures=feed.pictures.kept_in(decoded.joined(of_train)))
    return replace(ready, feed=kept, reading=replace(reading, kept=of_val))


def _of_training(splits: Iterable[str]) -> list[str]:
    """The training split and the replayed roots, as they stand behind it in the numbering of the pairs."""
    return [name for name in splits if name not in (*leaks.HELD_OUT, KEEP)]


def _read_splits(wanted: Config, console: Console) -> dict[str, tuple[Path, Pairs]]:
    found = split_reader.read(wanted.data, ("train", *leaks.HELD_OUT), console)
    others = {}
    for number, replay in enumerate(wanted.data.replay, start=1):
        root = Path(replay.root)
        others[f"{_REPLAY} {number}"] = root if sources.is_split(root) else places.split(root, "train")
    if wanted.validation.keep:
        others[KEEP] = kept_split(Path(wanted.validation.keep))
    columns = Columns(wanted.data.image_column, wanted.data.caption_column)
    return found | {name: (folder, sources.read(folder, columns, console)) for name, folder in others.items() if folder}
