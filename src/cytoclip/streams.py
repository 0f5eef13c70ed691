"""Pairs that are read from afar, shard by shard: for data too large to be held here, or to be indexed first.

What is local is read by random access (`order.py`). What is not comes in the order of its shards: each epoch is a
fresh permutation of the shards, dealt out to all loader processes of all training processes, and each shard's pairs
come in shuffled blocks. All of it is a pure function of (seed, epoch, place), so a run goes on exactly where it
stopped, as long as as many processes read.

Letters: b pairs of a batch in this process.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from cytoclip import pictures
from cytoclip.augment import Variation
from cytoclip.batches import Batch
from cytoclip.captions import Tokens
from cytoclip.errors import ExitCode, UserError, counted, first_few, nearest
from cytoclip.pairs import NO_GROUP, Identity, same_caption_key
from cytoclip.pictures import PatchDropout
from cytoclip.pixels import PixelSpec
from cytoclip.places import MANY, braces
from cytoclip.rows import Columns, plain_row, tags_problem
from cytoclip.sides import names_side

BLOCK = 512  # pairs of a shard that are shuffled together: their encoded pictures are held, about 50 MB
_BUILDERS = {"tar": "webdataset", "parquet": "parquet", "csv": "csv", "tsv": "csv", "jsonl": "json", "json": "json"}
_PICTURES = ("image", "img", "jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "picture", "bytes")
_CAPTIONS = ("caption", "text", "txt", "captions", "description")


def shards(address: str) -> list[str]:
    """The addresses of all shards that `address` names: with {000..099}, with *, or a folder of them; sorted.

    Raises
    ------
    UserError
        For a file system that is not installed, or no shards.
    """
    found: list[str] = []
    for number, one in enumerate(_written_out(address)):
        if number >= MANY:
            raise UserError(f"{address} names more than {MANY} shards", "name fewer, larger ones", ExitCode.DATA)
        try:
            system, path = fsspec.core.url_to_fs(one)
            if any(sign in path for sign in "*?["):
                found += [system.unstrip_protocol(each) for each in system.glob(path)]
            elif _ending(path) not in _BUILDERS and system.isdir(path):  # a request: not for each of 100,000
                listed = system.find(path)
                found += [system.unstrip_protocol(each) for each in listed if _ending(each) in _BUILDERS]
            else:
                found.append(one)
        except (ImportError, ValueError) as error:
            hint = "pip install s3fs for s3://, gcsfs for gs://, aiohttp for https://"
            raise UserError(f"{one} cannot be opened: {error}", hint, ExitCode.DATA) from None
        except OSError as error:
            raise UserError(f"{one} cannot be listed: {error}", "check address and login", ExitCode.DATA) from None
    known = [one for one in found if _ending(one) in _BUILDERS]
    if not known:
        raise UserError(
            f"no shards at {address}" + (f": {first_few(found)} is none of a known kind" if found else ""),
            f"name files that end in .{', .'.join(_BUILDERS)}",
            ExitCode.DATA,
        )
    return sorted(set(known))


def _written_out(address: str) -> Iterator[str]:
    try:
        yield from braces(address)
    except ValueError as error:
        hint = "such as s3://bucket/{000..099}.tar"
        raise UserError(f"{address} is no pattern: {error}", hint, ExitCode.DATA) from None


class Sample(NamedTuple):
    """One pair as a shard holds it: a picture's bytes, its captions, and its name in messages."""

    name: str
    picture: bytes
    captions: tuple[str, ...]
    group: str | None


class Position(NamedTuple):
    """How far one loader process has read: `taken` pairs of its `shard`-th shard of an epoch."""

    epoch: int = 0
    shard: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Arrived:
    """What one loader process hands over: a batch, who its pairs are, and where to go on after it.

    Parameters
    ----------
    identity
        Its fields hold 63 bits of a hash: equal pictures, captions and groups meet by it in any process.
    skipped
        Names of the pictures that could not be used since the batch before.
    """

    batch: Batch
    identity: Identity
    names: list[str]
    reader: int
    position: Position
    skipped: list[str]

    def pin_memory(self) -> Arrived:
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class Plan:
    """What is read and how: all that is the same in every loader process."""

    shards: Sequence[str]
    columns: Columns
    each: int  # pairs of a batch in one training process
    spec: PixelSpec
    tokenise: Callable[[Sequence[str]], Tokens]
    seed: int
    rank: int
    size: int
    skips: bool = False
    dropout: PatchDropout | None = None
    variation: Variation | None = None
    reduced: bool = False  # as of `pictures.read`


