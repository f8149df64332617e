"""Predictions of a network with a class head: every image once, votes over masks, the confusion; and whose images are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from igpt_ds.config import ModelConfig
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.classification import check_classes, over_subsets, predict, result, score_predictions
from igpt_ds.evaluate.report.results import add_results, read_results
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.objectives import draw_masks
from igpt_ds.model.store import ClassHead, ModelInfo


@pytest.fixture
def shards(tiny_dataset: Path) -> ShardSet:
    return ShardSet(tiny_dataset, "val")


def classifier(config: ModelConfig, objective: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(config, 3, 2, objective=objective).eval()
    with torch.no_grad():
        model.class_head.weight.normal_()
    return model


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_every_image_has_its_own_prediction(tiny_config: ModelConfig, shards: ShardSet, batch: int) -> None:
    model = classifier(tiny_config, "ar")
    tokens = torch.from_numpy(shards.tokens(np.arange(shards.n_images)).reshape(shards.n_images, -1)).long()
    with torch.no_grad():
        expected = model(tokens)[1].argmax(1).numpy()
    found = predict(model, shards, batch, "cpu", None, 5)
    assert found.shape == (1, shards.n_images)
    assert (found[0] == expected).all()


def test_masks_are_those_of_extraction(tiny_config: ModelConfig, shards: ShardSet) -> None:
    """Draw 0 is the validation's; another draw hides other pixels."""
    model, n = classifier(tiny_config, "bert"), shards.n_images
    tokens = torch.from_numpy(shards.tokens(np.arange(n)).reshape(n, -1)).long()
    found = predict(model, shards, 4, "cpu", 0.5, 3)
    for draw in range(3):
        with torch.no_grad():
            expected = model(tokens, draw_masks(0, np.arange(n) + (draw << 40), tokens.size(1), 0.5))[1].argmax(1)
        assert (found[draw] == expected.numpy()).all()
    assert not (found[0] == found[1]).all()


def test_the_modal_class_counts() -> None:
    predictions = np.array([[0, 1, 2], [0, 1, 1], [2, 2, 1]])
    accuracy, single, confusion = score_predictions(predictions, np.array([0, 1, 2]), 3)
    assert (accuracy, single) == (pytest.approx(2 / 3), pytest.approx(5 / 9))
    assert confusion.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


def head_of(shards: ShardSet) -> ClassHead:
    trained = {"lr": 0.1, "batch_images": 4, "seed": 0, "augment_pad": 0, "augment_flip": False, "precision": "fp32"}
    about = {"classes": shards.classes, "layer": 2, "start": "", "start_step": 0, "loss": "clf", "gen_scale": "mean"}
    return ClassHead(**trained, **about, hash="h", train_split="train", dataset_hash="x", n_train=36)


def test_a_row_is_one_that_results_take(tiny_config: ModelConfig, shards: ShardSet, tmp_path: Path) -> None:
    info = ModelInfo(tiny_config, "bert", shards.palette_hash, 8, 80, "h", 0.3, class_head=head_of(shards))
    row, confusion = result(classifier(tiny_config, "bert"), info, shards, shards, 4, "cpu", 5)
    add_results(tmp_path / "results.jsonl", [row])
    assert read_results(tmp_path / "results.jsonl") == [row]
    assert (row["n_masks"], row["augmentation"], row["weights"], row["best_step"]) == (5, "none", "untrained", 8)
    assert row["held_out_accuracy"] == row["accuracy"]
    assert np.sum(confusion.counts) == shards.n_images


def test_the_row_of_several_subsets_has_mean_and_deviation(tiny_config: ModelConfig, shards: ShardSet, tmp_path: Path) -> None:
    heads = [dataclasses.replace(head_of(shards), n_train=6, dataset_hash=f"d{number}") for number in range(3)]
    infos = [
        ModelInfo(tiny_config, "bert", shards.palette_hash, 8, 80, f"h{n}", 0.3, class_head=head) for n, head in enumerate(heads)
    ]
    rows = [result(classifier(tiny_config, "bert"), info, shards, shards, 4, "cpu", 5)[0] for info in infos]
    rows = [row | {"accuracy": accuracy} for row, accuracy in zip(rows, (0.2, 0.4, 0.6), strict=True)]
    joined = over_subsets(rows, ShardSet(shards.path, "train"), 36, subset_seed=2)
    assert (joined.accuracy, joined.deviation) == (pytest.approx(0.4), pytest.approx(0.2))  # of a sample
    assert (joined.n_labels, joined.n_subsets, joined.n_train, joined["best_steps"]) == (6, 3, 36, [8, 8, 8])
    assert joined["subset_accuracies"] == [0.2, 0.4, 0.6]
    assert joined.dataset_hash["train"] == ShardSet(shards.path, "train").dataset_hash
    add_results(tmp_path / "results.jsonl", [*rows, joined])
    assert read_results(tmp_path / "results.jsonl") == [*rows, joined], "each is a measurement of its own"
    assert over_subsets(rows[:1], shards, 36, 2).deviation is None


def test_other_classes_or_colours_are_refused(tiny_config: ModelConfig, shards: ShardSet) -> None:
    info = ModelInfo(tiny_config, "ar", shards.palette_hash, 1, 1, "h", class_head=ClassHead(["cat", "dog"], 2, "h"))
    with pytest.raises(ValueError, match="has other classes than the model was fine-tuned on; name shards of that dataset"):
        check_classes(info, shards)
    same = dataclasses.replace(info, class_head=ClassHead(shards.classes, 2, "h"))
    check_classes(same, shards)
    with pytest.raises(ValueError, match=r"has another palette than the model; make the shards again with the model's palette"):
        check_classes(dataclasses.replace(same, palette_hash="other"), shards)
    with pytest.raises(
        ValueError, match="fine-tuned with --loss gen, which trains no class head; fine-tune it with joint or clf"
    ):
        check_classes(dataclasses.replace(same, class_head=dataclasses.replace(same.class_head, loss="gen")), shards)


def test_what_the_tool_refuses(launch: Any, tiny_dataset: Path, tmp_path: Path) -> None:
    for more, message in ((["--batch", "0"], "--batch 0 must be at least 1"), ([], "does not exist")):
        done = launch(["tools/evaluate_classifier.py", "--model", str(tmp_path), "--data", str(tiny_dataset), *more])
        assert done.returncode == 2
        assert message in done.stderr
