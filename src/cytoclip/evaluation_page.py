"""`cytoclip evaluate --html`: what was measured as one page, of one model or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cytoclip import checkpoint, comparison, conclusion, config, files, measure, outcome, record, report_page
from cytoclip.comparison import Column
from cytoclip.conclusion import Judged
from cytoclip.console import Console
from cytoclip.errors import counted
from cytoclip.evaluation import BASE, Compared
from cytoclip.exhibits import Split
from cytoclip.intervals import Interval
from cytoclip.pairs import fingerprint
from cytoclip.record import Embedded
from cytoclip.report_page import Evidence, Page

NAMES = (BASE, "model")


def write(to: Path, found: Compared, split: str, folder: Path, console: Console, images: bool | None = None) -> None:
    """Write the page, and say so.

    Parameters
    ----------
    split, folder
        What was ranked, and where it is.
    images
        Whether pictures, captions, file names and places are on it; None: unless the `report.images` of a run among
        the models is false.
    """
    files.write_text(to, page(found, split, folder, images))
    console.say(f"wrote {to}")


def page(found: Compared, split: str, folder: Path, images: bool | None = None) -> str:
    """The whole page as HTML."""
    if images is None:
        images = all(map(_may_show, found.names.values()))
    called = _called(found, images)
    facts = list(_facts(found, split, folder, images))
    models = [title for title in found.names if title != BASE]
    if len(models) > 1:
        return _several(found, split, called, facts, images)
    judged = _judged(found, models[0], split)
    missing: list[str] = []
    return Page(
        name=called[models[0]],
        about=f"{counted(len(found.pairs), 'pair')} of {split}" + (", held against a base" if judged.before else ""),
        verdict=conclusion.standing(judged),
        judged=[judged],
        evidence=_evidence(found, models[0], images, missing),
        facts=facts,
        images=images,
        kind="evaluation",
        names=NAMES,
        missing=missing,
    ).html()


def _several(found: Compared, split: str, called: dict[str, str], facts: list[tuple[str, str]], images: bool) -> str:
    ranked = fingerprint(found.pairs)
    titles = {name: title for title, name in called.items()}

    def noise(one: Column, other: Column, direction: str, key: str) -> Interval | None:
        told = measure.difference(found.measured[titles[one.name]], found.measured[titles[other.name]])[direction][key]
        return tuple(told["interval"]) if told["interval"] else None

    columns = [Column(called[title], _judged(found, title, split), ranked) for title in found.names]
    return comparison.drawn(columns, noise, not images, facts)


def _may_show(name: str) -> bool:
    run = checkpoint.run_of(name)
    return run is None or config.load(run.config).report.images


def _called(found: Compared, images: bool) -> dict[str, str]:
    """Each model by its title: as it was asked for, or without its place."""
    named = {title: title for title in found.names}
    folders = [title for title in found.names if title != BASE and Path(found.names[title]).exists()]
    if not images and folders:
        named |= dict(zip(folders, comparison.names([Path(found.names[title]) for title in folders]), strict=True))
    if len(set(named.values())) < len(named):  # a folder of the name of a model on the hub
        named = {title: f"{number}: {name}" for number, (title, name) in enumerate(named.items(), 1)}
    return named


def _judged(found: Compared, title: str, split: str) -> Judged:
    held = title in found.differences
    before = found.measured[BASE].scores if held else None
    return Judged(split, before, found.measured[title].scores, found.differences[title] if held else {})


def _evidence(found: Compared, title: str, images: bool, missing: list[str]) -> Evidence:
    model, base = _embedded(found, title), _embedded(found, BASE)
    if model is None:
        missing.append("gallery, similarities and map: not all embeddings are finite")
        return Evidence()
    return report_page.evidence(Split(found.pairs, base, model, NAMES), images)


def _embedded(found: Compared, title: str) -> Embedded | None:
    return record.usable(*found.embedded[title], fingerprint(found.pairs)) if title in found.embedded else None


def _facts(found: Compared, split: str, folder: Path, images: bool) -> Iterator[tuple[str, str]]:
    """How it was measured."""
    if BASE in found.names:
        own = not images and Path(found.names[BASE]).exists()
        yield "base", "a checkpoint of its own" if own else found.names[BASE]
    yield "split", f"{split}, {counted(len(found.pairs), 'pair')}" + (f" of {folder}" if images else "")
    yield "intervals", conclusion.drawn_from(next(iter(found.measured.values())).scores)
    yield "versions", ", ".join(f"{name} {version}" for name, version in outcome.versions().items())
