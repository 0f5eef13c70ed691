"""What a user types and what comes back: results on stdout, two lines on stderr, and an exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cytoclip import __version__, cli, cli_train, config
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from tests import formats
from tests.typed import Outcome, Run, refused


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "exp.yaml"
    path.write_text("data: {root: d}\ntrain: {steps: 7}\n")
    return path


def raising(error: BaseException) -> Callable[..., Any]:
    def work(*_: object, **__: object) -> None:
        raise error

    return work


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_command(run: Run, word: str) -> None:
    outcome = run(word)
    assert (outcome.code, outcome.err) == (0, "")
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}  # type: ignore[union-attr]
    assert len(commands) == 14
    assert all(f" {name} " in outcome.out for name in commands)


@pytest.mark.parametrize("command", ["train", "evaluate", "classify", "soup", "config", "demo", "report", "serve"])
def test_every_command_has_help(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"cytoclip {command}" in outcome.out


def test_no_command_shows_the_help_and_no_empty_error(run: Run) -> None:
    outcome = run()
    assert outcome.code == ExitCode.USAGE
    assert "Commands" in outcome.out + outcome.err
    assert "error:" not in outcome.err


def test_config_shows_every_option_with_type_default_and_doc(run: Run) -> None:
    outcome = run("config")
    assert (outcome.code, outcome.err) == (0, "")
    options = list(config.options())
    assert len(options) == 88
    for option in options:
        assert option.doc in outcome.out
        line = (
            f"\n{option.name}: {option.doc}\n"
            if option.kind == "section"
            else f"  {option.name}  [{option.kind}; default {option.default}]\n"
        )
        assert line in outcome.out


def test_report_writes_one_run_or_compares_several(run: Run, told: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(told, tmp_path / "run"))
    outcome = run("report", str(copied))
    assert (outcome.code, outcome.out) == (0, f"{copied / 'report.html'}\n")
    assert "data:image/jpeg" in (copied / "report.html").read_text()
    outcome = run("report", str(told), "--to", str(tmp_path / "a.html"), "--split", "val", "--no-images")
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'a.html'}\n")
    assert "data:image" not in (tmp_path / "a.html").read_text()
    outcome = run("report", str(told), str(copied), "--to", str(tmp_path / "b.html"))
    assert (outcome.code, outcome.out) == (0, f"{tmp_path / 'b.html'}\n")
    assert "What was different" in (tmp_path / "b.html").read_text()
    assert "no run folder" in refused(run("report", str(tmp_path)))[0]
    assert "was not scored on test" in refused(run("report", str(told), "--split", "test"))[0]
    assert not (told / "report.html").exists()


def test_config_of_a_file_is_complete_resolved_yaml(run: Run, recipe: Path, tmp_path: Path) -> None:
    outcome = run("config", str(recipe), "train.seed=3", "model.image_tower=lora")
    assert (outcome.code, outcome.err) == (0, "")
    shown = yaml.safe_load(outcome.out)
    assert (shown["train"]["steps"], shown["train"]["seed"], shown["model"]["lora"]["rank"]) == (7, 3, 8)
    assert shown["output"] == "runs/exp"
    again = tmp_path / "again.yaml"
    again.write_text(outcome.out)
    assert run("config", str(again)).out == outcome.out


@pytest.mark.parametrize("command", ["train", "config"])
def test_a_missing_configuration_names_the_nearest(run: Run, recipe: Path, command: str) -> None:
    message, hint = refused(run(command, str(recipe.with_name("exq.yaml"))))
    assert "no such configuration file" in message
    assert hint == f"did you mean {recipe}?"


def test_a_wrong_option_is_refused_before_anything_is_done(run: Run, recipe: Path) -> None:
    message, hint = refused(run("train", str(recipe), "train.stesp=3"))
    assert message == f"unknown option train.stesp in {recipe} with train.stesp=3"
    assert hint == "did you mean train.steps?"


def test_missing_data_is_refused_with_its_own_exit_code(run: Run, tmp_path: Path, base: Path) -> None:
    message, _ = refused(run("evaluate", str(base), str(tmp_path / "nowhere")), ExitCode.DATA)
    assert "no such folder" in message


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a recorder in the place of the evaluation itself."""
    from cytoclip import evaluation
    from cytoclip.measure import Measured

    calls: list[dict[str, Any]] = []

    def record(models: list[str], folder: Path, question: Any, _console: Any, how: Any) -> Any:
        calls.append({"models": models, "root": folder.parent, "ks": list(question.ks), "how": how})
        calls[-1]["names"] = question.directions
        names = [*(f"hit@{k}" for k in question.ks), "mrr", "median_rank"]
        rates = {f"{name}{end}": 0.5 for name in names for end in ("", "_groups")}
        scores = {"pairs": 9, **dict.fromkeys(question.directions, rates), "chance": rates}
        measured = {model: Measured(scores, {}, None) for model in models}  # type: ignore[arg-type]
        return evaluation.Compared(None, dict(zip(models, models, strict=True)), measured, {}, {})  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "evaluate", record)
    return calls


