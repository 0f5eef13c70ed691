"""Options as data: what a section is, how its fields are listed and documented, and what a wrong value is told.

Generic over the sections, which stand in `config.py`; the description of a field is its only documentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cytoclip.errors import UserError, first_few, nearest


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_by_alias=True, validate_by_name=False
    )


@dataclass(frozen=True)
class Option:
    """One documented option: dotted `name`, readable `kind`, `default` as YAML would write it, and its `doc`."""

    name: str
    kind: str
    default: str
    doc: str


def listed(section: type[Section], prefix: str = "") -> Iterator[Option]:
    """Every option: of each section its own in the order of the fields, then the sections within it."""
    within = []
    for name, field in section.model_fields.items():
        dotted, inner = prefix + (field.alias or name), _section_of(field)
        if inner is None:
            yield Option(dotted, _kind(field), _default(field), field.description or "")
        else:
            within.append((Option(dotted, "section", "", field.description or ""), inner))
    for option, inner in within:
        yield option
        yield from listed(inner, option.name + ".")


def page(root: type[Section]) -> str:
    """`docs/reference/config.md`."""
    lines = [
        "# Configuration reference",
        "",
        "Rendered from `src/cytoclip/config.py` by `make docs`; edit the field, not this page.",
        "An experiment is one YAML; only what differs from a default need be written,",
        "and `section.key=value` on the command line goes on top.",
        "",
    ]
    for option in listed(root):
        if option.kind == "section":
            lines += [
                "",
                f"## `{option.name}`",
                "",
                option.doc,
                "",
                "| option | type | default | |",
                "| --- | --- | --- | --- |",
            ]
        elif "." not in option.name:
            lines += ["", f"## `{option.name}`", "", f"{option.doc} Type: {option.kind}."]
        else:
            kind = option.kind.replace("|", "\\|")
            lines.append(f"| `{option.name}` | {kind} | `{option.default}` | {option.doc} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def explained(error: ValidationError, place: str, root: type[Section]) -> UserError:
    """The first problem as a message, with the nearest right thing as its hint."""
    problems = error.errors()
    first = problems[0]
    name = _name_of(first)
    others = [other for other in dict.fromkeys(map(_name_of, problems)) if other != name]
    more = f" (and {first_few(others)})" if others else ""
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown option {name} in {place}{more}", nearest_option(name, root))
    if first["type"] == "value_error":  # our own validators write `what|what to do`
        what, _, hint = str(first["ctx"]["error"]).partition("|")
        return UserError(f"{name + ': ' if name else ''}{what} in {place}{more}", hint)
    if first["type"] == "missing":
        return UserError(
            f"{name} is missing in {place}{more}", "give data.root, such as data: {root: path/to/data_root}"
        )
    value = "null" if first["input"] is None else repr(first["input"])
    inner = [option for option in listed(root) if option.name.startswith(f"{name}.") and option.kind != "section"]
    if inner:
        what_for = f"write options below it, such as {inner[0].name}, or delete the line"
        return UserError(f"{name} is a section, not {value}, in {place}{more}", what_for)
    option = next(option for option in listed(root) if name == option.name)
    message = first["msg"][0].lower() + first["msg"][1:]
    if sum(_name_of(problem) == name for problem in problems) > 1:  # one for each type that it might have had
        message = f"input should be {option.kind}"
    return UserError(
        f"{name}: {value} is refused in {place}: {message}{more}", f"{option.name} ({option.kind}): {option.doc}"
    )


def _name_of(problem: ErrorDetails) -> str:
    """The dotted option, without the place in a list and without pydantic's names of the branches of a union."""
    parts = [str(part) for part in problem["loc"] if isinstance(part, str)]
    branches = ("literal[", "list[", "function-", "constrained-")
    return ".".join(part for part in parts if not part.startswith(branches))


def nearest_option(name: str, root: type[Section]) -> str:
    """What a hint says of an option that is not there."""
    known = [option.name for option in listed(root)]
    section, _, key = name.rpartition(".")
    elsewhere = [option for option in known if option.rpartition(".")[2] == key]
    if elsewhere:
        least = min(option.count(".") for option in elsewhere)
        return f"did you mean {' or '.join(option for option in elsewhere if option.count('.') == least)}?"
    siblings = [option for option in known if option.rpartition(".")[0] == section]
    for options_there in (siblings, known):
        leaves = {option.rpartition(".")[2]: option for option in options_there}
        near = nearest(key, leaves)
        if near:
            return f"did you mean {leaves[near]}?"
    return "`cytoclip config` lists every option"


def _section_of(field: FieldInfo) -> type[Section] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    written = {None: "null", True: "true", False: "false"}
    return written[value] if value is None or isinstance(value, bool) else str(value).replace("'", "")


def _kind(field: FieldInfo) -> str:
    return ", ".join([_kind_of(field.annotation), *_bounds(field.metadata)])


_SIGNS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def _bounds(metadata: Iterable[Any]) -> list[str]:
    """`≥ 1` and such, of annotations that may stand inside a `Field` of their own."""
    flat = [part for one in metadata for part in getattr(one, "metadata", [one])]
    return [
        f"{_SIGNS[type(part).__name__]} {getattr(part, type(part).__name__.lower())}"
        for part in flat
        if type(part).__name__ in _SIGNS
    ]


def _kind_of(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is Annotated:
        return " ".join([_kind_of(args[0]), *_bounds(args[1:])])
    if origin is list:
        return f"list of ({_kind_of(args[0])})" if "|" in _kind_of(args[0]) else f"list of {_kind_of(args[0])}"
    if args:
        return " | ".join(_kind_of(arg) for arg in args)
    return {str: "text", int: "whole number", float: "number", bool: "true | false"}[annotation]
