"""hit@k of a model equals a brute-force twin on transformers' own features, and the files and numbers users read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cytoclip import batches, checkpoint, config, evaluation, training
from cytoclip.config import Config
from cytoclip.console import Console
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from cytoclip.evaluation import How, Question
from cytoclip.pairs import Pairs
from cytoclip.report import Scores
from tests import formats, tiny

QUIET = Console(quiet=True)
ALONE = World(torch.device("cpu"))
KS = [1, 3, 5, 10]


def features(folder: Path, split: Path) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, str]]]:
    """By transformers alone: its processor, its padding to 77, its projected features."""
    entries = json.loads((split / "img_text_pair.json").read_text())
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    pictures = [Image.open(split / "imgs" / entry["img"]).convert("RGB") for entry in entries]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")["pixel_values"]
    captions = [entry["caption"] for entry in entries]
    words = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = clip.get_text_features(**words).pooler_output
    return torch.nn.functional.normalize(image), torch.nn.functional.normalize(text), entries


def brute(queries: torch.Tensor, answers: torch.Tensor, right: list[set[int]], k: int) -> float:
    """The mean over queries of: is one of the k best answers right? No shortcut, no matrix."""
    hits = 0
    for i in range(len(queries)):
        ranked = sorted(range(len(answers)), key=lambda j: -float(queries[i] @ answers[j]))
        hits += bool(right[i] & set(ranked[:k]))
    return hits / len(queries)


def rank(model: Path, split: Path, ks: list[int], directions: tuple[str, ...] | None = None) -> Scores:
    pairs, opened = batches.open_split(split, QUIET), checkpoint.open_model(str(model))
    question = Question(ks, directions) if directions else Question(ks)
    return evaluation.rank(opened, pairs, evaluation.reading(opened, pairs, 7, 0), question, ALONE, QUIET)


@pytest.fixture(scope="module")
def distinct(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs of the fixture's training split, of which some share a group, and none a caption or a picture.

    (Ties are worth an expectation, which the twin of plain sorting cannot give; `test_retrieval.py` has those.)
    """
    folder = tmp_path_factory.mktemp("distinct") / "val"
    entries = json.loads((root / "train" / "img_text_pair.json").read_text())
    kept = list({entry["caption"]: entry for entry in entries}.values())[:20]
    shutil.copytree(root / "train" / "imgs", folder / "imgs")
    (folder / "img_text_pair.json").write_text(json.dumps(kept))
    return folder


def test_hit_rates_of_a_model_equal_the_twin(base: Path, distinct: Path) -> None:
    image, text, entries = features(base, distinct)
    own = [{i} for i in range(len(entries))]
    groups = [
        {j for j, other in enumerate(entries) if j == i or ("group" in one and one["group"] == other.get("group"))}
        for i, one in enumerate(entries)
    ]
    assert sum(len(some) > 1 for some in groups) >= 4
    found = rank(base, distinct, KS)
    assert found["pairs"] == len(entries) == 20
    compared = 0
    for direction, sides in {"image_to_text": (image, text), "text_to_image": (text, image)}.items():
        for key, right in (("hit@{}", own), ("hit@{}_groups", groups)):
            for k in KS:
                compared += 1
                assert found[direction][key.format(k)] == pytest.approx(brute(*sides, right, k)), (direction, key, k)
    assert compared == 16
    assert found["image_to_text"] != found["text_to_image"], "the twin could not see exchanged directions"
    assert found["image_to_text"]["hit@10_groups"] > found["image_to_text"]["hit@10"]


def test_one_direction_is_measured_alone(base: Path, distinct: Path) -> None:
    both, one = rank(base, distinct, KS), rank(base, distinct, KS, ("text_to_image",))
    assert one["text_to_image"] == both["text_to_image"]
    assert set(one) == {"pairs", "text_to_image", "chance"}


def test_chance_is_k_in_n(base: Path, distinct: Path) -> None:
    chance = rank(base, distinct, KS)["chance"]
    assert [chance[f"hit@{k}"] for k in KS] == [k / 20 for k in KS]
    assert all(chance[f"hit@{k}_groups"] > chance[f"hit@{k}"] for k in KS)


