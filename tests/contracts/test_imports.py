"""A typo is answered at once: nothing heavy is imported before the command line has been understood."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "accelerate", "peft", "tokenizers", "tensorboard", "sklearn")
LIGHT = ("cli", "config", "errors", "files", "console", "pairs")


def test_the_first_modules_import_nothing_heavy() -> None:
    """One process for all of them: this one has long imported torch."""
    code = f"import sys, {', '.join('cytoclip.' + name for name in LIGHT)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert {f"cytoclip.{name}" for name in LIGHT} <= loaded
    assert loaded & set(HEAVY) == set()


def test_help_answers_in_under_half_a_second() -> None:
    """Of processor time, the best of three: a busy machine is no fault of ours; with torch it would be seconds."""
    command = [Path(sys.executable).parent / "cytoclip", "--help"]
    seconds = []
    for _ in range(3):
        began = _children()
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        seconds.append(_children() - began)
        assert "evaluate" in done.stdout
    assert min(seconds) < 0.5


def _children() -> float:
    """Processor seconds of all processes that ended here so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
