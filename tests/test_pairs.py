"""Who is right for whom: by caption, picture and group, and nothing else."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cytoclip.pairs import Identity, Pairs, fingerprint, identities, joined, right_answers, same_caption_key, spread


def make_pairs(captions: list[str], **columns: tuple[Any, ...]) -> Pairs:
    count = len(captions)
    names = tuple(f"{i}.png" for i in range(count))
    images = tuple(Path("/data/imgs") / name for name in names)
    missing = (None,) * count
    pairs = Pairs(images, names, tuple(captions), groups=missing, sources=missing, labels=missing)
    return replace(pairs, **columns)


def brute_right(pairs: Pairs, i: int, j: int) -> bool:
    if i == j or pairs.contents[i] == pairs.contents[j] or pairs.captions[i].split() == pairs.captions[j].split():
        return True
    return pairs.groups[i] is not None and pairs.groups[i] == pairs.groups[j]


def random_pairs(seed: int, count: int) -> Pairs:
    draw = np.random.default_rng(seed)
    return make_pairs(
        [f"cell {'  '[: 1 + i % 2]}{i}" for i in draw.integers(0, count // 2, count)],
        contents=tuple(f"sha{i}" for i in draw.integers(0, count // 2, count)),
        groups=tuple(None if i == 0 else f"g{i}" for i in draw.integers(0, 4, count)),
        sources=("slide 1",) * count,
        labels=("HSIL",) * count,
    )


@pytest.mark.parametrize("seed", range(5))
def test_right_answers_equals_brute_force(seed: int) -> None:
    pairs = random_pairs(seed, 12)
    identity = identities(pairs)
    expected = [[brute_right(pairs, i, j) for j in range(12)] for i in range(12)]
    assert right_answers(identity, identity).tolist() == expected
    assert 12 < np.sum(expected) < 144


def test_source_and_label_are_never_right_answers() -> None:
    pairs = make_pairs(["a", "b"], sources=("patient 1",) * 2, labels=("NILM",) * 2)
    identity = identities(pairs)
    assert right_answers(identity, identity).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("missing", [None, ""])
def test_missing_groups_join_nobody(missing: str | None) -> None:
    identity = identities(make_pairs(["a", "b", "c"], groups=(missing, missing, "g")))
    assert identity.group.tolist() == [-1, -1, 0]
    assert right_answers(identity, identity).tolist() == np.eye(3, dtype=bool).tolist()


def test_relation_is_symmetric_reflexive_and_not_closed() -> None:
    pairs = make_pairs(["same", "same", "other", "third"], contents=("x", "y", "y", "z"), groups=(None, None, "g", "g"))
    identity = identities(pairs)
    right = right_answers(identity, identity)
    assert right.tolist() == right.T.tolist()
    assert right.diagonal().all()
    assert right[0, 1]
    assert right[1, 2]
    assert right[2, 3]
    assert not right[0, 2]
    assert not right[1, 3]
    assert not right[0, 3]


def test_tensors_give_what_arrays_give_also_for_parts() -> None:
    identity = identities(random_pairs(0, 12))
    tensors = identity.map(torch.from_numpy)
    rows = np.array([7, 0, 7])
    by_tensor = right_answers(tensors.take(torch.from_numpy(rows)), tensors.take(slice(2, 9)))
    assert isinstance(by_tensor, torch.Tensor)
    assert by_tensor.dtype == torch.bool
    assert by_tensor.shape == (3, 7)
    whole = right_answers(identity, identity)
    assert by_tensor.tolist() == whole[rows][:, 2:9].tolist()
    assert by_tensor.tolist() == right_answers(identity.take(rows), identity.take(slice(2, 9))).tolist()


def test_identities_number_by_first_occurrence() -> None:
    pairs = make_pairs(["b", "a", "b ", "c"], contents=("q", "q", "p", "q"), groups=("z", None, "y", "z"))
    identity = identities(pairs)
    assert identity.caption.tolist() == [0, 1, 0, 2]
    assert identity.image.tolist() == [0, 0, 1, 0]
    assert identity.group.tolist() == [0, -1, 1, 0]
    assert {column.dtype for column in (identity.caption, identity.image, identity.group)} == {np.dtype(np.int64)}
    assert len(identity) == len(pairs) == 4


def test_no_pairs_at_all() -> None:
    identity = identities(make_pairs([]))
    assert len(identity) == 0
    assert identity.caption.dtype == np.int64
    assert right_answers(identity, identity).shape == (0, 0)


SAME = [
    ("two  nuclei\n\tin a  row ", "two nuclei in a row"),
    ("well-de\ufb01ned border", "well-defined border"),  # the fi ligature of a PDF
    ("5\u00a0\u00b5m", "5 \u03bcm"),  # no-break space; micro sign and Greek mu
    ("caf\u00e9", "cafe\u0301"),  # composed and decomposed
    ("\uff28\uff30\uff36\uff0c positive", "HPV, positive"),  # full width
]
DIFFERENT = [("TP53 mutated", "Tp53 mutated"), ("HSIL", "LSIL"), ("nuclei.", "nuclei"), ("in situ", "insitu")]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_captions_that_are_the_same(one: str, other: str) -> None:
    assert one != other
    assert same_caption_key(one) == same_caption_key(other) == same_caption_key(same_caption_key(one))
    assert identities(make_pairs([one, other])).caption.tolist() == [0, 0]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_captions_that_are_not(one: str, other: str) -> None:
    assert same_caption_key(one) != same_caption_key(other)


def test_contents_are_names_until_the_images_are_scanned() -> None:
    pairs = make_pairs(["a", "b"])
    assert pairs.contents == ("0.png", "1.png")
    scanned = replace(pairs, contents=("f00", "f00"))
    assert identities(scanned).image.tolist() == [0, 0]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        make_pairs(["a", "b"], groups=("g",))


def test_identity_of_every_small_combination() -> None:
    """All 3-pair worlds of two captions, two pictures and two groups or none: 8 × 8 × 27."""
    worlds = 0
    for caption, image, group in itertools.product(
        itertools.product((0, 1), repeat=3),
        itertools.product((0, 1), repeat=3),
        itertools.product((-1, 0, 1), repeat=3),
    ):
        identity = Identity(np.array(caption), np.array(image), np.array(group))
        for i, j in itertools.product(range(3), repeat=2):
            expected = caption[i] == caption[j] or image[i] == image[j] or (group[i] == group[j] >= 0)
            assert right_answers(identity, identity)[i, j] == expected
        worlds += 1
    assert worlds == 1728


def test_import_is_light() -> None:
    code = "import sys, cytoclip.pairs; print([m for m in ('torch', 'pydantic', 'transformers') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_joined_sets_stand_behind_one_another_and_their_groups_stay_apart() -> None:
    """Two data sets both number their groups from 1; that says nothing about their pictures."""
    one = make_pairs(["a", "b"], contents=("x", "y"), groups=("1", None), sources=("slide", None))
    two = make_pairs(["c", "a"], contents=("z", "u"), groups=("1", "1"), sources=("slide", "slide"))
    both = joined([one, two])
    assert both.captions == ("a", "b", "c", "a")
    assert both.groups == ("1", None, "1/1", "1/1")
    assert both.sources == ("slide", None, "1/slide", "1/slide")
    assert joined([one]) == one
    right = right_answers(identities(both), identities(both))
    assert not right[0, 2]
    assert right[2, 3]
    assert right[0, 3], "a caption is the same wherever it stands"


def test_spread_makes_each_caption_a_pair_of_the_same_picture() -> None:
    pairs = Pairs(
        (Path("a"), Path("b")), ("a", "b"), ("one", "two"), (None, "g"), ("s", "t"), (None, None),
        more=(("uno", "un"), ()),
    )  # fmt: skip
    every = spread(pairs)
    assert every.captions == ("one", "uno", "un", "two")
    assert every.names == ("a", "a", "a", "b")
    assert every.groups == (None, None, None, "g")
    assert every.more == ((),) * 4
    identity = identities(every)
    assert right_answers(identity, identity).tolist() == [[i // 3 == j // 3 for j in range(4)] for i in range(4)]


def test_further_captions_make_another_fingerprint() -> None:
    one = Pairs((Path("a"),), ("a",), ("one",), (None,), (None,), (None,))
    assert fingerprint(one) != fingerprint(replace(one, more=(("two",),)))
