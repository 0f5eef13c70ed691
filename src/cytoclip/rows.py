"""What a row of any format must be to become a pair: texts, tags, and a picture's name that stays in its folder."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from cytoclip.errors import ExitCode, UserError, counted, first_few, nearest, shown, suggested
from cytoclip.files import Piece
from cytoclip.pairs import Pairs, akin_to_source

TAGS = ("group", "source", "label")
MAX_EXTRA = 64  # characters of a further key or value that is kept beside a pair, and how many of them a pair has
AS_UTF_8 = 'save it as UTF-8; in Excel: Save As, "CSV UTF-8 (comma delimited)"'
_VALUES = 256  # of a further key in one place: with more it is a number of the row, and no slice
MAX_TEXT = 1 << 20  # bytes of one caption, line or record: the longest reports have a hundredth of it
PICTURES = frozenset(
    f".{ending}"
    for ending in ("jpg", "jpeg", "jpe", "jfif", "png", "tif", "tiff", "bmp", "dib", "webp", "gif", "jp2", "j2k", "jpx",
        "ppm", "pgm", "pbm", "pnm", "tga", "avif")
)  # fmt: skip
_HALF = re.compile("[\ud800-\udfff]")  # half of a character beyond U+FFFF: valid JSON, but no file name and no token
_IMAGES = ("image", "img", "image_path", "img_path", "file_name", "filename", "filepath", "file_path", "path", "file",
    "picture", "image_file", "image_name", "image_id", "jpg", "png", "bytes")  # fmt: skip
_CAPTIONS = ("caption", "captions", "text", "txt", "description", "sentence", "sentences", "title", "report")
LABELS = ("label", "labels", "class", "class_name", "category", "diagnosis", "target")
_LOOKED_AT = 100  # rows, to guess a column by what it holds


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Parameters
    ----------
    image, caption
        Which columns hold picture and caption; None: guessed from names, else from what they hold.
    root
        The folder below which its pictures lie; None: the table's own.
    """

    image: str | None = None
    caption: str | None = None
    root: Path | None = None


_TOLD = 1000  # rows that are no pairs are told, and more only counted


