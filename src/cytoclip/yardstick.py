"""What an export is held against: pairs, and the model's own embeddings of them in float32.

Letters: N pairs, H×W pixels, L tokens, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cytoclip import batches, captions, cells, checkpoint, config, images, measure, pixels, sources, split_reader
from cytoclip.captions import Tokens
from cytoclip.checkpoint import Opened
from cytoclip.console import Console
from cytoclip.errors import UserError
from cytoclip.pairs import Pairs, spread
from cytoclip.report import DIRECTIONS

MOST = 256  # pairs; hit@k then moves in steps of 0.4 %, and ViT-B/16 takes 40 s a pass on 2 cores
BATCH = 16
_KS = (1, 10)
_DRAWN = 64


@dataclass(frozen=True)
class Yardstick:
    """Pairs and what the model makes of them.

    Parameters
    ----------
    where
        What they are, in words: `256 of 1,204 val pairs`.
    pictures
        As they are before the model's own resize and crop; asked for one by one, for they may be large.
    pixels_N3HW
        uint8, as the model sees them.
    image_ND, text_ND
        Unit embeddings, float32.
    """

    where: str
    pairs: Pairs
    pictures: Callable[[int], Image.Image]
    opened: Opened
    pixels_N3HW: NDArray[np.uint8]
    tokens: Tokens
    image_ND: NDArray[np.float32]
    text_ND: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pairs)

    def shown(self, some: slice) -> list[Image.Image]:
        """What another library's processor is given; already padded, where no processor could do that."""
        if self.opened.pixels.pad:
            return [Image.fromarray(picture.transpose(1, 2, 0)) for picture in self.pixels_N3HW[some]]
        return [self.pictures(row) for row in range(len(self))[some]]

    def read_by(self, tokenizer: Any, some: slice) -> Any:
        """The captions as a tokenizer of transformers reads them, told what `reading` says."""
        family = self.opened.encoder.family
        return tokenizer(
            [caption.lower() if family.lower else caption for caption in self.pairs.captions[some]],
            padding="max_length" if family.pads == "context" else True,
            truncation=True,
            max_length=self.opened.context,
            return_tensors="pt",
        )

    def floats(self, some: slice) -> torch.Tensor:
        """What the image tower reads: float32 (B, 3, H, W)."""
        return pixels.to_floats(torch.from_numpy(self.pixels_N3HW[some]), self.opened.pixels)

    def ids(self, some: slice) -> torch.Tensor:
        """What the text tower reads: int64 (B, L), padded as the family is."""
        return self.tokens.batch(range(len(self))[some])

    def hits(self, image_ND: NDArray[np.float32], text_ND: NDArray[np.float32]) -> dict[str, dict[str, float]]:
        """hit@k by direction, of these embeddings of the pairs."""
        ks = [k for k in _KS if k < len(self)]
        found = measure.quick(torch.from_numpy(image_ND), torch.from_numpy(text_ND), self.pairs, ks)
        return {name: {f"hit@{k}": float(found[name][f"hit@{k}"]) for k in ks} for name in DIRECTIONS}


def make(opened: Opened, name: str, console: Console, most: int = MOST) -> Yardstick:
    """Pairs of the run's val split, evenly out of all of it, where `name` is of a run whose data are there; else drawn.

    `opened` is put into evaluation mode, on the CPU.
    """
    found = _of_run(name, most, console)
    where, pairs, picture = found or _drawn(most)
    encoder = opened.encoder.to("cpu").eval()
    ready = np.stack([pixels.prepare(picture(row), opened.pixels) for row in range(len(pairs))])
    tokens = captions.tokenise(opened.tokenizer, pairs.captions, opened.context, encoder.family)
    blank = np.empty((0, encoder.width), np.float32)
    made = Yardstick(where, pairs, picture, opened, ready, tokens, blank, blank)
    with console.progress("embedding with the model", 2 * len(pairs)) as bar:
        image_ND = over(len(pairs), lambda some: encoder.images(torch.from_numpy(ready[some])), bar.advance)
        text_ND = over(len(pairs), lambda some: encoder.texts(made.ids(some)), bar.advance)
    return replace(made, image_ND=image_ND, text_ND=text_ND)


def reading(opened: Opened) -> str:
    """What a card's code tells a tokenizer of transformers, for captions called `texts`."""
    family = opened.encoder.family
    texts = "[text.lower() for text in texts]" if family.lower else "texts"
    padding = '"max_length"' if family.pads == "context" else "True"
    return f"{texts}, padding={padding}, truncation=True, max_length={opened.context}"


@torch.no_grad()
def over(count: int, embed: Callable[[slice], Any], advance: Callable[[int], None]) -> NDArray[np.float32]:
    """`embed` of batch after batch of 0..count-1, as float32 (N, D)."""
    parts = []
    for some in _cuts(count):
        rows = embed(some)
        parts.append(rows.float().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows, np.float32))
        advance(len(parts[-1]))
    return np.concatenate(parts)


def cosine(one_ND: NDArray[np.float32], other_ND: NDArray[np.float32]) -> float:
    """The lowest cosine of two rows that belong together; NaN where something is not finite."""
    one, other = one_ND.astype(np.float64), other_ND.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / norms).min())


def _of_run(name: str, most: int, console: Console) -> tuple[str, Pairs, Callable[[int], Image.Image]] | None:
    run = checkpoint.run_of(name)
    if run is None:
        return None
    try:
        data = config.load(run.config).data
        place = data.split("val")
        if place is None:
            return None
        whole = sources.read(place, split_reader.columns_of(data), console)
        chosen = _evenly(whole, most)
        pairs = _evenly(spread(batches.scanned(chosen, place, console)), most)
        total = sum(1 + len(more) for more in whole.more)
    except UserError as error:
        console.warn(f"drawn cells stand in for the run's val split: {error.message}")
        return None
    where = f"{len(pairs):,} of {total:,} val pairs" if len(pairs) < total else f"all {total:,} val pairs"
    return where, pairs, lambda row: images.decode(pairs.images[row])


def _evenly(pairs: Pairs, most: int) -> Pairs:
    if len(pairs) <= most:
        return pairs
    rows = np.linspace(0, len(pairs) - 1, most).round().astype(int).tolist()
    return pairs.take(rows)


def _drawn(most: int) -> tuple[str, Pairs, Callable[[int], Image.Image]]:
    """Cells, whose captions name what is on them; a model need not know them for its export to be compared."""
    some = list(cells.sample(min(most, _DRAWN), 0, range(4)))
    names = tuple(f"drawn {row}" for row in range(len(some)))
    none = (None,) * len(some)
    pairs = Pairs(tuple(map(Path, names)), names, tuple(one.caption for one in some), none, none, none)
    return f"{len(some)} drawn cells", pairs, lambda row: some[row].image


def _cuts(count: int) -> Iterator[slice]:
    for begin in range(0, count, BATCH):
        yield slice(begin, min(begin + BATCH, count))
