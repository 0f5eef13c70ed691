"""The commands of docs/guide/export.md, and what the page says of files and formats."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cytoclip import export, export_onnx, training, yardstick
from cytoclip.config import Config
from cytoclip.console import Console
from tests.typed import Run

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "export.md").read_text(encoding="utf-8")


def test_the_commands_in_order(
    experiment: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = {"steps": 2, "warmup_steps": 0, "learning_rate": 0.01}
    for name, mode in (("first", "full"), ("lora", "lora")):
        model = {"image_tower": mode, "text_tower": mode}
        training.fit(experiment(train=quick, model=model, output=str(tmp_path / "runs" / name)), Console(quiet=True))
    block = re.search(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block
    commands = block.group(1).splitlines()
    assert len(commands) == 5
    for command in commands:
        outcome = run(*shlex.split(command)[1:])
        assert not outcome.code, outcome.err
        assert re.search(r"compared on (16 of|all) 20 val pairs", outcome.out)
    for folder in (tmp_path / "exports").iterdir():
        assert (folder / "README.md").is_file()
        assert (folder / export.RESULT).is_file()
    onnx = {path.name for path in (tmp_path / "exports" / "onnx").glob("*.onnx")}
    assert onnx == {f"{side}{end}.onnx" for side in ("image", "text") for end in ("", ".fp16", ".int8")}


def test_the_page_says_what_is_so() -> None:
    rows = set(re.findall(r"^\| `([a-z_-]+)` \|", PAGE, flags=re.MULTILINE))
    assert rows == export.FORMATS.keys()
    assert f"Opset {export_onnx.OPSET}" in PAGE
    assert f"a cosine of {export.COSINE['fp32']}, and logits to {export.LOGITS:.4f}" in PAGE
    assert f"up to {yardstick.MOST} pairs" in PAGE
    for name in (*export_onnx.SIDES.values(), "image_embeds", "text_embeds"):
        assert f"`{name}`" in PAGE
