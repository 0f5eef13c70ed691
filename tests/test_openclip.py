"""CLIP under open_clip's names, against open_clip's own class (behind a stand-in for torchvision: stand_in.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from cytoclip import checkpoint, export, export_open_clip, openclip
from cytoclip.captions import tokenise
from cytoclip.checkpoint import Opened
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder
from cytoclip.openclip import Unmapped
from tests import stand_in, tiny

QUIET = Console(quiet=True)
V = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
T = {**V, "num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3}


def opened(base: Path, act: str = "quick_gelu", scale: float = 4.6052) -> Opened:
    """The tiny checkpoint's tokenizer and pixels around a CLIP whose towers differ, with a large scale."""
    read = checkpoint.open_model(str(base))
    ends = {"eos_token_id": read.tokenizer.eos_token_id, "vocab_size": len(read.tokenizer)}
    config = CLIPConfig(
        vision_config={**V, "image_size": 32, "patch_size": 8, "hidden_act": act},
        text_config={**T, "max_position_embeddings": 77, "hidden_act": act, **ends},
        projection_dim=16,
    )
    torch.manual_seed(1)
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for tensor in clip.parameters():
            tensor += 0.1 * torch.randn_like(tensor)  # norms and biases too, which begin as 1 and 0
        clip.logit_scale.fill_(scale)
    encoder = DualEncoder(clip, read.encoder.to_floats, read.encoder.pad, read.encoder.image_size)
    return Opened(encoder.eval(), read.tokenizer, read.image_processor, read.pixels, 77, "a CLIP", plain=False)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_open_clip_opens_it_and_gives_the_same_logits(base: Path, tmp_path: Path, act: str) -> None:
    ours = opened(base, act)
    assert export_open_clip.write(ours, tmp_path) == []
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = tokenise(ours.tokenizer, tiny.CAPTIONS, 77).batch(range(4))
    with stand_in.open_clip() as library, torch.no_grad():
        theirs, _, _ = library.create_model_and_transforms(f"local-dir:{tmp_path}")
        assert type(theirs) is library.CLIP
        theirs.eval()
        tokens = library.get_tokenizer(f"local-dir:{tmp_path}")(tiny.CAPTIONS)
        logits = theirs.get_logits(pixels, tokens)[0]
        wrong, _, _ = library.create_model_and_transforms(f"local-dir:{tmp_path}", quick_gelu=act == "gelu")
        apart = (wrong.eval().get_logits(pixels, tokens)[0] - logits).abs().max()
    assert tokens.shape == (4, 77)
    assert tokens[:, : ids.shape[1]].equal(ids)
    clip = ours.encoder.clip
    with torch.no_grad():
        image = functional.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        expected = clip.logit_scale.exp() * image @ ours.encoder.texts(ids).T
    assert (logits - expected).abs().max() < 1e-4
    assert apart > 1e-2, "the other GELU would have been seen"


def test_there_and_back_is_the_same_bytes(base: Path) -> None:
    clip = opened(base).encoder.clip
    rows = openclip.clip_rows(3, 2)
    theirs = openclip.to_theirs(rows, clip.state_dict())
    assert theirs["visual.proj"].shape == (32, 16)
    assert theirs["visual.transformer.resblocks.2.attn.in_proj_weight"].shape == (96, 32)
    back = openclip.to_ours(rows, theirs)
    assert back.keys() == clip.state_dict().keys()
    assert all(back[name].equal(tensor) for name, tensor in clip.state_dict().items())
    with pytest.raises(Unmapped, match=r"no counterpart: visual\.other"):
        openclip.to_ours(rows, {**theirs, "visual.other": torch.ones(1)})
    with pytest.raises(Unmapped, match=r"lacks the weights ln_final\.bias"):
        openclip.to_ours(rows, {name: tensor for name, tensor in theirs.items() if name != "ln_final.bias"})


