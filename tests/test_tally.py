"""The tiled counts equal a plain table of scores, for every shape of tile, duplicates and crowded rows included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import tally
from cytoclip.tally import Answers, Side

SHAPES = [(1, 1), (5, 9), (16, 24), (17, 23), (40, 31), (64, 80)]


def whole_numbers(seed: int, count: int, width: int = 6) -> torch.Tensor:
    """Rows of small whole numbers: every product is exact, whatever its shape, and many are equal."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32))


def answers(seed: int, rows: int, columns: int, count: int) -> Answers:
    places = np.random.default_rng(seed).choice(rows * columns, min(count, rows * columns), replace=False)
    return Answers(places // columns, places % columns)


@pytest.fixture(params=["packed", "plain"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags added eight at a time, as on a CPU, and one by one, as on a GPU."""
    monkeypatch.setattr(tally, "TILES", {"cpu": (16, 24)})
    monkeypatch.setattr(tally, "PACKED", {"cpu"} if request.param == "packed" else set())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 60, 1000])
def test_counts_equal_a_plain_table(rows: int, columns: int, weighted: bool, count: int) -> None:
    draw = np.random.default_rng(rows)
    weights = [draw.integers(1, 4, n) if weighted else np.ones(n, np.int64) for n in (rows, columns)]
    images, texts = Side(whole_numbers(1, rows), weights[0]), Side(whole_numbers(2, columns), weights[1])
    forward, backward = answers(3, rows, columns, count), answers(4, rows, columns, count)
    done: list[int] = []
    ahead, back = tally.count(images, texts, forward, backward, done.append)
    scores = (images.rows.double() @ texts.rows.double().T).numpy()
    for i, (row, column) in enumerate(zip(forward.row, forward.column, strict=True)):
        assert ahead.above[i] == weights[1][scores[row] > scores[row, column]].sum()
        assert ahead.tied[i] == weights[1][scores[row] == scores[row, column]].sum()
    for i, (row, column) in enumerate(zip(backward.row, backward.column, strict=True)):
        assert back.above[i] == weights[0][scores[:, column] > scores[row, column]].sum()
        assert back.tied[i] == weights[0][scores[:, column] == scores[row, column]].sum()
    assert sum(done) == rows


def test_counts_in_tiles_of_their_own_size() -> None:
    """A byte holds up to 255 flags: columns of the table where all of a tile's rows score higher."""
    rows, columns = tally.TILES["cpu"][0] * 2 + 3, tally.TILES["cpu"][1] + 11
    images = Side(torch.cat([torch.ones(rows - 1, 1), torch.zeros(1, 1)]), np.ones(rows, np.int64))
    texts = Side(torch.cat([torch.ones(columns - 1, 1), torch.zeros(1, 1)]), np.ones(columns, np.int64))
    forward = Answers(np.array([0, 0]), np.array([columns - 1, 3]))
    backward = Answers(np.array([rows - 1, 3]), np.array([0, 0]))
    ahead, back = tally.count(images, texts, forward, backward)
    assert ahead.above.tolist() == [columns - 1, 0]
    assert ahead.tied.tolist() == [1, columns - 1]
    assert back.above.tolist() == [rows - 1, 0]
    assert back.tied.tolist() == [1, rows - 1]


@pytest.mark.usefixtures("small_tiles")
def test_answers_that_hang_together_lie_in_few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    product = tally._product
    monkeypatch.setattr(tally, "_product", lambda *given: made.append(given[2:4]) or product(*given))
    count = 24 * 16
    shuffle = np.random.default_rng(0).permutation(count)
    group = shuffle // 4  # groups of four, strewn over rows and columns
    row, column = np.nonzero(group[:, None] == group[None, :])
    side = Side(whole_numbers(0, count), np.ones(count, np.int64))
    tally.count(side, side, Answers(row, column), Answers(row, column))
    tiles = (count // 16) * (count // 24)
    assert len(made) == tiles + 2 * count // 24  # those near the diagonal are made twice


@pytest.mark.usefixtures("small_tiles")
def test_an_answer_ties_with_itself_whatever_a_product_does(monkeypatch: pytest.MonkeyPatch) -> None:
    product, calls = tally._product, []

    def wobbling(*given: Any) -> torch.Tensor:
        calls.append(given)
        return product(*given) * (1 + 1e-6 * len(calls))

    monkeypatch.setattr(tally, "_product", wobbling)
    torch.manual_seed(0)
    side = Side(torch.randn(40, 8), np.ones(40, np.int64))
    even, odd = (Answers(numbers, numbers) for numbers in (np.arange(0, 40, 2), np.arange(1, 40, 2)))
    ahead, back = tally.count(side, side, even, odd)
    assert (ahead.tied >= 1).all()
    assert (back.tied >= 1).all()