class Gathered:
    """The pairs of one place as they are read, in compact columns, and what is wrong with the rows that are none.

    Parameters
    ----------
    place
        What messages call it.
    base
        The folder that pictures' names are relative to and may not leave.
    one, several
        What a row is called.
    hint
        What a row must be.
    bare
        Whether a picture may be without a caption, which is then empty.
    """

    def __init__(
        self, place: Path, base: Path, one: str = "row", several: str = "rows", hint: str = "", bare: bool = False
    ) -> None:
        self._place, self._base, self._inside = place, base, base.resolve()
        self._one, self._several, self._hint, self._bare = one, several, hint, bare
        self._images: list[Path | Piece] = []
        self._names: list[str] = []
        self._captions: list[str] = []
        self._tags: tuple[list[str | None], ...] = ([], [], [])
        self._more: list[tuple[str, ...]] = []
        self._extra: list[tuple[tuple[str, str], ...]] = []
        self._values: dict[str, set[str]] = {}  # of each further key; a key that has too many is left out from then on
        self._problems: list[str] = []
        self._outside: list[str] = []
        self._of_table, self._absolute = False, False  # names may be relative to another folder; may be absolute
        self._common: str | None = None  # the folder that all absolute names which were refused are below
        self._seen = 0
        self._shared: dict[Any, Any] = {}  # one text for all rows with the same tag, one tuple for the same extras
        self._parents: dict[str, bool] = {}

    @classmethod
    def of_table(
        cls,
        file: Path,
        columns: Columns,
        one: str = "row",
        several: str = "rows",
        hint: str = "",
        base: Path | None = None,
    ) -> Gathered:
        """Of a table of names: below `columns.root`, absolute ones too, where that is given; else below `base`.

        Raises
        ------
        UserError
            Where `columns.root` is no folder.
        """
        if columns.root and not columns.root.is_dir():
            hint = suggested(columns.root, "data.image_root is the folder below which the pictures lie")
            raise data_error(f"no such folder: {columns.root}, the root of the pictures of {file}", hint)
        found = cls(file, columns.root or base or file.parent, one, several, hint)
        found._of_table, found._absolute = True, columns.root is not None
        return found

    def add(self, where: object, image: object, caption: object, row: Mapping[str, Any], name: str = "") -> None:
        """One row, `where` it is in messages; `image` is a name below the folder, or a Piece called `name`.

        Of `row` the tags are read, and what else it says in a few words.
        """
        self._seen += 1
        written = image
        wrong = None if isinstance(image, Piece) else name_problem(image)
        if wrong is None and isinstance(image, str) and leaves(image):
            below = self._below(image)
            wrong = None if below else f"{shown(image)} {self._leaving(image)}"
            image = below or image
        no_caption = caption_problem(caption) if caption or not self._bare else None
        wrong = wrong or no_caption or tags_problem(row)
        if wrong:
            self.refuse(where, wrong)
            return
        texts = [caption] if isinstance(caption, str) else list(caption)  # type: ignore[call-overload]
        if isinstance(image, str):
            name, found = image, self._inside / image
            if not self._is_inside(found):
                self._outside.append(image)
                return
            self._images.append(found)
        elif isinstance(image, Piece):
            self._images.append(image)
        self._names.append(name)
        self._captions.append(texts[0])
        self._more.append(tuple(texts[1:]))
        for column, key in zip(self._tags, TAGS, strict=True):
            value = None if row.get(key) is None else str(row[key])
            column.append(None if value is None else self._shared.setdefault(value, value))
        extra = tuple(each for each in extras(row, (written, caption)) if self._distinguishes(*each))
        self._extra.append(self._shared.setdefault(extra, extra))

    def refuse(self, where: object, wrong: str) -> None:
        """A row that is no pair; it has not been given to `add`, or `add` found it."""
        self._problems.append(f"{self._one} {where}: {wrong}" if len(self._problems) < _TOLD else "")

    def skip(self, where: object, wrong: str) -> None:
        """Count a row that never came as far as `add`."""
        self._seen += 1
        self.refuse(where, wrong)

    def pairs(self, left_out: list[str] | None = None) -> Pairs:
        """All of them; where `left_out` is given, rows that are no pairs are told there, if any row is one.

        Raises
        ------
        UserError
            Where a row is no pair, or a link leads out of the folder, or there are no rows.
        """
        if left_out is not None and self._images:
            left_out += self._problems
        elif self._problems:
            raise data_error(
                f"{len(self._problems)} of {self._seen} {self._several} of {self._place} are not pairs: "
                f"{first_few(self._problems)}",
                self._root_hint() if self._common else self._hint,
            )
        if self._outside:
            raise data_error(
                f"{counted(len(self._outside), 'link')} below {self._base} leading out of it: "
                f"{first_few(self._outside)}",
                f"copy the pictures into {self._base.name}/",
            )
        if not self._names:
            raise data_error(f"{self._place} holds no pairs", self._hint or "put at least one pair into it")
        groups, sources, labels = (tuple(column) for column in self._tags)
        extra = [tuple(each for each in row if self._values[each[0]]) for row in self._extra]
        return Pairs(
            images=tuple(self._images),
            names=tuple(self._names),
            captions=tuple(self._captions),
            groups=groups,
            sources=sources,
            labels=labels,
            more=tuple(self._more) if any(self._more) else (),
            extra=tuple(extra) if any(extra) else (),
        )

    def _distinguishes(self, key: str, value: str) -> bool:
        """Whether a further key has had few values so far; one that had too many keeps none of them.

        Patients are kept however many they are: a split that cuts them must be said.
        """
        values = self._values.setdefault(key, {value})
        if values:
            values.add(value)
            if len(values) > _VALUES and not akin_to_source(key):
                values.clear()
        return bool(values)

    def _below(self, name: str) -> str | None:
        """An absolute name as one relative to the folder, where that may be and it is inside; None: it leaves it."""
        if not os.path.isabs(name) or ".." in PureWindowsPath(name).parts or "\0" in name:  # noqa: PTH117 - as below
            return None
        parent, last = os.path.split(name)
        if self._absolute and last and self._holds(parent):
            return (Path(os.path.realpath(parent)).relative_to(self._inside) / last).as_posix()
        if self._of_table:
            self._common = os.path.commonpath([self._common, parent]) if self._common else parent
        return None

    def _leaving(self, name: str) -> str:
        if self._of_table and not self._absolute and os.path.isabs(name):  # noqa: PTH117 - as below
            return "is absolute"
        return f"leaves {self._base.name or self._inside.name}/"

    def _root_hint(self) -> str:
        if self._common == "/":
            return "data.image_root takes absolute names below a folder, and these are below none but /"
        return (
            f"absolute names are read below a folder that is named: data.image_root={self._common}, "
            "or --image-root with cytoclip bring and check"
        )

    def _holds(self, parent: str) -> bool:
        """Whether a folder is inside, looked at once for all that it holds."""
        if parent not in self._parents:
            self._parents[parent] = Path(os.path.realpath(parent)).is_relative_to(self._inside)
        return self._parents[parent]

    def _is_inside(self, image: Path) -> bool:
        """By its folder, and by the file itself where that is a link."""
        parent = os.path.dirname(image)  # noqa: PTH120 - a Path for each of a million pictures is slow
        if not image.is_symlink():
            return self._holds(parent)
        return Path(os.path.realpath(image)).is_relative_to(self._inside)  # as resolve(), which raises on a cycle


