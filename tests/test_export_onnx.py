"""ONNX files against the towers they were made from: any batch, any length, three precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import cytoclip
from cytoclip import checkpoint, export, export_onnx
from cytoclip.captions import tokenise
from cytoclip.console import Console
from cytoclip.errors import UserError
from tests import tiny
from tests.test_export import ran

QUIET = Console(quiet=True)


@pytest.mark.parametrize("family", ["clip", "siglip", pytest.param("chinese_clip", marks=pytest.mark.slow)])
def test_any_number_of_rows_and_tokens(bases: dict[str, Path], tmp_path: Path, root: Path, family: str) -> None:
    """Of a causal text tower, and of one that is padded to its context."""
    done = exported(bases[family], tmp_path / "out")
    of_any_size(tmp_path / "out", checkpoint.open_model(str(bases[family])))
    the_code_of_the_card(tmp_path / "out", bases[family], root / "val" / "imgs" / "003.png")
    if family == "clip":
        precisions_are_what_they_say(tmp_path / "out", done)


def test_weights_beyond_one_file_and_then_a_broken_one(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protobuf ends at 2 GiB; here so much earlier that a tiny checkpoint, with a mask in its text tower, is beyond."""
    monkeypatch.setattr(export_onnx, "_LARGE", 1000)
    towers, out = bases["two towers"], tmp_path / "out"
    done = exported(towers, out)
    beside = {path.name for path in out.glob("*.data")}
    names = {export_onnx.file(side, precision) for side in ("image", "text") for precision in export_onnx.PRECISIONS}
    assert beside == {f"{name}.data" for name in names}
    assert done.parts[0].size > 350_000
    of_any_size(out, checkpoint.open_model(str(towers)))

    def broken(_: Any, folder: Path, __: Any) -> None:
        for file in out.glob("*"):
            (folder / file.name).write_bytes(file.read_bytes())
        weights = (folder / "image.onnx.data").read_bytes()
        (folder / "image.onnx.data").write_bytes(bytes(len(weights) // 2) + weights[len(weights) // 2 :])

    monkeypatch.setattr(export_onnx, "write", broken)
    with pytest.raises(UserError, match="the export to onnx fp32 gives other embeddings"):
        export.export(str(towers), tmp_path / "again", "onnx", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def exported(model: Path, to: Path) -> export.Exported:
    done = export.export(str(model), to, "onnx", QUIET)
    assert [part.title for part in done.parts] == ["fp32", "fp16", "int8"]
    assert min(done.parts[0].image, done.parts[0].text) > 0.999999
    assert min(done.parts[2].image, done.parts[2].text) > 0.99  # signed weights: 0.84 on a processor without VNNI
    return done


def the_code_of_the_card(folder: Path, model: Path, picture: Path) -> None:
    said = ran(folder, picture)
    assert np.abs(said["cosines"] - cytoclip.load(model).similarity([picture], tiny.CAPTIONS)).max() < 1e-5


def of_any_size(folder: Path, opened: checkpoint.Opened) -> None:
    encoder = opened.encoder.eval()
    images, texts = (onnxruntime.InferenceSession(str(folder / f"{side}.onnx")) for side in ("image", "text"))
    drawn = torch.Generator().manual_seed(0)
    for rows in (1, 2, 7):
        pixels = torch.randint(0, 256, (rows, 3, *encoder.image_size), generator=drawn, dtype=torch.uint8)
        (found,) = images.run(["image_embeds"], {"pixel_values": encoder.to_floats(pixels).numpy()})
        with torch.no_grad():
            assert np.abs(found - encoder.images(pixels).numpy()).max() < 1e-5
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    for captions in (["cell"], tiny.CAPTIONS, [tiny.CAPTIONS[1] * 30, "cell"]):
        ids = tokenise(opened.tokenizer, captions, opened.context, encoder.family).batch(range(len(captions)))
        (found,) = texts.run(["text_embeds"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            assert np.abs(found - encoder.texts(ids).numpy()).max() < 1e-5
    inputs = [one for side in ("image", "text") for one in onnx.load(folder / f"{side}.onnx").graph.input]
    said = [[dim.dim_param or dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in inputs]
    tokens = opened.context if encoder.family.pads == "context" else "tokens"
    assert said == [["batch", 3, 32, 32], ["batch", tokens]]


def precisions_are_what_they_say(folder: Path, done: export.Exported) -> None:
    kinds = {}
    for precision in export_onnx.PRECISIONS:
        model = onnx.load(folder / export_onnx.file("text", precision))
        onnx.checker.check_model(model)
        assert {one.domain: one.version for one in model.opset_import}[""] == export_onnx.OPSET
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        sizes: dict[str, int] = {}
        for tensor in model.graph.initializer:
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            sizes[kind] = sizes.get(kind, 0) + int(np.prod(tensor.dims))
        kinds[precision] = max(sizes, key=lambda kind: sizes[kind])
    assert kinds == {"fp32": "FLOAT", "fp16": "FLOAT16", "int8": "UINT8"}
    for part in done.parts:
        assert part.change["image_to_text"].keys() == {"hit@1", "hit@10"}
    rows = {line.split()[0] for line in done.text().splitlines()[2:]}
    assert rows == {"fp32", "fp16", "int8"}
    assert "opset 20" in done.text()
    assert "64 drawn cells" in (folder / "README.md").read_text()
