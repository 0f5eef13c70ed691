"""A model from Python gives what evaluation gives, whatever a picture comes as, from as many threads as there are."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cytoclip
from cytoclip import batches, checkpoint, device, encode, evaluation
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.errors import UserError

PIXEL = np.zeros((3, 3), np.uint8)
FAMILIES = ["clip", "siglip", "siglip2", "chinese_clip", "two towers"]


@pytest.fixture(scope="module")
def pictures(root: Path) -> list[Path]:
    return sorted((root / "val" / "imgs").iterdir())


@pytest.fixture(scope="module")
def encoder(base: Path) -> Encoder:
    return cytoclip.load(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_vectors_as_evaluation(family: str, bases: dict[str, Path], root: Path) -> None:
    """The twin is the road of `cytoclip evaluate`: loader processes, tokens by length, collected rows."""
    pairs = batches.open_split(root / "val", Console(quiet=True))
    opened = checkpoint.open_model(str(bases[family]))
    world = device.World(torch.device("cpu"))
    image_ND, text_ND = encode.encode(
        opened.encoder, pairs, evaluation.reading(opened, pairs, 7, 0), world, Console(quiet=True)
    )
    loaded = cytoclip.load(bases[family])
    assert np.allclose(loaded.embed_images(list(pairs.images), batch_size=6), image_ND.numpy(), atol=1e-6)
    assert np.allclose(loaded.embed_texts(pairs.captions, batch_size=3), text_ND.numpy(), atol=1e-6)
    assert len(pairs) == 20
    assert loaded.width == image_ND.shape[1]


def test_a_picture_may_come_in_any_form(encoder: Encoder, pictures: list[Path]) -> None:
    one = pictures[3]
    with Image.open(one) as opened:
        plain = opened.convert("RGB")
    forms = [one, str(one), one.read_bytes(), plain, np.asarray(plain)]
    rows_5D = encoder.embed_images(forms)
    assert rows_5D.dtype == np.float32
    assert np.allclose(rows_5D, rows_5D[0], atol=1e-6)
    assert np.allclose(encoder.embed_images(one), rows_5D[:1], atol=1e-6), "one picture instead of a list"
    grey_HW = np.asarray(plain.convert("L"))
    assert np.allclose(encoder.embed_images(grey_HW), encoder.embed_images(np.stack([grey_HW] * 3, -1)))
    assert np.allclose(np.linalg.norm(rows_5D, axis=1), 1, atol=1e-6)


def test_pictures_may_come_one_after_another_or_as_one_array(encoder: Encoder, pictures: list[Path]) -> None:
    rows_3D = encoder.embed_images(pictures[:3])
    names = [str(path) for path in pictures[:3]]
    for form in (iter(names), dict.fromkeys(names), np.array(names), np.array(pictures[:3])):
        assert np.allclose(encoder.embed_images(form, batch_size=2), rows_3D, atol=1e-6)
    with Image.open(pictures[0]) as opened:
        one_HW3 = np.asarray(opened.convert("RGB"))
    assert np.allclose(encoder.embed_images(np.stack([one_HW3, one_HW3])), rows_3D[[0, 0]], atol=1e-6)
    grey_HW = one_HW3[..., 0]
    assert np.allclose(encoder.embed_images(grey_HW[..., None]), encoder.embed_images(grey_HW), atol=1e-6)
    assert encoder.embed_texts(word for word in ["a cell", "debris"]).shape == (2, encoder.width)


def test_a_generator_is_asked_for_a_batch_at_a_time(encoder: Encoder, pictures: list[Path]) -> None:
    """Its pictures may be decoded ones, of which all at once would be too many."""
    asked: list[int] = []

    def one_by_one() -> Iterator[Path]:
        for path in pictures[:6]:
            asked.append(len(embedded))
            yield path

    embedded: list[int] = []
    whole = type(encoder).embed_pixels
    watched = dataclasses.replace(encoder)
    object.__setattr__(watched, "embed_pixels", lambda rows: (embedded.append(len(rows)), whole(encoder, rows))[1])
    watched.embed_images(one_by_one(), batch_size=2)
    assert embedded == [2, 2, 2]
    assert asked == [0, 0, 1, 1, 2, 2]


def test_it_shows_as_one_line(encoder: Encoder, base: Path) -> None:
    assert repr(encoder) == f"<Encoder {base.resolve()} on cpu, precision no, {encoder.width} dimensions>"


def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, encoder.width)


def test_similarity_and_probabilities(encoder: Encoder, bases: dict[str, Path], pictures: list[Path]) -> None:
    texts = ["a round cell", "many small cells", "debris"]
    cosines_23 = encoder.similarity(pictures[:2], texts)
    assert np.allclose(cosines_23, encoder.embed_images(pictures[:2]) @ encoder.embed_texts(texts).T)
    odds = np.exp(cosines_23.astype(np.float64) * encoder.logit_scale)
    assert np.allclose(encoder.probabilities(pictures[:2], texts), odds / odds.sum(1, keepdims=True), atol=1e-5)
    siglip = cytoclip.load(bases["siglip"])
    assert siglip.logit_bias == pytest.approx(-12.9)
    logits = siglip.similarity(pictures[:2], texts) * siglip.logit_scale - 12.9
    assert np.allclose(siglip.probabilities(pictures[:2], texts), 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_threads_do_not_disturb_each_other(encoder: Encoder, pictures: list[Path]) -> None:
    """A tokenizer that one thread tells to cut while another uses it raises, or cuts what should stay whole."""
    texts = [f"cell {i} " * (1 + i % 40) for i in range(32)]
    alone_ND = np.concatenate([encoder.embed_texts(text) for text in texts])
    images_ND = np.concatenate([encoder.embed_images(pictures[i % 20]) for i in range(32)])

    def both(i: int) -> tuple[np.ndarray, np.ndarray]:
        return encoder.embed_texts(texts[i])[0], encoder.embed_images(pictures[i % 20])[0]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(both, range(32)))
    assert np.allclose(np.stack([text for text, _ in made]), alone_ND, atol=1e-6)
    assert np.allclose(np.stack([image for _, image in made]), images_ND, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"no picture at all", "a picture"),
        (np.zeros((3, 3, 7), np.uint8), "an array of uint8 (3, 3, 7)"),
        (np.zeros((4, 4)), "an array of float64 (4, 4)"),
        (np.zeros((0, 4), np.uint8), "an array of uint8 (0, 4)"),
        (np.zeros(4, np.uint8), "an array of uint8 (4,)"),
        ("nowhere.png", "nowhere.png: no such file"),
        ("n" * 5000, f"{'n' * 100}…: no such file"),
        (["nowhere\0.png"], "nowhere\0.png: no such file"),
        (None, "row 0 is None, no picture"),
        ([PIXEL, None], "row 1 is None, no picture"),
        (range(3), "row 0 is 0, no picture"),
        ([torch.zeros(3, 40, 40)], "row 0 is tensor([[[0., 0."),
        ("https://example.org/a.png", "'https://example.org/a.png' is an address, and addresses are not fetched"),
    ],
)
def test_what_is_no_picture_is_named(encoder: Encoder, given: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        encoder.embed_images(given)  # type: ignore[arg-type]
    assert caught.value.message.startswith(said)
    assert len(caught.value.message) < 150
    assert "JSON" not in caught.value.hint


def test_a_name_that_is_nearly_right_is_told(encoder: Encoder, pictures: list[Path]) -> None:
    with pytest.raises(UserError) as caught:
        encoder.embed_images(pictures[0].with_suffix(".pgn"))
    assert caught.value.hint.startswith(f"did you mean {pictures[0].parent}/")


@pytest.mark.parametrize(
    ("given", "said"),
    [(["a cell", None], "row 1 is None"), ([float("nan")], "row 0 is nan"), (None, "row 0 is None"), (7, "row 0 is 7")],
)
def test_what_is_no_text_is_named(encoder: Encoder, given: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"{said}, no text"):
        encoder.embed_texts(given)


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_a_batch_has_a_size(encoder: Encoder, size: Any) -> None:
    for embed in (encoder.embed_texts, encoder.embed_images):
        with pytest.raises(UserError, match=f"batch_size {size} is no whole number"):
            embed(["x"], batch_size=size)


def test_digest_tells_weights_tokenizers_and_precisions_apart(
    base: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    # siglip and siglip2 have the same weights here, and other words
    digests = {cytoclip.load(folder).digest for folder in bases.values()}
    assert len(digests) == len(bases) == 5
    assert cytoclip.load(base).digest in digests
    assert cytoclip.load(base, precision="bf16").digest not in digests
    # what no weight shows: another activation computes another embedding
    other = shutil.copytree(base, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["text_config"]["hidden_act"] = "gelu"
    (other / "config.json").write_text(json.dumps(settings))
    assert cytoclip.load(other).digest not in digests


def test_formats_of_a_caller(base: Path, root: Path, pictures: list[Path]) -> None:
    buffer = io.BytesIO()
    with Image.open(pictures[0]) as opened:
        opened.convert("RGB").save(buffer, "BMP")
    loaded = cytoclip.load(str(base))
    assert (loaded.embed_images(buffer.getvalue()) == loaded.embed_images(pictures[0])).all()
    assert json.loads((root / "val" / "img_text_pair.json").read_text())[0]["img"] == pictures[0].name


def test_import_is_light_and_names_come_on_first_use() -> None:
    program = (
        "import sys, cytoclip; assert 'torch' not in sys.modules; assert dir(cytoclip) == sorted(cytoclip.__all__);"
        "from cytoclip import load, train, evaluate; import cytoclip.training, cytoclip.evaluation;"
        "assert callable(cytoclip.train) and callable(cytoclip.evaluate) and callable(cytoclip.load); print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cytoclip.trian  # noqa: B018
