"""Train a demo-size CLIP from scratch on a data root of your own, and print before → after.

    python bench/from_scratch.py DATA_ROOT [section.key=value ...]

Its tokenizer is trained on the captions of the training split. Everything goes below runs/from_scratch-NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cytoclip import config, demo, sources, training
from cytoclip.console import Console


def main(root: Path, overrides: list[str]) -> None:
    folder = Path("runs") / f"from_scratch-{root.resolve().name}"
    base = folder / "base"
    if not base.is_dir():
        base.mkdir(parents=True)
        demo.write_base(base, sources.read(root / "train").captions, demo.Shape(), seed=0)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"data: {{root: {root.resolve()}}}\nmodel: {{name: {base}}}\n"
        "train: {steps: 300, batch_size: 128, learning_rate: 1.0e-3, weight_decay: 0.05, schedule: cosine}\n"
        f"validate: {{every: 100, ks: [1, 10, 50]}}\noutput: {folder}/run\n"
    )
    print(training.fit(config.load(recipe, overrides), Console()).table())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
