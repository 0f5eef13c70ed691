"""A file or folder that a user is left with is whole, whatever cut the writing short."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from cytoclip import files
from cytoclip.errors import ExitCode, UserError

BUSY = UserError("in use", "wait", ExitCode.RUN)


class Cut(BaseException):
    """The process dies here: nothing catches it, as nothing catches a power cut."""


def cut(*_: object) -> NoReturn:
    raise Cut


def full(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_and_raise(path: Path, error: BaseException) -> NoReturn:
    with files.whole_folder(path) as new:
        (new / "weights").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_makes_parents_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "cell 细胞\n")
    files.write_text(path, "nucleus\n")
    assert path.read_bytes() == b"nucleus\n"
    assert names(path.parent) == ["note.txt"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = tmp_path / "results.json"
    files.write_text(path, "old")
    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), cut)
    with pytest.raises(Cut):
        files.write_text(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_text(path, "new")  # what the crash left is no obstacle
    assert path.read_text() == "new"
    assert names(tmp_path) == ["results.json"]


def test_the_file_is_on_the_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before the bytes leaves an empty file after a power cut."""
    path, order = tmp_path / "note.txt", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda one, other: (order.append("rename"), replace(one, other))[1])
    files.write_text(path, "text")
    assert order == ["fsync", "rename", "fsync"]  # the bytes, the new name, the folder that holds the name


def test_json_round_trip_is_readable_and_utf8(tmp_path: Path) -> None:
    value = {"name": "细胞", "hits": [0.1, 1], "none": None}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "细胞" in text
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 3


def test_what_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"a": object()})
    assert files.read_json(tmp_path / "x.json") == [1]


def test_whole_folder_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model"
    for content in ("one", "two"):
        with files.whole_folder(path) as new:
            assert new != path
            (new / "inner").mkdir()
            (new / "inner" / content).write_text(content)
    assert names(path / "inner") == ["two"]
    assert names(path.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), Cut()])
def test_an_error_inside_whole_folder_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model"
    with files.whole_folder(path) as new:
        (new / "weights").write_text("old")
    with pytest.raises(type(error)):
        fill_and_raise(path, error)
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_an_error_inside_the_first_whole_folder_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), files.whole_folder(tmp_path / "model"):
        raise ValueError("bug")
    assert names(tmp_path) == []


def test_recover_brings_back_the_old_folder_after_a_cut_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    with files.whole_folder(path) as new:
        (new / "weights").write_text("old")
    rename = Path.rename

    def second_is_cut(one: Path, other: Path) -> Path:
        return cut() if other == path else rename(one, other)

    monkeypatch.setattr(Path, "rename", second_is_cut)
    with pytest.raises(Cut), files.whole_folder(path) as new:
        (new / "weights").write_text("new")
    monkeypatch.undo()
    assert not path.exists()  # the moment that recover() is for
    files.recover(path)
    assert (path / "weights").read_text() == "old"
    files.recover(path)  # harmless when there is nothing to do
    assert (path / "weights").read_text() == "old"
    with files.whole_folder(path) as new:
        (new / "weights").write_text("newest")
    assert (path / "weights").read_text() == "newest"
    assert names(tmp_path) == ["model"]


def test_recover_keeps_the_new_folder_where_the_cut_came_after_both_renames(tmp_path: Path) -> None:
    path, old = tmp_path / "model", tmp_path / ".model.old"
    path.mkdir()
    old.mkdir()
    (path / "weights").write_text("new")
    files.recover(path)
    assert names(tmp_path) == ["model"]
    assert (path / "weights").read_text() == "new"


