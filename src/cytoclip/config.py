"""Every option of an experiment: its name, type, bounds, default and the only text that documents it.

The description of a field is its documentation; `docs/reference/config.md` and `cytoclip config` are rendered from it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from yaml import YAMLError

from cytoclip import options as options_
from cytoclip import places, selection
from cytoclip.data_options import Data, NonEmpty
from cytoclip.errors import UserError, nearest
from cytoclip.options import Option, Section

_WORD = re.compile(r"[\w./:+,\[\]\"-]+")  # what a shell and YAML both read as it stands, or nearly
Tower = Literal["full", "frozen", "lora"]


class Lora(Section):
    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(8.0, gt=0, description="The adapter's output is scaled by alpha ÷ rank.")
    rslora: bool = Field(False, description="Scale by alpha ÷ √rank instead (rsLoRA, arXiv 2312.03732).")
    dora: bool = Field(
        False, description="Train each output's magnitude beside the direction (DoRA, arXiv 2402.09353)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["auto"] | Annotated[list[NonEmpty], Field(min_length=1)] = Field(
        "auto",
        description="Names of the linear layers to adapt; auto: each tower's q, k and v projections.",
    )
    last_layers: int | None = Field(
        None, ge=1, description="Adapt only this many layers of each tower, the ones next to its output; null: all."
    )


class Model(Section):
    name: NonEmpty = Field(
        "openai/clip-vit-base-patch16",
        description="CLIP to start from: a hub id, a Hugging Face folder, a run folder of ours, or a checkpoint of "
        "open_clip (a folder, or `hf-hub:` before the id).",
    )
    context_length: int | None = Field(
        None,
        ge=21,
        description="Tokens that CLIP's text tower reads at most, above the checkpoint's own: position embeddings 1-20 "
        "are kept and the rest interpolated (Long-CLIP, arXiv 2403.15378). null: the checkpoint's own.",
    )
    image_tower: Tower = Field("full", description="What moves in the image tower.")
    text_tower: Tower = Field("full", description="What moves in the text tower.")
    projections: Literal["full", "frozen", "fitted"] = Field(
        "full",
        description="Whether the two projections into the shared space move. fitted: as full, and they begin at the "
        "canonical correlations of what the towers say of the training pairs, where that is better than those that are "
        "there: for two towers that were joined. It costs a look at each pair, of at most 20,000.",
    )
    lora: Lora | None = Field(None, description="Adapters of the towers that are `lora`; filled in if absent there.")

    @model_validator(mode="before")
    @classmethod
    def _fill_lora(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "lora" in (given.get("image_tower"), given.get("text_tower")):
            return {**given, "lora": given.get("lora") or {}}
        return given

    @model_validator(mode="after")
    def _something_moves(self) -> Model:
        towers = (self.image_tower, self.text_tower)
        if self.lora and "lora" not in towers:
            raise ValueError("lora is given but no tower is lora|set model.image_tower=lora, or delete model.lora")
        if set(towers) == {"frozen"} and self.projections == "frozen":
            raise ValueError("nothing but the logit scale would move|unfreeze a tower or the projections")
        return self


class Anchor(Section):
    embeddings: float = Field(
        0.0, ge=0, description="Weight of the mean squared distance of each embedding to the starting model's."
    )
    similarities: float = Field(
        0.0, ge=0, description="Weight of the mean squared distance of the batch's cosines to the starting model's."
    )

    @model_validator(mode="after")
    def _pulls(self) -> Anchor:
        if not (self.embeddings or self.similarities):
            raise ValueError("it pulls at nothing|set embeddings or similarities above 0, or delete train.anchor")
        return self


class Train(Section):
    steps: int | None = Field(
        5000,
        ge=1,
        description="Optimizer steps; null where epochs is given. With a constant schedule, a run that is there goes "
        "on when more are asked, of steps or of epochs.",
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the training split, instead of steps.")
    batch_size: int = Field(512, ge=2, description="Pairs contrasted in one step, over all processes.")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Pairs that one process holds at once, at most: a dial for memory that changes no gradient, at the "
        "price of a second forward pass. auto: the largest power of two that fits, found by trying on a GPU and by the "
        "plan's estimate elsewhere. null: its whole share of the batch.",
    )
    objective: Literal["auto", "infonce", "sigmoid"] = Field(
        "auto",
        description="infonce: softmax over the batch (CLIP); sigmoid: each pair by itself, with a bias (SigLIP, arXiv "
        "2303.15343); auto: what the checkpoint was trained with.",
    )
    positives: Literal["groups", "pairs", "ignore"] = Field(
        "groups",
        description="What texts with the same caption, picture or group are for an image beside its own: right answers "
        "too (groups), wrong ones (pairs), or neither (ignore).",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of each InfoNCE target that is spread evenly over the whole batch."
    )
    anchor: Anchor | None = Field(
        None, description="A pull toward the starting model, against forgetting; costs a forward pass of a frozen copy."
    )
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    image_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of the image tower; null: learning_rate."
    )
    text_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of the text tower; null: learning_rate."
    )
    projection_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the two projections, higher where they are new; null: learning_rate.",
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="The learning rate of a tower's layer is this times that of the layer above it."
    )
    weight_decay: float = Field(
        0.001, ge=0, description="Decay of matrices; biases, norms and the logit scale have none."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="The learning rate after the warm-up: constant, or falling to zero at the last step."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps over which the learning rate rises linearly to its peak.")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights; it is what is validated and saved. null: none.",
    )
    patch_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the patches that the image tower does not see in training, drawn for each pair and epoch "
        "(FLIP, arXiv 2212.00794).",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only each layer's input and compute the rest again: less memory, a third more time."
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Compile the layers of the towers (torch.compile): a slower start, faster steps. auto: on one GPU, "
        "for 500 steps and more, where its compilers are there and nothing else is asked of the layers.",
    )
    shard: bool = Field(
        False, description="Share weights, gradients and moments out over the processes (FSDP2) instead of a copy each."
    )
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradients are scaled down to this norm; null: never.")
    precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto",
        description="Arithmetic of the towers (weights, loss and optimizer are always float32); "
        "auto: the launcher's, else the best of the device.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where to train; auto: the fastest there."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Decides the order of the data and every new weight.")

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_default_steps(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("epochs") is not None and "steps" not in given:
            return {**given, "steps": None}
        return given

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, given: Any) -> Any:
        return "no" if given is False else given  # YAML 1.1 reads an unquoted `no` as false

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            how = ": train.steps=null goes by epochs, train.epochs=null by steps" if self.steps else ""
            raise ValueError(
                f"steps is {self.steps or 'null'} and epochs is {self.epochs or 'null'}|give one of the two{how}"
            )
        return self


class Validate(Section):
    every: int = Field(
        1000, ge=1, description="Steps between two validations; the first and last step are always validated."
    )
    ks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [1, 10, 50], description="The k of hit@k."
    )
    select_by: NonEmpty = Field(
        selection.DEFAULT,
        description="The number by which one validation is better than another, the mean of both directions, every "
        "right answer counted: hits (the mean of all hit@k), hit@K for a K of ks, mrr (mean reciprocal rank) or map "
        "(mean average precision). It decides best/ and patience.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many validations in a row without a better one; null: never. The one of the last "
        "step counts only where `every` has it due.",
    )
    keep: NonEmpty | None = Field(
        None,
        description="A second data root, or one split of it: its val split is scored at each validation, which shows "
        "what the model forgets. Nothing is selected by it. null: none.",
    )

    @field_validator("select_by")
    @classmethod
    def _is_measured(cls, given: str, fields: ValidationInfo) -> str:
        problem = selection.problem(given, fields.data.get("ks", ()))
        if problem:
            raise ValueError("|".join(problem))
        return given


class Checkpoint(Section):
    every: int = Field(
        1000, ge=1, description="Steps between two checkpoints to resume from; the last step has one too."
    )
    keep_last: int = Field(
        2, ge=1, description="Checkpoints kept: should the last one be damaged, the one before it is used."
    )


class Track(Section):
    to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        ["tensorboard"],
        description="Where curves go, through accelerate's trackers; only tensorboard is installed with us.",
    )


class Report(Section):
    images: bool = Field(
        True,
        description="Whether report.html holds pictures, captions and file names; false: none of them, nor the places "
        "of the data, for data that must not leave.",
    )


class Config(Section):
    data: Data = Field(description="The image-caption pairs.")
    model: Model = Field(Model(), description="The model and which parts of it move.")
    train: Train = Field(Train(), description="The optimization.")
    validation: Validate = Field(
        Validate(), alias="validate", description="When and how the validation split is ranked."
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="When the state to resume from is saved.")
    track: Track = Field(Track(), description="Experiment trackers.")
    report: Report = Field(Report(), description="The page that a run ends with.")
    output: NonEmpty = Field(
        "runs/{file name}",
        description="The run folder; default: runs/ and the name of the YAML file without its ending.",
    )

    @model_validator(mode="after")
    def _what_is_varied_is_seen(self) -> Config:
        if self.data.augment and self.model.image_tower == "frozen":
            raise ValueError(
                "data.augment varies pictures, and a frozen image tower (model.image_tower) is asked once for each|"
                "delete data.augment, or set model.image_tower=lora"
            )
        return self

    @model_validator(mode="after")
    def _fitted_is_known_and_free(self) -> Config:
        if self.model.projections != "fitted":
            return self
        if self.train.anchor:
            raise ValueError(
                "train.anchor pulls towards the starting model, whose projections model.projections: fitted replaces|"
                "delete train.anchor, or set model.projections=full"
            )
        if self.data.train and places.is_remote(self.data.train):
            raise ValueError(
                f"model.projections: fitted looks at training pairs before the first step, and {self.data.train} is "
                "far away|set model.projections=full, or `cytoclip bring` some of them here"
            )
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read one experiment and put `section.key=value` overrides on top.

    Raises
    ------
    UserError
        For a missing or malformed file, an unknown option (its nearest name is in the hint), or a value out of bounds.
    """
    given = _read(path, overrides)
    given.setdefault("output", f"runs/{path.stem}")
    return parse(given, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parse(given: Mapping[str, Any], place: str) -> Config:
    """A `Config` from plain data; `place` names where it came from in messages."""
    try:
        return Config.model_validate(dict(given))
    except ValidationError as error:
        raise options_.explained(error, place, Config) from None


def made(given: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A `Config` from nested mappings with `section.key=value` on top, for a caller in Python; a `Path` is its name.

    Raises
    ------
    UserError
        As `load` does.
    """
    try:
        merged = _merged(OmegaConf.create(_named(dict(given))), [_override(override) for override in overrides])
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the experiment cannot be read: {reason}", "give mappings of plain values") from None
    return parse(merged, f"the call with {' '.join(overrides)}" if overrides else "the call")


def _named(given: Any) -> Any:
    """The same with every path as text, which is what YAML would say."""
    if isinstance(given, Mapping):
        return {key: _named(value) for key, value in given.items()}
    if isinstance(given, list | tuple):
        return [_named(value) for value in given]
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def dump(config: Config) -> str:
    """The complete configuration as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json", by_alias=True)))


def differences(one: Config, other: Config) -> list[str]:
    """Dotted names of the options whose values differ."""
    flat_one, flat_other = (dict(_flatten(c.model_dump(mode="json", by_alias=True))) for c in (one, other))
    return [name for name in sorted({*flat_one, *flat_other}) if flat_one.get(name) != flat_other.get(name)]


def written(config: Config, names: Iterable[str]) -> dict[str, str | None]:
    """Options by their dotted names as an override has them; None where that takes more than one plain word."""
    values = dict(_flatten(config.model_dump(mode="json", by_alias=True)))
    said = {name: json.dumps(values.get(name, {}), ensure_ascii=False).replace(" ", "") for name in names}
    plain = {name: value.strip('"') if isinstance(values.get(name), str) else value for name, value in said.items()}
    return {name: value if _WORD.fullmatch(value) else None for name, value in plain.items()}


def options() -> Iterator[Option]:
    """Every option: of each section its own in the order of the fields, then the sections within it."""
    return options_.listed(Config)


def reference() -> str:
    """`docs/reference/config.md`."""
    return options_.page(Config)


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        hint = (
            f"did you mean {path.parent / near}?" if near else "give the path of a YAML file, such as configs/NAME.yaml"
        )
        raise UserError(f"no such configuration file: {path}", hint)
    on_top = [_override(override) for override in overrides]
    try:
        written = OmegaConf.load(path)
        if not isinstance(written, DictConfig):
            raise UserError(f"{path} is not a mapping of sections", "begin with `data: {root: path/to/data_root}`")
        return _merged(written, on_top)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        tab = "cannot start any token" in reason and b"\t" in path.read_bytes()
        hint = "YAML is indented by spaces: put them for the tab" if tab else "mend that line; YAML wants `key: value`"
        raise UserError(f"{path} cannot be read: {reason}", hint) from None


def _merged(written: DictConfig, on_top: Sequence[DictConfig]) -> dict[str, Any]:
    given = OmegaConf.to_container(OmegaConf.merge(written, *on_top), resolve=True)
    assert isinstance(given, dict)  # noqa: S101 - what a DictConfig becomes; for mypy
    return {str(key): value for key, value in given.items()}


def _override(given: str) -> DictConfig:
    try:
        if not given.partition("=")[0] or "=" not in given:
            raise ValueError
        return OmegaConf.from_dotlist([given])
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError):
        raise UserError(
            f"cannot read the override {given!r}", "write section.key=value, such as train.steps=100"
        ) from None


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
