"""What is wrong with the pairs of each split, from the looks at their pictures and from their captions: pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cytoclip import identifiers, leaks, texts
from cytoclip.families import Family
from cytoclip.kinds import Case, Finding, by_severity
from cytoclip.looks import DATED, DIED, Look
from cytoclip.pairs import Pairs
from cytoclip.pixels import PixelSpec

CONSTANT = 3.0  # grey levels: blank fields of a lit slide spread by 1 to 2, a field with one small cell by 5 and more
LOST = 0.2  # share of a picture that the crop may throw away without being a finding
_UNUSED = 2  # bits at the top, of pictures that are read too dark
_EXCERPT = 80  # characters of a caption beside its name


@dataclass(frozen=True)
class Split:
    """A split as it was read.

    Parameters
    ----------
    pairs
        With the hashes of the looks as `contents`.
    looks
        At the picture of each pair.
    unnamed
        Files below imgs/ that no pair names.
    tokens
        int64: tokens of each of `captions()`, special ones included and nothing cut; None without a checkpoint.
    """

    pairs: Pairs
    looks: Sequence[Look]
    unnamed: Sequence[str] = ()
    tokens: NDArray[np.int64] | None = None

    def pictures(self) -> dict[int, Look]:
        """Each different file's first pair, and the look at it."""
        rows: dict[Any, int] = {}
        for row, place in enumerate(self.pairs.images):
            rows.setdefault(place, row)
        return {row: self.looks[row] for row in rows.values()}

    def captions(self) -> list[tuple[int, str]]:
        """Each caption with its pair, further ones of a picture included."""
        return [
            (row, text)
            for row, (one, more) in enumerate(zip(self.pairs.captions, self.pairs.more, strict=True))
            for text in (one, *more)
        ]


@dataclass(frozen=True)
class Reader:
    """What is asked of a checkpoint: how it reads captions and pictures."""

    name: str
    tokenizer: Any
    context: int
    family: Family
    pixels: PixelSpec


def find(splits: Mapping[str, Split], reader: Reader | None) -> list[Finding]:
    """Everything that is found in the splits and between them, the worst first.

    Without a reader, what depends on a checkpoint (tokens, crop, size) is left out.
    """
    found: list[Finding] = []
    for name, split in splits.items():
        found += [*of_pictures(name, split), *of_captions(name, split), *leaks.within(name, split.pairs)]
        if reader is not None:
            found += [*_cropped(name, split, reader.pixels), *_tokens(name, split, reader)]
    pairs = {name: split.pairs for name, split in splits.items()}
    faces = {
        look.content: leaks.Face(look.hashes, look.thumb)
        for split in splits.values()
        for look in split.looks
        if look.hashes and look.spread >= CONSTANT
    }
    return by_severity([*found, *leaks.across(pairs), *leaks.alike(pairs, faces)])


def of_pictures(name: str, split: Split) -> list[Finding]:
    """What the look at each different file says; a file with a problem has that one finding only."""
    pictures = split.pictures()
    cases: dict[str, list[Case]] = {}
    for row, look in pictures.items():
        written = split.pairs.names[row]
        if look.problem:
            cases.setdefault(_problem_kind(look.problem), []).append(Case(name, written, row, look.problem))
            continue
        for kind, says in _OF_LOOKS.items():
            note = says(look, written)
            if note is not None:
                cases.setdefault(kind, []).append(Case(name, written, row, note))
    found = [Finding(kind, name, len(pictures), tuple(some)) for kind, some in cases.items()]
    if split.unnamed:
        unnamed = tuple(Case(name, one) for one in split.unnamed)
        found.append(Finding("unnamed", name, len(unnamed) + len(pictures), unnamed))
    return found


def of_captions(name: str, split: Split) -> list[Finding]:
    """What the characters of each caption say."""
    captions = split.captions()
    found = []
    for kind, is_so in _OF_TEXTS.items():
        known = {text: is_so(text) for text in dict.fromkeys(text for _, text in captions)}
        cases = tuple(_said(name, split, row, text) for row, text in captions if known[text])
        found.append(Finding(kind, name, len(captions), cases))
    personal = {text: identifiers.found(text) for text in dict.fromkeys(text for _, text in captions)}
    cases = tuple(
        Case(name, split.pairs.names[row], row, ", ".join(personal[text])) for row, text in captions if personal[text]
    )
    found.append(Finding("personal-captions", name, len(captions), cases))
    return [finding for finding in found if finding.cases]


def lost(width: int, height: int, spec: PixelSpec) -> float:
    """The share of a picture's area that the resize and crop of `spec` leave out."""
    wide, high = float(width), float(height)
    if isinstance(spec.resize, tuple):
        high, wide = (float(edge) for edge in spec.resize)
    elif spec.resize is not None:
        wide, high = (edge * spec.resize / min(width, height) for edge in (wide, high))
    rows, columns = spec.size
    return 1 - min(rows, high) * min(columns, wide) / (wide * high)


