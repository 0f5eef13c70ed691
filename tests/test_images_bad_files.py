"""Every way in which a file can be bad: named, bounded, silent; and the scan agrees with the decoder."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import struct
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch.utils.data import DataLoader
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cytoclip import images
from cytoclip.errors import ExitCode, UserError
from cytoclip.images import decode, scan
from cytoclip.pixels import PixelSpec, prepare
from tests.test_images import drawn
from tests.test_images_by_hand import png, tiff


def encoded(kind: str, size: tuple[int, int] = (90, 70), **options: Any) -> bytes:
    data = io.BytesIO()
    drawn("RGB", size).save(data, kind, **options)
    return data.getvalue()


def bomb() -> bytes:
    return png(60000, 60000, 8, 2, b"\0")


BAD: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "empty file"),
    "cut.jpg": (encoded("JPEG")[:-200], "truncated"),
    "cut_early.jpg": (encoded("JPEG")[:40], "truncated"),
    "cut.png": (encoded("PNG")[:-600], "truncated"),
    "cut_early.png": (encoded("PNG")[:20], "truncated"),
    "garbled.png": (b"\x89PNG\r\n\x1a\n" + b"\xff" * 90, "truncated or damaged PNG"),
    "cut.tif": (encoded("TIFF")[:-600], "truncated"),
    "cut.bmp": (encoded("BMP")[:-600], "truncated"),
    "text.jpg": (b"a picture of a cell\n" * 9, "not a picture of a known format"),
    "script.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not a picture of a known format",
    ),
    "bomb.png": (bomb(), "claims 60000x60000 pixels"),
    "bomb.bmp": (
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0),
        "claims",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_its_fault(name: str, tmp_path: Path) -> None:
    assert len(BAD) == 12
    data, problem = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        decode(path)
    assert str(path) in caught.value.message
    assert problem in caught.value.message
    assert caught.value.hint
    assert caught.value.code == ExitCode.DATA
    (found,) = scan([path], threads=1)
    assert found.problem is not None
    assert problem in found.problem
    assert len(found.problem) < 100
    assert found.content == (hashlib.sha256(data).hexdigest() if data else "")


@pytest.mark.timeout(30)  # a pipe that is opened waits for ever
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "file").write_bytes(b"x")
    expected = {
        tmp_path / "pipe.png": "not a regular file",
        tmp_path: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path / "missing.png": "no such file",
        tmp_path / "file" / "below.png": "no such file",
        tmp_path / "loop.png": "damaged",
        tmp_path / "nul\0.png": "damaged",
    }
    for path, result in zip(expected, scan(list(expected), threads=2), strict=True):
        assert result.problem is not None
        assert expected[path] in result.problem, path
        assert result.content == ""
        with pytest.raises(UserError, match=re.escape(expected[path])):
            decode(path)


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as root here, and root may read everything: the refusal is played."""

    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setattr(Path, "open", refuses)
    assert scan([path], threads=1)[0].problem == "permission denied"
    with pytest.raises(UserError, match="permission denied"):
        decode(path)


def test_the_limit_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG", (90, 70)))
    monkeypatch.setattr(images, "MAX_PIXELS", 90 * 70)
    assert decode(path).size == (90, 70)
    monkeypatch.setattr(images, "MAX_PIXELS", 90 * 70 - 1)
    monkeypatch.setattr(images, "normalise", lambda _: pytest.fail("decoded"))
    with pytest.raises(UserError, match="claims 90x70 pixels"):
        decode(path)
    assert scan([path], threads=1)[0].problem == "claims 90x70 pixels"


