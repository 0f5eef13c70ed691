"""What `cytoclip tune` varies: options with the values that each may have, from a file or from the configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cytoclip import config, options
from cytoclip.config import Config
from cytoclip.errors import UserError, counted

# What trials are compared on, and where they are written; the hint of any other section says so.
_FIXED = ("data.root", "data.train", "data.val", "data.test", "data.hold_out", "data.image_column",
    "data.caption_column", "data.image_root", "data.on_bad_image", "data.cache", "data.workers", "train.seed",
    "train.device", "train.shard", "validate", "checkpoint", "track", "report", "output")  # fmt: skip
_WARMUPS = (0.02, 0.05, 0.1, 0.2, 0.4)  # of the steps
_HORIZONS = (0.02, 0.1)  # of the steps, over which a moving average goes back
_VIEWS = {"rotation": "right", "flips": True}  # all eight views of a field, and nothing of its colours
# What long runs gain by (docs/log.md, 2026-11-26).
_LIGHT = {**_VIEWS, "smallest_crop": 0.85, "brightness": 0.05, "contrast": 0.05}


@dataclass(frozen=True)
class Choice:
    """One of some values, as plain data."""

    values: tuple[Any, ...]

    def text(self) -> str:
        return ", ".join(_short(value) for value in self.values)


@dataclass(frozen=True)
class Span:
    """A number from `low` to `high`, both included; `log`: as likely in each decade; `whole`: without a fraction."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def text(self) -> str:
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


Space = dict[str, Choice | Span]


@dataclass(frozen=True)
class Facts:
    """What a default space depends on beside the configuration.

    Parameters
    ----------
    steps
        Of a run.
    projections, layers, patches
        Whether the model has projections apart from its towers, layers in a row in every tower that moves, and patches
        that can be dropped.
    repeats
        Whether some training pairs share a caption, a picture or a group.
    softmax
        Whether the objective is one.
    joined
        Whether the model is two towers that were joined, so that its projections may know nothing.
    """

    steps: int
    projections: bool
    layers: bool
    patches: bool
    repeats: bool
    softmax: bool
    joined: bool


def default(wanted: Config, facts: Facts) -> Space:
    """Options that are worth trying for a run, each between values that are usual; what has no effect is left out."""
    model, train = wanted.model, wanted.train
    towers = {"image": model.image_tower, "text": model.text_tower}
    moving = {name: mode for name, mode in towers.items() if mode != "frozen"}
    found: Space = {"train.learning_rate": _rate(train.learning_rate, 1e-5, 1e-2)}  # of the logit scale, too
    for name, mode in moving.items():
        low, high = (5e-5, 5e-3) if mode == "lora" else (3e-6, 5e-4)
        found[f"train.{name}_learning_rate"] = _rate(train.learning_rate, low, high)
    if facts.projections and model.projections != "frozen":
        found["train.projection_learning_rate"] = _rate(train.learning_rate, 1e-5, 1e-2)
    if facts.joined:
        found |= _of_joined(wanted)
    found["train.warmup_steps"] = Choice(tuple(sorted({round(share * facts.steps) for share in _WARMUPS})))
    found["train.schedule"] = Choice(("constant", "cosine", "linear"))
    found["train.weight_decay"] = Span(1e-4, 0.3, log=True)
    if facts.softmax:
        found["train.label_smoothing"] = Choice((0.0, 0.05, 0.1))
    found["train.ema"] = Choice((None, *sorted({_decay(share * facts.steps) for share in _HORIZONS})))
    if facts.repeats:
        found["train.positives"] = Choice(("groups", "pairs", "ignore"))
    if "full" in moving.values() and facts.layers:
        found["train.layer_decay"] = Choice((1.0, 0.9, 0.8, 0.65))
    if model.lora:
        found["model.lora.rank"] = Choice((4, 8, 16, 32))
        found["model.lora.dora"] = Choice((False, True))
        found["model.lora.dropout"] = Choice((0.0, 0.1))
    if "image" in moving:
        own = wanted.data.augment.model_dump(mode="json") if wanted.data.augment else None
        found["data.augment"] = Choice((None, *([own] if own else []), _VIEWS, _LIGHT, {"preset": "microscopy"}))
        if facts.patches:
            found["train.patch_dropout"] = Choice((0.0, 0.25, 0.5))
    return {name: of for name, of in found.items() if isinstance(of, Span) or len(of.values) > 1}


def _of_joined(wanted: Config) -> Space:
    """What was worth more than any rate where two towers were joined (docs/log.md, 2026-11-26)."""
    found: Space = {}
    try:
        applied(wanted, {"model.projections": "fitted"}, "fitted")
    except UserError:  # an anchor, or pairs from afar
        pass
    else:
        if wanted.model.projections != "frozen":
            found["model.projections"] = Choice(("fitted", "full"))
    image, text = wanted.model.image_tower, wanted.model.text_tower
    if text != "frozen" and image != "frozen" and (image == "lora" or text == "full"):
        found["model.text_tower"] = Choice((text, "frozen"))
    return found


