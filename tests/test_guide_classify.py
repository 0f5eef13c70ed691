"""The commands of docs/guide/classify.md, and what the page says of templates, numbers and JSON."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from cytoclip import classification, classify, cli, probe, prompts

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "classify.md").read_text(encoding="utf-8")
CHECKPOINT = "openai/clip-vit-base-patch16"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_in_order(
    root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("bash")
    commands = block.splitlines()
    assert len(commands) == 4
    shutil.copytree(root, "path/to/data_root")
    entries = json.loads((root / "val" / "img_text_pair.json").read_text())
    rows = [f"{entry['img']},{'NEU' if i % 3 else 'LYM'}" for i, entry in enumerate(entries)]
    Path("labels.csv").write_text("\n".join(["image,label", *rows]))
    Path("my.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    said = []
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command.replace(CHECKPOINT, str(base))))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        said.append(capsys.readouterr())
    assert "linear probe" in said[0].out
    assert "neighbours" in said[0].out
    assert "20 pictures of val in 2 classes, 2 templates" in said[1].out
    assert "linear probe" not in said[1].out
    document = json.loads(said[2].out)
    assert (
        Path("predictions.csv").read_text(encoding="utf-8").startswith("image,label,zero_shot,zero_shot share,probe,")
    )
    assert list(document["few_shot"]) == ["1", "2", "4"]
    section = PAGE.partition("## The JSON document")[2]
    keys = set(re.findall(r"`([a-z_0-9]+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, flags=re.MULTILINE))))
    assert set(document) == keys
    parts = (*document["probe"], *document["knn"], *document["few_shot"]["1"]["accuracy"], *document["few_shot"]["1"])
    named = set(re.findall(r"`([a-z_0-9]+)`", section)) | set(classification.METRICS) | {"confusion", "by_class"}
    assert set(parts) <= named
    assert set(document["by_class"][document["classes"][0]]) <= named


def test_its_numbers_are_those_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    assert list(prompts.read(tmp_path / "my.yaml").classes) == ["NEU", "LYM"]
    assert f"the {probe.NEIGHBOURS} nearest neighbours" in PAGE
    assert f"exp(cosine / {probe.TEMPERATURE})" in PAGE
    assert (probe.FOLDS, f"({probe.CHOOSE_ON:,} of them at most)" in PAGE) == (3, True)
    assert f"drawn {classification.Truth.resamples:,} times with replacement" in PAGE
    assert f"null above {classification.CELLS} classes" in PAGE
    assert (classify.Asked.shots, classify.Asked.seeds) == ((1, 2, 4, 8, 16), 5)
    assert "1, 2, 4, 8 and 16 pictures a class" in PAGE
    assert f"strength {probe.PLAIN:g} on" in PAGE
