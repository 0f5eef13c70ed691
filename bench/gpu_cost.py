"""What a step of ViT-B/16 costs on a device: parts of `bench/gpu.py`, and what its other parts are measured with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flops
import torch

from cytoclip import adapters, autosize, last_layer, lean, loss, optim
from cytoclip.config import Model, Train
from cytoclip.device import World
from cytoclip.model import DualEncoder, compile_towers
from cytoclip.pairs import Identity
from cytoclip.pixels import PixelSpec, to_floats

Line = dict[str, Any]
TOKENS = 77
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and standard deviation


@dataclass(frozen=True)
class Scale:
    """How large everything is: a card's, or a rehearsal's."""

    device: torch.device
    side: int = 224
    width: int = 768
    layers: int = 12
    batch: int = 32768
    chunks: tuple[int, ...] = (512, 128)  # of a batch of `middle`, of `batch`
    middle: int = 4096
    plain: tuple[int, ...] = (128, 256, 512, 768, 1024, 1536, 2048)
    matrix: int = 8192
    precision: str = "bf16"

    @property
    def world(self) -> World:
        return World(self.device, precision=self.precision)


REHEARSAL = {"side": 32, "width": 64, "layers": 2, "batch": 64, "chunks": (16, 8), "middle": 32, "plain": (8, 16),
             "matrix": 256}  # fmt: skip


def settings_of(scale: Scale, **text: Any) -> Any:
    from transformers import CLIPConfig

    small = {} if scale.width == 768 else {"num_attention_heads": 2, "intermediate_size": 4 * scale.width}
    vision = {"image_size": scale.side, "patch_size": 16, "hidden_size": scale.width, "num_hidden_layers": scale.layers}
    narrow = {"hidden_size": scale.width} if small else {}
    text = {"num_hidden_layers": scale.layers, "bos_token_id": 49406, "eos_token_id": 49407, **text}
    return CLIPConfig(vision_config={**vision, **small}, text_config={**text, **narrow, **small}, projection_dim=512)


def encoder_of(scale: Scale, leaner: bool = True, compiled: bool = False, **moving: Any) -> DualEncoder:
    """ViT-B/16 and CLIP's text tower with random weights, on the device, training as `model.*` options say.

    As a run has it that is or will be compiled or not, or with `leaner` False as transformers and peft have it.
    """
    from transformers import CLIPModel

    torch.manual_seed(0)
    with scale.device:
        clip = CLIPModel(settings_of(scale))
    spec = PixelSpec(scale.side, (scale.side, scale.side), 3, *CLIP, 1 / 255)
    encoder = DualEncoder(clip, lambda pixels: to_floats(pixels, spec), image_size=spec.size).to(scale.device)
    adapters.set_moving(encoder, Model.model_validate(moving))
    if leaner:
        lean.lighten(encoder.clip)
    if leaner and not compiled:
        last_layer.shorten(encoder.clip)
    return encoder.to(scale.device).train()


def inputs(scale: Scale, pairs: int, pinned: bool = False) -> tuple[torch.Tensor, torch.Tensor, Identity]:
    """Random pictures and captions of full length; pinned on the host, as the loader leaves what is large."""
    shape, where = (3, scale.side, scale.side), scale.device
    pinned = pinned and where.type == "cuda"
    pixels = torch.empty(pairs, *shape, dtype=torch.uint8, pin_memory=pinned, device="cpu" if pinned else where)
    for part in pixels.split(2048):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, device=where))
    tokens = torch.randint(1, 49000, (pairs, TOKENS), device=where)
    tokens[:, -1] = 49407
    each = torch.arange(pairs, device=where)
    return pixels, tokens, Identity(each, each, -torch.ones_like(each))


def step_of(
    encoder: DualEncoder, scale: Scale, given: Any, chunk: int, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """What one training step does: gradients, clipping, AdamW."""
    pixels, tokens, identity = given
    moving = encoder.moving()
    optimizer = optimizer or adamw(encoder)
    chunks = list(zip(pixels.split(chunk), tokens.split(chunk), strict=True))

    def step() -> None:
        optimizer.zero_grad()
        loss.contrastive_step(encoder, loss.Logits(encoder.logit_scale), chunks, identity, scale.world)
        optim.clip(moving, 1.0)
        optimizer.step()
        encoder.clamp_scale()

    return step


def adamw(encoder: DualEncoder) -> torch.optim.Optimizer:
    return optim.build(encoder, Train(learning_rate=1e-6))


def seconds_of(step: Callable[[], None], scale: Scale, times: int, warm: int = 2) -> list[float]:
    found = []
    for number in range(warm + times):
        _wait(scale.device)
        began = time.perf_counter()
        step()
        _wait(scale.device)
        if number >= warm:
            found.append(time.perf_counter() - began)
    return found


def measured(
    encoder: DualEncoder,
    scale: Scale,
    given: Any,
    chunk: int,
    times: int,
    warm: int = 2,
    optimizer: torch.optim.Optimizer | None = None,
) -> Line:
    """Pairs a second and the memory at its highest, of the allocator; `fits` False where there is too little."""
    _forget(scale.device)
    pairs = len(given[1])
    try:
        took = seconds_of(step_of(encoder, scale, given, chunk, optimizer), scale, times, warm)
    except torch.OutOfMemoryError:
        encoder.zero_grad()
        return {"batch": pairs, "chunk": chunk, "fits": False}
    speeds = sorted(pairs / one for one in took)
    line = {
        "batch": pairs,
        "chunk": chunk,
        "pairs/s": round(statistics.median(speeds), 1),
        "times": times,
        "from": round(speeds[0], 1),
        "to": round(speeds[-1], 1),
    }
    if scale.device.type == "cuda":
        line["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        line["reserved GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return line


def large(encoder: DualEncoder, scale: Scale, given: Any, chunk: int) -> Line:
    """One step of a large batch, after one of two chunks, from which AdamW has its moments."""
    optimizer = adamw(encoder)
    pixels, tokens, identity = given
    few = slice(2 * chunk)
    line = measured(encoder, scale, (pixels[few], tokens[few], identity.take(few)), chunk, 1, 0, optimizer)
    return measured(encoder, scale, given, chunk, 1, 0, optimizer) if line.get("fits", True) else line


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def plain(scale: Scale) -> Iterator[Line]:
    yield {"matrix TFLOP/s": matrix_rate(scale), "GFLOP a pair": float(f"{model_flops(scale) / 1e9:.5g}")}
    encoder = encoder_of(scale)
    for size in scale.plain:
        line = measured(encoder, scale, inputs(scale, size), size, 4)
        yield line
        if not line.get("fits", True):
            return


def matrix_rate(scale: Scale) -> float:
    """bf16, square, random: the median of ten."""
    a, b = (torch.randn(scale.matrix, scale.matrix, device=scale.device).bfloat16() for _ in range(2))
    took = seconds_of(lambda: torch.mm(a, b), scale, 10, 3)  # type: ignore[arg-type,return-value]
    return float(f"{2 * scale.matrix**3 / statistics.median(took) / 1e12:.4g}")


def model_flops(scale: Scale, pairs: int = 1024) -> float:
    """Of a step, a pair, all weights moving (`flops.by_hand`: what a kernel computes again is not among them)."""
    return flops.by_hand(settings_of(scale), pairs, TOKENS) / pairs


def cached(scale: Scale) -> Iterator[Line]:
    encoder, (wide, narrow) = encoder_of(scale), scale.chunks
    yield measured(encoder, scale, inputs(scale, scale.middle, True), wide, 3, 1)
    yield large(encoder, scale, inputs(scale, scale.batch, True), narrow)


def auto(scale: Scale) -> Iterator[Line]:
    encoder = encoder_of(scale)
    reserved = 8 * sum(p.numel() for p in encoder.moving().values()) + 24 * scale.batch * encoder.width
    fits = autosize.trial(encoder, encoder.image_size, TOKENS, reserved, scale.world)
    tried: dict[int, float] = {}

    def noted(size: int) -> bool:
        began = time.perf_counter()
        try:
            return fits(size)
        finally:
            tried[size] = round(time.perf_counter() - began, 2)

    found = autosize.largest(noted, scale.batch if scale.device.type == "cuda" else 16)
    yield {"found": found, "seconds of each size": tried}
    yield large(encoder, scale, inputs(scale, scale.batch, True), found)


def lora(scale: Scale) -> Iterator[Line]:
    """With the leaner layers, without them, and beside all weights of the same session."""
    towers = {"image_tower": "lora", "text_tower": "lora"}
    for leaner in (True, False):
        encoder = encoder_of(scale, leaner, **towers)
        for size in scale.plain[1:3]:
            yield {"leaner": leaner, **measured(encoder, scale, inputs(scale, size), size, 4)}
        del encoder
    encoder = encoder_of(scale, **towers)
    yield measured(encoder, scale, inputs(scale, scale.middle, True), scale.chunks[0], 2, 1)
    del encoder
    for leaner in (True, False):
        size = scale.chunks[0]
        yield {"all weights": True, "leaner": leaner,
               **measured(encoder_of(scale, leaner), scale, inputs(scale, size), size, 4)}  # fmt: skip


def compiled(scale: Scale) -> Iterator[Line]:
    """All weights: whole, in chunks, and `batch` pairs in chunks as large as the largest of `plain` that fits whole."""
    encoder = encoder_of(scale, compiled=True)
    yield from _compiled(encoder, scale)
    for wide in reversed(scale.plain):
        line = measured(encoder, scale, inputs(scale, wide), wide, 4)
        yield line
        if line.get("fits", True):
            yield large(encoder, scale, inputs(scale, scale.batch, True), wide)
            return


def lora_compiled(scale: Scale) -> Iterator[Line]:
    encoder = encoder_of(scale, compiled=True, image_tower="lora", text_tower="lora")
    yield from _compiled(encoder, scale)
    yield measured(encoder, scale, inputs(scale, scale.middle, True), scale.chunks[0], 2, 1)


def _compiled(encoder: DualEncoder, scale: Scale) -> Iterator[Line]:
    compile_towers(encoder)
    for size in scale.plain[1:3]:
        began = time.perf_counter()
        seconds_of(step_of(encoder, scale, inputs(scale, size), size), scale, 1, 0)
        first = time.perf_counter() - began
        yield {**measured(encoder, scale, inputs(scale, size), size, 4), "seconds of the first": round(first, 1)}
