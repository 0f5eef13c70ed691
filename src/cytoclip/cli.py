"""The command line: parse, load the configuration, call one function, print its result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cytoclip import __version__, slurm
from cytoclip.console import Console, fail
from cytoclip.errors import ExitCode, Stopped, UserError

app = typer.Typer(
    name="cytoclip",
    help="Fine-tune CLIP on a folder of image-caption pairs, and say honestly how much better it got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, on top of the file.", show_default=False)
]


class Crop(StrEnum):
    AUTO = "auto"
    CENTER = "center"
    PAD = "pad"
    SQUASH = "squash"


class Split(StrEnum):
    val = "val"
    test = "test"


class Direction(StrEnum):
    image_to_text = "image_to_text"
    text_to_image = "text_to_image"
    both = "both"

    def names(self) -> tuple[str, ...]:
        return ("image_to_text", "text_to_image") if self is Direction.both else (self.value,)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _app(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before every command."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="One experiment as YAML.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would happen, and stop.")
    ] = False,
) -> None:
    """Fine-tune as a YAML says; the same command again resumes."""
    from cytoclip import config as configs

    wanted = configs.load(config, overrides or ())
    console = _console()
    if dry_run:
        from cytoclip.train import dry_run as dry

        planned = dry(wanted, console)
        console.result(f"{configs.dump(wanted)}\n{planned.text()}\nnothing was written")
        return
    from cytoclip.train import fit

    result = fit(wanted, console)
    console.result(f"\n{result.table()}\n\nrun folder: {result.run}")


@app.command()
def evaluate(  # noqa: PLR0913 - each is an option
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL… DATA_ROOT",
            help="Hub ids, Hugging Face folders or run folders; then the folder that holds the split.",
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
    from cytoclip.evaluate import How, Question, split_folder
    from cytoclip.evaluate import evaluate as measure

    console, asked = _console(), _numbers(ks)
    *models, data_root = places
    if not models:
        raise UserError(f"evaluate got {data_root} and nothing else", "cytoclip evaluate MODEL… DATA_ROOT")
    if html is not None and html.is_dir():
        raise UserError(f"--html {html} is a folder", f"name a file, such as {html / 'page.html'}")
    folder, how = split_folder(Path(data_root), split), How(base, embeddings, batch_size)
    found = measure(models, folder, Question(asked), console, how)
    console.result(json.dumps(found.document(split), ensure_ascii=False) if as_json else found.text(asked))
    if html is not None and _first_process():
        from cytoclip import evaluation_page

        evaluation_page.write(html, found, split, folder, console, images)


@app.command()
def soup(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    alphas: Annotated[
        str | None, typer.Option(help="Shares of the way from start to end; else 0, 0.1 … 1.", show_default=False)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Second data root; else the run's validate.keep.", show_default=False)
    ] = None,
    keep_at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the start's score on it, above chance, that must stay.")
    ] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or captions embedded at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Mix the models of a run, from its start to its end, and save the best on val."""
    from cytoclip import soup as soups

    console, shares = _console(), soups.ALPHAS if alphas is None else _shares(alphas)
    made = soups.soup(run, soups.Asked(shares, keep, keep_at_least, batch_size), console)
    saved = f"\n\nsaved: {run / 'soup' / 'model'}"
    console.result(json.dumps(made.document(), ensure_ascii=False) if as_json else made.table() + saved)


@app.command()
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
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or prompts embedded at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Classify a split by prompts, by a linear probe and by nearest neighbours."""
    from cytoclip import class_table
    from cytoclip import classify as classifying

    asked = classifying.Asked(split, labels or (), templates, probe, _numbers(shots, "--shots"), seeds)
    console = _console()
    result = classifying.classify(model, data_root, asked, console, batch_size)
    console.result(json.dumps(result, ensure_ascii=False) if as_json else class_table.text(result))


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="One run folder, or several to compare.", show_default=False)],
    to: Annotated[
        Path | None,
        typer.Option(help="Where the page goes; else RUN/report.html, or comparison.html here.", show_default=False),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Which split; else test where it was scored, or val.", show_default=False)
    ] = None,
    images: Annotated[
        bool | None,
        typer.Option(
            help="With pictures, captions and file names; else as the run's report.images.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a run's page again, or one that compares several."""
    console, asked = _console(), split.value if split else None
    if len(run) == 1:
        from cytoclip import report_page

        written = report_page.rebuild(run[0], console, to, asked, images)
    else:
        from cytoclip import comparison

        written = comparison.write(run, to or Path("comparison.html"), asked, console, images)
    console.result(str(written))


