"""Features of a frozen tower, computed once and read back: training then runs at the speed of the other tower.

Letters: N pairs, U different pictures or captions, W processes, width of the tower's pooled output.

A frozen tower without randomness in its input says the same of a picture each time it is asked. What it says before
the projection, which may move, is kept beside the run folders in `.features/`, under a name made of all it depends on:
the tower's bytes, the model's settings, the precision, and the pictures' contents, how they are decoded and cut (or the
captions' tokens). Another run on the same pairs finds it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cytoclip import files, images
from cytoclip.batches import loader, next_batch
from cytoclip.captions import Tokens
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import different
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder, deciding, fingerprint
from cytoclip.order import STANDBYS
from cytoclip.pairs import Pairs
from cytoclip.pictures import Pictures, Rows
from cytoclip.pixels import PixelSpec

FOLDER = ".features"  # beside the run folders


def of_pictures(
    encoder: DualEncoder,
    pairs: Pairs,
    spec: PixelSpec,
    batch_size: int,
    workers: int,
    place: Place,
    skips: bool = False,
) -> Rows:
    """The image tower's features of every different picture of `pairs`, computed or found at `place`.

    With `skips`, a picture that cannot be used has a row of NaN: another one stood in when it was computed.
    """
    first, of = different(pairs.contents)
    sources = [pairs.images[row] for row in first]
    read = [repr(spec), images.VERSION, *(pairs.contents[row] for row in first)]
    key = _key(encoder, encoder.image_tower, place.world, read)

    def blocks(cuts: list[list[int]]) -> Iterable[torch.Tensor]:
        ahead = range(1 + STANDBYS if skips else 1)
        draws = [[(row, 0, *((row + i) % len(first) for i in ahead[1:])) for row in cut] for cut in cuts]
        source = iter(loader(Pictures(sources, spec), None, draws, workers, place.world.device))
        for cut in cuts:
            batch = next_batch(source)
            with place.world.autocast():
                rows = encoder.image_features(batch.images.to(place.world.device, non_blocking=True))
            rows[torch.from_numpy(batch.indices != np.array(cut)).to(rows.device)] = torch.nan
            yield rows

    return Rows(place.table(key, len(first), batch_size, blocks, "features of the image tower"), of)


def of_captions(encoder: DualEncoder, pairs: Pairs, tokens: Tokens, batch_size: int, place: Place) -> Rows:
    """The text tower's features of every different caption of `pairs`, computed or found at `place`."""
    first, of = different(pairs.captions)
    some = [tokens.batch(first[begin : begin + 1000]).numpy() for begin in range(0, len(first), 1000)]
    key = _key(encoder, encoder.text_tower, place.world, [hashlib.sha256(ids.tobytes()).hexdigest() for ids in some])

    def blocks(cuts: list[list[int]]) -> Iterable[torch.Tensor]:
        for cut in cuts:
            tokens_BL = tokens.batch(first[np.array(cut)]).to(place.world.device)
            with place.world.autocast():
                yield encoder.text_features(tokens_BL)

    return Rows(place.table(key, len(first), batch_size, blocks, "features of the text tower"), of)


class Place:
    """Where features are kept, and who computes them: the folder `.features` beside the run folder `run`."""

    def __init__(self, run: Path, world: World, console: Console) -> None:
        self.folder, self.world, self.console = run.absolute().parent / FOLDER, world, console

    @torch.inference_mode()
    def table(
        self,
        key: str,
        count: int,
        batch_size: int,
        blocks: Callable[[list[list[int]]], Iterable[torch.Tensor]],
        title: str,
    ) -> NDArray[np.float32]:
        """float32 (U, width), mapped from its file; computed first, shared out over the processes, if it is not there.

        `blocks` embeds each list of rows in turn. Every process gets as many of them, so that all meet in each gather;
        the first process writes, beside the file and then in its place.
        """
        path = self.folder / f"{key}.npy"
        if not self.world.once(path.is_file):
            self.console.say(f"{title}: computed once, kept in {path}")
            cuts, each = self._cuts(count, batch_size)
            with ExitStack() as stack:
                bar = stack.enter_context(self.console.progress(title, count))
                stream = stack.enter_context(files.whole_file(path)) if self.world.first else None
                for number, own in enumerate(blocks(cuts)):
                    begin = number * each * self.world.size
                    rows = self.world.gather(own.float()).cpu().numpy()[: max(count - begin, 0)]
                    if stream:
                        _append(stream, rows, count)
                    bar.advance(len(rows))
        self.world.wait()
        if not path.is_file():
            error = UserError(
                f"the {title} are not at {path} on this machine: the first process wrote them on its own disk",
                "set output to a folder that all machines share",
                ExitCode.SYSTEM,
            )
            error.everywhere = False
            raise error
        found: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
        return found

    def _cuts(self, count: int, batch_size: int) -> tuple[list[list[int]], int]:
        """This process's rows of each round, W equal slices a round; past the end the last row stands in."""
        each = min(batch_size, -(-count // self.world.size))
        starts = range(self.world.rank * each, max(count, 1) + self.world.rank * each, each * self.world.size)
        rounds = -(-count // (each * self.world.size))
        return [[min(row, count - 1) for row in range(start, start + each)] for start in starts][:rounds], each


def _append(stream: BinaryIO, rows: NDArray[np.float32], count: int) -> None:
    """Rows (n, width) of a `.npy` file that will have `count` of them."""
    if stream.tell() == 0:
        settings = {"descr": "<f4", "fortran_order": False, "shape": (count, rows.shape[1])}
        np.lib.format.write_array_header_1_0(stream, settings)
    stream.write(np.ascontiguousarray(rows, np.float32).tobytes())


def _key(encoder: DualEncoder, tower: nn.Module, world: World, read: list[str]) -> str:
    settings = repr(deciding(encoder.clip.config.to_dict()))
    written = "\n".join([fingerprint(tower), settings, world.precision, *read])
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()[:32]
