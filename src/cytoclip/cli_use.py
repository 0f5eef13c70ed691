"""The commands that use a model: hand it on, index pictures, search them, serve a page."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cytoclip import arguments
from cytoclip.errors import UserError


class Format(StrEnum):
    hf = "hf"
    onnx = "onnx"
    open_clip = "open_clip"
    sentence_transformers = "sentence-transformers"


class Precision(StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"
    auto = "auto"


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


def index(  # noqa: PLR0913 - each is an option
    model: Annotated[str, typer.Argument(help="Hub id, Hugging Face folder or run folder.", show_default=False)],
    source: Annotated[str, typer.Argument(help="Folder of pictures, data root, table or shards.", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder of the index; what is there is brought up to date.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or captions embedded at once.")] = 64,
    precision: Annotated[
        Precision, typer.Option(help="Of the model: no is float32, auto the best of the device.")
    ] = Precision.no,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Embed everything anew, by this model.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Column of the picture; guessed if absent.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the caption; guessed if absent.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Embed pictures, and their captions, and make them searchable; run again, it embeds what is new."""
    from cytoclip import index as indexing
    from cytoclip.rows import Columns

    how = indexing.How(Columns(image_column, caption_column), batch_size, "auto", precision.value, rebuild)
    console = arguments.console()
    built = indexing.build(model, source, to, console, how)
    console.result(json.dumps(built.document(), ensure_ascii=False) if as_json else built.text(to))


def search(  # noqa: PLR0913 - each is an option
    index: Annotated[Path, typer.Argument(help="Folder that cytoclip index made.", show_default=False)],
    text: Annotated[str | None, typer.Argument(help="What to look for, in words.", show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for, or beside the text.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    weight: Annotated[float, typer.Option(min=0, max=1, help="Of the picture, where there is a text too.")] = 0.5,
    captions: Annotated[bool, typer.Option("--captions", help="Find captions rather than pictures.")] = False,
    where: Annotated[
        list[str] | None, typer.Option(help="key=value that a hit must have; may be repeated.", show_default=False)
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="Where the pictures are now, if they moved.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Search an index by text, by a picture, or by both."""
    from cytoclip.search import Index, document, filters, table

    if text is not None and image is None and os.path.isfile(text):  # noqa: PTH113 - a text may be too long for a Path
        raise UserError(f"{text} is a picture's file, and was given as words", f"search with --image {text}")
    wanted = filters(where or (), "--where")
    opened = Index.open(index, model=model, roots=root or ())
    hits = opened.search(text, image, k=k, weight=weight, kind="captions" if captions else "images", where=wanted)
    console = arguments.console()
    asked = {"text": text, "image": None if image is None else str(image), "weight": weight, "where": wanted}
    console.result(json.dumps(document(hits, asked), ensure_ascii=False) if as_json else table(hits))


def serve(
    index: Annotated[Path, typer.Argument(help="Folder that cytoclip index made.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    password: Annotated[
        str | None,
        typer.Option(help="Asked of everybody, with any user name.", envvar="CYTOCLIP_PASSWORD", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody in who can reach the address.")] = False,
    root: Annotated[
        list[Path] | None, typer.Option(help="Where the pictures are now, if they moved.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it moved.", show_default=False)] = None,
) -> None:
    """Open a page, and an HTTP API, that search an index; Ctrl-C ends it."""
    from cytoclip import serve as serving

    where = serving.Where(host, port, password, public)
    raise SystemExit(128 + serving.serve(index, where, arguments.console(), model, root or ()))
