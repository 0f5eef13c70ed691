"""A manifest comes back as it was written, and one from elsewhere is read only where it says what one can say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cytoclip import manifest
from cytoclip.errors import ExitCode, UserError
from cytoclip.manifest import Manifest, Model, Shard, Side

MADE = Manifest(
    model=Model("a model", "w", "d", "no"),
    width=16,
    pictures=5,
    captions=2,
    skipped=1,
    roots=["/data"],
    shards=[Shard("00000.parquet", 3), Shard("00002.parquet", 2)],
    numbers=3,
    images=Side(5, "ivf", {"lists": 4, "probes": 2}, {"images": 0.98}),
    texts=Side(2),
    faiss="0123abcd",
    created="2026-11-26T00:00:00+00:00",
    versions={"cytoclip": "0.1.0"},
)


def test_it_comes_back_and_is_plain_json(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    assert manifest.read(tmp_path / "nowhere") is None
    manifest.write(tmp_path, MADE)
    assert manifest.read(tmp_path) == MADE
    said = json.loads((tmp_path / "manifest.json").read_text())
    assert said == manifest.document(MADE)
    assert said["schema"] == 1
    assert said["images"]["parameters"] == {"lists": 4, "probes": 2}


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(said: Any) -> None:
        for key in keys[:-1]:
            said = said[key]
        said[keys[-1]] = to

    return change


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another schema": (_set("schema", to=2), "schema 2"),
    "a key that is not known": (_set("more", to=1), "more"),
    "a key less": (lambda said: said.pop("roots"), "roots"),
    "a text for a number": (_set("width", to="16"), "width"),
    "no dimensions": (_set("width", to=0), "0 dimensions"),
    "a shard elsewhere": (_set("shards", 0, "name", to="../../00000.parquet"), "name is not a number"),
    "an absolute shard": (_set("shards", 0, "name", to="/etc/passwd"), "name is not a number"),
    "a shard twice": (_set("shards", 1, "name", to="00000.parquet"), "named twice"),
    "other rows": (_set("shards", 1, "rows", to=3), "shards of 6 rows"),
    "rows below zero": (lambda said: (_set("shards", 0, "rows", to=-1)(said), _set("shards", 1, "rows", to=6)(said)),
                        "shards of 5 rows"),
    "other vectors": (_set("images", "vectors", to=7), "5 pictures"),
    "a faiss folder elsewhere": (_set("faiss", to="../x"), "faiss folder"),
    "the faiss folder above": (_set("faiss", to=".."), "faiss folder"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_one_that_says_what_none_can_say_is_refused(how: str, tmp_path: Path) -> None:
    change, expected = SPOILT[how]
    said = manifest.document(MADE)
    change(said)
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=expected) as caught:
        manifest.read(tmp_path)
    assert caught.value.code is ExitCode.DATA
    assert "cytoclip index" in caught.value.hint


def test_one_that_is_no_json_or_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    for written in (b"", b"[" * 100_000, b"\xff\xfe", b"[]", b'{"width": 1e999}'):
        path.write_bytes(written)
        with pytest.raises(UserError, match="no index that can be used"):
            manifest.read(tmp_path)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match="no regular file"):
        manifest.read(tmp_path)
    path.unlink()
    manifest.write(tmp_path, MADE)
    monkeypatch.setattr(manifest, "_MAX", 100)
    with pytest.raises(UserError, match="at most 100 bytes"):
        manifest.read(tmp_path)
