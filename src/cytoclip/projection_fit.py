"""`model.projections: fitted`: the projections that a run begins with, in closed form from its training pairs.

Each pair is seen once, by towers that do not move, without variation; then training goes on as with `full`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cytoclip import apart, canonical, captions, features
from cytoclip.canonical import Fit
from cytoclip.checkpoint import Opened
from cytoclip.config import Config
from cytoclip.device import placed
from cytoclip.encode import Reading
from cytoclip.errors import UserError, counted
from cytoclip.features import Place
from cytoclip.model import DualEncoder
from cytoclip.pairs import Pairs, identities, spread

MOST = 20_000  # pairs that are looked at: ten times and more as many as the towers are wide
FOLDS = 5
_STAY = "those of the model stay"


def fit(wanted: Config, opened: Opened, train: Pairs, reading: Reading, place: Place) -> Fit | None:
    """The projections to begin with; None where those that are there tell held-out pairs apart as well.

    Where nothing can be held out they stay too: a fit that was not compared is not to be trusted.

    All processes look at pairs together; the first one fits.

    Raises
    ------
    UserError
        For a picture that cannot be read, unless `data.on_bad_image` is skip; where a tower says the same of all.
    """
    said, console = _some(spread(train), wanted.train.seed), place.console
    fold_N = folds(said)
    if fold_N is None:
        console.say(
            f"model.projections: {_STAY}: {counted(len(said), 'pair')} are too few or too alike to compare a fit on"
        )
        return None
    tokens = captions.tokenise(opened.tokenizer, said.captions, opened.context, opened.encoder.family)
    encoder, each, skips = opened.encoder.eval(), reading.batch_size, wanted.data.on_bad_image == "skip"
    image = features.of_pictures(encoder, said, opened.pixels, each, reading.workers, place, skips)
    text = features.of_captions(encoder, said, tokens, each, place)
    encoder.train()

    def fitted() -> Fit:
        there = np.flatnonzero(~np.isnan(image.table[image.of, 0]))
        sides = image.batch(there), text.batch(there)
        pairs = said if len(there) == len(said) else said.take(there.tolist())
        given = tuple(weight.detach() for weight in _weights(encoder))
        rounds = canonical.rounds(fold_N[there])
        with console.progress("fitting projections", len(canonical.EVERY) * len(rounds)) as bar:
            return canonical.fit(sides, (given[0], given[1]), identities(pairs), rounds, bar.advance)

    found = place.world.once(fitted)
    console.say(_line(found, len(said)))
    return found if found.better else None


def refuse_hidden_layers(opened: Opened) -> None:
    """Raise `UserError` for a projection that is more than one linear layer: no closed form gives that."""
    deep = hidden(opened.encoder)
    if deep:
        raise UserError(
            f"model.projections: fitted replaces linear layers, and the {deep[0]} of {opened.name} has a hidden layer",
            "set model.projections=full",
        )


def hidden(encoder: DualEncoder) -> list[str]:
    """The projections that are more than one linear layer."""
    return [name for name in encoder.family.projections if not isinstance(getattr(encoder.clip, name), nn.Linear)]


def put(found: Fit, encoder: DualEncoder) -> None:
    """Let `encoder`, sharded or not, have the projections of `found`."""
    with torch.no_grad():
        for weight, fitted in zip(_weights(encoder), (found.image_DP, found.text_DQ), strict=True):
            weight.copy_(placed(fitted.to(weight.dtype), weight))


def folds(pairs: Pairs) -> NDArray[np.int64] | None:
    """The fold of each pair: no caption, picture, group or source is in two of them.

    Where that leaves more than half of the pairs in one, only a caption is in no two; where that does, too: None.
    """
    for component_N in (apart.components(pairs, captions=True), identities(pairs).caption):
        sizes_K = np.bincount(component_N)
        if sizes_K.max() * 2 > len(pairs) or len(sizes_K) < FOLDS:
            continue
        fold_K, filled = np.empty(len(sizes_K), np.int64), [0] * FOLDS
        for component in np.argsort(-sizes_K, kind="stable"):
            fold_K[component] = filled.index(min(filled))
            filled[fold_K[component]] += sizes_K[component]
        found: NDArray[np.int64] = fold_K[component_N]
        return found
    return None


def _some(pairs: Pairs, seed: int) -> Pairs:
    if len(pairs) <= MOST:
        return pairs
    return pairs.take(np.sort(np.random.default_rng(seed).choice(len(pairs), MOST, replace=False)).tolist())


def _weights(encoder: DualEncoder) -> Iterator[torch.nn.Parameter]:
    for projection in encoder.family.projections:
        yield getattr(encoder.clip, projection).weight


def _line(found: Fit, pairs: int) -> str:
    fitted = f"fitted to {counted(pairs, 'pair')}, ridges {found.ridges[0]:g} and {found.ridges[1]:g}"
    return (
        f"model.projections: {fitted if found.better else f'{_STAY}, which know more than fitted ones'}: "
        f"mrr {found.mrr:.4f} for pairs held out of the fit, and {found.mrr_given:.4f} by those of the model"
    )
