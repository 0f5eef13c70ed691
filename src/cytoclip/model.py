"""The dual encoder: two towers, two projections, one logit scale; what moves in it, and its weights as plain CLIP.

Letters: B pairs, H×W pixels, L tokens, D embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from cytoclip.errors import ExitCode, UserError, first_few

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
CLIP_SCALE_CEILING = math.log(100)  # of the logit scale: CLIP, arXiv 2103.00020, section 2.5


@dataclass(frozen=True)
class Family:
    """Where the parts of one kind of checkpoint are, by the name of the submodule."""

    image_tower: str
    text_tower: str
    projections: tuple[str, str]
    lora_leaves: tuple[str, ...]  # the q, k and v projections
    opens: Any  # the transformers class


FAMILIES = {
    "clip": Family(
        image_tower="vision_model",
        text_tower="text_model",
        projections=("visual_projection", "text_projection"),
        lora_leaves=("q_proj", "k_proj", "v_proj"),
        opens=CLIPModel,
    )
}


class DualEncoder(nn.Module):
    """Pictures and captions into one space.

    Parameters
    ----------
    clip
        The transformers model; its weights stay where they are, and under LoRA its layers are replaced in place.
    to_floats
        From uint8 pixels (B, 3, H, W) to what the image tower reads, on whatever device they are.
    """

    def __init__(self, clip: Any, to_floats: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.clip = clip
        self.family = FAMILIES[clip.config.model_type]
        self.to_floats = to_floats
        # A checkpoint above CLIP's ceiling is not crushed down to it (TAO, open_clip #1076).
        self.scale_ceiling = max(CLIP_SCALE_CEILING, float(clip.logit_scale.detach()))

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines; 0-dimensional."""
        scale: nn.Parameter = self.clip.logit_scale
        return scale

    @property
    def width(self) -> int:
        """D, the dimensions of an embedding."""
        return int(self.clip.config.projection_dim)

    def images(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """uint8 pixels → unit embeddings (B, D), float32 or wider whatever the towers compute in."""
        output = self.clip.get_image_features(pixel_values=self.to_floats(pixels_B3HW).to(self._dtype))
        return _unit(output.pooler_output)  # in transformers 5 this is the projected feature

    def texts(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids → unit embeddings (B, D), float32 or wider whatever the towers compute in."""
        return _unit(self.clip.get_text_features(input_ids=tokens_BL).pooler_output)

    def forward(self, pixels_B3HW: torch.Tensor, tokens_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images(pixels_B3HW), self.texts(tokens_BL)

    def clamp_scale(self) -> None:
        """Hold the logit scale at or below its ceiling; called after each optimizer step."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.scale_ceiling)

    def moving(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.clip.named_parameters() if parameter.requires_grad}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(training, all) parameters of the image tower, the text tower, the projections and the logit scale."""
        parts = {
            self.family.image_tower: "image tower",
            self.family.text_tower: "text tower",
            **dict.fromkeys(self.family.projections, "projections"),
        }
        counts: dict[str, list[int]] = {name: [0, 0] for name in (*dict.fromkeys(parts.values()), "logit scale")}
        for name, parameter in self.clip.named_parameters():
            count = counts[parts.get(name.split(".")[0], "logit scale")]
            count[0] += parameter.numel() * parameter.requires_grad
            count[1] += parameter.numel()
        return {name: (moving, total) for name, (moving, total) in counts.items()}

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.clip.dtype
        return dtype


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or hub id holds: the model in float32, its tokenizer and its image processor."""

    clip: Any
    tokenizer: Any
    image_processor: Any

    @property
    def context(self) -> int:
        """Tokens that the text tower reads at most."""
        return int(self.clip.config.text_config.max_position_embeddings)

    @property
    def image_size(self) -> int:
        """Side of the square picture that the image tower reads, in pixels."""
        return int(self.clip.config.vision_config.image_size)


def read(name: str) -> Checkpoint:
    """Open a hub id or a Hugging Face folder.

    Raises
    ------
    UserError
        For what is not there, is not CLIP-like, lacks weights, or has a tokenizer that does not fit the model.
    """
    transformers_logging.disable_progress_bar()  # of seconds' work, in the middle of our lines
    transformers_logging.set_verbosity_error()  # what its reports say, our errors say in two lines
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise not_opened(name, error) from None
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"{name} is a {config.model_type!r} checkpoint, not a CLIP-like one",
            f"model types that can be trained: {', '.join(FAMILIES)}; such as openai/clip-vit-base-patch16",
            ExitCode.MODEL,
        )
    try:
        # transformers 5 keeps the dtype of the file: a half-precision checkpoint would train in half precision.
        clip, report = family.opens.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise not_opened(name, error) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} weights of a whole CLIP: {first_few(missing)}",
            "name a checkpoint with both towers and both projections",
            ExitCode.MODEL,
        )
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(  # transformers 5 makes an empty one up
            f"{name} has no tokenizer", f"put its files there: one of {', '.join(_TOKENIZER_FILES)}", ExitCode.MODEL
        )
    _check_end_token(name, clip, tokenizer)
    return Checkpoint(clip, tokenizer, processor)


def fingerprint(clip: nn.Module) -> str:
    """SHA-256 of every weight's name and bytes: what a run began from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_end_token(name: str, clip: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end token is not where the text tower pools.

    With `eos_token_id == 2` in the model's configuration (OpenAI's files say so, for history) transformers pools at
    the highest id of the row, which is the end token only if that is the last of the vocabulary.
    """
    pooled, end, last = clip.config.text_config.eos_token_id, tokenizer.eos_token_id, len(tokenizer) - 1
    if end is None or end != (last if pooled == 2 else pooled):
        where = f"the highest id, {last}," if pooled == 2 else f"id {pooled}"
        raise UserError(
            f"{name}: the text tower pools at {where} but the tokenizer's end token has id {end}",
            "set eos_token_id in the model's text_config to the tokenizer's, and never to 2",
            ExitCode.MODEL,
        )


def _unit(features_BD: torch.Tensor) -> torch.Tensor:
    wide = features_BD.float() if features_BD.dtype in (torch.float16, torch.bfloat16) else features_BD
    return functional.normalize(wide, dim=-1)


def not_opened(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "give a hub id (such as openai/clip-vit-base-patch16; needs a network once), a Hugging Face or a run folder"
    return UserError(f"cannot open the checkpoint {name}: {reason}", hint, ExitCode.MODEL)
