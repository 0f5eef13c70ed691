"""Captions in buckets against one rectangle of tokens: features, every gradient in float64, and what is computed."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cytoclip import adapters, buckets, captions, checkpoint, training
from cytoclip.checkpoint import Opened
from cytoclip.config import Config, Model
from cytoclip.console import Console
from cytoclip.model import DualEncoder

SENTENCE = ("a", "round", "cell", "on", "the", "left", "two", "nucleus", "small")
WORDS = (3, 9, 2, 9, 5, 3, 1)  # of each caption
PADDED = {"clip": True, "siglip": False, "siglip2": False, "chinese_clip": True, "two towers": True}


def opened(folder: Path) -> Opened:
    """In training, in float64, no weight at 0 or 1, and nothing that drops out."""
    found = checkpoint.open_model(str(folder))
    torch.manual_seed(0)
    for module in found.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for parameter in found.encoder.double().train().parameters():
        parameter.requires_grad_().data += torch.randn_like(parameter) * 0.05
    return found


def words(found: Opened) -> torch.Tensor:
    said = [" ".join(SENTENCE[:count]) for count in WORDS]
    read = captions.tokenise(found.tokenizer, said, found.context, found.encoder.family)
    return read.batch(range(len(said)))


def by_end(found: Opened) -> bool:
    return bool(found.tokenizer.pad_token_id == found.tokenizer.eos_token_id)


def computed(encoder: DualEncoder, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The embeddings, and the gradient of each weight that they have one for."""
    encoder.zero_grad()
    texts = encoder.texts(tokens)
    (texts * torch.linspace(-1, 1, texts.numel(), dtype=torch.float64).view(texts.shape)).sum().backward()
    return {"": texts.detach()} | {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def watched(encoder: DualEncoder) -> list[tuple[int, ...]]:
    """The shape of each rectangle that its text tower reads from now on."""
    shapes: list[tuple[int, ...]] = []
    encoder.text_tower.register_forward_pre_hook(
        lambda _, __, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def assert_same(found: Opened, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rectangles that the text tower was given."""
    monkeypatch.setattr(buckets, "PASS", 0)
    plain, filled = found.encoder, copy.deepcopy(found.encoder)
    buckets.fill(filled, by_end(found))
    expected, shapes = computed(plain, tokens), watched(filled)
    result = computed(filled, tokens)
    assert result.keys() == expected.keys()
    assert len(result) > 10
    for name, one in expected.items():
        assert torch.allclose(result[name], one, rtol=1e-10, atol=1e-12), name
    with torch.no_grad():
        assert torch.equal(filled.eval().texts(tokens), plain.eval().texts(tokens)), "outside training as it was"
    return shapes[:-1]


def test_every_family_has_a_case(bases: dict[str, Path]) -> None:
    assert bases.keys() == PADDED.keys()


@pytest.mark.parametrize("kind", PADDED)
def test_features_and_gradients_are_those_of_one_rectangle(
    kind: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(bases[kind])
    tokens = words(found)
    shapes = assert_same(found, tokens, monkeypatch)
    assert sum(rows for rows, _ in shapes) == len(WORDS)
    assert len(shapes) == (len(set(WORDS)) if PADDED[kind] else 1)


@pytest.mark.parametrize("pad", ["end", "other"])
def test_a_caption_keeps_its_end_token(pad: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's tokenizer pads with the end token itself; and what pads may be a word of the caption, too."""
    found = opened(base)
    tokenizer, tokens = found.tokenizer, words(found)
    end = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token if pad == "end" else tokenizer.convert_ids_to_tokens(int(tokens[1, 2]))
    found.encoder.pad = tokenizer.pad_token_id
    lengths = (tokens == end).int().argmax(dim=1) + 1
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length:] = found.encoder.pad
    assert by_end(found) == (pad == "end")
    shapes = assert_same(found, tokens, monkeypatch)
    assert {width for _, width in shapes} == set(lengths.tolist())


def test_with_adapters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(base)
    adapters.set_moving(found.encoder, Model.model_validate({"text_tower": "lora", "projections": "full"}))
    found.encoder.double().train()
    assert assert_same(found, words(found), monkeypatch)


def test_a_copy_asks_its_own_tower(base: Path) -> None:
    found = opened(base)
    buckets.fill(found.encoder, by_end(found))
    tokens, same = words(found).repeat(40, 1), copy.deepcopy(found.encoder)
    expected = found.encoder.texts(tokens)
    with torch.no_grad():
        for parameter in found.encoder.text_tower.parameters():
            parameter.zero_()
    assert torch.equal(same.texts(tokens), expected)
    assert torch.allclose(same.eval().texts(tokens), expected, rtol=1e-10, atol=1e-12)


def test_few_captions_are_one_rectangle(base: Path) -> None:
    found = opened(base)
    buckets.fill(found.encoder, by_end(found))
    tokens, shapes = words(found), watched(found.encoder)
    found.encoder.texts(tokens)
    found.encoder.texts(tokens.repeat(40, 1))
    assert shapes[0] == tokens.shape
    assert len(shapes) > 2


@pytest.mark.parametrize("each", [0, 1, 4, 64])
def test_buckets_are_the_best_of_all(each: int) -> None:
    random = np.random.default_rng(each)
    for _ in range(30):
        lengths = sorted(random.integers(3, 20, random.integers(1, 9)).tolist())

        def tokens(ends: tuple[int, ...]) -> int:
            begins = (0, *ends[:-1])
            return sum((end - begin) * lengths[end - 1] + each for begin, end in zip(begins, ends, strict=True))  # noqa: B023

        inner = range(1, len(lengths))
        every = [(*cut, len(lengths)) for n in range(len(lengths)) for cut in itertools.combinations(inner, n)]
        assert tokens(tuple(buckets.bounds(lengths, each))) == min(map(tokens, every))


@pytest.mark.parametrize("shard", [False, True])
def test_a_run_has_them_unless_its_towers_are_shared_out(
    shard: bool, experiment: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[Any] = []
    monkeypatch.setattr(buckets, "fill", lambda *given: filled.append(given))
    training.fit(experiment(train={"shard": shard}), Console(quiet=True))
    assert len(filled) == (not shard)


@pytest.mark.parametrize("pad", ["its own", "end", "none"])
def test_a_run_in_buckets_keeps_the_end_of_captions(
    pad: str, experiment: Callable[..., Config], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 14: OpenAI's tokenizer pads with the end token; cut off with the padding, token 0 would be pooled."""
    folder, tokenizer = shutil.copytree(base, tmp_path / "base"), AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = {"its own": tokenizer.pad_token, "end": tokenizer.eos_token, "none": None}[pad]
    tokenizer.save_pretrained(folder)
    assert (checkpoint.open_model(str(folder)).encoder.pad == tokenizer.eos_token_id) is (pad != "its own")
    found = []
    for each in (0, 10**9):
        monkeypatch.setattr(buckets, "PASS", each)
        wanted = experiment(model={"name": str(folder)}, output=str(tmp_path / str(each)))
        training.fit(wanted, Console(quiet=True))
        lines = (tmp_path / str(each) / "losses.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
