"""docs/reference/commands.md: every command with its arguments and options, as typer knows them."""

from __future__ import annotations

from typing import Any

import typer

from cytoclip import cli


def page() -> str:
    """The page, from the very objects that parse a command line."""
    group: Any = typer.main.get_command(cli.app)
    parts = ["# Commands", "", "Rendered from the command line itself by `make docs`.", ""]
    for name, command in group.commands.items():
        parts += [f"## `cytoclip {name}`", "", str(command.help), "", *_table(command.params), ""]
    return "\n".join(parts)


def _table(parameters: list[Any]) -> list[str]:
    rows = [_row(one) for one in parameters if one.name != "help"]
    return ["| | | default |", "| --- | --- | --- |", *rows] if rows else []


def _row(one: Any) -> str:
    if one.param_type_name == "argument":
        shown = one.metavar or str(one.name).upper()
        shown = shown if one.required else f"[{shown}]"
    else:
        shown = ", ".join([*one.opts, *one.secondary_opts])
    default = "" if one.default is None or one.required or callable(one.default) else f"`{_said(one.default)}`"
    if getattr(one, "is_flag", False) and one.default in (False, None):
        default = ""
    return f"| `{shown}` | {one.help or ''} | {default} |"


def _said(value: Any) -> str:
    return str(getattr(value, "value", value))
