"""Both rankings equal their definition, by enumeration of every order within ties and by plain tables of scores.

The embeddings here have 1, 4 or 16 entries of ±1 and zeros elsewhere: their lengths are 1, 2 and 4, so every float32
score is exact and a tie in the maths is a tie in the machine, on whatever hardware.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cytoclip import expected, relevance, retrieval, tally
from cytoclip.errors import ExitCode, UserError
from cytoclip.expected import Runs
from cytoclip.pairs import Identity, right_answers
from cytoclip.retrieval import Ranked, chance, rank
from tests.test_relevance import KINDS, identity_of

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


def cosines(query: Tensor, gallery: Tensor) -> np.ndarray:
    lengths = [np.array([math.hypot(*row) or 1.0 for row in rows.tolist()]) for rows in (query, gallery)]
    return (query.double() @ gallery.double().T).numpy() / lengths[0][:, None] / lengths[1]


def by_definition(scores: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric of every query from its row of scores, run by run of equal ones (`test_expected.py` enumerates)."""
    runs = []
    for query, row in enumerate(scores):
        for score in np.unique(row[right[query]]):
            tied = row == score
            runs.append((query, (row > score).sum(), tied.sum(), (tied & right[query]).sum()))
    return expected.values(Runs(*np.array(runs).T), len(scores), ks, one_right=False)


def both(image: Tensor, text: Tensor, identity: Identity, ks: Sequence[int]) -> dict[str, Ranked]:
    """`rank` by tables of all scores and all right answers."""
    scores, right = cosines(image, text), right_answers(identity, identity)
    own = np.eye(len(scores), dtype=bool)
    return {
        name: Ranked(by_definition(table, own, ks), by_definition(table, right, ks))
        for name, table in (("image_to_text", scores), ("text_to_image", scores.T))
    }


def compare(got: dict[str, Ranked], wanted: dict[str, Ranked]) -> None:
    assert list(got) == list(wanted) == ["image_to_text", "text_to_image"]
    for name, one in got.items():
        assert "map" not in one.strict  # it is the MRR
        for part, other in ((one.strict, wanted[name].strict), (one.groups, wanted[name].groups)):
            assert len(part) >= 5
            for metric, column in part.items():
                assert column == pytest.approx(other[metric], abs=1e-12), (name, metric)


def same(one: dict[str, Ranked], other: dict[str, Ranked]) -> bool:
    """To the last bit."""
    pairs = [
        (left, right)
        for name in one
        for mine, its in ((one[name].strict, other[name].strict), (one[name].groups, other[name].groups))
        for left, right in zip(mine.values(), its.values(), strict=True)
    ]
    return all(bool((left == right).all()) for left, right in pairs)


