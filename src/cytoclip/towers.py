"""Two towers joined as open_clip joins them: BiomedCLIP's text features are its first token's, through a small MLP.

transformers' VisionTextDualEncoder takes a tower's own pooler and one linear layer, and has no place for that. Saved,
this opens with cytoclip only; `cytoclip export` makes ONNX and open_clip's own folders of it.
"""
# B pairs, L tokens, h width of the text tower, D embedding

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

KIND = "cytoclip_two_towers"


class TwoTowersConfig(VisionTextDualEncoderConfig):  # type: ignore[misc]
    """As of VisionTextDualEncoder, and how a caption becomes one vector.

    Parameters
    ----------
    text_pooling
        `first`: the first token; `mean`: the mean over what is no padding.
    text_hidden
        Width of the hidden layer of the text projection; 0: one linear layer.
    open_clip
        `model_cfg` of the checkpoint that it came from, to go back.
    """

    model_type = KIND
    text_pooling: str = "first"
    text_hidden: int = 0
    open_clip: dict | None = None  # type: ignore[type-arg]


class TwoTowers(VisionTextDualEncoderModel):  # type: ignore[misc]
    """Image tower, text tower without a pooler, two projections, one logit scale."""

    config_class = TwoTowersConfig
    config: TwoTowersConfig

    def __init__(self, config: TwoTowersConfig) -> None:
        text_model = AutoModel.from_config(config.text_config, add_pooling_layer=False)
        super().__init__(config, text_model=text_model)
        if config.text_hidden:
            self.text_projection = nn.Sequential(
                nn.Linear(config.text_config.hidden_size, config.text_hidden, bias=False),
                nn.GELU(),
                nn.Linear(config.text_hidden, config.projection_dim, bias=False),
            )


def pooled(config: Any, hidden_BLh: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Text features (B, h)."""
    if config.text_pooling == "first":
        return hidden_BLh[:, 0]
    weights_BL1 = mask_BL[..., None].to(hidden_BLh.dtype)
    return (hidden_BLh * weights_BL1).sum(1) / weights_BL1.sum(1)


AutoConfig.register(KIND, TwoTowersConfig)
AutoModel.register(TwoTowersConfig, TwoTowers)
