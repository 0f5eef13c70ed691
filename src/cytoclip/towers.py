"""What is done to whole towers: longer captions, a trial pair, less memory for the backward pass, compilation.

Letters: N old positions, L tokens, F width, D embedding, H×W pixels.
"""

from __future__ import annotations

import torch
from torch import nn

from cytoclip.errors import ExitCode, UserError
from cytoclip.families import refuse_context
from cytoclip.model import Checkpoint, DualEncoder, reason_of

KEPT_POSITIONS = 20  # Long-CLIP, arXiv 2403.15378, section 3.1: the well-trained ones, left as they are


def stretch_context(read: Checkpoint, length: int) -> bool:
    """Let CLIP's text tower and tokenizer read `length` tokens: whether that is more than before.

    The first 20 position embeddings are kept. The i-th after them is read, between neighbours, at the place i · (n -
    20) ÷ (length - 20) of the old ones, and at the very end on the line through the last two: for 77 → 248 what
    Long-CLIP does (arXiv 2403.15378, section 3.1).

    Raises
    ------
    UserError
        Another family, a length below the checkpoint's own, or fewer than 22 positions to begin with.
    """
    settings = read.clip.config.text_config
    own = int(settings.max_position_embeddings)
    if read.family.no_longer_context:
        refuse_context(read.family, length)
    if length == own:
        return False
    if length < own or own < KEPT_POSITIONS + 2:
        why = "can only be made longer" if length < own else f"can be made longer from {KEPT_POSITIONS + 2} on"
        raise UserError(
            f"model.context_length is {length} but the checkpoint reads {own} tokens, which {why}",
            "delete model.context_length, or use another checkpoint",
            ExitCode.MODEL,
        )
    embeddings = read.clip.text_model.embeddings
    table = embeddings.position_embedding
    embeddings.position_embedding = nn.Embedding(
        length, table.embedding_dim, _weight=_stretched(table.weight.detach(), length)
    )
    embeddings.position_ids = torch.arange(length)[None]
    settings.max_position_embeddings = read.clip.text_model.config.max_position_embeddings = length
    read.tokenizer.model_max_length = length
    return True


def check_pair(name: str, encoder: DualEncoder, tokens_1L: torch.Tensor, size: tuple[int, int]) -> None:
    """Send one blank picture and a caption through, as transformers does: what fails now fails with a reason.

    Raises
    ------
    UserError
        A tower does not take its input, has no pooled feature, or the two do not end in one space.
    """
    floats_13HW = encoder.to_floats(torch.zeros(1, 3, *size, dtype=torch.uint8))
    found: dict[str, torch.Tensor | None] = {}
    encoder.eval()
    with torch.no_grad():
        for side, features, given in (
            ("image", encoder.clip.get_image_features, {"pixel_values": floats_13HW}),
            ("text", encoder.clip.get_text_features, {"input_ids": tokens_1L}),
        ):
            try:
                found[side] = features(**given).pooler_output
            except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                raise UserError(
                    f"{name}: the {side} tower fails on one input: {reason_of(error)}",
                    f"its image processor makes {size[0]} × {size[1]} pixels: set its size to what the tower takes"
                    if side == "image"
                    else "use a BERT-like text tower that transformers pools by itself, and its own tokenizer",
                    ExitCode.MODEL,
                ) from None
    for side, feature_1D in found.items():
        shape = None if feature_1D is None else tuple(feature_1D.shape)
        if shape != (1, encoder.width):
            raise UserError(
                f"{name}: the {side} tower's feature has the shape {shape}, not (1, {encoder.width})",
                "use towers that pool each input to one vector, of the same width where they have no projections",
                ExitCode.MODEL,
            )


def checkpoint_gradients(encoder: DualEncoder) -> None:
    """Keep only the input of each layer of both towers and compute the rest again in the backward pass.

    The gradients are the same, dropout included.

    Raises
    ------
    UserError
        A tower cannot.
    """
    for tower in (encoder.image_tower, encoder.text_tower):
        if not tower.supports_gradient_checkpointing:
            raise UserError(
                f"train.gradient_checkpointing is true but transformers cannot do that with a "
                f"{tower.config.model_type!r} tower",
                "set train.gradient_checkpointing=false; a smaller train.micro_batch_size saves memory too",
                ExitCode.MODEL,
            )
        # transformers has been giving it a new name since 5.23
        switch = getattr(tower, "activation_checkpointing_enable", None) or tower.gradient_checkpointing_enable
        switch({"use_reentrant": False})


def compile_towers(encoder: DualEncoder, backend: str = "inductor") -> None:
    """Compile the layers of both towers where they are: modules, parameters and their names stay as they were.

    Layer by layer, because all layers of a tower share one compiled graph: seconds instead of minutes at the start.

    Raises
    ------
    UserError
        The layers of a tower cannot be told apart.
    """
    # Each of training and evaluation, with and without a graph, both towers, one row or several: more than torch's 8,
    # beyond which it goes on uncompiled with a warning.
    from torch._dynamo import config as dynamo  # half a second, for those who ask for it

    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    for tower in (encoder.image_tower, encoder.text_tower):
        for layer in encoder.layers(tower):
            layer.compile(dynamic=True, backend=backend)


def _stretched(old_NF: torch.Tensor, length: int) -> torch.Tensor:
    rest = old_NF[KEPT_POSITIONS:]
    place = torch.arange(length - KEPT_POSITIONS, dtype=torch.float64) * len(rest) / (length - KEPT_POSITIONS)
    below = place.floor().long().clamp(max=len(rest) - 2)
    part = (place - below)[:, None].to(old_NF.dtype)
    return torch.cat([old_NF[:KEPT_POSITIONS], rest[below] + part * (rest[below + 1] - rest[below])])