class Stream(IterableDataset["Arrived | UserError"]):
    """Batches without end, each from one loader process; a failure becomes its error, as in `pictures.Pictures`.

    Parameters
    ----------
    behind
        Of a run that goes on: where each loader process of this training process stopped, in their order.
    first
        The reader that comes next: loader processes take turns.
    """

    def __init__(self, plan: Plan, behind: Sequence[Position] = (), first: int = 0) -> None:
        self._plan, self._behind, self._first = plan, behind, first

    def __iter__(self) -> Iterator[Arrived | UserError]:
        info = get_worker_info()
        readers, number = (info.num_workers, info.id) if info else (1, 0)
        reader = (number + self._first) % readers  # the loader asks its first process first
        position = self._behind[reader] if self._behind else Position()
        try:
            yield from _batches(self._plan, reader, readers, position)
        except UserError as error:
            yield error


def _batches(plan: Plan, reader: int, readers: int, begin: Position) -> Iterator[Arrived]:
    """Full batches of one epoch after another; an epoch's last pairs that do not fill one are dropped."""
    epoch = begin.epoch
    while True:
        held: list[tuple[Sample, NDArray[np.uint8]]] = []
        skipped: list[str] = []
        full = epoch == begin.epoch and begin != Position(epoch)
        for sample, position in _epoch(plan, reader, readers, Position(epoch) if epoch != begin.epoch else begin):
            try:
                held.append((sample, pictures.read(sample.picture, plan.spec, plan.reduced)))
            except UserError as error:
                if not plan.skips:
                    raise UserError(f"{sample.name}: {error.message}", error.hint, ExitCode.DATA) from None
                skipped.append(sample.name)
            if len(held) == plan.each:
                yield _arrived(plan, held, reader, position, skipped)
                held, skipped, full = [], [], True
        if not full:
            total = readers * plan.size
            raise UserError(
                f"{counted(len(held), 'pair')} in the shards of one of {total} readers do not fill its {plan.each} "
                "pairs of a batch",
                "set a smaller train.batch_size, or fewer data.workers",
                ExitCode.DATA,
            )
        epoch += 1


def _epoch(plan: Plan, reader: int, readers: int, begin: Position) -> Iterator[tuple[Sample, Position]]:
    """The pairs of one reader's shards of an epoch from `begin` on, each with the position behind it."""
    dealt = np.random.default_rng([plan.seed, begin.epoch]).permutation(len(plan.shards))
    mine = dealt[plan.rank * readers + reader :: plan.size * readers]
    taken = begin.taken
    for number in range(begin.shard, len(mine)):
        for count, sample in enumerate(_shuffled(plan, int(mine[number]), begin.epoch, taken), start=taken + 1):
            yield sample, Position(begin.epoch, number, count)
        taken = 0


def _shuffled(plan: Plan, shard: int, epoch: int, taken: int) -> Iterator[Sample]:
    """The pairs of a shard in shuffled blocks, without the first `taken`; blocks before those are not decoded."""
    rows = samples(plan.shards[shard], plan.columns)
    block = taken // BLOCK
    for _ in islice(rows, block * BLOCK):
        pass
    begin = taken % BLOCK
    while held := list(islice(rows, BLOCK)):
        order = np.random.default_rng([plan.seed, epoch, shard, block]).permutation(len(held))
        yield from (held[row] for row in order[begin:])
        block, begin = block + 1, 0


def samples(address: str, columns: Columns) -> Iterator[Sample]:
    """The pairs of one shard, in its order. Pictures stay encoded.

    Raises
    ------
    UserError
        For a shard that cannot be read, or rows that are no pairs.
    """
    datasets = _library()
    builder = _BUILDERS[_ending(address)]
    try:
        rows = datasets.load_dataset(builder, data_files=[address], split="train", streaming=True)
        rows = rows.decode(False) if rows.features else rows
        for number, one in enumerate(rows.iter(1)):  # unlike iter(rows), it leaves the loader's processes to us
            row = {key: column[0] for key, column in one.items()}
            yield _sample(row, columns, f"{address}, row {row.get('__key__', number)}")
    except UserError:
        raise
    except Exception as error:  # of datasets, fsspec, and every file system behind it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{address} cannot be read: {reason}", "check address, login and file", ExitCode.DATA) from None


