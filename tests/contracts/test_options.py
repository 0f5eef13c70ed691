"""Nothing that a user sets is silently ignored: every option is read somewhere outside config.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from cytoclip import config

PACKAGE = Path(config.__file__).parent
CLASSES = {
    "Config": "", "Data": "data", "Model": "model", "Lora": "model.lora", "Train": "train", "Validate": "validate",
    "Checkpoint": "checkpoint", "Track": "track", "Anchor": "train.anchor", "Replay": "data.replay",
    "Augment": "data.augment", "HoldOut": "data.hold_out", "Report": "report",
}  # fmt: skip
ATTRIBUTES = {
    "config": "", "data": "data", "model": "model", "lora": "model.lora", "train": "train", "validation": "validate",
    "checkpoint": "checkpoint", "track": "track", "anchor": "train.anchor", "replay": "data.replay",
    "augment": "data.augment", "hold_out": "data.hold_out", "report": "report",
}  # fmt: skip
SPLITS = {"data.root", "data.train", "data.val", "data.test"}  # read through Data.split
PRESETS = {"data.augment.preset"}  # it is gone once it has filled in the others, where it is read: as test_config tries


def reads(path: Path) -> Iterator[str]:
    """Dotted names of the options that a module reads: `a.train.steps`, or `wanted.steps` of a `wanted: Train`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        known = {
            argument.arg: CLASSES[argument.annotation.id]
            for argument in (*function.args.args, *function.args.kwonlyargs)
            if isinstance(argument.annotation, ast.Name) and argument.annotation.id in CLASSES
        }
        for node in ast.walk(function):
            known |= dict(aliases(node))
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                section = section_of(node.value, known)
                if section is not None:
                    yield f"{section}.{node.attr}".removeprefix(".")


def aliases(node: ast.AST) -> Iterator[tuple[str, str]]:
    """`wanted = job.config.train`, alone or in a tuple; `for replay in wanted.data.replay`."""
    if isinstance(node, ast.For | ast.comprehension):
        loop = node.iter.args[0] if isinstance(node.iter, ast.Call) and node.iter.args else node.iter  # enumerate(…)
        target = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
        if isinstance(target, ast.Name) and isinstance(loop, ast.Attribute) and loop.attr in ATTRIBUTES:
            yield target.id, ATTRIBUTES[loop.attr]
    if not isinstance(node, ast.Assign):
        return
    target, value = node.targets[0], node.value
    pairs = zip(target.elts, value.elts, strict=False) if isinstance(target, ast.Tuple) and isinstance(
        value, ast.Tuple) else [(target, value)]  # fmt: skip
    for name, given in pairs:
        if isinstance(name, ast.Name) and isinstance(given, ast.Attribute) and given.attr in ATTRIBUTES:
            yield name.id, ATTRIBUTES[given.attr]


def section_of(owner: ast.expr, known: dict[str, str]) -> str | None:
    if isinstance(owner, ast.Attribute):
        return ATTRIBUTES.get(owner.attr)
    return known.get(owner.id) if isinstance(owner, ast.Name) else None


def test_every_option_is_read_outside_config() -> None:
    options = {option.name for option in config.options() if option.kind != "section"}
    assert len(options) == 76
    modules = [path for path in PACKAGE.glob("*.py") if path.stem not in ("config", "data_options")]
    assert len(modules) >= 25
    found = {name for path in modules for name in reads(path)}
    if "data.split" in found:
        found |= SPLITS
    assert options - found == PRESETS


def test_the_search_finds_reads_and_only_reads(tmp_path: Path) -> None:
    """The test above is worth nothing if its search takes any attribute for an option."""
    module = tmp_path / "module.py"
    module.write_text(
        "def one(wanted: Train, other: Thing):\n    wanted.steps; other.epochs; wanted.seed = 3\n"
        "def two(job):\n    job.config.validation.ks; x, lora = job.y, job.model.lora; lora.rank; x.alpha\n"
    )
    assert {"train.steps", "validate.ks", "model.lora.rank"} <= set(reads(module))
    assert not {"train.epochs", "train.seed", "model.lora.alpha"} & set(reads(module))
