"""Checkpoints of open_clip, from a folder or the hub, written once as a Hugging Face folder that is then opened."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

from cytoclip import files, openclip
from cytoclip.errors import ExitCode, UserError, first_line
from cytoclip.model import DualEncoder
from cytoclip.openclip import CONFIG, Unmapped
from cytoclip.towers import TwoTowers, TwoTowersConfig

HUB = "hf-hub:"  # what open_clip writes before a hub id
VERSION = 1  # of the conversion: another number makes it anew
_WEIGHTS = (openclip.WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
OPENAI = "openai/clip-vit-base-patch32"  # whose tokenizer is that of 49,408 tokens
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # where nothing is said
_TRIED = ["A round cell with a blue nucleus.", "clean background"]
LOGITS = 1e-4  # by which logits may differ from open_clip's: rounding only
_FILTERS = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers


def is_one(name: str) -> bool:
    """Whether `name` is of open_clip: `hf-hub:…`, or a folder with its configuration and none of transformers'."""
    folder = Path(name)
    return name.startswith(HUB) or (
        (folder / CONFIG).is_file() and not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_"))
    )


def converted(name: str) -> Path:
    """The Hugging Face folder made of it, now or before; in the user's cache.

    Raises
    ------
    UserError
        For what is not there or has no counterpart in transformers, with the reason.
    """
    source = _downloaded(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name).resolve()
    weights = next((source / file for file in _WEIGHTS if (source / file).is_file()), None)
    if weights is None:
        raise UserError(f"{name} has none of {', '.join(_WEIGHTS)}", "put the weights there", ExitCode.MODEL)
    transformers_logging.disable_progress_bar()  # of seconds' work
    target = files.home_cache() / "open_clip" / _key(source, weights)
    busy = UserError(f"another process reads {name} right now", "start it again when that is done", ExitCode.MODEL)
    with files.lock(target.with_suffix(".lock"), busy, wait=600):
        if not target.is_dir():
            with files.whole_folder(target) as new:
                _convert(name, source, weights, new)
    return target


def build(
    model_cfg: Mapping[str, Any], state: Mapping[str, torch.Tensor], end: int, text_config: Any = None
) -> CLIPModel | TwoTowers:
    """The model of transformers that computes what open_clip would make of `model_cfg` and `state`.

    Parameters
    ----------
    end
        Id of the tokenizer's end token.
    text_config
        Of the Hugging Face text model, where there is one.

    Raises
    ------
    Unmapped
        Where there is no such model.
    """
    plain = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
    if "timm_model_name" not in model_cfg["vision_cfg"] and "hf_model_name" not in model_cfg["text_cfg"]:
        clip = CLIPModel(CLIPConfig(**openclip.clip_settings(model_cfg, end)))
        layers = clip.config.vision_config.num_hidden_layers, clip.config.text_config.num_hidden_layers
        ours = openclip.to_ours(openclip.clip_rows(*layers), _without_prefix(plain))
        return _loaded(clip, ours)
    if "timm_model_name" not in model_cfg["vision_cfg"] or text_config is None:
        raise Unmapped("it joins a tower of its own with one of another library; read are two of the same kind")
    vision = Dinov2Config(**openclip.vit_settings(model_cfg))
    said = openclip.text_settings(model_cfg, text_config.hidden_size)
    config = TwoTowersConfig.from_vision_text_configs(vision, text_config, open_clip=dict(model_cfg), **said)
    towers = TwoTowers(config)
    expected = towers.state_dict()
    plain.pop("text.transformer.embeddings.position_ids", None)  # of older transformers: 0, 1, 2, …
    rows = openclip.two_tower_rows(expected, vision.num_hidden_layers)
    return _loaded(towers, openclip.with_scales(openclip.to_ours(rows, plain), expected))


def _convert(name: str, source: Path, weights: Path, new: Path) -> None:
    try:
        said = files.read_json(source / CONFIG)
        model_cfg, preprocess = said["model_cfg"], said.get("preprocess_cfg", {})
        tokenizer = _tokenizer(source, model_cfg["text_cfg"])
        text_config = _text_config(model_cfg["text_cfg"])
        clip = build(model_cfg, _read(weights), tokenizer.eos_token_id, text_config)
        tokenizer.model_max_length = int(model_cfg["text_cfg"].get("context_length", 77))
        if text_config is not None and tokenizer.pad_token_id != text_config.pad_token_id:
            raise Unmapped("its tokenizer pads with another id than its text tower masks")
        _compare(source, clip, tokenizer)
    except Unmapped as reason:
        raise UserError(
            f"{name} has no counterpart in transformers: {reason}",
            "use a Hugging Face checkpoint; of open_clip's are read CLIPs of its own transformers (QuiltNet), and "
            "plain ViTs of timm beside a BERT (BiomedCLIP)",
            ExitCode.MODEL,
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{name} cannot be read: {type(error).__name__}: {why}",
            f"it needs {CONFIG}, one of {', '.join(_WEIGHTS)}, and a network once for what these name",
            ExitCode.MODEL,
        ) from None
    clip.save_pretrained(new)
    tokenizer.save_pretrained(new)
    _processor(preprocess, clip.config.vision_config.image_size).save_pretrained(new)


