"""A model for other programs: written in their format, opened with their library, and held against the run.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import (
    __version__,
    checkpoint,
    export_hf,
    export_onnx,
    export_open_clip,
    export_sentence,
    files,
    hub,
    model_card,
    record,
    towers,
    yardstick,
)
from cytoclip.checkpoint import Opened
from cytoclip.console import Bar, Console, aligned, size
from cytoclip.errors import ExitCode, UserError
from cytoclip.families import FAMILIES
from cytoclip.model_card import Handed
from cytoclip.report import DIRECTIONS
from cytoclip.yardstick import Yardstick

FORMATS = {  # and what the hub calls the library that opens it
    "hf": "transformers",
    "onnx": "onnx",
    "open_clip": "open_clip",
    "sentence-transformers": "sentence-transformers",
}
SCHEMA = 1  # of the document
RESULT = "cytoclip_export.json"
LOGITS = 1e-4  # by which logits of an export in float32 may differ from the run's
COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.9}  # between the embeddings of an ONNX file and the run's, at least
_FEW = 16  # pairs, where only rounding can make a difference


@dataclass(frozen=True)
class Part:
    """One way to compute that an export offers, held against the run.

    Parameters
    ----------
    title
        The precision of an ONNX file, else empty.
    image, text
        The lowest cosine between an embedding and the run's.
    logits
        By how much a logit differs from the run's at most; None where the scale is left to the user.
    hits
        hit@k by direction, and by how much it is above the run's, of an ONNX file, whose precision may cost some. The
        other formats differ by rounding: they are held against few pairs, of which hit@k would say nothing.
    size
        Bytes of weights.
    """

    title: str
    image: float
    text: float
    logits: float | None
    size: int
    hits: dict[str, dict[str, float]] = field(default_factory=dict)
    change: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """An export that is done.

    Parameters
    ----------
    digest
        SHA-256 of the model that it was made from.
    compared_on, compared_by
        The pairs, and what embedded them.
    notes
        What the format cannot say.
    url
        Where it was uploaded.
    """

    format: str
    digest: str
    family: str
    width: int
    context: int
    compared_on: str
    compared_by: str
    parts: Sequence[Part]
    notes: Sequence[str]
    opset: int | None = None
    url: str | None = None

    def document(self) -> dict[str, Any]:
        """What `--json` prints, and what lies in the folder."""
        return {"schema": SCHEMA, "cytoclip": __version__, **asdict(self)}

    def text(self) -> str:
        """The table."""
        return "\n".join(_table(self))


def export(
    name: str, to: Path, form: str, console: Console, adapter: bool = False, push: str | None = None
) -> Exported:
    """Write the model that `name` means into the new folder `to`, and upload it where `push` names a repository.

    Every format is opened again with its own library and must embed pairs as the model does; where it does not,
    nothing is left.

    Raises
    ------
    UserError
        For a model that the format has no place for, a library that is not installed, a folder that is there, or an
        export that gives other embeddings.
    """
    to = to if to.name not in ("", "..") else to.resolve()  # what is written beside it needs a name
    _refuse(to, form, adapter, push)
    opened = checkpoint.open_model(name)
    _refuse_family(opened, form)
    most = yardstick.MOST if form == "onnx" else _FEW
    with files.whole_folder(to) as new:
        written = _write(opened, name, new, form, adapter, push, console)
        held = yardstick.make(opened, name, console, most)
        notes = [*written.notes, *_crop_notes(opened)]
        exported = replace(_compared(opened, held, new, form, console), notes=notes)
        files.write_text(new / model_card.NAME, _card(name, exported, written, _place(push)))
        files.write_json(new / RESULT, exported.document())
    for note in notes:
        console.warn(note)
    if push:
        exported = replace(exported, url=hub.upload(to, push, console))
    return exported


@dataclass(frozen=True)
class _Written:
    """What a format says of what it wrote."""

    code: str
    notes: Sequence[str] = ()
    library: str = ""
    adapter: bool = False


def _refuse(to: Path, form: str, adapter: bool, push: str | None) -> None:
    """What can be said before the model is opened."""
    if form not in FORMATS:
        raise UserError(f"--format {form} is none of {', '.join(FORMATS)}", "such as --format hf")
    if adapter and form != "hf":
        raise UserError(f"--adapter keeps a LoRA apart, and {form} has no place for one", "use --format hf")
    if push is not None:
        hub.refuse(push)
    if os.path.lexists(to) and not (to.is_dir() and not any(to.iterdir())):
        exported = (
            f"it is exported, and uploaded by: {hub.by_hand(to, push)}; " if push and (to / RESULT).is_file() else ""
        )
        raise UserError(f"{to} is already there", f"{exported}name another folder, or delete it first", ExitCode.DATA)


def _refuse_family(opened: Opened, form: str) -> None:
    kind = opened.encoder.clip.config.model_type
    if kind == towers.KIND and form in ("hf", "sentence-transformers"):
        raise UserError(
            f"{opened.name} cannot be exported to {form}: transformers has no class for {FAMILIES[kind].title}",
            "export it as open_clip or onnx instead",
            ExitCode.MODEL,
        )


def _write(
    opened: Opened, name: str, new: Path, form: str, adapter: bool, push: str | None, console: Console
) -> _Written:
    if form == "onnx":
        sides = len(export_onnx.SIDES) * len(export_onnx.PRECISIONS)
        with console.progress("writing ONNX files", sides) as bar:
            export_onnx.write(opened, new, bar.advance)
        return _Written(export_onnx.usage(opened))
    if form == "open_clip":
        return _Written(export_open_clip.usage(), export_open_clip.write(opened, new, push))
    if form == "sentence-transformers":
        export_sentence.write(opened, new)
        return _Written(export_sentence.usage())
    if not adapter:
        export_hf.write(opened, new)
        return _Written(export_hf.usage(opened))
    base = export_hf.write_adapter(opened, name, new)
    here = Path(base).exists()
    if here and push:
        raise UserError(
            f"--push: the adapter's base is {base}, a folder here that nobody else can open",
            "leave --adapter out: the weights are merged then",
        )
    notes = [f"The adapter needs its base, {base}, where it is."] if here else []
    said = "the checkpoint it began from" if here else base
    return _Written(export_hf.usage(opened, said), notes, "peft", adapter=True)


def _compared(opened: Opened, held: Yardstick, new: Path, form: str, console: Console) -> Exported:
    """The export opened again and held against the run; raises `UserError` where they are two models."""
    titles = export_onnx.PRECISIONS if form == "onnx" else ("",)
    with console.progress("comparing", 2 * len(held) * len(titles)) as bar:
        found, by = _embedded(held, new, form, bar)
    before = held.hits(held.image_ND, held.text_ND) if form == "onnx" else {}
    parts = []
    for title, (image_ND, text_ND, scale) in found.items():
        part = _part(held, before, title, (image_ND, text_ND, scale), _weights(new, title))
        _refuse_mismatch(part, form, held)
        parts.append(part)
    family = opened.encoder.clip.config.model_type
    digest = opened.digest("no")
    opset = export_onnx.OPSET if form == "onnx" else None
    width = opened.encoder.width
    return Exported(form, digest, family, width, opened.context, held.where, by, parts, (), opset)


Embedded = tuple[NDArray[np.float32], NDArray[np.float32], float | None]
Found = dict[str, Embedded]


def _embedded(held: Yardstick, new: Path, form: str, bar: Bar) -> tuple[Found, str]:
    """By precision, and what embedded them."""
    if form == "onnx":
        return {
            precision: (*export_onnx.embed(new, precision, held, bar.advance), None)
            for precision in export_onnx.PRECISIONS
        }, _versioned("onnxruntime")
    if form == "open_clip":
        image_ND, text_ND, scale, by = export_open_clip.embed(new, held, bar.advance)
        return {"": (image_ND, text_ND, scale)}, by
    if form == "sentence-transformers":
        return {"": (*export_sentence.embed(new, held, bar.advance), None)}, _versioned("sentence-transformers")
    return {"": export_hf.embed(new, held, bar.advance)}, _versioned("transformers")


def _part(held: Yardstick, before: dict[str, dict[str, float]], title: str, embedded: Embedded, weights: int) -> Part:
    """`before`: hit@k of the run, where it is to be told."""
    image_ND, text_ND, scale = embedded
    run_scale = float(held.opened.encoder.logit_scale.detach().exp())
    logits = None
    if title in ("", "fp32"):
        ours_NN = run_scale * (held.image_ND @ held.text_ND.T)
        theirs_NN = (run_scale if scale is None else scale) * (image_ND @ text_ND.T)
        logits = float(np.abs(theirs_NN - ours_NN).max())
    after = held.hits(image_ND, text_ND) if before else {}
    change = {way: {key: after[way][key] - before[way][key] for key in after[way]} for way in after}
    image, text = yardstick.cosine(image_ND, held.image_ND), yardstick.cosine(text_ND, held.text_ND)
    return Part(title, image, text, logits, weights, after, change)


def _refuse_mismatch(part: Part, form: str, held: Yardstick) -> None:
    least = COSINE.get(part.title, COSINE["fp32"])
    said = f"{form}{' ' if part.title else ''}{part.title}"
    lowest = min(part.image, part.text)
    if not lowest >= least:  # NaN too
        raise UserError(
            f"the export to {said} gives other embeddings than the model: a cosine of {lowest:.6f} on {held.where}, "
            f"and {least} is the least",
            "nothing was kept; export it to another format, and report this with the model's name",
            ExitCode.MODEL,
        )
    if part.title == "" and part.logits is not None and not part.logits <= LOGITS:
        raise UserError(
            f"the export to {said} gives other logits than the model: {part.logits:.2g} apart on {held.where}, and "
            f"{LOGITS:g} is the most",
            "nothing was kept; export it to another format, and report this with the model's name",
            ExitCode.MODEL,
        )


def _crop_notes(opened: Opened) -> Iterator[str]:
    if opened.pixels.pad:
        yield (
            "Pictures were padded to a square in training, which no other library's processor does: pad them first, "
            "with the median colour of their border."
        )


def _place(push: str | None) -> str:
    """Code that says where the export is, for who reads its card: no place of this machine."""
    if push is None:
        return model_card.HERE
    return f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{push}")'


def _card(name: str, exported: Exported, written: _Written, place: str) -> str:
    read, best = _record(name)
    handed = Handed(written.library or FORMATS[exported.format], place, written.code, list(_checked(exported)))
    results = read.results if read else None
    return model_card.card(results, read.wanted if read else None, best, written.adapter, exported.family, handed)


def _record(name: str) -> tuple[record.Record | None, bool]:
    """The finished run that the model is of, and whether it is its best/; None too for a soup, scored elsewhere."""
    run = checkpoint.run_of(name)
    place = Path(checkpoint.locate(name))
    if run is None or place.parent != run.path.resolve() or not run.results.is_file():
        return None, False
    try:
        return record.read(run.path), place.name == run.best.name
    except UserError:
        return None, False


def _checked(exported: Exported) -> Iterator[str]:
    """Paragraphs of the card."""
    on = f"On {exported.compared_on}, embedded by {exported.compared_by}, beside cytoclip {__version__} in float32."
    opset = f" Opset {exported.opset}; any number of rows{_tokens(exported)}." if exported.opset else ""
    yield on + opset
    head, *rows = _rows(exported)
    yield "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    if exported.notes:
        yield "\n".join(f"- {note}" for note in exported.notes)


def _tokens(exported: Exported) -> str:
    if FAMILIES[exported.family].pads == "context":
        return f"; captions are always padded to {exported.context} tokens"
    return f"; captions of any length up to {exported.context} tokens"


def _table(exported: Exported) -> list[str]:
    opset = f", opset {exported.opset}" if exported.opset else ""
    return [
        f"{exported.format}{opset}: compared on {exported.compared_on}, by {exported.compared_by}",
        *aligned(_rows(exported)),
        *([f"uploaded to {exported.url}"] if exported.url else []),
    ]


def _rows(exported: Exported) -> list[list[str]]:
    ways = {"image_to_text": "i→t", "text_to_image": "t→i"}
    assert ways.keys() == DIRECTIONS.keys()  # noqa: S101
    keys = [(way, key) for way in ways for key in exported.parts[0].change.get(way, ())]
    head = ["", "weights", "cosine, pictures", "captions", "logits apart", *(f"{key} {ways[way]}" for way, key in keys)]
    rows = [head]
    for part in exported.parts:
        logits = "" if part.logits is None else f"{part.logits:.1e}"
        changes = [_signed(part.hits[way][key], part.change[way][key]) for way, key in keys]
        rows.append(
            [part.title or "float32", size(part.size), f"{part.image:.6f}", f"{part.text:.6f}", logits, *changes]
        )
    return rows


def _signed(value: float, change: float) -> str:
    """`41.4 % (−0.4)`."""
    if abs(change) < 5e-5:
        return f"{100 * value:.1f} % (±0)"
    return f"{100 * value:.1f} % ({'+' if change > 0 else '−'}{100 * abs(change):.1f})"


def _weights(new: Path, title: str) -> int:
    if title:
        names = [export_onnx.file(side, title) for side in export_onnx.SIDES]
        return sum(file.stat().st_size for name in names for file in new.glob(f"{name}*"))
    return sum(file.stat().st_size for file in new.glob("*.safetensors"))


def _versioned(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
