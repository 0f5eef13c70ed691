"""The splits of a run: where the data have them, or with `data.hold_out` both of them from the training split."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cytoclip import apart, batches, places, rows, sources
from cytoclip.apart import Shares
from cytoclip.console import Console
from cytoclip.data_options import HOLD_OUT, Data, HoldOut
from cytoclip.errors import ExitCode, UserError, counted, neighbour
from cytoclip.pairs import Pairs, same_caption_key
from cytoclip.rows import Columns

FEWEST = 5  # parts held out, and
LEAST = 0.5  # of the share asked for: with less, pairs of one caption may be on both sides


def read(data: Data, names: Iterable[str], console: Console) -> dict[str, tuple[Path, Pairs]]:
    """Of each of `names` that is there and here, its place and its pairs; not scanned.

    Raises
    ------
    UserError
        As `sources.read`; for `data.hold_out` of pairs from afar, or of pairs that cannot be cut so.
    """
    wanted = {name: data.split(name) for name in names}
    if data.root:
        _require_splits(Path(data.root), wanted if not data.hold_out else {"train": data.split("train")})
    columns = columns_of(data)
    if data.hold_out:
        place = data.split("train")
        assert place is not None  # noqa: S101 - as the options have it; for mypy
        whole = sources.read(place, columns, console)
        apart.warn_of_told(whole, place, console)
        halves = cut(whole, place, data, data.hold_out, console)
        return {name: (place, pairs) for name, pairs in halves.items() if name in wanted}
    found = {
        name: (place, sources.read(place, columns, console))
        for name, place in wanted.items()
        if place and not (name == "train" and places.is_remote(str(data.train)))  # a Path has lost its second slash
    }
    for place, pairs in found.values():
        apart.warn_of_told(pairs, place, console)
    return found


def columns_of(data: Data) -> Columns:
    """How the tables of the splits are read; those that `data.replay` and `validate.keep` name have other folders."""
    return Columns(data.image_column, data.caption_column, Path(data.image_root) if data.image_root else None)


def _require_splits(root: Path, wanted: Mapping[str, Path | None]) -> None:
    """Of a data root that is there: a split that is not, or a root that is itself one, has a hint of its own."""
    there = ((name, place.exists() or places.split(root, name) is not None) for name, place in wanted.items() if place)
    missing = [name for name, found in there if not found]
    if not missing or not root.exists() or neighbour(root / missing[0]):
        return
    own, bring = shlex.quote(str(root)), "`cytoclip bring {} --to …` writes train, val and test"
    if missing == ["val"]:
        raise rows.data_error(
            f"no such folder: {root / 'val'}", f"{HOLD_OUT}; {bring.format(shlex.quote(str(wanted['train'])))}"
        )
    tables = [place for place in root.glob("*.*") if place.suffix[1:].lower() in places.ENDINGS]
    holds = "pairs itself" if sources.holds_pairs(root) else None
    if not holds and len(tables) == 1 and not places.splits(root):
        holds, own = tables[0].name, shlex.quote(str(tables[0]))
    if holds:
        raise rows.data_error(
            f"no split {missing[0]!r} in {root}, which holds {holds}",
            f"data.root=null data.train={own} data.hold_out.share=0.15; or {bring.format(own)}",
        )


def cut(pairs: Pairs, place: Path, data: Data, asked: HoldOut, console: Console) -> dict[str, Pairs]:
    """`train` and `val` out of one split: a function of what the pairs are and of `data.hold_out`, not of their order.

    Pairs that share a source, a group, a picture's bytes or a caption stay together, directly or through others. Where
    that leaves too little to hold out, those that share no more than a caption need not.
    """
    apart.warn_of_cut_sources(pairs, console)
    scanned = batches.scanned(pairs, place, console, data.on_bad_image == "skip")
    component_N = apart.components(scanned, captions=True)
    held_N = _held_out(scanned, asked, component_N)
    if len(np.unique(component_N[held_N])) < FEWEST or held_N.mean() < LEAST * asked.share:
        plain_N = apart.components(scanned)
        held_N = _held_out(scanned, asked, plain_N)
        if not held_N.any() or held_N.all():
            raise UserError(
                f"data.hold_out: a share of {asked.share:g} cannot be cut off {place}: its {len(pairs)} pairs are "
                f"{plain_N.max() + 1} without a source, group or picture in common",
                "give another data.hold_out.share, or data.val",
                ExitCode.DATA,
            )
        both = {*_said(scanned, held_N)} & {*_said(scanned, ~held_N)}
        if both:
            console.warn(
                f"data.hold_out: {counted(len(both), 'caption')} of {place} had to be on both sides of the cut"
            )
    return {name: pairs.take(np.flatnonzero(of).tolist()) for name, of in (("train", ~held_N), ("val", held_N))}


def _held_out(pairs: Pairs, asked: HoldOut, component_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    return apart.split(pairs, Shares(asked.share, 0.0, asked.seed), component_N) > 0


def _said(pairs: Pairs, of: NDArray[np.bool_]) -> list[str]:
    return [same_caption_key(pairs.captions[row]) for row in np.flatnonzero(of)]
