"""`cytoclip soup`: models mixed from those of a finished run, scored on val and on what is kept, the best one saved."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cytoclip import (
    adapters,
    batches,
    checkpoint,
    config,
    device,
    embeddings,
    evaluation,
    files,
    intake,
    liveness,
    mixing,
    selection,
    soup_curve,
    sources,
    split_reader,
    state,
)
from cytoclip.checkpoint import Opened, RunFolder
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.encode import Reading
from cytoclip.errors import ExitCode, UserError, counted, suggested
from cytoclip.evaluation import Question
from cytoclip.features import Place
from cytoclip.mixing import Weights
from cytoclip.pairs import Pairs, fingerprint, spread
from cytoclip.report import Scores
from cytoclip.rows import Columns
from cytoclip.soup_curve import Curve

SCHEMA = 1  # of soup.json
ALPHAS = tuple(tenth / 10 for tenth in range(11))
KEPT = 0.95


@dataclass(frozen=True)
class Asked:
    """What to mix and how to choose.

    Parameters
    ----------
    alphas
        Shares of the way from the starting model to the last step; 0 and 1 are always among them.
    keep
        A second data root, or one split of it; None: the run's `validate.keep`.
    at_least
        The share of what the starting model scores on it, above chance, that the chosen model has too.
    batch_size, workers
        Of the encoding.
    """

    alphas: Sequence[float] = ALPHAS
    keep: str | None = None
    at_least: float = KEPT
    batch_size: int = 64
    workers: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One mixture: at `alpha` between the starting model and the last step, or the mean of the models of `steps`."""

    alpha: float | None = None
    steps: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        if self.alpha is not None:
            return f"alpha {self.alpha:g}"
        if len(self.steps) == 1:
            return f"step {self.steps[0]} (best/)"
        return f"mean of steps {', '.join(map(str, sorted(self.steps)))}"


@dataclass(frozen=True)
class Tasted:
    """A mixture and what it scores; `allowed` is False where it keeps too little."""

    recipe: Recipe
    val: Scores
    keep: Scores | None = None
    allowed: bool = True


@dataclass(frozen=True)
class Soup:
    """All mixtures of a run, those by alpha first, and which is the best.

    Parameters
    ----------
    keep
        The root of what is kept, and the lowest score on it that is allowed.
    """

    run: Path
    select_by: str
    tasted: tuple[Tasted, ...]
    chosen: Tasted
    at_least: float
    keep: tuple[str, float] | None

    def table(self) -> str:
        """A row for each mixture, chance last; the chosen one is marked."""
        by = self.select_by
        columns = [f"val {by}", *([f"keep {by}"] if self.keep else [])]
        width = max(len(one.recipe.name) for one in self.tasted)
        lines = [" " * (width + 2) + "".join(f"  {title:>12}" for title in columns)]
        for one in self.tasted:
            numbers = [selection.score(scores, by) for scores in (one.val, one.keep) if scores]
            note = "  ← chosen" if one is self.chosen else "" if one.allowed else "  keeps too little"
            lines.append(f"  {one.recipe.name:<{width}}" + "".join(f"  {n:12.4f}" for n in numbers) + note)
        chances = [selection.chance(scores, by) for scores in (self.chosen.val, self.chosen.keep) if scores]
        lines.append(f"  {'chance':<{width}}" + "".join(f"  {n:12.4f}" for n in chances))
        if self.keep:
            root, floor = self.keep
            lines += [
                "",
                f"allowed: keep {by} on {root} of {floor:.4f} or more: chance, and {self.at_least:.0%} of what",
            ]
            lines[-1] += " the starting model scores above it"
        return "\n".join(lines)

    def curve(self) -> str:
        """The picture of the two scores against alpha."""
        by = self.select_by

        def drawn(which: str, floor: float | None) -> Curve:
            scores = {one.recipe: selection.score(getattr(one, which), by) for one in self.tasted}
            points = [(recipe.alpha, score) for recipe, score in scores.items() if recipe.alpha is not None]
            others = [(recipe.name, score) for recipe, score in scores.items() if recipe.alpha is None]
            return Curve(f"{which} {by}", points, others, scores[self.chosen.recipe], floor)

        curves = [drawn("val", None), *([drawn("keep", self.keep[1])] if self.keep else [])]
        return soup_curve.svg(curves, self.chosen.recipe.alpha, self.chosen.recipe.name)

    def document(self) -> dict[str, Any]:
        """soup.json: every mixture with all its scores."""
        keep = {"keep": {"root": self.keep[0], "at_least": self.at_least, "floor": self.keep[1]}} if self.keep else {}
        return {
            "schema": SCHEMA,
            "run": str(self.run),
            "select_by": self.select_by,
            **keep,
            "chosen": self.chosen.recipe.name,
            "mixtures": [
                {
                    "name": one.recipe.name,
                    "alpha": one.recipe.alpha,
                    "steps": sorted(one.recipe.steps),
                    "score": selection.score(one.val, self.select_by),
                    "allowed": one.allowed,
                    "val": one.val,
                    **({"keep": one.keep} if one.keep else {}),
                }
                for one in self.tasted
            ],
        }


