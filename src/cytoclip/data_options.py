"""The options of the data: where the pairs are, how a picture becomes the model's, and how it is varied.

Their description is their documentation, as in `config.py`, which they are a part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cytoclip import places
from cytoclip.options import Section

HOLD_OUT = "data.hold_out.share=0.15 validates on a part of the training pairs"
NonEmpty = Annotated[str, Field(min_length=1)]


class Replay(Section):
    root: NonEmpty = Field(description="More training pairs, in any format, or a data root: its training split.")
    weight: float = Field(gt=0, description="Pairs of it in each batch for one pair of the training split.")


class Augment(Section):
    preset: Literal["microscopy"] | None = Field(
        None,
        description="microscopy: fills in every option below that is not written; null: only what is written is done.",
    )
    rotation: Literal["none", "right", "any"] = Field(
        "none", description="Turn each picture by a multiple of 90° (right) or by any angle, its border mirrored (any)."
    )
    flips: bool = Field(False, description="Mirror half of the pictures left to right, and half top to bottom.")
    smallest_crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="A random crop keeps at least this share of the picture, at 3/4 to 4/3 of its shape; 1: none.",
    )
    brightness: float = Field(0.0, ge=0, lt=1, description="Largest relative change of brightness, up or down.")
    contrast: float = Field(0.0, ge=0, lt=1, description="Largest relative change of contrast, up or down.")
    saturation: float = Field(0.0, ge=0, lt=1, description="Largest relative change of saturation, up or down.")
    hue: float = Field(0.0, ge=0, le=0.5, description="Largest turn of the hue, in turns of the colour circle.")
    stain: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Largest relative change of each stain's strength, in haematoxylin-eosin-DAB space "
        "(Tellez 2018, doi 10.1109/TMI.2018.2820199).",
    )
    blur: float = Field(
        0.0, ge=0, description="Largest sigma of a Gaussian blur, in pixels of the model's input; half of the pictures."
    )
    sides: Literal["keep", "ignore"] = Field(
        "keep",
        description="keep: a caption that names a side (left, upper, …) is given its picture neither turned nor "
        "mirrored; ignore: it is treated as any other.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("preset") == "microscopy":
            return {**MICROSCOPY, **given}
        return given

    @model_validator(mode="after")
    def _does_something(self) -> Augment:
        still = self.rotation == "none" and not self.flips and self.smallest_crop == 1
        if still and not any((self.brightness, self.contrast, self.saturation, self.hue, self.stain, self.blur)):
            raise ValueError("it changes nothing|set data.augment.preset=microscopy, or delete data.augment")
        return self


# A slide has no upper side, so all eight views of a field are equally right; stain and lamp vary between laboratories
# more than within one. The strengths are those that Tellez et al. call light (arXiv 1902.06543, table 1).
MICROSCOPY: Mapping[str, Any] = {
    "rotation": "right",
    "flips": True,
    "smallest_crop": 0.6,
    "brightness": 0.1,
    "contrast": 0.1,
    "saturation": 0.1,
    "hue": 0.02,
    "stain": 0.05,
    "blur": 0.5,
}


class HoldOut(Section):
    share: float = Field(0.15, gt=0, lt=1, description="Share of the training pairs that is held out.")
    seed: int = Field(0, ge=0, description="Another seed holds out others.")


class Data(Section):
    root: NonEmpty | None = Field(
        None,
        description="Folder with `train/`, `val/` and maybe `test/`, each with `imgs/` and `img_text_pair.json`, or "
        "with `train.csv`, `train-*.tar` and so on; or `hub:owner/name`. Formats: docs/guide/data.md.",
    )
    train: NonEmpty | None = Field(
        None,
        description="The training split, where the splits lie apart: a folder, a table, or shards such as "
        "`shards/{000..099}.tar`.",
    )
    val: NonEmpty | None = Field(None, description="The validation split, where the splits lie apart.")
    test: NonEmpty | None = Field(
        None,
        description="The test split, where the splits lie apart. Checked, scored once at the end of a run, and never "
        "trained or selected on.",
    )
    hold_out: HoldOut | None = Field(
        None,
        description="Cut a part off the training split, and validate on it: data.val and data.test are not looked at. "
        "What shares a source, a group, a picture or a caption is not cut apart. null: validate on data.val.",
    )
    replay: list[Replay] = Field(
        [],
        description="A list of more training pairs, each a fixed share of every batch: such as general pairs, against "
        "forgetting. Validation and epochs are those of the training split.",
    )
    image_column: NonEmpty | None = Field(
        None, description="Column of the picture in a table (CSV, TSV, JSON lines, Parquet); null: guessed, and said."
    )
    caption_column: NonEmpty | None = Field(
        None, description="Column of the caption in a table (CSV, TSV, JSON lines, Parquet); null: guessed, and said."
    )
    image_root: NonEmpty | None = Field(
        None,
        description="Folder below which the pictures of the splits' tables lie: names are relative to it, or absolute "
        "and below it; null: relative to the table's folder.",
    )
    crop: Literal["auto", "center", "pad", "squash"] = Field(
        "auto",
        description="How a picture of another shape becomes the model's: cut its long sides off (center), "
        "fill up with the median colour of its border (pad), or change its shape (squash); auto: as the checkpoint.",
    )
    augment: Augment | None = Field(
        None, description="Random changes of the training pictures, drawn for each pair and epoch; null: none."
    )
    reduced_decode: bool = Field(
        False,
        description="With data.augment, decode a large JPEG at 1/2, 1/4 or 1/8 of its size, but no smaller than the "
        "model needs: twice as fast at 1024×768, and less than one of 255 levels off on average. Training only.",
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="error: a training picture that cannot be used ends the run; skip: another pair takes its place, "
        "the same one each time, and the end of the run names it.",
    )
    cache: bool = Field(
        False,
        description="Keep the decoded training pictures at the model's size on disk, filled in the first epoch or by "
        "`cytoclip check --cache`; its size is said first.",
    )
    cache_budget_gb: float | None = Field(
        None, gt=0, description="A larger cache is refused; null: 80 % of the disk's free space."
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes (threads on macOS and Windows) that decode pictures for each training process; 0: none; "
        "null: its share of the machine's cores, at most 4.",
    )

    @model_validator(mode="after")
    def _reduced_for_augment(self) -> Data:
        if self.reduced_decode and not self.augment:
            raise ValueError(
                "reduced_decode changes pixels, and is for pictures that are changed anyway|"
                "set data.augment.preset=microscopy, or delete data.reduced_decode"
            )
        return self

    @model_validator(mode="after")
    def _held_out_here(self) -> Data:
        if self.hold_out and self.train and places.is_remote(self.train):
            raise ValueError(
                f"hold_out needs training pairs that are here, and train is {self.train}|"
                "give val, or copy the shards to this machine and name their path"
            )
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Data:
        apart = [name for name in ("train", "val", "test") if getattr(self, name)]
        if self.root and apart:
            raise ValueError(f"root and {', '.join(apart)} are both given|give root, or train and val, not both")
        if self.train and not (self.val or self.hold_out):
            here = "" if places.is_remote(self.train) else f"{HOLD_OUT}; or "
            raise ValueError(f"train is {self.train}, and nothing is there to validate on|{here}give data.val")
        if not self.root and not self.train:
            raise ValueError("no data is named|give data.root, or data.train and data.val")
        return self

    def split(self, name: str) -> Path | None:
        """Where the split `train`, `val` or `test` is; None for a test split that is not there."""
        if not self.root:
            apart: str | None = getattr(self, name)
            return Path(apart) if apart else None
        root = Path(self.root)
        return places.split(root, name) or (None if name == "test" else root / name)
