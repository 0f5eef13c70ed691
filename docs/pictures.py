"""Draw the pictures of the docs: python -m docs.pictures."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cytoclip import augment, cells, files
from cytoclip.augment import Variation
from cytoclip.cells import Sample
from cytoclip.data_options import Augment

IMAGES = Path(__file__).parent / "images"
SIDE = 128
TILE, MARGIN, FONT, LINE = 238, 6, 13, 16  # px


def microscopy() -> bytes:
    """Eight drawn cells, and what the preset makes of them."""
    of = Variation(Augment(preset="microscopy"), (SIDE, SIDE), seed=0)
    wide = round(SIDE * of.margin)
    drawn = [one.image.convert("RGB").resize((wide, wide)) for one in cells.sample(augment.SHOWN // 2, 1, range(4))]
    pixels = torch.from_numpy(np.stack([np.asarray(one).transpose(2, 0, 1) for one in drawn]))
    rows = torch.stack([of.draw(pair, 0) for pair in range(len(drawn))])
    return augment.sheet(of, pixels, rows)


def sample_set() -> bytes:
    """A cell of each kind, with its caption."""
    first: dict[str, Sample] = {}
    for one in cells.sample(200, 0, range(4)):
        first.setdefault(one.label, one)
    written = io.BytesIO()
    contact_sheet(list(first.values()), columns=4).quantize(256).save(written, "PNG", optimize=True)
    return written.getvalue()


def contact_sheet(samples: Sequence[Sample], columns: int) -> Image.Image:
    """The pictures in rows of `columns`, each with its caption below; 250 px a column."""
    font = ImageFont.load_default(FONT)
    texts = [textwrap.fill(one.caption, width=34) for one in samples]
    wide = TILE + 2 * MARGIN
    tall = wide + max(text.count("\n") + 1 for text in texts) * LINE
    page = Image.new("RGB", (columns * wide, -(-len(samples) // columns) * tall), "white")
    pen = ImageDraw.Draw(page)
    for index, (one, text) in enumerate(zip(samples, texts, strict=True)):
        left, top = (index % columns) * wide + MARGIN, (index // columns) * tall + MARGIN
        page.paste(one.image.resize((TILE, TILE), Image.Resampling.BICUBIC), (left, top))
        for row, line in enumerate(text.splitlines()):
            pen.text((left, top + TILE + 4 + row * LINE), line, fill=(30, 30, 30), font=font)
    return page


DRAWN = {"microscopy.png": microscopy, "sample-set.png": sample_set}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        files.write_bytes(IMAGES / name, draw())
