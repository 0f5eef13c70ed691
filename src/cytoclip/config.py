"""Every option of an experiment: its name, type, bounds, default and the only text that documents it.

The description of a field is its documentation; `docs/reference/config.md` and `cytoclip config` are rendered from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml import YAMLError

from cytoclip.errors import UserError, nearest

Tower = Literal["full", "frozen", "lora"]
NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_by_alias=True, validate_by_name=False
    )


class Data(Section):
    root: NonEmpty | None = Field(
        None, description="Folder with `train/`, `val/` and maybe `test/`, each with `imgs/` and `img_text_pair.json`."
    )
    train: NonEmpty | None = Field(None, description="Folder of the training split, where the splits lie apart.")
    val: NonEmpty | None = Field(None, description="Folder of the validation split, where the splits lie apart.")
    test: NonEmpty | None = Field(
        None, description="Folder of the test split, where the splits lie apart. Checked, never trained or selected on."
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes that decode pictures for each training process; 0: none; "
        "null: its share of the machine's cores, at most 4.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Data:
        apart = [name for name in ("train", "val", "test") if getattr(self, name)]
        if self.root and apart:
            raise ValueError(f"root and {', '.join(apart)} are both given|give root, or train and val, not both")
        if not self.root and not (self.train and self.val):
            raise ValueError("no data is named|give data.root, or data.train and data.val")
        return self

    def split(self, name: str) -> Path | None:
        """The folder of the split `train`, `val` or `test`; None for a test split that is not there."""
        if not self.root:
            apart: str | None = getattr(self, name)
            return Path(apart) if apart else None
        folder = Path(self.root) / name
        return folder if name != "test" or folder.is_dir() else None


class Lora(Section):
    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(8.0, gt=0, description="The adapter's output is scaled by alpha ÷ rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["auto"] | Annotated[list[NonEmpty], Field(min_length=1)] = Field(
        "auto", description="Names of the linear layers to adapt; auto: the family's q, k and v projections."
    )


class Model(Section):
    name: NonEmpty = Field(
        "openai/clip-vit-base-patch16",
        description="CLIP to start from: a hub id, a Hugging Face folder, or a run folder of ours.",
    )
    image_tower: Tower = Field("full", description="What moves in the image tower.")
    text_tower: Tower = Field("full", description="What moves in the text tower.")
    projections: Literal["full", "frozen"] = Field(
        "full", description="Whether the two projections into the shared space move; new ones always do."
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


class Train(Section):
    steps: int | None = Field(5000, ge=1, description="Optimizer steps; null where epochs is given.")
    epochs: int | None = Field(None, ge=1, description="Passes over the training split, instead of steps.")
    batch_size: int = Field(512, ge=2, description="Pairs contrasted in one step, over all processes.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Pairs that one process holds at once, at most: a dial for memory that changes no gradient, at the "
        "price of a second forward pass. null: its whole share of the batch.",
    )
    positives: Literal["groups", "pairs", "ignore"] = Field(
        "groups",
        description="What texts with the same caption, picture or group are for an image beside its own: right answers "
        "too (groups), wrong ones (pairs), or neither (ignore).",
    )
    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(
        0.001, ge=0, description="Decay of matrices; biases, norms and the logit scale have none."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="The learning rate after the warm-up: constant, or falling to zero at the last step."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps over which the learning rate rises linearly to its peak.")
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
            raise ValueError(
                f"steps is {self.steps or 'null'} and epochs is {self.epochs or 'null'}|give one of the two"
            )
        return self


class Validate(Section):
    every: int = Field(
        1000, ge=1, description="Steps between two validations; the first and last step are always validated."
    )
    ks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [1, 10, 50], description="The k of hit@k."
    )


class Checkpoint(Section):
    every: int = Field(
        1000, ge=1, description="Steps between two checkpoints to resume from; the last step has one too."
    )


class Track(Section):
    to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(
        ["tensorboard"],
        description="Where curves go, through accelerate's trackers; only tensorboard is installed with us.",
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
    output: NonEmpty = Field(
        "runs/{file name}",
        description="The run folder; default: runs/ and the name of the YAML file without its ending.",
    )


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
        raise _user_error(error, place) from None


def dump(config: Config) -> str:
    """The complete configuration as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json", by_alias=True)))


def differences(one: Config, other: Config) -> list[str]:
    """Dotted names of the options whose values differ."""
    flat_one, flat_other = (dict(_flatten(c.model_dump(mode="json", by_alias=True))) for c in (one, other))
    return [name for name in sorted({*flat_one, *flat_other}) if flat_one.get(name) != flat_other.get(name)]