@pytest.fixture(params=["as they are", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also tiles so small that these galleries have many, ragged ones among them, and queries that count as crowded."""
    if request.param == "small":
        monkeypatch.setattr(tally, "TILES", dict.fromkeys(("cpu", "cuda"), (8, 24)))
        monkeypatch.setattr(relevance, "MANY", 2)
        monkeypatch.setattr(retrieval, "_SORTED_AT_ONCE", 100)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 40, 47, 73])
@pytest.mark.parametrize("seed", range(3))
def test_rank_equals_its_definition(count: int, seed: int, device: str) -> None:
    image, text = exact_embeddings(seed, count), exact_embeddings(seed + 100, count)
    if count > 20:
        image[5] = image[20] = image[count - 1]  # equal rows, far apart
        text[1] = text[17] = text[count - 1]
        text[3] = image[9] = 0  # of no direction: scores 0 with everything
    identity = random_identity(seed, count)
    ks = (1, 2, 5, count, count + 3)
    done: list[int] = []
    got = rank(image.to(device), text.to(device), identity, ks, done.append)
    compare(got, both(image, text, identity, ks))
    assert sum(done) == len(torch.unique(torch.nn.functional.normalize(image), dim=0))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_rank_equals_its_definition_for_every_kind_of_repeat(kind: str) -> None:
    identity = identity_of(kind, 60, seed=1)
    image, text = exact_embeddings(1, 60), exact_embeddings(2, 60)
    image, text = image[torch.from_numpy(identity.image % 60)], text[torch.from_numpy(identity.caption % 60)]
    compare(rank(image, text, identity, (1, 5, 20)), both(image, text, identity, (1, 5, 20)))


def test_one_relation_where_all_pairs_are_different() -> None:
    one = rank(torch.eye(5), torch.eye(5).flip(0), all_different(5), (1,))["image_to_text"]
    assert one.groups is one.strict


def test_worked_example() -> None:
    """One picture with two captions, and a third pair whose caption is nearer to it than its own."""
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    identity = Identity(np.array([0, 1, 2]), np.array([0, 0, 1]), np.array([-1, -1, -1]))
    one = rank(image, text, identity, (1, 2, 3))["image_to_text"]
    # Query 0: texts 0 and 2 tie for the first place, text 0 is its own: 1/2. Query 1: text 1 is third; by its picture
    # text 0 is right too. Query 2: text 2 ties with text 0 for the second place.
    assert [one.strict[f"hit@{k}"].tolist() for k in (1, 2, 3)] == [[0.5, 0, 0], [1, 0, 0.5], [1, 1, 1]]
    assert [one.groups[f"hit@{k}"].tolist() for k in (1, 2, 3)] == [[0.5, 0.5, 0], [1, 1, 0.5], [1, 1, 1]]
    assert one.strict["rank"].tolist() == [1.5, 3, 2.5]
    assert one.groups["recall@2"].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("count", [1, 3, 49, 100])
@pytest.mark.parametrize("constant", [[0.3, -1.7, 2.2], [0.0, 0.0, 0.0]])
def test_constant_model_scores_exactly_chance(count: int, constant: list[float]) -> None:
    rows = torch.tensor([constant]).expand(count, 3)
    identity = random_identity(count, count)
    ks = [k for k in (1, 5, 7, 10, 49) if k <= count]
    found, nothing = rank(rows, rows, identity, ks), chance(identity, ks)
    assert same(found, dict.fromkeys(found, nothing))
    summed = expected.summary(found["image_to_text"].strict)
    assert {k: summed[f"hit@{k}"] for k in ks} == {k: k / count for k in ks}
    assert summed["mean_rank"] == summed["median_rank"] == (count + 1) / 2
    right = right_answers(identity, identity).sum(axis=1).tolist()
    for k in ks:
        missed = [Fraction(math.comb(count - g, k), math.comb(count, k)) for g in right]
        groups = expected.summary(found["text_to_image"].groups)
        assert groups[f"hit@{k}"] == pytest.approx(float(1 - sum(missed) / count), abs=1e-15)


@pytest.mark.usefixtures("tiles")
def test_one_constant_side_scores_exactly_chance() -> None:
    torch.manual_seed(0)
    rows, constant = torch.randn(60, 8), torch.randn(1, 8).expand(60, 8)
    identity = random_identity(0, 60)
    nothing = chance(identity, (1, 10))
    assert same({"one": rank(rows, constant, identity, (1, 10))["image_to_text"]}, {"one": nothing})
    assert same({"one": rank(constant, rows, identity, (1, 10))["text_to_image"]}, {"one": nothing})


def test_chance_equals_its_definition() -> None:
    identity = random_identity(3, 50)
    right = right_answers(identity, identity)
    got, wanted = chance(identity, (1, 5)), by_definition(np.zeros((50, 50)), right, (1, 5))
    assert right.sum() > 50
    for name, column in got.groups.items():
        assert column == pytest.approx(wanted[name], abs=1e-12)


def take(rows: Tensor, order: Any) -> Tensor:
    return rows[torch.as_tensor(order)]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_pairs_changes_nothing(seed: int) -> None:
    """Also to the last bit of real embeddings, some of them equal."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(75)
    kinds = torch.arange(75) % 60
    identity = random_identity(seed, 75)
    for image, text in [
        (exact_embeddings(seed, 75), exact_embeddings(seed + 9, 75)),
        (torch.randn(60, 24)[kinds], torch.randn(60, 24)[kinds]),
    ]:
        before = rank(image, text, identity, (1, 3, 10))
        after = rank(take(image, order), take(text, order), identity.take(order), (1, 3, 10))
        moved = {
            name: Ranked(*({key: column[order] for key, column in part.items()} for part in (one.strict, one.groups)))
            for name, one in before.items()
        }
        assert same(after, moved)


def test_scale_of_a_row_changes_nothing() -> None:
    image, text, identity = exact_embeddings(0, 50), exact_embeddings(1, 50), random_identity(0, 50)
    wanted = rank(image, text, identity, (1, 5))
    scales = torch.tensor([1.0, 3.0, 0.1, 1e-3, 1e4, 1e30, 1e-40, 3e38, 7.3, 1e-20]).repeat(5)[:, None]
    for scaled in [(image * scales, text), (image, text * scales), (image * scales, text * scales.flip(0))]:
        assert same(rank(*scaled, identity, (1, 5)), wanted)
    wild = torch.logspace(-300, 300, 50, dtype=torch.float64)[:, None]
    assert same(rank(image.double() * wild, text.double() * wild, identity, (1, 5)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_embeddings_changes_nothing(dtype: torch.dtype) -> None:
    image, text, identity = exact_embeddings(0, 50), exact_embeddings(1, 50), random_identity(0, 50)
    assert same(rank(image.to(dtype), text.to(dtype), identity, (1, 5)), rank(image, text, identity, (1, 5)))


def test_bfloat16_rows_are_scored_in_float32() -> None:
    """Scores that differ by 1 in 4096: equal in bfloat16, and so a tie that is none."""
    text = torch.tensor([[1.0, 0.0], [1.0, 2.0**-6]]).bfloat16()
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).bfloat16()
    assert rank(image, text, all_different(2), (1,))["image_to_text"].strict["rank"].tolist() == [1, 2]


def test_layout_and_gradients_of_the_embeddings_change_nothing() -> None:
    torch.manual_seed(0)
    image, text, identity = torch.randn(33, 20), torch.randn(33, 20), random_identity(0, 33)
    wanted = rank(image, text, identity, (1, 5))
    strided = torch.zeros(33, 40)[:, ::2].copy_(text)
    transposed = image.T.contiguous().T
    assert not strided.is_contiguous()
    assert not transposed.is_contiguous()
    assert same(rank(transposed.requires_grad_(), strided, identity, (1, 5)), wanted)
    assert same(rank(image, text, identity.map(torch.from_numpy), (1, 5)), wanted)


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("distinct", [256, 257, 300, 511])
def test_equal_rows_tie_wherever_they_stand(distinct: int, device: str) -> None:
    """Real embeddings: in plain products equal columns differ in the last bits at the ragged edge of a block."""
    torch.manual_seed(distinct)
    text = torch.cat([torch.randn(distinct, 512), torch.zeros(9, 512)])
    text[distinct:] = text[:9]  # each of nine rows has its twin in the ragged end
    image = torch.randn(len(text), 512)
    own = rank(image.to(device), text.to(device), all_different(len(text)), (1,))["image_to_text"].strict["rank"]
    twins = [*range(9), *range(distinct, distinct + 9)]
    assert (own[twins] % 1 == 0.5).all()  # one place of two, on average
    assert (np.delete(own, twins) % 1 == 0).sum() >= distinct - 12  # others may tie by an accident of rounding
    one = rank(image[:1].expand_as(image).to(device), text.to(device), all_different(len(text)), (1,))
    ranks = one["image_to_text"].strict["rank"]
    assert ranks[:9].tolist() == ranks[-9:].tolist()


@pytest.mark.usefixtures("tiles")
def test_real_embeddings_differ_from_a_plain_table_only_where_scores_nearly_tie() -> None:
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(400, 64))
    text = torch.nn.functional.normalize(image + 0.3 * torch.randn(400, 64))
    identity, ks = random_identity(0, 400), (1, 5, 20)
    got, wanted = rank(image, text, identity, ks), both(image, text, identity, ks)
    scores = (image @ text.T).numpy()
    right = right_answers(identity, identity)
    differ = 0
    for name, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        best = np.where(right, table, -np.inf).max(axis=1, keepdims=True)
        near = ((abs(table - best) < 1e-6) & ~right).any(axis=1)
        for k in ks:
            other = got[name].groups[f"hit@{k}"] != wanted[name].groups[f"hit@{k}"]
            assert near[other].all()
            differ += other.sum()
    assert differ <= 2


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


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("kind", ["all different", "groups of some", "one group"])
def test_memory_grows_with_the_gallery_and_not_with_its_square(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_SORTED_AT_ONCE", 600)
    torch.manual_seed(0)
    largest = {}
    for count in (300, 600):
        rows = torch.randn(count, 8)
        with Recorder() as record:
            rank(rows, rows.flip(0), identity_of(kind, count, 0), (1, 10))
        largest[count] = record.largest
    assert largest[300] >= 300 * 8
    assert largest[600] <= max(math.prod(tally.TILES["cpu"]), 2 * largest[300])


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
        rank(rows, rows, all_different(20), (1,))
        after = torch.get_float32_matmul_precision()
    assert after == precision
    assert len(record.products) >= 2
    assert set(record.products) == {(torch.float32, "ieee", "ieee")}


def test_precision_set_for_one_backend_alone_is_no_error() -> None:
    """Then `torch.get_float32_matmul_precision` raises."""
    with matmul_precision("highest"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with Recorder() as record:
            rank(torch.eye(3), torch.eye(3), all_different(3), (1,))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert {cuda for _, cuda, _ in record.products} == {"ieee"}


def test_embeddings_that_are_not_finite_are_named() -> None:
    rows = torch.randn(1200, 4)
    broken = rows.clone()
    broken[3, 1] = math.nan
    broken[9] = math.inf
    with pytest.raises(UserError, match=r"^2 of 1,200 image embeddings are not finite$") as caught:
        rank(broken, rows, all_different(1200), (1,))
    assert caught.value.code == ExitCode.MODEL
    with pytest.raises(UserError, match="text embeddings"):
        rank(rows, broken, all_different(1200), (1,))


@pytest.mark.parametrize("call", [lambda i, ks: rank(torch.eye(3), torch.eye(3), i, ks), chance])
def test_wrong_ks_and_no_pairs_are_refused(call: Any) -> None:
    with pytest.raises(UserError, match="k = 0"):
        call(all_different(3), (5, 0))
    with pytest.raises(UserError, match="no pairs") as caught:
        call(all_different(0), (1,))
    assert caught.value.code == ExitCode.DATA


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((2, 4), (2, 4)), ((3,), (3,))])
def test_shapes_that_do_not_belong_together_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="3 pairs"):
        rank(torch.zeros(shapes[0]), torch.zeros(shapes[1]), all_different(3), (1,))
