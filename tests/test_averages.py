"""The moving average is its formula, takes the weights' place and gives it back, and survives a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from cytoclip.averages import Averages
from cytoclip.errors import UserError


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (4, 3), "vector": (5,), "scale": ()}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def step(moving: dict[str, torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moving.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9, 0.9999])
def test_the_average_equals_its_sum_written_out(decay: float) -> None:
    moving = parameters()
    averages = Averages(moving, decay)
    seen = [{name: p.detach().double() for name, p in moving.items()}]
    for seed in range(1, 21):
        step(moving, seed)
        averages.update()
        seen.append({name: p.detach().double().clone() for name, p in moving.items()})
    for name, average in averages.state().items():
        weights = [decay**20, *((1 - decay) * decay ** (20 - i) for i in range(1, 21))]
        expected = sum((w * at[name] for w, at in zip(weights, seen, strict=True)), torch.zeros(()))
        assert average.dtype == torch.float32
        assert torch.allclose(average.double(), expected, atol=1e-5), name


def test_applied_holds_the_averages_and_gives_the_weights_back_bit_for_bit() -> None:
    moving = parameters()
    averages = Averages(moving, 0.9)
    step(moving, 1)
    averages.update()
    kept, expected = ({n: t.detach().clone() for n, t in s.items()} for s in (moving, averages.state()))
    places = {name: parameter.data_ptr() for name, parameter in moving.items()}
    for fails in (False, True):
        try:
            with averages.applied():
                for name, parameter in moving.items():
                    assert torch.equal(parameter, expected[name])
                    assert not torch.equal(parameter, kept[name])
                    assert parameter.requires_grad
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
        for name, parameter in moving.items():
            assert torch.equal(parameter, kept[name])
            assert torch.equal(averages.state()[name], expected[name])
    assert places == {name: parameter.data_ptr() for name, parameter in moving.items()}


def test_what_was_saved_goes_on_bit_for_bit() -> None:
    moving, averages = parameters(), None
    averages = Averages(moving, 0.9)
    for seed in (1, 2):
        step(moving, seed)
        averages.update()
    again = {name: torch.nn.Parameter(p.detach().clone()) for name, p in moving.items()}
    resumed = Averages(again, 0.9)
    resumed.load({name: tensor.clone() for name, tensor in averages.state().items()})
    for everything in ((moving, averages), (again, resumed)):
        step(everything[0], 3)
        everything[1].update()
    for name, average in averages.state().items():
        assert torch.equal(resumed.state()[name], average)
        assert not torch.equal(average, moving[name])


def test_averages_of_other_parameters_are_refused() -> None:
    averages = Averages(parameters(), 0.9)
    with pytest.raises(UserError, match="of other parameters: vector"):
        averages.load({name: tensor for name, tensor in averages.state().items() if name != "vector"})
    with pytest.raises(UserError, match="of other parameters"):
        averages.load({})
    with pytest.raises(UserError, match="of other parameters: matrix"):
        averages.load(averages.state() | {"matrix": torch.zeros(3, 4)})


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_sharded_weights_are_averaged_like_whole_ones() -> None:
    """One process shows that each operation takes DTensors, as FSDP2 makes of most weights, beside whole ones."""
    mesh = init_device_mesh("cpu", (1,))

    def parted(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor.detach().clone(), mesh, [Shard(0)]) if tensor.ndim else tensor.detach().clone()

    whole = parameters()
    sharded = {name: torch.nn.Parameter(parted(p)) for name, p in whole.items()}
    both = Averages(whole, 0.9), Averages(sharded, 0.9)
    step(whole, 1)
    with torch.no_grad():
        for name, parameter in sharded.items():
            parameter.copy_(parted(whole[name]))
    for averages in both:
        averages.update()
    with both[1].applied():
        for name, parameter in sharded.items():
            assert isinstance(parameter.data, DTensor) == (name != "scale")
            assert torch.equal(joined(parameter), both[0].state()[name])
    both[1].load({name: torch.ones_like(p) for name, p in whole.items()})
    for name, average in both[1].state().items():
        assert isinstance(average, DTensor) == (name != "scale")
        assert torch.equal(joined(average), torch.ones(average.shape))


def joined(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