def test_a_random_model_scores_about_chance(root: Path, base: Path) -> None:
    """Of 20 pairs: within 2 standard errors of a binomial share at each k, in both directions."""
    found = rank(base, root / "val", [5, 10])
    for direction in ("image_to_text", "text_to_image"):
        for k in (5, 10):
            share = k / 20
            assert abs(found[direction][f"hit@{k}"] - share) < 2 * (share * (1 - share) / 20) ** 0.5


def test_ks_above_the_gallery_warn_and_are_1(base: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tiny.scores_of(base, root / "val", [1, 20, 21, 500], console=Console())
    for direction in ("image_to_text", "text_to_image", "chance"):
        assert [found[direction][f"hit@{k}"] for k in (20, 21, 500)] == [1, 1, 1]
        assert found[direction]["hit@1"] < 1
    said = capsys.readouterr()
    assert said.out == ""
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: k = ")]
    assert len(warnings) == 2
    assert "k = 21 is more than the 20" in warnings[0]
    assert "k = 500" in warnings[1]


def test_the_first_line_says_what_is_measured_and_how(
    base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.scores_of(base, root / "val", [1], console=Console())
    said = capsys.readouterr().err
    for part in (
        str(base),
        "20 pairs",
        str(root / "val"),
        f"on {'cuda' if torch.cuda.is_available() else 'cpu'}",
        "precision no (from the default of evaluation)",
        "1 process",
    ):
        assert part in said
    assert "1 processes" not in said


@pytest.mark.parametrize("has", [True, False])
def test_a_run_is_measured_in_its_precision_where_that_has_units(
    has: bool, done: tuple[Config, training.RunResult], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on a GPU, looked at on a laptop: in bf16 that would take a hundred times as long."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is taken here, which has units for it")
    run = Path(shutil.copytree(done[0].output, tmp_path / "run"))
    wanted = config.load(run / "config.yaml", ["train.precision=bf16"])
    (run / "config.yaml").write_text(config.dump(wanted))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    said: list[str] = []
    monkeypatch.setattr(Console, "say", lambda _, line: said.append(line))
    evaluation.evaluate([str(run)], root / "val", Question([1]), Console(), How())
    expected = "bf16 (from the run)" if has else "no (from the device, which has no units for the run's bf16)"
    assert [line.partition("precision ")[2].rpartition(", ")[0] for line in said if "precision" in line] == [expected]
    assert evaluation.precision_of([str(run), done[0].output]) == ("no", "runs of several precisions")


def test_long_captions_are_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val" / "imgs").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "imgs" / "a.png")
    entries = [{"img": "a.png", "caption": caption} for caption in ("cell " * 200, "short")]
    (tmp_path / "val" / "img_text_pair.json").write_text(json.dumps(entries))
    found = tiny.scores_of(base, tmp_path / "val", [1], console=Console())
    assert "1 caption above 77 tokens" in capsys.readouterr().err
    assert found["text_to_image"]["hit@1"] == 0.5, "one picture under two captions is a tie"
    assert found["text_to_image"]["hit@1_groups"] == 1.0


@pytest.mark.parametrize(
    "model",
    [{}, {"image_tower": "lora", "text_tower": "lora"}, {"image_tower": "lora"}],
    ids=["full", "adapter", "mixed"],
)
def test_a_run_folder_scores_what_its_results_say(
    model: dict[str, str], experiment: Callable[..., Config], root: Path
) -> None:
    """What is saved is what was measured; the run folder means its best, and `model/` its last."""
    wanted = experiment(model=model, train={"steps": 6, "learning_rate": 3e-3}, validate={"every": 2, "ks": [1, 5]})
    training.fit(wanted, QUIET)
    run = Path(wanted.output)
    written = json.loads((run / "results.json").read_text())
    for place, key in ((run, "best"), (run / "best", "best"), (run / "model", "last")):
        assert tiny.scores_of(place, root / "val", [1, 5]) == written[key], place
    assert written["best"] != written["before"]


SCORES: Scores = {
    "pairs": 2,
    "image_to_text": {"hit@1": 0.5, "hit@1_groups": 0.75},
    "text_to_image": {"hit@1": 0.25, "hit@1_groups": 0.5},
    "chance": {"hit@1": 0.1, "hit@1_groups": 0.2},
}


@pytest.mark.parametrize(("direction", "flat"), [("image_to_text", 0.5), ("text_to_image", 0.25), ("both", 0.5)])
def test_eval_result_has_the_originals_keys(direction: str, flat: float, tmp_path: Path) -> None:
    """Scripts that read the original project's file go on working."""
    saved = evaluation.save_as_original(SCORES, str(tmp_path), direction)
    assert saved == tmp_path / "eval_result.json"
    written: dict[str, Any] = json.loads(saved.read_text())
    assert written["hit@1"] == flat
    assert written["hit@1_groups"] == flat + 0.25
    assert (written["direction"], written["pairs"]) == (direction, 2)
    assert (written["chance_hit@1"], written["chance_hit@1_groups"]) == (0.1, 0.2)
    others = {"image_to_text", "text_to_image"} if direction == "both" else set()
    assert set(written) - others == {
        "hit@1", "hit@1_groups", "direction", "pairs", "chance_hit@1", "chance_hit@1_groups",
    }  # fmt: skip
    assert {key: written[key] for key in others} == {key: SCORES[key] for key in others}


def test_eval_result_of_a_hub_id_lands_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no folder of the model to write into. (A folder without permission is another such; root has all.)"""
    monkeypatch.chdir(tmp_path)
    saved = evaluation.save_as_original(SCORES, "openai/clip-vit-base-patch16", "both")
    assert saved.resolve() == (tmp_path / "eval_result.json").resolve()
    assert saved.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["eval_result.json"]


def test_a_missing_split_lists_those_there(root: Path, tmp_path: Path) -> None:
    assert evaluation.split_folder(root, "val") == root / "val"
    with pytest.raises(UserError, match="no split 'test'") as caught:
        evaluation.split_folder(root, "test")
    assert "train, val" in caught.value.hint
    assert caught.value.code is ExitCode.DATA
    with pytest.raises(UserError, match="no split 'val'") as caught:
        evaluation.split_folder(tmp_path, "val")
    assert "train/ and val/" in caught.value.hint
    with pytest.raises(UserError, match="no split 'val'") as caught:
        evaluation.split_folder(root / "train", "val")
    assert caught.value.hint == f"give {root}, which holds it"


@pytest.mark.parametrize("name", formats.WRITERS)
def test_a_place_of_pairs_is_its_own_val_split(tmp_path: Path, name: str) -> None:
    place = formats.WRITERS[name](tmp_path / "from", formats.drawn())
    assert evaluation.split_folder(place, "val") == evaluation.split_folder(place, "valid") == place
    with pytest.raises(UserError, match="holds pairs and no split 'test'") as caught:
        evaluation.split_folder(place, "test")
    assert caught.value.hint == "leave --split out"


def test_other_ways_to_name_a_split(root: Path, tmp_path: Path) -> None:
    assert evaluation.split_folder(root / "val", "val") == root / "val"
    assert evaluation.split_folder(root, "valid") == evaluation.split_folder(root, "validation") == root / "val"
    assert evaluation.split_folder(Path("hub:owner/name/test"), "val") == Path("hub:owner/name/test")
    assert evaluation.split_folder(Path("hub:owner/name"), "val") == Path("hub:owner/name/val")
    (tmp_path / "pairs.csv").touch()
    with pytest.raises(UserError, match=r"pair\.csv cannot be read: No such file") as caught:
        batches.open_split(evaluation.split_folder(tmp_path / "pair.csv", "val"), QUIET)
    assert caught.value.hint == f"did you mean {tmp_path / 'pairs.csv'}?"


def test_a_missing_data_root_and_a_missing_model_are_named(base: Path, tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match="no such folder") as caught:
        tiny.scores_of(base, evaluation.split_folder(tmp_path / "nowhere", "val"), [1])
    assert caught.value.code is ExitCode.DATA
    assert f"on the way to {tmp_path / 'nowhere' / 'val'}" in caught.value.message
    with pytest.raises(UserError, match="holds no model") as caught:
        tiny.scores_of(tmp_path, root / "val", [1])
    assert caught.value.code is ExitCode.MODEL


def test_order_of_the_split_changes_no_number(base: Path, distinct: Path) -> None:
    """A list sorted another way is the same split."""
    pairs, opened = batches.open_split(distinct, QUIET), checkpoint.open_model(str(base))
    turned = Pairs(**{name: column[::-1] for name, column in vars(pairs).items()})
    one, two = (
        evaluation.rank(opened, some, evaluation.reading(opened, some, 7, 0), Question(KS), ALONE, QUIET)
        for some in (pairs, turned)
    )
    assert one == two


def trained(experiment: Callable[..., Config], **more: Any) -> Path:
    wanted = experiment(train={"steps": 4, "learning_rate": 3e-3}, validate={"every": 2, "ks": [1, 5]}, **more)
    training.fit(wanted, QUIET)
    return Path(wanted.output)


def test_a_run_stands_beside_its_own_starting_point(
    experiment: Callable[..., Config], base: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(experiment)
    found = evaluation.evaluate([str(run)], root / "val", Question([1, 5]), QUIET, How(base=None, workers=0))
    written = json.loads((run / "results.json").read_text())
    assert found.names == {"base": str(base), str(run): str(run)}
    columns = found.columns()
    assert columns == {"base": written["val"]["before"], str(run): written["val"]["best"]}
    assert found.differences == {str(run): written["val"]["difference"]}
    document = json.loads(json.dumps(found.document("val")))
    assert document["base"] == str(base)
    assert [one["model"] for one in document["models"]] == [str(base), str(run)]
    assert "difference" not in document["models"][0]
    one = document["models"][1]["difference"]["text_to_image"]["hit@5"]
    assert one["by"] == pytest.approx(
        columns[str(run)]["text_to_image"]["hit@5"] - columns["base"]["text_to_image"]["hit@5"]
    )
    text = found.text([1, 5])
    assert f"{run} against base ({base})" in text
    assert "noise" in text


def test_several_models_and_a_named_base(
    experiment: Callable[..., Config], base: Path, root: Path, tmp_path: Path
) -> None:
    run = trained(experiment)
    asked = [str(run), str(run / "model"), str(run)]  # named twice is one column
    found = evaluation.evaluate(asked, root / "val", Question([1]), QUIET, How(base=str(run / "best"), workers=0))
    assert list(found.names) == ["base", str(run), str(run / "model")]
    assert all(one["by"] == 0 for part in found.differences[str(run)].values() for one in part.values())
    alone = evaluation.evaluate([str(base)], root / "val", Question([1]), QUIET, How(base=None, workers=0))
    assert list(alone.names) == [str(base)], "a plain model has no starting point"
    with pytest.raises(UserError, match="holds no model"):
        evaluation.evaluate([str(run)], root / "val", Question([1]), QUIET, How(base=str(tmp_path), workers=0))


def test_the_base_named_among_the_models_is_the_base_alone(
    experiment: Callable[..., Config], base: Path, root: Path
) -> None:
    """But for a run that reads its starting point another way, and where there would be nothing else."""
    run = trained(experiment)

    def names(models: list[str], wanted: str | None) -> dict[str, str]:
        found = evaluation.evaluate(models, root / "val", Question([1]), QUIET, How(base=wanted, workers=0))
        assert set(found.differences) == set(found.names) - {"base"}
        return found.names

    assert names([str(run), f"{base}/"], None) == {"base": str(base), str(run): str(run)}
    assert list(names([str(base), str(run)], str(base))) == ["base", str(run)]
    assert list(names([str(base)], str(base))) == ["base", str(base)]
    padded = trained(experiment, data={"crop": "pad"}, output=f"{run}-padded")
    assert list(names([str(padded), str(base)], None)) == ["base", str(padded), str(base)]


def test_a_model_called_base_is_not_the_base(
    base: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = evaluation.evaluate(["base"], root / "val", Question([1]), QUIET, How(base=None, workers=0))
    assert (found.names, found.document("val")["base"]) == ({"./base": "base"}, None)
    found = evaluation.evaluate(["base"], root / "val", Question([1]), QUIET, How(base=str(base), workers=0))
    assert found.names == {"base": str(base), "./base": "base"}
    assert list(found.differences) == ["./base"]


def test_without_its_starting_point_a_run_stands_alone(
    experiment: Callable[..., Config], base: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "start"
    shutil.copytree(base, moved)
    run = trained(experiment, model={"name": str(moved)})
    shutil.rmtree(moved)
    found = evaluation.evaluate([str(run)], root / "val", Question([1]), Console(), How(base=None, workers=0))
    assert list(found.names) == [str(run)]
    assert "without the run's starting point" in capsys.readouterr().err
    both = [str(run), str(moved)]
    with pytest.raises(UserError, match=r"no such folder: .*start"):
        evaluation.evaluate(both, root / "val", Question([1]), QUIET, How(base=None, workers=0))


def test_embeddings_are_kept_and_used_again(
    experiment: Callable[..., Config], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = trained(experiment), tmp_path / "kept.safetensors"
    how = How(base=None, embeddings=kept, workers=0)
    asked = [str(run), str(run / "model")]
    first = evaluation.evaluate(asked, root / "val", Question([1, 5]), QUIET, how)
    names = {path.name for path in tmp_path.glob("kept*")}
    assert names == {"kept.safetensors", "kept-base.safetensors", "kept-2.safetensors"}
    with safe_open(kept, "pt") as file:
        assert file.get_tensor("image").shape == file.get_tensor("text").shape == (20, 16)
        assert (file.get_tensor("image").norm(dim=1) - 1).abs().max() < 1e-5
    encode, made = evaluation.encode.encode, []
    monkeypatch.setattr(evaluation.encode, "encode", lambda *given: made.append(1) or encode(*given))
    again = evaluation.evaluate(asked, root / "val", Question([1, 5]), QUIET, how)
    assert made == []
    assert again.columns() == first.columns()
    evaluation.evaluate([first.names["base"]], root / "val", Question([1]), QUIET, how)  # of another model: made anew
    assert len(made) == 1
    evaluation.evaluate(asked[:1], root / "train", Question([1]), QUIET, how)  # of other pairs, the base too
    assert len(made) == 3


def test_a_file_that_holds_something_else_is_never_replaced(base: Path, root: Path, tmp_path: Path) -> None:
    weights, folder = tmp_path / "weights.safetensors", tmp_path / "folder.safetensors"
    shutil.copy(base / "model.safetensors", weights)
    folder.mkdir()
    for place in (weights, folder):
        with pytest.raises(UserError, match="holds no embeddings of ours"):
            evaluation.evaluate([str(base)], root / "val", Question([1]), QUIET, How(embeddings=place, workers=0))
    assert weights.read_bytes() == (base / "model.safetensors").read_bytes()


def test_few_clusters_are_said(base: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "val", tmp_path / "val")
    place = tmp_path / "val" / "img_text_pair.json"
    entries = [{**entry, "source": f"slide {i % 3}"} for i, entry in enumerate(json.loads(place.read_text()))]
    place.write_text(json.dumps(entries))
    tiny.scores_of(base, tmp_path / "val", [1], console=Console())
    assert "intervals are drawn from 3 sources: with so few they are too narrow" in capsys.readouterr().err
    place.write_text(json.dumps([{**entry, "source": "one"} for entry in entries]))
    tiny.scores_of(base, tmp_path / "val", [1], console=Console())
    assert "1 source: one says nothing of others" in capsys.readouterr().err


def test_embeddings_go_into_safetensors(base: Path, root: Path, tmp_path: Path) -> None:
    nowhere = How(embeddings=tmp_path / "gone" / "kept.safetensors", workers=0)
    with pytest.raises(UserError, match=r"nothing can be written into .*gone"):
        evaluation.evaluate([str(base)], root / "val", Question([1]), QUIET, nowhere)
    with pytest.raises(UserError, match=r"notes.txt does not end in .safetensors"):
        evaluation.evaluate(
            [str(base)], root / "val", Question([1]), QUIET, How(embeddings=tmp_path / "notes.txt", workers=0)
        )


def test_a_model_in_a_folder_called_base_is_no_base(
    base: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    found = evaluation.evaluate(["base"], root / "val", Question([1]), QUIET, How(base=None, workers=0))
    assert (found.names, found.differences) == ({"./base": "base"}, {})
    assert found.document("val")["base"] is None
