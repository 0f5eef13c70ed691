"""Embeddings come back as they were written, and are not taken for others'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cytoclip import embeddings
from cytoclip.embeddings import Owner

OWNER = Owner("the pairs", "a model", "its weights")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "embeddings" / "best.safetensors"
    rows = torch.arange(24.0).reshape(4, 6)
    embeddings.write(path, rows[:, ::2], rows.double()[:, 1::2], OWNER)  # neither need be contiguous, nor float32
    return path


def test_they_come_back(written: Path) -> None:
    image, text = embeddings.read(written)
    assert image.tolist() == [[6 * i + 2 * j for j in range(3)] for i in range(4)]
    assert text.tolist() == [[6 * i + 2 * j + 1 for j in range(3)] for i in range(4)]
    assert (image.dtype, text.dtype) == (torch.float32, torch.float32)


def test_they_are_known_by_pairs_and_weights_wherever_the_model_lies(written: Path, tmp_path: Path) -> None:
    assert embeddings.are_of(written, OWNER)
    assert embeddings.are_of(written, replace(OWNER, model="moved"))
    assert not embeddings.are_of(written, replace(OWNER, pairs="others"))
    assert not embeddings.are_of(written, replace(OWNER, weights="others"))
    assert not embeddings.are_of(tmp_path / "nowhere.safetensors", OWNER)


def test_a_damaged_file_is_nobody_s(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-1])
    assert not embeddings.are_of(written, OWNER)
    written.write_bytes(b"")
    assert not embeddings.are_of(written, OWNER)
