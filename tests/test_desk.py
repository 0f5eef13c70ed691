"""Pictures from anybody, within bounds, and questions to an index that tell nothing of the machine."""

from __future__ import annotations

import io
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cytoclip import desk, encoder, images
from cytoclip.desk import Desk, Kept
from cytoclip.errors import UserError
from cytoclip.search import Index
from tests import served


@pytest.fixture(scope="module")
def at(sample: served.Sample) -> Desk:
    return Desk(Index.open(sample.index))


def png(width: int, height: int, **how: object) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (width, height), (200, 90, 120)).save(written, "PNG", **how)
    return written.getvalue()


def saved(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 10, 90)).save(buffer, form)
    return buffer.getvalue()


def test_a_picture_is_taken_and_asked_with(at: Desk, sample: served.Sample) -> None:
    given = sample.picture(3).read_bytes()
    taken = at.take(given)
    assert (taken.width, taken.height) == (96, 96)
    assert at.held(taken.ticket) == given
    hits = at.search(None, at.held(taken.ticket), 3)
    assert (hits[0].name, hits[0].rank) == (sample.entries[3]["img"], 1)
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert len({at.take(given).ticket for _ in range(5)}) == 5


def test_text_picture_and_both_are_what_the_index_says(at: Desk, sample: served.Sample) -> None:
    caption, picture = sample.entries[5]["caption"], sample.picture(9)
    read = picture.read_bytes()
    assert at.search(f"  {caption} ", None, 4) == at.index.search(caption, k=4)
    assert at.search("  ", read, 4) == at.index.search(image=picture, k=4)
    assert at.search(caption, read, 4, weight=0.3) == at.index.search(caption, picture, k=4, weight=0.3)
    assert at.search(caption, None, 4, kind="captions") == at.index.search(caption, k=4, kind="captions")
    label = sample.entries[5]["label"]
    assert {hit.keys["label"] for hit in at.search(caption, None, 9, where={"label": label})} == {label}
    first = at.search(caption, None, 1)[0].id
    assert at.like(first, 5) == at.index.like(first, 5)
    with pytest.raises(UserError, match="nothing to look for"):
        at.search(" ", None, 3)


def test_scores_and_embeddings_are_the_encoders(at: Desk, sample: served.Sample) -> None:
    made = encoder.load(sample.model, "cpu")
    captions = [entry["caption"] for entry in sample.entries[:4]]
    scored = at.score(sample.picture(2).read_bytes(), captions)
    assert [one.caption for one in scored] == captions
    assert [one.probability for one in scored] == pytest.approx(made.probabilities(sample.picture(2), captions)[0])
    assert [one.score for one in scored] == pytest.approx(made.similarity(sample.picture(2), captions)[0])
    pictures = [sample.picture(i) for i in range(3)]
    image_ND, text_MD = at.embed([one.read_bytes() for one in pictures], captions)
    np.testing.assert_allclose(image_ND, made.embed_images(pictures), atol=1e-6)
    np.testing.assert_allclose(text_MD, made.embed_texts(captions), atol=1e-6)
    assert at.embed([], [])[0].shape == (0, 16)
    with pytest.raises(UserError, match="caption 2 is empty"):
        at.score(sample.picture(2).read_bytes(), ["a cell", " \n"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "this is no picture that can be read: empty file"),
        (b"%PDF-1.4 not a picture", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
        (png(30, 30)[:60], "truncated"),
        (png(7200, 7000), "claims 7200x7000 pixels"),
        (png(6000, 100), "a picture of 6000x100 is too narrow"),
        (saved("PPM"), "not a picture of a known format"),
        (saved("ICO"), "not a picture of a known format"),
        (png(9, 9) + b"\0" * desk.UPLOAD_BYTES, "20,000,000 are allowed"),
    ],
)
def test_what_is_no_picture_or_too_large_says_so(at: Desk, given: bytes, said: str) -> None:
    for ask in (
        at.take,
        lambda it: at.search(None, it, 1),
        lambda it: at.score(it, ["a"]),
        lambda it: at.embed([it], []),
    ):
        with pytest.raises(UserError) as caught:
            ask(given)
        assert said in caught.value.message
        assert caught.value.hint


def test_the_formats_of_uploads_are_read(at: Desk) -> None:
    for form in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "AVIF"):
        assert desk.decode(saved(form)).size == (30, 30)
    assert len(at.embed([saved("PNG"), saved("TIFF")], ["a"])[0]) == 2


def test_a_text_is_bounded_for_those_who_ask_without_the_page(at: Desk) -> None:
    with pytest.raises(UserError, match="a text of 2,001 characters"):
        at.search("x" * (desk.TEXT + 1), None, 3)


def test_captions_like_a_picture_of_the_index(at: Desk, sample: served.Sample) -> None:
    (one,) = at.like(at.search(None, sample.picture(3).read_bytes(), 1)[0].id, 1, kind="captions")
    assert one == at.search(None, sample.picture(3).read_bytes(), 1, kind="captions")[0]


