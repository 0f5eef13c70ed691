"""What `import cytoclip` offers beside `load`: a run and a measurement as functions, on the terms of the commands."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cytoclip import arguments, config, evaluation, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import UserError, shown
from cytoclip.evaluation import Compared, How, Question
from cytoclip.training import RunResult


def train(experiment: str | Path | Mapping[str, Any] | Config, *overrides: str, quiet: bool = False) -> RunResult:
    """Fine-tune as `cytoclip train` does; the same call again resumes, or returns the finished run's result.

    Parameters
    ----------
    experiment
        A YAML file, its content as nested mappings, or a `Config` (what `config.load` returns).
    overrides
        `"section.key=value"`, on top of it.
    quiet
        Say nothing, and write no `train.log`; what every process but the first one does anyway.

    Returns
    -------
    RunResult
        Its `run` is the folder; `before`, `best` and `last` are scores.

    Raises
    ------
    UserError
        For a configuration, data or a model that cannot be used, before the first step.

    Examples
    --------
    >>> import cytoclip
    >>> experiment = {"data": {"root": "data_root"}, "model": {"name": "runs/first"}, "output": "runs/next"}
    >>> result = cytoclip.train(experiment, "train.steps=1", "train.batch_size=12", "data.workers=0", quiet=True)
    >>> result.run, result.steps
    (PosixPath('runs/next'), 1)
    """
    if isinstance(experiment, str | Path):
        wanted = config.load(Path(experiment), overrides)
    else:
        given = (
            experiment.model_dump(mode="json", by_alias=True, exclude_unset=True)
            if isinstance(experiment, Config)
            else experiment
        )
        wanted = config.made(given, overrides)
    return training.fit(wanted, _console(quiet))


def evaluate(
    models: str | Path | Sequence[str | Path],
    data_root: str | Path,
    *,
    split: str = "val",
    ks: int | Sequence[int] = (1, 5, 10, 50),
    base: str | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> Compared:
    """Rank a split with one or several models, as `cytoclip evaluate` does.

    Parameters
    ----------
    models
        Hub ids, Hugging Face folders or run folders.
    data_root
        The folder that holds the split.
    ks
        The k of hit@k, one or several.
    base
        A model to compare with, or `"none"`; None means the starting point of a run among the models.

    Returns
    -------
    Compared
        `columns()` has the scores by model, `differences` those to the base, `document(split)` all of it as plain data,
        `text(ks)` the table.

    Raises
    ------
    UserError
        For a model or split that cannot be used.

    Examples
    --------
    >>> import cytoclip
    >>> compared = cytoclip.evaluate("runs/first", "data_root", ks=[1, 5], quiet=True)
    >>> compared.columns()["runs/first"]["pairs"]
    20
    """
    some = [models] if isinstance(models, str | Path) else list(models)
    if not some:
        raise UserError("models is empty: nothing to evaluate", "name a run folder, a Hugging Face folder or a hub id")
    wanted = _whole("ks", ks)
    _whole("batch_size", batch_size)
    folder = evaluation.split_folder(Path(data_root), split)
    how = How(base=base, batch_size=batch_size)
    return evaluation.evaluate([str(name) for name in some], folder, Question(wanted), _console(quiet), how)


def _whole(name: str, given: Any) -> list[int]:
    """One whole number from 1, or several."""
    try:
        found = [operator.index(one) for one in (given if isinstance(given, Sequence | np.ndarray) else [given])]
    except TypeError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"{name}={shown(given)} is no whole number from 1", f"such as {name}=10")
    return found


def _console(quiet: bool) -> Console:
    return Console(quiet or not arguments.is_first_process())
