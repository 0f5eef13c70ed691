"""What an index says of itself, and the names in its folder.

INDEX/manifest.json          the index: whatever it does not name is no part of it
INDEX/shards/NNNNN.parquet   pictures with their embeddings (vector_shards.py)
INDEX/faiss/GENERATION/      made from the shards: what large indexes are searched by (vectors.py)

The manifest takes the place of the one before it in one step, and the files it names are never changed, so whoever
opens an index while another is made sees the old one or the new one.
"""

from __future__ import annotations

import re
import stat
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cytoclip import files
from cytoclip.errors import ExitCode, UserError

SCHEMA = 1
NAME = "manifest.json"
_MAX = 64 << 20  # bytes: a million shards
_SHARD = re.compile(r"\d{5,12}\.parquet")
_GENERATION = re.compile(r"[0-9a-f]{1,32}")
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Model:
    """Whose embeddings they are.

    Parameters
    ----------
    name
        The hub id or absolute folder that it was opened from.
    weights
        SHA-256 of its weights and of how it reads: what a query's model must have too.
    digest
        The same with the precision: embeddings of another one are not mixed in.
    """

    name: str
    weights: str
    digest: str
    precision: str


@dataclass(frozen=True, config=_STRICT)
class Side:
    """How the pictures, or the different captions, are searched.

    Parameters
    ----------
    vectors
        How many there are.
    kind
        `exact`, or `ivf`: lists around centroids, of which the nearest are looked through.
    parameters
        Of faiss: `lists`, and `probes`, how many of them a query looks through.
    recall
        recall@10 against exact search, by the kind of query.
    """

    vectors: int
    kind: str = "exact"
    parameters: dict[str, int] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Shard:
    """One file of the index: its name and rows."""

    name: str
    rows: int


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """What an index holds.

    Parameters
    ----------
    width
        Dimensions of an embedding.
    pictures, captions
        How many of each; a caption counts once, however many pictures it describes.
    skipped
        Pictures that could not be used.
    roots
        Absolute folders: each picture's file is below one of them.
    images, texts
        How pictures and captions are searched.
    numbers
        Given out to shards so far: none is given out twice, so a name always means one file.
    faiss
        The folder in `faiss/`; empty where nothing is kept there.
    """

    model: Model
    width: int
    pictures: int
    captions: int
    skipped: int
    roots: list[str]
    shards: list[Shard]
    numbers: int
    images: Side
    texts: Side
    faiss: str
    created: str
    versions: dict[str, str]
    schema: int = SCHEMA


_READER = TypeAdapter(Manifest)


def read(folder: Path) -> Manifest | None:
    """That of the index in `folder`; None where there is none.

    Raises
    ------
    UserError
        Where it is damaged, too large, of another version, or names what is no file of an index.
    """
    path = folder / NAME
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _wrong(folder, error.strerror or str(error)) from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MAX:
        raise _wrong(folder, f"{NAME} is no regular file of at most {_MAX} bytes")
    try:
        found = _READER.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _wrong(folder, f"{NAME}: {where or 'it'}: {first['msg']}") from None
    except OSError as error:
        raise _wrong(folder, f"{NAME}: {error.strerror}") from None
    wrong = _problem(found)
    if wrong:
        raise _wrong(folder, f"{NAME}: {wrong}")
    return found


def write(folder: Path, manifest: Manifest) -> None:
    """In the place of the one before it, in one step."""
    files.write_json(folder / NAME, document(manifest))


def document(manifest: Manifest) -> dict[str, Any]:
    """It as plain data."""
    found: dict[str, Any] = _READER.dump_python(manifest, mode="json")
    return found


def shard_path(folder: Path, name: str) -> Path:
    return folder / "shards" / name


def faiss_folder(folder: Path, generation: str) -> Path:
    return folder / "faiss" / generation


def _problem(found: Manifest) -> str | None:
    if found.schema != SCHEMA:
        return f"schema {found.schema}, and this version reads {SCHEMA}"
    if not 1 <= found.width <= 1 << 16:
        return f"embeddings of {found.width} dimensions"
    if any(not _SHARD.fullmatch(shard.name) for shard in found.shards):
        return "a shard whose name is not a number"
    if len({shard.name for shard in found.shards}) < len(found.shards):
        return "a shard that is named twice"
    rows = [shard.rows for shard in found.shards]
    if min(rows, default=1) < 1 or sum(rows) != found.pictures or found.images.vectors != found.pictures:
        return f"{found.pictures} pictures, and shards of {sum(rows)} rows"
    if found.faiss and not _GENERATION.fullmatch(found.faiss):
        return "a faiss folder whose name is no number"
    return None


def _wrong(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder} is no index that can be used: {why}", "make it again: cytoclip index --rebuild", ExitCode.DATA
    )
