"""Checkpoints of open_clip as starting models: their logits, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, BertConfig

from cytoclip import checkpoint, export, files, from_open_clip, openclip, towers, training
from cytoclip.captions import tokenise
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from tests import stand_in, tiny

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place


@pytest.fixture
def library() -> Iterator[Any]:
    with stand_in.open_clip() as found:
        yield found


def clip_like(folder: Path, base: Path, **more: Any) -> Path:
    """The configuration of a plain CLIP, as QuiltNet's, with the tiny tokenizer beside."""
    shutil.copytree(base, folder, ignore=lambda *_: ["config.json", "model.safetensors", "preprocessor_config.json"])
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"width": 32, "layers": 2, "mlp_ratio": 2.0}
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {**sizes, "head_width": 16, "image_size": 32, "patch_size": 16},
        "text_cfg": {
            **sizes,
            "heads": 2,
            "vocab_size": vocabulary,
            "context_length": 77,
            "hf_tokenizer_name": "beside",
        },
        **more,
    }
    said = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.3, 0.2]}
    (folder / openclip.CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": said}))
    return folder


def biomed_like(folder: Path, base: Path, **text: Any) -> Path:
    """As BiomedCLIP: a ViT of timm, the smallest there is, beside a BERT whose configuration lies elsewhere."""
    bert = folder / "bert"
    bert.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(base / name, folder / name)
    BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=200,
               max_position_embeddings=40).save_pretrained(bert)  # fmt: skip
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
              "timm_proj": "linear", "image_size": 224}  # fmt: skip
    said = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 24, **text}  # fmt: skip
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": said}
    (folder / openclip.CONFIG).write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    return folder


def made(library: Any, folder: Path, file: str = openclip.WEIGHTS) -> Any:
    """open_clip's own model with random weights, which are put into `folder` too."""
    torch.manual_seed(3)
    model = library.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn_like(tensor)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if file.endswith(".bin"):
        torch.save({"state_dict": state}, folder / file)
    else:
        save_file(state, folder / file)
    return model


@torch.no_grad()
def same_embeddings(library: Any, theirs: Any, folder: Path, opened: checkpoint.Opened) -> None:
    encoder = opened.encoder.eval()
    pixels = torch.randint(0, 256, (3, 3, *encoder.image_size), dtype=torch.uint8)
    captions = [*tiny.CAPTIONS, "cell " * 100]
    ids = library.get_tokenizer(f"local-dir:{folder}")(captions)
    assert ids.shape[1] == opened.context
    tokens = tokenise(opened.tokenizer, captions, opened.context, encoder.family).batch(range(5))
    assert tokens.equal(ids[:, : tokens.shape[1]])
    image = theirs.encode_image(encoder.to_floats(pixels), normalize=True)
    text = theirs.encode_text(ids, normalize=True)
    scale = theirs.logit_scale.exp()
    ours = encoder.logit_scale.exp() * encoder.images(pixels) @ encoder.texts(tokens).T
    assert (scale * image @ text.T - ours).abs().max() < 1e-4


