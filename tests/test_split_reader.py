"""The splits of a run: a part of train held out, cut through nothing that pairs share."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cytoclip import apart, report_page, soup, split_reader, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.data_options import Data, HoldOut
from cytoclip.errors import ExitCode, UserError
from cytoclip.pairs import Pairs, same_caption_key
from tests import formats
from tests.component_twin import assert_components

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]


def made(count: int, seed: int) -> Pairs:
    """Random pairs that share captions, some in two spellings and among several, sources, groups and pictures."""
    draw = random.Random(seed)
    few = count // 2

    def tag(name: str) -> tuple[str | None, ...]:
        return tuple(draw.choice([None, None, f"{name} {draw.randrange(count)}"]) for _ in range(count))

    captions = tuple(draw.choice(["cell {}", " cell  {}"]).format(draw.randrange(few)) for _ in range(count))
    more = tuple(draw.choice([(), (), (f"cell {draw.randrange(few)}",)]) for _ in range(count))
    names = tuple(f"{i}.png" for i in range(count))
    contents = tuple(f"{draw.randrange(3 * count)}" for _ in range(count))
    images = tuple(Path(f"/nowhere/{name}") for name in names)
    return Pairs(images, names, captions, tag("group"), tag("source"), (None,) * count, contents, more)


def together(pairs: Pairs, i: int, j: int) -> bool:
    said = [{same_caption_key(text) for text in (pairs.captions[k], *pairs.more[k])} for k in (i, j)]
    columns = (pairs.groups, pairs.sources, pairs.contents)
    return bool(said[0] & said[1]) or any(column[i] is not None and column[i] == column[j] for column in columns)


@pytest.mark.parametrize("seed", range(4))
def test_components_by_caption_against_a_search_from_each_pair(seed: int) -> None:
    pairs = made(50, seed)
    found = apart.components(pairs, captions=True)
    assert len(found) == len(pairs)
    assert_components(found, lambda i, j: together(pairs, i, j))
    assert len(set(found.tolist())) < len(set(apart.components(pairs).tolist()))


def test_both_halves_are_all_of_it_and_share_nothing(loose: Path) -> None:
    data = Data(root=str(loose), hold_out=HoldOut(share=0.25))
    halves = split_reader.read(data, ("train", "val", "test"), QUIET)
    assert list(halves) == ["train", "val"]
    train_, val = (pairs for _, pairs in halves.values())
    assert sorted(train_.names + val.names) == [f"{i:03}.png" for i in range(48)]
    assert 9 <= len(val) <= 15
    for name in ("captions", "groups", "sources"):
        assert not set(getattr(train_, name)) & set(getattr(val, name)) - {None}
    other = split_reader.read(Data(root=str(loose), hold_out=HoldOut(share=0.25, seed=1)), ("val",), QUIET)
    assert other["val"][1].names != val.names


@pytest.mark.parametrize("held", [HoldOut(), None])
def test_pairs_that_say_other_splits_are_warned_of(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], held: HoldOut | None
) -> None:
    shutil.copytree(loose, tmp_path, dirs_exist_ok=True)
    listed = tmp_path / "train" / "img_text_pair.json"
    entries = json.loads(listed.read_text())
    for said in ("test", "train"):
        listed.write_text(
            json.dumps([entry | {"split": "train"} for entry in entries[1:]] + [entries[0] | {"split": said}])
        )
        split_reader.read(Data(root=str(tmp_path), hold_out=held), ("train",), Console())
        warned = f"the pairs of {tmp_path / 'train'} say train, test in 'split', and all of them are trained on"
        assert (warned in capsys.readouterr().err) == (said == "test")


def test_pictures_below_a_root_of_their_own(tmp_path: Path) -> None:
    place = formats.table("csv")(tmp_path / "from", formats.drawn())
    moved = place.rename(tmp_path / "moved.csv")
    data = Data(train=str(moved), val=str(moved), image_root=str(tmp_path / "from"))
    for _, pairs in split_reader.read(data, ("train", "val"), QUIET).values():
        assert all(image.is_file() for image in pairs.images if isinstance(image, Path))


def test_the_order_of_the_list_decides_nothing(loose: Path, tmp_path: Path) -> None:
    shutil.copytree(loose, tmp_path, dirs_exist_ok=True)
    listed = tmp_path / "train" / "img_text_pair.json"
    entries = json.loads(listed.read_text())
    listed.write_text(json.dumps(entries[::-1]))
    both = [split_reader.read(Data(root=str(r), hold_out=HoldOut()), ("val",), QUIET) for r in (loose, tmp_path)]
    assert len({frozenset(found["val"][1].names) for found in both}) == 1


def test_with_few_captions_they_may_be_cut_apart(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(loose, tmp_path, dirs_exist_ok=True)
    listed = tmp_path / "train" / "img_text_pair.json"
    entries = [
        {"img": e["img"], "caption": f"a cell of kind {i % 8}"} for i, e in enumerate(json.loads(listed.read_text()))
    ]
    listed.write_text(json.dumps(entries))
    found = split_reader.read(Data(root=str(tmp_path), hold_out=HoldOut()), ("train", "val"), Console())
    assert len(found["val"][1]) == 7
    assert set(found["val"][1].captions) & set(found["train"][1].captions)
    assert "had to be on both sides of the cut" in capsys.readouterr().err


def test_a_share_that_cannot_be_cut_off(loose: Path, tmp_path: Path) -> None:
    shutil.copytree(loose, tmp_path, dirs_exist_ok=True)
    listed = tmp_path / "train" / "img_text_pair.json"
    listed.write_text(json.dumps([{**entry, "source": "one patient"} for entry in json.loads(listed.read_text())]))
    with pytest.raises(UserError, match=r"a share of 0\.15 cannot be cut off .*: its 48 pairs are 1 without") as caught:
        split_reader.read(Data(root=str(tmp_path), hold_out=HoldOut()), ("train",), QUIET)
    assert caught.value.code is ExitCode.DATA


def test_a_root_without_val_is_told_what_to_do(loose: Path, tmp_path: Path) -> None:
    data = shutil.copytree(loose, tmp_path / "my data")
    shutil.rmtree(data / "val")
    with pytest.raises(UserError, match=f"no such folder: {data / 'val'}") as caught:
        split_reader.read(Data(root=str(data)), ("train", "val", "test"), QUIET)
    assert caught.value.hint == (
        "data.hold_out.share=0.15 validates on a part of the training pairs; "
        f"`cytoclip bring '{data / 'train'}' --to …` writes train, val and test"
    )
    (data / "vall").mkdir()
    with pytest.raises(UserError, match="no such folder") as caught:
        split_reader.read(Data(root=str(data)), ("train", "val", "test"), QUIET)
    assert caught.value.hint == f"did you mean {data / 'vall'}?"


@pytest.mark.parametrize("held", [HoldOut(), None])
def test_a_root_that_is_a_split_is_told_what_to_do(loose: Path, held: HoldOut | None) -> None:
    place = loose / "train" / "img_text_pair.json"
    for root in (place, place.parent):
        with pytest.raises(UserError, match=f"no split 'train' in {root}, which holds pairs itself") as caught:
            split_reader.read(Data(root=str(root), hold_out=held), ("train", "val"), QUIET)
        assert caught.value.hint.startswith(f"data.root=null data.train={root} data.hold_out.share=0.15; or `cytoclip")


def test_a_root_with_one_table_is_told_what_to_do(tmp_path: Path) -> None:
    place = formats.table("csv")(tmp_path, formats.drawn())
    with pytest.raises(UserError, match=r"no split 'train' in .*, which holds pairs\.csv") as caught:
        split_reader.read(Data(root=str(tmp_path)), ("train", "val"), QUIET)
    assert caught.value.hint.startswith(
        f"data.root=null data.train={place} data.hold_out.share=0.15; or `cytoclip bring"
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"train": "s3://bucket/{0..9}.tar", "hold_out": {}}, "needs training pairs that are here"),
        ({"train": "somewhere"}, "nothing is there to validate on"),
    ],
)
def test_what_the_options_refuse(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Data.model_validate(given)
    Data.model_validate({"train": "somewhere", "hold_out": {}})  # no val is needed


def test_a_run_on_what_is_held_out_never_looks_at_val(experiment: Experiment, loose: Path, tmp_path: Path) -> None:
    """It ends as any run does, with a report and a soup; broken val and test pairs are not seen."""
    data = shutil.copytree(loose, tmp_path / "data")
    shutil.rmtree(data / "val")
    (data / "val").mkdir()
    (data / "test").mkdir()
    wanted = experiment(data={"root": str(data), "hold_out": {"share": 0.25}}, validate={"every": 2})
    result = training.fit(wanted, QUIET)
    held = split_reader.read(wanted.data, ("val",), QUIET)["val"][1]
    assert result.best["pairs"] == len(held)
    assert not result.test
    assert training.fit(wanted, QUIET) == result
    page = report_page.rebuild(result.run, QUIET)
    assert held.names[0] in page.read_text()  # the pairs were found again for the gallery
    made = soup.soup(result.run, soup.Asked((0.0, 1.0), None, 0.95, 16), QUIET)
    assert made.chosen.val["pairs"] == len(held)


def test_what_is_held_out_is_another_run(experiment: Experiment, loose: Path) -> None:
    training.fit(experiment(train={"steps": 2}, data={"root": str(loose), "hold_out": {"share": 0.25}}), QUIET)
    with pytest.raises(UserError, match=r"different: data\.hold_out\.share"):
        training.fit(experiment(train={"steps": 2}, data={"root": str(loose), "hold_out": {"share": 0.3}}), QUIET)


def test_a_watcher_hears_of_validations_and_may_end_the_run(experiment: Experiment) -> None:
    heard = []

    def watch(step: int, scores: Any) -> None:
        heard.append((step, scores["pairs"]))
        if len(heard) == 2:
            raise KeyError("enough")

    wanted = experiment(train={"steps": 8}, validate={"every": 2}, checkpoint={"every": 2})
    with pytest.raises(KeyError, match="enough"):
        training.fit(wanted, QUIET, watch)
    assert heard == [(2, 20), (4, 20)]
    assert training.fit(wanted, QUIET, watch).steps == 8
    assert [step for step, _ in heard[2:]] == [4, 6, 8]
