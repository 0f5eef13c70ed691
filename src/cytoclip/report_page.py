"""`report.html` of a run: one page, no script, no request; and the model cards beside its weights.

Everything on it is read from the run folder; the pairs of the split that is shown are read again, or handed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from cytoclip import charts, conclusion, curves, exhibits, files, model_card, pages, record
from cytoclip.charts import Chart
from cytoclip.conclusion import Judged
from cytoclip.config import Config
from cytoclip.console import Console, duration
from cytoclip.errors import ExitCode, UserError
from cytoclip.exhibits import ShownGallery, Split
from cytoclip.pairs import Pairs
from cytoclip.record import Record
from cytoclip.report import DIRECTIONS
from cytoclip.thumbnails import Thumbnails

NAME = "report.html"
BUDGET = 3_000_000  # bytes of all thumbnails
_MOST_CLASSES = 30  # of a confusion matrix that can be drawn
_OPEN_SLICES = ("label", "caption length")  # whose values say nothing of where a pair comes from
_LIST = 200  # skipped pictures, findings
_KEYS, _CLASSIFIERS = 12, 6  # of slices, and that are drawn


@dataclass(frozen=True)
class Table:
    """One direction of one split."""

    title: str
    rows: Sequence[conclusion.Row]


@dataclass(frozen=True)
class Evidence:
    """What is shown of the split; empty parts where there is nothing to show."""

    galleries: Sequence[ShownGallery] = ()
    similarities: Sequence[Chart] = ()
    maps: Sequence[Chart] = ()
    coloured_by: str = ""


def write(folder: Path, console: Console, pairs: Mapping[str, Pairs] | None = None) -> None:
    """Write `report.html` and the model cards of a run that has just finished. Never raises for what goes wrong.

    It comes after `results.json`, which is what makes the run finished: whatever happens here, nothing of the run is
    lost, and the command that the warning names does the rest.

    Parameters
    ----------
    pairs
        Of held-out splits by name, `spread`, as they were ranked; what is not given is read and scanned again.
    """
    try:
        console.say(f"report: {rebuild(folder, console, pairs=pairs)}")
    except Exception as error:  # a page must not fail what took days
        why = error.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        console.warn(f"{NAME} was not written ({why}); `cytoclip report {folder}` tries again")


def rebuild(
    folder: Path,
    console: Console,
    to: Path | None = None,
    split: str | None = None,
    images: bool | None = None,
    pairs: Mapping[str, Pairs] | None = None,
) -> Path:
    """Write the page of one run, and cards where there are none; where the page is.

    Parameters
    ----------
    split
        `val` or `test`: whose pairs are shown; None: the one that the verdict speaks of.
    images
        Whether there are pictures, captions and file names; None: as the run's `report.images` says.

    Raises
    ------
    UserError
        For a folder that is no finished run, or a split that was not scored.
    """
    read = record.read(folder)
    if pairs is not None or not (read.run.best / model_card.NAME).is_file():
        write_cards(read)
    place = to or folder / NAME
    files.write_text(place, page(read, console, split, images, pairs))
    return place


def page(
    read: Record,
    console: Console,
    split: str | None = None,
    images: bool | None = None,
    pairs: Mapping[str, Pairs] | None = None,
) -> str:
    """The whole page as HTML."""
    judged = _chosen(conclusion.judged(read.results), split, read)
    if images is None:
        images = read.wanted is None or read.wanted.report.images
    missing = list(read.missing)
    shown = _evidence(read, judged[0].split, images, console, pairs, missing)
    if not judged[0].best.get("intervals"):
        missing.append("intervals")
    key = conclusion.headline(judged[0])[1]
    wanted = read.wanted
    return pages.render(
        "report_page.html",
        name=read.run.path.resolve().name,
        began=_began(read, images),
        verdict=conclusion.verdict(judged[0]),
        judged=[(one, list(_tables(one))) for one in judged],
        slices=[_private(one, images) for one in islice(conclusion.slices(judged[0]), _KEYS)],
        split=judged[0].split,
        curves=curves.drawn(read, key),
        evidence=shown,
        images=images,
        classification=list(islice(_classification(read.results.get("classification")), _CLASSIFIERS)),
        findings=list(islice(_findings(read.results.get("findings"), images), _LIST)),
        facts=list(_facts(read)),
        skipped=list(read.results.get("skipped") or {})[:_LIST] if images else [],
        yaml="" if wanted is None else _yaml(wanted, images),
        missing=missing,
    )


def write_cards(read: Record) -> None:
    """README.md in best/ and model/."""
    for folder in (read.run.best, read.run.model):
        if folder.is_dir():
            adapter = (folder / "adapter_config.json").is_file()
            family = "" if adapter else str(files.read_json(folder / "config.json").get("model_type", ""))
            text = model_card.card(read.results, read.wanted, folder == read.run.best, adapter, family)
            files.write_text(folder / model_card.NAME, text)


def _chosen(judged: list[Judged], split: str | None, read: Record) -> list[Judged]:
    """The one that is shown first."""
    if not judged:
        raise UserError(f"{read.run.results} holds no scores", "delete it to score the run again", ExitCode.RUN)
    if split is None:
        return judged
    if split not in [one.split for one in judged]:
        there = " and ".join(one.split for one in judged)
        raise UserError(f"{read.run.path} was not scored on {split}", f"it was on {there}")
    return sorted(judged, key=lambda one: one.split != split)


def _tables(one: Judged) -> Iterator[Table]:
    for direction, title in DIRECTIONS.items():
        if direction in one.best:
            query, found = title.split(" → ")
            pairs = one.best["pairs"]
            yield Table(
                f"{title}: each of {pairs:,} {query}s ranks all {pairs:,} {found}s", conclusion.rows(one, direction)
            )


def _evidence(
    read: Record,
    split: str,
    images: bool,
    console: Console,
    pairs: Mapping[str, Pairs] | None,
    missing: list[str],
) -> Evidence:
    best = read.embedded(split, "best")
    if best is None:
        missing.append(f"embeddings of {split} (gallery, similarities, map)")
        return Evidence()
    try:
        held = record.pairs(read, split, best, console, (pairs or {}).get(split))
    except UserError as error:
        missing.append(f"the pairs of {split} ({error.message if images else 'they cannot be read as they were'})")
        return Evidence()
    shown = Split(held, read.embedded(split, "before"), best)
    maps, coloured_by = exhibits.maps(shown, not images)
    return Evidence(
        exhibits.galleries(shown, Thumbnails(BUDGET)) if images else (),
        exhibits.similarity_charts(shown),
        maps,
        coloured_by,
    )


def _private(
    one: tuple[str, str, list[conclusion.Slice], int], images: bool
) -> tuple[str, str, list[tuple[str, conclusion.Slice]], int]:
    """A slice with its values as they are shown: numbers, where they might name a patient and nothing may leave."""
    name, counted, found, more = one
    hide = not images and name not in _OPEN_SLICES
    shown = [(f"number {i + 1}" if hide else each.value[:80], each) for i, each in enumerate(found)]
    return name, counted, shown, more


def _classification(found: Any) -> Iterator[tuple[str, list[tuple[str, str]], Chart | None]]:
    """Of each classifier: its name, its numbers, and its confusion matrix where it can be drawn."""
    if not isinstance(found, dict):
        return
    several = {"zero-shot": found} if _is_classifier(found) else found
    for name, one in several.items():
        if not isinstance(one, dict) or not _is_classifier(one):
            continue
        intervals = one.get("intervals") or {}
        numbers = [
            (key.replace("_", " "), f"{100 * value:.1f} %" + _between(intervals.get(key)))
            for key, value in one.items()
            if isinstance(value, float)
        ]
        names, counts = one.get("classes"), one.get("confusion")
        drawn = None
        if isinstance(names, list) and isinstance(counts, list) and len(names) == len(counts) <= _MOST_CLASSES:
            drawn = charts.matrix(f"confusion, {name}", [str(each) for each in names], np.array(counts, np.float64))
        yield name, numbers, drawn


def _is_classifier(one: Mapping[str, Any]) -> bool:
    return "confusion" in one or "accuracy" in one


def _between(found: Any) -> str:
    return f" [{100 * found[0]:.1f}, {100 * found[1]:.1f}]" if isinstance(found, list) and len(found) == 2 else ""


def _findings(found: Any, images: bool) -> Iterator[tuple[str, str]]:
    """Severity and words of each; details name things of the data."""
    listed = found.get("findings") if isinstance(found, dict) else None
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict) and "title" in one:
            counted = f": {one['count']:,} of {one['of']:,}" if one.get("of") else ""
            where = f" in {one['split']}" if one.get("split") else ""
            detail = f"; {one['detail']}" if images and one.get("detail") else ""
            yield str(one.get("severity", "note")), f"{one['title']}{counted}{where}{detail}"


def _began(read: Record, images: bool) -> str:
    """What was trained from what, in a line."""
    steps = f"{read.results['steps']:,} steps"
    wanted = read.wanted
    if wanted is None:
        return steps
    base = wanted.model.name if images else model_card.base_id(wanted) or "a checkpoint of its own"
    moved = f"image tower {wanted.model.image_tower}, text tower {wanted.model.text_tower}"
    return f"{base}, {steps} of {wanted.train.batch_size:,} pairs; {moved}"


def _facts(read: Record) -> Iterator[tuple[str, str]]:
    """How the run was made."""
    results = read.results
    early = ", stopped early" if results.get("stopped_early") else ""
    yield "steps", f"{results['steps']:,}{early}; best at {results['best_step']:,}"
    if "pairs_seen" in results:
        yield "pairs seen", f"{results['pairs_seen']:,}"
    if "seconds" in results:
        speed = f", {results['pairs_seen'] / results['seconds']:,.0f} pairs/s" if results["seconds"] else ""
        yield "time of training", duration(results["seconds"]) + speed
    if "processes" in results:
        yield "processes", f"{results['processes']} on {results.get('device', '?')}"
    if results.get("select_by"):
        yield "best chosen by", str(results["select_by"])
    hardware = results.get("hardware")
    if hardware:
        yield (
            "hardware",
            ", ".join(f"{k} {v}".replace("_", " ") for k, v in hardware.items())
            if isinstance(hardware, dict)
            else str(hardware),
        )
    versions = results.get("versions")
    yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else read.versions or "not known"
    if results.get("skipped"):
        yield "pictures that could not be used", f"{len(results['skipped']):,}"


def _yaml(wanted: Config, images: bool) -> str:
    """The configuration; for a page that may leave, without the places of data and runs."""
    given = wanted.model_dump(mode="json", by_alias=True)
    if not images:
        given = _without_places(given, model_card.base_id(wanted))
    return OmegaConf.to_yaml(OmegaConf.create(given))


def _without_places(given: dict[str, Any], base: str | None) -> dict[str, Any]:
    data = {
        name: "…" if name in ("root", "train", "val", "test") and value else value
        for name, value in given["data"].items()
    }
    data["replay"] = [{**replay, "root": "…"} for replay in given["data"]["replay"]]
    kept = {"keep": "…"} if given["validate"].get("keep") else {}
    model = given["model"] | {"name": base or "…"}
    return {**given, "data": data, "model": model, "validate": given["validate"] | kept, "output": "…"}
