"""Signs that a run learns nothing, as one line each; None where there is no sign."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from cytoclip import places
from cytoclip.data_options import Data

WINDOW = 50  # steps whose mean loss, or time waited, is looked at
WAITING = 0.1  # share of the time that steps may wait for their pictures
CONTRAST = 0.1  # standard deviation of normalised pixels below which a batch shows next to nothing


def flat_loss(losses: Sequence[float], chance: float, name: str) -> str | None:
    """The mean of the last `WINDOW` losses is what a model that knows nothing has, less 0.05.

    Parameters
    ----------
    losses
        Of the steps so far, after the warm-up; fewer than twice the window are no sign yet.
    chance, name
        What knowing nothing costs, and how that is called: `Objective.chance_loss`, ln(batch) for InfoNCE.
    """
    if len(losses) < 2 * WINDOW:
        return None
    mean = sum(losses[-WINDOW:]) / WINDOW
    if mean < chance - 0.05:
        return None
    return (
        f"the loss stays at {name}: {mean:.3f} over {WINDOW} steps, {name} = {chance:.3f}; "
        "look at the pairs (do captions and pictures belong together?) and at train.learning_rate"
    )


def at_chance(scored: dict[str, Any]) -> str | None:
    """No hit@k by pair, in any direction, is three standard deviations above chance."""
    pairs, chance = scored["pairs"], scored["chance"]
    for direction in ("image_to_text", "text_to_image"):
        for name, hit in scored.get(direction, {}).items():
            if not name.startswith("hit@") or name.endswith("_groups"):
                continue
            by_luck = chance[name]
            if hit > by_luck + 3 * math.sqrt(by_luck * (1 - by_luck) / pairs):
                return None
    return f"the validation is no better than chance on {pairs} pairs"


def no_contrast(floats_B3HW: torch.Tensor) -> str | None:
    """The pictures, as the image tower reads them, are next to uniform (pixels divided by 255 twice look so)."""
    spread = float(floats_B3HW.float().std(dim=(2, 3)).mean(dim=1).median())  # by channel: a flat colour has none
    if spread >= CONTRAST:
        return None
    return f"the pictures have nearly no contrast: the median standard deviation of normalised pixels is {spread:.3f}"


class Waiting:
    """The steps wait for their pictures: said once, with the options that are left to mend it.

    Parameters
    ----------
    options, workers
        Of the run, and how many processes decode.
    first
        Steps that are not looked at: the warm-up, and the epoch in which a cache is filled.
    """

    def __init__(self, options: Data, workers: int, first: int) -> None:
        self._options, self._workers, self._left = options, workers, first
        self._shares: deque[float] = deque(maxlen=WINDOW)
        self._said = False

    def line(self, share: float) -> str | None:
        """After each step, with the share of its time that was spent waiting.

        The mean is over steps and not over time: one long wait, such as for processes to start, is no sign.
        """
        self._left -= 1
        if self._left < 0:
            self._shares.append(share)
        mean = sum(self._shares) / WINDOW
        if self._said or len(self._shares) < WINDOW or mean <= WAITING:
            return None
        self._said = True
        said = f"{mean:.0%} of the time of the last {WINDOW} steps was spent waiting for pictures"
        ways = _quicker(self._options, self._workers)
        return f"{said}; {', or '.join(ways)}" if ways else f"{said}: the disk gives no more"


def _quicker(options: Data, workers: int) -> list[str]:
    if options.cache:
        return []
    afar = places.is_remote(options.train or "")  # and is not kept
    ways = ["copy the shards to this machine" if afar else "set data.cache=true: each is decoded once"]
    if workers < (os.cpu_count() or 1):
        ways.append(f"raise data.workers, which is {workers}")
    if options.augment and not options.reduced_decode:
        ways.append("set data.reduced_decode=true")
    return ways
