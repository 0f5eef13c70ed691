"""The last layer of a tower, computed in training for the one token whose feature is read.

Of that layer's products, ten of twelve (queries, what follows attention, the MLP) are for tokens that nobody reads when
a picture's feature is its class token's, or a caption's that of its end: 7 % of a ViT-B's arithmetic, forward and
backward, 28 % of a text tower with three layers. Keys and values are those of all tokens, so every gradient is what it
was. Nothing changes in `eval`: there a tower computes what transformers does to the last bit.

Letters: B rows, T tokens, h width, H heads, d dimensions of a head.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cytoclip.families import FAMILIES
from cytoclip.model import layers

# Layers of transformers that normalise before attention and before the MLP: (norm, attention, its last product, norm).
_CLIP = ("layer_norm1", "self_attn", "out_proj", "layer_norm2")
_PARTS = {
    "CLIPEncoderLayer": _CLIP,
    "ChineseCLIPVisionLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "Dinov2Layer": ("norm1", "attention", "o_proj", "norm2"),
    "ViTLayer": ("layernorm_before", "attention", "o_proj", "layernorm_after"),
}
_POOLS_FIRST = ("CLIPEncoderLayer", "ChineseCLIPVisionLayer", "Dinov2Layer", "ViTLayer")  # as an image tower
_PLACE = "read_B"  # what the hook adds to what the text tower hands on to its layers


def shorten(clip: Any) -> None:
    """Let the last layer of each tower of `clip` compute the token that is read, where it is one and the layer known.

    After adapters are in; for layers that are not compiled.
    """
    family = FAMILIES[clip.config.model_type]
    image, text = getattr(clip, family.image_tower), getattr(clip, family.text_tower)
    last = _last(image)
    if last is not None and type(last).__name__ in _POOLS_FIRST:
        _replace(last, 0)
    last = _last(text)
    if last is not None and family.pools == "last":
        _replace(last, -1)
    if last is not None and family.pools == "end":
        _replace(last, None)
        text.register_forward_pre_hook(_say_where, with_kwargs=True)


def _last(tower: nn.Module) -> nn.Module | None:
    """The last layer, where its parts are those that are known."""
    found = layers(tower)
    if not found or type(found[-1]).__name__ not in _PARTS:
        return None
    last = found[-1]
    before, attention, out, after = _PARTS[type(last).__name__]
    there = [hasattr(last, name) for name in (before, after, "mlp")]
    there += [hasattr(getattr(last, attention, None), name) for name in ("q_proj", "k_proj", "v_proj", out, "head_dim")]
    return last if all(there) else None


def _say_where(
    tower: Any, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a text tower: tell its layers the place of each caption's end, found as transformers does."""
    ids_BT = named["input_ids"]
    if tower.eos_token_id == 2:  # of OpenAI's files: the end is the highest id
        return given, {**named, _PLACE: ids_BT.argmax(dim=-1)}
    return given, {**named, _PLACE: (ids_BT == tower.eos_token_id).int().argmax(dim=-1)}


def _replace(layer: nn.Module, place: int | None) -> None:
    """`layer` for the token at `place` (0: the first, -1: the last, None: as the hook says) in training."""
    usual, parts = type(layer).forward, _PARTS[type(layer).__name__]  # now: FSDP gives it another class

    def forward(self: nn.Module, hidden_BTh: torch.Tensor, attention_mask: Any = None, **named: Any) -> torch.Tensor:
        read_B = named.pop(_PLACE, None)
        known = read_B is not None if place is None else attention_mask is None
        if self.training and known:
            return _for_one(self, parts, hidden_BTh, place, read_B)
        found: torch.Tensor = usual(self, hidden_BTh, attention_mask, **named)
        return found

    layer.forward = MethodType(forward, layer)


def _for_one(
    layer: Any, parts: tuple[str, ...], hidden_BTh: torch.Tensor, place: int | None, read_B: torch.Tensor | None
) -> torch.Tensor:
    """(B, T, h) → (B, T, h), of which each token is the one that is read: whatever comes next finds it at its place."""
    before, attention, out, after = parts
    normed_BTh = getattr(layer, before)(hidden_BTh)
    attended_B1h = _attend(getattr(layer, attention), out, normed_BTh, place, read_B)
    own_B1h = _at(hidden_BTh, place, read_B) + _behind(layer, attended_B1h, 1)
    own_B1h = own_B1h + _behind(layer, layer.mlp(getattr(layer, after)(own_B1h)), 2)
    return own_B1h.expand_as(hidden_BTh).contiguous()  # FSDP hooks what a layer gives, which must not be a view


def _attend(
    attention: Any, out: str, normed_BTh: torch.Tensor, place: int | None, read_B: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one token to all, or to those up to it where it is a caption's end: (B, 1, h)."""
    shape = len(normed_BTh), -1, normed_BTh.shape[-1] // attention.head_dim, attention.head_dim
    query_BH1d = attention.q_proj(_at(normed_BTh, place, read_B)).view(shape).transpose(1, 2)
    key_BHTd = attention.k_proj(normed_BTh).view(shape).transpose(1, 2)
    value_BHTd = attention.v_proj(normed_BTh).view(shape).transpose(1, 2)
    scores_BH1T = (query_BH1d * attention.head_dim**-0.5) @ key_BHTd.mT
    if read_B is not None:
        behind_BT = torch.arange(normed_BTh.shape[1], device=read_B.device) > read_B[:, None]
        scores_BH1T = scores_BH1T.masked_fill(behind_BT[:, None, None], torch.finfo(scores_BH1T.dtype).min)
    shares_BH1T = scores_BH1T.softmax(dim=-1).to(value_BHTd.dtype)
    rate = getattr(attention, "dropout", getattr(attention, "attention_dropout", 0.0))
    attended_BH1d = functional.dropout(shares_BH1T, rate) @ value_BHTd
    attended_B1h: torch.Tensor = getattr(attention, out)(attended_BH1d.transpose(1, 2).flatten(2))
    return attended_B1h


def _at(rows_BTh: torch.Tensor, place: int | None, read_B: torch.Tensor | None) -> torch.Tensor:
    """The token that is read of each row: (B, 1, h)."""
    if read_B is not None:
        return rows_BTh.take_along_dim(read_B[:, None, None], dim=1)
    return rows_BTh[:, :1] if place == 0 else rows_BTh[:, -1:]


def _behind(layer: nn.Module, branch_B1h: torch.Tensor, number: int) -> torch.Tensor:
    """What some layers do to a branch before it is added: a factor a dimension, and dropout."""
    for name in (f"layer_scale{number}", "drop_path", "dropout"):
        branch_B1h = getattr(layer, name, nn.Identity())(branch_B1h)
    return branch_B1h