def concatenated(parts: Sequence[Pairs]) -> Pairs:
    """Several parts of one set behind one another; a group or source that comes in two of them is one."""
    if len(parts) == 1:
        return parts[0]
    names = ("images", "names", "captions", "groups", "sources", "labels", "more", "extra")
    return Pairs(**{name: tuple(value for part in parts for value in getattr(part, name)) for name in names})


def pick(sample: Sequence[Mapping[str, Any]], asked: Columns, place: Path, say: Callable[[str], None]) -> Columns:
    """Which columns hold picture and caption, by the first rows of a table; what was guessed is said.

    Raises
    ------
    UserError
        For a column that is not there, or where nothing can be guessed.
    """
    there = list(dict.fromkeys(name for row in sample for name in row))
    image = _asked(asked.image, there, place, "image") or _usual(there, _IMAGES, asked.caption)
    image = image or _best(there, lambda name: _share(sample, name, is_picture), (asked.caption,))
    caption = _asked(asked.caption, there, place, "caption") or _usual(there, _CAPTIONS, image)
    caption = caption or _best(there, lambda name: _length(sample, name), (image, *TAGS))
    for what, found in (("image", image), ("caption", caption)):
        if found is None:
            raise data_error(
                f"no column of {place} looks like the {what}: it has {first_few([shown(n) for n in there], 8)}",
                f"name it: data.{what}_column=…, or --{what}-column with cytoclip bring and check",
            )
    if not (asked.image and asked.caption):
        say(f"{place}: pictures from column {shown(image)}, captions from column {shown(caption)} (guessed)")
    return Columns(image, caption)