def soup(path: Path, asked: Asked, console: Console) -> Soup:
    """Mix, score, choose and save into `RUN/soup`: `model/`, `curve.svg`, and `soup.json` last.

    The chosen one has the best score on val, by the run's `validate.select_by`, of those that keep enough; of equal
    ones the nearest to the starting model. The test split is not looked at. Held at once: the starting model, the last
    one, and the mixture; each process holds them whole.

    Raises
    ------
    UserError
        For a run that is not finished or is being written, alphas outside 0 to 1, or data that cannot be used.
    """
    run = RunFolder(path)
    wanted, finished = _finished(run)
    alphas, root = _alphas(asked.alphas), asked.keep or wanted.validation.keep
    precision, said_by = evaluation.precision_of([str(run.path)])
    world = device.start(precision=precision, said_by=said_by, warn=console.warn)
    busy = UserError(f"{path} is in use by another process", "wait for it", ExitCode.RUN)
    with liveness.watched(world), ExitStack() as held:
        world.once(lambda: held.enter_context(files.lock(run.lock, busy)))
        opened = checkpoint.open_start(wanted)
        opened.encoder.to(world.device)
        splits = world.once(lambda: _splits(wanted, root, console))
        world.once(lambda: _refuse_other_start(run, wanted, opened, splits["val"], console))
        place = Place(run.path, world, console)
        readings = {name: _reading(wanted, asked, opened, pairs, place) for name, pairs in splits.items()}
        members = _members(run, finished, world.once(lambda: state.whole(run.checkpoints, console.warn)))
        recipes = [*(Recipe(alpha=alpha) for alpha in alphas), *_of_steps(members, finished)]
        console.say(f"{counted(len(recipes), 'mixture')} on {world.device.type}, {world.arithmetic}")
        tasted = []
        for recipe in _mixed(opened, recipes, wanted, run, members):
            scores = {
                name: evaluation.rank(opened, pairs, readings[name], Question(wanted.validation.ks), world, console)
                for name, pairs in splits.items()
            }
            tasted.append(Tasted(recipe, scores["val"], scores.get(intake.KEEP)))
            console.say(f"{recipe.name}: {_line(tasted[-1], wanted.validation.select_by)}")
        made = choose(path, wanted.validation.select_by, tasted, str(root), asked.at_least)
        for _ in _mixed(opened, [made.chosen.recipe], wanted, run, members):
            world.once(lambda: _save(made, run, opened, wanted))
        return made


def choose(run: Path, by: str, tasted: Sequence[Tasted], root: str, at_least: float) -> Soup:
    """The best on val of those that keep enough; the first of `tasted` is the starting model, and always does."""
    floor = None
    start = tasted[0].keep
    if start:
        score, chance = selection.score(start, by), selection.chance(start, by)
        floor = min(score, chance + at_least * (score - chance))  # a start below chance has nothing to keep
    judged = tuple(
        replace(one, allowed=floor is None or one.keep is None or selection.score(one.keep, by) >= floor)
        for one in tasted
    )
    best = max((one for one in judged if one.allowed), key=lambda one: selection.score(one.val, by))
    return Soup(run, by, judged, best, at_least, None if floor is None else (root, floor))


def _finished(run: RunFolder) -> tuple[Config, dict[str, Any]]:
    if not run.config.is_file():
        hint = suggested(run.path, "name what train wrote")
        raise UserError(f"{run.path} is no run folder: it has no config.yaml", hint, ExitCode.RUN)
    if not run.results.is_file():
        raise UserError(
            f"{run.path} is not finished: it has no results.json",
            f"run `cytoclip train {run.config}` to its end",
            ExitCode.RUN,
        )
    try:
        results = files.read_json(run.results)
    except ValueError as error:
        raise UserError(f"{run.results} is damaged: {error}", "train to its end again", ExitCode.RUN) from None
    if not isinstance(results, dict) or not results.keys() >= {"best_step", "steps"}:
        raise UserError(f"{run.results} is damaged: it names no steps", "train to its end again", ExitCode.RUN)
    return config.load(run.config), results


def _alphas(given: Sequence[float]) -> list[float]:
    outside = [alpha for alpha in given if not 0 <= alpha <= 1]
    if outside:
        raise UserError(f"alpha {outside[0]:g} is not between 0 and 1", "0 is the starting model, 1 the last step")
    return sorted({0.0, *given, 1.0})


