"""CLIP as open_clip writes it and as transformers does: names, shapes and settings of one in terms of the other. Pure.

open_clip keeps q, k and v of a layer in one matrix and the two projections transposed; a ViT of timm has no layer
scales, where DINOv2's class of transformers does. Apart from that only names differ (compared with open_clip 3.3, timm
1.0 and transformers 5.23; the logits, in tests/test_openclip.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

State = dict[str, torch.Tensor]

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


class Unmapped(ValueError):  # noqa: N818 - a reason
    """Why a model has no place on the other side, in words that follow "because"."""


@dataclass(frozen=True)
class Row:
    """One tensor of open_clip, and what it is made of: one tensor of transformers, or q, k and v behind one another."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


# What makes open_clip compute something else; a value that is not the one here has no counterpart in transformers.
_VISION = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
}
_TEXT = {
    "ls_init_value": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "proj_bias": False,
    "proj_type": "linear",
}
_EITHER = {
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_TRAINING = {"patch_dropout", "output_tokens", "timm_model_pretrained", "hf_model_pretrained"}
_VISION_SIZES = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
_TEXT_SIZES = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}
_TEXT_READING = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pool_type", "pad_id", "eos_id"}

# timm's ViTs with a class token, norms before, no others: width, layers, heads, of the name less its patch and size.
_TIMM = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
}
_TIMM_NAME = re.compile(r"(vit_(?:tiny|small|base|large))_patch(\d+)_(\d+)(\.[\w.]+)?")
_TIMM_FREE = {"timm_model_name", "timm_drop", "timm_drop_path", "image_size", *_TRAINING}
_HF_FREE = {"hf_model_name", "context_length", *_TEXT_READING, *_TRAINING}
_SCALES = (".layer_scale1.lambda1", ".layer_scale2.lambda1")
_OLD_OUTPUT = "attention.output.dense"
_POOLERS = {"cls_last_hidden_state_pooler": "first", "mean_pooler": "mean"}


def config_of(clip: Any, highest: int, tokenizer_name: str) -> dict[str, Any]:
    """`model_cfg` of a CLIPModel of transformers.

    Parameters
    ----------
    highest
        The highest id that the tokenizer gives.
    tokenizer_name
        Where open_clip finds the tokenizer when it opens a hub repository; in a folder it takes the one beside.

    Raises
    ------
    Unmapped
        Where open_clip has no class that computes the same.
    """
    config = clip.config
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    if acts not in ({"quick_gelu"}, {"gelu"}):
        raise Unmapped(f"open_clip has one activation, gelu or quick_gelu, for both towers, not {_listed(acts)}")
    eps = {float(vision.layer_norm_eps), float(text.layer_norm_eps)}
    if eps != {1e-5}:
        raise Unmapped(f"the norms of open_clip's towers have an epsilon of 1e-5, not {_listed(eps)}")
    if vision.num_channels != 3:
        raise Unmapped(f"open_clip's image tower reads 3 channels, not {vision.num_channels}")
    if vision.hidden_size % vision.num_attention_heads:
        raise Unmapped("open_clip's image tower has heads of a whole width")
    # transformers takes 2 for "the highest id in the row", which is what argmax says, and all that older versions know
    argmax = int(text.eos_token_id) in (2, highest)
    return {
        "embed_dim": int(config.projection_dim),
        "quick_gelu": acts == {"quick_gelu"},
        "vision_cfg": {
            "image_size": int(vision.image_size),
            "layers": int(vision.num_hidden_layers),
            "width": int(vision.hidden_size),
            "head_width": int(vision.hidden_size) // int(vision.num_attention_heads),
            "mlp_ratio": _ratio(vision),
            "patch_size": int(vision.patch_size),
        },
        "text_cfg": {
            "context_length": int(text.max_position_embeddings),
            "vocab_size": int(text.vocab_size),
            "width": int(text.hidden_size),
            "heads": int(text.num_attention_heads),
            "layers": int(text.num_hidden_layers),
            "mlp_ratio": _ratio(text),
            "hf_tokenizer_name": tokenizer_name,
            **({} if argmax else {"pool_type": "eos", "eos_id": int(text.eos_token_id)}),
        },
    }


