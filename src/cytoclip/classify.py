"""Tell the pictures of a split apart by class: by prompts alone, and by classifiers on the image features."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cytoclip import (
    batches,
    captions,
    checkpoint,
    classification,
    device,
    encode,
    evaluation,
    files,
    intervals,
    labels,
    leaks,
    liveness,
    places,
    probe,
    prompts,
)
from cytoclip.checkpoint import Opened
from cytoclip.classification import METRICS, Measured, Truth
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.encode import Reading
from cytoclip.errors import ExitCode, UserError, counted, first_few
from cytoclip.pairs import Pairs
from cytoclip.probe import Known
from cytoclip.prompts import Templates
from cytoclip.rows import LABELS

SCHEMA = 1
MOST_CLASSES = 2000  # scores, ranks and confusions grow with them, and a label that each picture has alone is no class
LEARNED_FROM = "train"

Result = dict[str, Any]
Floats = NDArray[np.float32]
Shares = dict[str, NDArray[np.float64]]  # of the classes, (N, C), by the way that they came about


@dataclass(frozen=True)
class Asked:
    """What to classify, and how.

    Parameters
    ----------
    label_files, templates
        A table of labels instead of the pairs' own; a YAML instead of the package's.
    probe
        Train classifiers on the features of train, too.
    shots, seeds
        Pictures of each class to learn from, each drawn `seeds` times.
    predictions
        A CSV to write: of each picture its label, and by each way the class that it takes and the shares of all.
    """

    split: str = "val"
    label_files: Sequence[Path] = ()
    templates: Path | None = None
    probe: bool = True
    shots: Sequence[int] = (1, 2, 4, 8, 16)
    seeds: int = 5
    predictions: Path | None = None


def classify(
    name: str, data_root: Path, asked: Asked, console: Console, batch_size: int = 64, workers: int | None = None
) -> Result:
    """Open a model and classify one split with it.

    Raises
    ------
    UserError
        For a model, split, table or YAML that cannot be used, or pictures without at least two classes.
    """
    templates, table = prompts.read(asked.templates), labels.read(asked.label_files, console)
    precision, said_by = evaluation.precision_of([name])
    world = device.start(precision=precision, said_by=said_by, warn=console.warn)
    with liveness.watched(world):
        splits = world.once(lambda: _labelled(data_root, asked, table, console))
        opened = checkpoint.open_model(name)
        opened.encoder.to(world.device)
        tried = splits[asked.split]
        what = f"{counted(len(tried), 'picture')} of {asked.split}"
        console.say(f"{opened.name}: {what} on {world.device.type}, {world.arithmetic}")
        how = evaluation.reading(opened, tried, batch_size, world.loaders(workers))
        embedded = {
            split: encode.encode_pictures(opened.encoder, pairs, how, world, console) for split, pairs in splits.items()
        }
        result: Result = {"schema": SCHEMA, "model": name, "split": asked.split}
        shares: Shares = {}
        result |= zero_shot(opened, tried, embedded[asked.split], templates, how, world, console, shares)
        if len(splits) > 1:
            plain = {split: image_ND.cpu().numpy() for split, image_ND in embedded.items()}
            result |= world.once(lambda: _learned(splits, plain, asked, result["classes"], console, shares))
        if asked.predictions is not None:
            path = asked.predictions
            world.once(lambda: files.write_text(path, _table(tried, result["classes"], shares)))
            console.say(f"predictions: {path}")
        return result


def zero_shot(
    opened: Opened,
    pairs: Pairs,
    image_ND: torch.Tensor,
    templates: Templates,
    reading: Reading,
    world: World,
    console: Console,
    shares: Shares | None = None,
) -> Result:
    """Each picture takes the class whose prompts it is nearest to; the same result in every process.

    A class is embedded as CLIP does (arXiv 2103.00020, 3.1.4): the mean of its prompts' unit embeddings, at length 1.

    Parameters
    ----------
    pairs, image_ND
        Different pictures, each with a label, and their unit embeddings.
    reading
        How the model reads: its tokens are not asked.
    shares
        Filled, in the first process, with those of the classes, (N, C).
    """
    classes = prompts.classes(templates, [str(label) for label in pairs.labels])
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise UserError(f"{counted(len(classes), 'class', 'classes')} to choose from",
                        f"labels of 2 to {MOST_CLASSES} classes; more of them can be named in --templates",
                        ExitCode.DATA)  # fmt: skip
    sentences = prompts.prompts(templates, classes)
    class_CD = embed_classes(opened, sentences, reading, world, console)
    truth, by = truth_of(pairs, classes)

    def measured() -> Result:
        scores_NC = classification.class_scores(image_ND.cpu().numpy(), class_CD.numpy())
        scale = float(opened.encoder.logit_scale.detach().exp())
        if shares is not None:
            shares["zero_shot"] = _softmax(scores_NC * scale)
        found = classification.measure(scores_NC, classification.margins(scores_NC * scale), truth)
        written = classification.document(found, classification.knowing_nothing(truth), truth)
        counts_C = np.bincount(truth.label_N, minlength=len(classes))
        return {
            "pictures": len(pairs),
            "classes": classes,
            "without_pictures": [name for name, count in zip(classes, counts_C, strict=True) if not count],
            "clusters": {"by": by, "count": int(truth.cluster_N.max()) + 1},
            "majority": {"class": classes[counts_C.argmax()], "accuracy": float(counts_C.max() / len(pairs))},
            "templates": list(templates.templates),
            "names": {label: list(templates.classes[label]) for label in classes if label in templates.classes},
            "zero_shot": {name: written[name] for name in METRICS},
            **{key: written[key] for key in ("confusion", "confusion_interval", "by_class")},
        }

    return world.once(measured)


def embed_classes(
    opened: Opened, sentences: Sequence[Sequence[str]], reading: Reading, world: World, console: Console
) -> torch.Tensor:
    """Unit embedding of each class (C, D), on the CPU, from the sentences that name it; zeros where they cancel."""
    flat = [sentence for some in sentences for sentence in some]
    tokens = captions.tokenise(opened.tokenizer, flat, opened.context, opened.encoder.family)
    if tokens.truncated:
        console.warn(f"{counted(tokens.truncated, 'prompt')} above {opened.context} tokens: cut there")
    how = Reading(tokens, opened.pixels, reading.batch_size, reading.workers)
    sentence_PD = encode.encode_captions(opened.encoder, flat, how, world, console).cpu().double()  # MPS has none
    parts = torch.split(sentence_PD, [len(some) for some in sentences])
    return torch.nn.functional.normalize(torch.stack([part.mean(dim=0) for part in parts])).float()


def truth_of(pairs: Pairs, classes: Sequence[str]) -> tuple[Truth, str]:
    """The pictures' classes, and the clusters that intervals draw, with what they go by."""
    number = {name: i for i, name in enumerate(classes)}
    label_N = np.array([number[str(label)] for label in pairs.labels], np.int64)
    drawn = intervals.clusters(pairs)
    return Truth(label_N, drawn.of, classes), drawn.by


