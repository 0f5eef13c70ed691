"""The model card: README.md beside saved weights, as the Hugging Face hub reads it, written from `results.json`.

It names numbers and options, and never a picture, a caption, a file or a folder of the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from cytoclip import conclusion
from cytoclip.conclusion import Judged
from cytoclip.config import Config
from cytoclip.report import DIRECTIONS

NAME = "README.md"
_INTENDED = """Ranking captions for pictures, and pictures for captions, of the kind it was trained on; as an image or
text encoder for models of that kind. Not for decisions about patients."""
_LIMITS = """- The numbers hold for data like that it was scored on; a picture from another laboratory, stain, scanner
  or magnification may be read worse.
- It ranks; it does not diagnose, and it was not validated for clinical use.
- What the starting model could do besides may be lost."""
_READ = """- Pictures were turned upright by their EXIF, put on white where they are transparent, and scaled to 8 bits
  from 16: no processor does that by itself."""
_WHOLE = """from transformers import AutoModel

model = AutoModel.from_pretrained(folder)"""
_ADAPTER = """from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), folder).merge_and_unload()
model.load_state_dict(load_file(f"{{folder}}/cytoclip.safetensors"), strict=False)  # projections, logit scale"""
HERE = 'folder = "."  # where this file lies'
_YOURS = """picture = "picture.png"  # yours
texts = ["one round cell", "a sheet of cells"]"""
_INDEX = "fine-tuned with cytoclip"
_RANKS = "Ranks captions for pictures, and pictures for captions, by cosine similarity."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Handed:
    """What an export says in place of what a folder of the run does.

    Parameters
    ----------
    library
        The hub's name of what opens it.
    place
        Code that says what `folder` is.
    code
        That opens it, with the names `folder`, `picture` and `texts`.
    checked
        How it was compared with the run: paragraphs of Markdown.
    """

    library: str
    place: str
    code: str
    checked: Sequence[str]


def card(
    results: Mapping[str, Any] | None,
    wanted: Config | None,
    best: bool,
    adapter: bool,
    family: str,
    handed: Handed | None = None,
) -> str:
    """The whole file.

    Parameters
    ----------
    results
        None where it is of no finished run: then there are no numbers.
    best
        Whether it is of best/, else of model/, the last step.
    wanted
        The run's configuration, where it can be read.
    adapter
        Whether the folder holds a peft adapter, to be opened on top of its base.
    family
        `model_type` of the checkpoint, such as clip.
    """
    judged = _judged(results, best) if results else []
    base = base_id(wanted, results) if results else None
    library = handed.library if handed else "peft" if adapter else "transformers"
    metadata = _metadata(judged, base, library, family)
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)
    parts = [f"---\n{head}---", f"# Image-text model{', fine-tuned with cytoclip' if results else ''}"]
    if results:
        parts += _what(results, wanted, judged, results["best_step"] if best else results["steps"])
        parts += _numbers(judged)
    else:
        parts.append(_RANKS)
    parts += _use(base, wanted, adapter, handed)
    return "\n\n".join(parts) + "\n"


def base_id(wanted: Config | None, results: Mapping[str, Any]) -> str | None:
    """The starting model where it came from the hub; a folder's name is nobody else's business.

    Whether it did was known when the run ended: from elsewhere, `runs/first` looks like a hub id too.
    """
    name = wanted.model.name.removeprefix("hf-hub:") if wanted is not None else ""
    return name if results.get("from_hub") and _HUB_ID.fullmatch(name) else None


def _judged(results: Mapping[str, Any], best: bool) -> list[Judged]:
    """The splits that these weights were scored on; those of the last step only on val, and without intervals."""
    if best or results["best_step"] == results["steps"]:
        return conclusion.judged(results)
    return [Judged("val", results["before"], results["last"], {})]


def _metadata(judged: list[Judged], base: str | None, library: str, family: str) -> dict[str, Any]:
    return {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["cytoclip", "image-text-retrieval", *([family] if family else [])],
        **({"base_model": base} if base else {}),
        **({"model-index": [{"name": _INDEX, "results": list(_results(judged))}]} if judged else {}),
    }


def _results(judged: list[Judged]) -> Iterator[dict[str, Any]]:
    for one in judged:
        for direction, title in DIRECTIONS.items():
            if direction not in one.best:
                continue
            yield {
                "task": {"type": "image-text-retrieval", "name": f"Retrieval, {title}"},
                "dataset": {"name": f"own data, {one.split} split", "type": "private", "split": one.split},
                "metrics": list(_metrics(one, direction)),
            }


def _metrics(one: Judged, direction: str) -> Iterator[dict[str, Any]]:
    intervals = (one.best.get("intervals") or {}).get(direction, {})
    for key, number in one.best[direction].items():
        if key.startswith("hit@"):
            yield {
                "type": key.replace("_groups", "_by_group"),
                "name": conclusion.named(key),
                "value": number,
                **({"args": {"interval_95": list(intervals[key])}} if key in intervals else {}),
            }


def _what(results: Mapping[str, Any], wanted: Config | None, judged: list[Judged], step: int) -> list[str]:
    base = base_id(wanted, results)
    began = f"[{base}](https://huggingface.co/{base})" if base else "a checkpoint that is not on the hub"
    sizes = " and ".join(f"{one.best['pairs']:,} {one.split} pairs" for one in judged)
    seen = f"{results['pairs_seen']:,} pairs seen over the whole run. " if "pairs_seen" in results else ""
    lines = [f"Started from {began}. The weights of step {step:,} of {results['steps']:,}; {seen}Scored on {sizes}."]
    if wanted is not None:
        towers = f"image tower {wanted.model.image_tower}, text tower {wanted.model.text_tower}"
        lines.append(
            f"Trained: {towers}; batch of {wanted.train.batch_size:,} pairs, learning rate "
            f"{wanted.train.learning_rate:g}, {wanted.train.schedule} schedule."
        )
    return lines


def _numbers(judged: list[Judged]) -> list[str]:
    parts = ["## Results"]
    if judged:
        parts += [conclusion.verdict(judged[0]).text, *conclusion.doubts(judged)]
    for one in judged:
        for direction, title in DIRECTIONS.items():
            if direction in one.best:
                table = ["| metric | chance | before | after |", "| --- | --- | --- | --- |"]
                table += [f"| {r.name} | {r.chance} | {r.before} | {r.best} |" for r in conclusion.rows(one, direction)]
                parts += [
                    f"{one.split}, {title}; 95 % intervals in brackets where they were computed:",
                    "\n".join(table),
                ]
    return parts


def _use(base: str | None, wanted: Config | None, adapter: bool, handed: Handed | None) -> list[str]:
    opened = _ADAPTER.format(base=base or "the checkpoint it began from") if adapter else _WHOLE
    code = f"{handed.place}\n{_YOURS}\n\n{handed.code}" if handed else f"{HERE}\n\n{opened}"
    beside = "The tokenizer and the image processor lie in the same folder: `AutoTokenizer`, `AutoImageProcessor`."
    limits = [_LIMITS, _READ]
    if wanted is not None and wanted.data.crop == "pad":
        limits.append("- Pictures were padded to a square in training; the image processor here cuts them instead.")
    return [
        "## Intended use",
        _INTENDED,
        "## How to load it",
        f"```python\n{code}\n```",
        *([] if handed else [beside]),
        *(["## Compared with the model it was made from", *handed.checked] if handed else []),
        "## Limits",
        "\n".join(limits),
    ]
