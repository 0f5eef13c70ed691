"""Kept pictures are the decoded ones to the last bit, or not there: whoever dies, writes too, or breaks them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from cytoclip import decoded
from cytoclip.decoded import Decoded, Table
from cytoclip.errors import ExitCode, UserError

SHAPE = (3, 5, 4)
ROW = 60
KEYS = [decoded.key_of(f"content {i}") for i in range(12)]
FORK = multiprocessing.get_context("fork")


def picture(row: int) -> NDArray[np.uint8]:
    return np.random.default_rng([row, 7]).integers(0, 256, SHAPE, np.uint8)


def read(table: Table, row: int) -> NDArray[np.uint8] | None:
    held = np.empty(SHAPE, np.uint8)
    return held if table.read(row, held) else None


def made(folder: Path, rows: int = 12) -> Table:
    """A table of which the first `rows` rows are filled."""
    table, _ = decoded.opened(folder, SHAPE, KEYS)
    for row in range(rows):
        table.write(row, picture(row))
    return table


def again(folder: Path) -> Table:
    return decoded.opened(folder, SHAPE, KEYS)[0]


def test_what_is_written_is_read_and_nothing_else_is_there(tmp_path: Path) -> None:
    table = made(tmp_path, 5)
    for seen in (table, again(tmp_path), pickle.loads(pickle.dumps(table))):  # noqa: S301 - our own
        assert seen.filled().tolist() == [True] * 5 + [False] * 7
        assert all(np.array_equal(read(seen, row), picture(row)) for row in range(5))
        assert all(read(seen, row) is None for row in range(5, 12))
    assert (tmp_path / "pixels").stat().st_size == 12 * ROW
    assert json.loads((tmp_path / "about.json").read_text()) == {"shape": [3, 5, 4], "settings": ""}
    assert len(table) == 12


def test_a_row_that_another_process_fills_is_seen(tmp_path: Path) -> None:
    one, other = made(tmp_path, 0), again(tmp_path)
    assert read(one, 3) is None
    other.write(3, picture(3))
    assert np.array_equal(read(one, 3), picture(3))


def test_pictures_are_added_behind_those_there(tmp_path: Path) -> None:
    """Another order of the data, and more of them: what is decoded stays."""
    made(tmp_path)
    more = [decoded.key_of("new"), *reversed(KEYS), decoded.key_of("new"), decoded.key_of("newer")]
    table, rows = decoded.opened(tmp_path, SHAPE, more)
    assert rows.tolist() == [12, *reversed(range(12)), 12, 13]
    assert table.filled().tolist() == [True] * 12 + [False] * 2
    assert np.array_equal(read(table, 4), picture(4))


def test_a_process_that_opened_a_table_before_it_grew_goes_on(tmp_path: Path) -> None:
    before = made(tmp_path, 3)
    decoded.opened(tmp_path, SHAPE, [decoded.key_of("new")])[0].write(12, picture(12))
    before.write(5, picture(5))
    assert before.filled().sum() == 4
    assert np.array_equal(read(again(tmp_path), 5), picture(5))


@pytest.mark.parametrize("harm", ["pixel", "zeros", "short", "mark", "other picture"])
def test_a_damaged_row_is_noticed_written_anew_and_counted(harm: str, tmp_path: Path) -> None:
    """Zeros are what a power cut leaves of pixels whose mark reached the disk."""
    made(tmp_path)
    pixels, marks = tmp_path / "pixels", tmp_path / "marks"
    whole = bytearray(pixels.read_bytes())
    if harm == "pixel":
        whole[7 * ROW + 11] ^= 1
    elif harm == "zeros":
        whole[7 * ROW : 8 * ROW] = bytes(ROW)
    elif harm == "other picture":  # a row of the table itself, with a mark that is right for it
        whole[7 * ROW : 8 * ROW] = whole[6 * ROW : 7 * ROW]
        written = bytearray(marks.read_bytes())
        written[56:64] = written[48:56]
        marks.write_bytes(written)
    elif harm == "mark":
        written = bytearray(marks.read_bytes())
        written[56] ^= 1
        marks.write_bytes(written)
    pixels.write_bytes(whole[: 7 * ROW + 3] if harm == "short" else whole)
    table, broken = again(tmp_path), range(7, 12) if harm == "short" else [7]
    assert [row for row in range(12) if read(table, row) is None] == list(broken)
    for row in broken:
        table.write(row, picture(row))
    assert table.mended() == len(broken)
    later = again(tmp_path)
    assert later.mended() == 0
    assert all(np.array_equal(read(some, row), picture(row)) for some in (table, later) for row in range(12))


def test_contents_that_are_lost_make_no_picture_another_one(tmp_path: Path) -> None:
    """The rows would be given out anew, while marks and pixels of others stand in them."""
    made(tmp_path)
    (tmp_path / "contents").unlink()
    table, rows = decoded.opened(tmp_path, SHAPE, KEYS[::-1])
    assert rows.tolist() == list(range(12))
    assert all(read(table, row) is None for row in range(12))


def test_a_crash_while_pictures_are_added_loses_none(tmp_path: Path) -> None:
    """The last key half written, and the marks behind it already there."""
    made(tmp_path)
    with (tmp_path / "contents").open("ab") as stream:
        stream.write(b"half a key")
    with (tmp_path / "marks").open("ab") as stream:
        stream.write(bytes(8))
    table, rows = decoded.opened(tmp_path, SHAPE, [decoded.key_of("new")])
    assert rows.tolist() == [12]
    table.write(12, picture(12))
    assert decoded.opened(tmp_path, SHAPE, [decoded.key_of("new")])[1].tolist() == [12], "added once"
    assert all(np.array_equal(read(again(tmp_path), row), picture(row)) for row in range(12))


def fill_all(folder: Path, order: list[int]) -> None:
    table = again(folder)
    for row in order:
        if read(table, row) is None:
            table.write(row, picture(row))


def test_two_processes_that_fill_it_at_once(tmp_path: Path) -> None:
    """Both open, add and write the same rows; each row is whole, once they are done and while they are at it."""
    orders = [np.random.default_rng(seed).permutation(12).tolist() for seed in range(4)]
    for turn in range(5):
        folder = tmp_path / str(turn)
        group = [FORK.Process(target=fill_all, args=(folder, order)) for order in orders]
        for process in group:
            process.start()
        for process in group:
            process.join(30)
        assert [process.exitcode for process in group] == [0] * 4
        table = again(folder)
        assert (folder / "contents").stat().st_size == 12 * 32, "none was added twice"
        assert all(np.array_equal(read(table, row), picture(row)) for row in range(12))
        assert table.mended() == 0


def test_forked_processes_and_threads_read_their_own_places(tmp_path: Path) -> None:
    """A file that a fork shares has one position: a seek of one process would move the other's read."""
    table = made(tmp_path)
    read(table, 0)

    def look(rows: Any) -> bool:
        return all(np.array_equal(read(table, row), picture(row)) for _ in range(300) for row in rows)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(look, [range(i, 12, 4) for i in range(4)]))
    group = [FORK.Process(target=lambda i=i: os._exit(0 if look(range(i, 12, 2)) else 3)) for i in range(2)]
    for process in group:
        process.start()
    assert look(range(12))
    for process in group:
        process.join(30)
    assert [process.exitcode for process in group] == [0, 0]


