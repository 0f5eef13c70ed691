"""What is wrong with a caption, seen from its characters and its tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import ftfy
import numpy as np
from ftfy.badness import is_bad
from numpy.typing import NDArray

from cytoclip.families import FAMILIES, Family
from cytoclip.pairs import same_caption_key

_TAG = re.compile(
    r"</?(?:a|abbr|b|big|blockquote|body|br|center|code|dd|div|dl|dt|em|font|h[1-6]|head|hr|html|i|img|li|ol|p|pre|script"
    r"|small|span|strong|style|sub|sup|table|tbody|td|th|thead|tr|u|ul)(?:\s[^<>]{0,500})?\s{0,5}/?>|<!--",
    re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|amp|lt|gt|quot|apos|nbsp|[a-z]{3,8}\d{0,2});", re.IGNORECASE)
READ_BY = "; ".join(
    (
        f"Chinese is read by {FAMILIES['chinese_clip'].title} ({FAMILIES['chinese_clip'].such_as})",
        "many scripts by SigLIP2 (google/siglip2-base-patch16-224)",
        f"any by {FAMILIES['vision-text-dual-encoder'].title} with a text model of its own",
    )
)
_NO_VALUES = frozenset(
    ("nan", "na", "n/a", "n.a.", "#n/a", "<na>", "none", "null", "nil", "nat")
)  # of pandas, R, SQL …
_LONGEST = 100_000  # characters of a caption that are looked at
# Tokens a letter from which a vocabulary is called unable to read a script. English takes 0.2 to 0.3. A byte-level
# vocabulary that never met a script spends a token on nearly each of the 2 to 4 bytes of a letter; one that knows
# Chinese takes at most 1.
_SPELT_OUT = 1.2
_FOREIGN = 0.5  # share of letters that are not Latin
_UNKNOWN = 0.1  # or this share of tokens that stand for what is not in the vocabulary


def is_empty(caption: str) -> bool:
    """Whether it has no letter and no digit: blank, zero-width characters, or a dash in place of a text."""
    return not any(character.isalnum() for character in caption[:_LONGEST])


def is_no_value(caption: str) -> bool:
    """Whether it is how a program writes that a value is missing: `nan`, `N/A`, `None`."""
    return len(caption) < _LONGEST and same_caption_key(caption).casefold() in _NO_VALUES


def is_one_word(caption: str) -> bool:
    """One word is hardly a caption; in a script that is written without spaces, three characters are."""
    text = same_caption_key(caption[:_LONGEST])
    return (
        not is_empty(text)
        and not is_no_value(text)
        and " " not in text
        and (len(text) <= 3 or not _without_spaces(text))
    )


def is_mojibake(caption: str) -> bool:
    """Text that was read in another encoding than it was written in, and that ftfy can put right."""
    text = caption[:_LONGEST]
    return not text.isascii() and ("\ufffd" in text or (is_bad(text) and ftfy.fix_encoding(text) != text))


def has_html(caption: str) -> bool:
    text = caption[:_LONGEST]
    return bool(("<" in text and _TAG.search(text)) or ("&" in text and _ENTITY.search(text)))


def foreign_share(caption: str) -> float:
    """The share of its letters that are not Latin; Greek ones don't count where they stand alone, as in β-catenin."""
    letters = [c for c in caption[:_LONGEST] if c.isalpha()]
    if not letters or caption.isascii():
        return 0.0
    greek_words = re.findall(r"[\u0370-\u03ff]{3,}", caption)
    plain_greek = not greek_words
    foreign = [c for c in letters if ord(c) > 0x24F and not (plain_greek and "\u0370" <= c <= "\u03ff") and _letter(c)]
    return len(foreign) / len(letters)


def token_counts(tokenizer: Any, captions: Sequence[str], family: Family) -> NDArray[np.int64]:
    """Tokens of each caption with its special ones, before anything is cut: int64 (N,)."""
    different = list(dict.fromkeys(captions))
    counts: dict[str, int] = {}
    for begin in range(0, len(different), 10_000):
        some = different[begin : begin + 10_000]
        rows = tokenizer([_as_read(one, family) for one in some], truncation=False, verbose=False)["input_ids"]
        counts |= zip(some, map(len, rows), strict=True)
    return np.array([counts[caption] for caption in captions], np.int64)


def unread_among(tokenizer: Any, captions: Sequence[str], family: Family) -> set[str]:
    """Those in a script that the tokenizer does not know: only mostly foreign ones are asked about."""
    foreign = [text for text in dict.fromkeys(captions) if foreign_share(text) > _FOREIGN]
    return {text for text, bad in zip(foreign, unread(tokenizer, foreign, family), strict=True) if bad}


def unread(tokenizer: Any, captions: Sequence[str], family: Family) -> list[bool]:
    """Whether the tokenizer spells a caption out byte by byte, or has its token for the unknown in its place."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # CLIP's: its byte-level vocabulary has no need of one
    special = set(tokenizer.all_special_ids) - {unknown}
    found = []
    for caption in captions:
        ids = tokenizer(_as_read(caption, family), truncation=False, verbose=False)["input_ids"]
        words = [one for one in ids if one not in special]
        letters = sum(not character.isspace() for character in caption[:_LONGEST])
        strange = sum(one == unknown for one in words)
        found.append(len(words) > _SPELT_OUT * letters or strange > _UNKNOWN * max(len(words), 1))
    return found


def _as_read(caption: str, family: Family) -> str:
    return caption[:_LONGEST].lower() if family.lower else caption[:_LONGEST]


def _letter(character: str) -> bool:
    return not unicodedata.name(character, "").startswith(("LATIN", "MICRO", "MODIFIER", "DOUBLE-STRUCK", "SCRIPT"))


def _without_spaces(text: str) -> bool:
    """Chinese, Japanese, Thai, Lao, Khmer, Burmese."""
    return any("\u0e00" <= c <= "\u0eff" or "\u1000" <= c <= "\u109f" or "\u1780" <= c <= "\u17ff"
               or "\u3040" <= c <= "\u9fff" or c > "\U0001ffff" for c in text)  # fmt: skip
