"""`fit` from a configuration to a run folder: what it leaves, what it repeats, and what it refuses before any step.

Killing and resuming bit for bit is in `tests/numerics/test_resume.py`, several processes in `test_processes.py`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cytoclip import config, training, validation
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.state import MANIFEST, MORE, TENSORS
from cytoclip.validation import Seen
from tests.conftest import weights

QUIET = Console(quiet=True)
Experiment = Callable[..., Config]
Listing = dict[str, bytes]
_FORMAT = {"format": "pt"}


def listing(folder: Path) -> Listing:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def losses(run: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run) / "losses.jsonl").read_text().splitlines()]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C does, just after the checkpoint of `step`."""
    saves = training._save

    def save_and_stop(job: Any, progress: Any, book: Any) -> None:
        saves(job, progress, book)
        if progress.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_stop)


def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*given: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(training, "_step", step)


# What a run leaves


def test_the_run_folder_holds_what_is_documented(done: tuple[Config, training.RunResult]) -> None:
    run = Path(done[0].output)
    names = {re.sub(r"tfevents.*", "tfevents", name) for name in listing(run)}
    model = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {
        "config.yaml", "results.json", "losses.jsonl", "curves.jsonl", "validations.jsonl", "train.log", ".lock",
        "tensorboard/events.out.tfevents", "embeddings/before.safetensors", "embeddings/best.safetensors",
        "report.html", "model/README.md", "best/README.md",
        *(f"checkpoints/step-{step}/{name}" for step in (2, 4) for name in (TENSORS, MORE, MANIFEST)),
        *(f"{place}/{name}" for place in ("model", "best") for name in model),
    }  # fmt: skip


def test_results_say_what_was_measured(done: tuple[Config, training.RunResult]) -> None:
    wanted, result = done
    written = json.loads((Path(wanted.output) / "results.json").read_text())
    assert (written["steps"], written["pairs_seen"], written["processes"], written["ks"]) == (4, 48, 1, [1, 5])
    assert written["best_step"] in (2, 4)
    assert {name: written[name] for name in ("before", "last", "best")} == {
        "before": result.before, "last": result.last, "best": result.best,
    }  # fmt: skip
    names = {*(f"{name}@{k}_groups" for name in ("hit", "recall") for k in (1, 5)), "map_groups", "hit@1", "hit@5"}
    both = {f"{name}{end}" for name in ("mrr", "median_rank", "mean_rank") for end in ("", "_groups")}
    assert set(result.before["image_to_text"]) == names | both
    assert "chance" in result.table()
    assert "step 4" in result.table()


