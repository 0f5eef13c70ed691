"""An index whose answers are certain, and a server on it: what the tests of page and API stand on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cytoclip import cells, demo, serve, training
from cytoclip.config import parse
from cytoclip.console import Console
from cytoclip.search import Index
from cytoclip.serve import Where
from tests.conftest import TINY

PAIRS = 24
# What a page must show and never run: markup, and what Gradio's templates take for code.
HOSTILE = "<img src=x onerror=\"window.ran='markup'\"> ${window.ran='literal'} {{value}} `backtick` \\"
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Sample:
    """Drawn cells, a tiny model that knows them by heart, and their index."""

    root: Path
    model: Path
    index: Path
    entries: list[dict[str, str]]

    def picture(self, number: int) -> Path:
        return self.root / "train" / "imgs" / self.entries[number]["img"]


def make(folder: Path) -> Sample:
    """Draw 24 pairs, learn them, index them, and one more whose caption is hostile. About ten seconds."""
    root = folder / "root"
    entries = _draw(root / "train", PAIRS, seed=1)
    _draw(root / "val", 4, seed=2)
    base = folder / "base"
    base.mkdir()
    demo.write_base(base, [entry["caption"] for entry in entries], TINY, seed=0)
    wanted: dict[str, Any] = {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base)},
        "train": {"steps": 100, "batch_size": PAIRS, "learning_rate": 5e-3, "warmup_steps": 10, "precision": "no"},
        "validate": {"every": 100, "ks": [1]},
        "checkpoint": {"every": 100},
        "track": {"to": []},
        "output": str(folder / "run"),
    }
    training.fit(parse(wanted, "the test"), QUIET)
    entries.append({**_draw(folder / "extra", 1, seed=9)[0], "img": "hostile.tif", "caption": HOSTILE})
    (folder / "extra" / "imgs" / "000.tif").rename(root / "train" / "imgs" / "hostile.tif")
    (root / "train" / "img_text_pair.json").write_text(json.dumps(entries))
    Index.build(folder / "run", root / "train", folder / "index")
    return Sample(root, folder / "run", folder / "index", entries)


@contextmanager
def server(index: Index, where: Where = Where(port=0)) -> Iterator[str]:  # noqa: B008 - frozen
    """The address of a server on `index` that runs until the end."""
    with serve.listening(where) as ears, serve.running(serve.application(index, where), ears):
        yield serve.url(where.host, ears.getsockname()[1])


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's browser; without it the tests are skipped, and fail in CI."""
    found = shutil.which("chromium")
    if not found:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium on this machine; .ci/browser installs it")
    expect.set_options(timeout=60_000)  # two tests at once on a machine of two cores take what they take
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=found)
        yield launched
        launched.close()


def resize(page: Page, width: int, height: int = 800) -> None:
    """Give the window a size, and wait until the page has it: Playwright returns a moment before, on a busy machine."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function("width => window.innerWidth === width", arg=width)


def _draw(split: Path, count: int, seed: int) -> list[dict[str, str]]:
    (split / "imgs").mkdir(parents=True)
    entries = []
    for i, one in enumerate(cells.sample(count, seed, range(seed * 4, seed * 4 + 4))):
        name = f"{i:03}.{'tif' if i % 8 == 0 else 'png'}"
        one.image.resize((96, 96)).save(split / "imgs" / name)
        entries.append({"img": name, "caption": one.caption, "source": one.source, "label": one.label})
    (split / "img_text_pair.json").write_text(json.dumps(entries))
    return entries
