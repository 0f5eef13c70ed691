"""What a split looks like on the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cytoclip import evidence, exhibits, record
from cytoclip.console import Console
from cytoclip.exhibits import Split
from cytoclip.thumbnails import Thumbnails


@pytest.fixture(scope="module")
def split(told: Path) -> Split:
    read = record.read(told)
    best = read.embedded("val", "best")
    assert best is not None
    return Split(record.pairs(read, "val", best, Console(quiet=True)), read.embedded("val", "before"), best)


def test_both_directions_with_pictures_and_ranks_before(split: Split) -> None:
    forward, backward = exhibits.galleries(split, Thumbnails(10**7))
    assert (forward.title, backward.title) == ("image → text", "text → image")
    assert forward.looked_at == "of all 20 queries"
    assert {kind for kind, _ in forward.kinds} <= set(evidence.KINDS)
    for gallery, pictured in ((forward, False), (backward, True)):
        for _, cases in gallery.kinds:
            for case in cases:
                row = split.pairs.names.index(case.query.name)
                assert case.query.caption == split.pairs.captions[row]
                assert case.query.picture
                assert case.before
                assert len(case.top) == 5
                assert all(bool(one.picture) == pictured for one in case.top)


def test_without_the_start_there_is_no_before(split: Split) -> None:
    alone = replace(split, before=None)
    assert not any(case.before for g in exhibits.galleries(alone, Thumbnails(0)) for _, k in g.kinds for case in k)
    assert len(exhibits.similarity_charts(alone)) == 1
    assert len(exhibits.maps(alone, private=False)[0]) == 1


def test_maps_are_coloured_by_label_or_source(split: Split) -> None:
    drawn, by = exhibits.maps(split, private=True)
    assert by == "label"
    assert set(drawn[1].key) <= {*split.pairs.labels, "others"}
    pairs = replace(split.pairs, labels=(None,) * 20, sources=tuple(f"patient {i % 3}" for i in range(20)))
    drawn, by = exhibits.maps(replace(split, pairs=pairs), private=False)
    assert (by, set(drawn[0].key)) == ("source", {"patient 0", "patient 1", "patient 2"})
    drawn, _ = exhibits.maps(replace(split, pairs=pairs), private=True)
    assert set(drawn[0].key) == {"number 1", "number 2", "number 3"}
    pairs = replace(pairs, sources=(None,) * 20, groups=(None,) * 20)
    drawn, by = exhibits.maps(replace(split, pairs=pairs), private=False)
    assert (by, drawn[0].key) == ("", ("pairs",))


def test_many_values_become_seven_and_others() -> None:
    values = [f"v{i % 12}" for i in range(60)]
    placed = evidence.Map(np.arange(60), np.ones((60, 2)), np.ones((60, 2)), 0.5, 1.0)
    series = exhibits._series(placed, values, private=False)
    assert len({one.name for one in series}) == 8
    assert sum(len(one.xy) for one in series) == 120
    assert sum(len(one.xy) for one in series if one.name == "others") == 50


def test_long_captions_are_cut(split: Split) -> None:
    pairs = replace(split.pairs, captions=tuple("word " * 400 + str(i) for i in range(20)))
    (forward, _) = exhibits.galleries(replace(split, pairs=pairs), Thumbnails(0))
    lengths = {len(one.caption) for _, cases in forward.kinds for case in cases for one in (case.query, *case.top)}
    assert lengths == {exhibits.LONGEST}
