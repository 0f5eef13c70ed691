"""What `bench/recipe.py` searches over: arms, their options, what is tried first, the runs that a choice stands for.

Every arm sees the same number of pairs. `baseline` is the original's recipe with its learning rate and warm-up tuned
on the grid of the others; `full` and `lora` are ours.
"""

from __future__ import annotations

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

Params = dict[str, Any]

AUGMENT: dict[str, dict[str, Any] | None] = {
    "none": None,
    "views": {"rotation": "right", "flips": True},
    "turned": {"rotation": "any", "flips": True},
    "light": {"rotation": "right", "flips": True, "smallest_crop": 0.85, "brightness": 0.05, "contrast": 0.05},
    "strong": {
        "rotation": "right",
        "flips": True,
        "smallest_crop": 0.6,
        "brightness": 0.1,
        "contrast": 0.1,
        "blur": 0.5,
    },
    "microscopy": {"preset": "microscopy"},  # stain and hue too, and the captions name colours
}
TARGETS: dict[str, tuple[list[str], list[str]]] = {  # of a DINOv2, and of a BERT
    "qkv": (["q_proj", "k_proj", "v_proj"], ["query", "key", "value"]),
    "all": (["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], ["query", "key", "value", "dense"]),
    "mlp": (["fc1", "fc2"], ["intermediate.dense", "output.dense"]),
}
RATE = FloatDistribution(1e-6, 3e-3, log=True)
WARMUP = CategoricalDistribution((0.02, 0.05, 0.1, 0.2, 0.3676))  # of the steps; 0.3676 of 272: the original's 100
_COMMON: dict[str, BaseDistribution] = {
    "projection_rate": FloatDistribution(1e-6, 1e-2, log=True),
    "scale_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "warmup": WARMUP,
    "weight_decay": CategoricalDistribution((0.001, 0.01, 0.05, 0.2)),
    "schedule": CategoricalDistribution(("constant", "cosine", "linear")),
    "batch": CategoricalDistribution((32, 64, 128, 256)),
    "positives": CategoricalDistribution(("groups", "pairs", "ignore")),
    "label_smoothing": CategoricalDistribution((0.0, 0.05, 0.1)),
    "ema": CategoricalDistribution((0.0, 0.9, 0.97)),
    "patch_dropout": CategoricalDistribution((0.0, 0.25, 0.5)),
    "augment": CategoricalDistribution(tuple(AUGMENT)),
    "fitted": CategoricalDistribution((True, False)),  # whether the projections begin at a closed form
    "first": CategoricalDistribution((0.0, 0.1, 0.2)),  # share of the steps in which only the projections move
    "first_rate": FloatDistribution(3e-4, 1e-2, log=True),
}
SPACES: dict[str, dict[str, BaseDistribution]] = {
    "baseline": {"rate": RATE, "warmup": WARMUP},
    "full": {
        **_COMMON,
        "image_rate": FloatDistribution(3e-6, 5e-4, log=True),
        "text_rate": FloatDistribution(3e-6, 5e-4, log=True),
        "layer_decay": CategoricalDistribution((1.0, 0.9, 0.8, 0.65)),
        "text_tower": CategoricalDistribution(("full", "frozen")),
    },
    "lora": {
        **_COMMON,
        "image_rate": FloatDistribution(5e-5, 5e-3, log=True),
        "text_rate": FloatDistribution(5e-5, 5e-3, log=True),
        "rank": CategoricalDistribution((4, 8, 16, 32, 64)),
        "dora": CategoricalDistribution((False, True)),
        "targets": CategoricalDistribution(tuple(TARGETS)),
        "dropout": CategoricalDistribution((0.0, 0.1)),
        "last_layers": CategoricalDistribution((0, 6, 3)),
        "layer_decay": CategoricalDistribution((1.0, 0.8)),
        "text_tower": CategoricalDistribution(("lora", "frozen")),
    },
}
GIVEN: Params = {"rate": 1e-5, "warmup": 0.3676}  # the original's recipe, as given
_PLAIN: Params = {
    "projection_rate": 1e-3, "scale_rate": 1e-3, "warmup": 0.1, "weight_decay": 0.05, "schedule": "cosine", "batch": 32,
    "positives": "groups", "label_smoothing": 0.0, "ema": 0.97, "patch_dropout": 0.0, "augment": "light",
    "fitted": True, "first": 0.0, "first_rate": 3e-3,
}  # fmt: skip
_FITTED: Params = {"text_rate": 1e-5, "text_tower": "frozen"}
_FULL: Params = {**_PLAIN, **_FITTED, "image_rate": 7e-5, "projection_rate": 2.8e-5, "layer_decay": 0.8}
_LORA: Params = {
    **_PLAIN, **_FITTED, "image_rate": 1.4e-3, "projection_rate": 1.4e-5, "text_rate": 1e-4, "rank": 16, "dora": False,
    "targets": "all", "dropout": 0.0, "last_layers": 0, "layer_decay": 1.0,
}  # fmt: skip
PRIORS: dict[str, list[Params]] = {  # tried first
    "baseline": [GIVEN, {"rate": 1e-4, "warmup": 0.1}, {"rate": 5e-5, "warmup": 0.2}, {"rate": 3e-4, "warmup": 0.05}],
    "full": [
        _FULL,
        {**_FULL, "image_rate": 1.4e-4},
        {**_FULL, "image_rate": 3.5e-5, "projection_rate": 1.4e-5},
        {**_FULL, "image_rate": 1.4e-4, "batch": 128},
    ],
    "lora": [_LORA, {**_LORA, "image_rate": 7e-4}, {**_LORA, "image_rate": 2e-3, "layer_decay": 0.8},
             {**_LORA, "batch": 128, "image_rate": 2.8e-3}],
}  # fmt: skip
# Each option as the original has it: what the best recipe loses without ours.
PLAIN: Params = {
    "augment": "none", "positives": "pairs", "fitted": False, "first": 0.0, "batch": 64, "schedule": "constant",
    "layer_decay": 1.0, "ema": 0.0, "label_smoothing": 0.0, "patch_dropout": 0.0, "weight_decay": 0.001,
    "warmup": 0.3676, "text_tower": "moving", "dora": False, "targets": "qkv", "last_layers": 0, "dropout": 0.0,
}  # fmt: skip


def without(params: Params, option: str) -> Params:
    """`params` with one option as in `PLAIN`, and what goes with it: random projections need their own rate."""
    more: Params = {"projection_rate": _PLAIN["projection_rate"]} if option == "fitted" else {}
    moving = "lora" if "rank" in params else "full"
    return {**params, **more, option: moving if option == "text_tower" else PLAIN[option]}


def runs(params: Params, budget: int, seed: int, pairs: int) -> list[dict[str, Any]]:
    """The sections `data`, `model` and `train` of the one or two runs that `params` stand for, of `budget` pairs.

    The second begins at the end of the first, in which only the projections moved. A closed form sees each of the
    `pairs` of the training split once, and they count.
    """
    if "rate" in params:
        steps = max(2, budget // 64)
        train = {"learning_rate": params["rate"], "weight_decay": 0.001, "schedule": "constant", "positives": "pairs"}
        return [{"data": {}, "model": {}, "train": {**train, **_length(steps, params["warmup"], 64, seed)}}]
    looked_at = pairs if params["fitted"] else 0
    steps = max(2, (budget - looked_at) // params["batch"])
    ahead = round(params["first"] * steps)
    found = [_first(params, ahead, seed)] if ahead else []
    text = params.get("text_tower", "lora")
    train = {
        "learning_rate": params["scale_rate"],
        "image_learning_rate": params["image_rate"],
        "projection_learning_rate": params["projection_rate"],
        "weight_decay": params["weight_decay"],
        "schedule": params["schedule"],
        "positives": params["positives"],
        "label_smoothing": params["label_smoothing"],
        "patch_dropout": params["patch_dropout"],
        **({"text_learning_rate": params["text_rate"]} if text != "frozen" else {}),
        **({"ema": params["ema"]} if params["ema"] else {}),
        **({"layer_decay": params["layer_decay"]} if "layer_decay" in params else {}),
        **_length(steps - ahead, params["warmup"], params["batch"], seed),
    }
    augment = AUGMENT[params["augment"]]
    model: dict[str, Any] = {"text_tower": text}
    if "rank" in params:
        last = {"last_layers": params["last_layers"]} if params["last_layers"] else {}
        lora = {"rank": params["rank"], "alpha": float(params["rank"]), "dora": params["dora"]}
        image, texts = TARGETS[params["targets"]]
        lora |= {"dropout": params["dropout"], "targets": image + texts if text == "lora" else image, **last}
        model |= {"image_tower": "lora", "lora": lora}
    found.append({"data": {"augment": augment} if augment else {}, "model": model, "train": train})
    found[0]["model"]["projections"] = "fitted" if params["fitted"] else "full"
    return found


def _first(params: Params, steps: int, seed: int) -> dict[str, Any]:
    train = {"learning_rate": params["first_rate"], "weight_decay": params["weight_decay"]}
    train |= {"positives": params["positives"], "label_smoothing": params["label_smoothing"]}
    towers = {"image_tower": "frozen", "text_tower": "frozen"}
    return {"data": {}, "model": towers, "train": {**train, **_length(steps, 0.1, params["batch"], seed)}}


def _length(steps: int, warmup: float, batch: int, seed: int) -> dict[str, Any]:
    return {"steps": steps, "warmup_steps": round(warmup * steps), "batch_size": batch, "seed": seed}
