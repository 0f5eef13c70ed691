"""Components of pairs, found slowly: a search from each pair along whatever it shares with others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def assert_components(found: NDArray[np.int64], together: Callable[[int, int], bool]) -> None:
    """`found` numbers the components of the relation `together`, closed transitively."""
    for i in range(len(found)):
        reached, waiting = {i}, [i]
        while waiting:
            here = waiting.pop()
            new = {j for j in range(len(found)) if together(here, j)} - reached
            reached |= new
            waiting += new
        assert reached == set(np.flatnonzero(found == found[i]).tolist())
