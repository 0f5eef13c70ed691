"""The result of `classify.classify` as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cytoclip.console import aligned
from cytoclip.errors import counted, first_few

WIDE = 12  # classes up to which the confusion matrix fits a terminal
_NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "auroc": "AUROC"}
_WAYS = {"zero_shot": "zero-shot", "probe": "linear probe", "knn": "neighbours"}


def text(result: Mapping[str, Any]) -> str:
    """Every metric with its interval and chance, few labels, and the confusion matrix of the prompts."""
    ways = [way for way in _WAYS if way in result]
    by, count = result["clusters"]["by"], result["clusters"]["count"]
    named = counted(len(result["classes"]), "class", "classes")
    templates = counted(len(result["templates"]), "template")
    title = f"{counted(result['pictures'], 'picture')} of {result['split']} in {named}, {templates}"
    lines = [f"{title}; brackets: 95 % of resamples of {counted(count, by)}"]
    rows = [
        [_NAMES[name], *(_value(result[way][name]) for way in ways), _number(result["zero_shot"][name]["chance"])]
        for name in _NAMES
    ]
    lines += ["", *aligned([["", *(_WAYS[way] for way in ways), "chance"], *rows])]
    why = next((one["why"] for one in result["zero_shot"].values() if "why" in one), None)
    lines += [f"AUROC is undefined: {why}"] if why else []
    majority = result["majority"]
    lines.append(f"always saying {majority['class']!r} has accuracy {majority['accuracy']:.4f}")
    if result["without_pictures"]:
        lines.append(f"classes without a picture here, left out of the means: {first_few(result['without_pictures'])}")
    if result.get("few_shot"):
        lines += ["", "linear probe of few labels: mean ± standard deviation over seeds", *_few(result["few_shot"])]
    if len(result["classes"]) <= WIDE:
        lines += ["", "zero-shot, true class down, predicted across", *_confusion(result)]
    return "\n".join(lines)


def _few(few_shot: Mapping[str, Any]) -> list[str]:
    rows = [
        [shots, *(f"{_number(one[name]['mean'])}{_spread(one[name]['sd'])}" for name in _NAMES)]
        for shots, one in few_shot.items()
    ]
    short = [f"{shots}: {first_few(one['fewer'])}" for shots, one in few_shot.items() if one["fewer"]]
    notes = [f"classes with fewer pictures than that, all of which are taken: {'; '.join(short)}"] if short else []
    return [*aligned([["a class", *_NAMES.values()], *rows]), *notes]


def _printable(name: str) -> str:
    """A label comes from the data: what would break a line or turn its direction is shown as a mark."""
    return "".join(letter if letter.isprintable() else "�" for letter in name)


def _confusion(result: Mapping[str, Any]) -> list[str]:
    """Columns by number: names of classes may be long."""
    numbered = [f"{number} {_printable(name)}" for number, name in enumerate(result["classes"], start=1)]
    rows = [
        [name, *(f"{count:.10g}" if count == int(count) else f"{count:.1f}" for count in row)]
        for name, row in zip(numbered, result["confusion"], strict=True)
    ]
    return aligned([["", *(name.partition(" ")[0] for name in numbered)], *rows])


def _value(one: Mapping[str, Any]) -> str:
    low_high = one["interval"]
    return _number(one["value"]) + (f" [{low_high[0]:.4f}, {low_high[1]:.4f}]" if low_high else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"