def _labelled(data_root: Path, asked: Asked, table: Mapping[str, str], console: Console) -> dict[str, Pairs]:
    """The different pictures with a label of the split, and of train where there is one to learn from."""
    names = [asked.split]
    if asked.probe and asked.split == LEARNED_FROM:
        console.say("no probe, neighbours or few labels: they would be tried on what they learned from")
    elif asked.probe and places.split(data_root, LEARNED_FROM) is None:
        console.say(f"no probe, neighbours or few labels: {data_root} has no {LEARNED_FROM} to learn from")
    elif asked.probe:
        names.append(LEARNED_FROM)
    splits = {name: batches.open_split(evaluation.split_folder(data_root, name), console) for name in names}
    keys = sorted({key for of in splits[asked.split].extra for key, _ in of})
    if table:
        splits = labels.given(splits, table, console)
    splits = {name: labels.pictures(name, pairs, console) for name, pairs in splits.items()}
    if not len(splits[asked.split]):
        akin = next((key for key in keys if key.lower() in LABELS), None)
        hint = f"call their key {akin!r} label" if akin else "give entries the key label"
        raise UserError(f"no picture of {asked.split} in {data_root} has a label",
                        f"{hint}, or a table: --labels labels.csv", ExitCode.DATA)  # fmt: skip
    if len(splits) > 1:
        for line in leaks.warnings({name: splits[name] for name in reversed(names)}):
            console.warn(line)
    return splits


