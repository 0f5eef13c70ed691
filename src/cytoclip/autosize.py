"""How many pairs one process can hold at once, found by trying; the global batch is never chosen for the user."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cytoclip.device import RandomState, World
from cytoclip.model import DualEncoder

# Beside the towers' own: blocks of scores and their gradients (objectives.TILE), and what the allocator cannot
# use of what it holds.
SLACK = 2**30


def largest(fits: Callable[[int], bool], share: int) -> int:
    """The largest power of two for which `fits` says so, or `share` if that fits; at least 1 in any case."""
    size = 1
    while size < share and fits(min(2 * size, share)):
        size = min(2 * size, share)
    return size


def trial(
    encoder: DualEncoder, image_size: tuple[int, int], context: int, reserved: int, world: World
) -> Callable[[int], bool]:
    """Whether a forward and a backward pass of some pairs fit into a GPU's memory; no gradient and no draw is left.

    Parameters
    ----------
    reserved
        Bytes that a step will need beside that: AdamW's moments, gradients that are there before, cached embeddings.
    """

    def fits(size: int) -> bool:
        state = RandomState.of(world.device)
        try:
            held = torch.empty(reserved + SLACK, dtype=torch.uint8, device=world.device)
            pixels = torch.zeros(size, 3, *image_size, dtype=torch.uint8, device=world.device)
            tokens = torch.ones(size, context, dtype=torch.int64, device=world.device)
            with world.autocast():
                images, texts = encoder(pixels, tokens)
            embedded = images.sum() + texts.sum()
            if embedded.requires_grad:
                embedded.backward()
            del held
        except torch.OutOfMemoryError:
            return False
        finally:
            encoder.zero_grad(set_to_none=True)
            state.restore(world.device)
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    return fits
