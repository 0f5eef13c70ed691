"""Mixed weights against the obvious formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cytoclip import mixing
from cytoclip.errors import UserError


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(40, 30, generator=made))
        self.scale = nn.Parameter(torch.randn((), generator=made))
        self.register_buffer("mean", torch.randn(5, generator=made))
        self.register_buffer("seen", torch.tensor(seed))


def state(seed: int) -> dict[str, torch.Tensor]:
    return Small(seed).state_dict()


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.9, 1.0])
def test_interpolation_is_the_formula_rounded_once_and_the_ends_are_bytes(alpha: float) -> None:
    into, start, end = Small(9), state(1), state(2)
    end["mean"] = start["mean"].clone()
    start["weight"][0, 0] = end["weight"][0, 0] = -0.0
    mixing.interpolate(into, start, end, alpha)
    for name, tensor in into.state_dict().items():
        one, other = start[name].numpy(), end[name].numpy()
        twin = ((1 - alpha) * one.astype(np.float64) + alpha * other.astype(np.float64)).astype(one.dtype)
        expected = other if alpha == 1 else one if alpha == 0 or name == "seen" else twin
        assert tensor.numpy().tobytes() == np.asarray(expected).tobytes(), name
    assert into.state_dict()["mean"].numpy().tobytes() == start["mean"].numpy().tobytes(), "what both have stays"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_average_is_uniform(count: int) -> None:
    into = Small(9)
    members = [state(seed) for seed in range(count)]
    mixing.average(into, iter(members))
    for name, tensor in into.state_dict().items():
        twin = np.mean([member[name].numpy().astype(np.float64) for member in members], axis=0)
        if name != "seen":
            assert np.allclose(tensor.numpy(), twin, rtol=1e-6, atol=1e-7)


def test_other_models_are_not_mixed() -> None:
    with pytest.raises(UserError, match=r"other weights than each other: weight"):
        mixing.interpolate(Small(0), state(1), {**state(2), "weight": torch.zeros(2)}, 0.5)
    with pytest.raises(UserError, match=r"other weights than each other: extra"):
        mixing.average(Small(0), [state(1), {**state(2), "extra": torch.zeros(2)}])
