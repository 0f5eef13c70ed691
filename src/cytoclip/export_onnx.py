"""ONNX: the image and the text encoder apart, in float32, float16 and with 8-bit weights.

Letters: B pictures or texts, H×W pixels, L tokens, D embedding.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer

from cytoclip import checkpoint, yardstick
from cytoclip.checkpoint import Opened
from cytoclip.errors import ExitCode, UserError, first_line
from cytoclip.model import DualEncoder
from cytoclip.yardstick import Yardstick, over

OPSET = 20  # the first with Gelu as one operator
PRECISIONS = ("fp32", "fp16", "int8")
SIDES = {"image": "pixel_values", "text": "input_ids"}  # and the names of their inputs
_FEATURES = "features_not_unit"
_LARGE = 1_800_000_000  # bytes; a file of protobuf ends at 2 GiB, and the rest goes into a file beside
_HALF_BYTES = 2
# To 8 bits go the weights of matrix products and embedding tables; a convolution of patches is too few to matter, and
# its integer kernel is not in every runtime.
_EIGHT_BIT = ("MatMul", "Gemm", "Gather")


def file(side: str, precision: str) -> str:
    return f"{side}.onnx" if precision == "fp32" else f"{side}.{precision}.onnx"


def write(opened: Opened, folder: Path, advance: Callable[[int], None]) -> None:
    """Fill `folder`; `advance` hears of each of the six files.

    Raises
    ------
    UserError
        Where onnx, onnxscript or onnxruntime is not installed, or the exporter cannot read a tower.
    """
    _libraries()
    for side in SIDES:
        traced = _traced(opened, side)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in traced.state_dict().values())
        plain = _exported(traced, _example(opened, side), opened, side)
        _save(plain, folder / file(side, "fp32"), large=weights > _LARGE)
        advance(1)
        _save(_halved(plain), folder / file(side, "fp16"), large=weights // _HALF_BYTES > _LARGE)
        advance(1)
        del plain, traced
        _quantize(folder, side, large=weights > _LARGE)
        advance(1)
    checkpoint.fill_reading(folder, opened)


def embed(
    folder: Path, precision: str, held: Yardstick, advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The pairs of `held` as onnxruntime embeds them on the CPU: (image, text), float32 (N, D).

    In fp32 they are read by the image processor and the tokenizer of the folder, too.
    """
    _, runtime = _libraries()
    feeds = _read_by(folder, held) if precision == "fp32" else {"image": held.floats, "text": held.ids}
    found = []
    for side, name in SIDES.items():
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = runtime.InferenceSession(
            str(folder / file(side, precision)), options, providers=["CPUExecutionProvider"]
        )
        feed = feeds[side]
        found.append(
            over(len(held), lambda some, s=session, n=name, f=feed: s.run(None, {n: f(some).numpy()})[0], advance)  # type: ignore[misc]
        )
        del session
    return found[0], found[1]


def usage(opened: Opened) -> str:
    """Code that embeds a picture and some captions."""
    return f"""import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
tokenizer = AutoTokenizer.from_pretrained(folder)
images = onnxruntime.InferenceSession(f"{{folder}}/image.onnx")  # or image.fp16.onnx, image.int8.onnx
captions = onnxruntime.InferenceSession(f"{{folder}}/text.onnx")

pixels = processor(images=[Image.open(picture).convert("RGB")], return_tensors="np")["pixel_values"]
ids = tokenizer({yardstick.reading(opened)}, return_tensors="np")
image = images.run(None, {{"pixel_values": pixels}})[0]
text = captions.run(None, {{"input_ids": ids["input_ids"].astype(np.int64)}})[0]
cosines = image @ text.T"""


class _Image(nn.Module):
    """float32 (B, 3, H, W), normalised as the image processor does it → features (B, D)."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.clip, self.encoder = encoder.clip, [encoder]  # in a list: no module twice under two names

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.encoder[0].image_tower(pixel_values=pixel_values).pooler_output
        return self.encoder[0].projected(features, 0)


class _Text(nn.Module):
    """int64 token ids (B, L) → features (B, D); a masked tower tells the padding by its id."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.clip, self.encoder = encoder.clip, [encoder]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder[0].projected(self.encoder[0].text_features(input_ids), 1)


def _read_by(folder: Path, held: Yardstick) -> dict[str, Callable[[slice], torch.Tensor]]:
    processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)

    def images(some: slice) -> torch.Tensor:
        floats: torch.Tensor = processor(images=held.shown(some), return_tensors="pt")["pixel_values"]
        return floats

    def texts(some: slice) -> torch.Tensor:
        ids: torch.Tensor = held.read_by(tokenizer, some)["input_ids"]
        return ids

    return {"image": images, "text": texts}


