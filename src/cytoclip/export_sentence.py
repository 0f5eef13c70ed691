"""A folder that sentence-transformers opens as one model for pictures and texts.

Letters: N pairs, D embedding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cytoclip import checkpoint, files
from cytoclip.checkpoint import Opened
from cytoclip.errors import ExitCode, UserError
from cytoclip.yardstick import Yardstick, over

_SETTINGS = "sentence_bert_config.json"


def write(opened: Opened, folder: Path) -> None:
    """Fill `folder`.

    Raises
    ------
    UserError
        Where sentence-transformers is not installed, or is older than 5.4, the first with models of several kinds of
        input.
    """
    library, modules = _library()
    family = opened.encoder.family
    text: dict[str, Any] = {"max_length": opened.context}
    if family.pads == "context":
        text["padding"] = "max_length"
    if not family.masks:
        text["return_attention_mask"] = False  # SigLIP attends to its padding
    plain = folder / "plain"  # elsewhere than what is written from it
    plain.mkdir()
    checkpoint.fill(plain, opened)
    transformer = modules.Transformer(
        str(plain),
        modality_config={
            side: {"method": f"get_{side}_features", "method_output_name": "pooler_output"}
            for side in ("text", "image")
        },
        module_output_name="sentence_embedding",
        processing_kwargs={"text": text},
    )
    model = library.SentenceTransformer(modules=[transformer, modules.Normalize()], device="cpu")
    model.save(str(folder), create_model_card=False)
    del model, transformer
    shutil.rmtree(plain)
    reading = {"processor_kwargs": _READING, "do_lower_case": family.lower}  # which its `save` does not write
    files.write_json(folder / _SETTINGS, {**files.read_json(folder / _SETTINGS), **reading})
    checkpoint.write_crop(folder, opened)


_READING = {"backend": "pil"}  # pictures resized as in training; torchvision's resize differs


def embed(
    folder: Path, held: Yardstick, advance: Callable[[int], None]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The pairs of `held` as sentence-transformers embeds them: (image, text)."""
    library, _ = _library()
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encoded(some: list[Any]) -> Any:
        return model.encode(some, batch_size=len(some), show_progress_bar=False)

    def images(some: slice) -> Any:
        return encoded(held.shown(some))

    def texts(some: slice) -> Any:
        return encoded(list(held.pairs.captions[some]))

    return over(len(held), images, advance), over(len(held), texts, advance)


def usage() -> str:
    """Code that scores some captions against a picture."""
    return """from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(folder)
cosines = model.similarity(model.encode([Image.open(picture).convert("RGB")]), model.encode(texts))"""


def _library() -> tuple[Any, Any]:
    try:
        import sentence_transformers
        from sentence_transformers.base import modules
    except ImportError as error:
        raise UserError(
            f"--format sentence-transformers needs {error.name}, which is not installed, or too old",
            "pip install --upgrade 'cytoclip[export]'",
            ExitCode.SYSTEM,
        ) from None
    return sentence_transformers, modules
