"""Every list that is not a list of pairs is refused by name, before any picture is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cytoclip import sources
from cytoclip.errors import ExitCode, UserError

GOOD = {"img": "a.png", "caption": "a cell"}


def write(folder: Path, entries: Any, raw: str | bytes | None = None) -> Path:
    """A split whose list holds `entries`, or exactly `raw`."""
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries) if raw is None else raw
    (folder / "img_text_pair.json").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def refused(folder: Path) -> tuple[str, str]:
    with pytest.raises(UserError) as caught:
        sources.read(folder)
    assert caught.value.code is ExitCode.DATA
    assert caught.value.lines().count("\n") == 1
    assert caught.value.hint
    return caught.value.message, caught.value.hint


def test_pairs_in_the_order_of_the_list(tmp_path: Path) -> None:
    entries = [{"img": f"{i}.png", "caption": f"cell {i}"} for i in (3, 1, 2, 1)]
    pairs = sources.read(write(tmp_path, entries))
    assert pairs.names == ("3.png", "1.png", "2.png", "1.png")
    assert pairs.captions == ("cell 3", "cell 1", "cell 2", "cell 1")
    assert pairs.images == tuple(tmp_path.resolve() / "imgs" / name for name in pairs.names)
    assert pairs.groups == pairs.sources == pairs.labels == (None,) * 4


def test_tags_are_text_and_other_keys_are_allowed(tmp_path: Path) -> None:
    entry = GOOD | {"group": 7, "source": "slide 1", "label": 0, "stain": ["Pap"], "id": 1.5}
    pairs = sources.read(write(tmp_path, [entry, GOOD | {"group": None, "label": "HSIL"}, GOOD]))
    assert pairs.groups == ("7", None, None)
    assert pairs.sources == ("slide 1", None, None)
    assert pairs.labels == ("0", "HSIL", None)


def test_several_captions_are_the_first_and_more(tmp_path: Path) -> None:
    pairs = sources.read(write(tmp_path, [GOOD | {"caption": ["one", "two", "three"]}, GOOD]))
    assert pairs.captions == ("one", "a cell")
    assert pairs.more == (("two", "three"), ())


def test_nested_names_and_names_with_dots_are_allowed(tmp_path: Path) -> None:
    names = ("slide 1/x/a.png", "./b.png", "..c..png", "细胞.png", "a b.png")
    pairs = sources.read(write(tmp_path, [{"img": name, "caption": "c"} for name in names]))
    assert pairs.names == names
    assert pairs.images[0] == tmp_path.resolve() / "imgs" / "slide 1" / "x" / "a.png"


def test_captions_are_kept_to_the_letter(tmp_path: Path) -> None:
    captions = ["  two  spaces\n", "细胞 é", "<end>", "\U0001f52c"]
    pairs = sources.read(write(tmp_path, [{"img": "a.png", "caption": caption} for caption in captions]))
    assert list(pairs.captions) == captions


def test_a_byte_order_mark_is_allowed(tmp_path: Path) -> None:
    """Windows editors write one."""
    assert sources.read(write(tmp_path, None, raw=b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).names == ("a.png",)


def test_no_picture_is_opened(tmp_path: Path) -> None:
    """Missing pictures are a matter of policy for what comes later."""
    assert not sources.read(write(tmp_path, [GOOD])).images[0].exists()


def test_a_missing_folder_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "vla").write_text("a file is not a folder")
    message, hint = refused(tmp_path / "trian")
    assert message == f"no such folder: {tmp_path / 'trian'}"
    assert hint == f"did you mean {tmp_path / 'train'}?"
    for nothing_near in (tmp_path / "zzz", tmp_path / "no" / "such"):
        assert "a split is a folder with `imgs/`" in refused(nothing_near)[1]


def test_a_missing_list_names_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "imgs").mkdir()
    message, hint = refused(tmp_path)
    assert message == f"no img_text_pair.json in {tmp_path}"
    assert "a split is a folder" in hint
    (tmp_path / "pairs.json").write_text("[]")
    assert refused(tmp_path)[1] == "found pairs.json; rename it"


def test_a_list_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [GOOD])
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).endswith("img_text_pair.json"))
    message, hint = refused(tmp_path)
    assert message == f"{tmp_path / 'img_text_pair.json'} cannot be read: permission denied"
    assert hint == "make it readable for this user"


def test_a_missing_imgs_folder(tmp_path: Path) -> None:
    write(tmp_path, [GOOD])
    (tmp_path / "imgs").rmdir()
    assert refused(tmp_path)[0] == f"no imgs folder in {tmp_path}"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('[{"img": "a.png", ', "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),  # a recursion error inside json
        (b'["\xff"]', "is not JSON"),
        ("[9" + "9" * 5000 + "]", "is not JSON"),  # Python refuses to read such a number
        ("{}", "holds an object, not a list"),
        ('"text"', "holds a text, not a list"),
        ("null", "holds null, not a list"),
        ("3", "holds a number, not a list"),
        ("[]", "is an empty list"),
    ],
)
def test_what_is_not_a_list_is_refused(tmp_path: Path, raw: str | bytes, said: str) -> None:
    message, _ = refused(write(tmp_path, None, raw=raw))
    assert said in message
    assert str(tmp_path / "img_text_pair.json") in message


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a.png", "a text, not an object"),
        (["a.png", "a cell"], "a list, not an object"),
        (None, "null, not an object"),
        (3, "a number, not an object"),
        ({}, "no 'img'"),
        ({"image": "a.png", "caption": "c"}, "no 'img' (it has 'image')"),
        ({"img": "a.png", "captions": "c"}, "no 'caption' (it has 'captions')"),
        ({"img": "a.png", "text": "c"}, "no 'caption'"),
        ({"img": "a.png", "caption": 3}, "its caption is a number, not a text"),
        ({"img": "a.png", "caption": None}, "its caption is null, not a text"),
        ({"img": "a.png", "caption": []}, "its caption is an empty list"),
        ({"img": "a.png", "caption": ["c", 3]}, "its caption is a number, not a text"),
        ({"img": "a.png", "caption": ["c", " "]}, "its caption is empty"),
        ({"img": "a.png", "caption": True}, "its caption is true or false, not a text"),
        ({"img": "a.png", "caption": ""}, "its caption is empty"),
        ({"img": "a.png", "caption": " \n\t"}, "its caption is empty"),
        ({"img": 3, "caption": "c"}, "its img is a number, not a text"),
        ({"img": "", "caption": "c"}, "its img is empty"),
        ({"img": "/etc/hostname", "caption": "c"}, "'/etc/hostname' leaves imgs/"),
        ({"img": "../a.png", "caption": "c"}, "'../a.png' leaves imgs/"),
        ({"img": "x/../../a.png", "caption": "c"}, "'x/../../a.png' leaves imgs/"),
        ({"img": "a\0.png", "caption": "c"}, "leaves imgs/"),
        ({"img": "\ud800.png", "caption": "c"}, "its img holds half a character"),
        ({"img": "a.png", "caption": "c \udfff"}, "its caption holds half a character"),
        (GOOD | {"group": 1.5}, "its group is a number, not a text or whole number"),
        (GOOD | {"group": True}, "its group is true or false, not a text or whole number"),
        (GOOD | {"source": ["s"]}, "its source is a list, not a text or whole number"),
        (GOOD | {"label": {}}, "its label is an object, not a text or whole number"),
    ],
)
def test_an_entry_that_is_not_a_pair_is_refused_by_number(tmp_path: Path, entry: Any, said: str) -> None:
    message, hint = refused(write(tmp_path, [GOOD, entry]))
    assert message.startswith("1 of 2 entries of ")
    assert f"entry 1: {said}" in message or (said.startswith("leaves") and said in message)
    assert "count from 0" in hint


def test_many_faults_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    message, _ = refused(write(tmp_path, [GOOD, *[{"img": "a.png"}] * 100, GOOD]))
    assert message.startswith(f"100 of 102 entries of {tmp_path / 'img_text_pair.json'} are not pairs: entry 1: ")
    assert message.endswith("entry 3: no 'caption' and 97 more")
    assert "entry 4" not in message


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_that_leads_out_is_refused(tmp_path: Path, link: str) -> None:
    """A data set from elsewhere must not make us read, and embed in a page, a file of the user's."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.png").write_text("private")
    folder = write(tmp_path / "train", [GOOD | {"img": "x/a.png" if link == "folder" else "x"}, GOOD])
    (folder / "imgs" / "x").symlink_to(outside if link == "folder" else outside / "a.png")
    message, hint = refused(folder)
    assert f"1 link below {folder / 'imgs'} leading out of it: x" in message
    assert hint == "copy the pictures into imgs/"