def test_losses_have_a_line_a_step_and_the_log_says_how_it_went(done: tuple[Config, training.RunResult]) -> None:
    wanted, _ = done
    rows = losses(wanted.output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["lr"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert all(0 < row["loss"] < 3 * math.log(12) and row["gradient_norm"] > 0 for row in rows)
    log = (Path(wanted.output) / "train.log").read_text()
    for said in ("1 process on cpu", "precision no (from the configuration)", "global batch 12 = 1 × 12"):
        assert said in log.splitlines()[0]
    for said in ("48 training and 20 validation pairs", "before: image → text", "step 2:", "step 4:", "finished 4"):
        assert log.count(said) == 1


def test_tensorboard_has_the_curves(done: tuple[Config, training.RunResult]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(done[0].output) / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/text_to_image/hit@5_groups")] == [0, 2, 4]
    for name in ("lr", "logit_scale", "gradient_norm", "hit_at_1", "chance_loss", "pairs_per_second"):
        assert f"train/{name}" in tags
    assert events.Scalars("train/loss")[3].value == pytest.approx(losses(done[0].output)[3]["loss"])


def test_the_saved_configuration_is_complete_and_repeats_the_run(
    done: tuple[Config, training.RunResult], tmp_path: Path
) -> None:
    wanted, result = done
    place = Path(wanted.output) / "config.yaml"
    chosen = wanted.model_copy(update={"train": wanted.train.model_copy(update={"compile": False})})  # auto, on a CPU
    assert config.load(place) == chosen
    assert re.match(
        r"# cytoclip \S+, torch \S+, transformers \S+, accelerate \S+, peft \S+, python \S+\n", place.read_text()
    )
    again = config.load(place, [f"output={tmp_path / 'again'}", "track.to=[]"])
    repeated = training.fit(again, QUIET)
    assert (repeated.before, repeated.last) == (result.before, result.last)
    one, two = (weights(Path(where) / "model") for where in (wanted.output, again.output))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_finished_run_says_so_and_changes_nothing(
    done: tuple[Config, training.RunResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_step(monkeypatch)
    wanted, result = done
    before = listing(Path(wanted.output))
    assert training.fit(wanted, Console()) == result
    after = listing(Path(wanted.output))
    assert after.pop("train.log").startswith(before.pop("train.log"))
    assert after == before
    said = capsys.readouterr().err
    assert "is finished: 4 steps" in said
    assert "delete it or name another output" in said


def test_the_seed_decides(done: tuple[Config, training.RunResult], experiment: Experiment) -> None:
    """Of the data order for a whole model, and of the new weights for adapters."""
    other = experiment(train={"seed": 1})
    training.fit(other, QUIET)
    one, two = (weights(Path(where) / "model") for where in (done[0].output, other.output))
    assert not np.array_equal(one["text_projection.weight"], two["text_projection.weight"])
    assert [r["loss"] for r in losses(other.output)] != [r["loss"] for r in losses(done[0].output)]


# What moves, and in which arithmetic


def test_frozen_parts_are_byte_identical(experiment: Experiment, base: Path) -> None:
    """Trap 33: weight decay and buffers move what has no gradient."""
    wanted = experiment(
        model={"image_tower": "frozen", "projections": "frozen"}, train={"weight_decay": 0.9, "learning_rate": 0.01}
    )
    training.fit(wanted, QUIET)
    before, after = weights(base), weights(Path(wanted.output) / "model")
    assert before.keys() == after.keys()
    same = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    frozen = {name for name in before if name.startswith("vision_model.") or "_projection." in name}
    assert len(frozen) > 30
    assert same == frozen
    assert before["logit_scale"] != after["logit_scale"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_trains_is_float32_under_every_precision(precision: str, experiment: Experiment, base: Path) -> None:
    """Trap 13: half-precision weights lose small updates, and fp16 ones overflow. The other two towers are LoRA."""
    wanted = experiment(
        model={"image_tower": "lora"}, train={"precision": precision, "steps": 3}, validate={"every": 100, "ks": [1]}
    )
    training.fit(wanted, QUIET)
    state = load_file(Path(wanted.output) / "checkpoints" / "step-3" / "state.safetensors")
    kept = {name: tensor.dtype for name, tensor in state.items() if not name.startswith("random.")}
    assert len([name for name in kept if "lora" in name]) == 2 * 3 * 2 * 4  # layers × leaves × A and B × 4 tensors
    assert set(kept.values()) == {np.dtype(np.float32)}
    after = weights(Path(wanted.output) / "model")
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}
    assert not np.array_equal(after["text_projection.weight"], weights(base)["text_projection.weight"])
    assert all(math.isfinite(row["loss"]) for row in losses(wanted.output))
    assert config.load(Path(wanted.output) / "config.yaml").train.precision == precision


def test_precision_reaches_the_towers(
    done: tuple[Config, training.RunResult], experiment: Experiment, base: Path
) -> None:
    """Else the test above would pass in float32."""
    wanted = experiment(train={"precision": "bf16", "steps": 1})
    training.fit(wanted, QUIET)
    one, two = losses(wanted.output)[0]["loss"], losses(done[0].output)[0]["loss"]
    assert one != two
    assert one == pytest.approx(two, rel=0.02)


@pytest.mark.parametrize("start", [math.log(100), 5.0])
def test_the_logit_scale_is_clamped_after_each_step(
    start: float, experiment: Experiment, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traps 10 and 34: at ln 100, or at the loaded value where that is above; here the gradient pushes it up."""
    raised = shutil.copytree(base, tmp_path / "raised")
    save_file({**weights(base), "logit_scale": np.array(start, np.float32)}, raised / "model.safetensors", _FORMAT)
    contrast, steps = training.contrastive_step, training._step
    seen: list[float] = []

    def push_up(encoder: Any, logits: Any, *rest: Any) -> Any:
        result = contrast(encoder, logits, *rest)
        logits.scale.grad = torch.tensor(-1.0)
        return result

    def step_and_look(job: Any, *rest: Any) -> Any:
        made = steps(job, *rest)
        seen.append(job.opened.encoder.logit_scale.item())
        return made

    monkeypatch.setattr(training, "contrastive_step", push_up)
    monkeypatch.setattr(training, "_step", step_and_look)
    training.fit(experiment(model={"name": str(raised)}, train={"learning_rate": 0.1}), QUIET)
    assert seen == [pytest.approx(start, abs=1e-6)] * 4


def test_the_logit_scale_trains_under_lora_and_is_saved_beside_the_adapter(experiment: Experiment, base: Path) -> None:
    """Trap 11."""
    wanted = experiment(model={"image_tower": "lora", "text_tower": "lora", "projections": "frozen"})
    training.fit(wanted, Console())
    run = Path(wanted.output)
    before, beside = weights(base), load_file(run / "model" / "cytoclip.safetensors")
    assert set(beside) == {"logit_scale", "text_projection.weight", "visual_projection.weight"}
    assert beside["logit_scale"] != before["logit_scale"]
    assert np.array_equal(beside["text_projection.weight"], before["text_projection.weight"])
    assert beside["logit_scale"] == load_file(run / "checkpoints/step-4/state.safetensors")["param.logit_scale"]
    assert "LoRA rank 8, scaling 1 (alpha ÷ rank)" in (run / "train.log").read_text()


def test_epochs_are_counted_in_full_batches(experiment: Experiment) -> None:
    wanted = experiment(train={"steps": None, "epochs": 2, "batch_size": 20})
    assert training.fit(wanted, QUIET).steps == 4
    assert [row["step"] for row in losses(wanted.output)] == [1, 2, 3, 4]


def test_it_learns(root: Path, experiment: Experiment) -> None:
    """Ranked on what it trains on: a model that can learn anything learns that."""
    split = str(root / "train")
    wanted = experiment(
        data={"root": None, "train": split, "val": split},
        train={"steps": 30, "batch_size": 24, "learning_rate": 3e-3, "warmup_steps": 3},
    )
    result = training.fit(wanted, QUIET)
    rows = [row["loss"] for row in losses(wanted.output)]
    assert np.mean(rows[-3:]) < np.mean(rows[:3]) - 0.5
    for direction in ("image_to_text", "text_to_image"):
        assert result.last[direction]["hit@5_groups"] > result.before[direction]["hit@5_groups"] + 0.2
        assert result.last[direction]["hit@5_groups"] > 2 * result.last["chance"]["hit@5_groups"]


def test_best_is_the_best_validation_and_of_equal_ones_the_first(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trap 27. The starting point is no candidate, however good: its weights are the base's."""
    script = iter([0.9, 0.1, 0.5, 0.3, 0.5])
    at: list[np.ndarray] = []

    looks = validation.look

    def look(job: Any) -> Seen:
        at.append(job.opened.encoder.clip.text_projection.weight.detach().numpy().copy())
        seen, hit = looks(job), {"hit@1": 0.0, "hit@1_groups": next(script)}
        both = {name: {**seen.val[name], **hit} for name in ("image_to_text", "text_to_image")}
        return replace(seen, val={**seen.val, **both})

    monkeypatch.setattr(validation, "look", look)
    wanted = experiment(validate={"every": 1, "ks": [1]})
    result = training.fit(wanted, QUIET)
    assert result.best_step == 2
    assert result.best["image_to_text"]["hit@1_groups"] == 0.5
    assert result.before["image_to_text"]["hit@1_groups"] == 0.9
    run = Path(wanted.output)
    assert len(at) == 5
    assert np.array_equal(weights(run / "best")["text_projection.weight"], at[2])
    assert np.array_equal(weights(run / "model")["text_projection.weight"], at[4])
    assert "best, step 2" in result.table()