WRITER = """
import sys
from pathlib import Path
from tests.test_decoded import SHAPE, big
from cytoclip import decoded
table, _ = decoded.opened(Path(sys.argv[1]), (3, 256, 256), [decoded.key_of(str(i)) for i in range(4000)])
print("begun", flush=True)
for row in range(int(table.filled().argmin()), 4000):
    table.write(row, big(row))
"""


def big(row: int) -> NDArray[np.uint8]:
    return np.full((3, 256, 256), row % 251 + 1, np.uint8)


def test_killed_at_any_moment_no_row_is_marked_but_torn(tmp_path: Path) -> None:
    """kill -9, four times; each goes on where the one before it was."""
    there = 0
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        assert process.stdout
        assert process.stdout.readline() == b"begun\n"
        time.sleep(0.02 + 0.013 * turn)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        table, _ = decoded.opened(tmp_path, (3, 256, 256), [decoded.key_of(str(i)) for i in range(4000)])
        filled, held = np.flatnonzero(table.filled()), np.empty((3, 256, 256), np.uint8)
        assert there < len(filled) < 4000, "killed in the middle, and further than the last"
        assert filled.tolist() == list(range(len(filled)))
        there = len(filled)
        for row in filled.tolist():
            assert table.read(row, held)
            assert (held == big(row)).all()


def test_a_table_that_another_process_holds_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_PATIENCE", 0.1)
    with FileLock(tmp_path / "lock"), pytest.raises(UserError, match="is held by another process") as caught:
        again(tmp_path)
    assert caught.value.code is ExitCode.SYSTEM


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    table = made(tmp_path, 0)
    (tmp_path / "pixels").unlink()
    (tmp_path / "pixels").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left on the disk"):
        table.write(0, picture(0))
    assert not table.filled().any(), "no mark without its pixels"


def test_several_tables_behind_one_another(tmp_path: Path) -> None:
    """Such as a training split and a replayed root; each picture that several pairs show is missing once."""
    one, rows = decoded.opened(tmp_path / "one", SHAPE, [KEYS[i] for i in (0, 1, 0, 2)])
    two, others = decoded.opened(tmp_path / "two", SHAPE, [KEYS[i] for i in (5, 5, 6)])
    zeros = np.zeros(4, np.int64)
    whole = decoded.joined([Decoded((one,), zeros, rows), Decoded((two,), zeros[:3], others)])
    assert len(whole) == 7
    assert whole.shape == SHAPE
    assert whole.missing().tolist() == [0, 1, 3, 4, 6]
    for pair in (2, 4):
        whole.write(pair, picture(pair))
    assert whole.missing().tolist() == [1, 3, 6]
    held = np.empty(SHAPE, np.uint8)
    assert whole.read(0, held)
    assert np.array_equal(held, picture(2))
    assert whole.read(5, held)
    assert np.array_equal(held, picture(4))
    assert whole.take(np.array([6, 5, 3])).missing().tolist() == [0, 2]
    assert whole.mended() == 0
