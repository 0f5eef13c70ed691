"""Draw the pictures of the docs that show what an option does: python -m docs.pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cytoclip import augment, cells, files
from cytoclip.augment import Variation
from cytoclip.data_options import Augment

IMAGES = Path(__file__).parent / "images"
SIDE = 128


def microscopy() -> bytes:
    """Eight drawn cells, and what the preset makes of them."""
    of = Variation(Augment(preset="microscopy"), (SIDE, SIDE), seed=0)
    wide = round(SIDE * of.margin)
    drawn = [one.image.convert("RGB").resize((wide, wide)) for one in cells.sample(augment.SHOWN // 2, 1, range(4))]
    pixels = torch.from_numpy(np.stack([np.asarray(one).transpose(2, 0, 1) for one in drawn]))
    rows = torch.stack([of.draw(pair, 0) for pair in range(len(drawn))])
    return augment.sheet(of, pixels, rows)


DRAWN = {"microscopy.png": microscopy}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        files.write_bytes(IMAGES / name, draw())
