"""What the characters and tokens of a caption give away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cytoclip import identifiers, texts
from cytoclip.families import FAMILIES

PLAIN = [
    "A basophil in a peripheral blood smear: big round cell, low nuclear-cytoplasmic ratio.",
    "HSIL, p16-positive, Ki-67 20-30 %, n = 2019 cells of 12 patients (p < 0.05 and x > 5)",
    "H&E stain, ×400; scale bar 10 µm; α-SMA and β-catenin; 5′-end; naïve T cells; Papanicolaou’s",
    "Fig. 3-12: case 12, slide 7, CD34+ blasts at 1:200, pH 7.4, 37 °C",
    "巨核细胞胞质内可见空泡",
]
SAYS = {
    texts.is_empty: ["", " \n", "—", "…", "\u200b\ufeff", "?!"],
    texts.is_no_value: ["nan", "NaN", " NA", "N/A", "None", "null\n", "<NA>"],
    texts.is_one_word: ["Koilocyte.", "cell", "HSIL", "细胞"],
    texts.is_mojibake: ["naÃ¯ve", "8 Âµm wide", "the cellâ€™s nucleus", "a cell\ufffds nucleus", "MÃ¼ller cells"],
    texts.has_html: [
        "a <b>b</b>",
        "a<br/>b",
        "H&amp;E",
        "5&nbsp;&micro;m",
        "&#181;",
        "<!-- x -->",
        '<a href="x">y</a>',
    ],
}
PERSONAL = {
    "date": [
        "taken 2019-03-12",
        "12.03.2019",
        "3/12/2019",
        "on 12 March 2019",
        "March 12, 2019",
        "2019:03:12 10:00:00",
    ],
    "record number": ["MRN 4711001", "case no. 88123", "patient_id=123456", "S19-12345", "123-45-6789"],
    "name": ["DOE^JANE", "Mrs. Jane Doe", "patient's name: Doe", "Dr Müller"],
    "address": ["jane@clinic.org", "see https://pacs.clinic.org/1"],
}


@pytest.mark.parametrize("says", SAYS, ids=lambda says: says.__name__)
def test_a_caption_of_each_kind_is_told_from_plain_ones(says: object) -> None:
    assert callable(says)
    assert [text for text in SAYS[says] if not says(text)] == []
    assert [text for text in PLAIN if says(text)] == []


def test_a_missing_value_is_no_caption_of_one_word() -> None:
    assert not any(texts.is_one_word(text) for text in SAYS[texts.is_no_value])
    assert not any(texts.is_no_value(text) for text in ("None of the cells has a nucleus", "NAN cells", "nano", "-"))


@pytest.mark.parametrize("kind", list(identifiers.FORMS))
def test_identifiers_of_each_kind_are_found_and_masked(kind: str) -> None:
    assert set(PERSONAL) == set(identifiers.FORMS)
    for text in PERSONAL[kind]:
        assert kind in identifiers.found(text), text
        masked = identifiers.masked(text)
        assert f"[{kind}]" in masked
        assert not identifiers.found(masked)
    assert [text for text in PLAIN if identifiers.found(text)] == []


@pytest.mark.parametrize(
    "text", ["<p " * 40_000, "&a" * 60_000, "<" * 99_999, "Ã" * 99_999, "â€" * 50_000, "1" * 99_999, "a^" * 50_000,
             "x@" * 50_000, "1." * 50_000, "jan 1" * 20_000, "patient " * 12_000, " " * 99_999, "Dr " * 30_000]
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    began = time.perf_counter()
    for says in SAYS:
        says(text)
    texts.foreign_share(text)
    identifiers.found(text)
    identifiers.masked(text)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("text", "share"),
    [("plain", 0), ("naïve Schütz", 0), ("β-catenin", 0), ("细胞", 1), ("клетка", 1), ("κύτταρο", 1), ("细胞ab", 0.5)],
)
def test_the_share_of_letters_that_are_not_latin(text: str, share: float) -> None:
    assert texts.foreign_share(text) == share


def test_who_reads_chinese(bases: dict[str, Path]) -> None:
    """An English byte-level vocabulary spells it out; a WordPiece one has [UNK] for letters it lacks."""
    chinese, english = "巨核细胞胞质内可见空泡", "two cells with a round nucleus"
    for name, expected in (("clip", True), ("chinese_clip", True), ("siglip", True)):
        tokenizer = AutoTokenizer.from_pretrained(bases[name])
        found = texts.unread(tokenizer, [chinese, english], FAMILIES[name])
        assert found == [expected, False], name
    reads = AutoTokenizer.from_pretrained(bases["chinese_clip"])
    reads.add_tokens(list(chinese))
    assert texts.unread(reads, [chinese], FAMILIES["chinese_clip"]) == [False]
    assert "OFA-Sys/chinese-clip" in texts.READ_BY


def test_tokens_are_those_of_the_tokenizer_one_by_one(bases: dict[str, Path]) -> None:
    captions = ["Two cells", "a cell", "Two cells", "a very long story " * 40]
    for name in ("clip", "siglip2"):
        family = FAMILIES["siglip" if name == "siglip2" else name]
        tokenizer = AutoTokenizer.from_pretrained(bases[name])
        slow = [len(tokenizer(c.lower() if family.lower else c)["input_ids"]) for c in captions]
        assert texts.token_counts(tokenizer, captions, family).tolist() == slow
        assert slow[3] > 77
