"""Captions as token ids: tokenised once, cut to the context with their end token kept, padded batch by batch.

Letters: N captions, B captions of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip.errors import ExitCode, UserError, counted, first_few

_CHUNK = 10_000  # captions handed to the tokenizer at once: bounds its memory, costs nothing


@dataclass(frozen=True)
class Tokens:
    """N captions as token ids, without padding.

    Parameters
    ----------
    ids
        int32: the ids of all captions behind one another.
    ends
        int64 (N,): where each caption ends in `ids`.
    pad
        The id that fills shorter rows of a batch.
    truncated
        How many captions were longer than the context and lost their end.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    pad: int
    truncated: int

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self, indices: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of each of the captions at `indices`, or of all."""
        if indices is None:
            return np.diff(self.ends, prepend=0)
        begins = np.where(indices == 0, 0, self.ends[indices - 1])
        return self.ends[indices] - begins

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """The captions at `indices`, padded on the right to the longest of them: int64 (B, L).

        No mask is needed: a CLIP text tower is causal and pools at the end token, which stands before the padding,
        so what follows changes nothing (measured against padding to the full context: 5e-7).
        """
        rows = [self.ids[(self.ends[i - 1] if i else 0) : self.ends[i]] for i in indices]
        padded_BL = torch.full((len(rows), max(map(len, rows))), self.pad, dtype=torch.int64)
        for row, ids in zip(padded_BL, rows, strict=True):
            row[: len(ids)] = torch.from_numpy(ids)
        return padded_BL


def tokenise(tokenizer: Any, captions: Sequence[str], context: int) -> Tokens:
    """Tokenise every caption with the checkpoint's own tokenizer, cut to `context` tokens.

    Raises
    ------
    UserError
        Where a row does not end in its one end token: the text tower would pool somewhere else, silently.
    """
    end = tokenizer.eos_token_id
    rows: list[list[int]] = []
    truncated = 0
    for begin in range(0, len(captions), _CHUNK):
        some = list(captions[begin : begin + _CHUNK])
        whole = tokenizer(some, truncation=False, verbose=False)["input_ids"]
        cut = tokenizer(some, truncation=True, max_length=context)["input_ids"]
        truncated += sum(len(ids) > context for ids in whole)
        rows += cut
    wrong = [caption for caption, ids in zip(captions, rows, strict=True) if ids.count(end) != 1 or ids[-1] != end]
    if wrong:
        raise UserError(
            f"{counted(len(wrong), 'caption')} without exactly one end token, at the end: {first_few(wrong)!r}",
            f"take the text {tokenizer.eos_token} out of the captions, or use a checkpoint whose tokenizer adds it",
            ExitCode.DATA,
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    return Tokens(
        np.concatenate([np.array(r, np.int32) for r in rows]), np.cumsum([len(r) for r in rows]), pad, truncated
    )
