"""hit@k equals its definition, by enumeration of every order within ties.

The embeddings here have 1, 4 or 16 entries of ±1 and zeros elsewhere: their lengths are 1, 2 and 4, so every float32
score is exact and a tie in the maths is a tie in the machine, on whatever hardware.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cytoclip.errors import ExitCode, UserError
from cytoclip.pairs import Identity, right_answers
from cytoclip.retrieval import Counts, chance, count_ranks, hit_rate, hit_rates

CPU_AND_GPU = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def exact_embeddings(seed: int, count: int, width: int = 16) -> Tensor:
    """Rows whose pairwise cosines are exact in float32, with many ties."""
    draw = np.random.default_rng(seed)
    rows = np.zeros((count, width), np.float32)
    for row in rows:
        size = draw.choice([size for size in (1, 4, 16) if size <= width])
        row[draw.choice(width, size, replace=False)] = draw.choice([-1, 1], size)
    return torch.from_numpy(rows)


def random_identity(seed: int, count: int) -> Identity:
    """Captions, pictures and groups that overlap without nesting."""
    draw = np.random.default_rng(seed)
    captions, images = draw.integers(0, count, (2, count))
    return Identity(captions, images, draw.integers(-1, max(count // 2, 1), count))


def all_different(count: int) -> Identity:
    return Identity(np.arange(count), np.arange(count), np.full(count, -1))


def cosines(query: Tensor, gallery: Tensor) -> list[list[float]]:
    lengths = [[math.hypot(*row) or 1.0 for row in rows.tolist()] for rows in (query, gallery)]
    dots = (query.double() @ gallery.double().T).tolist()
    return [[dot / lengths[0][i] / lengths[1][j] for j, dot in enumerate(row)] for i, row in enumerate(dots)]


def enumerated(scores: list[list[float]], right: Any, k: int) -> float:
    """hit@k by sorting every order of the gallery (stable, so each order within ties comes equally often)."""
    orders = list(itertools.permutations(range(len(scores))))
    hits = 0
    for i, row in enumerate(scores):
        for order in orders:
            ranked = sorted(order, key=lambda j: -row[j])
            hits += any(right[i][j] for j in ranked[:k])
    return float(Fraction(hits, len(orders) * len(scores)))


def counted(scores: list[list[float]], right: Any) -> list[tuple[int, int, int, int]]:
    """`Counts` by their definition."""
    rows = []
    for i, row in enumerate(scores):
        best = max(score for j, score in enumerate(row) if right[i][j])
        tied = [j for j, score in enumerate(row) if score == best]
        rows.append((sum(s > best for s in row), len(tied), sum(bool(right[i][j]) for j in tied), int(sum(right[i]))))
    return rows


def rows_of(counts: Counts) -> list[tuple[int, ...]]:
    return list(zip(*(c.tolist() for c in (counts.above, counts.tied, counts.right_tied, counts.right)), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_hit_rates_equal_enumeration_of_all_orders(seed: int, count: int) -> None:
    query, gallery = exact_embeddings(seed, count, 4), exact_embeddings(seed + 100, count, 4)
    identity = random_identity(seed, count)
    right = right_answers(identity, identity)
    ks = range(1, count + 3)  # and beyond the gallery
    rates = hit_rates(query, gallery, identity, ks, block=2)
    scores = cosines(query, gallery)
    assert (rates.ks, rates.queries, rates.gallery) == (tuple(ks), count, count)
    for k in ks:
        assert rates.strict[k] == pytest.approx(enumerated(scores, np.eye(count), k), abs=1e-12)
        assert rates.groups[k] == pytest.approx(enumerated(scores, right, k), abs=1e-12)
        if k >= count:
            assert rates.strict[k] == rates.groups[k] == 1


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("rest", [0, 1, 2, 7])
@pytest.mark.parametrize("block", [8, 1000])
def test_counts_equal_their_definition_in_ragged_blocks(rest: int, block: int, device: str) -> None:
    count = 40 + rest
    query, gallery = exact_embeddings(rest, count), exact_embeddings(rest + 100, count)
    query[5] = query[20] = query[count - 1]  # equal queries and gallery rows, far apart
    gallery[1] = gallery[17] = gallery[count - 1]
    gallery[3] = query[9] = 0  # of no direction: scores 0 with everything
    identity = random_identity(rest, count)
    strict, groups = count_ranks(query.to(device), gallery.to(device), identity, block)
    scores = cosines(query, gallery)
    assert rows_of(strict) == counted(scores, np.eye(count, dtype=bool))
    assert rows_of(groups) == counted(scores, right_answers(identity, identity))
    assert strict.above.device.type == "cpu"


def test_counts_do_not_depend_on_the_block() -> None:
    query, gallery, identity = exact_embeddings(0, 45), exact_embeddings(1, 45), random_identity(0, 45)
    seen = {str([rows_of(c) for c in count_ranks(query, gallery, identity, block)]) for block in (1, 2, 7, 44, 45, 46)}
    assert len(seen) == 1


def test_worked_example() -> None:
    """One picture with two captions, and a third pair whose caption is nearer to it than its own."""
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    identity = Identity(np.array([0, 1, 2]), np.array([0, 0, 1]), np.array([-1, -1, -1]))
    rates = hit_rates(image, text, identity, (1, 2, 3))
    # Query 0: texts 0 and 2 tie for the first place, text 0 is its own: 1/2. Query 1: text 1 is third; by its picture
    # text 0 is right too. Query 2: text 2 ties with text 0 for the second place.
    assert rates.strict == {1: float(Fraction(1, 6)), 2: float(Fraction(1, 2)), 3: 1.0}
    assert rates.groups == {1: float(Fraction(1, 3)), 2: float(Fraction(5, 6)), 3: 1.0}


@pytest.mark.parametrize("count", [1, 3, 49, 100])
@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize("constant", [[0.3, -1.7, 2.2], [0.0, 0.0, 0.0]])
def test_constant_model_scores_exactly_chance(count: int, block: int, constant: list[float]) -> None:
    rows = torch.tensor([constant]).expand(count, 3)
    identity = random_identity(count, count)
    ks = [k for k in (1, 5, 7, 10, 49) if k <= count]
    rates = hit_rates(rows, rows, identity, ks, block)
    assert rates == chance(identity, ks, block=13)
    assert rates.strict == {k: k / count for k in ks}
    right = right_answers(identity, identity).sum(axis=1).tolist()
    for k in ks:
        missed = [Fraction(math.comb(count - g, k), math.comb(count, k)) for g in right]
        assert rates.groups[k] == pytest.approx(float(1 - sum(missed) / count), abs=1e-15)


def test_one_constant_side_scores_exactly_chance() -> None:
    torch.manual_seed(0)
    rows, constant = torch.randn(60, 8), torch.randn(1, 8).expand(60, 8)
    identity = random_identity(0, 60)
    assert hit_rates(rows, constant, identity, (1, 10), block=7) == chance(identity, (1, 10))


def test_chance_equals_enumeration() -> None:
    identity = random_identity(3, 5)
    rates = chance(identity, range(1, 7))
    right = right_answers(identity, identity)
    assert right.sum() > 5
    for k in range(1, 7):
        assert rates.strict[k] == min(k / 5, 1)
        assert rates.groups[k] == pytest.approx(enumerated([[0.0] * 5] * 5, right, k), abs=1e-12)


def test_large_ties_stay_exact_and_quick() -> None:
    tied = torch.tensor([40_000])
    none = torch.zeros_like(tied)
    assert hit_rate(Counts(none, tied, none + 1, none + 1), 12_345) == 12_345 / 40_000
    assert hit_rate(Counts(none, tied, tied - 20_000, none + 1), 20_000) == 1
    assert hit_rate(Counts(none + 7, tied, none + 3, none + 3), 7) == 0
    expected = 1 - Fraction(math.comb(39_700, 20_000), math.comb(40_000, 20_000))
    assert hit_rate(Counts(none, tied, none + 300, none + 300), 20_000) == float(expected)


def take(rows: Tensor, order: Any) -> Tensor:
    return rows[torch.as_tensor(order)]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_pairs_changes_nothing(seed: int) -> None:
    """Also to the last bit of real embeddings, some of them equal."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(75)
    kinds = torch.arange(75) % 60
    identity = random_identity(seed, 75)
    for query, gallery in [
        (exact_embeddings(seed, 75), exact_embeddings(seed + 9, 75)),
        (torch.randn(60, 24)[kinds], torch.randn(60, 24)[kinds]),
    ]:
        before = hit_rates(query, gallery, identity, (1, 3, 10), block=16)
        after = hit_rates(take(query, order), take(gallery, order), identity.take(order), (1, 3, 10), block=16)
        assert before == after


