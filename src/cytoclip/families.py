"""The kinds of checkpoint that can be trained, as data: how each reads text, where it pools, what it supports."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import ChineseCLIPModel, CLIPModel, SiglipModel, VisionTextDualEncoderModel

from cytoclip.config import Model, Train
from cytoclip.errors import UserError
from cytoclip.objectives import Kind
from cytoclip.towers import KIND, TwoTowers

_PROJECTIONS = ("visual_projection", "text_projection")


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Parameters
    ----------
    title, such_as
        What people call it, and a checkpoint or two.
    opens
        The transformers class.
    objective
        What its checkpoints were trained with: what `train.objective: auto` means.
    pads
        Captions of a batch are padded to the longest, or always to the whole context.
    masks
        Whether the text tower must be told what is padding (it attends both ways), or needs no mask: a causal tower
        does not see what follows, and SigLIP was trained to see its padding.
    pools
        The token whose feature is the caption's: its one end token, the first one, or the last place of the context.
    lower
        Captions are lower-cased before the tokenizer, as in training.
    projections
        Names of the two layers into the shared space, where they are apart from the towers.
    fixed_size
        Whether the image tower reads pictures of the size in its configuration only.
    no_stretch
        Why `model.context_length` is refused; empty where it is not.
    image_tower, text_tower
        Names of the towers' modules.
    """

    title: str
    such_as: str
    opens: Any
    objective: Kind
    pads: Literal["longest", "context"]
    masks: bool
    pools: Literal["end", "first", "last"]
    lower: bool
    projections: tuple[str, ...]
    fixed_size: bool
    no_stretch: str
    image_tower: str = "vision_model"
    text_tower: str = "text_model"


FAMILIES = {
    "clip": Family(
        title="CLIP",
        such_as="openai/clip-vit-base-patch16, laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        opens=CLIPModel,
        objective="infonce",
        pads="longest",
        masks=False,
        pools="end",
        lower=False,
        projections=_PROJECTIONS,
        fixed_size=True,
        no_stretch="",
    ),
    "siglip": Family(
        title="SigLIP, SigLIP2 (fixed resolution)",
        such_as="google/siglip-base-patch16-224, google/siglip2-base-patch16-224",
        opens=SiglipModel,
        objective="sigmoid",
        pads="context",
        masks=False,
        pools="last",
        lower=True,
        projections=(),
        fixed_size=True,
        no_stretch="its text tower pools at the last place of a context that is always filled up, and a longer one "
        "would move that place",
    ),
    "chinese_clip": Family(
        title="Chinese-CLIP",
        such_as="OFA-Sys/chinese-clip-vit-base-patch16",
        opens=ChineseCLIPModel,
        objective="infonce",
        pads="longest",
        masks=True,
        pools="first",
        lower=False,
        projections=_PROJECTIONS,
        fixed_size=True,
        no_stretch="its BERT text tower reads hundreds of tokens as it is",
    ),
    "vision-text-dual-encoder": Family(
        title="two separate towers (VisionTextDualEncoder)",
        such_as="any image and text model of transformers, such as DINOv2 and a BERT, joined by "
        "VisionTextDualEncoderModel.from_vision_text_pretrained",
        opens=VisionTextDualEncoderModel,
        objective="infonce",
        pads="longest",
        masks=True,
        pools="first",
        lower=False,
        projections=_PROJECTIONS,
        fixed_size=False,
        no_stretch="the position embeddings of its text tower are that model's own",
    ),
}
# A class of its own (towers.py), trained as any two towers are.
FAMILIES[KIND] = replace(
    FAMILIES["vision-text-dual-encoder"],
    title="two separate towers of open_clip",
    such_as="hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    opens=TwoTowers,
)
JOINED = ("vision-text-dual-encoder", KIND)  # two towers that may never have met

# Kinds that look like one of ours and are not: the reason is the message.
REFUSED = {
    "siglip2": "is SigLIP2 of variable resolution (NaFlex), whose pictures have different numbers of patches; use a "
    "checkpoint of fixed resolution, such as google/siglip2-base-patch16-224",
}


