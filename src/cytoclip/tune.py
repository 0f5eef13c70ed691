"""`cytoclip tune`: a search for the options that are best on pairs held out of the training split, by optuna."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cytoclip import batches, checkpoint, config, files, space, split_reader, towers, trials, tuned
from cytoclip.checkpoint import Opened, RunFolder
from cytoclip.config import Config
from cytoclip.console import Bar, Console
from cytoclip.data_options import HoldOut
from cytoclip.errors import ExitCode, UserError, first_few
from cytoclip.families import PATCH_TOWERS
from cytoclip.model import layers
from cytoclip.pairs import Pairs, fingerprint, identities, spread
from cytoclip.space import Choice, Facts, Space, Span
from cytoclip.training import dry_run
from cytoclip.trials import Ending, Heard, Trial
from cytoclip.tuned import ENDED, FAILED, FINISHED, Tried, Tuned

LOOKS = 4  # validations of a trial, at least
RANDOM = 10  # trials before the sampler learns from those that there are
SPARED = 5  # finished trials before one is ended early
_IN_A_ROW = 5  # failed trials after which the search ends
_NUMBER, _CHOSEN, _ERROR = "number", "chosen", "error"  # what a trial of optuna's is told beside its values


@dataclass(frozen=True)
class Asked:
    """What to search, and how.

    Parameters
    ----------
    trials
        In all, the configuration as given among them.
    jobs
        Trials at once, each in a process of its own; 1: in this one.
    space
        A file that says what is varied; None: what `space.default` takes for it.
    share
        Of the training pairs, held out to compare trials by.
    """

    to: Path
    trials: int = 20
    jobs: int = 1
    space: Path | None = None
    share: float = 0.15


def tune(wanted: Config, asked: Asked, console: Console) -> Tuned:
    """Search, or go on with the same search; val and test are not looked at.

    Raises
    ------
    UserError
        For anything that the user can mend, before the first trial wherever it can be known by then.
    Stopped
        A signal came. The trials in hand are saved, and the same call goes on with them.
    """
    _refuse_unready()
    busy = UserError(f"{asked.to} is in use by another process", "wait for it, or name another --to", ExitCode.RUN)
    with files.lock(asked.to / ".lock", busy):
        console.log_to(asked.to / "tune.log")
        held = _held_out(wanted, asked)
        pairs = split_reader.read(held.data, ("train", "val"), console)
        search = _begun(held, asked, {name: of for name, (_, of) in pairs.items()}, console)
        _warn_of_large_ks(wanted, len(spread(pairs["val"][1])), console)
        study = _study(search)
        with console.progress("trials", asked.trials, start=len(_done(study))) as bar:
            book = _Book(search, study, console, bar)
            heard = Heard(book.validated, book.ended)
            if asked.jobs == 1:
                trials.one_by_one(book.each(), heard)
            else:
                trials.at_once(book.each(), asked.jobs, heard)
        place, val = pairs["val"]
        ranked = spread(batches.scanned(val, place, console))
        return tuned.outcome(asked.to, _tried(study), wanted, ranked, Path(f"{wanted.output}-tuned"))


@dataclass(frozen=True)
class Search:
    """All that stays the same in a search; `per_epoch` are the steps of an epoch in the configuration as given."""

    asked: Asked
    wanted: Config
    space: Space
    per_epoch: int

    @property
    def journal(self) -> Path:
        return self.asked.to / "trials.log"

    def trial(self, number: int, chosen: dict[str, Any]) -> Config:
        """The configuration of a trial: validated four times at least, in a folder of its own."""
        made = space.applied(self.wanted, chosen, f"trial {number}")
        batch = self.per_epoch * self.wanted.train.batch_size // made.train.batch_size
        steps = made.train.steps or (made.train.epochs or 0) * max(batch, 1)
        every = min(made.validation.every, max(1, math.ceil(steps / LOOKS)))
        looked = made.validation.model_copy(update={"every": every})
        return made.model_copy(update={"validation": looked, "output": str(self.asked.to / self.folder(number))})

    @staticmethod
    def folder(number: int) -> str:
        return f"trials/{number:03}"


def _refuse_unready() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise UserError("cytoclip tune needs optuna", "pip install 'cytoclip[tune]'", ExitCode.SYSTEM)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "cytoclip tune was started by a launcher, and each of its trials is one process",
            "start it plainly; --jobs says how many trials run at once",
            ExitCode.SYSTEM,
        )


def _warn_of_large_ks(wanted: Config, held_out: int, console: Console) -> None:
    for k in wanted.validation.ks:
        if k >= held_out:
            console.warn(
                f"k = {k} of validate.ks is not below the {held_out} held-out pairs: hit@{k} is 1 in every trial; "
                "hold out more (--share), or take it out of validate.ks"
            )


def _held_out(wanted: Config, asked: Asked) -> Config:
    """What the user holds out stays; else a share of train is."""
    if wanted.data.hold_out:
        return wanted
    given = wanted.model_dump(mode="json", by_alias=True)
    given["data"]["hold_out"] = HoldOut(share=asked.share, seed=wanted.train.seed).model_dump()
    return config.parse(given, "the configuration")


def _begun(held: Config, asked: Asked, pairs: dict[str, Pairs], console: Console) -> Search:
    """The search in the folder, or a new one; what it was begun with is in `search.json`."""
    path, prints = asked.to / "search.json", {name: fingerprint(of) for name, of in pairs.items()}
    if path.is_file():
        there = files.read_json(path)
        _refuse_other(there, held, asked, prints)
        files.write_text(asked.to / "space.yaml", there["space"])
        return Search(asked, held, space.read(asked.to / "space.yaml", held), there["per_epoch"])
    if any(one.name not in (".lock", "tune.log") for one in asked.to.iterdir()):
        raise UserError(
            f"{asked.to} holds files that are no search of ours", "name an empty or a new folder as --to", ExitCode.RUN
        )
    given = space.read(asked.space, held) if asked.space else {}
    plan = dry_run(Search(asked, held, {}, 1).trial(0, {}), Console(quiet=True))
    varied = given or space.default(held, _facts(held, pairs["train"], plan.steps))
    entries = zip(pairs["val"].names, pairs["val"].captions, strict=True)
    files.write_json(asked.to / "held_out.json", [{"img": name, "caption": caption} for name, caption in entries])
    files.write_text(asked.to / "space.yaml", space.text(varied))
    kept = {"schema": 1, "config": held.model_dump(mode="json", by_alias=True), "space": space.text(varied)}
    files.write_json(path, {**kept, "per_epoch": plan.steps_per_epoch, "pairs": prints})
    held_out, of = len(pairs["val"]), len(pairs["train"]) + len(pairs["val"])
    console.say(f"{held_out} of {of} training pairs are held out, to compare trials by; what is varied:")
    for name, values in varied.items():
        console.say(f"  {name}: {values.text()}")
    return Search(asked, held, varied, plan.steps_per_epoch or 1)


def _refuse_other(there: dict[str, Any], held: Config, asked: Asked, prints: dict[str, str]) -> None:
    changed = config.differences(config.parse(there["config"], str(asked.to)), held)
    if asked.space and space.text(space.read(asked.space, held)) != there["space"]:
        changed.append("--space")
    changed = [name for name in changed if name not in ("output", "data.workers", "track.to", "report.images")]
    if changed:
        raise UserError(
            f"{asked.to} holds a search with another configuration; different: {first_few(changed)}",
            "name another --to, or delete that folder",
            ExitCode.RUN,
        )
    if there["pairs"] != prints:
        raise UserError(
            f"{asked.to} holds a search on other training pairs",
            "name another --to, or put the pairs back",
            ExitCode.RUN,
        )


def _facts(held: Config, pairs: Pairs, steps: int) -> Facts:
    opened: Opened = checkpoint.open_start(held)
    encoder = opened.encoder
    modes = {encoder.image_tower: held.model.image_tower, encoder.text_tower: held.model.text_tower}
    identity = identities(spread(pairs))
    grouped = identity.group[identity.group >= 0]
    columns = (identity.caption, identity.image, grouped)
    objective = encoder.family.objective if held.train.objective == "auto" else held.train.objective
    found = Facts(
        steps=steps,
        projections=bool(encoder.family.projections),
        layers=all(len(layers(tower)) for tower, mode in modes.items() if mode != "frozen"),
        patches=encoder.clip.config.vision_config.model_type in PATCH_TOWERS and encoder.patches > 1,
        repeats=any(len(set(column.tolist())) < len(column) for column in columns),
        softmax=objective == "infonce",
        joined=encoder.clip.config.model_type == towers.KIND,
    )
    del opened, encoder, modes
    gc.collect()
    return found


def _study(search: Search) -> Any:
    """The trials so far. One that was in hand when its process died is asked for again, with the same values."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    _without_torn_line(search.journal)
    Path(f"{search.journal}.lock").unlink(missing_ok=True)  # ours is the only process: the folder is locked
    lock = JournalFileOpenLock(str(search.journal))
    storage = JournalStorage(JournalFileBackend(str(search.journal), lock))
    study = optuna.create_study(
        storage=storage,
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=SPARED),
    )
    for left in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        if _NUMBER in left.user_attrs:  # else it has no values yet, and the next one gets them
            study.enqueue_trial(left.params, user_attrs={_NUMBER: left.user_attrs[_NUMBER]})
    return study