def pick_labels(sample: Sequence[Mapping[str, Any]], place: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """Which columns hold picture and label, by the first rows of a table; what was guessed is said.

    Raises
    ------
    UserError
        Where nothing can be guessed.
    """
    there = list(dict.fromkeys(name for row in sample for name in row))
    label = _usual(there, LABELS, None)
    image = _usual(there, _IMAGES, label) or _best(there, lambda name: _share(sample, name, is_picture), (label,))
    if image and not label and len(there) == 2:
        label = next(name for name in there if name != image)
    for what, found in (("image", image), ("label", label)):
        if found is None:
            raise data_error(
                f"no column of {place} looks like the {what}: it has {first_few([shown(n) for n in there], 8)}",
                f"call it {what}",
            )
    say(f"{place}: pictures from column {shown(image)}, labels from column {shown(label)}")
    return str(image), str(label)


def name_problem(name: object, what: str = "img") -> str | None:
    if not isinstance(name, str):
        return f"its {what} is {kind(name)}, not a text"
    if not name.strip():
        return f"its {what} is empty"
    return f"its {what} holds half a character, {shown(name)}" if _HALF.search(name) else None


def caption_problem(caption: object) -> str | None:
    """A text, or several."""
    if isinstance(caption, list | tuple):
        return next(
            (wrong for text in caption if (wrong := name_problem(text, "caption"))),
            None if caption else "its caption is an empty list",
        )
    return name_problem(caption, "caption")


def tags_problem(tags: Mapping[str, Any]) -> str | None:
    for key in TAGS:
        value = tags.get(key)
        if not isinstance(value, str | int | None) or isinstance(value, bool):
            return f"its {key} is {kind(value)}, not a text or whole number"
        if isinstance(value, str) and _HALF.search(value):
            return f"its {key} holds half a character, {shown(value)}"
    return None


def leaves(name: str) -> bool:
    """Whether a relative name may lead out of its folder, on any system."""
    path = PurePosixPath(name)
    windows = PureWindowsPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name or bool(windows.drive) or ".." in windows.parts


def is_picture(value: object) -> bool:
    """By the ending of a name, or as bytes, or as Hugging Face's {bytes, path}."""
    if isinstance(value, Mapping):
        return "bytes" in value or is_picture(value.get("path"))
    return isinstance(value, bytes) or (isinstance(value, str) and PurePosixPath(value).suffix.lower() in PICTURES)


def extras(row: Mapping[str, Any], but: Sequence[object] = ()) -> tuple[tuple[str, str], ...]:
    """What a row says beside picture, caption and tags in few words: short texts, whole numbers, yes and no."""
    found = []
    for key, value in row.items():
        if key in TAGS or isinstance(value, float) or not isinstance(value, str | int) or value in but:
            continue
        key, text = str(key), str(value)
        if 0 < len(key) <= MAX_EXTRA and 0 < len(text) <= MAX_EXTRA and not _HALF.search(key + text):
            found.append((key, text))
    return tuple(sorted(found)[:MAX_EXTRA])


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as tables hold it: an empty value is none, and a whole number may have become 3.0 beside a missing one."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return None if math.isnan(value) else int(value) if value.is_integer() else value
        return None if value == "" else value

    return {key: plain(value) for key, value in row.items()}


def require_regular(path: Path) -> os.stat_result:
    """Before opening: opening a pipe would wait for its writer, and a device has no end."""
    try:
        facts = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = suggested(path, "name a file that is there")
        raise data_error(f"{path} cannot be read: {reason}", hint) from None
    if not stat.S_ISREG(facts.st_mode):
        raise data_error(f"{path} is not a regular file", "name a file: pipes and devices are not read")
    if not os.access(path, os.R_OK):
        raise data_error(f"{path} cannot be read: permission denied", "make it readable for this user")
    return facts


def kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null",
             bytes: "bytes"}  # fmt: skip
    return names.get(type(value), "a number")


def data_error(message: str, hint: str) -> UserError:
    return UserError(message, hint, ExitCode.DATA)


def _asked(name: str | None, there: Sequence[str], place: Path, what: str) -> str | None:
    if name and name not in there:
        near = nearest(name, there)
        hint = f"did you mean {near}?" if near else f"it has {first_few([shown(n) for n in there], 8)}"
        raise data_error(f"no column {name!r} for the {what} in {place}", hint)
    return name


def _usual(there: Sequence[str], usual: Iterable[str], taken: str | None) -> str | None:
    plain = {name.strip().lower(): name for name in reversed(there) if name != taken}
    return next((plain[word] for word in usual if word in plain), None)


def _best(there: Sequence[str], measure: Callable[[str], float], taken: Sequence[str | None]) -> str | None:
    measured = {name: measure(name) for name in there if name not in taken}
    best = max(measured, key=lambda name: measured[name], default=None)
    return best if best is not None and measured[best] > 0 else None


def _share(sample: Sequence[Mapping[str, Any]], name: str, fits: Callable[[object], bool]) -> float:
    share = sum(fits(row.get(name)) for row in sample) / len(sample)
    return share if share > 0.5 else 0.0


def _length(sample: Sequence[Mapping[str, Any]], name: str) -> float:
    """Mean number of words where they are texts; one word is a label rather than a caption."""
    values = [row.get(name) for row in sample[:_LOOKED_AT]]
    texts = [value for value in values if isinstance(value, str) and not is_picture(value)]
    words = sum(len(text.split()) for text in texts) / len(values)
    return words if words > 1 else 0.0
