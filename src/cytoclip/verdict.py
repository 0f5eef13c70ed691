"""What the check of a data root comes to: its numbers, its verdict, and the configuration that it proposes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import repeats, texts
from cytoclip.config import Model, Train
from cytoclip.errors import counted, first_few
from cytoclip.families import FAMILIES
from cytoclip.findings import LOST, Reader, Split, lost
from cytoclip.kinds import KINDS, SEVERITIES, Finding
from cytoclip.objectives import Objective
from cytoclip.order import Order, Wording
from cytoclip.pairs import Pairs, identities, same_caption_key, spread
from cytoclip.pixels import PixelSpec
from cytoclip.repeats import Repeats

_FREE = ("root", "name")  # texts of the user
_COLUMN = 28  # where comments begin
SCHEMA = 1  # of the JSON document; a key is added without a new number, and taken away only with one
_EPOCHS = 10
_STEPS = 8  # batches that an epoch should have, or every batch holds the same pairs
_LONG = 248  # tokens of Long-CLIP, the longest that its way to stretch was tried for (arXiv 2403.15378)
_SQUARE = PixelSpec(224, (224, 224), 3, (0.0,) * 3, (1.0,) * 3, 1 / 255)  # what most checkpoints do


@dataclass(frozen=True)
class Facts:
    """The numbers of one split.

    Parameters
    ----------
    widths, heights
        int64: of each different picture that can be used.
    lengths, unit
        int64: of each caption, in "tokens" of the checkpoint or else in "words".
    lost
        Mean share of a picture that the checkpoint's crop throws away, or None without a checkpoint.
    """

    pairs: int
    pictures: int
    captions: int
    sources: int
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    lengths: NDArray[np.int64]
    unit: str
    lost: float | None

    @classmethod
    def of(cls, split: Split, reader: Reader | None) -> Facts:
        looks = [look for look in split.pictures().values() if not look.problem]
        captions = [text for _, text in split.captions()]
        words = np.array([len(text.split()) for text in captions], np.int64)
        shares = [lost(look.width, look.height, reader.pixels) for look in looks] if reader else []
        return cls(
            pairs=len(split.pairs),
            pictures=len(split.pictures()),
            captions=len({same_caption_key(text) for text in captions}),
            sources=len({source for source in split.pairs.sources if source}),
            formats=Counter(look.format for look in looks),
            modes=Counter(f"{look.mode}, {look.depth} bits" for look in looks),
            widths=np.array([look.width for look in looks], np.int64),
            heights=np.array([look.height for look in looks], np.int64),
            lengths=words if split.tokens is None else split.tokens,
            unit="words" if split.tokens is None else "tokens",
            lost=float(np.mean(shares)) if shares else None,
        )


@dataclass(frozen=True)
class Report:
    """Everything that the check found.

    Parameters
    ----------
    batch_size, objective, repeats
        What the floor of the loss was computed for, on the training split; None where it has too few pairs.
    reader
        The checkpoint that was asked, if one was named.
    crop
        Of data.crop, what was asked for; auto: as the checkpoint, and what suits is proposed.
    """

    root: str
    splits: Mapping[str, Split]
    facts: Mapping[str, Facts]
    findings: Sequence[Finding]
    batch_size: int
    objective: Objective
    repeats: Repeats | None
    reader: Reader | None
    crop: str = "auto"

    @property
    def needs_a_hand(self) -> bool:
        return any(finding.severity != "note" for finding in self.findings)

    def skipped(self) -> str:
        if self.reader is not None:
            return ""
        return "not checked: tokens and scripts of captions, what the crop throws away (name a checkpoint with --model)"

    def verdict(self) -> str:
        """One sentence."""
        errors, warnings, notes = (self._titles(severity) for severity in SEVERITIES)
        if errors:
            return f"Not ready: {first_few(errors, 4)}."
        if warnings:
            return f"Usable, and {counted(len(warnings), 'thing')} to look at first: {first_few(warnings, 4)}."
        noted = f", {counted(len(notes), 'thing')} good to know" if notes else ""
        return f"Ready: nothing here needs a hand{noted}."

    def text(self, few: int = 3) -> str:
        """What the terminal shows."""
        lines: list[str] = []
        for finding in self.findings:
            lines.append(f"{finding.severity:<8} {finding.text()}")
            if finding.cases:
                lines.append(f"         {first_few([case.text() for case in finding.cases], few)}")
            lines.append(f"         → {KINDS[finding.kind].fix}")
        parts = [_table(self.facts), *([[self.floor()]] if self.repeats else []), lines]
        parts += [[line for line in (self.skipped(), self.verdict()) if line]]
        parts += [["proposed configuration:", *proposed_yaml(self).splitlines()]]
        return "\n\n".join("\n".join(part) for part in parts if part)

    def floor(self) -> str:
        assert self.repeats is not None  # noqa: S101 - asked only where there is one
        return repeats.line(self.repeats, self.batch_size, self.objective)

    def document(self) -> dict[str, Any]:
        """The JSON document; docs/guide/check.md says what is in it."""
        return {
            "schema": SCHEMA,
            "data_root": self.root,
            "model": self.reader.name if self.reader else None,
            "crop": self.crop,
            "verdict": self.verdict(),
            "needs_a_hand": self.needs_a_hand,
            "splits": {name: _numbers(facts) for name, facts in self.facts.items()},
            "findings": [_finding(finding) for finding in self.findings],
            "loss": None if self.repeats is None else {
                "batch_size": self.batch_size,
                "objective": self.objective.kind,
                "positives": self.objective.positives,
                "pairs_with_another_right_answer": self.repeats.pairs,
                "floor": self.repeats.floor,
                "knowing_nothing": self.objective.chance_loss(self.batch_size),
            },
            "proposed": proposed(self),
        }  # fmt: skip

    def _titles(self, severity: str) -> list[str]:
        return list(dict.fromkeys(KINDS[one.kind].title for one in self.findings if one.severity == severity))


def proposed(report: Report) -> dict[str, Any]:
    """A configuration for `cytoclip train` that suits these pairs: batch, warm-up, crop, context, positives."""
    model: dict[str, Any] = {"name": report.reader.name if report.reader else _checkpoint(report)}
    reader, needed = report.reader, _tokens_needed(report)
    if reader and needed > reader.context and reader.context < _LONG and not reader.family.no_stretch:
        model["context_length"] = min(_LONG, needed + -needed % 8)
    train = {"epochs": _EPOCHS, "batch_size": report.batch_size, "positives": report.objective.positives}
    tenth = max(1, _steps(report) * _EPOCHS // 10)
    if tenth < Train().warmup_steps:
        train["warmup_steps"] = tenth
    return {
        "data": {"root": report.root, "crop": _crop(report)},
        "model": model,
        "train": train,
    }


def proposed_yaml(report: Report) -> str:
    """The proposed configuration as a file for `cytoclip train`, with a reason behind each value."""
    why, lines = _reasons(report), []
    for section, options in proposed(report).items():
        lines.append(f"{section}:")
        for name, value in options.items():
            # JSON is YAML, and quotes what YAML would take for something else
            written = json.dumps(value, ensure_ascii=False) if isinstance(value, str) and name in _FREE else value
            lines.append(f"  {name}: {written}".ljust(_COLUMN) + (f"  # {why[name]}" if name in why else ""))
    return "\n".join(line.rstrip() for line in lines)


def _reasons(report: Report) -> dict[str, str]:
    shares, steps = _shares(report), _steps(report)
    found = {
        "crop": f"a centre crop would throw away {np.mean(shares):.0%} of the pixels" if len(shares) else "no picture",
        "batch_size": f"{counted(steps, 'step')} an epoch; what one process holds at once is train.micro_batch_size",
        "warmup_steps": f"a tenth of the run; the default, {Train().warmup_steps}, would be more",
        "positives": "pairs with the same caption, picture or group are right answers for each other",
    }
    return found | {"context_length": f"99 % of the captions have {_tokens_needed(report)} tokens or fewer"}


def _steps(report: Report) -> int:
    """Of an epoch."""
    return next(iter(report.facts.values())).pairs // report.batch_size


def batch_size(pairs: int) -> int:
    """The default, or the largest power of two below it that leaves an epoch a few steps."""
    size = Train().batch_size
    while size > 2 and pairs < _STEPS * size:
        size //= 2
    return size


def typical_repeats(pairs: Pairs, size: int, objective: Objective) -> Repeats | None:
    """As training counts them, over its first batches."""
    if len(pairs) < size:
        return None
    seed = Train().seed
    order, wording, identity = Order(len(pairs), size, seed), Wording.of(pairs, seed), identities(spread(pairs))
    draws = order.draws(0, repeats.TYPICAL)
    return repeats.typical([identity.take(wording.rows(rows, epochs)) for rows, epochs in draws], objective)


def _tokens_needed(report: Report) -> int:
    """What all captions but the longest hundredth need: one long one is no reason to stretch the text tower."""
    return int(np.percentile(np.concatenate([facts.lengths for facts in report.facts.values()]), 99, method="lower"))


def _checkpoint(report: Report) -> str:
    """The default, or one that reads the script of the captions."""
    captions = [text for split in report.splits.values() for text in split.pairs.captions[:1000]]
    foreign = sum(texts.foreign_share(text) > 0.5 for text in captions)
    return FAMILIES["chinese_clip"].such_as if 2 * foreign > len(captions) else str(Model().name)


def _crop(report: Report) -> str:
    if report.crop != "auto":
        return report.crop
    shares = _shares(report)
    return "pad" if len(shares) and np.mean(shares) >= LOST / 2 else "auto"


def _shares(report: Report) -> NDArray[np.float64]:
    spec = report.reader.pixels if report.reader else _SQUARE
    if isinstance(spec.resize, tuple):  # a checkpoint that changes the shape throws nothing away
        spec = replace(_SQUARE, resize=min(spec.size), crop=spec.size)
    sizes = Counter(
        (int(w), int(h)) for f in report.facts.values() for w, h in zip(f.widths, f.heights, strict=True)
    )  # many pictures have one size
    return np.repeat([lost(*size, spec) for size in sizes], list(sizes.values()))


def _table(facts: Mapping[str, Facts]) -> list[str]:
    titles = ["", "pairs", "pictures", "captions", "sources", "width × height", next(iter(facts.values())).unit]
    rows = [titles]
    for name, one in facts.items():
        sizes = f"{_middle(one.widths)} × {_middle(one.heights)}"
        counts = [f"{n:,}" for n in (one.pairs, one.pictures, one.captions)]
        rows.append([name, *counts, f"{one.sources:,}" if one.sources else "–", sizes, _middle(one.lengths)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _middle(values: NDArray[np.int64]) -> str:
    """`360`, or `360 (200–1024)`: the median, and the range where there is one."""
    if not len(values):
        return "–"
    low, middle, high = int(values.min()), int(np.median(values)), int(values.max())
    return str(middle) if low == high else f"{middle} ({low}–{high})"


def _numbers(facts: Facts) -> dict[str, Any]:
    aspects = facts.widths / np.maximum(facts.heights, 1)
    return {
        "pairs": facts.pairs,
        "pictures": facts.pictures,
        "different_captions": facts.captions,
        "sources": facts.sources,
        "formats": dict(facts.formats),
        "modes": dict(facts.modes),
        "width": _quantiles(facts.widths),
        "height": _quantiles(facts.heights),
        "aspect_ratio": _quantiles(aspects),
        f"{facts.unit}_per_caption": _quantiles(facts.lengths),
        "share_lost_to_crop": facts.lost,
    }


def _quantiles(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    points = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
    return {name: round(float(np.percentile(values, point)), 4) for name, point in points.items()}


def _finding(finding: Finding) -> dict[str, Any]:
    kind = KINDS[finding.kind]
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "split": finding.split,
        "count": finding.count,
        "of": finding.of,
        "title": kind.title,
        "detail": finding.detail,
        "fix": kind.fix,
        "cases": [
            {"split": case.split, "name": case.name}
            | ({"note": case.note} if case.note else {})
            | ({"twin": {"split": case.twin.split, "name": case.twin.name}} if case.twin else {})
            for case in finding.cases
        ],
    }