def _without_torn_line(journal: Path) -> None:
    """What a crash cut short was not heard of yet; a line after it would be read with it."""
    if journal.is_file():
        written = journal.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            files.write_bytes(journal, whole)


@dataclass
class _Book:
    """The search as it goes on; optuna is spoken to here alone."""

    search: Search
    study: Any
    console: Console
    bar: Bar
    in_hand: dict[int, Any] = field(default_factory=dict)
    failed: int = 0

    def each(self) -> Iterator[Trial]:
        """Trials as they are asked for, until there are as many as wanted.

        What is drawn is a function of the seed, the number of the trial and what the trials before it came to: a search
        of one job that was killed and goes on is the search that was not killed.
        """
        while len(_done(self.study)) + len(self.in_hand) < self.search.asked.trials:
            there = [one.user_attrs.get(_NUMBER, -1) for one in self.study.get_trials(deepcopy=False)]
            number = 1 + max(there, default=-1)
            self.study.sampler = _sampler(self.search, number)
            drawn = self.study.ask()
            number = drawn.user_attrs.get(_NUMBER, number)  # of one that is asked for again
            chosen = {name: _drawn(drawn, name, of) for name, of in self.search.space.items()} if number else {}
            drawn.set_user_attr(_CHOSEN, chosen)
            drawn.set_user_attr(_NUMBER, number)  # last: what has one has all its values
            for look, score in self._known(number).items():
                drawn.report(score, look)
            self.in_hand[number] = drawn
            try:
                yield Trial(number, self.search.trial(number, chosen))
            except UserError as error:  # values that do not go together
                self.ended(number, Ending(failed=error))

    def _known(self, number: int) -> dict[int, float]:
        """The validations of the trial before its process died: it may go on behind them."""
        there = [one for one in self.study.get_trials(deepcopy=False) if one.user_attrs.get(_NUMBER) == number]
        return {look: score for one in there for look, score in one.intermediate_values.items()}

    def validated(self, number: int, step: int, score: float) -> bool:
        """Whether the trial shall end: it is below the median of the trials that have finished, where they were then.

        After a resume, a validation may come that is known already.
        """
        drawn = self.in_hand[number]
        every = self.search.trial(number, drawn.user_attrs[_CHOSEN]).validation.every
        look = math.ceil(step / every)
        if look not in _looks(self.study, drawn.number):
            drawn.report(score, look)
        self.bar.advance(0, f"trial {number}, step {step}: {score:.4f}{self._best()}")
        return number > 0 and step % every == 0 and bool(drawn.should_prune())

    def ended(self, number: int, ending: Ending) -> None:
        """Note it, keep the weights of the best trial alone, and say it.

        Raises
        ------
        UserError
            The configuration as given failed, or too many in a row.
        """
        from optuna.trial import TrialState

        error = ending.failed
        if error and not number:
            raise error
        drawn = self.in_hand.pop(number)
        if error:
            drawn.set_user_attr(_ERROR, error.message)
        worst = error is not None and error.code is ExitCode.DIVERGED  # the sampler keeps away from there
        state = TrialState.FAIL if error and not worst else TrialState.PRUNED
        told = {"values": ending.score} if ending.score is not None else {"state": state}
        self.study.tell(drawn.number, **told)
        self.failed = self.failed + 1 if error else 0
        (one,) = [one for one in _tried(self.study) if one.number == number]
        _tidy(self.search, self.study)
        reached = f" {one.score:.4f}" if one.score is not None else ""
        why = f": {error.message}" if error else ""
        self.console.say(f"trial {number} {one.state}{reached}{why}{self._best()}  {space.said(one.chosen)}".rstrip())
        self.bar.advance()
        if error and self.failed >= _IN_A_ROW:
            raise UserError(
                f"{self.failed} trials in a row failed, the last one: {error.message}", error.hint, error.code
            )

    def _best(self) -> str:
        best = _best_of(self.study)
        return f"; best {best.score:.4f} of trial {best.number}" if best else ""


