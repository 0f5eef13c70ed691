"""What the text tower reads for a class: every template with every name of the class, from a YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cytoclip.errors import ExitCode, UserError, first_few, nearest, shown
from cytoclip.rows import kind, require_regular

HOLE = "{}"
_MAX_BYTES = 1 << 20
_MAX_PROMPTS = 200_000  # of all classes
_SHAPE = 'templates: ["a photo of {}."], and maybe classes: {label: [name, another name]}'


@dataclass(frozen=True)
class Templates:
    """Sentences with a `{}`, and the names of classes by label; a label without names is its own name."""

    templates: Sequence[str]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read(file: Path | None) -> Templates:
    """Templates of a YAML, or without one those of the package.

    Raises
    ------
    UserError
        For a file that is none, a template without `{}`, or a class without names.
    """
    if file is None:
        return _templates(resources.files("cytoclip").joinpath("templates.yaml").read_text("utf-8"), "the package")
    if require_regular(file).st_size > _MAX_BYTES:
        raise _error(f"{file} has more than {_MAX_BYTES} bytes", "is it a list of templates?")
    try:
        return _templates(file.read_bytes().decode("utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        raise _error(f"{file} is not UTF-8: {error.reason}", "save it as UTF-8") from None


def classes(asked: Templates, labels: Sequence[str]) -> list[str]:
    """The classes to choose from: those that the YAML names, in its order, else the labels, sorted.

    Raises
    ------
    UserError
        For a label that the YAML does not name.
    """
    there = sorted(set(labels))
    if not asked.classes:
        return there
    missing = [label for label in there if label not in asked.classes]
    if missing:
        near = nearest(missing[0], asked.classes)
        raise _error(
            f"classes has no entry for the label {first_few([shown(label) for label in missing])}",
            f"add it, or spell {shown(near)} as the labels do" if near else "give each label of the data its names",
        )
    return list(asked.classes)


def prompts(asked: Templates, labels: Sequence[str]) -> list[list[str]]:
    """The sentences of each class: each name in each template; the name of a label that has none has no underscores.

    Raises
    ------
    UserError
        For more than 200,000 of them.
    """
    names = [asked.classes.get(label) or [label.replace("_", " ").strip()] for label in labels]
    count = len(asked.templates) * sum(map(len, names))
    if count > _MAX_PROMPTS:
        raise _error(f"{count} prompts, more than {_MAX_PROMPTS}", "give fewer templates or names")
    return [[template.replace(HOLE, name) for name in some for template in asked.templates] for some in names]


def _templates(text: str, place: str) -> Templates:
    given = _loaded(text, place)
    if not isinstance(given, dict):
        raise _error(f"{place} holds {kind(given)}", _SHAPE)
    unknown = [str(key) for key in given if key not in ("templates", "classes")]
    if unknown:
        raise _error(f"{place} has {shown(unknown[0])}, which is neither templates nor classes", _SHAPE)
    templates = given.get("templates")
    if not isinstance(templates, list) or not templates:
        raise _error(f"templates of {place} is no list of sentences", _SHAPE)
    for number, template in enumerate(templates, start=1):
        if not isinstance(template, str) or HOLE not in template:
            raise _error(
                f"template {number} of {place} has no {HOLE}: {shown(template)}", f'such as "a photo of {HOLE}."'
            )
    return Templates(templates, _classes(given.get("classes"), place))


def _classes(given: Any, place: str) -> dict[str, list[str]]:
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) < 2:
        raise _error(f"classes of {place} names fewer than two classes", _SHAPE)
    found = {}
    for label, names in given.items():
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise _error(f"a label in classes of {place} is {kind(label)}: {shown(label)}", 'put it in "quotes"')
        some = [names] if isinstance(names, str) else names
        if not isinstance(some, list) or not some or not all(isinstance(n, str) and n.strip() for n in some):
            raise _error(f"class {shown(label)} of {place} has no names: {shown(names)}", "a text, or a list of texts")
        found[str(label)] = some
    return found


def _loaded(text: str, place: str) -> Any:
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        twice = _named_twice(node)
        if twice:
            raise _error(f"{place} has {shown(twice)} twice", "a second one would replace the first")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise _error(f"{place} is not YAML: {reason}", _SHAPE) from None


def _named_twice(document: yaml.Node | None) -> str | None:
    """A key of the document, or of a mapping that it names, that comes twice: YAML would keep the last."""
    top = [document] if isinstance(document, yaml.MappingNode) else []
    within = [value for node in top for _, value in node.value if isinstance(value, yaml.MappingNode)]
    for node in top + within:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    return str(key.value)
                seen.add(key.value)
    return None


def _error(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.USAGE)
