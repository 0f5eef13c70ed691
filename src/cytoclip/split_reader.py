"""The splits of a run: where the data have them, or with `data.hold_out` both of them from the training split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cytoclip import apart, batches, places, sources
from cytoclip.apart import Shares
from cytoclip.console import Console
from cytoclip.data_options import Data, HoldOut
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.pairs import Pairs
from cytoclip.rows import Columns

FEWEST = 5  # held-out captions, under which pairs of one caption may be on both sides: a few say too little


def read(data: Data, names: Iterable[str], console: Console) -> dict[str, tuple[Path, Pairs]]:
    """Of each of `names` that is there and here, its place and its pairs; not scanned.

    Raises
    ------
    UserError
        As `sources.read`; for `data.hold_out` of pairs from afar, or of pairs that cannot be cut so.
    """
    wanted = {name: data.split(name) for name in names}
    columns = Columns(data.image_column, data.caption_column)
    if data.hold_out:
        place = data.split("train")
        assert place is not None  # noqa: S101 - as the options have it; for mypy
        halves = cut(sources.read(place, columns, console), place, data, data.hold_out, console)
        return {name: (place, pairs) for name, pairs in halves.items() if name in wanted}
    return {
        name: (place, sources.read(place, columns, console))
        for name, place in wanted.items()
        if place and not (name == "train" and places.is_remote(str(place)))
    }


def cut(pairs: Pairs, place: Path, data: Data, asked: HoldOut, console: Console) -> dict[str, Pairs]:
    """`train` and `val` out of one split: a function of what the pairs are and of `data.hold_out`, not of their order.

    Pairs that share a source, a group, a picture's bytes or a caption stay together, directly or through others; those
    that share a caption alone do not where too few captions would be held out.
    """
    scanned = batches.scanned(pairs, place, console, data.on_bad_image == "skip")
    component_N = apart.components(scanned, captions=True)
    if asked.share * (component_N.max() + 1) < FEWEST:
        plain_N = apart.components(scanned)
        if plain_N.max() > component_N.max():
            console.warn(
                f"data.hold_out: the {counted(len(pairs), 'pair')} of {place} have so few captions that some are on "
                "both sides of the cut"
            )
            component_N = plain_N
    held_N = apart.split(scanned, Shares(asked.share, 0.0, asked.seed), component_N) > 0
    if not held_N.any() or held_N.all():
        raise UserError(
            f"data.hold_out: a share of {asked.share:g} cannot be cut off the {counted(len(pairs), 'pair')} of {place}, "
            f"which are {component_N.max() + 1} without a source, group, picture or caption in common",
            "give another data.hold_out.share, or data.val",
            ExitCode.DATA,
        )
    return {name: pairs.take(np.flatnonzero(of).tolist()) for name, of in (("train", ~held_N), ("val", held_N))}
