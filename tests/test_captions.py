"""A caption becomes the tokens that the checkpoint's own tokenizer makes, and always ends in its one end token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cytoclip import captions as module
from cytoclip import checkpoint
from cytoclip.captions import tokenise
from cytoclip.errors import ExitCode, UserError
from tests import tiny

LONG = "a cell with a round nucleus " * 40
CAPTIONS = ["a superficial squamous cell", "cell", LONG, "细胞 é …", "  two   spaces "]
CONTEXT = 77


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize("context", [77, 16, 3])
def test_every_row_ends_in_its_one_end_token(tokenizer: Any, context: int) -> None:
    """Trap 14: a row cut by hand loses the end token, and the text tower pools somewhere else."""
    tokens = tokenise(tokenizer, CAPTIONS, context)
    rows = np.split(tokens.ids, tokens.ends[:-1])
    assert len(rows) == len(tokens) == 5
    for row in rows:
        assert (row == tokenizer.eos_token_id).sum() == 1
        assert row[-1] == tokenizer.eos_token_id
        assert row[0] == tokenizer.bos_token_id
        assert len(row) <= context
    assert len(rows[2]) == context


def test_truncated_captions_are_counted(tokenizer: Any) -> None:
    assert tokenise(tokenizer, CAPTIONS, CONTEXT).truncated == 1
    assert tokenise(tokenizer, ["cell"], CONTEXT).truncated == 0


def test_a_caption_that_fits_exactly_is_not_truncated(tokenizer: Any) -> None:
    length = len(tokenizer("a superficial squamous cell")["input_ids"])
    assert tokenise(tokenizer, ["a superficial squamous cell"], length).truncated == 0
    assert tokenise(tokenizer, ["a superficial squamous cell"], length - 1).truncated == 1


def test_a_batch_is_what_the_tokenizer_pads(tokenizer: Any) -> None:
    tokens = tokenise(tokenizer, CAPTIONS, CONTEXT)
    for indices in ([0, 1, 2, 3, 4], [1], [4, 0, 3], [2, 2], [0]):
        expected = tokenizer(
            [CAPTIONS[i] for i in indices], padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt"
        )["input_ids"]
        found = tokens.batch(indices)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)


def test_a_batch_is_padded_to_its_own_longest_caption(tokenizer: Any) -> None:
    """Padding to the context would cost ten times the arithmetic for short captions."""
    tokens = tokenise(tokenizer, CAPTIONS, CONTEXT)
    assert tokens.batch([0, 1]).shape == (2, tokens.lengths()[0])
    assert tokens.batch([1]).shape == (1, tokens.lengths()[1])
    assert tokens.batch([1, 2]).shape == (2, CONTEXT)
    assert set(tokens.batch([1, 2])[0, tokens.lengths()[1] :].tolist()) == {tokens.pad}
    assert tokens.pad == tokenizer.pad_token_id


def test_a_batch_takes_numpy_indices(tokenizer: Any) -> None:
    tokens = tokenise(tokenizer, CAPTIONS, CONTEXT)
    assert torch.equal(tokens.batch(np.array([3, 0])), tokens.batch([3, 0]))


def test_lengths(tokenizer: Any) -> None:
    tokens = tokenise(tokenizer, CAPTIONS, CONTEXT)
    expected = [min(len(ids), CONTEXT) for ids in tokenizer(CAPTIONS)["input_ids"]]
    assert tokens.lengths().tolist() == expected
    assert tokens.lengths().sum() == len(tokens.ids)
    some = np.array([1, 0, 1])
    assert tokens.lengths(some).tolist() == [expected[1], expected[0], expected[1]]


def test_captions_are_tokenised_the_same_in_chunks(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenise(tokenizer, CAPTIONS, CONTEXT)
    monkeypatch.setattr(module, "_CHUNK", 2)
    chunked = tokenise(tokenizer, CAPTIONS, CONTEXT)
    assert np.array_equal(chunked.ids, whole.ids)
    assert np.array_equal(chunked.ends, whole.ends)
    assert chunked.truncated == whole.truncated == 1


def test_a_caption_that_holds_the_end_token_is_refused_by_name(tokenizer: Any) -> None:
    """The text tower would pool at the first one and never see the rest."""
    end = tokenizer.eos_token
    with pytest.raises(UserError, match="1 caption without exactly one end token") as caught:
        tokenise(tokenizer, ["a cell", f"a {end} cell\nand more"], CONTEXT)
    assert caught.value.code is ExitCode.DATA
    assert f"a {end} cell" in caught.value.message
    assert f"take the text {end} out" in caught.value.hint
    assert caught.value.lines().count("\n") == 1


def test_a_tokenizer_that_adds_no_end_token_is_refused(tokenizer: Any) -> None:
    """As converted checkpoints do; every caption would be pooled at position 0."""

    class Endless:
        eos_token, eos_token_id, pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id

        def __call__(self, some: list[str], **how: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [ids[:-1] for ids in tokenizer(some, **how)["input_ids"]]}

    with pytest.raises(UserError, match="5 captions") as caught:
        tokenise(Endless(), CAPTIONS, CONTEXT)
    assert "and 2 more" in caught.value.message


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(tokenizer: Any) -> None:
    class Padless:
        eos_token, eos_token_id, pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id, None

        def __call__(self, some: list[str], **how: Any) -> Any:
            return tokenizer(some, **how)

    assert tokenise(Padless(), CAPTIONS, CONTEXT).pad == tokenizer.eos_token_id


def test_a_tokenizer_with_text_behind_its_end_token_is_refused(tokenizer: Any) -> None:
    """One end token is not enough: what stands behind it is never seen by a causal tower that pools there."""

    class Trailing:
        eos_token, eos_token_id, pad_token_id = tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id

        def __call__(self, some: list[str], **how: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*ids, 5] for ids in tokenizer(some, **how)["input_ids"]]}

    with pytest.raises(UserError, match="1 caption without"):
        tokenise(Trailing(), ["a cell"], CONTEXT)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_tokenizer_that_pads_on_the_left_is_followed(kind: str, bases: dict[str, Path]) -> None:
    """Trap 36: SigLIP sees its padding, so it must stand where it stood."""
    opened = checkpoint.open_model(str(bases[kind]))
    opened.tokenizer.padding_side = "left"
    low = [caption.lower() for caption in tiny.CAPTIONS]
    expected = opened.tokenizer(
        low, padding="max_length", truncation=True, max_length=opened.context, return_tensors="pt"
    )["input_ids"]
    found = tokenise(opened.tokenizer, tiny.CAPTIONS, opened.context, opened.encoder.family)
    assert found.batch(range(4)).equal(expected)
