"""Every kind of thing that the check of the data finds: how bad it is, what it is called, what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: dict[Severity, str] = {
    "error": "training refuses it, or its numbers would be wrong",
    "warning": "it costs quality or names a person, and somebody should look",
    "note": "it is handled, and good to know",
}


@dataclass(frozen=True)
class Kind:
    """A kind of finding: its `title` stands before a count of `things`."""

    severity: Severity
    things: str
    title: str
    fix: str


@dataclass(frozen=True, slots=True)
class Case:
    """One place where something was found.

    Parameters
    ----------
    split, name
        The split, and the picture as the data name it.
    row
        The pair in its split; -1 where it is none.
    note
        What is special here; an identifier in it is masked.
    twin
        The other side of a leak or a likeness.
    """

    split: str
    name: str
    row: int = -1
    note: str = ""
    twin: Case | None = None

    def text(self) -> str:
        """One line for a terminal: what it would take for a command, or as a change of direction, is replaced."""
        twin = f" = {self.twin.split}/{self.twin.name}" if self.twin else ""
        text = f"{self.split}/{self.name}{twin}{f' ({self.note})' if self.note else ''}"
        return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


@dataclass(frozen=True)
class Finding:
    """All cases of one kind in one split (`split`, or `val and train`), out of `of` things."""

    kind: str
    split: str
    of: int
    cases: tuple[Case, ...]
    detail: str = ""

    @property
    def count(self) -> int:
        return len(self.cases)

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    def text(self) -> str:
        """`missing pictures: 3 of 120 in train`, with the detail behind it."""
        kind = KINDS[self.kind]
        counted = f": {self.count:,} of {self.of:,} {kind.things} in {self.split}" if self.of else f": {self.split}"
        return f"{kind.title}{counted}{f'; {self.detail}' if self.detail else ''}"


def by_severity(findings: list[Finding]) -> list[Finding]:
    """The worst first, else in the order of `KINDS` and as they were found."""
    ranks, order = list(SEVERITIES), list(KINDS)
    return sorted(findings, key=lambda one: (ranks.index(one.severity), order.index(one.kind)))


_APART = "write captions that tell pictures apart; where captions are class names, `cytoclip classify` is for them"
_MEND = "replace the files from where they came, or take their pairs out"

KINDS = {
    # the splits
    "unreadable-split": Kind("error", "", "split that cannot be read", "mend the list of pairs as the message says"),
    "no-pair": Kind(
        "error", "entries", "entries that are no pair", "write what is missing, or take them out; entries count from 0"
    ),
    "no-validation": Kind(
        "warning",
        "",
        "no validation split",
        "set some pairs apart: `cytoclip bring … --val 0.1` splits by source; or train with data.hold_out.share=0.15",
    ),
    "few-pairs": Kind(
        "error", "pairs", "fewer pairs than a batch", "set train.batch_size lower, as in the configuration below"
    ),
    "nothing-to-learn": Kind("error", "", "pairs of which next to none are told apart", _APART),
    "little-to-learn": Kind("warning", "", "pairs of which few are told apart", _APART),
    # leaks
    "leak-content": Kind(
        "error",
        "pairs",
        "pictures that are in two splits, byte for byte",
        "take them out of one of the two: scores on them measure memory",
    ),
    "leak-alike": Kind(
        "error",
        "pictures",
        "pictures that look the same in two splits",
        "look at them side by side (--html); take copies out of one split, and tell frames of one field by `source`",
    ),
    "leak-source": Kind(
        "error",
        "pairs",
        "sources (patient, slide, figure) that are in two splits",
        "keep all pairs of a source in one split: `cytoclip bring` does",
    ),
    "leak-group": Kind(
        "error", "pairs", "groups that are in two splits", "keep all pairs of a group in one split, or rename groups"
    ),
    # files
    "missing": Kind(
        "error",
        "pictures",
        "pictures that are not there",
        "check the names: capitals and endings matter, and folders end in /",
    ),
    "empty-file": Kind("error", "pictures", "files of no bytes", _MEND),
    "truncated": Kind("error", "pictures", "truncated pictures", _MEND),
    "undecodable": Kind("error", "pictures", "files that cannot be decoded", _MEND),
    "too-large": Kind(
        "error", "pictures", "pictures that claim too many pixels", "cut whole slides into fields; else delete them"
    ),
    "decoder-died": Kind("error", "pictures", "pictures that ended or held their decoder", _MEND),
    "wrong-extension": Kind(
        "note",
        "pictures",
        "file names whose ending is another format's",
        "rename them; here they are read all the same",
    ),
    "unnamed": Kind(
        "note",
        "files",
        "files below imgs/ that no pair names",
        "add pairs for them, or take them away if they are left over",
    ),
    # pictures
    "several-pages": Kind(
        "warning",
        "pictures",
        "files of several pages or frames",
        "store the page that is meant: only the first is read",
    ),
    "near-constant": Kind(
        "warning", "pictures", "pictures of nearly one colour", "take them out: a caption says more than they show"
    ),
    "dim": Kind(
        "warning",
        "pictures",
        "pictures that use a quarter of their 16 bits or less, and are read nearly black",
        "multiply all of them by one number (16 for a camera of 12 bits, 4 for 14), or save them as 8 bits",
    ),
    "cropped-away": Kind(
        "warning",
        "pictures",
        "pictures that lose a fifth or more to the crop",
        "set data.crop to pad or squash, or cut the pictures yourself",
    ),
    "enlarged": Kind(
        "note",
        "pictures",
        "pictures smaller than what the model reads",
        "use larger ones if there are: they are enlarged",
    ),
    "deep": Kind(
        "note", "pictures", "pictures of more than 8 bits a channel", "none is needed: they are scaled from their range"
    ),
    "other-colours": Kind(
        "note",
        "pictures",
        "pictures in CMYK, YCbCr, LAB or HSV",
        "convert them with their colour profile, which is not applied",
    ),
    "transparent": Kind(
        "note", "pictures", "pictures that are see-through", "none is needed: white is put behind them"
    ),
    "turned": Kind("note", "pictures", "pictures that EXIF turns", "none is needed: they are turned upright"),
    # captions
    "empty-caption": Kind("error", "captions", "captions that say nothing", "write them, or take their pairs out"),
    "no-value": Kind(
        "error",
        "captions",
        "captions that stand for a missing value (nan, N/A, None)",
        "write them, or take their pairs out: each is a right answer for every other one",
    ),
    "unread-script": Kind(
        "error",
        "captions",
        "captions in a script that the text tower does not read",
        "start from a checkpoint that reads it, or translate them",
    ),
    "mojibake": Kind(
        "warning",
        "captions",
        "captions read in a wrong encoding",
        "read their source again as UTF-8, or run ftfy on them",
    ),
    "html": Kind("warning", "captions", "captions with HTML in them", "strip the tags and unescape the entities"),
    "one-word": Kind(
        "warning", "captions", "captions of one word", "say what is to be seen: one word repeats too often"
    ),
    "cut-captions": Kind(
        "warning",
        "captions",
        "captions longer than the text tower reads",
        "set model.context_length where the family allows it, or put what matters first",
    ),
    # identifiers
    "personal-captions": Kind(
        "warning",
        "captions",
        "captions that may identify a person",
        "take names, dates and numbers out; nothing was changed",
    ),
    "personal-metadata": Kind(
        "warning",
        "pictures",
        "pictures whose metadata may identify a person",
        "strip them before you share the files; training reads pixels only, and nothing was changed",
    ),
    "dated-metadata": Kind(
        "note",
        "pictures",
        "pictures whose metadata hold a day",
        "strip it before you share them where a day identifies",
    ),
    # repeats
    "repeated-pairs": Kind("warning", "pairs", "pairs that are there twice", "take the second ones out"),
    "alike": Kind(
        "warning",
        "pictures",
        "pictures that look like another one",
        "take copies out, or give both the same `group`, or each is a wrong answer for the other's caption",
    ),
    "repeated-pictures": Kind(
        "note",
        "pairs",
        "pictures under several captions",
        "none is needed: all are right answers (train.positives: groups)",
    ),
    "repeated-captions": Kind(
        "note",
        "pairs",
        "captions of several pictures",
        "none is needed while most differ: all are right answers (train.positives: groups)",
    ),
}


def page() -> str:
    """`docs/reference/findings.md`."""
    lines = [
        "# What `cytoclip check` finds",
        "",
        "Rendered from `src/cytoclip/kinds.py` by `make docs`.",
    ]
    for severity, means in SEVERITIES.items():
        lines += ["", f"## {severity}: {means}", "", "| kind | what it is | what to do |", "| --- | --- | --- |"]
        lines += [
            f"| `{name}` | {kind.title} | {kind.fix} |" for name, kind in KINDS.items() if kind.severity == severity
        ]
    return "\n".join([*lines, ""])
