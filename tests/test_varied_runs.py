"""Runs with data.augment: the same pictures in any chunks, from any loader, from the cache, from afar."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cytoclip import augment, batches, checkpoint, images, loss, sources, training
from cytoclip.augment import Variation
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.data_options import Augment
from cytoclip.device import World
from cytoclip.errors import UserError
from cytoclip.order import Wording
from cytoclip.pairs import spread
from cytoclip.pictures import Pictures, Varied
from cytoclip.pixels import prepare
from cytoclip.rows import Columns
from cytoclip.sides import names_side
from tests.numerics import gradients_of_one_rank as one_rank
from tests.test_effects import log, losses, ran
from tests.test_streams import picture, planned, reader, write_tar

Experiment = Callable[..., Config]
QUIET = Console(quiet=True)
PRESET = {"preset": "microscopy"}


def test_a_run_is_the_same_in_any_chunks_and_whoever_reads(experiment: Experiment, tmp_path: Path) -> None:
    varied = ran(experiment, tmp_path, "varied", data={"augment": PRESET})
    again = ran(experiment, tmp_path, "again", data={"augment": PRESET, "workers": 2})
    kept = ran(experiment, tmp_path, "kept", data={"augment": PRESET, "cache": True})
    filled = ran(experiment, tmp_path, "filled", data={"augment": PRESET, "cache": True})
    assert losses(varied) == losses(again) == losses(kept) == losses(filled)
    chunked = ran(experiment, tmp_path, "chunked", data={"augment": PRESET}, train={"micro_batch_size": 5})
    assert losses(chunked) == pytest.approx(losses(varied), abs=1e-4)
    plain = ran(experiment, tmp_path, "plain")
    assert losses(varied)[0] != pytest.approx(losses(plain)[0], abs=1e-4)
    assert not (Path(plain.output) / "varied.png").exists()


def test_its_first_pictures_are_drawn_and_sides_are_said(
    experiment: Experiment, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ran(experiment, tmp_path, "varied", data={"augment": {"rotation": "right"}})
    sheet = Image.open(Path(wanted.output) / "varied.png")
    side = checkpoint.open_model(wanted.model.name).pixels.size[0]
    assert sheet.size[0] > 8 * side
    assert sheet.size[1] > 2 * side
    assert "no caption names a side (left, upper, …), so all pictures are turned" in log(wanted)
    said = replace(sources.read(root / "train", Columns(), QUIET), captions=("on the left", *["a cell"] * 46, "above"))
    monkeypatch.setattr("cytoclip.intake.sources.read", lambda *_: said)
    monkeypatch.setattr("cytoclip.intake.leaks.warnings", lambda _: [])
    sided = ran(experiment, tmp_path, "sided", data={"augment": {"flips": True}}, train={"steps": 1})
    assert "2 of 48 captions name a side" in log(sided)
    coloured = ran(experiment, tmp_path, "coloured", data={"augment": {"hue": 0.1}})
    assert "name a side" not in log(coloured)


def test_the_anchor_sees_what_the_model_sees(experiment: Experiment, tmp_path: Path) -> None:
    """At the first step model and start are one: what pulls them together is nothing, unless they see other pixels."""
    anchored = ran(experiment, tmp_path, "anchored", data={"augment": PRESET}, train={"anchor": {"embeddings": 10.0}})
    free = ran(experiment, tmp_path, "free", data={"augment": PRESET})
    assert losses(anchored)[0] == losses(free)[0]
    assert losses(anchored)[1:] != losses(free)[1:]


@pytest.mark.parametrize("chunk", [48, 16, 7, 1])
def test_gradients_are_those_of_the_whole_batch(chunk: int, base: Path) -> None:
    """Twin: the pictures are changed beforehand, all at once."""
    encoder = one_rank.encoder_of(base, ("full", "full"))
    pixels, tokens = one_rank.inputs(encoder)
    of = Variation(Augment(**PRESET, rotation="any"), encoder.image_size, 0)  # type: ignore[arg-type]
    rows = torch.stack([of.draw(pair, 0) for pair in range(48)])
    identity, logits = one_rank.identity_of(True), loss.Logits(encoder.logit_scale)
    found = []
    for shown, inputs in (
        (augment.seen_by(encoder, of), (pixels, tokens, rows)),
        (augment.seen_by(encoder, None), (of.apply(pixels, rows), tokens)),
    ):
        encoder.zero_grad()
        pieces = [part.split(chunk if len(inputs) == 3 else 48) for part in inputs]
        loss.contrastive_step(shown, logits, list(zip(*pieces, strict=True)), identity, World(torch.device("cpu")))
        found.append({name: parameter.grad.clone() for name, parameter in encoder.moving().items()})
    assert len(found[0]) > 30
    for name, value in found[1].items():
        assert torch.allclose(found[0][name], value, rtol=0, atol=1e-10), name


def test_what_comes_from_afar_is_varied_by_pair_and_epoch(tmp_path: Path) -> None:
    write_tar(tmp_path / "000.tar", {name: data for i in range(3) for name, data in (
        (f"{i}.png", picture(i)), (f"{i}.txt", b"on the left" if i == 1 else b"a nucleus"))})  # fmt: skip
    of = Variation(Augment(rotation="any"), (8, 8), 3)
    plan = replace(planned(tmp_path), shards=[f"file://{tmp_path}/000.tar"], each=3, variation=of)
    one, again = (next(reader(plan, 0, 1)) for _ in range(2))
    assert one.batch.changes is not None
    assert torch.equal(one.batch.changes, again.batch.changes)  # type: ignore[arg-type]
    for name, pair, row in zip(one.names, one.batch.indices, one.batch.changes, strict=True):
        assert torch.equal(row, of.draw(int(pair), 0, upright=name.endswith(" 1")))
    assert isinstance(one.batch, batches.Batch)
    assert len(one.batch.chunks(2)[0]) == 3


def test_a_frozen_image_tower_sees_no_changes(experiment: Experiment) -> None:
    with pytest.raises(UserError, match=r"data\.augment varies pictures, and a frozen image tower"):
        experiment(data={"augment": PRESET}, model={"image_tower": "frozen"})


# data.reduced_decode


def photograph(size: tuple[int, int], turned: int | None = None) -> bytes:
    """A JPEG with the detail of a micrograph in focus: blurred noise at several scales."""
    random, field = np.random.default_rng(0), np.zeros((size[1], size[0], 3))
    for scale in (8, 32, 128):
        coarse = random.uniform(0, 255, (size[1] // scale + 1, size[0] // scale + 1, 3)).astype(np.uint8)
        field += np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float64) / 3
    written, exif = io.BytesIO(), Image.Exif()
    if turned:
        exif[274] = turned
    Image.fromarray(field.astype(np.uint8)).save(written, "JPEG", quality=90, exif=exif)
    return written.getvalue()


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [((1024, 768), 224, (512, 384)), ((1024, 768), 96, (128, 96)), ((1024, 768), 97, (256, 192)),
     ((360, 363), 224, (360, 363)), ((800, 450), 225, (400, 225)), ((801, 451), 225, (401, 226))],
)  # fmt: skip
def test_a_jpeg_is_decoded_no_smaller_than_is_needed(size: Any, least: int, expected: tuple[int, int]) -> None:
    assert images.decode(photograph(size), least).size == expected
    assert images.decode(photograph(size)).size == size
    assert images.decode(photograph(size, turned=6), least).size == expected[::-1]


def test_reduced_pixels_are_nearly_those_of_a_full_decode(base: Path) -> None:
    spec = replace(checkpoint.open_model(str(base)).pixels.fitted("center"), resize=224, crop=(224, 224))
    data = photograph((1024, 768))
    full, reduced = (prepare(images.decode(data, least), spec).astype(np.int64) for least in (None, spec.shortest_read))
    assert 0 < np.abs(full - reduced).mean() < 1
    other = io.BytesIO()
    Image.open(io.BytesIO(data)).save(other, "PNG")
    assert images.decode(other.getvalue(), 224).size == (1024, 768), "only a JPEG has it"


def test_only_training_pictures_are_decoded_smaller(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[bool, set[int | None]] = {True: set(), False: set()}
    whole = images.decode

    def noting(place: Any, at_least: int | None = None) -> Image.Image:
        asked["val" in str(place)].add(at_least)
        return whole(place, at_least)

    monkeypatch.setattr(images, "decode", noting)
    wanted = ran(experiment, tmp_path, "reduced", data={"augment": PRESET, "reduced_decode": True, "workers": 0})
    spec = checkpoint.open_model(wanted.model.name).pixels
    assert asked == {True: {None}, False: {spec.widened(1 / 0.6**0.5).shortest_read}}
    assert spec.shortest_read is not None


def test_reduced_pictures_are_kept_apart(base: Path) -> None:
    spec = checkpoint.open_model(str(base)).pixels
    settings = {Pictures([], one, reduced=reduced).settings for one in (spec, spec.widened(1.2)) for reduced in (0, 1)}
    assert len(settings) == 4


def test_a_dry_run_draws_nothing(experiment: Experiment, tmp_path: Path) -> None:
    wanted = experiment(output=str(tmp_path / "run"), data={"augment": PRESET})
    training.dry_run(wanted, QUIET)
    assert not (tmp_path / "run").exists()


def test_a_pairs_change_is_that_of_its_epoch_of_its_caption_and_of_who_stands_in(root: Path, base: Path) -> None:
    pairs = batches.open_split(root / "val", QUIET)
    pairs = replace(
        pairs,
        more=(("on the left", "above it"), *[()] * 19),
        images=(*pairs.images[:3], root / "none.png", *pairs.images[4:]),
    )
    of, wording = Variation(Augment(rotation="any"), (8, 8), 3), Wording.of(pairs, seed=0)
    sided = np.array([names_side(caption) for caption in spread(pairs).captions])
    assert sided.tolist() == [False, True, True, *[False] * 19]
    pictures = Pictures(pairs.images, checkpoint.open_model(str(base)).pixels, varied=Varied(of, wording, sided))
    upright = []
    for epoch in range(6):
        drawn = pictures[0, epoch]
        caption = int(wording.rows(np.array([0]), np.array([epoch]))[0])
        upright.append(caption in (1, 2))
        assert drawn.change is not None
        assert torch.equal(drawn.change, of.draw(0, epoch, upright=upright[-1]))
    assert sum(upright) == 4
    instead = pictures[3, 5, 2]
    assert instead.draw == (2, 5)
    assert torch.equal(instead.change, of.draw(2, 5))  # type: ignore[arg-type]
