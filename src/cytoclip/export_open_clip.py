"""A folder that `open_clip.create_model_and_transforms("local-dir:…")` opens.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

from cytoclip import adapters, checkpoint, files, from_open_clip, openclip, towers
from cytoclip.checkpoint import Opened
from cytoclip.errors import ExitCode, UserError, counted
from cytoclip.families import FAMILIES
from cytoclip.model import DualEncoder
from cytoclip.openclip import Unmapped
from cytoclip.pixels import PixelSpec
from cytoclip.yardstick import Yardstick, over


def write(opened: Opened, folder: Path, hub_id: str | None = None) -> list[str]:
    """Fill `folder`; what its preprocessing cannot say, in sentences.

    Parameters
    ----------
    hub_id
        Where it will lie on the hub, if it will: open_clip looks for the tokenizer there.

    Raises
    ------
    UserError
        Where open_clip has no class that computes the same.
    """
    try:
        model_cfg, state = _theirs(opened, hub_id)
    except Unmapped as reason:
        raise UserError(
            f"{opened.name} cannot be exported to open_clip: {reason}",
            "export it as hf or onnx instead",
            ExitCode.MODEL,
        ) from None
    preprocess, notes = _preprocess(opened.pixels)
    files.write_json(folder / openclip.CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    save_file(state, folder / openclip.WEIGHTS, {"format": "pt"})
    opened.tokenizer.save_pretrained(str(folder))
    checkpoint.write_crop(folder, opened)
    return notes


def embed(
    folder: Path, held: Yardstick, advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, str]:
    """The pairs of `held`, by open_clip itself where it can be imported, else by a CLIPModel made from the folder.

    Returns
    -------
    (image, text), the logit scale, and by whom, in words.
    """
    try:
        import open_clip
    except ImportError as error:
        images, texts, scale = _read_back(folder, held)
        by = f"our reader of open_clip's files ({error.name} is not installed here, so open_clip could not be asked)"
    else:
        images, texts, scale, otherwise = _by_open_clip(open_clip, folder, held)
        by = f"open_clip {open_clip.__version__}"
        if otherwise:
            by += f", which reads {counted(otherwise, 'caption')} of {len(held)} otherwise (it mends Unicode and HTML)"
    return over(len(held), images, advance), over(len(held), texts, advance), scale, by


def usage() -> str:
    """Code that scores some captions against a picture."""
    return """import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(picture))[None], normalize=True)
    text = model.encode_text(tokenizer(texts), normalize=True)
cosines = image @ text.T"""


Step = Callable[[slice], torch.Tensor]


def _by_open_clip(library: Any, folder: Path, held: Yardstick) -> tuple[Step, Step, float, int]:
    """Also how many captions its tokenizer reads otherwise than ours."""
    name = f"local-dir:{folder}"
    clip = library.create_model_and_transforms(name)[0].eval()
    ids_NL = held.ids(slice(None))
    filled_NL = torch.full((len(held), held.opened.context), held.tokens.pad)  # its text tower reads whole contexts
    filled_NL[:, : ids_NL.shape[1]] = ids_NL
    theirs_NL = library.get_tokenizer(name)(list(held.pairs.captions))

    def images(some: slice) -> torch.Tensor:
        return clip.encode_image(held.floats(some), normalize=True)  # type: ignore[no-any-return]

    def texts(some: slice) -> torch.Tensor:
        return clip.encode_text(filled_NL[some], normalize=True)  # type: ignore[no-any-return]

    otherwise = int((theirs_NL != filled_NL).any(1).sum())
    return images, texts, float(clip.logit_scale.detach().exp()), otherwise


def _read_back(folder: Path, held: Yardstick) -> tuple[Step, Step, float]:
    clip = held.opened.encoder.clip
    text = clip.config.text_config
    model_cfg = files.read_json(folder / openclip.CONFIG)["model_cfg"]
    back = from_open_clip.build(model_cfg, load_file(folder / openclip.WEIGHTS), text.eos_token_id, text)
    encoder = DualEncoder(back, lambda floats_B3HW: floats_B3HW, held.tokens.pad)
    return (
        lambda some: encoder.images(held.floats(some)),
        lambda some: encoder.texts(held.ids(some)),
        float(encoder.logit_scale.detach().exp()),
    )


def _theirs(opened: Opened, hub_id: str | None) -> tuple[dict[str, Any], openclip.State]:
    """`model_cfg` and weights."""
    clip, config = opened.encoder.clip, opened.encoder.clip.config
    state = adapters.merged_state(clip)
    if config.model_type == "clip":
        layers = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
        model_cfg = openclip.config_of(clip, len(opened.tokenizer) - 1, _tokenizer_name(opened, hub_id))
        return model_cfg, openclip.to_theirs(openclip.clip_rows(*layers), state)
    if config.model_type == towers.KIND and config.open_clip:
        model_cfg = copy.deepcopy(config.open_clip)
        model_cfg["text_cfg"].setdefault("hf_tokenizer_name", model_cfg["text_cfg"]["hf_model_name"])
        rows = openclip.two_tower_rows(openclip.without_scales(state), config.vision_config.num_hidden_layers)
        return model_cfg, openclip.to_theirs(rows, openclip.without_scales(state))
    if config.model_type == "siglip":
        raise Unmapped(
            "open_clip's SigLIP has an exact GELU in its towers, where transformers' has the tanh form: other logits"
        )
    raise Unmapped(f"open_clip has no class for {FAMILIES[config.model_type].title}")


def _tokenizer_name(opened: Opened, hub_id: str | None) -> str:
    """Not empty, for open_clip then reads the tokenizer beside; on the hub it reads that of the name."""
    if hub_id is not None:
        return hub_id
    tokenizer = opened.tokenizer
    openai = (len(tokenizer), tokenizer.bos_token, tokenizer.eos_token) == (49408, "<|startoftext|>", "<|endoftext|>")
    return from_open_clip.OPENAI if openai else "beside-the-weights"


def _preprocess(spec: PixelSpec) -> tuple[dict[str, Any], list[str]]:
    """open_clip's `preprocess_cfg`, and what it cannot say."""
    height, width = spec.size
    filters = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
    said = {
        "size": height if height == width else [height, width],
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": filters.get(Image.Resampling(spec.resample), "bicubic"),
        "resize_mode": "squash" if isinstance(spec.resize, tuple) else "shortest",
        "fill_color": 0,
    }
    notes = []
    if spec.resample not in filters:
        notes.append(f"open_clip resizes bicubically; the model was trained with Pillow's filter {spec.resample}.")
    if spec.crop is not None and spec.resize not in (max(spec.crop), None):
        notes.append(f"open_clip resizes to {max(spec.crop)} pixels before the crop; in training it was {spec.resize}.")
    return said, notes