def _learned(
    splits: Mapping[str, Pairs],
    embedded: Mapping[str, Floats],
    asked: Asked,
    classes: Sequence[str],
    console: Console,
    shares: Shares,
) -> Result:
    """The parts of the result that learn from train, and the shares that they give the classes."""
    truth, _ = truth_of(splits[asked.split], classes)
    known = _known(splits[LEARNED_FROM], embedded[LEARNED_FROM], classes, console)
    if known is None:
        return {}
    image_ND = embedded[asked.split]
    chance = classification.knowing_nothing(truth)
    with console.progress("classifiers", 2 + len(asked.shots) * asked.seeds) as bar:
        probed = probe.linear(known, image_ND, seed=0)
        bar.advance(note="linear probe")
        if not probed.converged:
            console.warn("the linear probe had not converged after 1000 steps: its numbers may be a little low")
        votes_NC = probe.neighbours(known, image_ND)
        bar.advance(note="neighbours")
        few_shot = {
            str(shots): _few_shot(known, image_ND, truth, chance, shots, asked.seeds, bar) for shots in asked.shots
        }
    logits = probed.logits_NC
    shares |= {"probe": _softmax(logits), "knn": votes_NC}
    return {
        "probe": {
            **classification.document(
                classification.measure(logits, classification.margins(logits), truth), chance, truth
            ),
            "pictures": len(known.label_M),
            "strength": probed.strength,
            "chosen_by": probed.chosen_by,
            "converged": probed.converged,
        },
        "knn": {
            **classification.document(classification.measure(votes_NC, votes_NC, truth), chance, truth),
            "pictures": len(known.label_M),
            "neighbours": min(probe.NEIGHBOURS, len(known.label_M)),
            "temperature": probe.TEMPERATURE,
        },
        "few_shot": few_shot,
    }


def _softmax(logits_NC: NDArray[Any]) -> NDArray[np.float64]:
    shares_NC: NDArray[np.float64] = torch.from_numpy(logits_NC).double().softmax(dim=1).numpy()
    return shares_NC


def _table(pairs: Pairs, classes: Sequence[str], shares: Shares) -> str:
    """CSV: a line a picture, with the best class of each way and its share, then the share of every class."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    best = [name for way in shares for name in (way, f"{way} share")]
    rows.writerow(["image", "label", *best, *(f"{way}: {name}" for way in shares for name in classes)])
    for row, (name, label) in enumerate(zip(pairs.names, pairs.labels, strict=True)):
        of_ways = [shares_NC[row] for shares_NC in shares.values()]
        first = [text for of in of_ways for text in (classes[of.argmax()], f"{of.max():.6f}")]
        rows.writerow([name, label, *first, *(f"{share:.6f}" for of in of_ways for share in of)])
    return written.getvalue()


def _known(pairs: Pairs, image_MD: Floats, classes: Sequence[str], console: Console) -> Known | None:
    """What there is to learn from, or None where that is less than two classes."""
    chosen = set(classes)
    other = sorted({str(label) for label in pairs.labels} - chosen)
    if other:
        console.say(f"pictures of {LEARNED_FROM} are left out whose label is none of the classes: {first_few(other)}")
    rows = [row for row, label in enumerate(pairs.labels) if label in chosen]
    columns = {name: tuple(column[row] for row in rows) for name, column in vars(pairs).items()}
    kept = Pairs(**columns)
    there = set(kept.labels)
    missing = [name for name in classes if name not in there]
    if len(classes) - len(missing) < 2:
        console.warn(
            f"no probe, neighbours or few labels: {LEARNED_FROM} has pictures of fewer than two of the classes"
        )
        return None
    if missing:
        console.warn(
            f"classes without a picture in {LEARNED_FROM}, which no classifier can learn: {first_few(missing)}"
        )
    truth, _ = truth_of(kept, classes)
    return Known(image_MD[rows], truth.label_N, truth.cluster_N, len(classes))


def _few_shot(
    known: Known, image_ND: Floats, truth: Truth, chance: Measured, shots: int, seeds: int, bar: Any
) -> Result:
    """Linear probes of a few labels: mean and standard deviation over the seeds, and the mean's interval."""
    scaling = probe.Scaling.of(known.image_MD)  # which needs no labels
    drawn = []
    for seed in range(seeds):
        some = known.take(probe.few(known.label_M, shots, seed))
        logits = probe.fitted(some, scaling, image_ND, probe.PLAIN, "given").logits_NC
        drawn.append(classification.measure(logits, classification.margins(logits), truth))
        bar.advance(note=f"{counted(shots, 'picture')} a class")
    counts_C = np.bincount(known.label_M, minlength=known.classes)
    found: Result = {"fewer": [name for name, count in zip(truth.classes, counts_C, strict=True) if count < shots]}
    for name in METRICS:
        mean, spread = probe.mean_and_spread([one.values[name] for one in drawn])
        resampled = np.mean([one.resampled[name] for one in drawn], axis=0)  # the same resamples for each seed
        found[name] = {
            "mean": None if np.isnan(mean) else mean,
            "sd": None if spread is None or np.isnan(spread) else spread,
            "interval": classification.interval(resampled),
            "chance": None if np.isnan(chance.values[name]) else chance.values[name],
        }
    return found
