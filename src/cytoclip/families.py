"""The kinds of checkpoint that can be trained, and what is particular about each; as data, read by all who need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

from cytoclip.config import Model, Train
from cytoclip.errors import ExitCode, UserError


@dataclass(frozen=True)
class Family:
    """What differs between kinds of checkpoint.

    Parameters
    ----------
    title
        What people call it.
    opens
        The name of its class in transformers.
    objective
        What it was trained with.
    pooled
        The token whose state becomes the caption's feature: its one `end` token, its `first` one, or the one at the
        `last` position, padding or not.
    padded
        Captions of a batch: to the `longest` of them, or always to the whole `context`.
    masked
        Whether attention must be kept from the padding; a causal tower never looks that far.
    lowered
        Whether it was trained on lower-cased captions that its tokenizer may not lower.
    image_size
        Who says how large pictures are: the `config` of the image tower, or the image `processor`.
    projections
        Submodules from the towers into the shared space; none where the towers end in it.
    lora_leaves
        The q, k and v projections of its attention.
    no_longer_context
        Why `model.context_length` cannot be above the checkpoint's own; None where it can.
    needs
        What a checkpoint of this kind has to have, for the reference page.
    """

    title: str
    opens: str
    objective: Literal["infonce", "sigmoid"]
    pooled: Literal["end", "first", "last"]
    padded: Literal["longest", "context"]
    masked: bool
    lowered: bool
    image_size: Literal["config", "processor"]
    projections: tuple[str, ...]
    lora_leaves: tuple[str, ...]
    no_longer_context: str | None
    needs: str
    image_tower: str = "vision_model"
    text_tower: str = "text_model"


_BOTH = ("visual_projection", "text_projection")
_BERT = "BERT-like text towers already read 512 tokens, far more than captions have"

FAMILIES = {
    "clip": Family(
        title="CLIP",
        opens="CLIPModel",
        objective="infonce",
        pooled="end",
        padded="longest",
        masked=False,
        lowered=False,
        image_size="config",
        projections=_BOTH,
        lora_leaves=("q_proj", "k_proj", "v_proj"),
        no_longer_context=None,
        needs="a tokenizer whose end token is the one that the text tower pools at",
    ),
    "siglip": Family(
        title="SigLIP, and SigLIP 2 at a fixed resolution",
        opens="SiglipModel",
        objective="sigmoid",
        pooled="last",
        padded="context",
        masked=False,
        lowered=True,
        image_size="config",
        projections=(),
        lora_leaves=("q_proj", "k_proj", "v_proj"),
        no_longer_context="SigLIP pads every caption to one fixed length and pools at its last position, so another "
        "length is another model",
        needs="an image tower with its attention pooling head",
    ),
    "chinese_clip": Family(
        title="Chinese CLIP",
        opens="ChineseCLIPModel",
        objective="infonce",
        pooled="first",
        padded="longest",
        masked=True,
        lowered=False,
        image_size="config",
        projections=_BOTH,
        lora_leaves=("q_proj", "k_proj", "v_proj", "query", "key", "value"),
        no_longer_context=_BERT,
        needs="a tokenizer with a padding and a first (cls) token",
    ),
    "vision-text-dual-encoder": Family(
        title="two towers of transformers",
        opens="VisionTextDualEncoderModel",
        objective="infonce",
        pooled="first",
        padded="longest",
        masked=True,
        lowered=False,
        image_size="processor",
        projections=_BOTH,
        lora_leaves=("q_proj", "k_proj", "v_proj", "query", "key", "value"),
        no_longer_context=_BERT,
        needs="a BERT-like text tower with a pooler, an image tower with one pooled feature a picture, and the image "
        "processor's size one that this tower takes",
    ),
}

REFUSED = {
    "siglip2": "its NaFlex image tower reads pictures of any shape, and here all pictures of a batch have one; "
    "take a SigLIP 2 of fixed resolution, such as google/siglip2-base-patch16-224",
}

# Image towers of which `embeddings` gives prefix tokens (class token, registers) and then one token a patch, with
# positions already added, and in which nothing later asks where a token was: there, patches can be left out.
PATCH_TOWERS = {
    "clip_vision_model": "CLIP",
    "chinese_clip_vision_model": "Chinese CLIP",
    "siglip_vision_model": "SigLIP",
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
}


def refuse_unsupported(family: Family, image_tower: str, wanted: Model, train: Train) -> None:
    """Raise for what this kind of checkpoint cannot do, with the reason.

    Parameters
    ----------
    image_tower
        The `model_type` of the image tower's configuration.

    Raises
    ------
    UserError
    """
    if wanted.context_length is not None and family.no_longer_context:
        refuse_context(family, wanted.context_length)
    if train.patch_dropout and image_tower not in PATCH_TOWERS:
        raise UserError(
            f"train.patch_dropout is {train.patch_dropout:g} but the patches of a {image_tower!r} image tower cannot "
            "be left out: it needs them all, in their places",
            f"set train.patch_dropout=0, or use an image tower of {', '.join(PATCH_TOWERS.values())}",
            ExitCode.MODEL,
        )
    if not family.projections and wanted.image_tower == wanted.text_tower == "frozen":
        raise UserError(
            f"{family.title} has no projections beside its towers: nothing but the logit scale would move",
            "unfreeze a tower",
            ExitCode.MODEL,
        )


def refuse_context(family: Family, length: int) -> NoReturn:
    """Raise that `model.context_length` is not for this family."""
    raise UserError(
        f"model.context_length is {length}, which is for CLIP alone: {family.no_longer_context}",
        "delete model.context_length",
        ExitCode.MODEL,
    )


def reference() -> str:
    """`docs/reference/families.md`."""
    names = "| | " + " | ".join(f"{family.title} (`{key}`)" for key, family in FAMILIES.items()) + " |"
    rows = [names, "| --- " * (len(FAMILIES) + 1) + "|"]
    for title, cell in _ROWS.items():
        rows.append(f"| {title} | " + " | ".join(cell(family) for family in FAMILIES.values()) + " |")
    refused = [f"- `{key}`: {reason}." for key, reason in REFUSED.items()]
    towers = [f"- {name} (`{key}`)" for key, name in PATCH_TOWERS.items()]
    return "\n".join([_HEAD, *rows, "", _PATCHES, *towers, "", _REFUSED_HEAD, *refused, ""])


_HEAD = """\
# Model families

