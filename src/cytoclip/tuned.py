"""What a search comes to: its trials, best first, how sure the choice is, and the configuration that it is.

Letters: N held-out pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import config, embeddings, files, intervals, retrieval, selection, space
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config
from cytoclip.console import aligned
from cytoclip.errors import counted, first_few
from cytoclip.intervals import Clusters, Interval
from cytoclip.pairs import Pairs, identities
from cytoclip.retrieval import Ranked

FINISHED, ENDED, FAILED = "finished", "ended early", "failed"
_SHOWN = 10  # trials in the table


@dataclass(frozen=True)
class Tried:
    """One trial.

    Parameters
    ----------
    chosen
        The options that were varied; empty for the configuration as it was given.
    state
        `FINISHED`, `ENDED` or `FAILED`.
    score
        Of the best validation of a finished trial, of the last one of another; None where there was none.
    interval
        The 95 % interval of a finished trial's score.
    below_best
        By how much it is below the best trial on the same pairs, and the 95 % interval of that.
    """

    number: int
    folder: str
    state: str
    chosen: dict[str, Any]
    score: float | None = None
    interval: Interval | None = None
    below_best: float | None = None
    below_best_interval: Interval | None = None
    error: str | None = None

    @property
    def is_apart(self) -> bool:
        """Whether it is below the best one beyond noise."""
        return self.below_best_interval is not None and self.below_best_interval[0] > 0


@dataclass(frozen=True)
class Tuned:
    """All trials, the finished ones first and the best of them first of all; `chance` is of their score."""

    by: str
    pairs: int
    chance: float
    trials: list[Tried]
    yaml: str
    clusters: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Tried:
        return self.trials[0]

    def document(self) -> dict[str, Any]:
        """As JSON; every key is in docs/guide/tune.md."""
        return {
            "schema": 1,
            "select_by": self.by,
            "held_out_pairs": self.pairs,
            "chance": self.chance,
            "clusters": self.clusters,
            "best": self.best.number,
            "best_config": self.yaml,
            "trials": [asdict(trial) for trial in self.trials],
        }

    def table(self) -> str:
        """The trials that finished, and what may be said of the best one."""
        rows = [["trial", self.by, "95 %", "below the best", "95 %"]]
        finished = [trial for trial in self.trials if trial.state == FINISHED]
        for one in finished[:_SHOWN]:
            below = [f"{one.below_best:.4f}", _span(one.below_best_interval)] if one is not self.best else ["", ""]
            rows.append([f"{one.number}{_mark(one)}", f"{one.score:.4f}", _span(one.interval), *below])
        head, *drawn, chance = aligned([*rows, ["chance", f"{self.chance:.4f}", "", "", ""]])
        wide = max(map(len, (head, *drawn)))
        both = zip(drawn, finished, strict=False)
        lines = [f"{line:<{wide}}  {space.said(one.chosen)}".rstrip() for line, one in both]
        lines.append(chance.rstrip())
        rest = {state: sum(one.state == state for one in self.trials) for state in (ENDED, FAILED)}
        left = len(finished) - _SHOWN
        more = [f"{left} more finished"] * (left > 0) + [f"{count} {state}" for state, count in rest.items() if count]
        return "\n".join([head, *lines, *([", ".join(more)] if more else []), "", *self.certainty()])

    def certainty(self) -> list[str]:
        """How sure it is that the best trial is the best choice, in sentences."""
        given = next((one for one in self.trials if not one.chosen and one.state == FINISHED), None)
        best, several = self.best.number, counted(len(self.trials), "trial")
        said = [f"trial {best} is the best of {several} on {self.pairs} held-out pairs"]
        lowest = self.best.interval[0] if self.best.interval else self.best.score or 0
        if lowest <= self.chance:
            said.append(
                f"it is not shown to be better than chance ({self.chance:.4f}): these pairs choose none of them"
            )
        if given is self.best:
            said.append("it is the configuration as it was given: nothing that was tried is better")
        elif given and given.below_best is not None:
            by = f"{given.below_best:.4f} {_span(given.below_best_interval)}"
            sure = "beyond noise" if given.is_apart else "within noise"
            said.append(f"above the configuration as given (trial {given.number}) by {by}: {sure}")
        near = [str(one.number) for one in self.trials[1:] if one.state == FINISHED and not one.is_apart]
        if near:
            one_or_more = "trial" if len(near) == 1 else "trials"
            said.append(f"not to be told from it on these pairs: {one_or_more} {first_few(near, 5)}")
        if len(self.trials) > 1:
            said.append("the best of several is partly luck: expect less on other pairs, and measure it on val")
        return said


def outcome(folder: Path, tried: Sequence[Tried], wanted: Config, pairs: Pairs, to: Path) -> Tuned:
    """Hold finished trials against the best one, pair by pair, and write `best.yaml` and `tune.json`.

    Parameters
    ----------
    wanted
        The configuration as the user gave it.
    pairs
        The held-out pairs, each caption one.
    to
        The output of the best configuration.
    """
    by = wanted.validation.select_by
    finished = sorted((one for one in tried if one.state == FINISHED), key=lambda one: (-(one.score or 0), one.number))
    identity, drawn = identities(pairs), intervals.clusters(pairs)
    column = {}
    for one in finished:
        rows = embeddings.read(RunFolder(folder / one.folder).embeddings / "best.safetensors")
        column[one.number] = column_of(retrieval.rank(*rows, identity, wanted.validation.ks), by)
    judged = [_judged(one, column[one.number], column[finished[0].number], drawn) for one in finished]
    others = [one for one in tried if one.state != FINISHED]
    best = space.applied(wanted, finished[0].chosen, "the best trial").model_copy(update={"output": str(to)})
    yaml = folder / "best.yaml"
    first = f"# trial {finished[0].number} of {folder}: {by} {finished[0].score:.4f} on what was held out of train"
    files.write_text(yaml, f"{first}\n{config.dump(best)}")
    clusters = {"by": drawn.by, "count": drawn.count}
    chance = chance_of(pairs, wanted.validation.ks, by)
    found = Tuned(by, len(pairs), chance, [*judged, *others], str(yaml), clusters)
    files.write_json(folder / "tune.json", found.document())
    return found


def chance_of(pairs: Pairs, ks: Sequence[int], by: str) -> float:
    """What a model that knows nothing has for `selection.score`."""
    part = retrieval.chance(identities(pairs), ks).flat()
    return float(np.mean([part[name].mean() for name in selection.names(part, by)]))


def column_of(ranked: Mapping[str, Ranked], by: str) -> NDArray[np.float64]:
    """What each pair adds to `selection.score`, whose value is the mean of it: (N,)."""
    parts = [one.flat() for one in ranked.values()]
    found: NDArray[np.float64] = np.mean([part[name] for part in parts for name in selection.names(part, by)], axis=0)
    return found


def _judged(one: Tried, own_N: NDArray[np.float64], best_N: NDArray[np.float64], drawn: Clusters) -> Tried:
    interval = intervals.intervals({"score": own_N}, drawn).get("score")
    below = intervals.differences({"score": best_N}, {"score": own_N}, drawn).get("score")
    by = float((best_N - own_N).mean())
    return replace(one, interval=interval, below_best=by, below_best_interval=below)


def _mark(one: Tried) -> str:
    return "" if one.chosen else " (as given)"


def _span(interval: Interval | None) -> str:
    return "[{:.4f}, {:.4f}]".format(*interval) if interval else "–"