def clip_settings(model_cfg: Mapping[str, Any], end: int) -> dict[str, Any]:
    """Arguments of transformers' `CLIPConfig` for a `model_cfg` whose towers are open_clip's own transformers.

    Parameters
    ----------
    end
        Id of the tokenizer's end token, where the text tower pools.

    Raises
    ------
    Unmapped
        Where it computes something that CLIPModel does not.
    """
    vision, text = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    if isinstance(vision.get("layers"), list | tuple):
        raise Unmapped("its image tower is a ResNet, which transformers' CLIPModel does not have")
    if "multimodal_cfg" in model_cfg:
        raise Unmapped("it is a CoCa, which has a decoder as well")
    _refuse_unknown(vision, _VISION | _EITHER, {*_VISION_SIZES, *_TRAINING}, "vision_cfg")
    _refuse_unknown(text, _TEXT | _EITHER, {*_TEXT_SIZES, *_TRAINING, *_TEXT_READING}, "text_cfg")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise Unmapped(f"its text tower pools by {text['pool_type']!r}; CLIPModel pools at the end token")
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    v, t = {**_VISION_SIZES, **vision}, {**_TEXT_SIZES, **text}
    if isinstance(v["image_size"], list | tuple):
        if len(set(v["image_size"])) > 1:
            raise Unmapped(f"its pictures are not square: {v['image_size']}")
        v["image_size"] = v["image_size"][0]
    if model_cfg.get("init_logit_bias") is not None:
        raise Unmapped("it has a logit bias, and transformers' CLIPModel has none")
    return {
        "projection_dim": int(model_cfg["embed_dim"]),
        "vision_config": {
            "hidden_size": v["width"],
            "intermediate_size": int(v["width"] * v["mlp_ratio"]),
            "num_hidden_layers": v["layers"],
            "num_attention_heads": v["width"] // v["head_width"],
            "patch_size": v["patch_size"],
            "image_size": v["image_size"],
            "hidden_act": act,
        },
        "text_config": {
            "vocab_size": t["vocab_size"],
            "hidden_size": t["width"],
            "intermediate_size": int(t["width"] * t["mlp_ratio"]),
            "num_hidden_layers": t["layers"],
            "num_attention_heads": t["heads"],
            "max_position_embeddings": t["context_length"],
            "hidden_act": act,
            "eos_token_id": end,
        },
    }


