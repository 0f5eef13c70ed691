"""results.json is what its schema says, and no key is without its description."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from cytoclip import classify, results_schema
from cytoclip.classify import Asked
from cytoclip.console import Console
from cytoclip.results_schema import Results


@pytest.fixture
def results(told: Path) -> dict[str, Any]:
    return dict(json.loads((told / "results.json").read_text()))


def test_what_training_wrote_is_valid(done: tuple[Any, Any]) -> None:
    """Strictly: a key that is not described fails, and so does a number where a text should be."""
    Results.model_validate_json((Path(done[0].output) / "results.json").read_text(), strict=True)


@pytest.mark.parametrize("labels", [None, "one name"])
def test_what_classification_gives_is_valid(
    results: dict[str, Any], root: Path, base: Path, tmp_path: Path, labels: str | None
) -> None:
    """By the command's own function; strictly, and with a class that no picture has."""
    templates = tmp_path / "templates.yaml"
    templates.write_text("templates: ['a {}.']\n")
    listed = json.loads((root / "val" / "img_text_pair.json").read_text())
    if labels:
        named = {**{entry["label"]: "a name" for entry in listed}, "nobody's": ["this", "that"]}
        templates.write_text(json.dumps({"templates": ["a {}."], "classes": named}))
    asked = Asked(probe=False, templates=templates)
    found = classify.classify(str(base), root, asked, Console(quiet=True), workers=0)
    one = {key: value for key, value in found.items() if key not in ("schema", "model", "split")}
    whole = results | {"classification": {"split": "val", "before": one, "best": one}, "floor": 0.2}
    read = Results.model_validate_json(json.dumps(whole), strict=True)
    assert json.loads(read.model_dump_json(by_alias=True, exclude_unset=True)) == whole
    assert bool(one["without_pictures"]) == bool(labels)


def test_a_whole_one_is_valid_and_comes_back(results: dict[str, Any]) -> None:
    read = Results.model_validate(results)
    assert json.loads(read.model_dump_json(by_alias=True, exclude_unset=True)) == results


def broken(results: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    made = copy.deepcopy(results)
    place = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return made


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("schema",), 2),
        (("extra",), 1),
        (("steps",), 0),
        (("val", "best", "extra"), 1),
        (("val", "best", "image_to_text", "hit@"), 0.5),
        (("val", "best", "image_to_text", "recall@5"), 0.5),
        (("val", "best", "image_to_text", "hit@1"), float("nan")),
        (("val", "best", "intervals", "image_to_text", "hit@1"), [0.1]),
        (("val", "best", "clusters", "by"), "patient"),
        (("val", "difference", "image_to_text", "hit@1", "beyond_noise"), "perhaps"),
        (("keep",), {"root": "x"}),
        (("val",), {"before": {}, "best": {}}),
        (("classification",), {"accuracy": 0.5}),
        (("floor",), "none"),
    ],
)
def test_what_is_not_described_is_refused(results: dict[str, Any], path: tuple[str, ...], to: Any) -> None:
    with pytest.raises(ValidationError):
        Results.model_validate(broken(results, *path, to=to))


@pytest.mark.parametrize("path", [("val", "difference"), ("val", "before"), ("best",)])
def test_what_is_always_there_is_required(results: dict[str, Any], path: tuple[str, ...]) -> None:
    place = results
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValidationError, match="Field required"):
        Results.model_validate(results)


def test_every_key_is_described() -> None:
    parts = [one for one in vars(results_schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    fields = [field for part in parts for field in part.model_fields.values()]
    assert len(fields) >= 40
    assert all(field.description and field.description.endswith(".") for field in fields)
