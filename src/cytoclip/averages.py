"""A moving average of the weights that train: what is validated and saved where `train.ema` is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from cytoclip.device import placed
from cytoclip.errors import ExitCode, UserError, first_few


class Averages:
    """After each step `average = decay · average + (1 − decay) · weight`, beginning at the weights themselves.

    Parameters
    ----------
    moving
        The parameters that train, by name, where they are during training (whole or sharded as DTensors).
    decay
        `train.ema`, between 0 and 1; about 1 / (1 − decay) last steps count.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> averages = Averages({"weight": weight}, decay=0.75)
    >>> _ = weight.data.fill_(5.0)
    >>> averages.update()
    >>> with averages.applied():
    ...     weight.tolist()
    [2.0]
    >>> weight.tolist()
    [5.0]
    """

    def __init__(self, moving: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._moving = dict(moving)
        self._decay = decay
        self.restart()

    def restart(self) -> None:
        """Begin anew at the weights as they are."""
        self._averages = {name: parameter.detach().clone() for name, parameter in self._moving.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Called after each optimizer step; elementwise, so each process does it for its own shards."""
        averages, weights = ([_own(each) for each in side.values()] for side in (self._averages, self._moving))
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside, and its own weights again after, to the last bit.

        The two change places one parameter at a time, which needs no third copy of the model; inside, nothing may ask
        for `update`, `state` or `load`.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by the name of the parameter, not copied."""
        return dict(self._averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned: whole tensors, on any device.

        Raises
        ------
        UserError
            For the averages of other parameters.
        """
        own, given = ({name: t.shape for name, t in some.items()} for some in (self._averages, state))
        other = sorted(name for name in own | given if own.get(name) != given.get(name))
        if other:
            raise UserError(
                f"the checkpoint's moving averages (train.ema) are of other parameters: {first_few(other)}",
                "name another output to train anew",
                ExitCode.RUN,
            )
        for name, average in self._averages.items():
            average.copy_(placed(state[name], average))

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._moving.items():
            average = self._averages[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


def _own(tensor: Any) -> torch.Tensor:
    """This process's part: sharded and whole tensors do not go into one call."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "device_mesh") else tensor
    return part
