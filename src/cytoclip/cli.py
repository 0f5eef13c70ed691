"""The command line: every command by its name, the original project's two, and what a failure says."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cytoclip import __version__, arguments, cli_data, cli_score, cli_train, cli_use, slurm
from cytoclip.console import fail
from cytoclip.errors import ExitCode, Stopped, UserError, nearest

app = typer.Typer(
    name="cytoclip",
    help="Fine-tune CLIP on a folder of image-caption pairs, and say honestly how much better it got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


for _command in (
    cli_data.check,
    cli_data.bring,
    cli_train.train,
    cli_train.tune,
    cli_train.config,
    cli_score.evaluate,
    cli_score.classify,
    cli_train.report,
    cli_train.soup,
    cli_use.export,
    cli_train.demo,
    cli_use.index,
    cli_use.search,
    cli_use.serve,
):
    app.command()(_command)


def original_train() -> None:
    """`train.py --config F`, as in the original project."""
    parser = _OneLine(description="Fine-tune CLIP as a YAML says (the original project's command).")
    parser.add_argument("--config", type=Path, required=True, help="one experiment as YAML")
    parser.add_argument("overrides", nargs="*", help="section.key=value, on top of the file")
    _guarded(lambda: _original_train(parser.parse_intermixed_args()))


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
    _guarded(lambda: app(arguments.joined_numbers(sys.argv[1:]), standalone_mode=False))


def _original_train(given: argparse.Namespace) -> None:
    cli_train.train(given.config, given.overrides, False)


def _original_evaluation(given: argparse.Namespace) -> None:
    from cytoclip import report
    from cytoclip.evaluation import How, Question, evaluate, save_as_original, split_folder

    if given.batch_size < 1 or min(given.ks) < 1:
        raise UserError("--batch_size and every --ks must be at least 1", "such as --batch_size 64 --ks 1 10 50")
    console = arguments.console()
    question = Question(given.ks, given.direction.names())
    folder = split_folder(given.data_root, "val")
    name = given.pretrained_clip_path
    (scored,) = evaluate([name], folder, question, console, How(batch_size=given.batch_size)).columns().values()
    console.result(report.table({name: scored}, given.ks))
    if arguments.is_first_process():
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
        if arguments.speaks() or not error.everywhere:
            fail(error.lines())
        sys.exit(int(error.code))
    except Stopped as stop:
        if arguments.speaks():
            fail(str(stop))
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        outcome = _INTERRUPTED
    except Exception as error:
        _explain(error)
        raise
    if outcome == _INTERRUPTED and arguments.speaks():
        fail("stopped; the same command goes on from whatever was saved")
    sys.exit(outcome if isinstance(outcome, int) else 0)


_INTERRUPTED = 128 + 2  # SIGINT; typer catches it inside a command and returns this number


def _explain(error: Exception) -> None:
    """Exit with a message for the two kinds of library errors that are the user's: a wrong call, and no memory."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's usage errors
        message = str(error.format_message()).replace("Value error, ", "")
        if message and arguments.speaks():  # empty where it has already printed the help
            asked = getattr(getattr(error, "ctx", None), "command_path", "cytoclip")
            quoted = "put several words in quotes; " if "unexpected extra argument" in message else ""
            meant = _option_of_a_run(message) if asked in _OF_RUNS else _meant(message)
            fail(UserError(message, f"{meant}{quoted}{asked} --help says what it takes").lines())
        sys.exit(int(ExitCode.USAGE))
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        hint = "use a smaller batch (train.batch_size, --batch-size), more processes, or a frozen or lora tower"
        fail(UserError(f"no memory left: {reason}", hint).lines())
        sys.exit(int(ExitCode.SYSTEM))


def _meant(message: str) -> str:
    """The nearest of the values that an option takes, where the message lists them."""
    word, _, listed = message.rstrip(".").partition(" is not one of ")
    near = nearest(word.rpartition(" ")[2].strip("'"), re.findall(r"'([^']*)'", listed))
    return f"did you mean {near}? " if near else ""


def _option_of_a_run(message: str) -> str:
    """How a run's YAML and its options are given, where they were written as other programs have them."""
    word, _, possible = message.partition("No such option: --")[2].partition(" ")
    if not word or possible not in ("", "(Possible options: --help)"):
        return _meant(message)
    if word == "config":
        return "the YAML stands without an option before it; "
    from cytoclip import config

    names = {option.name.rpartition(".")[2]: option.name for option in config.options() if option.kind != "section"}
    near = word if "." in word else names.get(nearest(word.replace("-", "_"), names) or "", "section.key")
    return f"options of a run are written {near}=value, and `cytoclip config` lists them; "


_OF_RUNS = ("cytoclip train", "cytoclip tune")
_NO_MEMORY = ("out of memory", "can't allocate memory")  # as CUDA and MPS say it, and torch on the CPU