@torch.no_grad()
def _compare(source: Path, clip: Any, tokenizer: Any) -> None:
    """Logits against open_clip's own class, where open_clip can be imported."""
    try:
        import open_clip
    except ImportError:
        return
    theirs = open_clip.create_model(f"local-dir:{source}").eval()
    encoder = DualEncoder(clip, lambda pixels_B3HW: pixels_B3HW, tokenizer.pad_token_id or 0).eval()
    drawn = torch.Generator().manual_seed(0)
    pixels_B3HW = torch.randn(2, 3, *encoder.image_size, generator=drawn)
    ids_BL = tokenizer(_TRIED, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ours_BB = encoder.logit_scale.exp() * encoder.images(pixels_B3HW) @ encoder.texts(ids_BL).T
    image_BD, text_BD = (theirs.encode_image(pixels_B3HW, normalize=True), theirs.encode_text(ids_BL, normalize=True))
    apart = float((theirs.logit_scale.exp() * image_BD @ text_BD.T - ours_BB).abs().max())
    if not apart <= LOGITS:
        raise Unmapped(
            f"what was made of it gives other logits than open_clip {open_clip.__version__}, {apart:.2g} apart"
        )


def _loaded(clip: Any, state: Mapping[str, torch.Tensor]) -> Any:
    fitted = dict(state)
    for name, tensor in clip.state_dict().items():
        if name in state and tensor.numel() == state[name].numel() == 1:
            fitted[name] = state[name].reshape(tensor.shape)  # the scale, which some keep as a list of one
        if name in fitted and fitted[name].shape != tensor.shape:
            raise Unmapped(f"its {name} is {tuple(fitted[name].shape)}, where {tuple(tensor.shape)} was expected")
    clip.load_state_dict(fitted)
    return clip.eval()


def _without_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text tower kept apart (`custom_text`) has its names behind `text.`."""
    return {name.removeprefix("text.") if name != "text.proj" else name: tensor for name, tensor in state.items()}


def _read(weights: Path) -> dict[str, torch.Tensor]:
    if weights.suffix == ".safetensors":
        tensors: dict[str, torch.Tensor] = load_file(weights)
        return tensors
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)  # tensors and numbers; no code
    except UnpicklingError:  # whose text says how to run it all the same
        raise ValueError(f"{weights.name} holds more than tensors, or is damaged") from None
    found = found.get("state_dict", found)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def _tokenizer(source: Path, text_cfg: Mapping[str, Any]) -> Any:
    """The one beside, that of the name in the configuration, or OpenAI's."""
    if text_cfg.get("tokenizer_mode"):
        raise Unmapped(f"its tokenizer works in a mode of its own, {text_cfg['tokenizer_mode']!r}")
    if any((source / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return AutoTokenizer.from_pretrained(str(source), config=_kind(text_cfg), trust_remote_code=False)
    if name := text_cfg.get("hf_tokenizer_name"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return openai_tokenizer()


def _kind(text_cfg: Mapping[str, Any]) -> Any:
    """The configuration of transformers by which AutoTokenizer knows whose files they are."""
    return _text_config(text_cfg) or CLIPConfig()


def _text_config(text_cfg: Mapping[str, Any]) -> Any:
    name = text_cfg.get("hf_model_name")
    if not name:
        return None
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type not in ("bert", "roberta", "xlm-roberta"):
        raise Unmapped(f"its text tower is a {config.model_type!r}; read are BERT and RoBERTa")
    return config


def openai_tokenizer() -> Any:
    """CLIP's own: from the vocabulary that open_clip carries where it is installed, else from the hub."""
    found = importlib.util.find_spec("open_clip")
    places = (
        [Path(place) / "bpe_simple_vocab_16e6.txt.gz" for place in (found.submodule_search_locations or ())]
        if found
        else []
    )
    for place in places:
        if place.is_file():
            return _from_merges(gzip.decompress(place.read_bytes()).decode("utf-8").split("\n"))
    return CLIPTokenizer.from_pretrained(OPENAI)


def _from_merges(lines: list[str]) -> Any:
    """256 bytes, the same at the end of a word, 48,894 merges, start and end: 49,408 tokens."""
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves as characters
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = [chr(byte) for byte in shown] + [chr(256 + place) for place in range(len(hidden))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=77)


def _processor(said: Mapping[str, Any], image_size: int) -> Any:
    """As open_clip reads pictures outside of training."""
    size = said.get("size") or image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    mode = said.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise Unmapped(f"its pictures are read in mode {mode!r}; known are shortest and squash")
    squash = mode == "squash"
    return CLIPImageProcessorPil(
        size={"height": height, "width": width} if squash else {"shortest_edge": max(height, width)},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        image_mean=list(said.get("mean") or _MEAN),
        image_std=list(said.get("std") or _STD),
        resample=_FILTERS.get(said.get("interpolation", "bicubic"), 3),
    )


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    def fetched(*patterns: str) -> Path:
        return Path(snapshot_download(hub_id, allow_patterns=[CONFIG, *_TOKENIZER, *patterns]))

    try:
        place = fetched(*_WEIGHTS[:2])
        if not any((place / file).is_file() for file in _WEIGHTS[:2]):
            place = fetched(_WEIGHTS[2])
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot get {HUB}{hub_id}: {first_line(error)}",
            "check the name and the network, or name a folder",
            ExitCode.MODEL,
        ) from None
    return place


def _key(source: Path, weights: Path) -> str:
    """Of what the conversion depends on: the files beside by content, the weights by size and time."""
    small = {file: (source / file).read_bytes().hex() for file in (CONFIG, *_TOKENIZER) if (source / file).is_file()}
    there = weights.stat()
    text = json.dumps([VERSION, str(weights), small, there.st_size, there.st_mtime_ns])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
