"""Image-caption pairs, and the one relation of who is right for whom that the loss and the metric share.

Letters: N pairs, R rows, C columns.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip.files import Piece

NO_GROUP = -1
# What begins the names that others give to where a picture comes from.
_AKIN = ("patient", "case", "subject", "donor", "participant", "specimen", "slide", "wsi", "figure", "study")


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split, column by column; position i of every column is pair i.

    Parameters
    ----------
    images
        The absolute file of each pair, or the piece of a file where pictures are packed together.
    names
        The same as the data write it: relative to `imgs/`, a column's value, a member of a shard.
    captions
        As written; only `same_caption_key` of them is compared.
    groups
        Pairs of one group are right for each other (several fields of one slide area under one diagnosis);
        None where the data name none.
    sources
        Where a pair comes from (patient, slide, figure): for splits, leaks and intervals, never a right answer.
    labels
        A class, where the data have one.
    contents
        Equal for equal pictures: a hash of each image once the files are scanned (`dataclasses.replace(pairs,
        contents=...)`). Until then the names, which miss only a picture stored twice.

    more
        Further captions of each pair's picture, where it has several: training draws one of all for each epoch.
    extra
        (key, value) of what else the data say of a pair in a few words (a site, a magnification): for slices.

    Raises
    ------
    ValueError
        Columns of different lengths: a bug in a reader.
    """

    images: tuple[Path | Piece, ...]
    names: tuple[str, ...]
    captions: tuple[str, ...]
    groups: tuple[str | None, ...]
    sources: tuple[str | None, ...]
    labels: tuple[str | None, ...]
    contents: tuple[str, ...] = ()
    more: tuple[tuple[str, ...], ...] = ()
    extra: tuple[tuple[tuple[str, str], ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.contents:
            object.__setattr__(self, "contents", self.names)  # the dataclass is frozen
        for name in ("more", "extra"):
            if not getattr(self, name):
                object.__setattr__(self, name, ((),) * len(self.images))
        lengths = {name: len(column) for name, column in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Sequence[int]) -> Pairs:
        """The pairs at `rows`, in that order."""
        return Pairs(**{name: tuple(column[row] for row in rows) for name, column in vars(self).items()})

    def further(self) -> dict[str, tuple[str | None, ...]]:
        """`extra` as columns: the value of each pair by key, None where a pair has none."""
        rows = [dict(row) for row in self.extra]
        keys = sorted({key for row in rows for key in row})
        return {key: tuple(row.get(key) for row in rows) for key in keys}


@dataclass(frozen=True)
class Identity:
    """What makes two pairs right for each other, as integers; numbers mean something only within one `identities`.

    Each field is int64 (N,): a numpy array, or after `map` a torch tensor on any device.

    Parameters
    ----------
    caption
        Equal for equal captions.
    image
        Equal for equal pictures.
    group
        Equal for one group; -1 for a pair without a group, which is in no group with anyone.
    """

    caption: Any
    image: Any
    group: Any

    def __len__(self) -> int:
        return len(self.caption)

    def take(self, indices: Any) -> Identity:
        """The rows at `indices`: a slice, or an index array of the kind that the fields are."""
        return self.map(lambda column: column[indices])

    def map(self, function: Callable[[Any], Any]) -> Identity:
        """`function` of each field, such as `lambda ids: torch.from_numpy(ids).to(device)`."""
        return Identity(function(self.caption), function(self.image), function(self.group))


def fingerprint(pairs: Pairs) -> str:
    """SHA-256 of what training sees of the pairs, in their order."""
    columns = (pairs.names, pairs.captions, pairs.groups, pairs.contents, *([pairs.more] if any(pairs.more) else []))
    return hashlib.sha256(repr(columns).encode("utf-8", "surrogatepass")).hexdigest()


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Several sets behind one another; groups and sources of the later ones are their own, whatever they are called."""

    def apart(part: int, tag: str | None) -> str | None:
        return tag if not part or not tag else f"{part}/{tag}"

    columns = {name: tuple(value for part in parts for value in getattr(part, name)) for name in vars(parts[0])}
    for name in ("groups", "sources"):
        columns[name] = tuple(apart(i, tag) for i, part in enumerate(parts) for tag in getattr(part, name))
    return Pairs(**columns)


def spread(pairs: Pairs) -> Pairs:
    """Every caption as a pair of its own, those of one picture behind one another: what is ranked."""
    rows = [row for row, more in enumerate(pairs.more) for _ in range(1 + len(more))]
    columns = {name: tuple(column[row] for row in rows) for name, column in vars(pairs).items() if name != "more"}
    columns["captions"] = tuple(
        text for one, more in zip(pairs.captions, pairs.more, strict=True) for text in (one, *more)
    )
    return Pairs(**columns)


def same_caption_key(caption: str) -> str:
    """The text by which two captions count as the same: NFKC, with white space collapsed and stripped.

    NFKC rather than NFC, because captions come out of PDFs and web pages, where one sentence is written with `ﬁ` or
    `fi`, the micro sign or the Greek mu, a full-width or a plain comma, a no-break or a plain space. The price is
    that `10⁵` equals `105`, which matters only between two captions that are equal in all the rest.
    Case is kept: it carries meaning (`TP53` is the human gene and `Tp53` the mouse's; `Mb` and `mb`), and a false
    "same" would give away a right answer, where a false "different" costs at most a tie.

    Examples
    --------
    >>> same_caption_key("Well-de\\ufb01ned  border,\\n5\\u00a0\\u00b5m ") == "Well-defined border, 5 \\u03bcm"
    True
    """
    return " ".join(unicodedata.normalize("NFKC", caption).split())


def akin_to_source(key: str) -> bool:
    """Whether a key is called like a patient, a slide or a figure, which should be a `source`."""
    return any(word.startswith(_AKIN) for word in re.findall(r"[a-z]+", key.lower()))


def identities(pairs: Pairs) -> Identity:
    """Number captions, pictures and groups by first occurrence. An empty group is a missing one."""
    return Identity(
        caption=_numbered(map(same_caption_key, pairs.captions)),
        image=_numbered(pairs.contents),
        group=_numbered(group or None for group in pairs.groups),
    )


def right_answers(rows: Identity, columns: Identity) -> Any:
    """Whether the text of one pair is right for the image of another, and the other way round.

    Two pairs are right for each other when they are the same pair or share a caption, a picture or a group. The
    relation is symmetric, so it serves both directions, and it is not closed transitively: A may share a caption with
    B and B a picture with C without A being right for C. A pair shares its caption with itself, so the
    diagonal of `right_answers(identity, identity)` is always true.

    Only operators are used: numpy arrays and torch tensors both pass, on whatever device they are.

    Returns
    -------
    bool (R, C), of the kind that the fields are.
    """
    same_caption = rows.caption[:, None] == columns.caption[None, :]
    same_image = rows.image[:, None] == columns.image[None, :]
    same_group = (rows.group[:, None] == columns.group[None, :]) & (rows.group[:, None] != NO_GROUP)
    return same_caption | same_image | same_group


def _numbered(keys: Iterable[Hashable]) -> NDArray[np.int64]:
    """Each distinct key's number by first occurrence; None is -1."""
    numbers: dict[Hashable, int] = {}
    return np.array([NO_GROUP if key is None else numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
