"""The commands that use a model: hand it on, index pictures, search them, serve a page."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cytoclip import arguments


class Format(StrEnum):
    hf = "hf"
    onnx = "onnx"
    open_clip = "open_clip"
    sentence_transformers = "sentence-transformers"


def export(
    model: Annotated[
        str, typer.Argument(help="Run folder (its best weights), Hugging Face folder or hub id.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    form: Annotated[Format, typer.Option("--format", help="For which library.", show_default=False)],
    adapter: Annotated[bool, typer.Option(help="With hf: keep a LoRA apart from its base.")] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload it, too; a new repository is private.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a model for another library, and compare it with the one it was made from."""
    from cytoclip import export as exporting

    console = arguments.console()
    done = exporting.export(model, to, form.value, console, adapter, push)
    console.result(json.dumps(done.document(), ensure_ascii=False) if as_json else done.text())
