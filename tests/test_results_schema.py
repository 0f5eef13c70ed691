"""results.json is what its schema says, and no key is without its description."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from cytoclip import results_schema
from cytoclip.results_schema import Results


@pytest.fixture
def results(told: Path) -> dict[str, Any]:
    return dict(json.loads((told / "results.json").read_text()))


def test_what_training_wrote_is_valid(done: tuple[Any, Any]) -> None:
    """Strictly: a key that is not described fails."""
    Results.model_validate_json((Path(done[0].output) / "results.json").read_text())


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
    ],
)
def test_what_is_not_described_is_refused(results: dict[str, Any], path: tuple[str, ...], to: Any) -> None:
    with pytest.raises(ValidationError):
        Results.model_validate(broken(results, *path, to=to))


def test_every_key_is_described() -> None:
    parts = [one for one in vars(results_schema).values() if isinstance(one, type) and issubclass(one, BaseModel)]
    fields = [field for part in parts for field in part.model_fields.values()]
    assert len(fields) >= 40
    assert all(field.description and field.description.endswith(".") for field in fields)