def read(path: Path, wanted: Config) -> Space:
    """The space that a YAML file holds: `section.key: [a, b]` or `section.key: {low: 1e-6, high: 1e-3, log: true}`.

    Raises
    ------
    UserError
        For a file that cannot be read, an option that is unknown or is the same for all trials, or a value that the
        option does not take.
    """
    if not path.is_file():
        raise UserError(f"no such space file: {path}", "give the path of a YAML file, or leave --space out")
    try:
        written = OmegaConf.load(path)
        given = OmegaConf.to_container(written, resolve=True) if isinstance(written, DictConfig) else None
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}", "mend that line; YAML wants `key: value`") from None
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path} names no option", "write section.key: [a, b], such as train.ema: [null, 0.99]")
    known = {option.name: option for option in config.options()}
    found: Space = {}
    for name, values in given.items():
        _refuse_fixed(str(name), known, path)
        found[str(name)] = dimension(str(name), values, known[str(name)].kind.startswith("whole number"), path)
    _try_each(found, wanted, path)
    return found


def dimension(name: str, given: Any, whole: bool, place: Path) -> Choice | Span:
    """One line of a space file."""
    if isinstance(given, list):
        if len({json.dumps(value, sort_keys=True) for value in given}) < max(2, len(given)):
            raise UserError(f"{name}: {given} in {place} leaves no choice", "give two different values or more")
        return Choice(tuple(given))
    how = "write a list of values, or {low: 1e-6, high: 1e-3, log: true}"
    if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        raise UserError(f"{name}: {given!r} in {place} is neither a list nor a range", how)
    low, high, log = given["low"], given["high"], given.get("log", False)
    numbers = [number for number in (low, high) if isinstance(number, int | float) and not isinstance(number, bool)]
    if len(numbers) < 2 or not isinstance(log, bool) or not low < high or (log and low <= 0):
        raise UserError(f"{name}: {given} in {place} is no range: low < high, both above 0 where log is true", how)
    if whole and not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{name}: {given} in {place} is not of whole numbers", how)
    return Span(low, high, log, whole)


def applied(wanted: Config, chosen: Mapping[str, Any], place: str) -> Config:
    """`wanted` with the chosen values.

    Where LoRA's rank is chosen and its alpha is not, alpha ÷ rank stays; where a tower is chosen to be frozen, its rate
    is nobody's.

    Raises
    ------
    UserError
        For values that do not go together.
    """
    given: dict[str, Any] = wanted.model_dump(mode="json", by_alias=True)
    if "train.steps" in chosen or "train.epochs" in chosen:
        given["train"] |= {"steps": None, "epochs": None}
    lora = wanted.model.lora
    if lora and "model.lora.rank" in chosen and "model.lora.alpha" not in chosen:
        chosen = {**chosen, "model.lora.alpha": lora.alpha * chosen["model.lora.rank"] / lora.rank}
    for tower in ("image", "text"):
        if chosen.get(f"model.{tower}_tower") == "frozen":
            chosen = {**chosen, f"train.{tower}_learning_rate": None}
    for name, value in chosen.items():
        *sections, key = name.split(".")
        inner = given
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[key] = value
    return config.parse(given, place)


def text(space: Space) -> str:
    """As the YAML that `read` takes."""
    lines = []
    for name, values in space.items():
        if isinstance(values, Choice):
            lines.append(f"{name}: {json.dumps(values.values)}")
        else:
            ends = (json.dumps(int(end) if values.whole else float(end)) for end in (values.low, values.high))
            lines.append(f"{name}: {{low: {', high: '.join(ends)}{', log: true' if values.log else ''}}}")
    return "\n".join(lines) + "\n"


def said(chosen: Mapping[str, Any]) -> str:
    """Chosen values in a line, without their sections: `ema=0.98 learning_rate=3.2e-05`."""
    return " ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in chosen.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return json.dumps(value).replace('"', "") if isinstance(value, dict | list | bool | None) else str(value)


def _rate(own: float, low: float, high: float) -> Span:
    """The usual rates, and the user's own with room around it."""
    return Span(float(f"{min(low, own / 3):.1g}"), float(f"{max(high, own * 3):.1g}"), log=True)


def _decay(horizon: float) -> float:
    """Of a moving average that goes back so many steps, 10,000 at most."""
    return round(1 - 1 / min(max(horizon, 2.0), 1e4), 4)


def _refuse_fixed(name: str, known: Mapping[str, Any], place: Path) -> None:
    if name not in known:
        raise UserError(f"unknown option {name} in {place}", options.nearest_option(name, Config))
    if any(name == fixed or name.startswith(f"{fixed}.") for fixed in _FIXED):
        raise UserError(
            f"{name} in {place} is the same for all trials: they could not be compared otherwise",
            "set it in the configuration, and take it out of the space",
        )


def _try_each(space: Space, wanted: Config, place: Path) -> None:
    """Every value must be one that its option takes.

    One that does not go with the rest of this configuration is told apart by its message, which does not begin with
    the option: trials with other values of the rest may take it, those that don't fail one by one.
    """
    for name, values in space.items():
        tried = values.values if isinstance(values, Choice) else (values.low, values.high)
        problems = []
        for value in tried:
            try:
                applied(wanted, {name: value}, str(place))
            except UserError as error:
                if error.message.startswith((f"{name}:", f"{name}.", f"unknown option {name}.")):
                    raise
                problems.append(error)
        if len(problems) == len(tried):
            raise UserError(
                f"{name} in {place}: none of {counted(len(tried), 'value')} goes with the configuration",
                f"{problems[0].message}; {problems[0].hint}",
            )
