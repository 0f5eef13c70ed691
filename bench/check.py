"""How long `cytoclip check` takes: 2,000 JPEGs of 1024×768 in a temporary folder, extrapolated to 40,000; then again.

    python bench/check.py [COUNT]

The pictures are drawn cells with noise, about 200 kB each. Prints what the check says, and one JSON line last.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cytoclip import cells, check
from cytoclip.console import Console

SIZE = (1024, 768)
LIKE = 40_000


def draw(root: Path, count: int) -> float:
    """A training split of `count` different pictures and a twentieth as many for validation; kB a picture."""
    rng = np.random.default_rng(0)
    fields = [np.asarray(one.image.resize(SIZE), np.int16) for one in cells.sample(40, 0, range(8))]
    written = 0
    for split, number in (("train", count), ("val", count // 20)):
        (root / split / "imgs").mkdir(parents=True)
        entries = []
        for i in range(number):
            one, two = (fields[k] for k in rng.choice(len(fields), 2, replace=False))
            field = np.roll(one, tuple(rng.integers(0, 768, 2)), (0, 1)) // 2 + two // 2
            field += rng.integers(-9, 10, field.shape, np.int16)
            place = root / split / "imgs" / f"{i}.jpg"
            Image.fromarray(field.clip(0, 255).astype(np.uint8)).save(place, quality=85)
            written += place.stat().st_size
            entries.append({"img": place.name, "caption": f"field {i} of {split}: {rng.integers(10**9)} cells"})
        (root / split / "img_text_pair.json").write_text(json.dumps(entries))
    return written / 1000 / (count + count // 20)


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = draw(root, count)
        took = []
        for _ in range(2):
            began = time.perf_counter()
            report = check.check(root, None, None, Console())
            took.append(time.perf_counter() - began)
    pictures = count + count // 20
    print(report.text())
    print(
        json.dumps(
            {
                "pictures": pictures,
                "kB each": round(size),
                "cores": len(os.sched_getaffinity(0)),
                "pictures/s": round(pictures / took[0], 1),
                "minutes for 40,000": round(LIKE * took[0] / pictures / 60, 1),
                "seconds for all, unchanged": round(took[1], 2),
                "seconds for 40,000, unchanged": round(LIKE * took[1] / pictures, 1),
                "peak memory of the parent, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