@app.command()
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with thumbnails and histograms.", show_default=False)
    ] = None,
) -> None:
    """Say what is wrong with the data; exit code 3 when something needs a hand."""
    from cytoclip import check as checks
    from cytoclip import check_page, files
    from cytoclip.rows import Columns

    console, asked = _console(), checks.Asked(crop.value, Columns(image_column, caption_column), cache)
    report = checks.check(data_root, model, batch_size, console, asked)
    if html is not None:
        files.write_text(html, check_page.page(report))
        console.say(f"wrote {html}")
    console.result(json.dumps(report.document(), ensure_ascii=False) if as_json else report.text())
    if report.needs_a_hand:
        raise typer.Exit(int(ExitCode.FINDINGS))


@app.command()
def config(
    file: Annotated[
        Path | None, typer.Argument(help="Print this file, complete and resolved.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Every option with its type, default and meaning; or one experiment, resolved."""
    from cytoclip import config as configs

    if file:
        typer.echo(configs.dump(configs.load(file, overrides or ())), nl=False)
        return
    for option in configs.options():
        if option.kind == "section":
            typer.echo(f"\n{option.name}: {option.doc}")
        else:
            typer.echo(f"  {option.name}  [{option.kind}; default {option.default}]\n      {option.doc}")


@app.command()
def bring(
    source: Annotated[Path, typer.Argument(help="Pairs in any format (docs/guide/data.md).", show_default=False)],
    to: Annotated[Path, typer.Option(help="Folder for the data root; must not be there.", show_default=False)],
    val: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the pairs for val/.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the pairs for test/.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Another seed splits otherwise.")] = 0,
    image_column: Annotated[str | None, typer.Option(help="Column of the picture; guessed if absent.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the caption; guessed if absent.")] = None,
) -> None:
    """Split pairs by source and content, and write them as a data root."""
    from cytoclip import bring as bringing
    from cytoclip.rows import Columns

    console, shares = _console(), bringing.Shares(val, test, seed)
    bringing.bring(source, to, shares, Columns(image_column, caption_column), console)
    console.result(str(to))


@app.command()
def demo(
    to: Annotated[Path, typer.Option(help="Folder for the sample set and the run.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed draws other cells.")] = 0,
) -> None:
    """Draw a small sample set, train a small CLIP on it, and show before and after."""
    from cytoclip import config as configs
    from cytoclip import demo as demonstration
    from cytoclip.train import fit

    console = _console()
    recipe = demonstration.prepare(to, seed, console)
    result = fit(configs.load(recipe), console)
    console.result(f"\n{result.table()}\n\nsample set: {to / 'data'}\nrun folder: {result.run}")


def original_train() -> None:
    """`train.py --config F`, as in the original project."""
    parser = _OneLine(description="Fine-tune CLIP as a YAML says (the original project's command).")
    parser.add_argument("--config", type=Path, required=True, help="one experiment as YAML")
    parser.add_argument("overrides", nargs="*", help="section.key=value, on top of the file")
    _guarded(lambda: (lambda given: train(given.config, given.overrides, False))(parser.parse_intermixed_args()))


def original_evaluation() -> None:
    """`evaluation.py`, with the arguments of the original project."""
    parser = _OneLine(description="hit@k of the validation split (the original project's command).")
    parser.add_argument("--data_root", type=Path, required=True, help="folder that holds val/")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures or captions embedded at once")
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 50], help="the k of hit@k")
    parser.add_argument("--pretrained_clip_path", required=True, help="hub id, Hugging Face folder or run folder")
    parser.add_argument(
        "--direction", choices=list(Direction), type=Direction, default=Direction.image_to_text, help="query to gallery"
    )
    _guarded(lambda: _original_evaluation(parser.parse_args()))


def main() -> None:
    """The entry point of `cytoclip` and of `python -m cytoclip`."""
    _guarded(lambda: app(_joined_numbers(sys.argv[1:]), standalone_mode=False))


def _original_evaluation(given: argparse.Namespace) -> None:
    from cytoclip import report
    from cytoclip.evaluate import How, Question, evaluate, save_as_original, split_folder

    if given.batch_size < 1 or min(given.ks) < 1:
        raise UserError("--batch_size and every --ks must be at least 1", "such as --batch_size 64 --ks 1 10 50")
    console = _console()
    question = Question(given.ks, given.direction.names())
    folder = split_folder(given.data_root, "val")
    name = given.pretrained_clip_path
    (scored,) = evaluate([name], folder, question, console, How(batch_size=given.batch_size)).columns().values()
    console.result(report.table({name: scored}, given.ks))
    if _first_process():
        saved = save_as_original(scored, name, given.direction.value)
        console.result(f"saved {saved}")


class _OneLine(argparse.ArgumentParser):
    """argparse with our way of saying what is wrong."""

    def error(self, message: str) -> Any:
        raise UserError(message, f"python {self.prog} --help lists the arguments")


def _guarded(work: Callable[[], object]) -> None:
    """Run a command; whatever the user can mend becomes two lines and an exit code."""
    # Before torch starts its threads: those that wait long in a spin fight with the loader's processes and whatever
    # else runs. Twice the speed on a busy machine, the same on a free one (docs/log.md). What the user set stays.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    slurm.adopt(os.environ)  # before anything asks which process this is
    try:
        outcome = work()
    except UserError as error:
        if _speaks() or not error.everywhere:
            fail(error.lines())
        sys.exit(int(error.code))
    except Stopped as stop:
        if _speaks():
            fail(str(stop))
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        outcome = _INTERRUPTED
    except Exception as error:
        _explain(error)
        raise
    if outcome == _INTERRUPTED and _speaks():
        fail("stopped; a training run goes on from its last checkpoint when the same command is given again")
    sys.exit(outcome if isinstance(outcome, int) else 0)


_INTERRUPTED = 128 + 2  # SIGINT; typer catches it inside a command and returns this number


def _explain(error: Exception) -> None:
    """Exit with a message for the two kinds of library errors that are the user's: a wrong call, and no memory."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's usage errors
        message = str(error.format_message())
        if message and _speaks():  # empty where it has already printed the help
            asked = getattr(getattr(error, "ctx", None), "command_path", "cytoclip")
            fail(UserError(message, f"{asked} --help says what it takes").lines())
        sys.exit(int(ExitCode.USAGE))
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = "use a smaller batch (train.batch_size, --batch-size), more processes, or a frozen or lora tower"
        fail(UserError(f"no memory left: {reason}", hint).lines())
        sys.exit(int(ExitCode.SYSTEM))


_NO_MEMORY = ("out of memory", "can't allocate memory")  # as CUDA and MPS say it, and torch on the CPU


def _console() -> Console:
    return Console(quiet=not _first_process())


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _speaks() -> bool:
    """Whether this process says what all of them met: the first one on its machine, whose files may differ."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _joined_numbers(words: list[str]) -> list[str]:
    """`--ks 1 5 10` as one word after the option: the original's way to write a list, which typer cannot parse."""
    for option in ("--ks", "--shots"):
        at = next((i for i, word in enumerate(words) if word == option or word.startswith(f"{option}=")), None)
        if at is not None:
            end = next((i for i in range(at + 1, len(words)) if not words[i].isdigit()), len(words))
            listed = [*words[at].partition("=")[2].split(), *words[at + 1 : end]]
            words = [*words[:at], option, *([" ".join(listed)] if listed else []), *words[end:]]
    return words


def _numbers(text: str, option: str = "--ks") -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"{option} {text!r} is not a list of whole numbers from 1", f"such as {option} 1,5,10,50")
    return [int(word) for word in words]


def _shares(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--alphas {text!r} is not a list of numbers", "such as --alphas 0,0.25,0.5,0.75,1") from None
