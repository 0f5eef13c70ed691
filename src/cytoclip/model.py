"""The dual encoder: two towers, two projections, one logit scale; a checkpoint opened, its context stretched.

Letters: B pairs, H×W pixels, L tokens, P patches, K kept ones, D embedding.
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
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from cytoclip import towers
from cytoclip.errors import ExitCode, UserError, first_few, neighbour
from cytoclip.families import FAMILIES, REFUSED, Family

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
CLIP_SCALE_CEILING = math.log(100)  # of the logit scale: CLIP, arXiv 2103.00020, section 2.5
_DECIDING = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id", "pad_token_id",
             "text_pooling")  # fmt: skip
_PROBES = ("A  Naïve CELL, 5 μm", "细胞: don't")  # tokenizers of the same words read them in other ways
_RATES = ("p", "dropout", "attention_dropout", "drop_prob")  # of dropout, in modules of torch and transformers
KEPT_POSITIONS = 20  # of the text tower, when the context is stretched: Long-CLIP, arXiv 2403.15378, section 3.2


class DualEncoder(nn.Module):
    """Pictures and captions into one space.

    Parameters
    ----------
    clip
        The transformers model; its weights stay where they are, and under LoRA its layers are replaced in place.
    to_floats
        From uint8 pixels (B, 3, H, W) to what the image tower reads, on whatever device they are.
    pad
        Token id that fills shorter rows: what a masked text tower does not attend to.
    image_size
        (H, W) of the pictures; None: what the checkpoint's configuration says.
    """

    def __init__(
        self,
        clip: Any,
        to_floats: Callable[[torch.Tensor], torch.Tensor],
        pad: int = 0,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.family = FAMILIES[clip.config.model_type]
        self.to_floats, self.pad = to_floats, pad
        self.image_size: tuple[int, int] = image_size or (clip.config.vision_config.image_size,) * 2
        # A checkpoint above CLIP's ceiling is not crushed down to it (TAO, open_clip #1076).
        self.scale_ceiling = max(CLIP_SCALE_CEILING, float(clip.logit_scale.detach().reshape(())))
        self._keep_BK: torch.Tensor | None = None
        embeddings = getattr(self.image_tower, "embeddings", None)
        if isinstance(embeddings, nn.Module):
            embeddings.register_forward_hook(self._drop_patches)

    @property
    def image_tower(self) -> nn.Module:
        tower: nn.Module = getattr(self.clip, self.family.image_tower)
        return tower

    @property
    def text_tower(self) -> nn.Module:
        tower: nn.Module = getattr(self.clip, self.family.text_tower)
        return tower

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the factor on the cosines; one element."""
        scale: nn.Parameter = self.clip.logit_scale
        return scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What is added to the logits; one element, None where the family has none."""
        bias: nn.Parameter | None = getattr(self.clip, "logit_bias", None)
        return bias

    @property
    def width(self) -> int:
        """D, the dimensions of an embedding."""
        if self.family.projections:
            return int(self.clip.config.projection_dim)
        return int(self.clip.config.vision_config.hidden_size)

    @property
    def patches(self) -> int:
        """P, the patches of a picture; 0 where the image tower has none that could be dropped."""
        side = getattr(self.clip.config.vision_config, "patch_size", None)
        if not isinstance(side, int) or not isinstance(getattr(self.image_tower, "embeddings", None), nn.Module):
            return 0
        return (self.image_size[0] // side) * (self.image_size[1] // side)

    def image_features(self, pixels_B3HW: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 pixels → pooled features before the projection (B, width of the tower).

        Parameters
        ----------
        keep_BK
            int64: the patches that the tower sees (patch dropout, FLIP, arXiv 2212.00794); None: all.
        """
        self._keep_BK = keep_BK
        try:
            output = self.image_tower(pixel_values=self.to_floats(pixels_B3HW).to(self._dtype))
        finally:
            self._keep_BK = None
        features: torch.Tensor = output.pooler_output
        return features

    def text_features(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Token ids → pooled features before the projection (B, width of the tower)."""
        mask = {"attention_mask": (tokens_BL != self.pad).long()} if self.family.masks else {}
        output = self.text_tower(input_ids=tokens_BL, **mask)
        if self.clip.config.model_type == towers.KIND:
            return towers.pooled(self.clip.config, output.last_hidden_state, mask["attention_mask"])
        features: torch.Tensor = output.pooler_output
        if self.clip.config.model_type == "chinese_clip":  # the first token as it is, without BERT's pooler
            features = output.last_hidden_state[:, 0]
        return features

    def projected(self, features: torch.Tensor, side: int) -> torch.Tensor:
        """Features of the image tower (side 0) or the text tower (1) in the shared space (B, D), not yet unit."""
        if not self.family.projections:
            return features
        projected: torch.Tensor = getattr(self.clip, self.family.projections[side])(features)
        return projected

    def images(self, images: torch.Tensor, keep_BK: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 pixels (B, 3, H, W), or a frozen tower's stored features (B, width) → unit embeddings (B, D).

        They are float32 or wider whatever the towers compute in.
        """
        features = images.to(self._dtype) if images.ndim == 2 else self.image_features(images, keep_BK)
        return _unit(self.projected(features, 0))

    def texts(self, texts: torch.Tensor) -> torch.Tensor:
        """Token ids (B, L), or a frozen tower's stored features (B, width) → unit embeddings (B, D)."""
        features = texts.to(self._dtype) if texts.is_floating_point() else self.text_features(texts)
        return _unit(self.projected(features, 1))

    def forward(
        self, images: torch.Tensor, texts: torch.Tensor, keep_BK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images(images, keep_BK), self.texts(texts)

    def train(self, mode: bool = True) -> DualEncoder:
        """As of any module, but what does not move has no dropout, and BatchNorm keeps its statistics.

        A BatchNorm that learns from a chunk makes its pairs depend on each other, and the loss on the chunks.
        """
        super().train(mode)
        for tower in (self.image_tower, self.text_tower):
            if not any(parameter.requires_grad for parameter in tower.parameters()):
                tower.eval()
        for module in self._batch_norms():
            module.eval()
        return self

    def drops_out(self) -> bool:
        """Whether something is dropped at random in training: then other chunks mean other masks."""
        rates = (getattr(m, name, 0) for m in self.modules() if m.training for name in _RATES)
        return any(isinstance(rate, float) and rate > 0 for rate in rates)

    def frozen_statistics(self) -> int:
        """How many BatchNorm layers the towers have: their statistics stay those of the checkpoint."""
        return len(self._batch_norms())

    def clamp_scale(self) -> None:
        """Hold the logit scale at or below its ceiling; called after each optimizer step."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=self.scale_ceiling)

    def moving(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.clip.named_parameters() if parameter.requires_grad}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(training, all) parameters of the image tower, the text tower, the projections if any, and the scale."""
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

    def _drop_patches(self, _: nn.Module, __: Any, output_BTh: torch.Tensor) -> torch.Tensor | None:
        """A hook behind the patch embeddings: keeps what comes before the patches (a class token) and `keep_BK`."""
        if self._keep_BK is None:
            return None
        before = output_BTh.shape[1] - self.patches
        kept_BK = self._keep_BK + before
        first_B = torch.arange(before, device=kept_BK.device).expand(len(kept_BK), before)
        return output_BTh.take_along_dim(torch.cat([first_B, kept_BK], dim=1)[..., None], dim=1)

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]


def layers(tower: nn.Module) -> nn.ModuleList:
    """The transformer layers of a tower, the one next to its input first; empty where it has none."""
    count = getattr(tower.config, "num_hidden_layers", None)
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return lists[0] if lists else nn.ModuleList()


def checkpoint_gradients(encoder: DualEncoder) -> None:
    """Keep each layer's input only, and compute the rest again in the backward pass; of the towers that move."""
    for tower in (encoder.image_tower, encoder.text_tower):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        if not getattr(tower, "supports_gradient_checkpointing", False):
            raise UserError(
                f"train.gradient_checkpointing: {type(tower).__name__} of transformers does not support it",
                "delete train.gradient_checkpointing, and lower train.micro_batch_size instead",
                ExitCode.MODEL,
            )
        renamed = hasattr(tower, "activation_checkpointing_enable")  # transformers drops the older name in version 6
        switch: Any = getattr(tower, "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable")
        switch({"use_reentrant": False})


def compile_towers(encoder: DualEncoder, backend: Any = "inductor") -> None:
    """Compile the layers of both towers where they are, for any number of pairs and tokens; names of weights stay.

    Layer by layer: layers share their graphs, so that a tower costs what one layer does.

    Raises
    ------
    UserError
        A tower has no layers that could be told apart.
    """
    # Two towers, training and not, with and without a graph, one row or several: 16, twice where patches or precision
    # differ. From torch's limit of 8 on, it would go on uncompiled behind a warning.
    from torch._dynamo import config as dynamo  # slow to import, for those who ask

    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for tower in (encoder.image_tower, encoder.text_tower):
        found = layers(tower)
        if not found:
            raise UserError(
                f"train.compile: the layers of {type(tower).__name__} cannot be told apart",
                "delete train.compile",
                ExitCode.MODEL,
            )
        for layer in found:
            layer.compile(dynamic=True, backend=backend)


def stretch_context(opened: Checkpoint, length: int, name: str) -> None:
    """Let CLIP's text tower read `length` tokens.

    The first 20 position embeddings are kept. The i-th after them is read, between neighbours, at the place
    i · (n − 20) ÷ (length − 20) of the old ones, and at the very end on the line through the last two: for 77 → 248
    what Long-CLIP does (arXiv 2403.15378, section 3.2). The configuration and the tokenizer follow, so what is saved
    opens with plain transformers at its new length.

    Raises
    ------
    UserError
        For a length below the checkpoint's own, or fewer than 22 positions to begin with.
    """
    text = opened.clip.config.text_config
    if text.max_position_embeddings < KEPT_POSITIONS + 2:
        raise UserError(
            f"model.context_length: {length}, but {name} reads {text.max_position_embeddings} tokens, and the first "
            f"{KEPT_POSITIONS} positions are kept: two more are needed to go on from",
            "delete model.context_length, or use another checkpoint",
            ExitCode.MODEL,
        )
    if length < text.max_position_embeddings:
        raise UserError(
            f"model.context_length: {length} is less than the {text.max_position_embeddings} tokens that {name} reads",
            "delete model.context_length, or set it above that; 248 is Long-CLIP's",
            ExitCode.MODEL,
        )
    embeddings = opened.clip.text_model.embeddings
    old_Lh = embeddings.position_embedding.weight.detach()
    embeddings.position_embedding = nn.Embedding(length, old_Lh.shape[1], _weight=_stretched(old_Lh, length))
    embeddings.position_ids = torch.arange(length)[None]
    text.max_position_embeddings = opened.clip.text_model.config.max_position_embeddings = length
    opened.tokenizer.model_max_length = length


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
        """Tokens that the text tower reads at most."""
        text = self.clip.config.text_config
        most = int(text.max_position_embeddings)
        if self.family.masks:  # a tower on its own: its tokenizer may say less
            names = (n for n, _ in self.clip.named_modules() if n.endswith(".embeddings.position_embeddings"))
            padding = [getattr(self.clip.get_submodule(name), "padding_idx", None) for name in names]
            if padding and padding[0] is not None:  # RoBERTa and its like number tokens from behind the padding's place
                most -= int(padding[0]) + 1
            most = min(most, int(self.tokenizer.model_max_length))
        return most

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
    if Path(name).is_absolute() and not Path(name).exists():  # which transformers takes for a strange hub id
        raise UserError(
            f"no such folder: {name}",
            "put the checkpoint back: a run opens its starting model there, and an adapter its base",
            ExitCode.MODEL,
        )
    transformers_logging.disable_progress_bar()  # of seconds' work, in the middle of our lines
    transformers_logging.set_verbosity_error()  # what its reports say, our errors say in two lines
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise not_opened(name, error) from None
    if config.model_type in REFUSED:
        raise UserError(f"{name} cannot be trained", f"it {REFUSED[config.model_type]}", ExitCode.MODEL)
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
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise not_opened(name, error) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} weights of a whole CLIP: {first_few(missing)}",
            "name a checkpoint with both towers and their projections",
            ExitCode.MODEL,
        )
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(  # transformers 5 makes an empty one up
            f"{name} has no tokenizer", f"put its files there: one of {', '.join(_TOKENIZER_FILES)}", ExitCode.MODEL
        )
    if family.pools == "end":
        _check_end_token(name, clip, tokenizer)
    return Checkpoint(clip, tokenizer, processor)


