"""Attention in bf16 on a CPU, by the matrix products that its bf16 units are made for.

Torch's own kernel there takes five times as long for 50 tokens and two and a half times for 197, forward and backward
(docs/log.md, 2026-11-26); longer rows, other devices and other precisions keep it.

Letters: B rows, H heads, T queries, S keys, d dimensions of a head; G = B·H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "cytoclip"
# Tokens a dimension of a head up to which it is used. The probabilities are kept, 2·H·S bytes a token, so at most 10 a
# unit of the tower's width, beside the 49 that a layer keeps anyhow (plan.py).
LONGEST = 5


def quicken(clip: Any) -> None:
    """Let both towers attend by matrix products where that is faster, in training; their weights stay as they are."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    clip.set_attn_implementation(NAME)


def pays(query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, dropout: float) -> bool:
    """Whether matrix products are faster here, and exact: no dropout, a key for each query's head."""
    fits = query_BHTd.shape[1] == key_BHSd.shape[1] and key_BHSd.shape[2] <= LONGEST * key_BHSd.shape[3]
    return fits and not dropout and query_BHTd.device.type == "cpu" and query_BHTd.dtype == torch.bfloat16


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: (B, H, T, d) three times → (B, T, H, d)."""
    if not module.training or not pays(query, key, dropout) or more.get("position_bias") is not None:
        given = query, key, value, attention_mask
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, *given, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
        return found
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    mask = attention_mask
    if mask is None and causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended: torch.Tensor = _ByProducts.apply(query * scale, key, value, mask)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2), None


class _ByProducts(torch.autograd.Function):
    """softmax(Q Kᵀ + mask) V, and its gradient; everything that is kept is bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTd: torch.Tensor,
        key_BHSd: torch.Tensor,
        value_BHSd: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """`mask`: what may be attended to (bool), or what is added to the scores; of a shape as (B, H, T, S)."""
        scores_GTS = torch.bmm(_flat(query_BHTd), _flat(key_BHSd).mT)
        if mask is not None:
            scores_BHTS = scores_GTS.view(*query_BHTd.shape[:3], -1)
            if mask.dtype == torch.bool:
                scores_BHTS.masked_fill_(~mask, torch.finfo(scores_GTS.dtype).min)
            else:
                scores_BHTS += mask
        shares_GTS = scores_GTS.softmax(dim=-1)  # in float32 inside
        ctx.save_for_backward(query_BHTd, key_BHSd, value_BHSd, shares_GTS)
        return torch.bmm(shares_GTS, _flat(value_BHSd)).view(query_BHTd.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output_BHTd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHTd, key_BHSd, value_BHSd, shares_GTS = ctx.saved_tensors
        by_output_GTd = _flat(by_output_BHTd)
        by_value_GSd = torch.bmm(shares_GTS.mT, by_output_GTd)
        by_share_GTS = torch.bmm(by_output_GTd, _flat(value_BHSd).mT)
        by_score_GTS = torch._softmax_backward_data(by_share_GTS, shares_GTS, -1, shares_GTS.dtype)
        by_query_GTd = torch.bmm(by_score_GTS, _flat(key_BHSd))
        by_key_GSd = torch.bmm(by_score_GTS.mT, _flat(query_BHTd))
        like = query_BHTd.shape, key_BHSd.shape, value_BHSd.shape
        found = by_query_GTd, by_key_GSd, by_value_GSd
        return (*(each.view(shape) for each, shape in zip(found, like, strict=True)), None)


def _flat(rows_BHTd: torch.Tensor) -> torch.Tensor:
    return rows_BHTd.reshape(-1, *rows_BHTd.shape[2:])