# Image towers whose `embeddings` give a class token or registers, if any, and then one token a patch, with positions
# added, and which never ask later where a token was: there, patches can be left out.
PATCH_TOWERS = {
    "clip_vision_model": "CLIP",
    "chinese_clip_vision_model": "Chinese-CLIP",
    "siglip_vision_model": "SigLIP",
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
}


def refuse_unsupported(family: Family, image_tower: str, model: Model, train: Train) -> None:
    """Raise `UserError`, with the reason, for options that this kind of checkpoint has no use for.

    Parameters
    ----------
    image_tower
        The `model_type` of the image tower's configuration.
    """
    if train.patch_dropout and image_tower not in PATCH_TOWERS:
        raise UserError(
            f"train.patch_dropout: {train.patch_dropout}, but a {image_tower!r} image tower needs all its patches, "
            "in their places",
            f"delete train.patch_dropout, or use an image tower of {', '.join(PATCH_TOWERS.values())}",
        )
    if model.context_length is not None and family.no_stretch:
        raise UserError(
            f"model.context_length: {model.context_length} is refused for {family.title}: {family.no_stretch}",
            "delete model.context_length; it is for CLIP",
        )
    if not family.projections and model.projections != "full":
        raise UserError(
            f"model.projections: {model.projections}, but {family.title} has no projections apart from its towers",
            "delete model.projections; the towers' heads move with the towers",
        )
    if not family.projections and {model.image_tower, model.text_tower} == {"frozen"}:
        raise UserError(
            f"both towers are frozen, and {family.title} has no projections: only the logit scale would move",
            "set model.image_tower or model.text_tower to full or lora",
        )
    if train.patch_dropout and model.image_tower == "frozen":
        raise UserError(
            f"train.patch_dropout: {train.patch_dropout} saves the image tower work, and model.image_tower is frozen",
            "delete train.patch_dropout: a frozen tower's features are computed once",
        )
    if train.gradient_checkpointing and {model.image_tower, model.text_tower} == {"frozen"}:
        raise UserError(
            "train.gradient_checkpointing saves what towers keep for their gradient, and both are frozen",
            "delete train.gradient_checkpointing",
        )


def page() -> str:
    """`docs/reference/families.md`."""
    titles = ["", "such as", "`objective: auto`", "padding", "pooled at", "projections", "`context_length`", "pictures"]
    rows = [
        [
            f"**{family.title}** (`{kind}`)",
            family.such_as,
            family.objective,
            {"longest": "to the longest of the chunk", "context": "to the whole context, as in training"}[family.pads]
            + (", masked" if family.masks else "")
            + ("; captions lower-cased" if family.lower else ""),
            {"end": "its end token", "first": "the first token", "last": "the last place"}[family.pools],
            "two, apart from the towers" if family.projections else "none: heads move with their tower",
            f"no: {family.no_stretch}" if family.no_stretch else "yes",
            "the checkpoint's size" if family.fixed_size else "any size that the image tower takes",
        ]
        for kind, family in FAMILIES.items()
    ]
    return "\n".join(
        [
            "# Families of checkpoints",
            "",
            "Rendered from `src/cytoclip/families.py` by `make docs`.",
            "The kind in brackets is `model_type` in a checkpoint's `config.json`.",
            "",
            *("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)),
            "",
            "Full, frozen and LoRA towers in any combination, patch dropout on towers of patches, gradient",
            "checkpointing, layer decay, averages, anchors and chunks of any size work with all of them; the sigmoid",
            "objective where there is a logit bias (SigLIP). LoRA adapts the q, k and v layers under whatever names a",
            "tower gives them. What has no effect is refused before the first step.",
            "",
            f"Image towers whose patches can be dropped: {', '.join(PATCH_TOWERS.values())}.",
            "",
            "Not read: " + "; ".join(f"`{kind}` {why}" for kind, why in REFUSED.items()) + ".",
            "",
        ]
    )