@dataclass(frozen=True)
class Option:
    """One documented option: dotted `name`, readable `kind`, `default` as YAML would write it, and its `doc`."""

    name: str
    kind: str
    default: str
    doc: str


def options(section: type[Section] = Config, prefix: str = "") -> Iterator[Option]:
    """Every option, sections before what they hold, in the order of the fields."""
    for name, field in section.model_fields.items():
        dotted = prefix + (field.alias or name)
        inner = _section_of(field)
        if inner is None:
            yield Option(dotted, _kind(field), _default(field), field.description or "")
        else:
            yield Option(dotted, "section", "", field.description or "")
            yield from options(inner, dotted + ".")


def reference() -> str:
    """`docs/reference/config.md`."""
    lines = [
        "# Configuration reference",
        "",
        "Rendered from `src/cytoclip/config.py` by `make docs`; edit the field, not this page.",
        "An experiment is one YAML; only what differs from a default need be written,",
        "and `section.key=value` on the command line goes on top.",
        "",
    ]
    for option in options():
        if option.kind == "section":
            lines += [
                "",
                f"## `{option.name}`",
                "",
                option.doc,
                "",
                "| option | type | default | |",
                "| --- | --- | --- | --- |",
            ]
        elif "." not in option.name:
            lines += ["", f"## `{option.name}`", "", f"{option.doc} Type: {option.kind}."]
        else:
            kind = option.kind.replace("|", "\\|")
            lines.append(f"| `{option.name}` | {kind} | `{option.default}` | {option.doc} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


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
        given = OmegaConf.to_container(OmegaConf.merge(written, *on_top), resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}", "mend that line; YAML wants `key: value`") from None
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


def _user_error(error: ValidationError, place: str) -> UserError:
    problems = error.errors()
    first = problems[0]
    name = _name_of(first)
    others = len({_name_of(problem) for problem in problems}) - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return UserError(f"unknown option {name} in {place}{more}", _nearest_option(name))
    if first["type"] == "value_error":  # our own validators write `what|what to do`
        what, _, hint = str(first["ctx"]["error"]).partition("|")
        return UserError(f"{name + ': ' if name else ''}{what} in {place}{more}", hint)
    if first["type"] == "missing":
        return UserError(
            f"{name} is missing in {place}{more}", "give data.root, such as data: {root: path/to/data_root}"
        )
    value = "null" if first["input"] is None else repr(first["input"])
    inner = [option for option in options() if option.name.startswith(f"{name}.") and option.kind != "section"]
    if inner:
        what_for = f"write options below it, such as {inner[0].name}, or delete the line"
        return UserError(f"{name} is a section, not {value}, in {place}{more}", what_for)
    option = next(option for option in options() if name == option.name)
    message = first["msg"][0].lower() + first["msg"][1:]
    if sum(_name_of(problem) == name for problem in problems) > 1:  # one for each type that it might have had
        message = f"input should be {option.kind}"
    return UserError(
        f"{name}: {value} is refused in {place}: {message}{more}", f"{option.name} ({option.kind}): {option.doc}"
    )


def _name_of(problem: ErrorDetails) -> str:
    """The dotted option, without the place in a list and without pydantic's names of the branches of a union."""
    parts = [str(part) for part in problem["loc"] if isinstance(part, str)]
    return ".".join(part for part in parts if not part.startswith(("literal[", "list[", "function-")))


def _nearest_option(name: str) -> str:
    known = [option.name for option in options()]
    section, _, key = name.rpartition(".")
    elsewhere = [option for option in known if option.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    siblings = [option for option in known if option.rpartition(".")[0] == section]
    for options_there in (siblings, known):
        leaves = {option.rpartition(".")[2]: option for option in options_there}
        near = nearest(key, leaves)
        if near:
            return f"did you mean {leaves[near]}?"
    return "`cytoclip config` lists every option"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _section_of(field: FieldInfo) -> type[Section] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return "null" if value is None else str(value).replace("'", "")


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{_SIGNS[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in field.metadata
        if type(m).__name__ in _SIGNS
    ]
    return ", ".join([_kind_of(field.annotation), *bounds])


_SIGNS = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}


def _kind_of(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is Annotated:
        return _kind_of(args[0])
    if origin is list:
        return f"list of ({_kind_of(args[0])})" if "|" in _kind_of(args[0]) else f"list of {_kind_of(args[0])}"
    if args:
        return " | ".join(_kind_of(arg) for arg in args)
    return {str: "text", int: "whole number", float: "number"}[annotation]
