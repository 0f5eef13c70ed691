"""Floating-point operations of a CLIP's training step: as torch counts them, and by hand.

Model FLOPs are those of one forward and one backward pass with the plain loss; what a chunked step embeds again, what
an attention kernel computes again and what the optimizer does is not among them. A multiplication and an addition
are two.

Letters: B pairs, T tokens, P patches, p side of a patch, h width, L layers, D embedding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cytoclip.model import DualEncoder

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # float32's; torch (2.13) does not count it
_ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ADDED = torch.ops.aten.addmm_  # the loss's gradients; torch counts addmm alone


def counted(step: Callable[[], Any]) -> float:
    """What torch counts in `step`: matrix products, convolutions and attention."""

    def there(query_BHTd: torch.Size, key_BHSd: torch.Size, *_: Any, times: int = 2, **__: Any) -> int:
        return 2 * times * query_BHTd.numel() * key_BHSd[2]

    def back(_: torch.Size, query_BHTd: torch.Size, key_BHSd: torch.Size, *__: Any, **___: Any) -> int:
        return there(query_BHTd, key_BHSd, times=5)  # scores again, and four gradients

    def added(_: torch.Size, left_nk: torch.Size, right_km: torch.Size, **__: Any) -> int:
        return 2 * left_nk.numel() * right_km[1]

    ours = {_ATTENTION: there, _ATTENTION_BACK: back, _ADDED: added}
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        step()
    return float(counter.get_total_flops())


def of_model(encoder: DualEncoder, pixels: torch.Tensor, tokens: torch.Tensor) -> float:
    """Model FLOPs of a step of these pairs, counted by torch on plain attention and the plain loss."""
    kept = encoder.clip.config._attn_implementation
    encoder.clip.set_attn_implementation("eager")  # matrix products, each of which torch counts

    def plain() -> None:
        images, texts = encoder(pixels, tokens)
        scores = encoder.logit_scale.exp() * images @ texts.T
        each = torch.arange(len(scores), device=scores.device)
        (functional.cross_entropy(scores, each) + functional.cross_entropy(scores.T, each)).backward()

    found = counted(plain)
    encoder.zero_grad()
    encoder.clip.set_attn_implementation(kept)
    return found


def by_hand(settings: Any, pairs: int, tokens: int, shortened: bool = False) -> float:
    """Model FLOPs of a CLIP whose layers all move.

    Parameters
    ----------
    settings
        Its CLIPConfig.
    tokens
        T of the text tower.
    shortened
        Whether the last layer of each tower is computed for the token that is read (`cytoclip.last_layer`).
    """
    vision, text = settings.vision_config, settings.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    towers = _tower(vision, patches + 1, shortened) + _tower(text, tokens, shortened)
    projections = 2 * (vision.hidden_size + text.hidden_size) * settings.projection_dim
    scores = 2 * pairs * settings.projection_dim  # of one picture with all texts
    forward_and_twice_back = 3 * (towers + projections + scores)
    cut = 2 * patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    return float(pairs * (forward_and_twice_back + 2 * cut))  # pixels have no gradient


def _tower(settings: Any, tokens: int, shortened: bool) -> int:
    """One forward pass of one row: q, k, v and output, two linear layers; scores and their sum over values."""
    h = settings.hidden_size
    of_each = 2 * (2 * h * h + 2 * h * settings.intermediate_size) + 2 * 2 * tokens * h  # but keys and values
    layer = tokens * (of_each + 2 * 2 * h * h)
    return int(settings.num_hidden_layers * layer - shortened * (tokens - 1) * of_each)


class Products(TorchDispatchMode):
    """Notes every matrix product under it: operation, shapes and strides of its factors, dtype.

    Those inside a CPU's attention kernel too, of contiguous factors; what it computes again on its way back is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            left, right = given[:2] if name in ("mm", "bmm") else given[-2:]
            kind = "bmm" if left.ndim == 3 else "mm"
            self.found[kind, *((tuple(x.shape), x.stride()) for x in (left, right)), left.dtype] += 1
        if function.overloadpacket is _ATTENTION:
            self._attention(*given[:2], sums=1)
        if function.overloadpacket is _ATTENTION_BACK:
            self._attention(*given[1:3], sums=3)  # the gradients at queries, keys and values
        return function(*given, **(named or {}))

    def _attention(self, query_BHTd: torch.Tensor, key_BHSd: torch.Tensor, sums: int) -> None:
        """One product over dimensions, the scores or their gradient, and `sums` over tokens."""
        B, H, T, d = query_BHTd.shape
        S = key_BHSd.shape[2]
        for times, shapes in ((1, ((T, d), (d, S))), (sums, ((T, S), (S, d)))):
            factors = (((B * H, n, m), (n * m, m, 1)) for n, m in shapes)
            self.found["bmm", *factors, query_BHTd.dtype] += times


def alone(products: Counter[tuple[Any, ...]], device: torch.device) -> list[tuple[Callable[[], Any], int]]:
    """The same products by themselves, of random numbers in the same layout, and how often each occurs."""
    made = []
    for (kind, *factors, dtype), times in products.items():
        left, right = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_() for shape, stride in factors
        )
        made.append((partial(getattr(torch, kind), left, right), times))
    return made
