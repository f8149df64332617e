"""The tools on image files: predictions of a fine-tuned model and of a saved probe, likelihoods, features; what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from igpt_ds.data.given_images import read_images
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.classification import predict
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.features.network import model_images
from igpt_ds.evaluate.likelihood import LikelihoodSettings, shard_nats
from igpt_ds.evaluate.prediction import Predictions, classify
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.evaluate.probes.saved import save_probe, saved_probe
from igpt_ds.json_files import read_json
from igpt_ds.model.classifier import Classifier
from igpt_ds.model.store import load_classifier, load_model, save_model


@pytest.fixture(scope="module", params=["ar", "bert"])
def tuned_dir(request, tiny_config, tiny_dataset, tmp_path_factory) -> Path:
    """A model dir with a class head of random weights."""
    torch.manual_seed(3)
    model = Classifier(tiny_config, 3, 1, objective=request.param)
    with torch.no_grad():
        model.class_head.weight.normal_()
    shards = ShardSet(tiny_dataset, "train")
    head = {"classes": shards.classes, "layer": 1, "loss": "clf"}
    info = {"config": tiny_config, "objective": request.param, "palette_hash": shards.palette_hash, "step": 7, "images_seen": 56}
    info |= {"class_head": head, "mask_prob": 0.3 if request.param == "bert" else None}
    save_model(path := tmp_path_factory.mktemp("tuned") / "m", model.state_dict(), info, tiny_dataset / "palette.npy")
    return path


@pytest.fixture
def probe_file(features_dir: Path, tmp_path: Path) -> Path:
    both = open_features(features_dir, "train"), open_features(features_dir, "val")
    probe = linear_probe(*both, 1, "raw", ProbeSettings.of([0.1]))
    save_probe(tmp_path / "probe.safetensors", saved_probe(probe, *both, "every_layer"))
    return tmp_path / "probe.safetensors"


def test_a_fine_tuned_model_names_the_classes_of_files(tool, tuned_dir: Path, tiny_images: Path) -> None:
    words = ["--model", tuned_dir, "--images", tiny_images]
    status, said, _ = tool("evaluate_classifier", *words, "--json", "--batch", 7)
    assert status == 0
    found = json.loads(said)
    images = model_images(tuned_dir, [tiny_images])
    model, info = load_classifier(tuned_dir)
    expected = classify(model, info, images, 48, "cpu")
    labels = images.labels_among(found["classes"])
    assert [row["file"] for row in found["images"]] == images.keys
    assert [row["label"] for row in found["images"]] == [Path(file).parent.name for file in images.keys]
    assert [row["class"] for row in found["images"]] == [info.class_head.classes[label] for label in expected.labels]
    assert np.allclose([row["probabilities"] for row in found["images"]], expected.probabilities, atol=1e-6)
    assert np.allclose(expected.probabilities.sum(1), 1)
    assert found["accuracy"] == (expected.labels == labels).mean()
    assert (found["n_images"], found["n_labelled"], found["probe"], found["left_out"]) == (48, 48, None, [])
    votes = predict(model, images, 48, "cpu", info.mask_prob, 5)
    if info.objective == "ar":
        assert np.array_equal(votes[0], expected.labels)
    assert (votes == expected.labels).any(0).all()
    status, said, _ = tool("evaluate_classifier", *words)
    assert status == 0
    assert said.splitlines()[1].split()[:2] == [images.keys[0], found["images"][0]["class"]]
    assert f"accuracy {100 * found['accuracy']:.2f} % of 48 images" in said


def test_a_saved_probe_names_the_classes_of_files(tool, model_dir, probe_file, tiny_images, tiny_dataset, tmp_path) -> None:
    words = ["--model", model_dir, "--probe", probe_file]
    status, said, _ = tool("evaluate_classifier", *words, "--images", tiny_images, "--json")
    assert status == 0
    found = json.loads(said)
    assert found["probe"] == str(probe_file)
    assert found["accuracy"] > 0.7  # noisy colours, which a random network passes on
    status, said, also = tool("evaluate_classifier", *words, "--data", tiny_dataset, "--eval_split", "train+val")
    assert (status, said) == (0, f"train+val: {100 * found['accuracy']:.2f} % of 48 images\n")
    assert also.startswith(f"warning: the probe was fitted on images of split 'train+val' of {tiny_dataset}, so ")
    assert tool("evaluate_classifier", *words, "--data", tiny_dataset, "--eval_split", "val")[2] == "", "new images"
    complaint = f"--mask_draws 3: {probe_file} sees whole images, and only BERT models see masks; omit it"
    assert complaint in tool("evaluate_classifier", *words, "--images", tiny_images, "--mask_draws", 3)[2]
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(next(iter(sorted((tiny_images / "red").iterdir()))), flat / "one.png")
    (flat / "notes.txt").write_text("x")
    status, said, also = tool("evaluate_classifier", *words, "--images", flat)
    assert status == 0
    assert said.splitlines()[0].split() == ["file", "class", "probability", "top", "3"]
    assert len(said.splitlines()) == 2
    assert "left out    not images by name: 1 .txt" in also
    (tmp_path / "holiday" / "beach").mkdir(parents=True)
    shutil.copy(flat / "one.png", tmp_path / "holiday" / "beach" / "one.png")
    assert "no accuracy: no folder is called like" in tool("evaluate_classifier", *words, "--images", tmp_path / "holiday")[1]


def test_top_and_accuracy_of_predictions() -> None:
    found = Predictions(["a", "b", "c"], np.array([1, 2]), np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    assert found.top(0, 2) == [("b", 0.5), ("c", 0.3)]
    assert found.accuracy(np.array([1, 0])) == (0.5, 2)
    assert found.accuracy(np.array([-1, 2])) == (1.0, 1)
    assert found.accuracy(np.array([-1, -1])) == (None, 0)
    assert found.table(["x.png", "longer.png"]).splitlines() == [
        "file        class  probability  top 3",
        "x.png       b      0.5000       b 0.5000, c 0.3000, a 0.2000",
        "longer.png  c      0.8000       c 0.8000, a 0.1000, b 0.1000",
    ]


def test_the_likelihood_of_files(tool, model_dir: Path, tiny_images: Path, tmp_path: Path) -> None:
    folder, out = tiny_images / "red", tmp_path / "o.json"
    status, said, _ = tool("evaluate", "--model", model_dir, "--images", folder, "--out", out)
    assert status == 0
    images = model_images(model_dir, [folder])
    nats = shard_nats(load_model(model_dir)[0], images, np.arange(16), LikelihoodSettings())
    assert said.splitlines()[1].split() == [images.keys[0], f"{nats[0]:.4f}"]
    assert f"{nats.mean():.4f} +- " in said
    assert "published" not in said
    written = read_json(out, "likelihood")
    assert (written["published"], written["n_images"], written["split"]) == (None, 16, "images")


def test_the_features_of_files(
    tool, model_dir: Path, features_dir: Path, tiny_dataset: Path, tiny_images: Path, tmp_path
) -> None:
    words = ["--model", model_dir, "--images", tiny_images, "--out", tmp_path / "f"]
    assert tool("extract_features", *words)[0] == 0
    found, images = open_features(tmp_path / "f", "images"), read_images([tiny_images], ShardSet(tiny_dataset, "val").palette, 4)
    assert found.classes == ["blue", "green", "red"]
    assert found.keys is not None
    assert list(found.keys) == images.keys
    assert np.array_equal(found.labels, images.labels(np.arange(48)))
    known = np.concatenate([open_features(features_dir, split).layer(2, "raw") for split in ("train", "val")])
    assert np.allclose(np.sort(found.layer(2, "raw"), axis=0), np.sort(known, axis=0), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("evaluate_classifier", [], "give --data or --images"),
        ("evaluate_classifier", ["--images", "IMAGES", "--data", "SHARDS"], "--data and --images both give images"),
        ("evaluate_classifier", ["--images", "IMAGES", "--results", "r.jsonl"], "--results is for fine-tuned models on --data"),
        ("evaluate_classifier", ["--data", "SHARDS", "--json"], "--json is for --images"),
        ("evaluate_classifier", ["--images", "IMAGES"], "has no class head"),
        ("evaluate_classifier", ["--images", "IMAGES", "--probe", "none.safetensors"], "none.safetensors does not exist"),
        ("evaluate_classifier", ["--images", "IMAGES", "--probe", "PROBE", "--bf16"], "--bf16 is for fine-tuned models"),
        ("evaluate_classifier", ["--images", "none.png", "--probe", "PROBE"], "none.png"),
        ("evaluate", [], "give --data or --images"),
        ("evaluate", ["--images", "IMAGES", "--results", "r.jsonl"], "--results is for rows of data sets"),
        ("evaluate", ["--images", "none.png"], "none.png"),
        ("extract_features", ["--out", "f", "--images", "IMAGES", "--data", "SHARDS"], "--images does not go with --data"),
        ("extract_features", ["--out", "f", "--images", "IMAGES", "--pixels"], "--images does not go with --pixels"),
    ],
)
def test_what_the_tools_refuse(name, words, complaint, tool, model_dir, probe_file, tiny_images, tiny_dataset) -> None:
    places = {"IMAGES": tiny_images, "SHARDS": tiny_dataset, "PROBE": probe_file}
    model = [] if "--pixels" in words else ["--model", model_dir]
    status, _, said = tool(name, *model, *(places.get(word, word) for word in words))
    assert status == 2
    assert complaint in said
    assert said.count("\n") == 1


def test_a_probe_of_another_model_is_refused(tool, make_model_dir, probe_file: Path, tiny_images: Path, tmp_path: Path) -> None:
    other = make_model_dir(tmp_path / "other", n_embd=8)
    status, _, said = tool("evaluate_classifier", "--model", other, "--probe", probe_file, "--images", tiny_images)
    assert status == 2
    assert f"{probe_file} was fitted on the features of another model" in said
