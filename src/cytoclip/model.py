"""The dual encoder: two towers, their way into one space, one logit scale; and how its checkpoint is read.

Letters: B pairs, H×W pixels, L tokens, F width of a tower's pooled feature, D embedding, P patches, K patches kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cytoclip.errors import ExitCode, UserError, first_few
from cytoclip.families import FAMILIES, PATCH_TOWERS, REFUSED, Family

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
CLIP_SCALE_CEILING = math.log(100)  # of the logit scale: CLIP, arXiv 2103.00020, section 2.5


class DualEncoder(nn.Module):
    """Pictures and captions into one space.

    Parameters
    ----------
    clip
        The transformers model; its weights stay where they are, and under LoRA its layers are replaced in place.
    to_floats
        From uint8 pixels (B, 3, H, W) to what the image tower reads, on whatever device they are.
    size
        (H, W) of the pictures; None: the square that the image tower's configuration names.
    pad
        The id that fills captions, kept out of attention where the family wants that; None: the text tower's own.
    """

    def __init__(
        self,
        clip: Any,
        to_floats: Callable[[torch.Tensor], torch.Tensor],
        size: tuple[int, int] | None = None,
        pad: int | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.family = FAMILIES[clip.config.model_type]
        self.to_floats = to_floats
        self.size = size
        self.pad = clip.config.text_config.pad_token_id if pad is None else pad
        # A checkpoint above CLIP's ceiling is not crushed down to it (TAO, open_clip #1076).
        self.scale_ceiling = max(CLIP_SCALE_CEILING, float(clip.logit_scale.detach()))
        self._keep_BK: torch.Tensor | None = None  # of the forward pass that runs now
        for name, module in self.image_tower.named_modules():
            if name.rpartition(".")[2] == "embeddings":
                module.register_forward_hook(self._leave_out)

    @property
    def image_tower(self) -> Any:
        return getattr(self.clip, self.family.image_tower)

    @property
    def text_tower(self) -> Any:
        return getattr(self.clip, self.family.text_tower)

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines; one element, 0-dimensional but for SigLIP's (1,)."""
        scale: nn.Parameter = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What SigLIP adds to the scaled cosines, (1,); None in the other families."""
        bias: nn.Parameter | None = getattr(self.clip, "logit_bias", None)
        return bias

    @property
    def width(self) -> int:
        """D, the dimensions of an embedding."""
        settings = self.clip.config
        return int(settings.projection_dim if self.family.projections else settings.vision_config.hidden_size)

    @property
    def patches(self) -> int:
        """P, the patches of a picture.

        Raises
        ------
        UserError
            The image tower does not cut pictures into patches of one size that can be left out.
        """
        settings = self.image_tower.config
        if settings.model_type not in PATCH_TOWERS:
            raise UserError(
                f"a {settings.model_type!r} image tower has no patches that can be left out",
                f"image towers that have: {', '.join(PATCH_TOWERS.values())}",
                ExitCode.MODEL,
            )
        height, width = self.size or (settings.image_size, settings.image_size)
        return int(height // settings.patch_size) * int(width // settings.patch_size)

    def layers(self, tower: nn.Module) -> list[nn.Module]:
        """The transformer layers of `image_tower` or `text_tower`, from input to output.

        Raises
        ------
        UserError
            The tower is not a stack of `num_hidden_layers` modules.
        """
        settings: Any = tower.config
        count = getattr(settings, "num_hidden_layers", None)
        for module in tower.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
        raise UserError(
            f"the layers of a {settings.model_type!r} tower cannot be told apart",
            "leave train.compile, train.layer_decay and model.lora.last_layers at their defaults",
            ExitCode.MODEL,
        )

    def image_features(self, pixels_B3HW: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 pixels → what the image tower makes of them, (B, F), before the projection; see `forward`."""
        self._keep_BK = keep_BK
        try:
            output = self.image_tower(pixel_values=self.to_floats(pixels_B3HW).to(self._dtype))
        finally:
            self._keep_BK = None
        features_BF: torch.Tensor = output.pooler_output
        return features_BF

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids → what the text tower makes of them, (B, F), before the projection."""
        mask = {"attention_mask": (tokens_BL != self.pad).long()} if self.family.masked else {}
        output = self.text_tower(input_ids=tokens_BL, **mask)
        if output.pooler_output is None:  # Chinese CLIP's text tower leaves pooling to the whole
            output.pooler_output = output.last_hidden_state[:, 0]
        features_BF: torch.Tensor = output.pooler_output
        return features_BF

    def images(self, images: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels or features of pictures → unit embeddings (B, D), float32 or wider; see `forward`."""
        features_BF = self.image_features(images, keep_BK) if images.ndim == 4 else images
        return self._embedded(features_BF, 0)

    def texts(self, texts: torch.Tensor) -> torch.Tensor:
        """Token ids or features of captions → unit embeddings (B, D), float32 or wider; see `forward`."""
        features_BF = texts if texts.is_floating_point() else self.text_features(texts)
        return self._embedded(features_BF, 1)

    def forward(
        self, images: torch.Tensor, texts: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit embeddings (B, D) of pictures and captions, float32 or wider whatever the towers compute in.

        Parameters
        ----------
        images
            uint8 pixels (B, 3, H, W), or floats (B, F) that `image_features` gave earlier.
        texts
            int64 token ids (B, L), or floats (B, F) that `text_features` gave earlier.
        keep
            int64 (B, K): the patches, of 0 to P - 1, that the image tower sees of each picture; None: all. Class
            token and registers are always seen (FLIP, arXiv 2212.00794).
        """
        return self.images(images, keep), self.texts(texts)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but a tower in which nothing moves keeps its dropout off, and every batch norm its
        statistics: they would couple the pairs of a chunk, and the chunks of a batch."""
        super().train(mode)
        for tower in (self.image_tower, self.text_tower):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        for module in _batch_norms(self):
            module.eval()
        return self

    def clamp_scale(self) -> None:
        """Hold the logit scale at or below its ceiling; called after each optimizer step."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.scale_ceiling)

    def moving(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name.

        DINOv2's mask token is of its pre-training: no picture reaches it, so it never has a gradient.
        """
        return {
            name: parameter
            for name, parameter in self.clip.named_parameters()
            if parameter.requires_grad and not name.endswith(".mask_token")
        }

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(training, all) parameters of the image tower, the text tower, the projections if any, and the scale."""
        parts = {
            self.family.image_tower: "image tower",
            self.family.text_tower: "text tower",
            **dict.fromkeys(self.family.projections, "projections"),
        }
        counts: dict[str, list[int]] = {name: [0, 0] for name in (*dict.fromkeys(parts.values()), "logit scale")}
        moving = self.moving()
        for name, parameter in self.clip.named_parameters():
            count = counts[parts.get(name.split(".")[0], "logit scale")]
            count[0] += parameter.numel() * (name in moving)
            count[1] += parameter.numel()
        return {part: (trained, total) for part, (trained, total) in counts.items()}

    def _embedded(self, features_BF: torch.Tensor, side: int) -> torch.Tensor:
        if self.family.projections:
            features_BF = getattr(self.clip, self.family.projections[side])(features_BF.to(self._dtype))
        wide = features_BF.float() if features_BF.dtype in (torch.float16, torch.bfloat16) else features_BF
        return functional.normalize(wide, dim=-1)

    def _leave_out(self, _module: nn.Module, _inputs: Any, tokens_BTF: torch.Tensor) -> torch.Tensor:
        """After the patch embedding: positions are in the tokens by now, so those left out may simply go."""
        keep_BK = self._keep_BK
        if keep_BK is None:
            return tokens_BTF
        first = tokens_BTF.shape[1] - self.patches
        kept_BKF = tokens_BTF[:, first:].gather(1, keep_BK[:, :, None].expand(-1, -1, tokens_BTF.shape[2]))
        return torch.cat([tokens_BTF[:, :first], kept_BKF], dim=1)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.clip.dtype
        return dtype


def frozen_statistics(encoder: DualEncoder) -> int:
    """How many batch norms there are, all of which keep the statistics that they came with."""
    return len(_batch_norms(encoder))


@dataclass(frozen=True)
class Checkpoint:
    """What a folder or hub id holds: the model in float32, its tokenizer and its image processor."""

    clip: Any
    tokenizer: Any
    image_processor: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.clip.config.model_type]

    @property
    def context(self) -> int:
        """Tokens that the text tower reads at most, of a BERT-like one no more than its tokenizer says."""
        positions = int(self.clip.config.text_config.max_position_embeddings)
        if self.family.pooled != "first":
            return positions
        tables = [m for n, m in self.clip.named_modules() if n.endswith(".embeddings.position_embeddings")]
        padding = getattr(tables[0], "padding_idx", None) if tables else None
        if padding is not None:  # RoBERTa counts positions from the one behind the padding's
            positions -= padding + 1
        return min(positions, int(self.tokenizer.model_max_length))

    @property
    def image_size(self) -> int | None:
        """Side of the square picture that the image tower reads, in pixels; None where the processor decides."""
        return int(self.clip.config.vision_config.image_size) if self.family.image_size == "config" else None


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
        known = f"model types that can be trained: {', '.join(FAMILIES)}; such as openai/clip-vit-base-patch16"
        raise UserError(
            f"{name} is a {config.model_type!r} checkpoint, not a CLIP-like one",
            REFUSED.get(config.model_type, known),
            ExitCode.MODEL,
        )
    try:
        # transformers 5 keeps the dtype of the file: a half-precision checkpoint would train in half precision.
        clip, report = getattr(transformers, family.opens).from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
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
    if family.pooled == "end":
        _check_end_token(name, clip, tokenizer)
    if family.masked:
        _check_mask(name, tokenizer)
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


def _check_mask(name: str, tokenizer: Any) -> None:
    """A BERT-like text tower pools at its first token and must not see the padding."""
    for what, token in (("padding", tokenizer.pad_token_id), ("cls", tokenizer.cls_token_id)):
        if token is None:
            raise UserError(
                f"{name}: its tokenizer has no {what} token, so it is not that of a BERT-like text tower",
                "use a text tower of the BERT kind, with its own tokenizer",
                ExitCode.MODEL,
            )


def _batch_norms(encoder: DualEncoder) -> list[nn.Module]:
    return [module for module in encoder.modules() if isinstance(module, _BatchNorm)]


def reason_of(error: Exception) -> str:
    """The first line of an error, or its name where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def not_opened(name: str, error: Exception) -> UserError:
    reason = reason_of(error)
    hint = "give a hub id (such as openai/clip-vit-base-patch16; needs a network once), a Hugging Face or a run folder"
    return UserError(f"cannot open the checkpoint {name}: {reason}", hint, ExitCode.MODEL)