def test_scan_finds_what_decode_finds_wherever_a_file_is_cut(tmp_path: Path) -> None:
    kinds = {
        "JPEG": {},
        "PNG": {},
        "TIFF": {},
        "TIFF packed": {"compression": "jpeg"},
        "BMP": {},
        "GIF": {},
        "WEBP": {},
    }
    kinds |= {
        "JPEG progressive": {"progressive": True},
        "PPM": {},
        "JPEG2000": {},
        "TIFF lzw": {"compression": "tiff_lzw"},
    }
    if features.check("avif"):
        kinds["AVIF"] = {}
    paths, whole = [], 0
    for kind, options in kinds.items():
        data = encoded(kind.split()[0], **options)
        for cut in (*range(1, 40, 9), *range(50, len(data), len(data) // 7), len(data) - 20, len(data) - 1, len(data)):
            paths.append(tmp_path / f"{len(paths)}.{kind}")
            paths[-1].write_bytes(data[:cut])
    assert len(paths) >= 11 * 15
    for path, found in zip(paths, scan(paths, threads=4), strict=True):
        said = None
        try:
            decode(path)
        except UserError as error:
            said = error.message.removeprefix(f"{path}: ")
        assert found.problem == said, path
        whole += said is None
    assert len(kinds) <= whole < len(paths) / 3


def test_a_marker_before_trailing_bytes_is_still_a_picture(tmp_path: Path) -> None:
    for kind in ("JPEG", "PNG"):
        path = tmp_path / kind
        path.write_bytes(encoded(kind) + b"\0" * 100)
        assert scan([path], threads=1)[0].problem is None
        assert decode(path).size == (90, 70)


def test_whole_jpeg_and_png_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / kind for kind in ("JPEG", "PNG")]
    for path in paths:
        path.write_bytes(encoded(path.name))
    monkeypatch.setattr(images, "normalise", lambda _: pytest.fail("decoded"))
    assert [found.problem for found in scan(paths, threads=1)] == [None, None]


def test_scan_keeps_the_order_and_hashes_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_SCAN_BLOCK", 4)
    paths = []
    for number in range(11):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(encoded("JPEG", (20 + number % 5, 20)))
    paths[6] = tmp_path / "missing.jpg"
    done: list[int] = []
    results = scan(paths, threads=3, progress=done.append)
    assert done == list(range(1, 12))
    for path, found in zip(paths, results, strict=True):
        if path.name == "missing.jpg":
            assert (found.content, found.problem) == ("", "no such file")
        else:
            assert (found.content, found.problem) == (hashlib.sha256(path.read_bytes()).hexdigest(), None)
    assert results[0] == results[5] == results[10]
    assert len({found.content for found in results}) == 6
    assert scan(paths, threads=1) == results
    assert scan([], threads=0) == []


def test_an_interrupt_stops_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []

    def slow(path: Path) -> images.Scan:
        begun.append(path)
        time.sleep(0.01)
        return images.Scan("", None)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_scan_one", slow)
    with pytest.raises(KeyboardInterrupt):
        scan([Path("a.jpg")] * 50, threads=2, progress=stop)
    assert len(begun) < 25


def odd_files(folder: Path) -> list[Path]:
    """Files at which Pillow warns, logs or lets a C library speak."""
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\xff\xff\0\0\0\x10"
    many = tiff(bytes(40), 4, 8, _277=(3, 10))
    frames = png(2, 1, 8, 0, b"\0\1\2", (b"acTL", struct.pack(">II", 0, 0)))
    broken = bytearray(encoded("TIFF", compression="jpeg"))
    broken[200:900] = b"\x55" * 700
    lzw = bytearray(encoded("TIFF", compression="tiff_lzw"))
    lzw[200:900] = b"\xaa" * 700
    files = {"exif.jpg": encoded("JPEG", exif=b"Exif\0\0" + exif), "samples.tif": many, "frames.png": frames}
    files |= {
        "bomb.png": bomb(),
        "large.png": png(10000, 9500, 1, 0, b"\0"),
        "jpeg.tif": bytes(broken),
        "lzw.tif": bytes(lzw),
    }
    files["entries.tif"] = tiff(bytes(3), 3, 8, _270=(2, 0xFFFFFF), _305=(2, 0xFFFFFF))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def try_all(paths: list[Path], read: Callable[[Path], Any]) -> None:
    for path in paths:
        try:
            read(path)
        except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue


def test_nothing_is_printed_for_odd_files(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = odd_files(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's handler would hide that logging's last resort prints
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        try_all(paths, lambda path: Image.open(path).load())
    assert len(heard) >= 3, "these files no longer make Pillow warn"
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        try_all(paths, decode)
        scan(paths, threads=4)
        warnings.warn("others are still heard", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["others are still heard"]
    assert capfd.readouterr() == ("", "")


def test_threads_and_forked_workers_give_the_same(tmp_path: Path) -> None:
    spec = PixelSpec.from_processor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    )
    paths = []
    for number, kind in enumerate(("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP") * 4):
        paths.append(tmp_path / f"{number}.{kind}")
        drawn("RGB", (60 + number, 50)).save(paths[-1], kind)

    def one(path: Path) -> torch.Tensor:
        return torch.from_numpy(prepare(decode(path), spec))

    serial = torch.stack([one(path) for path in paths])
    with ThreadPoolExecutor(8) as pool:
        assert torch.equal(torch.stack(list(pool.map(one, paths))), serial)
    loader: DataLoader[Any] = DataLoader(
        paths,  # type: ignore[arg-type]
        batch_size=5,
        num_workers=2,
        collate_fn=lambda batch: torch.stack([one(path) for path in batch]),
        multiprocessing_context="fork",
    )
    assert torch.equal(torch.cat(list(loader)), serial)


def test_a_format_without_a_signature_is_known_by_its_ending(tmp_path: Path) -> None:
    drawn("RGB", (9, 7)).save(tmp_path / "a.tga")
    (tmp_path / "a.xyz").write_bytes((tmp_path / "a.tga").read_bytes())
    assert np.array_equal(np.asarray(decode(tmp_path / "a.tga")), np.asarray(drawn("RGB", (9, 7))))
    with pytest.raises(UserError, match=r"a\.xyz"):
        decode(tmp_path / "a.xyz")


def test_every_format_of_pillow_is_read_but_eps() -> None:
    assert set(images.FORMATS) | images._NO_SIGNATURE == set(Image.OPEN) - {"EPS"}
    assert len(images.FORMATS) > 30