@pytest.mark.parametrize(
    ("words", "ks"),
    [
        ([], [1, 5, 10, 50]),
        (["--ks", "1", "5", "10"], [1, 5, 10]),  # as the original project writes it
        (["--ks", "1,5"], [1, 5]),
        (["--ks", "1, 5"], [1, 5]),
        (["--ks", "7"], [7]),
        (["--ks=1,5"], [1, 5]),
        (["--ks=1", "5"], [1, 5]),
        (["--ks", "1", "5", "--batch-size", "3"], [1, 5]),
        (["--ks", "5 1"], [5, 1]),
    ],
)
def test_ks_may_be_written_in_many_ways(
    run: Run, asked: list[dict[str, Any]], root: Path, words: list[str], ks: list[int]
) -> None:
    outcome = run("evaluate", "some/model", str(root), *words)
    assert outcome.code == 0, outcome.err
    assert [call["ks"] for call in asked] == [ks]
    assert asked[0]["how"].batch_size == (3 if "--batch-size" in words else 64)
    assert outcome.out.count("hit@") == 2 * len(ks)


def test_a_model_without_a_data_root_is_refused(run: Run) -> None:
    message, hint = refused(run("evaluate", "some/model"))
    assert message == "evaluate got some/model and nothing else"
    assert hint == "cytoclip evaluate MODEL… DATA_ROOT"


def test_ks_may_stand_before_the_model(run: Run, asked: list[dict[str, Any]], root: Path) -> None:
    """Digits end where the next word begins."""
    assert run("evaluate", "--ks", "1", "5", "some/model", str(root)).code == 0
    assert (asked[0]["models"], asked[0]["ks"]) == (["some/model"], [1, 5])


