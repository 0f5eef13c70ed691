"""A model from Python gives what evaluation gives, whatever a picture comes as, from as many threads as there are."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cytoclip
from cytoclip import batches, checkpoint, device, encode, evaluation
from cytoclip.console import Console
from cytoclip.encoder import Encoder
from cytoclip.errors import UserError

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
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_what_is_no_picture_is_named(encoder: Encoder, given: object, said: str) -> None:
    with pytest.raises(UserError) as caught:
        encoder.embed_images(given)  # type: ignore[arg-type]
    assert caught.value.message.startswith(said)


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
