"""The commands around a run: fine-tune, look at it, mix its models; and its options."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cytoclip import arguments


class Split(StrEnum):
    val = "val"
    test = "test"


def train(
    config: Annotated[Path, typer.Argument(help="One experiment as YAML.", show_default=False)],
    overrides: arguments.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would happen, and stop.")
    ] = False,
) -> None:
    """Fine-tune as a YAML says; the same command again resumes."""
    from cytoclip import config as configs

    wanted = configs.load(config, overrides or ())
    console = arguments.console()
    if dry_run:
        from cytoclip.training import dry_run as dry

        planned = dry(wanted, console)
        console.result(f"{configs.dump(wanted)}\n{planned.text()}\nnothing was written")
        return
    from cytoclip.training import fit

    result = fit(wanted, console)
    console.result(f"\n{result.table()}\n\nrun folder: {result.run}")


def tune(
    config: Annotated[Path, typer.Argument(help="One experiment as YAML, as for train.", show_default=False)],
    overrides: arguments.Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Runs in all, the configuration as it is among them.")] = 20,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at once, each in a process of its own.")] = 1,
    space: Annotated[
        Path | None,
        typer.Option(
            help="YAML of what is varied: section.key: [a, b] or {low, high, log}; else what is usual.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Of the training pairs, held out to compare trials by.")
    ] = 0.15,
    to: Annotated[
        Path | None, typer.Option(help="Folder of the search; else the output with -search.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Search for better options on pairs held out of train; the same command again goes on."""
    from cytoclip import config as configs
    from cytoclip import tune as tuning

    wanted = configs.load(config, overrides or ())
    asked = tuning.Asked(to or Path(f"{wanted.output}-search"), trials, jobs, space, share)
    console = arguments.console()
    found = tuning.tune(wanted, asked, console)
    if as_json:
        console.result(json.dumps(found.document(), ensure_ascii=False))
        return
    console.result(f"\n{found.table()}\n\nthe best configuration: {found.yaml}\n  cytoclip train {found.yaml}")


def config(
    file: Annotated[
        Path | None, typer.Argument(help="Print this file, complete and resolved.", show_default=False)
    ] = None,
    overrides: arguments.Overrides = None,
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


def demo(
    to: Annotated[Path, typer.Option(help="Folder for the sample set and the run.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed draws other cells.")] = 0,
) -> None:
    """Draw a small sample set, train a small CLIP on it, and show before and after."""
    from cytoclip import config as configs
    from cytoclip import demo as demonstration
    from cytoclip.training import fit

    console = arguments.console()
    recipe = demonstration.prepare(to, seed, console)
    result = fit(configs.load(recipe), console)
    console.result(f"\n{result.table()}\n\nsample set: {to / 'data'}\nrun folder: {result.run}")


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

    console, shares = arguments.console(), soups.ALPHAS if alphas is None else arguments.shares(alphas)
    made = soups.soup(run, soups.Asked(shares, keep, keep_at_least, batch_size), console)
    saved = f"\n\nsaved: {run / 'soup' / 'model'}"
    console.result(json.dumps(made.document(), ensure_ascii=False) if as_json else made.table() + saved)


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
    console, asked = arguments.console(), split.value if split else None
    if len(run) == 1:
        from cytoclip import report_page

        written = report_page.rebuild(run[0], console, to, asked, images)
    else:
        from cytoclip import comparison

        written = comparison.write(run, to or Path("comparison.html"), asked, console, images)
    console.result(str(written))
