"""Captions as token ids: tokenised once, cut to the context, padded batch by batch as the family of the model wants.

Letters: N captions, B captions of a batch, L tokens of a row: the longest caption's, or the whole context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.families import Family

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
    fixed
        The length of every row where the family pads to the whole context; None: the longest of a batch.
    left
        Whether rows are filled on the left.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    pad: int
    truncated: int
    fixed: int | None = None
    left: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self, indices: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Columns that each of the captions at `indices`, or of all, needs in a batch: what it may be cut to."""
        if self.fixed is not None:
            return np.full(len(self) if indices is None else len(indices), self.fixed, np.int64)
        if indices is None:
            return np.diff(self.ends, prepend=0)
        begins = np.where(indices == 0, 0, self.ends[indices - 1])
        return self.ends[indices] - begins

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """The captions at `indices`, padded: int64 (B, L).

        Padding to the longest is exact. A CLIP text tower is causal and pools at the end token, which stands before
        the padding, so what follows changes nothing (measured against padding to the full context: 5e-7); a BERT-like
        one gets a mask. SigLIP pools at the last position and attends to the padding: there, rows are always full.
        """
        rows = [self.ids[(self.ends[i - 1] if i else 0) : self.ends[i]] for i in indices]
        width = self.fixed or max(map(len, rows))
        padded_BL = torch.full((len(rows), width), self.pad, dtype=torch.int64)
        for row, ids in zip(padded_BL, rows, strict=True):
            row[width - len(ids) if self.left else 0 :][: len(ids)] = torch.from_numpy(ids)
        return padded_BL


def tokenise(tokenizer: Any, captions: Sequence[str], context: int, family: Family) -> Tokens:
    """Tokenise every caption with the checkpoint's own tokenizer, cut to `context` tokens.

    Raises
    ------
    UserError
        Where a row does not have its one end token (CLIP) or its first token (BERT) where the text tower pools, or
        holds the padding that the attention mask would hide: all of these are silent otherwise.
    """
    rows: list[list[int]] = []
    truncated = 0
    for begin in range(0, len(captions), _CHUNK):
        some = list(captions[begin : begin + _CHUNK])
        if family.lowered:
            some = [caption.lower() for caption in some]
        whole = tokenizer(some, truncation=False, verbose=False)["input_ids"]
        cut = tokenizer(some, truncation=True, max_length=context)["input_ids"]
        truncated += sum(len(ids) > context for ids in whole)
        rows += cut
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    _check_rows(rows, captions, tokenizer, pad, family)
    return Tokens(
        ids=np.concatenate([np.array(row, np.int32) for row in rows]),
        ends=np.cumsum([len(row) for row in rows]),
        pad=pad,
        truncated=truncated,
        fixed=context if family.padded == "context" else None,
        left=family.padded == "context" and tokenizer.padding_side == "left",
    )


def _check_rows(rows: list[list[int]], captions: Sequence[str], tokenizer: Any, pad: int, family: Family) -> None:
    end, first = tokenizer.eos_token_id, getattr(tokenizer, "cls_token_id", None)
    if family.pooled == "end":
        _refuse(
            [caption for caption, ids in zip(captions, rows, strict=True) if ids.count(end) != 1 or ids[-1] != end],
            "without exactly one end token, at the end",
            f"take the text {tokenizer.eos_token} out of the captions, or use a checkpoint whose tokenizer adds it",
        )
    if family.pooled == "first":
        _refuse(
            [caption for caption, ids in zip(captions, rows, strict=True) if first is None or ids[:1] != [first]],
            "without the tokenizer's cls token at the beginning, where the text tower pools",
            "use a checkpoint whose tokenizer adds it",
        )
    if family.masked:
        _refuse(
            [caption for caption, ids in zip(captions, rows, strict=True) if pad in ids],
            "with the padding token, which the text tower does not see",
            f"take the text {tokenizer.pad_token} out of the captions",
        )


def _refuse(wrong: list[str], what: str, hint: str) -> None:
    if wrong:
        raise UserError(f"{counted(len(wrong), 'caption')} {what}: {first_few(wrong)!r}", hint, ExitCode.DATA)
