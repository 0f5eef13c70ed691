"""What guides say is there: options, experiments, commands; and the site has every guide."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from cytoclip import cli, config

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted((DOCS / "guide").glob("*.md"))
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in GUIDES}
OPTIONS = {option.name: option for option in config.options()}
SECTIONS = tuple(sorted({name.partition(".")[0] for name in OPTIONS if "." in name}))


def test_the_site_has_every_guide_once() -> None:
    site = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"guide/([a-z]+\.md)", site)) == sorted(TEXTS)
    assert len(TEXTS) >= 16


def test_options_that_guides_name_exist() -> None:
    pattern = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)")
    named = {(page, name.rstrip(".")) for page, text in TEXTS.items() for name in pattern.findall(text)}
    assert len(named) > 60
    files = {"train.csv", "train.log", "train.py", "val.csv", "report.html"}
    assert {(page, name) for page, name in named if name not in OPTIONS and name not in files} == set()


def test_experiments_of_guides_are_valid() -> None:
    found = 0
    for page, text in TEXTS.items():
        for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
            given = yaml.safe_load(block)
            if not isinstance(given, dict) or not given.keys() <= {*SECTIONS, "output"}:
                continue  # a file of another kind: accelerate's nodes, templates
            whole = {"data": {"root": "x"}, "output": "x", **given}
            config.parse(whole, page)
            found += 1
    assert found >= 8


def test_commands_of_guides_exist_with_their_options() -> None:
    """Those of pages without a test of their own are looked at here only, the others are run there."""
    group = typer.main.get_command(cli.app)
    seen = 0
    for page, text in TEXTS.items():
        lines = [
            line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()
        ]
        lines += re.findall(r"`(cytoclip [a-z]+ [^`]+)`", text)
        for line in lines:
            words = shlex.split(line.partition("  #")[0].replace("…", ""))
            if words[:1] != ["cytoclip"] or len(words) < 2:
                continue
            command = group.commands[words[1]]  # type: ignore[attr-defined]
            known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
            used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert used <= known, f"{page}: {line}"
            seen += 1
    assert seen >= 30


@pytest.mark.parametrize("page", ["start.md", "lora.md", "memory.md", "privacy.md", "recipes.md", "python.md"])
def test_pages_are_short(page: str) -> None:
    assert len(TEXTS[page].splitlines()) <= 110