def test_a_sibling_whose_name_begins_the_same_is_outside(tmp_path: Path) -> None:
    """Falls if the folders are compared as text: `imgs-private` begins with `imgs`."""
    folder = write(tmp_path, [GOOD])
    (folder / "imgs-private").mkdir()
    (folder / "imgs" / "a.png").symlink_to(folder / "imgs-private" / "a.png")
    assert "leading out of it" in refused(folder)[0]


def test_links_inside_and_a_linked_imgs_folder_are_allowed(tmp_path: Path) -> None:
    """Large sets live on another disk; what the user linked is the user's choice."""
    store = tmp_path / "store"
    store.mkdir()
    (store / "a.png").write_text("x")
    (store / "b.png").symlink_to("a.png")
    folder = tmp_path / "train"
    write(folder, [GOOD, GOOD | {"img": "b.png"}])
    (folder / "imgs").rmdir()
    (folder / "imgs").symlink_to(store)
    assert sources.read(folder).images == (store.resolve() / "a.png", store.resolve() / "b.png")


def test_a_link_to_itself_is_left_to_the_reader_of_pictures(tmp_path: Path) -> None:
    """`Path.resolve` raises a RuntimeError for it, which would be a traceback."""
    folder = write(tmp_path, [GOOD])
    (folder / "imgs" / "a.png").symlink_to("a.png")
    assert sources.read(folder).names == ("a.png",)