def _traced(opened: Opened, side: str) -> nn.Module:
    return (_Image if side == "image" else _Text)(opened.encoder).eval()


def _example(opened: Opened, side: str) -> torch.Tensor:
    """Two rows, so that one is not taken for all there ever are."""
    if side == "image":
        return torch.zeros(2, 3, *opened.encoder.image_size)
    rows = opened.tokenizer(["a cell", "a cell"])["input_ids"]
    if opened.encoder.family.pads == "context":
        return torch.tensor([(row + [opened.encoder.pad] * opened.context)[: opened.context] for row in rows])
    return torch.tensor(rows)


def _exported(traced: nn.Module, example: torch.Tensor, opened: Opened, side: str) -> Any:
    """The model as ONNX, whose last operator makes its rows unit: in float32 whatever comes before it."""
    dynamic = {0: "batch"}
    if side == "text" and opened.encoder.family.pads == "longest":
        dynamic[1] = "tokens"
    try:
        with _quiet(), _torch_as_it_began():
            program = torch.onnx.export(
                traced,
                (example,),
                dynamo=True,
                input_names=[SIDES[side]],
                output_names=[_FEATURES],
                dynamic_shapes=(dynamic,),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(
            f"torch's ONNX exporter cannot read the {side} tower: {_last_words(error)}",
            "export it as hf instead",
            ExitCode.MODEL,
        ) from error
    assert program is not None  # noqa: S101 - with dynamo there is one
    return _made_unit(program.model_proto, f"{side}_embeds")


def _last_words(error: BaseException) -> str:
    """Of what it came from: the exporter's own text is advice to those who write models."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _made_unit(proto: Any, name: str) -> Any:
    onnx, _ = _libraries()
    (features,) = proto.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in features.type.tensor_type.shape.dim]
    proto.graph.node.append(onnx.helper.make_node("LpNormalization", [_FEATURES], [name], axis=-1, p=2, name=name))
    del proto.graph.output[:]
    proto.graph.value_info.append(features)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    return proto


def _halved(proto: Any) -> Any:
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    # Resize (of position embeddings) has no kernel for float16 on CPUs, and rows are made unit in float32
    kept = [*float16.DEFAULT_OP_BLOCK_LIST, "Resize", "LpNormalization"]
    with _quiet():  # the exporter has said every shape; inferring them again fails above 2 GiB
        halved = float16.convert_float_to_float16(
            proto, keep_io_types=True, op_block_list=kept, disable_shape_infer=True
        )
        OnnxModel(halved).topological_sort()  # it puts its casts at the end
    return halved


def _quantize(folder: Path, side: str, large: bool) -> None:
    """Weights to 8 bits, a scale for each output channel; activations are measured as they come (dynamic).

    Weights are unsigned as activations are: a processor that multiplies bytes without VNNI adds two products of
    unsigned by signed in 16 bits, which overflow (a cosine of 0.84 where this gives 0.9996: docs/log.md, 2026-11-26).
    """
    from onnxruntime import quantization

    with _quiet():
        quantization.quantize_dynamic(
            folder / file(side, "fp32"),
            folder / file(side, "int8"),
            op_types_to_quantize=list(_EIGHT_BIT),
            per_channel=True,
            weight_type=quantization.QuantType.QUInt8,
            use_external_data_format=large,
        )


def _save(proto: Any, path: Path, large: bool) -> None:
    onnx, _ = _libraries()
    if large:
        onnx.save(proto, path, save_as_external_data=True, location=f"{path.name}.data")
        onnx.load_external_data_for_model(proto, str(path.parent))  # it was moved out of what is converted next
    else:
        onnx.save(proto, path)


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter asks for it
    except ImportError as error:
        raise UserError(
            f"--format onnx needs {error.name}, which is not installed",
            "pip install 'cytoclip[export]'",
            ExitCode.SYSTEM,
        ) from None
    return onnx, onnxruntime


@contextmanager
def _torch_as_it_began() -> Iterator[None]:
    """torch's exporter asks in the old way for TF32 in convolutions, and torch (2.13) raises where it was said in the
    new way that there is none, as `device.start` does. What is traced here computes on the CPU.
    """
    if not hasattr(torch.backends, "fp32_precision"):
        yield
        return
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "tf32"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' notes on operators of torchvision, shape inference and values too small for float16."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
