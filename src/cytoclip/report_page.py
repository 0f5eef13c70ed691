"""`report.html` of a run: one page, no script, no request; and the model cards beside its weights.

Everything on it is read from the run folder; the pairs of the split that is shown are read again, or handed over. A
`Page` is plain data: whoever has measured a model some other way fills one in (`evaluation_page`).
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
from cytoclip.conclusion import Judged, Verdict
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
_KEYS = 12  # of slices
_METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}


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


@dataclass(frozen=True)
class Told:
    """Pictures told apart by class: a row a metric (name, chance, a cell a model), and whom the last model mistakes."""

    split: str
    pictures: int
    rows: Sequence[Sequence[str]]
    confusion: Chart | None


@dataclass(frozen=True)
class Page:
    """All that the page of one model says; a part that is empty is not there.

    Parameters
    ----------
    about
        What it is of, in a line.
    judged
        A table a direction each; slices are those of the first.
    names
        What the model that is held against, and the model, are called in tables and charts.
    images
        Whether anything that names or shows a pair may be there.
    kind
        What made it, `run` or `evaluation`, of which `facts` are.
    missing
        What cannot be shown, in words.
    """

    name: str
    about: str
    verdict: Verdict
    judged: Sequence[Judged]
    evidence: Evidence
    facts: Sequence[tuple[str, str]]
    images: bool
    kind: str
    names: tuple[str, str] = ("before", "after")
    curves: Sequence[Chart] = ()
    classification: Told | None = None
    findings: Sequence[tuple[str, str]] = ()
    skipped: Sequence[str] = ()
    yaml: str = ""
    missing: Sequence[str] = ()

    def html(self) -> str:
        """The whole of it, escaped."""
        return pages.render(
            "report_page.html",
            **vars(self),
            doubts=conclusion.doubts(self.judged),
            tables=[(one, list(_tables(one))) for one in self.judged],
            slices=[_private(one, self.images) for one in islice(conclusion.slices(self.judged[0]), _KEYS)],
            split=self.judged[0].split,
            held=self.judged[0].before is not None,
        )


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
    return Page(
        name=read.run.path.resolve().name,
        about=_began(read, images),
        verdict=conclusion.verdict(judged[0]),
        judged=judged,
        evidence=shown,
        facts=list(_facts(read)),
        images=images,
        kind="run",
        curves=curves.drawn(read, conclusion.headline(judged[0])[1]),
        classification=_classification(read.results.get("classification")),
        findings=list(islice(_findings(read.results.get("findings"), images), _LIST)),
        skipped=list(read.results.get("skipped") or {})[:_LIST] if images else [],
        yaml="" if read.wanted is None else _yaml(read.wanted, read.results, images),
        missing=missing,
    ).html()


def evidence(shown: Split, images: bool) -> Evidence:
    """What a split looks like to its models; no picture, caption or name of it without `images`."""
    maps, coloured_by = exhibits.maps(shown, not images)
    return Evidence(
        exhibits.galleries(shown, Thumbnails(BUDGET)) if images else (),
        exhibits.similarity_charts(shown),
        maps,
        coloured_by,
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
    return evidence(Split(held, read.embedded(split, "before"), best), images)


def _private(
    one: tuple[str, str, list[conclusion.Slice], int], images: bool
) -> tuple[str, str, list[tuple[str, conclusion.Slice]], int]:
    """A slice with its values as they are shown: numbers, where they might name a patient and nothing may leave."""
    name, counted, found, more = one
    hide = not images and name not in _OPEN_SLICES
    shown = [(f"number {i + 1}" if hide else each.value[:80], each) for i, each in enumerate(found)]
    return name, counted, shown, more


def _classification(found: Any) -> Told | None:
    """Zero-shot by the starting model and by best/, as `classify.zero_shot` gives each."""
    if not found:
        return None
    before, best = found["before"], found["best"]
    rows = [
        (_METRICS[name], _rate(one["chance"]), *(_cell(each["zero_shot"][name]) for each in (before, best)))
        for name, one in best["zero_shot"].items()
    ]
    drawn = None
    if len(best["classes"]) <= _MOST_CLASSES:
        drawn = charts.matrix("confusion, after", best["classes"], np.array(best["confusion"], np.float64))
    return Told(found["split"], best["pictures"], rows, drawn)


def _cell(one: Mapping[str, Any]) -> str:
    if one["value"] is None or not one["interval"]:
        return _rate(one["value"])
    low, high = (100 * end for end in one["interval"])
    return f"{_rate(one['value'])} [{low:.1f}, {high:.1f}]"


def _rate(number: float | None) -> str:
    return "–" if number is None else f"{100 * number:.1f} %"


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
    base = wanted.model.name if images else model_card.base_id(wanted, read.results) or "a checkpoint of its own"
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
    if results.get("hardware"):
        yield "hardware", _hardware(results["hardware"])
    drawn = conclusion.drawn_from(conclusion.judged(results)[0].best)
    if drawn:
        yield "intervals", drawn
    versions = results.get("versions")
    yield "versions", ", ".join(f"{k} {v}" for k, v in versions.items()) if versions else read.versions or "not known"
    if results.get("skipped"):
        yield "pictures that could not be used", f"{len(results['skipped']):,}"


def _hardware(found: Mapping[str, Any]) -> str:
    """As `device.hardware` has it, in words."""
    words = f"{found['cpu']}, {found['cores']} cores, {found['memory_gb']} GB"
    return f"{words}; {found['gpu']}, {found['gpu_memory_gb']} GB" if "gpu" in found else words


def _yaml(wanted: Config, results: Mapping[str, Any], images: bool) -> str:
    """The configuration; for a page that may leave, without the places of data and runs."""
    given = wanted.model_dump(mode="json", by_alias=True)
    if not images:
        given = _without_places(given, model_card.base_id(wanted, results))
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
