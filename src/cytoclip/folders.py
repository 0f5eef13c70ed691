"""A folder of pictures with a text file each: `a/001.jpg` beside `a/001.txt`, at any depth."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cytoclip.console import Console
from cytoclip.errors import counted, first_few
from cytoclip.pairs import Pairs
from cytoclip.rows import MAX_TEXT, PICTURES, Gathered

_HINT = "beside each picture a text file of the same name: 001.jpg and 001.txt"


def holds_texts(folder: Path) -> bool:
    """Whether a folder, at any depth, holds a picture with a text of the same name."""
    return any(text.is_file() for _, text in _pictures(folder))


def read(folder: Path, console: Console) -> Pairs:
    """The pairs of a folder, sorted by name. A text is a caption; pictures without one are counted and left out.

    Raises
    ------
    UserError
        Where a text is empty or not UTF-8, or no picture has one.
    """
    gathered = Gathered(folder, folder, "picture", "pictures", _HINT)
    without = 0
    for name, text in _pictures(folder):
        try:
            facts = text.stat()
        except OSError:
            without += 1
            continue
        caption, wrong = _caption(text, facts, folder)
        if wrong:
            gathered.skip(name, wrong)
        else:
            gathered.add(name, name, caption, {})
    if without:
        console.warn(f"{without} pictures of {folder} have no .txt beside them and are left out")
    return gathered.pairs()


def read_all(folder: Path, console: Console) -> Pairs:
    """Every picture below a folder, sorted by name, with its text where it has one; else its caption is empty.

    Links to folders are not followed. A text that cannot be used is said and left out. The folder that a picture lies
    in, below this one, is kept beside it as `folder`.

    Raises
    ------
    UserError
        Where there is no picture, or a link leads out of the folder.
    """
    gathered = Gathered(folder, folder, "picture", "pictures", _HINT, bare=True)
    wrongs = []
    for name, text in _pictures(folder):
        caption = ""
        if os.path.lexists(text):
            caption, wrong = _caption(text, text.stat(), folder) if text.exists() else ("", "its .txt leads nowhere")
            if wrong:
                wrongs.append(f"{name}: {wrong}")
        within = name.rpartition("/")[0]
        gathered.add(name, name, caption, {"folder": within} if within else {})
    if wrongs:
        console.warn(f"{counted(len(wrongs), 'text')} of {folder} cannot be used: {first_few(wrongs)}")
    left_out: list[str] = []
    found = gathered.pairs(left_out)
    if left_out:
        console.warn(f"{counted(len(left_out), 'picture')} of {folder} are left out: {first_few(left_out)}")
    return found


def _pictures(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names below the folder, in order, and where their texts would be. Links to folders are not followed."""
    for parent, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            picture = Path(parent, name)
            if picture.suffix.lower() in PICTURES and not name.startswith("."):
                yield picture.relative_to(folder).as_posix(), picture.with_suffix(".txt")


def _caption(text: Path, facts: os.stat_result, folder: Path) -> tuple[str, str | None]:
    if not stat.S_ISREG(facts.st_mode):
        return "", "its .txt is not a regular file"
    if facts.st_size > MAX_TEXT:
        return "", f"its .txt has {facts.st_size} bytes"
    if text.is_symlink() and not Path(os.path.realpath(text)).is_relative_to(folder.resolve()):
        return "", "its .txt leads out of the folder"
    try:
        return text.read_bytes().decode("utf-8-sig").strip(), None
    except UnicodeDecodeError:
        return "", "its .txt is not UTF-8"
    except OSError as error:
        return "", f"its .txt cannot be read: {error.strerror}"