def clip_rows(vision_layers: int, text_layers: int) -> list[Row]:
    """Every tensor of a CLIP."""
    return [
        Row("logit_scale", ("logit_scale",)),
        Row("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
        Row("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        Row("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
        *_affine("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_affine("visual.ln_post", "vision_model.post_layernorm"),
        Row("visual.proj", ("visual_projection.weight",), transposed=True),
        Row("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Row("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *_affine("ln_final", "text_model.final_layer_norm"),
        Row("text_projection", ("text_projection.weight",), transposed=True),
        *_blocks("visual.transformer.resblocks", "vision_model.encoder.layers", vision_layers),
        *_blocks("transformer.resblocks", "text_model.encoder.layers", text_layers),
    ]


def vit_settings(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `Dinov2Config` for an image tower that is one of timm's plain ViTs.

    DINOv2's class computes it where its layer scales are 1: unlike ViT's it has no pooler behind the last norm.
    """
    vision = dict(model_cfg["vision_cfg"])
    name = str(vision["timm_model_name"])
    match = _TIMM_NAME.fullmatch(name)
    if not match:
        raise Unmapped(f"its image tower is timm's {name}, and of those only plain ViTs are read, such as "
                       "vit_base_patch16_224")  # fmt: skip
    _refuse_unknown(vision, {"timm_pool": "", "timm_proj": "linear", "timm_proj_bias": False}, _TIMM_FREE, "vision_cfg")
    if vision.get("timm_pool", "avg") != "":
        raise Unmapped("its image tower averages its patches")
    width, layers, heads = _TIMM[match[1]]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "patch_size": int(match[2]),
        "image_size": int(match[3]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "use_mask_token": False,
    }


def text_settings(model_cfg: Mapping[str, Any], width: int) -> dict[str, Any]:
    """How `towers.TwoTowersConfig` says what open_clip does with the `width` features of a Hugging Face text model."""
    text, embed_dim = dict(model_cfg["text_cfg"]), int(model_cfg["embed_dim"])
    pooler, projection = text.get("hf_pooler_type", "mean_pooler"), text.get("hf_proj_type", "mlp")
    _refuse_unknown(text, {"hf_pooler_type": pooler, "hf_proj_type": projection}, _HF_FREE, "text_cfg")
    if pooler not in _POOLERS:
        raise Unmapped(f"its text tower pools by {pooler}; read are {_listed(_POOLERS)}")
    if projection not in ("linear", "mlp"):
        raise Unmapped(f"its text projection is {projection!r}; read are linear and mlp")
    hidden = (width + embed_dim) // 2 if projection == "mlp" else 0  # as open_clip.hf_model.HFTextEncoder has it
    return {"text_pooling": _POOLERS[pooler], "text_hidden": hidden, "projection_dim": embed_dim}


def two_tower_rows(ours: Iterable[str], layers: int) -> list[Row]:
    """Every tensor of a ViT of timm beside a text model of Hugging Face.

    Parameters
    ----------
    ours
        The names of `towers.TwoTowers`; those of the text model are the same on both sides.
    layers
        Of the image tower.
    """
    there = list(ours)
    vit, trunk = "vision_model", "visual.trunk"
    rows = [
        Row("logit_scale", ("logit_scale",)),
        Row(f"{trunk}.cls_token", (f"{vit}.embeddings.cls_token",)),
        Row(f"{trunk}.pos_embed", (f"{vit}.embeddings.position_embeddings",)),
        *_affine(f"{trunk}.patch_embed.proj", f"{vit}.embeddings.patch_embeddings.projection"),
        *_affine(f"{trunk}.norm", f"{vit}.layernorm"),
        Row("visual.head.proj.weight", ("visual_projection.weight",)),
    ]
    renamed = f"{vit}.encoder.layer.0.attention.q_proj.weight" in there  # transformers 5 took a level out
    names = ("q_proj", "k_proj", "v_proj", "o_proj") if renamed else (
        "attention.query", "attention.key", "attention.value", "output.dense")  # fmt: skip
    for i in range(layers):
        block, layer = f"{trunk}.blocks.{i}", f"{vit}.encoder.layer.{i}"
        for part in ("weight", "bias"):
            rows.append(Row(f"{block}.attn.qkv.{part}", tuple(f"{layer}.attention.{n}.{part}" for n in names[:3])))
        rows += _affine(f"{block}.attn.proj", f"{layer}.attention.{names[3]}")
        for one in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            rows += _affine(f"{block}.{one}", f"{layer}.{one}")
    for name in there:
        if name.startswith("text_model."):
            rows.append(Row(f"text.transformer.{name.removeprefix('text_model.')}", (name,)))
        if name.startswith("text_projection."):
            rows.append(Row(f"text.proj.{name.removeprefix('text_projection.')}", (name,)))
    return rows


def without_scales(ours: Mapping[str, torch.Tensor]) -> State:
    """Layer scales multiplied into the layers before them: `s · (W x + b) = (s · W) x + s · b`."""
    state = {name: tensor for name, tensor in ours.items() if not name.endswith(_SCALES)}
    for name in ours.keys() - state.keys():
        layer, _, which = name.partition(".layer_scale")
        before = "mlp.fc2" if which.startswith("2") else _one_of(state, layer, ("attention.o_proj", _OLD_OUTPUT))
        for part in ("weight", "bias"):
            key = f"{layer}.{before}.{part}"
            state[key] = state[key] * (ours[name][:, None] if part == "weight" else ours[name])
    return state


def with_scales(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> State:
    """The same weights with layer scales of 1 where `expected` has any."""
    scales = {name: torch.ones_like(tensor) for name, tensor in expected.items() if name.endswith(_SCALES)}
    return {**ours, **scales}


def _one_of(state: Mapping[str, torch.Tensor], layer: str, names: tuple[str, ...]) -> str:
    return next(name for name in names if f"{layer}.{name}.weight" in state)


def to_theirs(rows: list[Row], ours: Mapping[str, torch.Tensor]) -> State:
    """Weights under open_clip's names.

    Raises
    ------
    Unmapped
        For weights that are in no row: they would be lost.
    """
    _refuse_leftover(ours, {name for row in rows for name in row.ours})
    state = {}
    for row in rows:
        tensor = torch.cat([ours[name] for name in row.ours]) if len(row.ours) > 1 else ours[row.ours[0]]
        state[row.theirs] = (tensor.T if row.transposed else tensor).contiguous().clone()
    return state


def to_ours(rows: list[Row], theirs: Mapping[str, torch.Tensor]) -> State:
    """Weights under transformers' names; raises `Unmapped` for what is missing or in no row."""
    _refuse_leftover(theirs, {row.theirs for row in rows})
    if missing := [row.theirs for row in rows if row.theirs not in theirs]:
        raise Unmapped(f"it lacks the weights {_listed(missing[:3])}")
    state = {}
    for row in rows:
        tensor = theirs[row.theirs].T if row.transposed else theirs[row.theirs]
        parts = tensor.chunk(len(row.ours)) if len(row.ours) > 1 else (tensor,)
        for name, part in zip(row.ours, parts, strict=True):
            state[name] = part.contiguous().clone()
    return state


def _blocks(theirs: str, ours: str, layers: int) -> Iterator[Row]:
    for i in range(layers):
        block, layer = f"{theirs}.{i}", f"{ours}.{i}"
        qkv = [f"{layer}.self_attn.{side}_proj" for side in "qkv"]
        yield Row(f"{block}.attn.in_proj_weight", tuple(f"{name}.weight" for name in qkv))
        yield Row(f"{block}.attn.in_proj_bias", tuple(f"{name}.bias" for name in qkv))
        yield from _affine(f"{block}.attn.out_proj", f"{layer}.self_attn.out_proj")
        yield from _affine(f"{block}.ln_1", f"{layer}.layer_norm1")
        yield from _affine(f"{block}.ln_2", f"{layer}.layer_norm2")
        yield from _affine(f"{block}.mlp.c_fc", f"{layer}.mlp.fc1")
        yield from _affine(f"{block}.mlp.c_proj", f"{layer}.mlp.fc2")


def _affine(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in ("weight", "bias")]


def _ratio(tower: Any) -> float:
    ratio = float(tower.intermediate_size) / float(tower.hidden_size)
    if int(tower.hidden_size * ratio) != tower.intermediate_size:
        raise Unmapped(f"open_clip writes {tower.intermediate_size} hidden units as a ratio, and it does not come out")
    return ratio


def _refuse_unknown(given: Mapping[str, Any], fixed: Mapping[str, Any], free: set[str], where: str) -> None:
    for key, value in given.items():
        if key not in free and (key not in fixed or value != fixed[key]):
            raise Unmapped(f"its {where} has {key}: {value!r}, which transformers' CLIPModel does not compute")


def _refuse_leftover(there: Mapping[str, torch.Tensor], known: set[str]) -> None:
    if left := sorted(there.keys() - known):
        raise Unmapped(f"it has weights with no counterpart: {_listed(left[:3])}")


def _listed(values: Any) -> str:
    return ", ".join(map(str, sorted(values, key=str)))