def _sample(row: dict[str, Any], columns: Columns, name: str) -> Sample:
    nested = row.get("json")
    fields = {**(nested if isinstance(nested, dict) else {}), **{key: row[key] for key in row if key != "json"}}
    pictures = {key: value for key, given in fields.items() if isinstance(value := _bytes(given), bytes)}
    written = {key: value for key, value in fields.items() if isinstance(value, str | list) and key[:2] != "__"}
    picture = pictures[_column(pictures, fields, columns.image, _PICTURES, "image", name)]
    said = written[_column(written, fields, columns.caption, _CAPTIONS, "caption", name)]
    captions = tuple(said) if isinstance(said, list) else (said,)
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise _no_pair(name, "has an empty caption", "take its pair out of the shard")
    plain = plain_row({"group": fields.get("group")})
    wrong = tags_problem(plain)
    if wrong:
        raise UserError(f"{name}: {wrong}", "write each group as a text or a whole number", ExitCode.DATA)
    return Sample(name, picture, captions, None if plain["group"] is None else str(plain["group"]))


def _bytes(value: Any) -> Any:
    return value.get("bytes") if isinstance(value, dict) else value


def _column(
    fit: dict[str, Any], there: dict[str, Any], asked: str | None, usual: Sequence[str], what: str, name: str
) -> str:
    """The key of picture or caption among those that `fit`: the one that was asked for, else one with a usual name."""
    if asked and asked not in there:
        near = nearest(asked, list(there))
        raise _no_pair(name, f"has no {asked}", f"did you mean {near}?" if near else f"it has {first_few(list(there))}")
    if asked and asked not in fit:
        wanted = "the bytes of a picture" if what == "image" else "text"
        hint = f"set data.{what}_column to another of {first_few(list(there))}"
        raise _no_pair(name, f"has in {asked} not {wanted}", hint)
    found = asked or next((key for word in usual for key in fit if key.lower() == word), None)
    if found is None:
        kind = "bytes of a picture" if what == "image" else "caption"
        raise _no_pair(name, f"has no {kind} in {first_few(list(there))}", f"name it with data.{what}_column")
    return found


def _no_pair(name: str, what: str, hint: str) -> UserError:
    return UserError(f"{name} {what}", hint, ExitCode.DATA)


def _arrived(
    plan: Plan, held: list[tuple[Sample, NDArray[np.uint8]]], reader: int, position: Position, skipped: list[str]
) -> Arrived:
    names = [sample.name for sample, _ in held]
    pairs = _hashed(names)
    begins = _hashed([f"{plan.seed} {name}" for name in names])
    drawn = zip(begins, (sample.captions for sample, _ in held), strict=True)
    chosen = [captions[(begin + position.epoch) % len(captions)] for begin, captions in drawn]
    tokens, epoch = plan.tokenise(chosen), position.epoch
    batch = Batch(
        pairs,
        torch.from_numpy(np.stack([picture for _, picture in held])),
        tokens.batch(range(len(held))),
        tokens.lengths(),
        changes=_changes(plan.variation, pairs, epoch, chosen) if plan.variation else None,
        keep=torch.stack([plan.dropout.keep(int(pair), epoch) for pair in pairs]) if plan.dropout else None,
    )
    identity = Identity(
        caption=_hashed([same_caption_key(caption) for caption in chosen]),
        image=_hashed([sample.picture for sample, _ in held]),
        group=np.where([not sample.group for sample, _ in held], NO_GROUP, _hashed([s.group or "" for s, _ in held])),
    )
    return Arrived(batch, identity, names, reader, position, skipped)


def _changes(variation: Variation, pairs: NDArray[np.int64], epoch: int, said: Sequence[str]) -> torch.Tensor:
    upright = [variation.minds_sides and names_side(caption) for caption in said]
    return torch.stack([variation.draw(int(pair), epoch, one) for pair, one in zip(pairs, upright, strict=True)])


def _hashed(keys: Sequence[str | bytes]) -> NDArray[np.int64]:
    """63 bits of each key's SHA-256: among 2**20 pairs of a batch, two different ones meet with 1 in 2**24."""
    written = (key if isinstance(key, bytes) else key.encode("utf-8", "replace") for key in keys)
    digests = [hashlib.sha256(key).digest() for key in written]
    return np.array([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], np.int64)


def _ending(address: str) -> str:
    return address.split("?")[0].rpartition(".")[2].lower()


def _library() -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UserError("data from afar needs the datasets library", 'pip install "cytoclip[hub]"', ExitCode.SYSTEM)
    import datasets

    datasets.disable_progress_bars()
    return datasets
