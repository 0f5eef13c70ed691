"""Two processes that share out every weight train what one process with the whole model trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from cytoclip import checkpoint, shard
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import UserError
from tests.numerics.nursery import spawn
from tests.numerics.one_rank import run

pytestmark = pytest.mark.slow  # two processes, and two more that are stopped and started again: two minutes

# The image tower, the text tower, and what else is different.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("full", "full", {}),
    "lora": ("lora", "lora", {}),
    "one of each, averaged": ("lora", "full", {"ema": 0.5}),
    "frozen, in one chunk": ("full", "frozen", {"micro_batch_size": 12}),
    "checkpointed": ("full", "full", {"gradient_checkpointing": True}),
    "fitted": ("lora", "full", {}),
}


@pytest.fixture(scope="module")
def trained(
    root: Path, many: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """The run folders (whole on one process, shared by two) of every case."""
    folder = tmp_path_factory.mktemp("shard")
    for processes in (1, 2):
        cases = [
            _case(many if name == "fitted" else root, base, folder / f"{name}-{processes}", name) for name in CASES
        ]
        if processes == 1:
            for case in cases:
                run(case)
        else:
            for case in cases:
                case["config"]["train"]["shard"] = True
            (folder / "cases.json").write_text(json.dumps(cases))
            spawn("tests.numerics.one_rank", [str(folder / "cases.json")], 2)
    return {name: (folder / f"{name}-1", folder / f"{name}-2") for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_scores_are_equal(name: str, trained: dict[str, tuple[Path, Path]]) -> None:
    one, two = trained[name]
    rows = [[json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()] for folder in (one, two)]
    for key in ("loss", "gradient_norm", "logit_scale"):
        first, second = ([row[key] for row in side] for side in rows)
        assert len(first) == 5
        assert first == pytest.approx(second, rel=1e-9), key
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    for key in ("before", "last", "best"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("name", CASES)
def test_saved_models_are_equal(name: str, trained: dict[str, tuple[Path, Path]]) -> None:
    for saved in ("model", "best"):
        one, two = ({p.name: load_file(p) for p in (run / saved).glob("*.safetensors")} for run in trained[name])
        assert one.keys() == two.keys()
        assert len(one) == (2 if name == "lora" else 1)
        for file, tensors in one.items():
            assert tensors.keys() == two[file].keys()
            assert max(np.abs(tensors[key] - two[file][key]).max() for key in tensors) < 1e-9


def test_projections_were_fitted_on_one_and_on_two(base: Path, trained: dict[str, tuple[Path, Path]]) -> None:
    """Five steps of 1e-3 do not come so far."""
    before = load_file(base / "model.safetensors")
    for folder in trained["fitted"]:
        after = load_file(folder / "model" / "model.safetensors")
        moved = {name: float(np.abs(after[name] - before[name]).max()) for name in before if name in after}
        assert max(moved, key=lambda name: moved[name]) in ("visual_projection.weight", "text_projection.weight")
        assert moved["text_projection.weight"] > 0.1


def test_a_shared_run_goes_on_whole_and_shared(root: Path, base: Path, trained: Any, tmp_path: Path) -> None:
    """What a checkpoint holds is whole: two processes that were stopped go on as two, and then as one."""
    case = _case(root, base, tmp_path / "run", "one of each, averaged")
    for step, code in ((2, 143), (3, 143)):
        case["config"]["train"]["shard"] = True
        (tmp_path / "cases.json").write_text(json.dumps([{**case, "die_at": step, "signal": 15}]))
        spawn("tests.numerics.one_rank", [str(tmp_path / "cases.json")], 2, code)
    case["config"]["train"]["shard"] = False
    run(case)
    one, two = (
        load_file(run / "model" / "model.safetensors")
        for run in (trained["one of each, averaged"][0], tmp_path / "run")
    )
    assert max(np.abs(one[key] - two[key]).max() for key in one) < 1e-9


def test_one_process_is_told_that_it_has_nothing_to_share(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    before = [id(parameter) for parameter in encoder.parameters()]
    shard.share_out(encoder, World(torch.device("cpu")), Console())
    assert "nothing to share out" in capsys.readouterr().err
    assert [id(parameter) for parameter in encoder.parameters()] == before


def test_fp16_is_refused(base: Path) -> None:
    encoder = checkpoint.open_model(str(base)).encoder
    with pytest.raises(UserError, match="fp16") as caught:
        shard.share_out(encoder, World(torch.device("cpu"), 0, 2, precision="fp16"), Console(quiet=True))
    assert "bf16" in caught.value.hint


def _case(root: Path, base: Path, output: Path, name: str) -> dict[str, Any]:
    image_tower, text_tower, train = CASES[name]
    return {
        "config": {
            "data": {"root": str(root), "workers": 0},
            "model": {
                "name": str(base), "image_tower": image_tower, "text_tower": text_tower,
                "projections": "fitted" if name == "fitted" else "full",
            },
            "train": {
                "steps": 5, "batch_size": 12, "micro_batch_size": 3, "learning_rate": 1e-3, "warmup_steps": 2,
                "weight_decay": 0.1, "max_grad_norm": 0.5, "precision": "no", "device": "cpu", **train,
            },
            "validate": {"every": 3, "ks": [1, 5]},
            "checkpoint": {"every": 100},
            "track": {"to": []},
            "output": str(output),
        },
        "float64": True,
        "die_at": None,
    }  # fmt: skip
