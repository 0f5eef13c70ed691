"""A split comes out whole, in order, and each different picture and caption once, whatever the batch size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip import batches, checkpoint, encode, evaluation, images
from cytoclip.checkpoint import Opened
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.pairs import Pairs
from cytoclip.pixels import prepare

QUIET = Console(quiet=True)
ALONE = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def opened(base: Path) -> Opened:
    return checkpoint.open_model(str(base))


@pytest.fixture(scope="module")
def train(root: Path) -> Pairs:
    return batches.open_split(root / "train", QUIET)


def first(pairs: Pairs, count: int) -> Pairs:
    return Pairs(**{name: column[:count] for name, column in vars(pairs).items()})


def embedded(opened: Opened, pairs: Pairs, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return encode.encode(opened.encoder, pairs, evaluation.reading(opened, pairs, batch_size, 0), ALONE, QUIET)


@torch.no_grad()
def one_by_one(opened: Opened, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin: each pair on its own, without batches, sorting or sharing."""
    opened.encoder.eval()
    tokens = evaluation.reading(opened, pairs, 1, 0).tokens
    pictures, texts = [], []
    for i in range(len(pairs)):
        pixels = torch.from_numpy(prepare(images.decode(pairs.images[i]), opened.pixels))
        pictures.append(opened.encoder.images(pixels[None]))
        texts.append(opened.encoder.texts(tokens.batch([i])))
    return torch.cat(pictures), torch.cat(texts)


@pytest.mark.parametrize("count", [14, 15, 16, 20])
def test_ragged_batches_are_whole_and_in_order(count: int, opened: Opened, train: Pairs) -> None:
    """Trap 6: N = k·batch + r for r = 0, 1, 2 and batch - 1; the rounding of another batch is all that may differ."""
    pairs = first(train, count)
    expected = one_by_one(opened, pairs)
    for found, reference in zip(embedded(opened, pairs, 7), expected, strict=True):
        assert found.shape == (count, opened.encoder.width)
        assert found.dtype == torch.float32
        assert torch.allclose(found, reference, atol=2e-6)
    off_by_one = expected[1].roll(1, dims=0)
    assert not torch.allclose(expected[1], off_by_one, atol=1e-3), "the twin could not see a wrong order"


@pytest.mark.parametrize("batch_size", [1, 64])
def test_one_pair_is_a_split(batch_size: int, opened: Opened, train: Pairs) -> None:
    pairs = first(train, 1)
    for found, reference in zip(embedded(opened, pairs, batch_size), one_by_one(opened, pairs), strict=True):
        assert found.shape == (1, opened.encoder.width)
        assert torch.allclose(found, reference, atol=2e-6)


def test_equal_pictures_and_captions_are_encoded_once_and_equal_to_the_last_bit(
    opened: Opened, train: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in batches of another shape differ in the last bits, and a tie would become a ranking (trap 47)."""
    some = first(train, 6)
    twice = Pairs(**{name: (*column, *column[::-1]) for name, column in vars(some).items()})
    twice = replace(twice, captions=("one caption",) * 5 + twice.captions[5:])
    counted = {"images": 0, "texts": 0}
    for name in counted:
        whole = getattr(opened.encoder, name)

        def counting(rows: torch.Tensor, name: str = name, whole: object = whole) -> torch.Tensor:
            counted[name] += len(rows)
            return whole(rows)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(opened.encoder, name, counting)
    image_ND, text_ND = embedded(opened, twice, 4)
    assert counted == {"images": len(set(twice.contents)), "texts": len(set(twice.captions))}
    assert counted == {"images": 6, "texts": 7}
    assert torch.equal(image_ND, image_ND.flip(0))
    assert torch.equal(text_ND[:5], text_ND[:1].expand(5, -1))
    assert len(torch.unique(image_ND, dim=0)) == 6


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back_and_dropout_is_off(training: bool, opened: Opened, train: Pairs) -> None:
    """Validation in the middle of training must neither use dropout nor switch it off for what follows."""
    pairs = first(train, 5)
    expected = embedded(opened, pairs, 5)
    for layer in opened.encoder.clip.text_model.encoder.layers:
        layer.self_attn.dropout = 0.5
    opened.encoder.train(training)
    found = embedded(opened, pairs, 5)
    assert opened.encoder.training is training
    assert opened.encoder.clip.vision_model.training is training
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    with torch.no_grad():
        opened.encoder.train()
        tokens = evaluation.reading(opened, pairs, 5, 0).tokens.batch(range(5))
        assert not torch.equal(opened.encoder.texts(tokens), opened.encoder.texts(tokens)), "there was no dropout"
    for layer in opened.encoder.clip.text_model.encoder.layers:
        layer.self_attn.dropout = 0.0
    opened.encoder.eval()


def test_embeddings_carry_no_graph(opened: Opened, train: Pairs) -> None:
    assert not any(rows.requires_grad for rows in embedded(opened, first(train, 3), 2))


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (8, 2), (7, 3), (2, 4), (1, 2)])
def test_every_process_embeds_as_many_rows_and_all_are_there(count: int, processes: int) -> None:
    """A sharded tower is gathered in each forward pass: with fewer of them, one would keep the others waiting."""
    rows = np.arange(10, 10 + count)
    shares = [encode._share(rows, World(torch.device("cpu"), rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert np.concatenate(shares)[:count].tolist() == rows.tolist()
    assert sum(len(share) for share in shares) < count + processes


def test_after_a_validation_a_frozen_tower_still_has_no_dropout(base: Path, train: Pairs) -> None:
    """Traps 33 and 41."""
    encoder = checkpoint.open_model(str(base)).encoder
    encoder.text_tower.requires_grad_(False)
    encoder.train()
    embedded(replace(checkpoint.open_model(str(base)), encoder=encoder), train, 20)
    assert encoder.training
    assert encoder.image_tower.training
    assert not encoder.text_tower.training


def test_no_more_than_a_batch_is_embedded_at_once(
    opened: Opened, train: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 23."""
    seen: dict[str, list[int]] = {"images": [], "texts": []}
    for name, lengths in seen.items():
        whole = getattr(opened.encoder, name)

        def counting(rows: torch.Tensor, whole: Any = whole, lengths: list[int] = lengths) -> torch.Tensor:
            lengths.append(len(rows))
            found: torch.Tensor = whole(rows)
            return found

        monkeypatch.setattr(opened.encoder, name, counting)
    embedded(opened, train, 7)
    assert sum(seen["images"]) == 48
    assert sum(seen["texts"]) == len(set(train.captions))
    assert all(max(lengths) == 7 for lengths in seen.values())