def _splits(wanted: Config, root: str | None, console: Console) -> dict[str, Pairs]:
    """val, and what is kept, each caption a pair of its own."""
    found = split_reader.read(wanted.data, ["val"], console)
    if root:
        folder = intake.kept_split(Path(root))
        columns = Columns(wanted.data.image_column, wanted.data.caption_column)
        found[intake.KEEP] = folder, sources.read(folder, columns, console)
    return {name: spread(batches.scanned(pairs, folder, console)) for name, (folder, pairs) in found.items()}


def _refuse_other_start(run: RunFolder, wanted: Config, opened: Opened, val: Pairs, console: Console) -> None:
    """The line must begin where the run did, whose first validation has left the digests of its weights and pairs."""
    began = embeddings.owner(run.embeddings / "before.safetensors")
    if began and began.weights != opened.digest():
        raise UserError(
            f"{wanted.model.name} has other weights or settings than {run.path} began with",
            "put them back",
            ExitCode.MODEL,
        )
    if began and began.pairs != fingerprint(val):
        console.warn("the validation pairs are others than those that the run was validated on")


def _reading(wanted: Config, asked: Asked, opened: Opened, pairs: Pairs, place: Place) -> Reading:
    """A frozen tower's features are those that the run has stored: no mixture changes them."""
    plain = evaluation.reading(opened, pairs, asked.batch_size, place.world.loaders(asked.workers))
    return intake.asked_once(wanted, opened, pairs, plain, place)


def _members(run: RunFolder, finished: dict[str, Any], checkpoints: dict[int, Path]) -> dict[int, Path]:
    """Where the model of each step is that there is one of; model/ and best/ rather than a checkpoint."""
    best = {finished["best_step"]: run.best} if run.best.is_dir() else {}  # which may have been deleted
    found = {**checkpoints, **best, finished["steps"]: run.model}
    return dict(sorted(found.items(), reverse=True))


def _of_steps(members: dict[int, Path], finished: dict[str, Any]) -> list[Recipe]:
    """best/ where it is not the last step, and the means of the newest two, three and so on."""
    steps, best = tuple(members), finished["best_step"]
    alone = [Recipe(steps=(best,))] if best in members and best != finished["steps"] else []
    return alone + [Recipe(steps=steps[:count]) for count in range(2, len(steps) + 1)]


def _mixed(
    into: Opened, recipes: Sequence[Recipe], wanted: Config, run: RunFolder, members: dict[int, Path]
) -> Iterator[Recipe]:
    """Each recipe in turn, with its weights in `into`."""
    clip = into.encoder.clip
    by_alpha = [recipe for recipe in recipes if recipe.alpha is not None]
    if by_alpha:
        start, end = _weights(checkpoint.open_start(wanted)), _weights(checkpoint.open_model(str(run.model)))
        gc.collect()  # an encoder and the hook in its tower hold each other
        for recipe in by_alpha:
            mixing.interpolate(clip, start, end, recipe.alpha or 0.0)
            yield recipe
        del start, end
    for recipe in recipes:
        if recipe.alpha is None:
            mixing.average(clip, _in_turn([members[step] for step in recipe.steps], wanted))
            yield recipe


def _in_turn(folders: Sequence[Path], wanted: Config) -> Iterator[Weights]:
    for folder in folders:
        yield _of_member(folder, wanted)
        gc.collect()  # as above: the one before the last is gone when the next is opened


def _weights(opened: Opened) -> Weights:
    return dict(opened.encoder.clip.state_dict())


def _of_member(folder: Path, wanted: Config) -> Weights:
    """The weights of model/ or best/, or those that a checkpoint would save as such, with LoRA merged."""
    if not (folder / state.TENSORS).is_file():
        return _weights(checkpoint.open_model(str(folder)))
    opened = checkpoint.open_start(wanted)
    adapters.set_moving(opened.encoder, wanted.model)
    parameters = dict(opened.encoder.clip.named_parameters())
    for name, tensor in state.weights(folder).items():
        parameters[name].data.copy_(tensor)
    return adapters.merged_state(opened.encoder.clip)


def _save(made: Soup, run: RunFolder, opened: Opened, wanted: Config) -> None:
    checkpoint.save_model(run.soup / "model", opened, None, wanted.model)
    files.write_text(run.soup / "curve.svg", made.curve())
    files.write_json(run.soup / "soup.json", made.document())


def _line(one: Tasted, by: str) -> str:
    kept = f", keep {by} {selection.score(one.keep, by):.4f}" if one.keep else ""
    return f"val {by} {selection.score(one.val, by):.4f}{kept}"