@pytest.mark.parametrize("more", [{}, {"quick_gelu": True, "custom_text": True}])
def test_a_plain_clip(library: Any, base: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    folder = clip_like(tmp_path / "quilt", base, **more)
    theirs = made(library, folder)
    opened = checkpoint.open_model(str(folder))
    same_embeddings(library, theirs, folder, opened)
    assert (opened.name, opened.plain) == (str(folder), False)
    assert opened.pixels.mean == (0.5, 0.4, 0.3)
    assert opened.encoder.clip.config.text_config.hidden_act == ("quick_gelu" if more else "gelu")


@pytest.mark.parametrize(("projection", "pooler"), [("mlp", "cls_last_hidden_state_pooler"), ("linear", "mean_pooler")])
def test_a_vit_of_timm_beside_a_bert(
    library: Any, bases: dict[str, Path], tmp_path: Path, projection: str, pooler: str
) -> None:
    folder = biomed_like(tmp_path / "biomed", bases["two towers"], hf_proj_type=projection, hf_pooler_type=pooler)
    theirs = made(library, folder, "open_clip_pytorch_model.bin")
    opened = checkpoint.open_model(str(folder))
    assert type(opened.encoder.clip) is towers.TwoTowers
    same_embeddings(library, theirs, folder, opened)


def test_it_is_converted_once_until_it_changes(library: Any, base: Path, tmp_path: Path, cache: Path) -> None:
    folder = clip_like(tmp_path / "quilt", base)
    made(library, folder)
    first = from_open_clip.converted(str(folder))
    assert first.is_relative_to(cache / "cytoclip" / "open_clip")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert from_open_clip.converted(str(folder)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    said = json.loads((folder / openclip.CONFIG).read_text())
    said["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (folder / openclip.CONFIG).write_text(json.dumps(said))
    assert from_open_clip.converted(str(folder)) != first
    assert not [path for path in first.parent.iterdir() if ".new" in path.name]


def test_a_name_on_the_hub(library: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub keeps what was downloaded: without a network that is where it comes from."""
    commit = "0123456789012345678901234567890123456789"
    kept = tmp_path / "hub" / "models--wisdomik--QuiltNet-B-32"
    folder = clip_like(kept / "snapshots" / commit, base)
    made(library, folder)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    opened = checkpoint.open_model("hf-hub:wisdomik/QuiltNet-B-32")
    assert opened.name == "hf-hub:wisdomik/QuiltNet-B-32"
    with pytest.raises(UserError, match=r"cannot get hf-hub:nobody/nothing"):
        checkpoint.open_model("hf-hub:nobody/nothing")


def test_a_run_from_one_and_the_way_back(
    library: Any, bases: dict[str, Path], tmp_path: Path, experiment: Callable[..., Config]
) -> None:
    folder = biomed_like(tmp_path / "biomed", bases["two towers"])
    made(library, folder)
    lora = {"image_tower": "lora", "text_tower": "lora", "name": str(folder)}
    wanted = experiment(model=lora, train={"steps": 2, "batch_size": 4, "warmup_steps": 0, "learning_rate": 0.01})
    training.fit(wanted, QUIET)
    best = Path(wanted.output) / "best"
    assert json.loads((best / "config.json").read_text())["model_type"] == towers.KIND
    done = export.export(wanted.output, tmp_path / "back", "open_clip", QUIET)
    assert done.compared_by.startswith("open_clip ")
    assert done.parts[0].logits is not None
    assert done.parts[0].logits < 1e-4
    back = library.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    same_embeddings(library, back, tmp_path / "back", checkpoint.open_model(wanted.output))
    for form in ("hf", "sentence-transformers"):
        with pytest.raises(UserError, match="transformers has no class for two separate towers of open_clip"):
            export.export(wanted.output, tmp_path / form, form, QUIET)


def test_layer_scales_that_moved_are_multiplied_in(library: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = biomed_like(tmp_path / "biomed", bases["two towers"])
    made(library, folder)
    clip = checkpoint.open_model(str(folder)).encoder.clip.eval()
    names = [name for name in clip.state_dict() if "layer_scale" in name]
    assert len(names) == 24
    with torch.no_grad():
        for name in names:
            clip.get_parameter(name).add_(0.2 * torch.randn(192))
    state = openclip.without_scales(clip.state_dict())
    rows = openclip.two_tower_rows(state, 12)
    said = json.loads((folder / openclip.CONFIG).read_text())["model_cfg"]
    back = from_open_clip.build(said, openclip.to_theirs(rows, state), 0, clip.config.text_config)
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        one, other = (model.vision_model(pixel_values=pixels).pooler_output for model in (clip, back))
    assert (one - other).abs().max() < 1e-4
    assert one.std() > 0.1


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"vision_cfg": {"timm_model_name": "convnext_tiny"}}, "convnext_tiny, and of those only plain ViTs"),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_clip_224"}}, "only plain ViTs"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg"}}, "timm_pool: 'avg'"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}}, "averages its patches"),
        ({"text_cfg": {"hf_pooler_type": "cls_pooler"}}, "pools by cls_pooler"),
        ({"text_cfg": {"tokenizer_mode": "clips"}}, "a mode of its own"),
        ({"text_cfg": {"hf_model_name": ""}}, "two of the same kind"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(
    bases: dict[str, Path], tmp_path: Path, part: dict[str, Any], said: str
) -> None:
    folder = biomed_like(tmp_path / "biomed", bases["two towers"])
    save_file({"logit_scale": torch.ones(())}, folder / openclip.WEIGHTS)
    model_cfg = json.loads((folder / openclip.CONFIG).read_text())["model_cfg"]
    model_cfg["text_cfg"].update(part.get("text_cfg", {}))
    model_cfg["vision_cfg"] = part.get("vision_cfg", model_cfg["vision_cfg"])
    if model_cfg["text_cfg"]["hf_model_name"] == "":
        del model_cfg["text_cfg"]["hf_model_name"]
    (folder / openclip.CONFIG).write_text(json.dumps({"model_cfg": model_cfg}))
    with pytest.raises(UserError, match="has no counterpart in transformers") as caught:
        checkpoint.open_model(str(folder))
    assert said in caught.value.message
    assert caught.value.code == ExitCode.MODEL


def test_damaged_ones_are_refused(library: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clip_like(tmp_path / "quilt", base)
    with pytest.raises(UserError, match="has none of"):
        checkpoint.open_model(str(folder))
    (folder / openclip.WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.open_model(str(folder))
    made(library, folder)
    monkeypatch.setattr(openclip, "_affine", lambda theirs, ours: openclip.clip_rows and _swapped(theirs, ours))
    with pytest.raises(UserError, match="other logits than open_clip"):
        checkpoint.open_model(str(folder))
    (folder / openclip.CONFIG).write_text("[]")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.open_model(str(folder))


def _swapped(theirs: str, ours: str) -> list[openclip.Row]:
    """The two norms of a layer, exchanged: every name and shape still fits."""
    other = {"layer_norm1": "layer_norm2", "layer_norm2": "layer_norm1"}
    head, _, last = ours.rpartition(".")
    name = f"{head}.{other.get(last, last)}"
    return [openclip.Row(f"{theirs}.{part}", (f"{name}.{part}",)) for part in ("weight", "bias")]


def test_weights_with_code_in_them_are_not_run(base: Path, tmp_path: Path) -> None:
    folder = clip_like(tmp_path / "quilt", base)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (touched,))

    torch.save({"state_dict": {"a": Evil()}}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.open_model(str(folder))
    assert not touched.exists()


def test_openai_tokenizer_is_open_clips(library: Any) -> None:
    """The vocabulary that open_clip carries, read by transformers, against open_clip's own reader of it."""
    ours, theirs = from_open_clip.openai_tokenizer(), library.get_tokenizer("ViT-B-32")
    captions = [*tiny.CAPTIONS, "Pap smear, 40×; cells (n=12) don't overlap — ü ASC-US/LSIL", "x" * 300]
    ids = ours(captions, truncation=True, max_length=77)["input_ids"]
    for row, expected in zip(ids, theirs(captions).tolist(), strict=True):
        assert row == expected[: len(row)]
        assert not any(expected[len(row) :])
    assert (len(ours), ours.eos_token_id, ours.model_max_length) == (49408, 49407, 77)


def test_a_second_process_waits_for_the_first(base: Path, tmp_path: Path) -> None:
    busy = UserError("busy", "wait", ExitCode.MODEL)
    with (
        files.lock(tmp_path / "a.lock", busy),
        pytest.raises(UserError, match="busy"),
        files.lock(tmp_path / "a.lock", busy, 0.2),
    ):
        pass
