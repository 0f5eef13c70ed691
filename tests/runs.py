"""Run folders made by hand: the files of a finished run, from embeddings that are given, without any training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from cytoclip import batches, classification, config, measure
from cytoclip.classification import Truth
from cytoclip.console import Console
from cytoclip.evaluation import Compared
from cytoclip.pairs import Pairs, fingerprint, identities, right_answers, spread

KS = (1, 10)
Embeddings = tuple[torch.Tensor, torch.Tensor]


def random_embeddings(pairs: int, together: float, seed: int = 0, width: int = 16) -> Embeddings:
    """Unit rows, those of a pair the nearer the larger `together` is; pictures and captions lie apart."""
    drawn = torch.Generator().manual_seed(seed)
    shared, image, text = (torch.randn(pairs, width, generator=drawn) for _ in range(3))
    image, text = shared * together + image, shared * together + text
    image[:, 0] += 2
    return torch.nn.functional.normalize(image, dim=1), torch.nn.functional.normalize(text, dim=1)


def write(
    folder: Path, root: Path, splits: dict[str, tuple[Embeddings, Embeddings]], steps: int = 40, **report: Any
) -> Pairs:
    """A run of `root` that ended with these embeddings (before, best) of each split; the pairs of val."""
    folder.mkdir(parents=True)
    given = {"data": {"root": str(root)}, "train": {"steps": steps, "batch_size": 16}, "output": str(folder)}
    wanted = config.parse({**given, **({"report": report} if report else {})}, "the test")
    (folder / "config.yaml").write_text("# cytoclip 0.1, torch 2\n" + config.dump(wanted))
    results: dict[str, Any] = {}
    for split, (before, best) in splits.items():
        pairs = spread(batches.open_split(root / split, Console(quiet=True)))
        for name, (image, text) in (("before", before), ("best", best)):
            place = folder / "embeddings" / f"{'' if split == 'val' else split + '-'}{name}.safetensors"
            place.parent.mkdir(exist_ok=True)
            save_file({"image": image, "text": text}, place, {"pairs": fingerprint(pairs), "model": "m"})
        results[split] = compared(pairs, before, best)
    write_logs(folder, results["val"], steps)
    (folder / "results.json").write_text(json.dumps(finished(results, steps)))
    return spread(batches.open_split(root / "val", Console(quiet=True)))


def finished(compared: dict[str, Any], steps: int) -> dict[str, Any]:
    """The whole of results.json."""
    flat = {name: _flat(compared["val"][name]) for name in ("before", "best")}
    return {
        "schema": 1, "steps": steps, "best_step": steps, "ks": list(KS), "select_by": "hits", "stopped_early": False,
        "seconds": 754.2, "pairs_seen": steps * 16, "processes": 1, "device": "cpu", "from_hub": True,
        "hardware": {"cpu": "a processor", "cores": 2, "memory_gb": 8.0},
        "versions": {"cytoclip": "0.1", "torch": "2"}, "skipped": {}, **flat, "last": flat["best"], **compared,
        "keep": {"root": "general", **flat},
    }  # fmt: skip


def compared(pairs: Pairs, before: Embeddings, best: Embeddings, resamples: int = 100) -> dict[str, Any]:
    """Two models on the same pairs: scores with intervals and slices, and the paired difference."""
    each = {"before": _per_query(pairs, before), "best": _per_query(pairs, best)}
    found: dict[str, Any] = {name: _scores(pairs, values, resamples) for name, values in each.items()}
    found["difference"] = {}
    for direction in each["best"]:
        changes = {}
        for key, after in each["best"][direction].items():
            change = after - each["before"][direction][key]
            low, high = _interval(key, change, resamples)
            by = found["best"][direction][key] - found["before"][direction][key]
            changes[key] = {"by": by, "interval": [low, high], "beyond_noise": not low <= 0 <= high}
        found["difference"][direction] = changes
    return found


def told_apart(classes: Sequence[str], pictures: int, seed: int, sure: float = 1.0) -> dict[str, Any]:
    """What `classify.zero_shot` gives, of drawn scores that are the better the larger `sure` is."""
    drawn = np.random.default_rng(seed)
    truth = Truth(np.arange(pictures) % len(classes), np.arange(pictures) % 25, classes, resamples=50)
    scores = drawn.normal(size=(pictures, len(classes)))
    scores[np.arange(pictures), truth.label_N] += sure
    measured = classification.measure(scores, scores, truth)
    written = classification.document(measured, classification.knowing_nothing(truth), truth)
    return {
        "pictures": pictures, "classes": list(classes), "without_pictures": [],
        "clusters": {"by": "source", "count": 25},
        "majority": {"class": classes[0], "accuracy": 1 / len(classes)}, "templates": ["a photo of {}."], "names": {},
        "zero_shot": {name: written[name] for name in classification.METRICS},
        **{key: written[key] for key in ("confusion", "confusion_interval", "by_class")},
    }  # fmt: skip


def both_told_apart(classes: Sequence[str], pictures: int = 60) -> dict[str, Any]:
    """The classification of a run, before and best."""
    return {"split": "val", "before": told_apart(classes, pictures, 0, 0.0), "best": told_apart(classes, pictures, 1)}


def evaluated(root: Path, titles: Sequence[str], names: Sequence[str] = ()) -> Compared:
    """What `evaluate.evaluate` gives of models on val, each better than the one before it; `base` is the base."""
    pairs = spread(batches.open_split(root / "val", Console(quiet=True)))
    embedded = {title: random_embeddings(len(pairs), 0.1 + 0.4 * i, seed=i) for i, title in enumerate(titles)}
    measured = {title: measure.full(*both, pairs, KS) for title, both in embedded.items()}
    differences = {
        title: measure.difference(one, measured["base"])
        for title, one in measured.items()
        if "base" in measured and title != "base"
    }
    named = dict(zip(titles, names or titles, strict=True))
    return Compared(pairs, named, measured, embedded, differences)


def write_logs(folder: Path, val: dict[str, Any], steps: int) -> None:
    """losses.jsonl, curves.jsonl, validations.jsonl as training leaves them."""
    drawn = np.random.default_rng(0)
    with (folder / "losses.jsonl").open("w") as losses, (folder / "curves.jsonl").open("w") as curves:
        for step in range(1, steps + 1):
            loss = 0.6 + 2.2 * math.exp(-3 * step / steps) + float(drawn.normal()) * 0.1
            row = {"step": step, "loss": loss, "lr": 1e-3 * (1 - step / (steps + 1)),
                   "logit_scale": 2.66 + step / steps, "gradient_norm": 1.0}  # fmt: skip
            losses.write(json.dumps(row) + "\n")
            speed = {"step": step, "hit_at_1": step / steps, "pairs_per_second": 200 + float(drawn.normal()) * 9,
                     "waiting_for_data": 0.01, "chance_loss": math.log(16)}  # fmt: skip
            curves.write(json.dumps(speed) + "\n")
    rows = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        scores = _between(_flat(val["before"]), _flat(val["best"]), 1 - (1 - share) ** 2)
        keep = _between(_flat(val["best"]), _flat(val["before"]), share**2 / 2)
        rows.append({"step": round(share * steps), "val": scores, "keep": keep})
    (folder / "validations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _scores(pairs: Pairs, values: dict[str, dict[str, NDArray[np.float64]]], resamples: int) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": len(pairs)}
    found |= {side: {key: _mean(key, one) for key, one in keys.items()} for side, keys in values.items()}
    nothing = torch.ones(len(pairs), 2)
    chance = _per_query(pairs, (nothing, nothing))["image_to_text"]
    found["chance"] = {key: _mean(key, one) for key, one in chance.items()}
    found["clusters"] = {"by": "source", "count": 4}
    found["intervals"] = {
        side: {key: _interval(key, one, resamples) for key, one in keys.items()} for side, keys in values.items()
    }
    slices: dict[str, Any] = {}
    lengths = ["long" if len(caption) > 60 else "short" for caption in pairs.captions]
    for name, column in (("label", pairs.labels), ("caption length", lengths), ("source", pairs.sources)):
        for value in dict.fromkeys(column):
            rows = np.flatnonzero([one == value for one in column])
            part = {side: {key: _mean(key, one[rows]) for key, one in keys.items()} for side, keys in values.items()}
            slices.setdefault(name, {})[str(value)] = {"pairs": len(rows), **part}
    return {**found, "slices": slices}


def _per_query(pairs: Pairs, embeddings: Embeddings) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Of each query and metric its number, ties in expectation; the slow and obvious way."""
    identity = identities(pairs)
    groups = right_answers(identity, identity)
    sides = {"image_to_text": embeddings, "text_to_image": embeddings[::-1]}
    found = {}
    for direction, (query, gallery) in sides.items():
        scores = (query.double() @ gallery.double().T).numpy().round(9)
        keys: dict[str, NDArray[np.float64]] = {}
        for ending, right in (("", np.eye(len(pairs), dtype=bool)), ("_groups", groups)):
            first, chances = zip(*(_first(scores[i], right[i]) for i in range(len(pairs))), strict=True)
            keys |= {f"hit@{k}{ending}": np.array([one[k] for one in chances]) for k in KS}
            keys[f"mrr{ending}"] = 1 / np.array(first)
            keys[f"median_rank{ending}"] = keys[f"mean_rank{ending}"] = np.array(first)
        keys |= {f"recall@{k}_groups": keys[f"hit@{k}_groups"] * 0.9 for k in KS}
        keys["map_groups"] = keys["mrr_groups"] * 0.9
        found[direction] = keys
    return found