def test_a_claim_is_refused_before_a_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Image.Image) -> Image.Image:
        raise AssertionError

    bomb = png(7200, 7000)
    monkeypatch.setattr(images, "normalise", never)
    assert len(bomb) < 200_000
    with pytest.raises(UserError, match="claims"):
        desk.decode(bomb)


def test_a_message_loses_whole_folders_and_no_words(sample: served.Sample, tmp_path: Path) -> None:
    """An index that is called `index` is in every message; where pictures were moved to is in none."""
    moved = shutil.copytree(sample.root, tmp_path / "elsewhere" / "root")
    there = Desk(Index.open(sample.index, roots=[moved / "train" / "imgs"] * len(Index.open(sample.index).roots)))
    row = there.search("cell", None, 1)[0].id
    shutil.rmtree(moved)
    with pytest.raises(UserError) as caught:
        there.image(row, thumb=True)
    assert str(tmp_path) not in caught.value.lines()
    object.__setattr__(there.index, "folder", Path("index"))
    with pytest.raises(UserError, match="the index has no picture"):
        there.like(10**12, 3)


def test_messages_name_no_folder_of_this_machine(at: Desk, sample: served.Sample, tmp_path: Path) -> None:
    said = []
    for ask in (
        lambda: at.search("cell", None, 3, where={"labels": "x"}),
        lambda: at.search("cell", None, 3, where={"label": "koilo"}),
        lambda: at.like(10**12, 3),
        lambda: at.image(10**12, thumb=True),
        lambda: at.search("cell <end> cell", None, 3),
    ):
        with pytest.raises(UserError) as caught:
            ask()
        said.append((type(caught.value), caught.value.lines()))
    assert [kind is desk.UnknownRow for kind, _ in said] == [False, False, True, True, False]
    assert not [lines for _, lines in said if "/" in lines.replace("</", "")]
    assert "did you mean label?" in said[0][1]


def test_a_picture_that_is_gone_or_changed_or_led_away_is_not_shown(sample: served.Sample, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(sample.picture(number + 1).read_bytes())
    at = Desk(Index.build(sample.model, root, tmp_path / "index"))
    number = {hit.name: hit.id for hit in at.search("cell", None, 4)}
    secret = tmp_path / "secret.png"
    secret.write_bytes((root / "1.png").read_bytes())
    (root / "0.png").unlink()
    (root / "1.png").unlink()
    (root / "1.png").symlink_to(secret)  # the same bytes, but out of the root
    (root / "2.png").write_bytes(sample.picture(9).read_bytes())
    for name in ("0.png", "1.png", "2.png"):
        with pytest.raises(desk.UnknownRow) as caught:
            at.image(number[name], thumb=False)
        assert str(tmp_path) not in caught.value.lines()
    assert at.image(number["3.png"], thumb=False)


def test_pictures_are_handed_out_as_small_jpegs_without_metadata(sample: served.Sample, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    large = Image.open(sample.picture(1)).convert("RGB").resize((3000, 1500))
    told = Image.Exif()
    told[0x010E] = "Jane Doe, 12.3.1950"
    large.save(root / "named.jpg", exif=told)
    at = Desk(Index.build(sample.model, root, tmp_path / "index"))
    row = at.search("cell", None, 1)[0].id
    for thumb, size in ((True, (256, 128)), (False, (2048, 1024))):
        made = at.image(row, thumb)
        shown = Image.open(io.BytesIO(made))
        assert (shown.format, shown.size) == ("JPEG", size)
        assert b"Jane Doe" not in made
        assert not shown.getexif()
    (root / "named.jpg").unlink()
    assert at.image(row, thumb=True)  # kept


def test_what_is_kept_is_bounded_and_the_oldest_goes_first() -> None:
    kept = Kept(100)
    for number in range(10):
        kept.put(str(number), b"x" * 30)
        kept.get("0")  # used again and again: it stays
    assert [name for name in map(str, range(10)) if kept.get(name)] == ["0", "8", "9"]
    kept.put("large", b"x" * 101)
    assert not [name for name in (*map(str, range(10)), "large") if kept.get(name)]
    kept.put("0", b"x" * 60)
    kept.put("0", b"x" * 60)
    kept.put("1", b"x" * 40)
    assert kept.get("0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: kept.put(str(number % 7), bytes(number % 50)), range(2000)))
    assert sum(len(kept.get(str(number)) or b"") for number in range(7)) <= 100


def test_a_picture_that_is_not_held_any_more_says_so(at: Desk) -> None:
    with pytest.raises(UserError, match="not held any more"):
        at.held("somebody else's")


def test_no_more_than_two_are_worked_on_at_once(at: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    decode = desk.decode

    def noting(given: bytes) -> Image.Image:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        decoded = decode(given)
        with lock:
            running -= 1
        return decoded

    monkeypatch.setattr(desk, "decode", noting)
    given = png(400, 400)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(at.take, [given] * 24))
    assert most == at.at_once == 2


@pytest.mark.parametrize(
    ("name", "shown"),
    [("openai/clip-vit", "openai/clip-vit"), ("/home/x/runs/first/best", "first"), ("/models/cyto", "cyto")],
)
def test_a_model_is_named_without_its_folders(name: str, shown: str) -> None:
    assert desk.model_name(name) == shown
