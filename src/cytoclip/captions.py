"""Captions as token ids: tokenised once, cut to the context with their end token kept, padded batch by batch.

Letters: N captions, B captions of a batch, L tokens of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.families import FAMILIES, Family

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
    whole
        The width to which every row is padded, where it is not the longest of the batch.
    left
        Padding stands before the caption.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    pad: int
    truncated: int
    whole: int | None = None
    left: bool = False

    def __len__(self) -> int:
        return len(self.ends)

    def lengths(self, indices: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens that each row of the captions at `indices` needs, or of all: with its padding where that counts."""
        if self.whole:
            return np.full(len(self) if indices is None else len(indices), self.whole)
        if indices is None:
            return np.diff(self.ends, prepend=0)
        begins = np.where(indices == 0, 0, self.ends[indices - 1])
        return self.ends[indices] - begins

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
        """The captions at `indices`, padded to the longest of them or to the whole context: int64 (B, L).

        A CLIP text tower needs no mask: it is causal and pools at the end token, which stands before the padding, so
        what follows changes nothing (measured against padding to the full context: 5e-7). A masked one knows the
        padding by its id. SigLIP sees its padding, as it did in training.
        """
        rows = [self.ids[(self.ends[i - 1] if i else 0) : self.ends[i]] for i in indices]
        padded_BL = torch.full((len(rows), self.whole or max(map(len, rows))), self.pad, dtype=torch.int64)
        for row, ids in zip(padded_BL, rows, strict=True):
            place = slice(len(row) - len(ids), None) if self.left else slice(len(ids))
            row[place] = torch.from_numpy(ids)
        return padded_BL


def tokenise(tokenizer: Any, captions: Sequence[str], context: int, family: Family = FAMILIES["clip"]) -> Tokens:
    """Tokenise every caption with the checkpoint's own tokenizer, cut to `context` tokens.

    Raises
    ------
    UserError
        Where a row is not what the family's text tower pools from: its feature would silently be another token's.
    """
    rows: list[list[int]] = []
    truncated = 0
    for begin in range(0, len(captions), _CHUNK):
        some = [caption.lower() if family.lower else caption for caption in captions[begin : begin + _CHUNK]]
        whole = tokenizer(some, truncation=False, verbose=False)["input_ids"]
        cut = tokenizer(some, truncation=True, max_length=context)["input_ids"]
        truncated += sum(len(ids) > context for ids in whole)
        rows += cut
    pad = pad_of(tokenizer)
    _refuse_unreadable(tokenizer, captions, rows, pad, family)
    return Tokens(
        np.concatenate([np.array(r, np.int32) for r in rows]),
        np.cumsum([len(r) for r in rows]),
        pad,
        truncated,
        whole=context if family.pads == "context" else None,
        left=family.pads == "context" and tokenizer.padding_side == "left",
    )


def pad_of(tokenizer: Any) -> int:
    """The id that captions are padded with: the end token's where padding has none of its own."""
    known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
    return next(known, 0)


def _refuse_unreadable(
    tokenizer: Any, captions: Sequence[str], rows: list[list[int]], pad: int, family: Family
) -> None:
    def wrong(fits: Callable[[list[int]], bool]) -> list[str]:
        return [caption for caption, ids in zip(captions, rows, strict=True) if not fits(ids)]

    if family.pools == "end":
        end = tokenizer.eos_token_id
        found = wrong(lambda ids: ids.count(end) == 1 and ids[-1] == end)
        what = "without exactly one end token, at the end", f"{tokenizer.eos_token} out of the captions"
    elif family.pools == "first":
        first = tokenizer.cls_token_id
        found = wrong(lambda ids: bool(ids) and (first is None or ids[0] == first) and pad not in ids)
        what = "without its first token, or with padding in it", f"{tokenizer.pad_token} out of the captions"
    else:
        found, what = wrong(bool), ("without any token", "entries out whose captions say nothing")
    if found:
        raise UserError(
            f"{counted(len(found), 'caption')} {what[0]}: {first_few(found)!r}",
            f"take the text {what[1]}, or use a checkpoint whose tokenizer adds it"
            if family.pools != "last"
            else f"take the {what[1]}",
            ExitCode.DATA,
        )
