"""Soups: what is mixed, by which number one is chosen, and that the chosen one is the model that was scored."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from cytoclip import checkpoint, encode, evaluation, files, soup, training
from cytoclip.checkpoint import RunFolder
from cytoclip.config import Config, parse
from cytoclip.console import Console
from cytoclip.errors import ExitCode, UserError
from cytoclip.model import DualEncoder
from cytoclip.pairs import Pairs
from cytoclip.soup import Asked, Recipe, Tasted
from tests import tiny
from tests.conftest import weights, write_split

QUIET = Console(quiet=True)
LORA = {"rank": 4, "alpha": 8.0}
TOWERS: dict[str, dict[str, Any]] = {
    "full": {},
    "half frozen": {"image_tower": "frozen", "projections": "frozen"},
    "adapter": {"image_tower": "lora", "text_tower": "lora", "lora": LORA},
    "dora on one": {"image_tower": "lora", "lora": {**LORA, "dora": True}},
}


def made(root: Path, base: Path, output: Path, **sections: dict[str, Any]) -> Config:
    given: dict[str, Any] = {
        "data": {"root": str(root), "workers": 0},
        "model": {"name": str(base)},
        "train": {"steps": 6, "batch_size": 12, "learning_rate": 3e-3, "warmup_steps": 2, "precision": "no"},
        "validate": {"every": 2, "ks": [1, 5]},
        "checkpoint": {"every": 2, "keep_last": 9},
        "track": {"to": []},
        "output": str(output),
    }
    wanted = parse({**given, **{name: {**given[name], **section} for name, section in sections.items()}}, "the test")
    training.fit(wanted, QUIET)
    return wanted


@pytest.fixture(scope="module")
def runs(root: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    home = tmp_path_factory.mktemp("soups")
    found = {name: made(root, base, home / name, model=towers) for name, towers in TOWERS.items()}
    found["averaged"] = made(root, base, home / "averaged", train={"ema": 0.5})
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    write_split(folder / "val", 16, seed=77)
    return folder


State = dict[str, np.ndarray]


def opened_state(name: str) -> State:
    return {n: t.numpy().copy() for n, t in checkpoint.open_model(name).encoder.clip.state_dict().items()}


def mixed(wanted: Config, *recipes: Recipe) -> list[State]:
    run = RunFolder(Path(wanted.output))
    finished = files.read_json(run.results)
    members = soup._members(run, finished, soup.state.whole(run.checkpoints, pytest.fail))
    work = checkpoint.open_start(wanted)
    return [
        {name: tensor.numpy().copy() for name, tensor in work.encoder.clip.state_dict().items()}
        for _ in soup._mixed(work, recipes, wanted, run, members)
    ]


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


# What is mixed


@pytest.mark.parametrize("name", TOWERS)
def test_the_ends_are_bytes_and_between_them_is_the_formula(name: str, runs: dict[str, Config]) -> None:
    wanted = runs[name]
    start, end = opened_state(wanted.model.name), opened_state(f"{wanted.output}/model")
    found = mixed(wanted, *(Recipe(alpha=alpha) for alpha in (0.0, 0.3, 1.0)))
    assert same(found[0], start)
    assert same(found[2], end)
    moved = 0
    for key, tensor in found[1].items():
        twin = 0.7 * start[key].astype(np.float64) + 0.3 * end[key].astype(np.float64)
        assert np.array_equal(tensor, twin.astype(np.float32)), key
        moved += not np.array_equal(start[key], end[key])
        if "frozen" in name and (key.startswith("vision_model.") or "_projection." in key):
            assert tensor.tobytes() == start[key].tobytes(), f"{key} is frozen"
    assert moved > 8


@pytest.mark.parametrize("name", [*TOWERS, "averaged"])
def test_a_mean_is_that_of_the_models_that_the_steps_would_have_saved(name: str, runs: dict[str, Config]) -> None:
    """Under LoRA of the merged weights; with a moving average of the averages. By hand, from the checkpoints."""
    wanted = runs[name]
    found = mixed(wanted, Recipe(steps=(6,)), Recipe(steps=(6, 4)), Recipe(steps=(6, 4, 2)))
    start = opened_state(wanted.model.name)
    by_hand = [saved(wanted, step, start) for step in (6, 4, 2)]
    for count, mean in enumerate(found, start=1):
        for key, tensor in mean.items():
            twin = np.mean([state[key] for state in by_hand[:count]], axis=0, dtype=np.float64)
            assert np.allclose(tensor, twin, rtol=1e-5, atol=2e-6), (count, key)
    assert not np.allclose(found[0]["logit_scale"], found[2]["logit_scale"], atol=1e-7)


def saved(wanted: Config, step: int, start: State) -> State:
    tensors = load_file(Path(wanted.output) / "checkpoints" / f"step-{step}" / "state.safetensors")
    prefix = "extra." if wanted.train.ema else "param."
    moving = {name.removeprefix(prefix): t.double().numpy() for name, t in tensors.items() if name.startswith(prefix)}
    found = {name: moving.get(name, tensor).astype(np.float64) for name, tensor in start.items()}
    for name, down in moving.items():
        if ".lora_A." not in name:
            continue
        layer = name.split(".lora_A.")[0]
        whole = found[f"{layer}.weight"] + 8.0 / 4 * moving[name.replace("lora_A", "lora_B")] @ down
        magnitude = moving.get(f"{layer}.lora_magnitude_vector.default.weight")
        if magnitude is not None:
            whole = magnitude[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        found[f"{layer}.weight"] = whole
    return found


def test_which_means_there_are(runs: dict[str, Config], tmp_path: Path) -> None:
    """best/ by itself where it is another than the last; without checkpoints the mean of best/ and the last."""
    run = RunFolder(tmp_path)
    finished = {"steps": 60, "best_step": 30}
    members = soup._members(run, finished, {50: Path("a")})
    assert [recipe.name for recipe in soup._of_steps(members, finished)] == ["mean of steps 50, 60"]  # best/ is deleted
    run.best.mkdir()
    members = soup._members(run, finished, {50: Path("a"), 60: Path("b")})
    assert list(members.items()) == [(60, run.model), (50, Path("a")), (30, run.best)]
    names = [recipe.name for recipe in soup._of_steps(members, finished)]
    assert names == ["step 30 (best/)", "mean of steps 50, 60", "mean of steps 30, 50, 60"]
    assert soup._of_steps(soup._members(run, {"steps": 9, "best_step": 9}, {}), {"steps": 9, "best_step": 9}) == []


def test_no_more_than_three_models_are_held(runs: dict[str, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, held = evaluation.rank, []
    gc.collect()
    before = sum(type(one) is DualEncoder for one in gc.get_objects())

    def count(*given: Any) -> Any:
        held.append(sum(type(one) is DualEncoder for one in gc.get_objects()) - before)
        return ranks(*given)

    monkeypatch.setattr(evaluation, "rank", count)
    opens = checkpoint.open_model

    def opening(*given: Any) -> Any:
        held.append(1 + sum(type(one) is DualEncoder for one in gc.get_objects()) - before)
        return opens(*given)

    monkeypatch.setattr(checkpoint, "open_model", opening)
    soup.soup(Path(runs["adapter"].output), Asked((0.5,)), QUIET)
    assert max(held) <= 3


# How one is chosen


def scores(number: float, chance: float = 0.1) -> dict[str, Any]:
    rates = {"hit@1": 0.0, "hit@1_groups": number}
    return {"pairs": 9, "image_to_text": rates, "text_to_image": rates, "chance": {"hit@1_groups": chance}}


def chosen(val: list[float], keep: list[float] | None = None, at_least: float = 0.95) -> soup.Soup:
    recipes = [Recipe(alpha=i / (len(val) - 1)) for i in range(len(val))]
    kept = [scores(number) for number in keep] if keep else [None] * len(val)
    tasted = [Tasted(recipe, scores(number), k) for recipe, number, k in zip(recipes, val, kept, strict=True)]
    return soup.choose(Path("run"), "hits", tasted, "other", at_least)


def test_the_best_on_val_is_chosen_and_of_equal_ones_the_nearest_to_the_start() -> None:
    assert chosen([0.2, 0.5, 0.4]).chosen.recipe.alpha == 0.5
    assert chosen([0.2, 0.5, 0.5]).chosen.recipe.alpha == 0.5
    assert chosen([0.5, 0.5, 0.1]).chosen.recipe.alpha == 0


def test_only_those_that_keep_enough_may_be_chosen() -> None:
    """Chance is kept by anyone: of 0.5 the share counts that is above 0.1."""
    made = chosen([0.2, 0.4, 0.5], [0.5, 0.481, 0.479])
    assert made.chosen.recipe.alpha == 0.5
    assert made.keep == ("other", pytest.approx(0.48))
    assert [one.allowed for one in made.tasted] == [True, True, False]
    assert chosen([0.2, 0.4, 0.5], [0.5, 0.481, 0.479], 0.9).chosen.recipe.alpha == 1
    assert chosen([0.2, 0.4, 0.5], [0.5, 0.3, 0.2]).chosen.recipe.alpha == 0, "the start itself always keeps enough"
    below = chosen([0.2, 0.4], [0.05, 0.05])
    assert below.chosen.recipe.alpha == 1, "a start below chance has nothing to keep"
    table = made.table().splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["alpha"] * 3
    assert "← chosen" in table[2]
    assert table[3].endswith("keeps too little")
    assert table[4].split() == ["chance", "0.1000", "0.1000"]
    assert table[-1].startswith("allowed: keep hits on other of 0.4800 or more: chance, and 95% of what the starting")


# The whole


@pytest.mark.parametrize("name", ["full", "half frozen", "adapter"])
def test_the_saved_model_is_the_one_that_was_scored(name: str, runs: dict[str, Config], kept: Path) -> None:
    wanted = runs[name]
    run = RunFolder(Path(wanted.output))
    found = soup.soup(run.path, Asked((0.0, 0.5, 1.0), str(kept), 0.5), Console())
    document = files.read_json(run.soup / "soup.json")
    assert document == json.loads(json.dumps(found.document()))
    assert [mixture["name"] for mixture in document["mixtures"][:3]] == ["alpha 0", "alpha 0.5", "alpha 1"]
    results = files.read_json(run.results)
    for number, side in ((0, "before"), (2, "last")):
        assert document["mixtures"][number]["val"]["image_to_text"] == pytest.approx(results[side]["image_to_text"])
    place = str(run.soup / "model")
    for split, scored in ((Path(str(wanted.data.root)) / "val", found.chosen.val), (kept / "val", found.chosen.keep)):
        again = tiny.scores_of(place, split, [1, 5], 64)
        for direction in ("image_to_text", "text_to_image"):
            assert again[direction] == (scored or {})[direction]
    assert "<svg" in (run.soup / "curve.svg").read_text()
    assert checkpoint.run_of(place) == run, "so it is evaluated in the precision of the run"
    assert not checkpoint.open_model(place).plain
    assert same(opened_state(place), mixed(wanted, found.chosen.recipe)[0])


def test_the_run_s_own_kept_root_is_the_default_and_the_test_split_is_not_looked_at(
    root: Path, base: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(root, tmp_path / "data")
    write_split(data / "test", 13, seed=4)
    wanted = made(data, base, tmp_path / "run", validate={"keep": str(kept), "select_by": "hit@5"})
    encodes, asked = encode.encode, []

    def counting(encoder: Any, pairs: Pairs, *rest: Any) -> Any:
        asked.append(len(pairs))
        return encodes(encoder, pairs, *rest)

    monkeypatch.setattr(encode, "encode", counting)
    found = soup.soup(Path(wanted.output), Asked((0.5,)), QUIET)
    assert (found.select_by, found.keep and found.keep[0]) == ("hit@5", str(kept))
    assert asked == [20, 16] * len(found.tasted)


def test_what_cannot_be_mixed_is_two_lines(runs: dict[str, Config], tmp_path: Path) -> None:
    run = Path(runs["full"].output)
    with pytest.raises(UserError, match=r"alpha 1\.5 is not between 0 and 1"):
        soup.soup(run, Asked((0.5, 1.5)), QUIET)
    with pytest.raises(UserError, match=r"no config\.yaml") as caught:
        soup.soup(tmp_path, Asked(), QUIET)
    assert caught.value.code is ExitCode.RUN
    begun = shutil.copytree(run, tmp_path / "begun")
    for damaged in ("{", "null", "[1]", '{"best": {}}'):
        (begun / "results.json").write_text(damaged)
        with pytest.raises(UserError, match=r"results\.json is damaged"):
            soup.soup(begun, Asked(), QUIET)
    (begun / "results.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        soup.soup(begun, Asked(), QUIET)
    with files.lock(run / ".lock", UserError("x", "y")), pytest.raises(UserError, match="in use by another process"):
        soup.soup(run, Asked(), QUIET)
    with pytest.raises(UserError, match="no such folder"):
        soup.soup(run, Asked((0.5,), str(tmp_path / "nowhere")), QUIET)


def test_another_starting_model_is_refused_and_other_pairs_are_said(
    root: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, data = shutil.copytree(base, tmp_path / "own"), shutil.copytree(root, tmp_path / "data")
    run = Path(made(data, own, tmp_path / "run").output)
    shutil.rmtree(data / "val")
    write_split(data / "val", 9, seed=3)
    soup.soup(run, Asked((0.5,)), Console())
    assert "the validation pairs are others than those that the run was validated on" in capsys.readouterr().err
    shutil.copy(run / "model" / "model.safetensors", own / "model.safetensors")
    with pytest.raises(UserError, match=f"{own} has other weights or settings than {run} began with"):
        soup.soup(run, Asked((0.5,)), QUIET)


def test_a_damaged_checkpoint_is_no_member(runs: dict[str, Config], tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(Path(runs["full"].output), tmp_path / "run"))
    (run.checkpoints / "step-4" / "state.json").write_text("{}")
    found = soup.soup(run.path, Asked((0.5,)), QUIET)
    best = files.read_json(run.results)["best_step"]
    assert {step for one in found.tasted for step in one.recipe.steps} == {2, 6, *([4] if best == 4 else [])}


@pytest.mark.slow  # a process, and a group of two, 10 s each
def test_two_processes_cook_the_same(runs: dict[str, Config], kept: Path, tmp_path: Path) -> None:
    from tests.group import free_port
    from tests.test_commands import TORCHRUN, run

    made = []
    for processes in (1, 2):
        folder = shutil.copytree(Path(runs["adapter"].output), tmp_path / str(processes))
        start = [*TORCHRUN[:2], str(processes), *TORCHRUN[3:], str(free_port())]
        ended = run(tmp_path, *start, "-m", "cytoclip", "soup", str(folder), "--keep", str(kept), "--json")
        assert ended.returncode == 0, ended.stderr
        made.append({**json.loads(ended.stdout), "run": ""})
        made[-1]["weights"] = {n: t.tolist() for n, t in weights(folder / "soup" / "model").items()}
    assert made[0] == made[1]


@pytest.mark.slow  # 3 s each
@pytest.mark.parametrize("kind", tiny.MADE)
def test_every_family_is_mixed(kind: str, bases: dict[str, Path], root: Path, tmp_path: Path) -> None:
    wanted = made(root, bases[kind], tmp_path / "run", model={"image_tower": "lora", "text_tower": "full"})
    found = soup.soup(Path(wanted.output), Asked((0.0, 0.5, 1.0)), QUIET)
    again = tiny.scores_of(f"{wanted.output}/soup/model", root / "val", [1, 5], 64)
    assert again["text_to_image"] == found.chosen.val["text_to_image"]