What `model.name` may be, by the `model_type` of its `config.json`; made from `src/cytoclip/families.py` by `make docs`.
"""

_PATCHES = """\
`train.patch_dropout` works with these image towers, of a family of their own or as one of two towers:
"""

_REFUSED_HEAD = """\
Refused, with the reason:
"""

_POOLS = {
    "end": "the one end token; a caption without exactly one, at its end, is refused",
    "first": "the first token, which must be the tokenizer's cls token",
    "last": "the last position, padding or not",
}
_PADS = {
    "longest": "to the longest caption of a batch",
    "context": "to the whole context, on the tokenizer's own side",
}
_SIZES = {
    "config": "the image tower's `image_size`; the image processor must make the same",
    "processor": "the image processor's, where the image tower takes it: one pair is tried at opening",
}

_ROWS: dict[str, Callable[[Family], str]] = {
    "class in transformers": lambda f: f"`{f.opens}`",
    "`train.objective: auto`": lambda f: f.objective,
    "logit scale and bias": lambda f: "scale and bias" if f.objective == "sigmoid" else "scale",
    "captions are padded": lambda f: _PADS[f.padded],
    "attention mask": lambda f: "keeps out the padding; a caption that holds it is refused" if f.masked else "none",
    "captions are lower-cased": lambda f: "yes, as it was trained" if f.lowered else "as its tokenizer does",
    "text pooling": lambda f: _POOLS[f.pooled],
    "projections": lambda f: (
        " and ".join(f"`{p}`" for p in f.projections) or "none: the towers end in the shared space"
    ),
    "q, k and v (`model.lora.targets: auto`)": lambda f: ", ".join(f"`{leaf}`" for leaf in f.lora_leaves),
    "`train.patch_dropout`": lambda f: "yes" if f.image_size == "config" else "by image tower, see below",
    "`model.context_length`": lambda f: f"no: {f.no_longer_context}" if f.no_longer_context else "yes",
    "picture size": lambda f: _SIZES[f.image_size],
    "needs": lambda f: f.needs,
}
