"""What belongs together, and splits that do not cut through it.

Letters: N pairs, K components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cytoclip import places
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.pairs import Pairs, akin_to_source, same_caption_key

SPLITS = ("train", "val", "test")
_KEY = "split"
_NUMBER = {**{name: number for number, name in enumerate(SPLITS)}, "dev": 1}


@dataclass(frozen=True)
class Shares:
    """How much of the pairs goes into `val` and `test`, and the seed that decides which."""

    val: float = 0.1
    test: float = 0.1
    seed: int = 0


def split(pairs: Pairs, shares: Shares, component_N: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The number of each pair's split in `SPLITS`: a function of what the pairs are and the seed, not of their order.

    Pairs that share a source, a group or the bytes of a picture are one component, directly or through others, and
    components are never cut. They come in the order of a hash of the seed and their smallest content, and each goes
    to the first of val and test that it brings nearer to its share, else to train. So no single component more would
    bring val or test nearer, and a random order keeps them like the whole. `component_N` where it is others that
    belong together.

    Returns
    -------
    int64 (N,)
    """
    component_N = components(pairs) if component_N is None else component_N
    sizes_K = np.bincount(component_N)
    first_K: list[str] = [""] * len(sizes_K)
    for number, content in zip(component_N.tolist(), pairs.contents, strict=True):
        first_K[number] = min(first_K[number] or content, content)
    drawn_K = [hashlib.sha256(f"{shares.seed} {content}".encode()).digest() for content in first_K]
    split_K = np.zeros(len(sizes_K), np.int64)
    held = [0.0, -shares.val * len(pairs), -shares.test * len(pairs)]  # below zero: so many are still wanted
    for number in sorted(range(len(sizes_K)), key=lambda k: drawn_K[k]):
        count = int(sizes_K[number])
        into = next((s for s in (1, 2) if abs(held[s] + count) < abs(held[s])), 0)
        split_K[number] = into
        held[into] += count
    return split_K[component_N]


def told(pairs: Pairs, place: Path) -> NDArray[np.int64] | None:
    """The split of each pair, as `split`, with the numbers of `SPLITS`, where a key `split` of theirs names them.

    None where there is no such key, where none of its values is a split's name, or all name one: it cuts nothing then.

    Raises
    ------
    UserError
        Where some pairs name a split, and others none.
    """
    said = [next((value for key, value in of if key.lower() == _KEY), "") for of in pairs.extra]
    numbers = [_number(value) for value in said]
    if len(set(numbers)) == 1:
        return None
    lacking = [(name, value) for name, value, into in zip(pairs.names, said, numbers, strict=True) if into is None]
    if lacking:
        names = first_few([f"{name} ({repr(value) if value else 'empty'})" for name, value in lacking])
        raise UserError(
            f"{counted(len(lacking), 'pair')} of {place} without a split's name in {_KEY!r}, as others have: {names}",
            f"write {', '.join(SPLITS[:2])} or {SPLITS[2]} there, or rename {_KEY!r}: then the pairs are split anew",
            ExitCode.DATA,
        )
    return np.array(numbers, np.int64)


def warn_of_told(pairs: Pairs, place: Path, console: Console) -> None:
    """Where pairs that are used as one split say that they are several: pairs of test may be trained on."""
    said = {_number(value) for of in pairs.extra for key, value in of if key.lower() == _KEY} - {None}
    if len(said) > 1:
        names = ", ".join(name for number, name in enumerate(SPLITS) if number in said)
        console.warn(
            f"the pairs of {place} say {names} in {_KEY!r}, and all of them are trained on or held out: "
            "`cytoclip bring` writes them as the splits that they name"
        )


def _number(value: str) -> int | None:
    """Which of `SPLITS` a word names, as others call them too; None: none."""
    return _NUMBER.get(places.ours(value.strip().lower()))


def warn_of_cut_sources(pairs: Pairs, console: Console) -> None:
    """Where no pair has a source and another key sounds like one: patients may be cut, and nothing can see it."""
    if any(pairs.sources):
        return
    akin = next(filter(akin_to_source, sorted({key for of in pairs.extra for key, _ in of})), None)
    if akin:
        console.warn(
            f"no pair has a `source`, so what comes from one {akin!r} may lie in several splits, and no check sees it: "
            "rename that key to `source` if it is a patient, a slide or a figure"
        )


def components(pairs: Pairs, captions: bool = False) -> NDArray[np.int64]:
    """The number of each pair's component: those that share a source, a group or a content, closed transitively.

    With `captions`, those that share a caption too.
    """
    parent = list(range(len(pairs)))

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def tie(column: Iterable[tuple[int, str | None]]) -> None:
        first: dict[str, int] = {}
        for row, value in column:
            if value:
                parent[top(row)] = top(first.setdefault(value, row))

    for column in (pairs.sources, pairs.groups, pairs.contents):
        tie(enumerate(column))
    if captions:
        said = zip(pairs.captions, pairs.more, strict=True)
        tie((row, same_caption_key(text)) for row, (one, more) in enumerate(said) for text in (one, *more))
    tops = [top(row) for row in range(len(pairs))]
    return np.unique(np.array(tops, np.int64), return_inverse=True)[1].astype(np.int64)