def _sampler(search: Search, number: int) -> Any:
    import optuna

    digest = hashlib.sha256(f"{search.wanted.train.seed} {number}".encode()).digest()
    return optuna.samplers.TPESampler(
        n_startup_trials=RANDOM, seed=int.from_bytes(digest[:4], "little"), constant_liar=search.asked.jobs > 1
    )


def _drawn(drawn: Any, name: str, values: Choice | Span) -> Any:
    if isinstance(values, Choice):  # as text: optuna holds no lists and sections
        return json.loads(drawn.suggest_categorical(name, [json.dumps(value) for value in values.values]))
    if values.whole:
        return drawn.suggest_int(name, values.low, values.high, log=values.log)
    exact = drawn.suggest_float(name, values.low, values.high, log=values.log)
    return min(max(float(f"{exact:.3g}"), values.low), values.high)  # as a person would write it


def _done(study: Any) -> list[Any]:
    from optuna.trial import TrialState

    there = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [one for one in there if one.state is not TrialState.FAIL or _ERROR in one.user_attrs]


def _looks(study: Any, number: int) -> dict[int, float]:
    found: dict[int, float] = study.get_trials(deepcopy=False)[number].intermediate_values
    return found


def _tried(study: Any) -> list[Tried]:
    """The trials that have ended, in the order of their numbers."""
    from optuna.trial import TrialState

    found = []
    for one in _done(study):
        error, looks = one.user_attrs.get(_ERROR), one.intermediate_values
        whole = one.state is TrialState.COMPLETE  # a pruned one has a value too: that of its last look
        state = FAILED if error else FINISHED if whole else ENDED
        score = one.value if whole else looks[max(looks)] if looks else None
        number = one.user_attrs[_NUMBER]
        found.append(Tried(number, Search.folder(number), state, one.user_attrs[_CHOSEN], score, error=error))
    return sorted(found, key=lambda one: one.number)


def _best_of(study: Any) -> Tried | None:
    finished = [one for one in _tried(study) if one.state == FINISHED]
    return max(finished, key=lambda one: (one.score or 0, -one.number), default=None)


def _tidy(search: Search, study: Any) -> None:
    """A trial that has ended keeps what it measured; weights are kept of the best one alone."""
    best = _best_of(study)
    for one in _tried(study):
        run = RunFolder(search.asked.to / one.folder)
        gone = [run.checkpoints, *([] if best and one.number == best.number else [run.best, run.model])]
        for folder in gone:
            if folder.is_dir():
                files.remove(folder)
