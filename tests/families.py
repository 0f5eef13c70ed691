"""Tiny random checkpoints of every family, each with a tokenizer of its own kind, made here without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import SentencePieceBPETokenizer, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from cytoclip import demo

SIZE, PATCH, WIDTH, LAYERS, EMBEDDING = 32, 16, 32, 2, 16
TOWER = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
CENTER = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}


def write(name: str, folder: Path, captions: Sequence[str]) -> None:
    """Write the tiny checkpoint called `name`, one of `NAMES`."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for part in _MAKERS[name](folder, captions):
        part.save_pretrained(folder)


def bert_tokenizer(folder: Path, captions: Sequence[str]) -> Any:
    """A WordPiece vocabulary of the letters and words of `captions`."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz细胞"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters), *words]
    file = folder / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    return BertTokenizer(str(file), model_max_length=40)


def _clip(folder: Path, captions: Sequence[str]) -> list[Any]:
    shape = demo.Shape(SIZE, PATCH, WIDTH, LAYERS, WIDTH, LAYERS, 2, EMBEDDING)
    demo.write_base(folder, captions, shape, seed=0)
    return []


def _siglip(folder: Path, captions: Sequence[str]) -> list[Any]:
    """As google/siglip-base-patch16-224: a sentencepiece model, captions filled with its end token."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        hard_vocab_limit=False,
        byte_fallback=False,
        add_dummy_prefix=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    return [_siglip_model(tokenizer, 400), tokenizer, _siglip_processor()]


def _siglip2(folder: Path, captions: Sequence[str]) -> list[Any]:
    """As google/siglip2-base-patch16-224: a SiglipModel beside a Gemma tokenizer, which does not lower captions."""
    learned = SentencePieceBPETokenizer()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    learned.train_from_iterator(captions, vocab_size=300, special_tokens=special, show_progress=False)
    learned.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,
        **dict(zip(("pad_token", "eos_token", "bos_token", "unk_token", "mask_token"), special, strict=True)),
        padding_side="right",
        model_max_length=16,
    )
    return [_siglip_model(tokenizer, len(tokenizer)), tokenizer, _siglip_processor()]


def _siglip_model(tokenizer: Any, vocabulary: int) -> SiglipModel:
    text = {**TOWER, "vocab_size": vocabulary, "max_position_embeddings": 16, "projection_size": WIDTH}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-10.0)
    return model


def _siglip_processor() -> Any:
    half = [0.5] * 3
    return SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half)


def _chinese_clip(folder: Path, captions: Sequence[str]) -> list[Any]:
    tokenizer = bert_tokenizer(folder, captions)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 48}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=VISION, projection_dim=EMBEDDING))
    return [model, tokenizer, ChineseCLIPImageProcessorPil(**CENTER)]


def _dinov2_bert(folder: Path, captions: Sequence[str]) -> list[Any]:
    """The image tower was made for 64 pixels and interpolates; the text tower has dropout."""
    tokenizer = bert_tokenizer(folder, captions)
    vision = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=8
    )
    text = BertConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=48)
    return [_two(vision, Dinov2Model(vision), text, BertModel(text)), tokenizer, BitImageProcessorPil(**CENTER)]


def _vit_roberta(folder: Path, captions: Sequence[str]) -> list[Any]:
    learned = demo.train_tokenizer(captions, size=300)
    start, end = learned.bos_token, learned.eos_token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned.backend_tokenizer,
        bos_token=start,
        cls_token=start,
        eos_token=end,
        sep_token=end,
        pad_token=learned.pad_token,
        model_max_length=512,
    )
    vision = ViTConfig(**VISION)
    text = RobertaConfig(
        **TOWER, vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id
    )
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE})
    return [_two(vision, ViTModel(vision), text, RobertaModel(text)), tokenizer, processor]


def _two(vision: Any, image_tower: Any, text: Any, text_tower: Any) -> VisionTextDualEncoderModel:
    both = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=EMBEDDING)
    return VisionTextDualEncoderModel(both, image_tower, text_tower)


_MAKERS: dict[str, Callable[[Path, Sequence[str]], list[Any]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip2": _siglip2,
    "chinese-clip": _chinese_clip,
    "dinov2-bert": _dinov2_bert,
    "vit-roberta": _vit_roberta,
}
NAMES = tuple(_MAKERS)
