"""The towers' layers in fewer passes over memory, in training: the same functions, rounded in other places.

A step of a CLIP is half matrix products; the rest is reading and writing what lies between them (docs/log.md,
2026-11-26). Each forward here replaces that of one module where it is, so names of weights and saved files stay, and
a tower that does not train (`eval`) computes what transformers does to the last bit.

Letters: B pictures, H×W pixels, h width, I inputs, O outputs, r rank.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional
from transformers.activations import QuickGELUActivation

from cytoclip.config import Train
from cytoclip.model import DualEncoder, compile_towers, layers

ENOUGH = 500  # steps from which compiling, 15 seconds for a ViT-B/16 on an H200, is worth its while
_QUICK = 1.702  # of quick GELU, x · σ(1.702 x) (arXiv 1606.08415)


def lighten(clip: nn.Module) -> None:
    """Replace the forward of every module in `clip` that has a leaner one; after adapters are in, before compiling."""
    for module in clip.modules():
        if isinstance(module, QuickGELUActivation):
            _replace(module, _quick_gelu)
        elif isinstance(module, nn.Conv2d) and _is_patches(module):
            _replace(module, _patches)
        elif isinstance(module, LoraLinear) and _is_plain(module):
            _replace(module, _lora)


def compile_if_it_pays(encoder: DualEncoder, wanted: Train, steps: int, kind: str, processes: int) -> bool:
    """What `train.compile: auto` stands for on a device of `kind`; where it is yes, the towers are compiled.

    Should a compiler fail at a layer after all, torch says so and that layer goes on as it is.
    """
    there = importlib.util.find_spec("triton") and (
        os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    )
    asked = wanted.gradient_checkpointing or wanted.shard or processes > 1 or encoder.drops_out()
    apart = all(len(layers(tower)) for tower in (encoder.image_tower, encoder.text_tower))
    if kind != "cuda" or steps < ENOUGH or asked or not there or not apart:
        return False
    from torch._dynamo import config as dynamo

    dynamo.suppress_errors = True
    compile_towers(encoder)
    return True


def _replace(module: nn.Module, leaner: Callable[..., torch.Tensor]) -> None:
    """`leaner(module, …)` in training; what the class says elsewhere."""
    usual = type(module).forward

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        return (leaner if self.training else usual)(self, *given, **named)

    module.forward = MethodType(forward, module)


def _quick_gelu(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """SiLU has one kernel for each direction, and keeps one tensor where x · σ(1.702 x) keeps two."""
    if torch.compiler.is_compiling():  # which fuses the factors
        return functional.silu(x * _QUICK) * (1 / _QUICK)
    gelu: torch.Tensor = _QuickGelu.apply(x)  # type: ignore[no-untyped-call]
    return gelu


class _QuickGelu(torch.autograd.Function):
    """silu(1.702 x) ÷ 1.702, whose derivative is SiLU's at 1.702 x: the two factors cancel, and no pass is for them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        inner = x * _QUICK
        ctx.save_for_backward(inner)
        return functional.silu(inner).mul_(1 / _QUICK)

    @staticmethod
    def backward(ctx: Any, by_output: torch.Tensor) -> torch.Tensor:
        (inner,) = ctx.saved_tensors
        found: torch.Tensor = torch.ops.aten.silu_backward(by_output, inner)
        return found


def _is_patches(convolution: nn.Conv2d) -> bool:
    plain = convolution.groups == 1 and convolution.padding in ((0, 0), "valid") and convolution.dilation == (1, 1)
    return plain and convolution.kernel_size == convolution.stride


def _patches(convolution: nn.Module, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """A convolution whose patches do not overlap is one matrix product; cuDNN's is not on the matrix units."""
    assert isinstance(convolution, nn.Conv2d)  # noqa: S101 - `lighten` looked
    (p, q), (B, C) = convolution.kernel_size, pixels_BCHW.shape[:2]
    n, m = pixels_BCHW.shape[2] // p, pixels_BCHW.shape[3] // q
    cut = pixels_BCHW[:, :, : n * p, : m * q].to(_dtype(pixels_BCHW))
    rows = cut.view(B, C, n, p, m, q).permute(0, 2, 4, 1, 3, 5).reshape(B, n * m, C * p * q)
    found = functional.linear(rows, convolution.weight.flatten(1), convolution.bias)
    return found.transpose(1, 2).reshape(B, -1, n, m)


def _is_plain(layer: Any) -> bool:
    """LoRA that is W x + s · B A x: no dropout, no magnitudes, one adapter that is not merged."""
    names = layer.active_adapters
    dropout = [m for m in layer.lora_dropout.values() if not isinstance(m, nn.Identity)]
    return len(names) == 1 and not layer.lora_variant and not dropout and not layer.merged and not layer.fan_in_fan_out


def _lora(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """W x + s · B A x with the sum inside the product by B; peft's goes through float32 and takes six passes more."""
    (name,) = layer.active_adapters
    plain = layer.base_layer(x)
    # no alpha=: torch.compile takes the factor of a layer for a tensor, of which a product's alpha cannot be made
    low = functional.linear(x, layer.lora_A[name].weight) * layer.scaling[name]
    both = torch.addmm(plain.flatten(0, -2), low.flatten(0, -2), layer.lora_B[name].weight.t())
    return both.view(plain.shape)


def _dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product of `x` is computed in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
