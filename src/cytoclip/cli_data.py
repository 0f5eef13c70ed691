"""The commands for data: say what is wrong with them, and bring them from any format."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cytoclip import arguments
from cytoclip.errors import ExitCode

ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder below which a table's pictures lie, if not its own.", show_default=False)
]


class Crop(StrEnum):
    AUTO = "auto"
    CENTER = "center"
    PAD = "pad"
    SQUASH = "squash"


def check(  # noqa: PLR0913 - each is an option
    data_root: Annotated[Path, typer.Argument(help="Folder that holds the splits.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint whose tokenizer and picture size are asked.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=2, help="Pairs of a batch, for the floor of the loss; else what suits.", show_default=False),
    ] = None,
    crop: Annotated[Crop, typer.Option(help="As data.crop will be.")] = Crop.AUTO,
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep the decoded pictures for runs of --model with data.cache=true.")
    ] = False,
    image_column: Annotated[str | None, typer.Option(help="Column of the picture; guessed if absent.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the caption; guessed if absent.")] = None,
    image_root: ImageRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with thumbnails and histograms.", show_default=False)
    ] = None,
) -> None:
    """Say what is wrong with the data; exit code 3 when something needs a hand."""
    from cytoclip import check as checks
    from cytoclip import check_page, files
    from cytoclip.rows import Columns

    console = arguments.console()
    asked = checks.Asked(crop.value, Columns(image_column, caption_column, image_root), cache)
    report = checks.check(data_root, model, batch_size, console, asked)
    if html is not None:
        files.write_text(html, check_page.page(report))
        console.say(f"wrote {html}")
    console.result(json.dumps(report.document(), ensure_ascii=False) if as_json else report.text())
    if report.needs_a_hand:
        raise typer.Exit(int(ExitCode.FINDINGS))


def bring(
    source: Annotated[Path, typer.Argument(help="Pairs in any format (docs/guide/data.md).", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder for the data root; must not be there.", show_default=False)],
    val: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the pairs for val/.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the pairs for test/.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Another seed splits otherwise.")] = 0,
    image_column: Annotated[str | None, typer.Option(help="Column of the picture; guessed if absent.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the caption; guessed if absent.")] = None,
    image_root: ImageRoot = None,
) -> None:
    """Split pairs by source and content, and write them as a data root."""
    from cytoclip import apart
    from cytoclip import bring as bringing
    from cytoclip.rows import Columns

    console, shares = arguments.console(), apart.Shares(val, test, seed)
    bringing.bring(source, to, shares, Columns(image_column, caption_column, image_root), console)
    console.result(str(to))
