"""One run, one folder, one process at a time: who may write into a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cytoclip import config, files
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, Stopped, UserError, first_few

# May differ when a run resumes, or was moved: they decide no number.
HARMLESS = {"data.workers", "data.cache", "data.cache_budget_gb", "train.shard", "train.gradient_checkpointing",
    "checkpoint.every", "checkpoint.keep_last", "track.to", "report.images", "output"}  # fmt: skip
_LENGTHS = ("steps", "epochs")
_FEW = 3  # options that a hint writes out


@contextmanager
def claimed(run: RunFolder, wanted: Config, world: World, console: Console) -> Iterator[None]:
    """Hold the run folder; leave no trace of a run that was refused before it began."""
    busy = UserError(f"{run.path} is in use by another process", "wait for it, or name another output", ExitCode.RUN)
    there = next(folder for folder in (run.path, *run.path.parents) if folder.exists())
    with ExitStack() as stack:

        def claim() -> None:
            refuse_other_run(run, wanted)
            stack.enter_context(files.lock(run.lock, busy))

        world.once(claim)
        console.log_to(run.log)
        try:
            yield
        except (UserError, Stopped) as error:
            console.record(error.lines() if isinstance(error, UserError) else str(error))
            raise
        finally:
            if world.first and not run.config.exists():
                for file in (run.log, run.lock):
                    file.unlink(missing_ok=True)
                files.remove_empty(run.path, keep=there)


def refuse_other_run(run: RunFolder, wanted: Config) -> None:
    if run.config.is_file():
        there = config.load(run.config)
        drops = wanted.model.lora is not None and wanted.model.lora.dropout > 0  # other chunks, other masks
        harmless = HARMLESS if drops else HARMLESS | {"train.micro_batch_size"}
        changed = [name for name in config.differences(there, wanted) if name not in harmless]
        for length in _LENGTHS:
            if changed == [f"train.{length}"]:
                _refuse_other_length(run, length, there, wanted)
                return
        if changed:
            raise UserError(
                f"{run.path} holds a run with another configuration; different: {first_few(changed)}",
                f"{_to_go_on(there, changed)}name another output, or delete that folder",
                ExitCode.RUN,
            )
    elif run.path.exists() and not run.path.is_dir():
        raise UserError(f"{run.path} is a file, not a folder", "name another output", ExitCode.RUN)
    elif run.path.is_dir() and any(p not in _before_config(run) for p in run.path.iterdir()):
        raise UserError(
            f"{run.path} holds files that are no run of ours", "name an empty or a new folder as output", ExitCode.RUN
        )


def _to_go_on(there: Config, changed: list[str]) -> str:
    """Which options the run goes on with, where they are few enough to be read and written in one word each."""
    was = config.written(there, changed)
    if len(changed) > _FEW or None in was.values():
        return ""
    return f"the run goes on with {' '.join(f'{name}={value}' for name, value in was.items())}; else "


def is_longer(run: RunFolder, wanted: Config) -> bool:
    """Whether `wanted`, which `refuse_other_run` let pass, asks for more steps than the run in `run` did."""
    there = config.load(run.config)
    return any(getattr(there.train, length) != getattr(wanted.train, length) for length in _LENGTHS)


def _refuse_other_length(run: RunFolder, length: str, there: Config, wanted: Config) -> None:
    """More steps are the same run, longer, where the steps behind are those that the longer run would have made."""
    was, asked = getattr(there.train, length), getattr(wanted.train, length)
    if asked < was:
        raise UserError(
            f"{run.path} holds a run with train.{length} {was}, more than {asked}: it may grow, not shrink",
            f"set train.{length}={was} or more, or name another output",
            ExitCode.RUN,
        )
    if wanted.train.schedule != "constant":
        raise UserError(
            f"{run.path} holds a run with train.{length} {was}, not {asked}, and with schedule {wanted.train.schedule} "
            "the learning rate of each step depends on their number",
            f"set train.{length}={was}, or name another output to train anew",
            ExitCode.RUN,
        )


def _before_config(run: RunFolder) -> set[Path]:
    """What a run that was killed while it read its data leaves behind."""
    return {run.lock, run.log, run.config.with_name(f".{run.config.name}.new")}
