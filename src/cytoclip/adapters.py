"""What moves in a dual encoder: towers frozen, freed or adapted by peft, and adapted weights as plain ones again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
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
from cytoclip.model import DualEncoder, not_opened


def set_moving(encoder: DualEncoder, wanted: Model) -> PeftModel | None:
    """Freeze, free or adapt each part as `wanted` says; returns the adapter's owner where a tower is LoRA.

    New adapter weights are drawn from torch's random state.
    """
    family, clip = encoder.family, encoder.clip
    towers = {family.image_tower: wanted.image_tower, family.text_tower: wanted.text_tower}
    adapted = [tower for tower, mode in towers.items() if mode == "lora"]
    clip.requires_grad_(False)
    adapter = _adapt(clip, adapted, wanted.lora, family) if wanted.lora and adapted else None
    for tower, mode in towers.items():
        if mode == "full":
            getattr(clip, tower).requires_grad_(True)
    if wanted.projections == "full":
        for projection in family.projections:
            getattr(clip, projection).requires_grad_(True)
    clip.logit_scale.requires_grad_(True)  # peft freezes it, and modules_to_save cannot name a bare parameter
    return adapter


def merged_state(clip: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a plain CLIP, LoRA added to what it adapts; `clip` itself is not touched.

    (peft's merge and unmerge in place would round the training weights.)
    """
    deltas = {f"{name}.weight": layer.get_delta_weight(layer.active_adapters[0]) for name, layer in _lora_layers(clip)}
    state = {}
    for name, tensor in clip.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = (tensor + deltas[plain] if plain in deltas else tensor).detach().cpu().contiguous()
    return state


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


def _adapt(clip: nn.Module, towers: list[str], lora: Lora, family: Family) -> PeftModel:
    leaves = family.lora_leaves if lora.targets == "auto" else tuple(lora.targets)
    for tower in towers:
        there = sorted(
            {n.rpartition(".")[2] for n, m in getattr(clip, tower).named_modules() if isinstance(m, nn.Linear)}
        )
        for leaf in leaves:
            if leaf not in there:
                raise UserError(
                    f"model.lora.targets: {leaf!r} matches no linear layer of {tower}",
                    f"its linear layers are called {', '.join(there)}",
                    ExitCode.MODEL,
                )
    pattern = rf"({'|'.join(towers)})\.(.*\.)?({'|'.join(map(re.escape, leaves))})"
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=pattern, bias="none"
    )
    with _quiet_peft():
        return get_peft_model(clip, settings)


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
