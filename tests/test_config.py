"""Every wrong option is two lines that name the place and the nearest right thing; every right one is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cytoclip import config, data_options
from cytoclip.config import Config
from cytoclip.errors import ExitCode, UserError

REPOSITORY = Path(__file__).parents[1]
DATA = "data: {root: d}\n"
LORA = "model: {image_tower: lora, lora: "


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """Write a YAML and load it, with overrides on top."""

    def write_and_load(text: str | bytes, *overrides: str) -> Config:
        path = tmp_path / "exp.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return config.load(path, overrides)

    return write_and_load


def refused(work: Callable[[], object]) -> tuple[str, str]:
    """The message and the hint, of which the user sees one line each."""
    with pytest.raises(UserError) as caught:
        work()
    error = caught.value
    assert error.code is ExitCode.USAGE
    assert len(error.lines().split("\n")) == 2
    assert error.hint
    assert "\n" not in error.message + error.hint
    return error.message, error.hint


def test_defaults(load: Callable[..., Config]) -> None:
    loaded = load(DATA)
    assert loaded.model.name == "openai/clip-vit-base-patch16"
    assert (loaded.train.steps, loaded.train.batch_size, loaded.train.learning_rate) == (5000, 512, 1e-5)
    assert loaded.model.lora is None
    assert loaded.output == "runs/exp"


def test_the_run_folder_takes_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "clip_v2.1.yaml"
    path.write_text(DATA)
    assert config.load(path).output == "runs/clip_v2.1"
    path.write_text(DATA + "output: here")
    assert config.load(path).output == "here"


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "clip_full.yaml").write_text(DATA)
    (tmp_path / "other.yml").write_text(DATA)
    message, hint = refused(lambda: config.load(tmp_path / "clip_ful.yaml"))
    assert message == f"no such configuration file: {tmp_path / 'clip_ful.yaml'}"
    assert hint == f"did you mean {tmp_path / 'clip_full.yaml'}?"
    for nothing_near in (tmp_path / "zzz", tmp_path / "no" / "such" / "folder.yaml", tmp_path):
        message, hint = refused(lambda path=nothing_near: config.load(path))
        assert str(nothing_near) in message
        assert "give the path of a YAML file" in hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b: c", "mapping values are not allowed"),
        ("data: {root: d", "line 1"),
        (DATA + "train: {steps: 3}\ntrain: {steps: 4}", "duplicate key train"),
        (DATA + "output: ${nowhere}", "nowhere"),
        ("- data\n- train", "is not a mapping of sections"),
        ("42", "cannot be read"),
        (b"\xff\xfe\x00\x80", "cannot be read"),
    ],
)
def test_what_is_not_a_yaml_of_sections_is_refused(load: Callable[..., Config], text: str | bytes, said: str) -> None:
    message, _ = refused(lambda: load(text))
    assert said in message
    assert "exp.yaml" in message


def test_a_tab_is_called_by_its_name(load: Callable[..., Config]) -> None:
    message, hint = refused(lambda: load("data:\n\troot: d"))
    assert "line 2" in message
    assert hint == "YAML is indented by spaces: put them for the tab"


@pytest.mark.parametrize("text", ["", "null", "hello", "model: {}"])
def test_no_data_names_the_option_to_give(load: Callable[..., Config], text: str) -> None:
    message, hint = refused(lambda: load(text))
    assert "data is missing" in message
    assert "data: {root: path/to/data_root}" in hint


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("trian: {}", "trian", "train"),
        ("validation: {}", "validation", "validate"),  # the name of the field inside
        ("train: {stpes: 3}", "train.stpes", "train.steps"),
        ("train: {lr: 3}", "train.lr", "train.learning_rate"),
        ("lr: 3", "lr", "train.learning_rate"),  # by spelling it would be lora
        ("bs: 3", "bs", "train.batch_size"),
        ("steps: 3", "steps", "train.steps"),
        ("train: {root: x}", "train.root", "data.root"),
        ("train: {rank: 3}", "train.rank", "model.lora.rank"),
        ("train: {every: 3}", "train.every", "validate.every or checkpoint.every"),
        (LORA + "{rnak: 4}}", "model.lora.rnak", "model.lora.rank"),
    ],
)
def test_an_unknown_option_names_the_nearest(load: Callable[..., Config], text: str, unknown: str, meant: str) -> None:
    message, hint = refused(lambda: load(DATA + text))
    assert message.startswith(f"unknown option {unknown} in ")
    assert hint == f"did you mean {meant}?"


@pytest.mark.parametrize("text", ["train: {zzzzzz: 3}", "3: 4"])
def test_an_unknown_option_near_nothing_says_where_all_are_listed(load: Callable[..., Config], text: str) -> None:
    message, hint = refused(lambda: load(DATA + text))
    assert "unknown option" in message
    assert hint == "`cytoclip config` lists every option"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("train: {batch_size: 1}", "train.batch_size", "1 is refused"),
        ("train: {steps: 0}", "train.steps", "greater than or equal to 1"),
        ("train: {epochs: 0}", "train.epochs", "greater than or equal to 1"),
        ("train: {micro_batch_size: 0}", "train.micro_batch_size", "whole number ≥ 1 | auto | null"),
        ("train: {learning_rate: 0}", "train.learning_rate", "greater than 0"),
        ("train: {learning_rate: .nan}", "train.learning_rate", "finite"),
        ("train: {learning_rate: .inf}", "train.learning_rate", "finite"),
        ("train: {weight_decay: -1}", "train.weight_decay", "-1"),
        ("train: {warmup_steps: -1}", "train.warmup_steps", "-1"),
        ("train: {max_grad_norm: 0}", "train.max_grad_norm", "greater than 0"),
        ("train: {seed: 4294967296}", "train.seed", "less than"),
        (LORA + "{rank: 0}}", "model.lora.rank", "0 is refused"),
        (LORA + "{alpha: 0}}", "model.lora.alpha", "0 is refused"),
        (LORA + "{dropout: 1}}", "model.lora.dropout", "less than 1"),
        (LORA + "{targets: []}}", "model.lora.targets", "auto | list of text"),
        (LORA + "{targets: q_proj}}", "model.lora.targets", "auto | list of text"),
        (LORA + "{targets: [3]}}", "model.lora.targets", "auto | list of text"),
        ("validate: {ks: []}", "validate.ks", "at least 1 item"),
        ("validate: {ks: [1, 0]}", "validate.ks", "0 is refused"),
        ("validate: {every: 0}", "validate.every", "0 is refused"),
        ("validate: {patience: 0}", "validate.patience", "0 is refused"),
        ("checkpoint: {every: 0}", "checkpoint.every", "0 is refused"),
        ("track: {to: [wandbb]}", "track.to", "'wandb'"),
        ("model: {image_tower: half}", "model.image_tower", "'full', 'frozen' or 'lora'"),
        ("model: {projections: lora}", "model.projections", "'full', 'frozen' or 'fitted'"),
        ('output: ""', "output", "at least 1 character"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_the_doc_of_the_option(
    load: Callable[..., Config], text: str, name: str, said: str
) -> None:
    message, hint = refused(lambda: load(DATA + text))
    assert message.startswith(f"{name}: ")
    assert "is refused in" in message
    assert said in message
    assert "(and " not in message  # one fault is one fault, whatever union pydantic tried
    option = next(option for option in config.options() if option.name == name)
    assert hint == f"{name} ({option.kind}): {option.doc}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('train: {batch_size: "12"}', "train.batch_size"),
        ("train: {batch_size: 12.0}", "train.batch_size"),
        ("train: {batch_size: true}", "train.batch_size"),
        ("train: {learning_rate: fast}", "train.learning_rate"),
        ("train: {precision: yes}", "train.precision"),
        ("validate: {ks: 5}", "validate.ks"),
        ("track: {to: wandb}", "track.to"),
        ("output: 3", "output"),
        ("data: {root: 5}", "data.root"),
    ],
)
def test_nothing_is_converted_silently(load: Callable[..., Config], text: str, name: str) -> None:
    message, hint = refused(lambda: load(text if text.startswith("data") else DATA + text))
    assert message.startswith(f"{name}: ")
    assert hint.startswith(f"{name} (")


@pytest.mark.parametrize("text", ["train:", "train: null", "train: 3", "train: [1]"])
def test_a_section_without_options_says_what_to_do(load: Callable[..., Config], text: str) -> None:
    """What is left when every line below `train:` is commented out."""
    message, hint = refused(lambda: load(DATA + text))
    assert message.startswith("train is a section, not ")
    assert hint == "write options below it, such as train.steps, or delete the line"


def test_several_faults_are_named(load: Callable[..., Config]) -> None:
    message, _ = refused(lambda: load(DATA + "train: {steps: x, epochs: y, lr: 3}"))
    assert message.endswith("(and train.epochs, train.lr)")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (
            DATA + "train: {steps: 3, epochs: 2}",
            "steps is 3 and epochs is 2",
            "one of the two: train.steps=null goes by",
        ),
        (DATA + "train: {steps: null}", "steps is null and epochs is null", "give one of the two"),
        (
            DATA + "validate: {select_by: hit@5}",
            "validate.select_by: hit@5 is not measured: validate.ks is [1, 10, 50]",
            "add 5 to validate.ks, or choose hits, hit@1, hit@10, hit@50, mrr, map",
        ),
        (DATA + "validate: {select_by: hitz}", "validate.select_by: 'hitz' is not measured", "did you mean hits?"),
        ("data: {root: d, train: e, val: f}", "root and train, val are both given", "give root, or train and val"),
        ("data: {root: d, test: f}", "root and test are both given", "give root, or train and val"),
        (
            "data: {train: e}",
            "train is e, and nothing is there to validate on",
            "data.hold_out.share=0.15 validates on",
        ),
        ('data: {train: "s3://b/a.tar"}', "nothing is there to validate on", "give data.val"),
        ("data: {val: e}", "no data is named", "give data.root, or data.train and data.val"),
        ("data: {test: e}", "no data is named", "give data.root, or data.train and data.val"),
        (DATA + "model: {lora: {rank: 4}}", "lora is given but no tower is lora", "model.image_tower=lora"),
        (
            DATA + "model: {image_tower: frozen, text_tower: frozen, projections: frozen}",
            "nothing but the logit scale would move",
            "unfreeze a tower",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    load: Callable[..., Config], text: str, said: str, hint: str
) -> None:
    message, given_hint = refused(lambda: load(text))
    assert said in message
    assert hint in given_hint


def test_epochs_replace_the_default_steps_only(load: Callable[..., Config]) -> None:
    assert load(DATA + "train: {epochs: 2}").train.steps is None
    assert load(DATA + "train: {epochs: 2, steps: null}").train.epochs == 2


def test_a_lora_tower_fills_in_the_lora_section(load: Callable[..., Config]) -> None:
    for text in ("{image_tower: lora}", "{text_tower: lora}", "{text_tower: lora, lora: null}"):
        lora = load(DATA + f"model: {text}").model.lora
        assert lora is not None
        assert (lora.rank, lora.alpha, lora.targets) == (8, 8.0, "auto")
    assert load(DATA + LORA + "{rank: 4}}").model.lora.rank == 4  # type: ignore[union-attr]


def test_frozen_towers_with_projections_that_move_are_allowed(load: Callable[..., Config]) -> None:
    assert load(DATA + "model: {image_tower: frozen, text_tower: frozen}").model.projections == "full"


@pytest.mark.parametrize("written", ["no", "'no'", "false"])
def test_an_unquoted_no_is_the_precision_no(load: Callable[..., Config], written: str) -> None:
    """YAML 1.1 reads it as false."""
    assert load(DATA + f"train: {{precision: {written}}}").train.precision == "no"
    assert load(DATA, f"train.precision={written}").train.precision == "no"


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "0.00001"])
def test_an_exponent_is_a_number(load: Callable[..., Config], written: str) -> None:
    """YAML 1.1 reads `1e-5`, without a point, as text."""
    assert load(DATA + f"train: {{learning_rate: {written}}}").train.learning_rate == 1e-5
    assert load(DATA, f"train.learning_rate={written}").train.learning_rate == 1e-5


def test_a_whole_number_is_a_number(load: Callable[..., Config]) -> None:
    assert load(DATA + "train: {weight_decay: 0}").train.weight_decay == 0


def test_overrides_go_on_top_and_later_ones_win(load: Callable[..., Config]) -> None:
    loaded = load(
        DATA + "train: {steps: 3, seed: 4}",
        "train.steps=5", "train.steps=6", "validate.ks=[1,2]", "data.root=a=b", "model.text_tower=lora",
        "model.lora.rank=2", "train.max_grad_norm=null", "output=elsewhere",
    )  # fmt: skip
    assert (loaded.train.steps, loaded.train.seed, loaded.validation.ks) == (6, 4, [1, 2])
    assert (loaded.data.root, loaded.output, loaded.train.max_grad_norm) == ("a=b", "elsewhere", None)
    assert loaded.model.lora is not None
    assert loaded.model.lora.rank == 2


@pytest.mark.parametrize("override", ["train.steps", "=5", "validate.ks=[1", "data.root={"])
def test_an_override_that_cannot_be_read_is_shown(load: Callable[..., Config], override: str) -> None:
    message, hint = refused(lambda: load(DATA, "train.seed=1", override))
    assert message == f"cannot read the override {override!r}"
    assert hint == "write section.key=value, such as train.steps=100"


@pytest.mark.parametrize("override", ["train.stesp=5", "train.steps=abc", "train=5", "output.x=5", "--steps=3"])
def test_a_wrong_override_is_not_blamed_on_the_file_alone(load: Callable[..., Config], override: str) -> None:
    message, _ = refused(lambda: load(DATA, override))
    assert f"exp.yaml with {override}" in message


def test_the_configuration_cannot_be_changed_afterwards(load: Callable[..., Config]) -> None:
    loaded = load(DATA)
    with pytest.raises(ValidationError, match="frozen"):
        loaded.train.steps = 3  # type: ignore[misc]


EVERYTHING: dict[str, Any] = {
    "data": {"train": "a b", "val": "c: d", "test": "é", "workers": 0},
    "model": {
        "name": "x",
        "image_tower": "lora",
        "text_tower": "frozen",
        "lora": {"targets": ["q_proj"], "alpha": 3.5},
    },
    "train": {"epochs": 2, "learning_rate": 3e-7, "precision": "no", "schedule": "cosine", "max_grad_norm": None},
    "validate": {"every": 3, "ks": [2], "select_by": "hit@2", "patience": 4, "keep": "x y"},
    "checkpoint": {"every": 4},
    "track": {"to": []},
    "output": "no",
}


@pytest.mark.parametrize("given", [EVERYTHING, {"data": {"root": "1e5"}, "output": "null"}], ids=["all", "few"])
def test_dump_then_load_is_equal(load: Callable[..., Config], given: dict[str, Any]) -> None:
    """The run folder keeps what `dump` writes, and training from that file must repeat the run."""
    parsed = config.parse(given, "the test")
    text = config.dump(parsed)
    assert load(text) == parsed
    assert config.dump(load(text)) == text
    assert "validate:" in text
    assert "validation:" not in text


def test_differences_name_the_options(load: Callable[..., Config]) -> None:
    one = load(DATA)
    assert config.differences(one, load(DATA)) == []
    other = load(DATA, "train.steps=5", "validate.ks=[1]", "output=x")
    assert config.differences(one, other) == ["output", "train.steps", "validate.ks"]
    assert config.differences(other, one) == ["output", "train.steps", "validate.ks"]
    lora = config.differences(one, load(DATA, "model.image_tower=lora"))
    assert {"model.image_tower", "model.lora.rank", "model.lora.targets"} <= set(lora)


def test_split_folders(load: Callable[..., Config], tmp_path: Path) -> None:
    under_root = load(f"data: {{root: {tmp_path}}}").data
    assert under_root.split("train") == tmp_path / "train"
    assert under_root.split("test") is None  # a test split may be absent, the others are an error later
    (tmp_path / "test").mkdir()
    assert under_root.split("test") == tmp_path / "test"
    apart = load("data: {train: a, val: b}").data
    assert [apart.split(name) for name in ("train", "val", "test")] == [Path("a"), Path("b"), None]


SECTIONS = {
    "": Config, "data": data_options.Data, "data.augment": data_options.Augment,
    "model": config.Model, "model.lora": config.Lora, "train": config.Train,
    "validate": config.Validate, "checkpoint": config.Checkpoint, "track": config.Track, "report": config.Report,
    "data.hold_out": data_options.HoldOut, "data.replay": data_options.Replay, "train.anchor": config.Anchor,
}  # fmt: skip


def fields() -> set[str]:
    """A plain twin of `options`: dotted names of all fields of all sections."""
    return {
        f"{dotted}.{field.alias or name}".removeprefix(".")
        for dotted, section in SECTIONS.items()
        for name, field in section.model_fields.items()
    }


def test_options_lists_every_field_with_a_doc() -> None:
    listed = list(config.options())
    assert {option.name for option in listed} == fields()
    assert len(listed) == len(fields()) == 88
    assert {option.name for option in listed if option.kind == "section"} == {*SECTIONS} - {""}
    for option in listed:
        assert option.doc.endswith("."), option.name
        assert len(option.doc) > 10, option.name
        assert option.kind, option.name
        assert (option.default == "") == (option.kind == "section"), option.name


@pytest.mark.parametrize(
    ("name", "kind", "default"),
    [
        ("data.root", "text | null", "null"),
        ("train.steps", "whole number | null, ≥ 1", "5000"),
        ("train.learning_rate", "number, > 0", "1e-05"),
        ("train.seed", "whole number, ≥ 0, < 4294967296", "0"),
        ("model.image_tower", "full | frozen | lora", "full"),
        ("model.lora.targets", "auto | list of text", "auto"),
        ("validate.ks", "list of whole number ≥ 1", "[1, 10, 50]"),
        ("validate.patience", "whole number | null, ≥ 1", "null"),
        ("track.to", "list of (tensorboard | wandb | trackio | mlflow)", "[tensorboard]"),
    ],
)
def test_options_show_kind_bounds_and_default_as_yaml_would(name: str, kind: str, default: str) -> None:
    option = next(option for option in config.options() if option.name == name)
    assert (option.kind, option.default) == (kind, default)


def test_the_reference_holds_every_option_once() -> None:
    text = config.reference()
    for option in config.options():
        heading = f"## `{option.name}`\n" if option.kind == "section" or "." not in option.name else None
        assert text.count(heading or f"| `{option.name}` |") == 1, option.name
        assert option.doc in text


def shipped() -> dict[str, Config]:
    return {path.stem: config.load(path) for path in sorted((REPOSITORY / "configs").glob("*.yaml"))}


def test_every_shipped_yaml_loads_and_begins_with_its_command() -> None:
    assert list(shipped()) == ["clip_ft_full_raw_data", "clip_ft_lora_raw_data", "recommended"]
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        header = path.read_text(encoding="utf-8").split("data:")[0]
        assert f"train.py --config configs/{path.name}" in header


def test_the_shipped_recipes_are_the_original_experiments() -> None:
    full, lora, _ = shipped().values()
    for one in (full, lora):
        assert one.model.name == "openai/clip-vit-base-patch16"
        assert (one.train.batch_size, one.train.learning_rate) == (512, 1e-5)
        assert (one.train.warmup_steps, one.train.steps, one.train.schedule) == (100, 5000, "constant")
        assert one.data.root == "data/raw"
    assert (full.model.image_tower, full.model.text_tower, full.model.lora) == ("full", "full", None)
    assert (lora.model.image_tower, lora.model.text_tower) == ("lora", "lora")
    assert lora.model.lora is not None
    assert (lora.model.lora.rank, lora.model.lora.alpha, lora.model.lora.targets) == (8, 8.0, "auto")
