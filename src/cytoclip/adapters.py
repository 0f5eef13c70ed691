"""What moves in a dual encoder: towers frozen, freed or adapted by peft, and adapted weights as plain ones again."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cytoclip.config import Lora, Model
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.families import Family
from cytoclip.model import DualEncoder, layers, not_opened

# What towers of transformers call their q, k and v projections: CLIP and SigLIP; BERT, ViT and DINOv2; T5; DistilBERT;
# towers with all three in one.
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("qkv",),
)


def set_moving(encoder: DualEncoder, wanted: Model, bias: bool = True) -> PeftModel | None:
    """Freeze, free or adapt each part as `wanted` says; returns the adapter's owner where a tower is LoRA.

    New adapter weights are drawn from torch's random state.

    Parameters
    ----------
    bias
        Whether the logit bias moves, where there is one; only the sigmoid objective has a gradient for it.

    Raises
    ------
    UserError
        For LoRA targets that are not in the towers, and more layers than a tower has.
    """
    family, clip = encoder.family, encoder.clip
    towers = {family.image_tower: wanted.image_tower, family.text_tower: wanted.text_tower}
    adapted = [tower for tower, mode in towers.items() if mode == "lora"]
    clip.requires_grad_(False)
    adapter = _adapt(clip, adapted, wanted.lora) if wanted.lora and adapted else None
    for tower, mode in towers.items():
        if mode == "full":
            getattr(clip, tower).requires_grad_(True)
    if wanted.projections != "frozen":
        for projection in family.projections:
            getattr(clip, projection).requires_grad_(True)
    encoder.logit_scale.requires_grad_(True)  # peft freezes it, and modules_to_save cannot name a bare parameter
    if encoder.logit_bias is not None:
        encoder.logit_bias.requires_grad_(bias)
    return adapter


def scaling(lora: Lora) -> float:
    """What the adapters' output is multiplied with: alpha ÷ rank, with rsLoRA (arXiv 2312.03732) alpha ÷ √rank."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def merged_state(clip: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of a plain CLIP, LoRA merged into what it adapts; `clip` itself is not touched.

    (peft's merge and unmerge in place would round the training weights.)
    """
    adapted = {f"{name}.weight": layer for name, layer in _lora_layers(clip)}
    state = {}
    for name, tensor in clip.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        merged = _merged(tensor, adapted[plain]) if plain in adapted else tensor
        state[plain] = merged.detach().cpu().contiguous()
    return state


def beside_adapter(clip: nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """What trains beside LoRA and peft does not save: the projections, the logit scale and bias."""
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


def _adapt(clip: nn.Module, towers: list[str], lora: Lora) -> PeftModel:
    linears = {tower: _linears(clip, tower, lora.last_layers) for tower in towers}
    if lora.targets == "auto":
        chosen = [name for tower in towers for name in _qkv(tower, linears[tower])]
    else:
        chosen = _targeted(lora.targets, linears)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules="|".join(map(re.escape, chosen)),
        bias="none",
    )
    with _quiet_peft():
        return get_peft_model(clip, settings)


def _linears(clip: nn.Module, tower: str, last: int | None) -> list[str]:
    """Names of the linear layers of a tower that can be adapted, of its last `last` layers only where that is given."""
    root = clip.get_submodule(tower)
    stack = layers(root)
    if last is not None and last > len(stack):
        has = counted(len(stack), "layer") if len(stack) else "no layers in a row"
        raise UserError(
            f"model.lora.last_layers: {last}, but {tower} has {has}",
            f"give at most {len(stack)}" if len(stack) else "delete model.lora.last_layers",
            ExitCode.MODEL,
        )
    inside = {module for layer in stack[-last:] for module in layer.modules()} if last else {*root.modules()}
    # torch's attention reads its output layer's weight and never calls it: an adapter there would do nothing.
    inside -= {m for outer in root.modules() if isinstance(outer, nn.MultiheadAttention) for m in outer.modules()}
    return [f"{tower}.{name}" for name, m in root.named_modules() if isinstance(m, nn.Linear) and m in inside]


def _qkv(tower: str, linears: list[str]) -> list[str]:
    there = {_leaf(name) for name in linears}
    wanted = {leaf for leaves in _QKV if there.issuperset(leaves) for leaf in leaves}
    if not wanted:
        raise UserError(
            f"model.lora.targets: auto finds no q, k and v projections in {tower}",
            f"name some of its linear layers: {_leaves(linears)}",
            ExitCode.MODEL,
        )
    return [name for name in linears if _leaf(name) in wanted]


def _targeted(targets: Sequence[str], linears: Mapping[str, list[str]]) -> list[str]:
    """The linear layers that the user names by their last name, or by more of it; none names nothing (trap 45)."""
    found = {
        tower: {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in targets}
        for tower, names in linears.items()
    }
    for target in targets:
        if not any(of[target] for of in found.values()):
            there = "; ".join(f"those of {tower} are called {_leaves(names)}" for tower, names in linears.items())
            raise UserError(
                f"model.lora.targets: {target!r} matches no linear layer of {' or '.join(linears)}",
                there,
                ExitCode.MODEL,
            )
    for tower, of in found.items():
        if not any(of.values()):
            raise UserError(
                f"model.lora.targets: none of {', '.join(targets)} matches a linear layer of {tower}",
                f"add some of {_leaves(linears[tower])}, or adapt the other tower only",
                ExitCode.MODEL,
            )
    return [name for of in found.values() for name in dict.fromkeys(n for names in of.values() for n in names)]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaves(linears: list[str]) -> str:
    return ", ".join(sorted({_leaf(name) for name in linears})) or "(there are none)"


def _merged(weight_OI: torch.Tensor, layer: Any) -> torch.Tensor:
    """W + ΔW; with DoRA m · (W + ΔW) ÷ |W + ΔW|, each row by itself (arXiv 2402.09353, equation 5)."""
    (name,) = layer.active_adapters
    merged_OI: torch.Tensor = weight_OI + layer.get_delta_weight(name)
    if name in layer.lora_magnitude_vector:
        merged_OI = layer.lora_magnitude_vector[name].weight[:, None] * merged_OI / merged_OI.norm(dim=1, keepdim=True)
    return merged_OI


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
