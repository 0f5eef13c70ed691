"""Tiny random checkpoints of every family, with tokenizers made on the spot: what the hub's would be, but small."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    Dinov2Config,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from cytoclip import evaluation
from cytoclip.console import Console
from cytoclip.evaluation import How, Question
from cytoclip.report import Scores

CAPTIONS = [
    "A round cell, with blue nucleus (on the left).",
    "two cells on a clean background; small vacuoles beside a purple cytoplasm and a dark, clumped, lobed nucleus",
    "cell",
    "Many small cells with a round nucleus",
]
QUIET = Console(quiet=True)
SIDE, PATCH, WIDTH, LAYERS = 32, 16, 32, 2
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
_VISION = {**_SIZES, "image_size": SIDE, "patch_size": PATCH}


def siglip(folder: Path, captions: Iterable[str]) -> None:
    """With the sentencepiece tokenizer of SigLIP, which takes punctuation out and lower-cases."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption.lower() for caption in captions] * 3),
        model_writer=written,
        vocab_size=150,
        hard_vocab_limit=False,
        unk_id=2,
        eos_id=1,
        pad_id=0,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(written.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    _siglip(folder, tokenizer)


def siglip2(folder: Path, captions: Iterable[str]) -> None:
    """With a Gemma-like tokenizer: cased as such, so that the lower-casing of training is left to the reader."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))  # noqa: S106
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=200, show_progress=False, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = Siglip2Tokenizer(
        tokenizer_object=made, vocab=made.get_vocab(), model_max_length=16, padding_side="right"
    )
    tokenizer.backend_tokenizer.post_processor = made.post_processor
    _siglip(folder, tokenizer)


def chinese_clip(folder: Path, captions: Iterable[str]) -> None:
    tokenizer = _bert_tokenizer(folder, captions)
    text = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 0}
    torch.manual_seed(0)
    ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    _clip_processor().save_pretrained(folder)


def two_towers(folder: Path, captions: Iterable[str]) -> None:
    """DINOv2 and a BERT; the configuration says 64 pixels, the processor 32: DINOv2 interpolates."""
    tokenizer = _bert_tokenizer(folder, captions)
    vision = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2,
                          image_size=2 * SIDE, patch_size=PATCH)  # fmt: skip
    text = BertConfig(**_SIZES, vocab_size=len(tokenizer), max_position_embeddings=40)
    torch.manual_seed(0)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
    VisionTextDualEncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _clip_processor().save_pretrained(folder)


MADE: dict[str, Callable[[Path, Iterable[str]], None]] = {
    "siglip": siglip,
    "siglip2": siglip2,
    "chinese_clip": chinese_clip,
    "two towers": two_towers,
}


def _siglip(folder: Path, tokenizer: Any) -> None:
    text = {**_SIZES, "vocab_size": max(len(tokenizer), 200), "max_position_embeddings": 16, "projection_size": WIDTH}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 2}
    torch.manual_seed(0)
    clip = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    clip.logit_scale.data.fill_(4.77)  # as google/siglip-base-patch16-224's: above CLIP's ceiling
    clip.logit_bias.data.fill_(-12.9)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def _bert_tokenizer(folder: Path, captions: Iterable[str]) -> Any:
    words = sorted({word.strip(".,;()") for caption in captions for word in caption.lower().split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *",.;()-"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n", encoding="utf-8")
    return BertTokenizer(str(folder / "vocab.txt"), model_max_length=40)


def _clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def scores_of(model: Path | str, split: Path, ks: list[int], batch_size: int = 12, console: Console = QUIET) -> Scores:
    """What `cytoclip evaluate` measures of one model, less what a validation in training has not."""
    how = How(batch_size=batch_size, workers=0)
    found = evaluation.evaluate([str(model)], split, Question(ks), console, how).columns()[str(model)]
    return {key: found[key] for key in ("pairs", "image_to_text", "text_to_image", "chance")}
