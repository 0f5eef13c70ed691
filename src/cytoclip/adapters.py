"""What moves in a dual encoder: towers frozen, freed or adapted by peft, and adapted weights as plain ones again."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cytoclip.config import Lora, Model
from cytoclip.errors import ExitCode, UserError, first_few
from cytoclip.families import Family
from cytoclip.model import DualEncoder, layers, not_opened

# What towers call their q, k and v projections: CLIP and SigLIP; BERT, ViT and DINOv2; T5; timm and fused ones.
_QKV: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("qkv",),
)


def set_moving(encoder: DualEncoder, wanted: Model, bias: bool = True) -> PeftModel | None:
    """Freeze, free or adapt each part as `wanted` says; returns the adapter's owner where a tower is LoRA.

    New adapter weights are drawn from torch's random state.
    """
    family, clip = encoder.family, encoder.clip
    towers = {family.image_tower: wanted.image_tower, family.text_tower: wanted.text_tower}
    adapted = [tower for tower, mode in towers.items() if mode == "lora"]
    clip.requires_grad_(False)
    adapter = _adapt(encoder, adapted, wanted.lora) if wanted.lora and adapted else None
    for tower, mode in towers.items():
        if mode == "full":
            getattr(clip, tower).requires_grad_(True)
    if wanted.projections == "full":
        for projection in family.projections:
            getattr(clip, projection).requires_grad_(True)
    if bias and encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(True)
    clip.logit_scale.requires_grad_(True)  # peft freezes it, and modules_to_save cannot name a bare parameter
    return adapter


def scaling(lora: Lora) -> float:
    """What the adapters' output is multiplied with: alpha ÷ rank, with rsLoRA (arXiv 2312.03732) alpha ÷ √rank."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def merged_state(clip: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a plain CLIP, LoRA added to what it adapts; `clip` itself is not touched.

    (peft's merge and unmerge in place would round the training weights.)
    """
    merged = {f"{name}.weight": _merged(layer) for name, layer in _lora_layers(clip)}
    state = {}
    for name, tensor in clip.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = merged.get(plain, tensor).detach().cpu().contiguous()
    return state


def _merged(layer: Any) -> torch.Tensor:
    """W + ΔW; under DoRA each row of it is brought to its trained magnitude (arXiv 2402.09353, equation 5)."""
    name = layer.active_adapters[0]
    weight: torch.Tensor = layer.get_base_layer().weight + layer.get_delta_weight(name)
    if name not in layer.lora_magnitude_vector:
        return weight
    magnitude = layer.lora_magnitude_vector[name].weight
    directed: torch.Tensor = weight * (magnitude / weight.norm(dim=1))[:, None]
    return directed


def beside_adapter(clip: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """What trains beside LoRA and peft does not save: the projections and the logit scale."""
    kept = (*(f"{projection}." for projection in family.projections), "logit_scale", "logit_bias")
    return {n: t.detach().cpu().contiguous() for n, t in clip.state_dict().items() if n.startswith(kept)}


def read_adapter(folder: Path, clip: nn.Module) -> nn.Module:
    """Put the peft adapter in `folder` into `clip` and merge it; one that lacks a tensor is refused."""
    try:
        with _quiet_peft():
            adapted = PeftModel.from_pretrained(clip, str(folder))
        missing = get_peft_model_state_dict(adapted).keys() - load_file(folder / "adapter_model.safetensors").keys()
        if missing:
            raise ValueError(f"adapter_model.safetensors lacks {first_few(sorted(missing))}")
        merged: nn.Module = adapted.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise not_opened(str(folder), error) from None
    return merged


def _adapt(encoder: DualEncoder, towers: list[str], lora: Lora) -> PeftModel:
    patterns = [_pattern(tower, getattr(encoder.clip, tower), lora) for tower in towers]
    if lora.targets != "auto":
        _refuse_unmatched(encoder, towers, lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules="|".join(f"({pattern})" for pattern in patterns),
        bias="none",
    )
    with _quiet_peft():
        return get_peft_model(encoder.clip, settings)


def _pattern(name: str, tower: nn.Module, lora: Lora) -> str:
    """A regular expression for the linear layers of one tower that are adapted."""
    there = _linear_leaves(tower)
    if lora.targets == "auto":
        leaves = next((names for names in _QKV if set(names) <= there), None)
        if leaves is None:
            raise UserError(
                f"model.lora.targets: {name} has no q, k and v layers of a name we know",
                f"name some of its linear layers: {', '.join(sorted(there))}",
                ExitCode.MODEL,
            )
    else:
        leaves = tuple(target for target in lora.targets if target in there)
        if not leaves:
            raise _unmatched(", ".join(lora.targets), name, there)
    last = "|".join(map(re.escape, leaves))
    if lora.last_layers is None:
        return rf"{name}\.(.*\.)?({last})"
    stacked = layers(tower)
    if lora.last_layers > len(stacked):
        raise UserError(
            f"model.lora.last_layers: {lora.last_layers} is more than the {len(stacked)} layers of {name}",
            "lower it, or delete it to adapt all",
            ExitCode.MODEL,
        )
    place = next(path for path, module in tower.named_modules() if module is stacked)
    numbers = "|".join(str(index) for index in range(len(stacked) - lora.last_layers, len(stacked)))
    return rf"{name}\.{re.escape(place)}\.({numbers})\.(.*\.)?({last})"


def _refuse_unmatched(encoder: DualEncoder, towers: list[str], targets: Sequence[str]) -> None:
    """Each target must be a layer of at least one adapted tower (each tower's own are looked at in `_pattern`)."""
    for target in targets:
        leaves = {tower: _linear_leaves(getattr(encoder.clip, tower)) for tower in towers}
        if not any(target in there for there in leaves.values()):
            raise _unmatched(target, " or ".join(towers), set().union(*leaves.values()))


def _unmatched(target: str, place: str, there: set[str]) -> UserError:
    return UserError(
        f"model.lora.targets: {target!r} matches no linear layer of {place}",
        f"its linear layers are called {', '.join(sorted(there))}",
        ExitCode.MODEL,
    )


def _linear_leaves(tower: nn.Module) -> set[str]:
    return {n.rpartition(".")[2] for n, m in tower.named_modules() if isinstance(m, nn.Linear)}


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for a name that transformers will drop; no user can mend that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _lora_layers(clip: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in clip.named_modules():
        if hasattr(module, "get_delta_weight"):
            yield name, module
