"""Seconds of classification without a tower: learn from 40,000 pictures of 512 dimensions, tell as many apart.

python bench/classify.py [CLASSES]
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from cytoclip import classification, probe
from cytoclip.classification import Truth
from cytoclip.probe import Known

PICTURES, WIDTH = 40_000, 512


def drawn(classes: int, seed: int) -> tuple[probe.Floats, probe.Whole]:
    random = np.random.default_rng(seed)
    label_N = random.integers(classes, size=PICTURES)
    middle_CD = np.random.default_rng(0).normal(size=(classes, WIDTH))
    row_ND = random.normal(size=(PICTURES, WIDTH)) + 1 + 0.06 * middle_CD[label_N]
    return (row_ND / np.linalg.norm(row_ND, axis=1, keepdims=True)).astype(np.float32), label_N


def main(classes: int) -> None:
    (known_MD, known_M), (image_ND, label_N) = drawn(classes, 1), drawn(classes, 2)
    known = Known(known_MD, known_M, np.arange(PICTURES) // 5, classes)
    truth = Truth(label_N, np.arange(PICTURES) // 5, [str(c) for c in range(classes)])
    began = time.perf_counter()

    def say(what: str) -> None:
        nonlocal began
        print(f"{what}: {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()

    probed = probe.linear(known, image_ND, seed=0)
    say(f"linear probe, strength {probed.strength:g} by {probed.chosen_by}, converged: {probed.converged}")
    probe.neighbours(known, image_ND)
    say("neighbours")
    margin_NC = classification.margins(probed.logits_NC)
    classification.measure(probed.logits_NC, margin_NC, truth)
    say(f"all metrics of {classes} classes with {truth.resamples:,} resamples")
    print(f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
