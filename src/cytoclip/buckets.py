"""The captions of a chunk embedded in buckets of about one length, in training on a CPU.

A text tower computes a rectangle of tokens as wide as the longest caption, and of ordinary captions half of that is
padding. Padding changes no feature: it stands behind the token that is read, or is masked. So a chunk goes through the
tower in as many narrower rectangles as pay; which pairs are a batch stays as it is.

Letters: B captions, L tokens of the longest, h width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import numpy as np
import torch
from torch import nn

from cytoclip.model import DualEncoder, layers

# Tokens that a further pass through a tower of nothing but layers must save: it reads every weight, and adds to every
# gradient, once more. 33 to 45 in float32 (docs/log.md, 2026-11-27), and bf16 units multiply four times as fast.
PASS = 160


def fill(encoder: DualEncoder, padded_by_end: bool) -> None:
    """Let `encoder` embed captions in buckets while its text tower trains, unless that reads its padding (SigLIP).

    Not for a tower that is shared out (`train.shard`): all processes must call that one equally often.

    Parameters
    ----------
    padded_by_end
        Whether the tokenizer pads with its end token, of which each caption then keeps one.
    """
    usual, tower = type(encoder).text_features, encoder.text_tower  # of the class: a copy must not ask this one
    weights, of_layers = _weights(tower), _weights(layers(tower))
    if encoder.family.pads != "longest" or not of_layers:
        return
    each = round(PASS * weights / of_layers)  # the gradient of the whole vocabulary is added to as well

    def text_features(self: DualEncoder, tokens_BL: torch.Tensor) -> torch.Tensor:
        if not self.text_tower.training:
            return usual(self, tokens_BL)
        lengths_B, order_B = _lengths(tokens_BL, self.pad, padded_by_end).sort(stable=True)
        ends = bounds(lengths_B.tolist(), each)
        if len(ends) == 1:
            return usual(self, tokens_BL)
        buckets = zip(order_B.tensor_split(ends[:-1]), ends, strict=True)
        features_Bh = torch.cat([usual(self, tokens_BL[rows, : lengths_B[end - 1]]) for rows, end in buckets])
        return features_Bh[order_B.argsort()]

    encoder.text_features = MethodType(text_features, encoder)  # type: ignore[method-assign]


def bounds(lengths: Sequence[int], each: int) -> list[int]:
    """Where the buckets of rows in ascending length end, for the fewest tokens, where a bucket more counts as `each`.

    The shortest way through the places where the length changes: of those there are fewer than a context has tokens.
    """
    wide = np.asarray(lengths)
    places = np.concatenate([[0], np.flatnonzero(np.diff(wide)) + 1, [len(wide)]])
    least, begins = np.zeros(len(places)), np.zeros(len(places), np.int64)
    for end in range(1, len(places)):
        tokens = least[:end] + (places[end] - places[:end]) * wide[places[end] - 1] + each
        begins[end] = tokens.argmin()
        least[end] = tokens[begins[end]]
    found, at = [], len(places) - 1
    while at:
        found.append(int(places[at]))
        at = int(begins[at])
    return found[::-1]


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _lengths(tokens_BL: torch.Tensor, pad: int, padded_by_end: bool) -> torch.Tensor:
    """Tokens of each row up to the last that is no padding, or to the end token that is padding's like: (B,)."""
    behind_B = (tokens_BL != pad).flip(1).int().argmax(dim=1)
    return (tokens_BL.shape[1] - behind_B + padded_by_end).clamp(max=tokens_BL.shape[1])
