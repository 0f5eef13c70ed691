"""The same few drawn pairs in every format that is read: what `sources.read` must find in each."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COUNT = 6


@dataclass(frozen=True)
class Drawn:
    name: str
    picture: bytes
    captions: tuple[str, ...]
    source: str
    label: str
    site: str  # a further key
    power: int  # another, a whole number


def drawn(count: int = COUNT, several: bool = False) -> list[Drawn]:
    """Pictures of one colour each; captions with what tables must quote."""
    found = []
    for i in range(count):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (i * 7 % 256, i // 256, 90)).save(stream, "PNG")
        captions = (f'a "cell", number {i}; with a | and\ta tab, {"é细胞"}', *([f"another {i}"] if several else []))
        found.append(
            Drawn(f"{i:03}.png", stream.getvalue(), captions, f"slide {i // 2}", str(i % 2), f"site {i % 3}", 10)
        )
    return found


def write_pictures(folder: Path, pairs: list[Drawn]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for one in pairs:
        (folder / one.name).write_bytes(one.picture)


def original(folder: Path, pairs: list[Drawn]) -> Path:
    write_pictures(folder / "imgs", pairs)
    listed = [{"img": p.name, **fields(p, p.name, "img"), "caption": list(p.captions)} for p in pairs]
    (folder / "img_text_pair.json").write_text(json.dumps(listed))
    return folder


def table(ending: str, separator: str = ",", header: str = "img_path") -> Callable[[Path, list[Drawn]], Path]:
    def write(folder: Path, pairs: list[Drawn]) -> Path:
        write_pictures(folder / "pictures", pairs)
        with (folder / f"pairs.{ending}").open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, delimiter=separator)
            rows.writerow(["id", header, "source", "caption", "label", "site", "power"])
            rows.writerows(
                [i, f"pictures/{p.name}", p.source, p.captions[0], p.label, p.site, p.power]
                for i, p in enumerate(pairs)
            )
        return folder / f"pairs.{ending}"

    return write


def fields(one: Drawn, image: Any, key: str = "image") -> dict[str, Any]:
    captions: Any = list(one.captions) if len(one.captions) > 1 else one.captions[0]
    said = {"source": one.source, "label": one.label, "site": one.site, "power": one.power}
    return {key: image, "caption": captions, **said}


def json_lines(folder: Path, pairs: list[Drawn]) -> Path:
    write_pictures(folder / "pictures", pairs)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(fields(p, f"pictures/{p.name}")) + "\n" for p in pairs))
    return folder / "pairs.jsonl"


def json_list(folder: Path, pairs: list[Drawn]) -> Path:
    write_pictures(folder / "pictures", pairs)
    (folder / "pairs.json").write_text(json.dumps([fields(p, f"pictures/{p.name}") for p in pairs]))
    return folder / "pairs.json"


def coco(folder: Path, pairs: list[Drawn]) -> Path:
    """As COCO's own: `annotations/captions_x.json` beside `x/`; annotations are in an order of their own."""
    write_pictures(folder / "val2017", pairs)
    images = [{"id": i * 3, **fields(p, p.name, "file_name")} for i, p in enumerate(pairs)]
    for one in images:
        del one["caption"]
    said = [{"id": i, "image_id": i * 3, "caption": c} for i, p in enumerate(pairs) for c in p.captions]
    (folder / "annotations").mkdir()
    place = folder / "annotations" / "captions_val2017.json"
    place.write_text(json.dumps({"images": images, "annotations": sorted(said, key=lambda one: -one["image_id"])}))
    return place


def parquet(how: str, **options: Any) -> Callable[[Path, list[Drawn]], Path]:
    """With pictures as `paths`, `bytes`, or Hugging Face's `struct`."""

    def write(folder: Path, pairs: list[Drawn]) -> Path:
        write_pictures(folder / "pictures", pairs)
        value: dict[str, Callable[[Drawn], Any]] = {
            "paths": lambda p: f"pictures/{p.name}",
            "bytes": lambda p: p.picture,
            "struct": lambda p: {"bytes": p.picture, "path": p.name},
        }
        rows = [fields(p, value[how](p)) for p in pairs]
        pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=4, **options)
        return folder / "pairs.parquet"

    return write


def tar(folder: Path, pairs: list[Drawn], form: int = tarfile.PAX_FORMAT, prefix: str = "") -> Path:
    """Two shards, with a .json for each pair, or a .txt and .cls where it has one caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03}.tar", "w", format=form) as archive:
            for one in pairs[shard * len(pairs) // 2 : (shard + 1) * len(pairs) // 2]:
                key = f"{prefix}{one.name.removesuffix('.png')}"
                put(archive, f"{key}.json", json.dumps(fields(one, "")).encode())
                put(archive, f"{key}.png", one.picture)
    return folder / "{000..001}.tar"


def put(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def texts(folder: Path, pairs: list[Drawn]) -> Path:
    write_pictures(folder, pairs)
    for one in pairs:
        (folder / one.name).with_suffix(".txt").write_text(one.captions[0] + "\n", encoding="utf-8")
    return folder


def imagefolder(folder: Path, pairs: list[Drawn]) -> Path:
    write_pictures(folder, pairs)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(fields(p, p.name, "file_name")) + "\n" for p in pairs))
    return folder


def saved(folder: Path, pairs: list[Drawn]) -> Path:
    """By `datasets` itself."""
    import datasets

    rows = [fields(p, {"bytes": p.picture, "path": p.name}) for p in pairs]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    made.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


WRITERS: dict[str, Callable[[Path, list[Drawn]], Path]] = {
    "the original layout": original,
    "csv": table("csv"),
    "csv with semicolons": table("csv", ";"),
    "csv with bars": table("csv", "|"),
    "tsv": table("tsv", "\t"),
    "csv, pictures by what they hold": table("csv", ",", "where"),
    "json lines": json_lines,
    "a json list": json_list,
    "coco": coco,
    "parquet of paths": parquet("paths"),
    "parquet of bytes, compressed": parquet("bytes", compression="zstd"),
    "parquet of bytes, plain": parquet("bytes", compression="none", use_dictionary=False),
    "parquet of bytes, with dictionaries": parquet("bytes", compression="none"),
    "parquet of structs": parquet("struct"),
    "tar": tar,
    "tar in a GNU format, with long names": lambda f, p: tar(f, p, tarfile.GNU_FORMAT, "long/" * 60),
    "tar with long names": lambda f, p: tar(f, p, tarfile.PAX_FORMAT, "é/" * 100),
    "tar in the oldest format": lambda f, p: tar(f, p, tarfile.USTAR_FORMAT, "d/"),
    "texts": texts,
    "imagefolder": imagefolder,
    "save_to_disk": saved,
}
ONE_CAPTION = {name for name in WRITERS if name.startswith(("csv", "tsv", "texts"))}
NO_TAGS = {"texts"}