def _stretched(old_Lh: torch.Tensor, length: int) -> torch.Tensor:
    rest_Lh = old_Lh[KEPT_POSITIONS:]
    place = torch.arange(length - KEPT_POSITIONS, dtype=torch.float64) * len(rest_Lh) / (length - KEPT_POSITIONS)
    below = place.long().clamp(max=len(rest_Lh) - 2)
    part = (place - below)[:, None].to(old_Lh.dtype)
    return torch.cat([old_Lh[:KEPT_POSITIONS], rest_Lh[below] + part * (rest_Lh[below + 1] - rest_Lh[below])])


def digest_of(clip: Any, tokenizer: Any, *reading: Any) -> str:
    """SHA-256 of the weights and of whatever else decides an embedding: settings, words, pixels, context, precision."""
    words = sorted(tokenizer.get_vocab().items()), [tokenizer(text)["input_ids"] for text in _PROBES]
    read = hashlib.sha256(repr(words).encode()).hexdigest()
    settings = deciding(clip.config.to_dict())
    return hashlib.sha256(repr((fingerprint(clip), settings, read, *reading)).encode()).hexdigest()


def deciding(settings: dict[str, Any]) -> list[Any]:
    """What a configuration and those inside it say that decides an embedding and that no weight's shape shows."""
    inner = ((key, deciding(value)) for key, value in settings.items() if isinstance(value, dict))
    return [*((key, settings[key]) for key in _DECIDING if key in settings), *sorted(inner)]


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
    near = neighbour(Path(name))
    hint = f"did you mean {near}? Else " if near else ""
    hint += "give a hub id (such as openai/clip-vit-base-patch16; needs a network once), a Hugging Face or a run folder"
    return UserError(f"cannot open the checkpoint {name}: {reason}", hint, ExitCode.MODEL)