def test_scale_of_a_row_changes_nothing() -> None:
    query, gallery, identity = exact_embeddings(0, 50), exact_embeddings(1, 50), random_identity(0, 50)
    expected = count_ranks(query, gallery, identity, 16)
    scales = torch.tensor([1.0, 3.0, 0.1, 1e-3, 1e4, 1e30, 1e-40, 3e38, 7.3, 1e-20]).repeat(5)[:, None]
    for scaled in [(query * scales, gallery), (query, gallery * scales), (query * scales, gallery * scales.flip(0))]:
        got = count_ranks(*scaled, identity, 16)
        assert [rows_of(c) for c in got] == [rows_of(c) for c in expected]
    wild = torch.logspace(-300, 300, 50, dtype=torch.float64)[:, None]
    got = count_ranks(query.double() * wild, gallery.double() * wild, identity, 16)
    assert [rows_of(c) for c in got] == [rows_of(c) for c in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_embeddings_changes_nothing(dtype: torch.dtype) -> None:
    query, gallery, identity = exact_embeddings(0, 50), exact_embeddings(1, 50), random_identity(0, 50)
    expected = hit_rates(query, gallery, identity, (1, 5))
    assert hit_rates(query.to(dtype), gallery.to(dtype), identity, (1, 5)) == expected


def test_bfloat16_rows_are_scored_in_float32() -> None:
    """Scores that differ by 1 in 4096: equal in bfloat16, and so a tie that is none."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 2.0**-6]]).bfloat16()
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).bfloat16()
    strict, _ = count_ranks(query, gallery, all_different(2))
    assert rows_of(strict) == [(0, 1, 1, 1), (1, 1, 1, 1)]


def test_layout_and_gradients_of_the_embeddings_change_nothing() -> None:
    torch.manual_seed(0)
    query, gallery, identity = torch.randn(33, 20), torch.randn(33, 20), random_identity(0, 33)
    expected = hit_rates(query, gallery, identity, (1, 5), block=8)
    strided = torch.zeros(33, 40)[:, ::2].copy_(gallery)
    transposed = query.T.contiguous().T
    assert not strided.is_contiguous()
    assert not transposed.is_contiguous()
    assert hit_rates(transposed.requires_grad_(), strided, identity, (1, 5), block=8) == expected
    assert hit_rates(query, gallery, identity.map(torch.from_numpy), (1, 5), block=8) == expected


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("distinct", [256, 257, 300, 511])
def test_equal_rows_tie_wherever_they_stand(distinct: int, device: str) -> None:
    """Real embeddings: in plain products equal columns differ in the last bits at the ragged edge of a block."""
    torch.manual_seed(distinct)
    gallery = torch.cat([torch.randn(distinct, 512), torch.zeros(9, 512)])
    gallery[distinct:] = gallery[:9]  # each of nine rows has its twin in the ragged end
    query = torch.randn(len(gallery), 512)
    strict, groups = count_ranks(query.to(device), gallery.to(device), all_different(len(gallery)), block=256)
    twins = [*range(9), *range(distinct, distinct + 9)]  # other rows may tie too, by an accident of rounding
    assert strict.tied[twins].tolist() == groups.tied[twins].tolist() == [2] * 18
    assert strict.above[:9].tolist() != strict.above[-9:].tolist()  # other queries
    same_query = count_ranks(query[:1].expand_as(query).to(device), gallery.to(device), all_different(len(gallery)))
    assert same_query[0].above[:9].tolist() == same_query[0].above[-9:].tolist()


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation made, and the precision that every product ran in."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[torch.dtype, str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [
            each for each in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(each, Tensor)
        ]
        self.largest = max([self.largest, *(each.numel() for each in made if not each._is_view())])
        if func is torch.ops.aten.mm.default:
            cuda, cpu = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
            self.products.append((result.dtype, cuda, cpu))
        return result


@pytest.mark.parametrize("constant", [False, True])
def test_memory_grows_with_the_gallery_and_not_with_its_square(constant: bool) -> None:
    torch.manual_seed(0)
    largest = {}
    for count in (300, 600):
        rows = torch.randn(1, 8).expand(count, 8) if constant else torch.randn(count, 8)
        with Recorder() as record:
            hit_rates(rows, rows.flip(0), all_different(count), (1, 10), block=16)
            chance(all_different(count), (1, 10), block=16)
        largest[count] = record.largest
    assert largest == {300: 16 * 300, 600: 16 * 600}


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_float32_whatever_training_chose(precision: str) -> None:
    rows = exact_embeddings(0, 20)
    with matmul_precision(precision), torch.autocast("cpu", dtype=torch.bfloat16), Recorder() as record:
        hit_rates(rows, rows, all_different(20), (1,), block=8)
        after = torch.get_float32_matmul_precision()
    assert after == precision
    assert len(record.products) >= 2
    assert set(record.products) == {(torch.float32, "ieee", "ieee")}


def test_precision_set_for_one_backend_alone_is_no_error() -> None:
    """Then `torch.get_float32_matmul_precision` raises."""
    with matmul_precision("highest"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with Recorder() as record:
            hit_rates(torch.eye(3), torch.eye(3), all_different(3), (1,))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert {cuda for _, cuda, _ in record.products} == {"ieee"}


def test_embeddings_that_are_not_finite_are_named() -> None:
    rows = torch.randn(1200, 4)
    broken = rows.clone()
    broken[3, 1] = math.nan
    broken[9] = math.inf
    with pytest.raises(UserError, match=r"^2 of 1,200 query embeddings are not finite$") as caught:
        hit_rates(broken, rows, all_different(1200), (1,))
    assert caught.value.code == ExitCode.MODEL
    with pytest.raises(UserError, match="gallery embeddings"):
        hit_rates(rows, broken, all_different(1200), (1,))


@pytest.mark.parametrize("call", [lambda i, ks: hit_rates(torch.eye(3), torch.eye(3), i, ks), chance])
def test_wrong_ks_and_no_pairs_are_refused(call: Any) -> None:
    with pytest.raises(UserError, match="k = 0"):
        call(all_different(3), (5, 0))
    with pytest.raises(UserError, match="no pairs") as caught:
        call(all_different(0), (1,))
    assert caught.value.code == ExitCode.DATA


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((2, 4), (2, 4)), ((3,), (3,))])
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="3 pairs"):
        hit_rates(torch.zeros(shapes[0]), torch.zeros(shapes[1]), all_different(3), (1,))