def test_remove_leaves_nothing_under_the_name_if_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is half deleted must not be taken for a checkpoint."""
    path = tmp_path / "step-5"
    path.mkdir()
    monkeypatch.setattr(files.shutil, "rmtree", lambda _, ignore_errors=False: None if ignore_errors else cut())
    with pytest.raises(Cut):
        files.remove(path)
    assert not path.exists()
    monkeypatch.undo()
    path.mkdir()
    files.remove(path)  # also takes away what the cut one left
    assert names(tmp_path) == []


def test_remove_empty_stops_at_the_first_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    files.remove_empty(tmp_path / "a" / "b" / "c")
    assert names(tmp_path) == ["kept"]
    files.remove_empty(tmp_path / "never" / "there")
    files.remove_empty(tmp_path)
    assert names(tmp_path) == ["kept"]


def test_a_lock_is_busy_for_another_process_and_free_after_its_death(tmp_path: Path) -> None:
    """Killed, not ended: nothing of ours runs, so only the system can free it."""
    path = tmp_path / "run" / ".lock"
    script = (
        "import sys; from pathlib import Path; from cytoclip import files; from cytoclip.errors import UserError\n"
        "with files.lock(Path(sys.argv[1]), UserError('m', 'h')):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use") as caught, files.lock(path, BUSY):
            pytest.fail("two processes hold the lock")
        assert caught.value is BUSY
        other.kill()
        assert other.wait(10) == -signal.SIGKILL
    entered = False
    with files.lock(path, BUSY):
        entered = True
    assert entered


def test_a_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bug"), files.lock(tmp_path / ".lock", BUSY):
        raise ValueError("bug")
    with files.lock(tmp_path / ".lock", BUSY), pytest.raises(UserError, match="in use"):  # and held once more
        files.lock(tmp_path / ".lock", BUSY).__enter__()


def test_a_lock_below_a_file_is_a_message(tmp_path: Path) -> None:
    """`output: notes.txt/run` is the user's to mend, and the lock is the first thing that a run writes."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="cannot write") as caught, files.lock(tmp_path / "notes.txt" / "lock", BUSY):
        pytest.fail("entered")
    assert caught.value.code is ExitCode.SYSTEM


def test_a_full_disk_is_a_message_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    files.write_text(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*results\.json") as caught:
        files.write_text(path, "new")
    assert caught.value.code is ExitCode.SYSTEM
    assert path.read_text() == "old"


def test_a_full_disk_inside_a_library_is_a_message_too(tmp_path: Path) -> None:
    """safetensors raises its own error type and hides the number of the system's error in its text."""
    path = tmp_path / "model"
    path.mkdir()
    error = RuntimeError('Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }')
    with pytest.raises(UserError, match="no space left") as caught:
        fill_and_raise(path, error)
    assert caught.value.code is ExitCode.SYSTEM
    assert names(tmp_path) == ["model"]
    assert names(path) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_is_not_ours_is_a_message(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError, match=r"cannot write .*run: ") as caught, files.disk_errors(tmp_path / "run"):
        raise OSError(number, os.strerror(number))
    assert os.strerror(number) in caught.value.message
    assert caught.value.code is ExitCode.SYSTEM


def test_a_file_where_a_folder_must_be_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        files.write_text(tmp_path / "taken" / "results.json", "new")
    assert (tmp_path / "taken").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "I/O error"), BUSY])
def test_other_errors_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, files.disk_errors(tmp_path):
        raise error
    assert caught.value is error


def test_free_bytes_asks_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: (asked.append(path), usage(path))[1])
    assert files.free_bytes(tmp_path / "not" / "there" / "yet") > 0
    monkeypatch.chdir(tmp_path)
    files.free_bytes(Path("runs/one"))  # relative, as in a YAML
    assert asked == [tmp_path, tmp_path]


def test_read_json_refuses_what_is_cut(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(json.JSONDecodeError):
        files.read_json(tmp_path / "x.json")


def test_a_whole_file_stands_at_its_path_or_does_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.bin"

    def cut() -> None:
        with files.whole_file(path) as stream:
            stream.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        cut()
    assert list(path.parent.iterdir()) == []
    with files.whole_file(path) as stream:
        stream.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert [file.name for file in path.parent.iterdir()] == ["table.bin"]


def test_a_cache_lies_beside_its_data_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    assert files.cache_folder(tmp_path / "data") == tmp_path / "data" / files.CACHE
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    elsewhere = {files.cache_folder(tmp_path / name) for name in ("data", "other")}
    assert len(elsewhere) == 2
    assert {folder.parent for folder in elsewhere} == {tmp_path / "home" / "cytoclip"}


def test_a_cache_at_home_is_found_however_its_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.chdir(tmp_path / "data")
    names = [Path(), tmp_path / "data", Path("../data"), tmp_path / "link"]
    assert len({files.cache_folder(name) for name in names}) == 1