def test_the_settings_there_and_back(base: Path) -> None:
    clip = opened(base, "gelu").encoder.clip
    end = clip.config.text_config.eos_token_id
    said = openclip.config_of(clip, end, "beside")
    assert "pool_type" not in said["text_cfg"], "argmax, which every version knows"
    assert openclip.config_of(clip, end + 1, "beside")["text_cfg"]["pool_type"] == "eos"
    back = CLIPConfig(**openclip.clip_settings(json.loads(json.dumps(said)), end))
    for side, keys in (("vision_config", {*V, "image_size", "patch_size"}), ("text_config", {*T, "vocab_size"})):
        for key in (*keys, "hidden_act"):
            assert getattr(getattr(back, side), key) == getattr(getattr(clip.config, side), key), key


PLAIN: dict[str, Any] = {"embed_dim": 16, "vision_cfg": {"layers": 2, "width": 64}, "text_cfg": {"layers": 2}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "width": 64}}, "a ResNet"),
        ({"multimodal_cfg": {}}, "a CoCa"),
        ({"init_logit_bias": -10}, "a logit bias"),
        ({"vision_cfg": {"layers": 2, "pool_type": "avg"}}, "pool_type: 'avg'"),
        ({"vision_cfg": {"layers": 2, "act_kwargs": {"approximate": "tanh"}}}, "act_kwargs"),
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask"),
        ({"text_cfg": {"pool_type": "last"}}, "pools by 'last'"),
        ({"text_cfg": {"of_a_later_version": 1}}, "of_a_later_version"),
        ({"vision_cfg": {"image_size": [224, 112]}}, "not square"),
    ],
)
def test_what_clip_model_does_not_compute_is_refused(changes: dict[str, Any], said: str) -> None:
    assert openclip.clip_settings(PLAIN, 7)["text_config"]["eos_token_id"] == 7
    with pytest.raises(Unmapped, match=said):
        openclip.clip_settings({**PLAIN, **changes}, 7)


@pytest.mark.parametrize(("name", "said"), [("siglip", "exact GELU"), ("chinese_clip", "no class for Chinese-CLIP"),
                                            ("two towers", "no class for two separate towers")])  # fmt: skip
def test_families_without_a_place_there_are_refused(
    bases: dict[str, Path], tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        export.export(str(bases[name]), tmp_path / "out", "open_clip", QUIET)
    assert caught.value.code == ExitCode.MODEL
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, None, "gelu, quick_gelu"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, None, "epsilon of 1e-5"),
        ({"vision_config": {"num_channels": 1}}, None, "3 channels"),
    ],
)
def test_what_open_clip_has_no_setting_for_is_refused(part: dict[str, Any], value: None, said: str) -> None:
    clip = CLIPModel(
        CLIPConfig(
            vision_config={**V, **part.get("vision_config", {})},
            text_config={**T, "vocab_size": 50, **part.get("text_config", {})},
        )
    )
    with pytest.raises(Unmapped, match=said):
        openclip.config_of(clip, 49, "beside")


def test_open_clip_is_asked_where_it_is_there(base: Path, tmp_path: Path) -> None:
    with stand_in.open_clip() as library:
        done = export.export(str(base), tmp_path / "asked", "open_clip", QUIET)
        assert done.compared_by == f"open_clip {library.__version__}"
    done = export.export(str(base), tmp_path / "read", "open_clip", QUIET)
    assert "our reader" in done.compared_by
    assert "open_clip could not be asked" in (tmp_path / "read" / "README.md").read_text()
    weights = [load_file(tmp_path / name / openclip.WEIGHTS) for name in ("asked", "read")]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())


def test_the_processor_is_said_as_far_as_it_can_be(base: Path, tmp_path: Path) -> None:
    whole = opened(base)
    for crop, mode in (("center", "shortest"), ("squash", "squash")):
        folder = tmp_path / crop
        folder.mkdir()
        assert export_open_clip.write(checkpoint.with_crop(whole, crop), folder) == []
        said = json.loads((folder / openclip.CONFIG).read_text())["preprocess_cfg"]
        assert (said["size"], said["resize_mode"], said["interpolation"]) == (32, mode, "bicubic")
        assert said["mean"] == list(whole.pixels.mean)
