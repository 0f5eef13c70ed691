"""What plain transformers (or peft) opens: whole weights, or an adapter kept apart from its base.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from cytoclip import adapters, checkpoint, files, yardstick
from cytoclip.checkpoint import BESIDE, Opened
from cytoclip.errors import ExitCode, UserError
from cytoclip.yardstick import Yardstick, over

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", BESIDE)


def write(opened: Opened, folder: Path) -> None:
    """Whole weights, tokenizer and image processor."""
    checkpoint.fill(folder, opened)


def write_adapter(opened: Opened, name: str, folder: Path) -> str:
    """The adapter of the model folder that `name` means, tokenizer and image processor; the name of its base.

    Raises
    ------
    UserError
        For a model without one.
    """
    place = Path(checkpoint.locate(name))
    if not (place / _ADAPTER[0]).is_file():
        raise UserError(
            f"--adapter: {name} has whole weights and no adapter: a tower was trained in full, or its base was no "
            "plain checkpoint",
            "leave --adapter out",
            ExitCode.MODEL,
        )
    for file in _ADAPTER:
        shutil.copyfile(place / file, folder / file)
    checkpoint.fill_reading(folder, opened)
    return str(files.read_json(folder / _ADAPTER[0])["base_model_name_or_path"])


def embed(
    folder: Path, held: Yardstick, advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """The pairs of `held` as transformers embeds them, from pictures and captions on: (image, text) and its scale."""
    clip = _model(folder)
    processor, tokenizer = _reading(folder)
    family = held.opened.encoder.family

    def images(some: slice) -> torch.Tensor:
        return _unit(clip.get_image_features(**processor(images=held.shown(some), return_tensors="pt")))

    def texts(some: slice) -> torch.Tensor:
        read = held.read_by(tokenizer, some)
        mask = {"attention_mask": read["attention_mask"]} if family.masks else {}
        return _unit(clip.get_text_features(input_ids=read["input_ids"], **mask))

    return over(len(held), images, advance), over(len(held), texts, advance), float(clip.logit_scale.detach().exp())


def usage(opened: Opened, base: str | None = None) -> str:
    """Code that scores some captions against a picture; `base` where the folder holds an adapter for that."""
    family = opened.encoder.family
    mask = ', attention_mask=read["attention_mask"]' if family.masks else ""
    head, load = _WHOLE if base is None else (_ADAPTED[0], _ADAPTED[1].format(base=base))
    return f"""import torch
from PIL import Image
{head}

{load}
pixels = processor(images=[Image.open(picture).convert("RGB")], return_tensors="pt")
read = tokenizer({yardstick.reading(opened)}, return_tensors="pt")
with torch.no_grad():
    image = model.get_image_features(**pixels).pooler_output
    text = model.get_text_features(input_ids=read["input_ids"]{mask}).pooler_output
cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)"""


_WHOLE = (
    "from transformers import AutoModel, AutoProcessor",
    """model = AutoModel.from_pretrained(folder)
both = AutoProcessor.from_pretrained(folder, backend="pil")
processor, tokenizer = both.image_processor, both.tokenizer""",
)
_ADAPTED = (  # a folder that AutoProcessor cannot read, for want of the model's configuration
    """from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer""",
    """model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), folder).merge_and_unload()
model.load_state_dict(load_file(f"{{folder}}/cytoclip.safetensors"), strict=False)  # projections, logit scale
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
tokenizer = AutoTokenizer.from_pretrained(folder)""",
)


def _reading(folder: Path) -> tuple[Any, Any]:
    """Image processor and tokenizer, as the code of the card has them."""
    if (folder / _ADAPTER[0]).is_file():
        processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
        return processor, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    both = AutoProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
    return both.image_processor, both.tokenizer


def _model(folder: Path) -> Any:
    if not (folder / _ADAPTER[0]).is_file():
        return AutoModel.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False).eval()
    base = str(files.read_json(folder / _ADAPTER[0])["base_model_name_or_path"])
    plain = AutoModel.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    clip = adapters.read_adapter(folder, plain)
    clip.load_state_dict(load_file(folder / BESIDE), strict=False)
    return clip.eval()


def _unit(output: Any) -> torch.Tensor:
    return functional.normalize(output.pooler_output.float(), dim=-1)
