"""What an index says of its pictures and captions, by row.

Rows are numbered in the order of the shards that the manifest names. Letters: N pictures, M different captions.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cytoclip import manifest, vector_shards
from cytoclip.errors import ExitCode, UserError
from cytoclip.manifest import Manifest, Shard
from cytoclip.pairs import same_caption_key

TAGS = ("source", "label", "group")
_KEYS = 64  # further keys by which one may filter


@dataclass(frozen=True)
class Having:
    """Which picture has which caption: position i of `row` and `number` is one such having, sorted by number.

    Parameters
    ----------
    first_row, first_which
        int64 (M,): where each different caption is first said: in a row, and as which of its captions.
    ties
        int64 (M,): 63 bits of a hash of each.
    """

    row: NDArray[np.int64]
    number: NDArray[np.int64]
    first_row: NDArray[np.int64]
    first_which: NDArray[np.int64]
    ties: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ties)

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """The pictures that have a caption."""
        begin, end = np.searchsorted(self.number, [number, number + 1])
        return self.row[begin:end]


class Rows:
    """What is said of every picture; position i of every column is row i."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.ids: NDArray[np.int64] = table["id"].to_numpy()
        self._by_id = np.argsort(self.ids, kind="stable")
        self._codes: dict[str, tuple[NDArray[np.int64], list[str]]] = {}
        self.values: dict[str, Counter[str]] = {}
        for name in TAGS:
            self._note(name, *_encoded(table[name]))
        self._note_further()

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, asked: int) -> int:
        """The row of a picture's id.

        Raises
        ------
        UserError
            Where there is none.
        """
        at = int(np.searchsorted(self.ids, asked, sorter=self._by_id))
        if at == len(self) or self.ids[self._by_id[at]] != asked:
            raise UserError(f"the index has no picture {asked}", "take the id of a hit of this index", ExitCode.DATA)
        return int(self._by_id[at])

    def text(self, column: str, row: int) -> Any:
        """One value as Python has it."""
        return self.table[column][row].as_py()

    def captions(self, row: int) -> list[str]:
        first = self.text("caption", row)
        return [] if first is None else [first, *(self.text("more", row) or [])]

    def keys(self, row: int) -> dict[str, str]:
        """By key what the data say of a picture in a few words."""
        return {key: texts[codes[row]] for key, (codes, texts) in self._codes.items() if codes[row] >= 0}

    def having(self, key: str, value: str) -> NDArray[np.bool_]:
        """Which pictures have a value: (N,)."""
        codes, texts = self._codes[key]
        found: NDArray[np.bool_] = codes == texts.index(value)
        return found

    def _note(self, name: str, codes: NDArray[np.int64], texts: list[str]) -> None:
        if (codes >= 0).any():
            self._codes[name] = codes, texts
            counts = np.bincount(codes[codes >= 0], minlength=len(texts))
            self.values[name] = Counter({text: int(count) for text, count in zip(texts, counts, strict=True) if count})

    def _note_further(self) -> None:
        """Keys within `extra`: each different text of it is parsed once."""
        codes, texts = _encoded(self.table["extra"])
        parsed = [_flat(text) for text in texts]
        for key in list(dict.fromkeys(key for one in parsed for key in one))[:_KEYS]:
            if key not in self._codes:
                values = list(dict.fromkeys(one[key] for one in parsed if key in one))
                number = {value: at for at, value in enumerate(values)}
                of_text = np.array([*(number[one[key]] if key in one else -1 for one in parsed), -1], np.int64)
                self._note(key, of_text[codes], values)


def read(folder: Path, found: Manifest) -> Rows:
    """All rows of an index, without embeddings."""
    return Rows(pa.concat_tables(list(tables(folder, found.shards, found.width))).combine_chunks())


def tables(folder: Path, shards: Iterable[Shard], width: int) -> Iterable[Any]:
    """The rows of each shard, without embeddings."""
    for shard in shards:
        yield vector_shards.read(manifest.shard_path(folder, shard.name), shard.rows, width).replace_schema_metadata()


def havings(parts: Iterable[Any]) -> Having:
    """The different captions of tables behind one another; those that `same_caption_key` holds for one are one."""
    numbers: dict[str, int] = {}
    raw: dict[str, int] = {}  # most captions that repeat do so to the letter
    rows: list[int] = []
    number_of: list[int] = []
    first: list[tuple[int, int]] = []
    begin = 0
    for table in parts:
        both = zip(table["caption"].to_pylist(), table["more"].to_pylist(), strict=True)
        for row, (one, more) in enumerate(both, start=begin):
            for which, text in enumerate([] if one is None else [one, *(more or [])]):
                number = raw.get(text)
                if number is None:
                    number = raw[text] = numbers.setdefault(same_caption_key(text), len(numbers))
                if number == len(first):
                    first.append((row, which))
                rows.append(row)
                number_of.append(number)
        begin += len(table)
    order = np.argsort(np.array(number_of, np.int64), kind="stable")
    said = np.array(first, np.int64).reshape(-1, 2)
    ties = np.array([vector_shards.hashed(key) for key in numbers], np.int64)
    return Having(np.array(rows, np.int64)[order], np.array(number_of, np.int64)[order], said[:, 0], said[:, 1], ties)


def caption_vectors(folder: Path, shards: Iterable[Shard], width: int, having: Having) -> Iterable[NDArray[np.float32]]:
    """The embeddings of the different captions in their order, shard by shard."""
    begin, number = 0, 0
    for shard in shards:
        end = int(np.searchsorted(having.first_row, begin + shard.rows))
        which = having.first_which[number:end]
        if end > number and not which.any():  # by far the most: one caption a picture
            path = manifest.shard_path(folder, shard.name)
            yield vector_shards.texts(path, shard.rows, width, having.first_row[number:end] - begin)
        elif end > number:
            said = vector_shards.captions(manifest.shard_path(folder, shard.name), shard.rows, width)
            where = zip(having.first_row[number:end] - begin, which, strict=True)
            yield np.stack([said[row][1][at] for row, at in where])
        begin, number = begin + shard.rows, end


def content_keys(table: Any) -> NDArray[np.int64]:
    """63 bits of each picture's hash: equal for equal pictures."""
    return np.array([vector_shards.hashed(content) for content in table["content"].to_pylist()], np.int64)


def _encoded(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    """A number for each row's text, -1 for none, and the texts by number."""
    encoded = pa.chunked_array(column.chunks, column.type).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes.astype(np.int64), encoded.dictionary.to_pylist()


def _flat(text: str) -> dict[str, str]:
    """A row's further keys; an index may come from somebody else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
