"""The chunk that `micro_batch_size: auto` stands for; a GPU that is full is played by a function that raises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cytoclip import autosize, checkpoint
from cytoclip.device import World

CPU = World(torch.device("cpu"))


@pytest.mark.parametrize(
    ("most", "share", "expected"),
    [(1, 64, 1), (0, 64, 1), (5, 64, 4), (32, 64, 32), (100, 64, 64), (100, 48, 48), (40, 48, 32), (9, 1, 1)],
)
def test_the_largest_power_of_two_that_fits_or_the_whole_share(most: int, share: int, expected: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    assert autosize.largest(fits, share) == expected
    assert tried == sorted(set(tried)), "each size once"


@pytest.fixture
def fits(base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bool]:
    opened = checkpoint.open_model(str(base))
    monkeypatch.setattr(autosize, "SLACK", 0)
    whole = opened.encoder.forward

    def forward(pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(1)
        if len(pixels) > 4:
            raise torch.OutOfMemoryError
        return whole(pixels, tokens)

    monkeypatch.setattr(opened.encoder, "forward", forward)
    fits = autosize.trial(opened.encoder.train(), (32, 32), 77, 1000, CPU)
    fits.encoder = opened.encoder  # type: ignore[attr-defined]
    return fits


def test_a_full_memory_does_not_fit_and_leaves_no_trace(fits: Callable[[int], bool]) -> None:
    before = torch.get_rng_state()
    assert [fits(size) for size in (1, 2, 4, 8)] == [True, True, True, False]
    assert autosize.largest(fits, 64) == 4
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in fits.encoder.parameters())  # type: ignore[attr-defined]