def _first(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, dict[int, float]]:
    """The expected rank of the first right answer, and the chance that it is among the first k."""
    best = scores[right].max()
    above, tied = int((scores > best).sum()), int((scores == best).sum())
    good = int(((scores == best) & right).sum())
    hits = {}
    for k in KS:
        drawn = min(max(k - above, 0), tied)
        hits[k] = 1 - math.comb(tied - good, drawn) / math.comb(tied, drawn)
    return above + (tied + 1) / (good + 1), hits


def _mean(key: str, values: NDArray[np.float64]) -> float:
    return float(np.median(values) if key.startswith("median") else values.mean())


def _interval(key: str, values: NDArray[np.float64], resamples: int) -> list[float]:
    drawn = values[np.random.default_rng(1).integers(0, len(values), (resamples, len(values)))]
    middles = np.median(drawn, axis=1) if key.startswith("median") else drawn.mean(axis=1)
    low, high = np.quantile(middles, (0.025, 0.975))
    return [float(low), float(high)]


def _flat(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in ("pairs", "image_to_text", "text_to_image", "chance")}


def _between(one: dict[str, Any], other: dict[str, Any], share: float) -> dict[str, Any]:
    found: dict[str, Any] = dict(one)
    for side in ("image_to_text", "text_to_image"):
        found[side] = {key: (1 - share) * value + share * other[side][key] for key, value in one[side].items()}
    return found
