"""The commands that measure models: rank a split, classify it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cytoclip import arguments, places
from cytoclip.errors import UserError


def evaluate(  # noqa: PLR0913 - each is an option
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL… DATA_ROOT",
            help="Hub ids, Hugging Face folders or run folders; then the folder that holds the split, or pairs.",
            show_default=False,
        ),
    ],
    split: Annotated[str, typer.Option(help="Which split to rank.")] = "val",
    ks: Annotated[str, typer.Option(help="The k of hit@k, such as --ks 1 5 10 50.")] = "1 5 10 50",
    base: Annotated[
        str | None,
        typer.Option(help="Model to compare with, or none; if absent, a run's starting point.", show_default=False),
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="Keep embeddings here (.safetensors), and use those there.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or captions embedded at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of it, too.", show_default=False)] = None,
    images: Annotated[
        bool | None,
        typer.Option(help="With pictures and captions there; else as report.images of the runs.", show_default=False),
    ] = None,
) -> None:
    """Rank a split with one or several models, in both directions, with chance and intervals."""
    from cytoclip.evaluation import How, Question, split_folder
    from cytoclip.evaluation import evaluate as measure

    console, asked = arguments.console(), arguments.numbers(ks)
    *models, data_root = given
    if not models:
        raise UserError(f"evaluate got {data_root} and nothing else", "cytoclip evaluate MODEL… DATA_ROOT")
    if html is not None and html.is_dir():
        raise UserError(f"--html {html} is a folder", f"name a file, such as {html / 'page.html'}")
    folder, how = split_folder(Path(data_root), split), How(base, embeddings, batch_size)
    found = measure(models, folder, Question(asked), console, how)
    split = folder.name if folder == Path(data_root) else places.ours(split)
    console.result(json.dumps(found.document(split), ensure_ascii=False) if as_json else found.text(asked))
    if html is not None and arguments.is_first_process():
        from cytoclip import evaluation_page

        evaluation_page.write(html, found, split, folder, console, images)


def classify(  # noqa: PLR0913 - each is an option
    model: Annotated[str, typer.Argument(help="Hub id, Hugging Face folder or run folder.", show_default=False)],
    data_root: Annotated[Path, typer.Argument(help="Folder that holds the split.", show_default=False)],
    split: Annotated[str, typer.Option(help="Which split to classify.")] = "val",
    labels: Annotated[
        list[Path] | None,
        typer.Option(help="Table of image and label, instead of the pairs' own; may be repeated.", show_default=False),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="YAML with templates, and maybe names of classes.", show_default=False)
    ] = None,
    probe: Annotated[bool, typer.Option(help="Train classifiers on the features of train, too.")] = True,
    shots: Annotated[str, typer.Option(help="Labels a class to learn from, such as --shots 1 4 16.")] = "1 2 4 8 16",
    seeds: Annotated[int, typer.Option(min=1, help="How often those are drawn.")] = 5,
    predictions: Annotated[
        Path | None,
        typer.Option(help="CSV to write: each picture's class by each way, with shares.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or prompts embedded at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Classify a split by prompts, by a linear probe and by nearest neighbours."""
    from cytoclip import class_table
    from cytoclip import classify as classifying

    of_each = arguments.numbers(shots, "--shots")
    asked = classifying.Asked(places.ours(split), labels or (), templates, probe, of_each, seeds, predictions)
    console = arguments.console()
    result = classifying.classify(model, data_root, asked, console, batch_size)
    console.result(json.dumps(result, ensure_ascii=False) if as_json else class_table.text(result))
