"""Embeddings of a split on disk, with what says whose they are.

A safetensors file with `image` and `text`, float32 (N, D) of length 1 in the order of `pairs.spread`, and as metadata
the fingerprint of the pairs, the name of the model, and the digest of its weights.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cytoclip import files

IMAGE, TEXT = "image", "text"


@dataclass(frozen=True)
class Owner:
    """Whose embeddings they are: `pairs.fingerprint` of the pairs, the model's name, a digest of its weights."""

    pairs: str
    model: str
    weights: str


def write(path: Path, image_ND: torch.Tensor, text_ND: torch.Tensor, owned_by: Owner) -> None:
    """The whole file, or the one that was there."""
    tensors = {
        name: rows_ND.detach().float().cpu().contiguous() for name, rows_ND in ((IMAGE, image_ND), (TEXT, text_ND))
    }
    files.write_bytes(path, save(tensors, metadata=dict(vars(owned_by))))


def owner(path: Path) -> Owner | None:
    """Whose the file says they are; None where it is not there, is damaged or does not say."""
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            there = set(file.keys())
    except (OSError, SafetensorError):
        return None
    whole = there == {IMAGE, TEXT} and said.keys() >= {"pairs", "model", "weights"}
    return Owner(said["pairs"], said["model"], said["weights"]) if whole else None


def are_of(path: Path, expected: Owner) -> bool:
    """Whether the file holds these pairs by these weights, wherever the model lies by now."""
    found = owner(path)
    return found is not None and (found.pairs, found.weights) == (expected.pairs, expected.weights)


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(image, text), on the CPU."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(IMAGE), file.get_tensor(TEXT)