def test_a_table_is_evaluated_under_its_name_and_valid_is_val(
    run: Run, asked: list[dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    place = formats.table("csv")(tmp_path, formats.drawn())
    for words, split in (((str(place),), "pairs.csv"), ((str(root), "--split", "valid"), "val")):
        outcome = run("evaluate", "some/model", *words, "--json")
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["split"] == split
    assert [call["root"] for call in asked] == [tmp_path, root]


def test_pictures_may_lie_below_a_folder_that_is_named(run: Run, tmp_path: Path) -> None:
    place = formats.table("csv")(tmp_path / "from", formats.drawn(20))
    text = place.read_text(encoding="utf-8")
    (tmp_path / "moved.csv").write_text(text.replace("pictures/", f"{tmp_path}/from/pictures/"), encoding="utf-8")
    words = ("bring", str(tmp_path / "moved.csv"), "--to", str(tmp_path / "to"))
    outcome = run(*words)
    assert outcome.code == ExitCode.DATA
    assert f"data.image_root={tmp_path}/from/pictures, or --image-root" in outcome.err.splitlines()[-1]
    outcome = run(*words, "--image-root", str(tmp_path / "from"))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "to" / "train" / "imgs" / "pictures").is_dir()


@pytest.mark.parametrize("given", [True, False])
def test_a_check_takes_the_root_of_the_pictures(run: Run, tmp_path: Path, given: bool) -> None:
    place = formats.table("csv")(tmp_path / "from", formats.drawn(20))
    (tmp_path / "root").mkdir()
    place.rename(tmp_path / "root" / "train.csv")
    words = ("check", str(tmp_path / "root"), *(("--image-root", str(tmp_path / "from")) if given else ()))
    assert ("pictures that are not there" in run(*words).out) != given


def test_the_last_word_is_the_data_root(run: Run, asked: list[dict[str, Any]], root: Path) -> None:
    words = ("one", "two", "three", str(root), "--base", "none", "--embeddings", "kept.safetensors")
    outcome = run("evaluate", *words)
    assert outcome.code == 0, outcome.err
    assert (asked[0]["models"], asked[0]["root"]) == (["one", "two", "three"], root)
    assert (asked[0]["how"].base, asked[0]["how"].embeddings) == ("none", Path("kept.safetensors"))
    assert "one" in outcome.out.splitlines()[1]
    assert "three" in outcome.out.splitlines()[1]


@pytest.mark.parametrize("ks", ["0", "1,x", "1.5", ",", "1,0"])
def test_bad_ks_are_refused_before_the_model_is_opened(
    run: Run, asked: list[dict[str, Any]], root: Path, ks: str
) -> None:
    message, hint = refused(run("evaluate", "some/model", str(root), "--ks", ks))
    assert message == f"--ks {ks!r} is not a list of whole numbers from 1"
    assert hint == "such as --ks 1,5,10,50"
    assert asked == []


def test_json_is_one_document_on_stdout(run: Run, asked: list[dict[str, Any]], root: Path) -> None:
    found = json.loads(run("evaluate", "some/model", str(root), "--json", "--ks", "1").out)
    assert (found["schema"], found["split"], found["base"]) == (1, "val", None)
    (model,) = found["models"]
    assert (model["model"], model["pairs"], model["image_to_text"]["hit@1"]) == ("some/model", 9, 0.5)


@pytest.mark.parametrize(
    ("words", "shots"),
    [([], (1, 2, 4, 8, 16)), (["--shots", "3", "5"], (3, 5)), (["--shots", "2,4", "--no-probe"], (2, 4))],
)
def test_classify_hands_on_what_was_asked(
    run: Run, words: list[str], shots: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cytoclip import class_table, classify

    asked: list[Any] = []
    monkeypatch.setattr(classify, "classify", lambda *given: asked.append(given) or {"schema": 1})
    monkeypatch.setattr(class_table, "text", lambda result: f"schema {result['schema']}")
    typed = [
        "classify",
        "m",
        "r",
        "--labels",
        "a.csv",
        "--labels",
        "b.csv",
        "--seeds",
        "3",
        "--batch-size",
        "9",
        *words,
    ]
    assert run(*typed) == (0, "schema 1\n", "")
    ((model, root, wanted, _, batch_size),) = asked
    assert (model, root, batch_size) == ("m", Path("r"), 9)
    assert wanted == classify.Asked(
        "val", [Path("a.csv"), Path("b.csv")], None, "--no-probe" not in words, list(shots), 3
    )
    assert json.loads(run(*typed, "--json").out) == {"schema": 1}


def test_bad_shots_are_refused_before_the_model_is_opened(run: Run) -> None:
    message, hint = refused(run("classify", "m", "r", "--shots", "0"))
    assert message == "--shots '0' is not a list of whole numbers from 1"
    assert hint == "such as --shots 1,5,10,50"


@pytest.mark.parametrize(("words", "images"), [([], None), (["--no-images"], False), (["--images"], True)])
def test_a_page_is_written_beside_the_document(
    run: Run,
    asked: list[dict[str, Any]],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    images: bool | None,
) -> None:
    from cytoclip import evaluation_page

    written: list[Any] = []
    monkeypatch.setattr(evaluation_page, "write", lambda *given: written.append(given))
    outcome = run("evaluate", "some/model", str(root), "--ks", "1", "--json", "--html", "page.html", *words)
    assert json.loads(outcome.out)["schema"] == 1
    ((to, found, split, folder, _, shown),) = written
    assert (to, list(found.names), split, folder) == (Path("page.html"), ["some/model"], "val", root / "val")
    assert shown is images
    monkeypatch.setenv("RANK", "1")
    assert run("evaluate", "some/model", str(root), "--ks", "1", "--html", "page.html") == (0, "", "")
    assert len(written) == 1


def test_a_page_that_cannot_be_is_refused_before_the_model_is_opened(
    run: Run, asked: list[dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    message, hint = refused(run("evaluate", "some/model", str(root), "--html", str(tmp_path)))
    assert message == f"--html {tmp_path} is a folder"
    assert hint == f"name a file, such as {tmp_path / 'page.html'}"
    assert asked == []


def test_only_the_first_process_prints(
    run: Run, asked: list[dict[str, Any]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("evaluate", "some/model", str(root), "--ks", "1") == (0, "", "")


@pytest.mark.parametrize("code", [code for code in ExitCode if code > ExitCode.INTERNAL])
def test_every_exit_code_reaches_the_shell(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, code: ExitCode
) -> None:
    monkeypatch.setattr(config, "load", raising(UserError("what", "do this", code)))
    assert refused(run("config", str(recipe)), code) == ("what", "do this")


def test_a_bug_keeps_its_traceback(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message would hide it; Python's own way out is exit code 1, which is INTERNAL."""
    monkeypatch.setattr(config, "load", raising(RuntimeError("shapes do not match")))
    monkeypatch.setattr("sys.argv", ["cytoclip", "config", str(recipe)])
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has"), "Tried to allocate 20 GiB."),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "MPS backend out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "9 bytes"),
        (MemoryError("Unable to allocate 9 GiB for an array"), "9 GiB"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_no_memory_is_the_users_to_mend(
    run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(config, "load", raising(error))
    message, hint = refused(run("config", str(recipe)), ExitCode.SYSTEM)
    assert message.startswith("no memory left: ")
    assert said in message
    assert "train.batch_size" in hint


def test_ctrl_c_says_how_to_go_on(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """typer catches it inside a command, argparse does not: both entries end the same."""
    monkeypatch.setattr(config, "load", raising(KeyboardInterrupt()))
    hint = "the same command goes on from whatever was saved"
    stopped = Outcome(130, "", f"stopped; {hint}\n")
    assert run("config", str(recipe)) == stopped
    assert run("--config", str(recipe), entry=cli.original_train, program="train.py") == stopped


def test_the_original_train_command(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.py --config F`, and overrides on either side of it."""
    seen: list[tuple[Path, list[str], bool]] = []
    monkeypatch.setattr(cli_train, "train", lambda path, overrides, dry: seen.append((path, overrides, dry)))
    for words in (["--config", str(recipe), "a=1", "b=2"], ["a=1", "--config", str(recipe), "b=2"]):
        assert run(*words, entry=cli.original_train, program="train.py").code == 0
    assert seen == [(recipe, ["a=1", "b=2"], False)] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config"),
        (["--config"], "--config"),
        (["--confg", "x"], "--config"),
        (["--config", "nowhere.yaml"], "no such configuration file: nowhere.yaml"),
    ],
)
def test_a_wrong_original_train_command_is_two_lines(run: Run, words: list[str], said: str) -> None:
    assert said in refused(run(*words, entry=cli.original_train, program="train.py"))[0]


ORIGINAL = ["--pretrained_clip_path", "some/model", "--batch_size", "8"]


def test_the_original_evaluation_command(
    run: Run, asked: list[dict[str, Any]], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves its result below the current folder
    words = ["--data_root", str(root), "--ks", "1", "10", *ORIGINAL]
    outcome = run(*words, entry=cli.original_evaluation, program="evaluation.py")
    assert outcome.code == 0, outcome.err
    (one,) = asked
    assert (one["models"], one["ks"], one["names"]) == (["some/model"], [1, 10], ("image_to_text",))
    assert (one["how"].batch_size, one["how"].base) == (8, "none")
    assert "hit@10" in outcome.out
    saved = tmp_path / outcome.out.splitlines()[-1].removeprefix("saved ")
    assert saved.is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (ORIGINAL, "--data_root"),
        (["--data_root", "r", *ORIGINAL, "--ks", "0"], "must be at least 1"),
        (["--data_root", "r", *ORIGINAL[:2], "--batch_size", "0"], "must be at least 1"),
        (["--data_root", "r", *ORIGINAL, "--ks", "x"], "x"),
        (["--data_root", "r", *ORIGINAL, "--direction", "up"], "up"),
    ],
)
def test_a_wrong_original_evaluation_command_is_two_lines(
    run: Run, asked: list[dict[str, Any]], words: list[str], said: str
) -> None:
    assert said in refused(run(*words, entry=cli.original_evaluation, program="evaluation.py"))[0]
    assert asked == []


def test_the_version(run: Run) -> None:
    assert run("--version") == Outcome(0, f"{__version__}\n", "")


def test_a_soup_is_a_table_or_one_document(run: Run, experiment: Callable[..., Any], tmp_path: Path) -> None:
    from cytoclip import training

    training.fit(experiment(validate={"every": 2}), Console(quiet=True))
    outcome = run("soup", str(tmp_path / "run"), "--alphas", "0.5 1")
    assert outcome.code == 0, outcome.err
    assert [line.split("  ")[1] for line in outcome.out.splitlines()[1:4]] == ["alpha 0", "alpha 0.5", "alpha 1"]
    assert outcome.out.count("← chosen") == 1
    assert outcome.out.endswith(f"saved: {tmp_path / 'run' / 'soup' / 'model'}\n")
    found = json.loads(run("soup", str(tmp_path / "run"), "--alphas", "1,0.25", "--json").out)
    assert [mixture["alpha"] for mixture in found["mixtures"]][:3] == [0, 0.25, 1]
    assert found["select_by"] == "hits"


@pytest.mark.parametrize("alphas", ["a", "0.5;1"])
def test_bad_alphas_are_refused(run: Run, tmp_path: Path, alphas: str) -> None:
    message, hint = refused(run("soup", str(tmp_path), "--alphas", alphas))
    assert message == f"--alphas {alphas!r} is not a list of numbers"
    assert hint == "such as --alphas 0,0.25,0.5,0.75,1"
