"""`results.json` of a finished run: every key, what it means, and a check that a file is one.

The description of a field is its documentation; `docs/reference/results.md` is rendered from it. A key is added without
a new number of the schema, and taken away only with one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_KEY = re.compile(r"(hit@\d+(_groups)?|recall@\d+_groups|map_groups|(mrr|median_rank|mean_rank)(_groups)?)")


def _metrics(given: dict[str, Any]) -> dict[str, Any]:
    wrong = [key for key in given if not _KEY.fullmatch(key)]
    if wrong:
        raise ValueError(f"{wrong[0]} is no metric")
    if any(isinstance(value, float) and not math.isfinite(value) for value in given.values()):
        raise ValueError("a number is not finite")
    return given


Metrics = Annotated[dict[str, float], AfterValidator(_metrics)]
Interval = tuple[float, float]
Intervals = Annotated[dict[str, Interval], AfterValidator(_metrics)]


class Part(BaseModel):
    # not strict: JSON has lists where we have pairs
    model_config = ConfigDict(frozen=True, extra="forbid")


class BothIntervals(Part):
    image_to_text: Intervals | None = Field(None, description="95 % interval of each metric, image → text.")
    text_to_image: Intervals | None = Field(None, description="The same, text → image.")


class SliceScores(Part):
    pairs: int = Field(ge=1, description="Queries of the slice; each ranks the whole gallery.")
    image_to_text: Metrics | None = Field(None, description="Metrics, image → text.")
    text_to_image: Metrics | None = Field(None, description="Metrics, text → image.")
    intervals: BothIntervals | None = Field(None, description="Their 95 % intervals.")


class Clusters(Part):
    by: Literal["source", "group", "picture"] = Field(description="What is drawn with replacement.")
    count: int = Field(ge=1, description="How many there are.")


class Scores(Part):
    pairs: int = Field(ge=1, description="Queries of each direction, and as many gallery rows.")
    image_to_text: Metrics | None = Field(None, description="Metrics, a picture asks for captions.")
    text_to_image: Metrics | None = Field(None, description="Metrics, a caption asks for pictures.")
    chance: Metrics = Field(description="The same metrics of a model that knows nothing.")
    clusters: Clusters | None = Field(None, description="By what the bootstrap of the intervals draws.")
    intervals: BothIntervals | None = Field(None, description="95 % intervals, by bootstrap.")
    slices: dict[str, dict[str, SliceScores]] | None = Field(
        None, description="By key (`label`, `caption length`, any extra key of the data) and value."
    )


class Change(Part):
    by: float = Field(description="best − before, in the metric's own unit.")
    interval: Interval | None = Field(description="95 % interval, by paired bootstrap; null of one cluster.")
    beyond_noise: bool = Field(description="Whether the interval leaves out 0.")


class Difference(Part):
    image_to_text: dict[str, Change] | None = Field(None, description="Of each metric, image → text.")
    text_to_image: dict[str, Change] | None = Field(None, description="Of each metric, text → image.")


class Compared(Part):
    before: Scores = Field(description="The starting model, with intervals and slices.")
    best: Scores = Field(description="The model in best/, with intervals and slices.")
    difference: Difference = Field(description="best − before on the same pairs.")


class Kept(Part):
    root: str = Field(description="`validate.keep`.")
    before: Scores = Field(description="The starting model on it.")
    best: Scores = Field(description="The model in best/ on it.")


class Majority(Part):
    class_: str = Field(alias="class", description="The commonest class.")
    accuracy: float = Field(description="Of always saying it.")


class Rate(Part):
    value: float | None = Field(description="0 to 1; null where it is undefined.")
    interval: Interval | None = Field(description="95 % interval, by bootstrap; null where none can be drawn.")
    why: str | None = Field(None, description="What it lacks where it is undefined.")


class RateAndChance(Rate):
    chance: float | None = Field(description="Of a model that knows nothing.")


class OneClass(Part):
    pictures: int = Field(ge=0, description="How many have it.")
    recall: Rate = Field(description="Share of them that are taken for it.")
    precision: Rate = Field(description="Share of those taken for it that have it.")
    f1: Rate = Field(description="2 ÷ (1 ÷ recall + 1 ÷ precision), from expected counts.")
    auroc: Rate = Field(description="It against the rest, by log odds.")


class ZeroShot(Part):
    pictures: int = Field(ge=1, description="Different pictures with one label.")
    classes: list[str] = Field(description="In the order of the confusion matrix.")
    without_pictures: list[str] = Field(description="Those of them that have none.")
    clusters: Clusters = Field(description="By what the bootstrap of the intervals draws.")
    majority: Majority = Field(description="What needs no model.")
    templates: list[str] = Field(description="The sentences; `{}` is the name of a class.")
    names: dict[str, list[str]] = Field(description="By class, where it has other names than its label.")
    zero_shot: dict[Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc"], RateAndChance] = Field(
        description="By metric (guide/classify.md)."
    )
    confusion: list[list[float]] = Field(description="Pictures; row: true class, column: what it was taken for.")
    confusion_interval: list[list[Interval | None]] | None = Field(
        description="95 % intervals of the shares of each row; null above 50 classes."
    )
    by_class: dict[str, OneClass] = Field(description="By class.")


class Classification(Part):
    split: str = Field(description="test where there is one, else val.")
    before: ZeroShot = Field(description="The starting model.")
    best: ZeroShot = Field(description="The model in best/.")


class Results(Part):
    schema_: Literal[1] = Field(1, alias="schema", description="The number of this schema.")
    steps: int = Field(ge=1, description="Optimizer steps done.")
    best_step: int = Field(ge=0, description="The step of best/.")
    ks: list[int] = Field(description="The k of hit@k.")
    select_by: str | None = Field(None, description="The metric that best/ was chosen by.")
    stopped_early: bool | None = Field(None, description="Whether `validate.patience` ended the run.")
    seconds: float = Field(ge=0, description="Time of training, over all its starts.")
    pairs_seen: int = Field(ge=0, description="steps × batch size.")
    processes: int = Field(ge=1, description="Processes that trained.")
    device: str = Field(description="cpu, cuda or mps.")
    hardware: dict[str, Any] | None = Field(None, description="What it ran on.")
    versions: dict[str, str] | None = Field(None, description="Of cytoclip and the libraries that decide a result.")
    from_hub: bool | None = Field(None, description="Whether `model.name` was a hub id, and no folder.")
    skipped: dict[str, int] = Field(
        {}, description="Pictures that could not be used, by name, and how often others stood in."
    )
    before: Scores = Field(description="val at step 0, as validated.")
    last: Scores = Field(description="val at the last step, as validated.")
    best: Scores = Field(description="val at best_step, as validated.")
    val: Compared | None = Field(None, description="The start and best/ on the validation split.")
    test: Compared | None = Field(
        None,
        description="The same on the test split, where there is one: scored once, at the end, and selected by nothing.",
    )
    keep: Kept | None = Field(None, description="The data to keep, where `validate.keep` is given.")
    findings: dict[str, Any] | None = Field(None, description="What was found wrong with the data (findings.md).")
    floor: float | None = Field(None, ge=0, description="Floor that repeats put under the training loss, nats.")
    classification: Classification | None = Field(
        None, description="val told apart by prompts alone, where its entries carry labels."
    )


_METRICS = """A metric is `hit@K` (the own pair among the first K), `mrr`, `median_rank` or `mean_rank` by pair; with
`_groups` behind it, every pair with the same caption, picture or group is right too: `hit@K_groups` (any of them among
the first K), `recall@K_groups` (the share of them there), `mrr_groups`, `map_groups`, `median_rank_groups`,
`mean_rank_groups`. Rates are 0 to 1, higher is better; ranks count from 1, lower is better. Each is its expectation
over random order within ties."""

_TITLES: Mapping[str, tuple[type[Part], str]] = {
    "results.json": (Results, "Written last: a run that has it is finished."),
    "Scores": (Scores, "One model on one set of pairs."),
    "Slice": (SliceScores, "A value of a slice; queries of that value, the gallery whole."),
    "Clusters": (Clusters, ""),
    "Compared": (Compared, ""),
    "Difference": (Difference, ""),
    "Change": (Change, ""),
    "Kept": (Kept, ""),
    "Classification": (Classification, "Each picture by the class whose prompts it is nearest to."),
    "ZeroShot": (ZeroShot, ""),
    "Majority": (Majority, ""),
    "Rate and chance": (RateAndChance, ""),
    "Class": (OneClass, ""),
    "Rate": (Rate, ""),
}


def page() -> str:
    """`docs/reference/results.md`."""
    lines = [
        "# results.json",
        "",
        "Rendered from `src/cytoclip/results_schema.py` by `make docs`; edit the field, not this page.",
        "",
        _METRICS,
        "",
        "Scores during training (`before`, `last`, `best`) have no intervals and no slices.",
    ]
    for title, (part, says) in _TITLES.items():
        lines += ["", f"## {title}", ""] + ([says, ""] if says else [])
        lines += ["| key | type | |", "| --- | --- | --- |", *_rows(part)]
    return "\n".join(lines) + "\n"


def _rows(part: type[Part]) -> Iterator[str]:
    for name, field in part.model_fields.items():
        kind = _kind(field.annotation).replace("|", "\\|")
        absent = "" if field.is_required() else ", may be absent"
        yield f"| `{field.alias or name}` | {kind}{absent} | {field.description} |"


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0])
    if origin in (Union, UnionType):
        return " | ".join(_kind(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is dict:
        return f"{_kind(args[1])} by key"
    if origin is tuple:
        return "[low, high]"
    if origin is list:
        return f"list of {_kind(args[0])}"
    known = {int: "whole number", float: "number", str: "text", bool: "true | false", Any: "anything"}
    for title, (part, _) in _TITLES.items():
        known[part] = title
    return known.get(annotation, "intervals of both directions")