def _problem_kind(problem: str) -> str:
    for kind, begins in (("missing", "no such file"), ("empty-file", "empty file"), ("too-large", "claims ")):
        if problem.startswith(begins):
            return kind
    if problem == DIED or "memory" in problem:
        return "decoder-died"
    return "truncated" if "truncated" in problem else "undecodable"


def _wrong_extension(look: Look, name: str) -> str | None:
    expected = Image.EXTENSION.get(PurePosixPath(name).suffix.lower())
    same = {"MPO": "JPEG"}  # a JPEG with a second picture behind it
    if expected is None or same.get(expected, expected) == same.get(look.format, look.format):
        return None
    return f"it is {look.format}"


def _is_dim(look: Look) -> bool:
    """A quarter of the range at most: cameras of 12 and 14 bits. What is black is not."""
    return look.depth > 8 and 0 < look.used <= look.depth - _UNUSED


def _one_colour(look: Look, _: str) -> str | None:
    """What is dim may show a lot once it is rescaled."""
    return f"grey levels spread by {look.spread:.1f}" if look.spread < CONSTANT and not _is_dim(look) else None


def _only_dated(look: Look) -> bool:
    return all(field.endswith(DATED) for field in look.personal)


# kind -> what is said of a look at the file of that name, None where it is not so
_OF_LOOKS: dict[str, Callable[[Look, str], str | None]] = {
    "wrong-extension": _wrong_extension,
    "several-pages": lambda look, _: look.format if look.several else None,
    "near-constant": _one_colour,
    "dim": lambda look, _: f"uses {look.used} of {look.depth} bits" if _is_dim(look) else None,
    "deep": lambda look, _: f"{look.depth} bits" if look.depth > 8 and not _is_dim(look) else None,
    "other-colours": lambda look, _: look.mode if look.mode in ("CMYK", "YCbCr", "LAB", "HSV") else None,
    "transparent": lambda look, _: look.mode if look.transparent else None,
    "turned": lambda look, _: f"orientation {look.orientation}" if look.orientation != 1 else None,
    "personal-metadata": lambda look, _: ", ".join(look.personal) if not _only_dated(look) else None,
    "dated-metadata": lambda look, _: ", ".join(look.personal) if look.personal and _only_dated(look) else None,
}

_OF_TEXTS: dict[str, Callable[[str], bool]] = {
    "empty-caption": texts.is_empty,
    "no-value": texts.is_no_value,
    "one-word": texts.is_one_word,
    "mojibake": texts.is_mojibake,
    "html": texts.has_html,
}


def _cropped(name: str, split: Split, spec: PixelSpec) -> list[Finding]:
    pictures = {row: look for row, look in split.pictures().items() if not look.problem}
    shares = {row: lost(look.width, look.height, spec) for row, look in pictures.items()}
    worst = sorted((row for row, share in shares.items() if share >= LOST), key=lambda row: -shares[row])
    fewer = all if spec.pad else any  # what is padded is enlarged until one side fits, other pictures until both do
    small = [row for row, look in pictures.items() if fewer((look.width < spec.size[1], look.height < spec.size[0]))]

    def cases(rows: Sequence[int], note: Callable[[int], str]) -> tuple[Case, ...]:
        return tuple(Case(name, split.pairs.names[row], row, note(row)) for row in rows)

    found = []
    if worst:
        mean = sum(shares.values()) / len(shares)
        detail = f"{mean:.0%} of all pixels of the split are thrown away"
        found.append(Finding("cropped-away", name, len(pictures), cases(worst, lambda r: f"{shares[r]:.0%}"), detail))
    if small:
        detail = f"the model reads {spec.size[1]}×{spec.size[0]}"
        sizes = cases(small, lambda row: f"{pictures[row].width}×{pictures[row].height}")
        found.append(Finding("enlarged", name, len(pictures), sizes, detail))
    return found


def _tokens(name: str, split: Split, reader: Reader) -> list[Finding]:
    captions, counts = split.captions(), split.tokens
    if counts is None:
        return []
    cut = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i] > reader.context]
    longest = tuple(Case(name, split.pairs.names[captions[i][0]], captions[i][0], f"{counts[i]} tokens") for i in cut)
    found = []
    if cut:
        detail = f"{len(cut) / len(captions):.1%} lose what follows token {reader.context}"
        found.append(Finding("cut-captions", name, len(captions), longest, detail))
    unread = texts.unread_among(reader.tokenizer, [text for _, text in captions], reader.family)
    cases = tuple(_said(name, split, row, text) for row, text in captions if text in unread)
    if cases:
        found.append(Finding("unread-script", name, len(captions), cases, texts.READ_BY))
    return found


def _said(name: str, split: Split, row: int, caption: str) -> Case:
    text = identifiers.masked(" ".join(caption.split()))
    return Case(name, split.pairs.names[row], row, f"{text[:_EXCERPT]}{'…' if len(text) > _EXCERPT else ''}")
