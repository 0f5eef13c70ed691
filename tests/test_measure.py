"""What is measured of one split: slices, and that a full measurement says the numbers of a quick one."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cytoclip import measure
from cytoclip.pairs import Pairs, identities
from cytoclip.retrieval import rank

COUNT = 40


@pytest.fixture
def pairs() -> Pairs:
    words = [" ".join(["cell"] * (1 + i % 8)) + f" {i}" for i in range(COUNT)]
    return Pairs(
        images=tuple(Path(f"{i}.png") for i in range(COUNT)),
        names=tuple(f"{i}.png" for i in range(COUNT)),
        captions=tuple(words),
        groups=tuple(f"g{i // 2}" if i < 10 else None for i in range(COUNT)),
        sources=tuple(f"slide {i // 4}" for i in range(COUNT)),
        labels=tuple("abc"[i % 3] for i in range(COUNT)),
        extra=tuple((("magnification", "10" if i % 2 else "40"), ("number", str(i))) for i in range(COUNT)),
    )


@pytest.fixture
def embedded() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    image = torch.randn(COUNT, 16)
    return image, image + torch.randn(COUNT, 16)


def test_slices_by_label_further_keys_and_length(pairs: Pairs) -> None:
    found = measure.slices(pairs)
    assert list(found) == ["label", "magnification", "caption length"]  # a number of the row makes no slices
    assert {value: int(among.sum()) for value, among in found["label"].items()} == {"a": 14, "b": 13, "c": 13}
    assert found["magnification"]["10"].tolist() == [i % 2 == 1 for i in range(COUNT)]
    assert list(found["caption length"]) == ["2–3 words", "4–5 words", "6–7 words", "8–9 words"]
    assert sum(among.sum() for among in found["caption length"].values()) == COUNT


def test_a_long_label_takes_no_room_for_every_pair(pairs: Pairs) -> None:
    long = replace(pairs, labels=("a" * 1_000_000, *pairs.labels[1:]))
    tracemalloc.start()
    found = measure.slices(long)["label"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 4
    assert peak < 10_000_000


def test_an_entrys_own_caption_length_is_not_ours(pairs: Pairs) -> None:
    extra = tuple((("caption length", "long" if i % 2 else "short"),) for i in range(COUNT))
    found = measure.slices(replace(pairs, extra=extra))
    assert list(found) == ["label", "caption length (entries)", "caption length"]
    assert list(found["caption length (entries)"]) == ["long", "short"]


def test_slices_of_one_value_or_of_one_length_are_none(pairs: Pairs) -> None:
    plain = replace(pairs, labels=("a",) * COUNT, extra=(), captions=tuple(map(str, range(COUNT))))
    assert measure.slices(plain) == {}
    two = replace(plain, captions=("a b", *["a"] * 39))
    assert {value: int(among.sum()) for value, among in measure.slices(two)["caption length"].items()} == {
        "1 word": 39,
        "2 words": 1,
    }


def test_full_says_the_numbers_of_quick_and_more(pairs: Pairs, embedded: tuple[torch.Tensor, torch.Tensor]) -> None:
    quick, full = measure.quick(*embedded, pairs, [1, 5]), measure.full(*embedded, pairs, [1, 5])
    assert {key: full.scores[key] for key in quick} == quick
    assert full.scores["clusters"] == {"by": "source", "count": 10}
    ranked = rank(*embedded, identities(pairs), [1, 5])["text_to_image"].groups["hit@5"]
    among = np.array([i % 3 == 1 for i in range(COUNT)])
    part = full.scores["slices"]["label"]["b"]
    assert part["pairs"] == 13
    assert part["text_to_image"]["hit@5_groups"] == pytest.approx(ranked[among].mean())
    assert set(part["intervals"]["text_to_image"]) == {"hit@1", "hit@5", "hit@1_groups", "hit@5_groups"}
    one = measure.full(*embedded, pairs, [1], ["image_to_text"])
    assert "text_to_image" not in one.scores
    assert "text_to_image" in full.scores


def test_difference_to_itself_is_none(pairs: Pairs, embedded: tuple[torch.Tensor, torch.Tensor]) -> None:
    full = measure.full(*embedded, pairs, [1])
    worse = measure.full(embedded[0], embedded[1].flip(0), pairs, [1])
    same, found = measure.difference(full, full), measure.difference(full, worse)
    assert all(not one["beyond_noise"] and one["by"] == 0 for part in same.values() for one in part.values())
    assert found["image_to_text"]["hit@1"]["beyond_noise"]
    assert found["image_to_text"]["hit@1"]["by"] > 0 > found["image_to_text"]["mean_rank"]["by"]
