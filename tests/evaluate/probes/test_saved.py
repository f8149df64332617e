"""Saved probes: the same predictions as at the fit and as scikit-learn's, refusal of other models and of damaged files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.features.files import FeatureSet, open_features
from igpt_ds.evaluate.features.network import Network, open_model
from igpt_ds.evaluate.probes.linear import Probe, ProbeSettings, View, linear_probe
from igpt_ds.evaluate.probes.saved import SavedProbe, load_probe, save_probe, saved_probe
from igpt_ds.evaluate.probes.variants import concat
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.model.store import read_info

SETTINGS = ProbeSettings.of([0.01, 1.0])


@pytest.fixture(scope="module")
def sets(features_dir: Path) -> tuple[FeatureSet, FeatureSet]:
    return open_features(features_dir, "train"), open_features(features_dir, "val")


@pytest.fixture
def probe(sets) -> Probe:
    return linear_probe(*sets, 1, "raw", SETTINGS)


@pytest.fixture
def file(sets, probe, tmp_path: Path) -> Path:
    save_probe(tmp_path / "probe.safetensors", saved_probe(probe, *sets, "every_layer"))
    return tmp_path / "probe.safetensors"


def rows(probe: SavedProbe, features: FeatureSet) -> np.ndarray:
    layers = [np.asarray(features.layer(layer, probe.about.kind)) for layer in probe.about.layers]
    return np.concatenate(layers, axis=1, dtype=np.float64)


def test_predictions_are_those_of_the_fit_and_of_scikit_learn(sets, probe, file: Path) -> None:
    loaded, evaluated = load_probe(file), sets[1]
    x = rows(loaded, evaluated)
    assert probe.fitted is not None
    at_fit = probe.fitted.standard.predict(probe.fitted.fit, View(evaluated, (1,), "raw"))
    assert np.array_equal(loaded.predict(x), at_fit)
    assert (loaded.predict(x) == evaluated.labels).mean() == probe.accuracy == loaded.about.accuracy
    theirs = LogisticRegression()
    theirs.classes_, theirs.coef_ = np.array(loaded.about.labels), loaded.weights
    theirs.intercept_ = loaded.intercepts
    standard = (x - loaded.mean) * loaded.scale
    assert np.array_equal(loaded.predict(x), theirs.predict(standard))
    assert np.allclose(loaded.probabilities(x), theirs.predict_proba(standard), rtol=1e-12)


def test_the_features_of_new_images_are_those_of_the_fit(sets, file: Path, model_dir: Path, tiny_dataset: Path) -> None:
    loaded, val = load_probe(file), ShardSet(tiny_dataset, "val")
    model, _ = open_model(model_dir, val)
    info = read_info(model_dir)
    loaded.check_model(info.model_hash, info.palette_hash, model_dir, file)
    found = loaded.features(Network(model), val.tokens(np.arange(val.n_images)))
    assert np.allclose(found, rows(loaded, sets[1]), atol=1e-6)
    assert loaded.about.classes == val.classes


def test_layers_side_by_side(make_model_dir, tiny_dataset: Path, tool, tmp_path: Path) -> None:
    make_model_dir(tmp_path / "deep", n_layer=4)
    words = ["--model", tmp_path / "deep", "--data", tiny_dataset, "--out", tmp_path / "f"]
    assert tool("extract_features", *words, "--kinds", "raw", "--dtype", "fp16")[0] == 0
    both = open_features(tmp_path / "f", "train"), open_features(tmp_path / "f", "val")
    probe = concat(*both, 2, "raw", SETTINGS)
    save_probe(tmp_path / "p.safetensors", saved_probe(probe, *both, "concat"))
    loaded = load_probe(tmp_path / "p.safetensors")
    assert loaded.about.layers == [0, 1, 2, 3, 4]
    assert (loaded.predict(rows(loaded, both[1])) == both[1].labels).mean() == probe.accuracy
    val = ShardSet(tiny_dataset, "val")
    found = loaded.features(Network(open_model(tmp_path / "deep", val)[0]), val.tokens(np.arange(val.n_images)))
    assert np.allclose(found, rows(loaded, both[1]), atol=1e-3)


def test_a_class_without_training_images_has_probability_0(made_features, tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 2 * 2
    path = made_features({"train": (x, y), "val": (x, y)})
    both = open_features(path, "train"), open_features(path, "val")
    shaped = [dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, origin=with_shape(one))) for one in both]
    saved = saved_probe(linear_probe(*both, 0, "normed", SETTINGS), *shaped, "every_layer")
    assert saved.about.labels == [0, 2]
    assert (saved.probabilities(x)[:, 1] == 0).all()
    assert set(saved.predict(x)) <= {0, 2}


def with_shape(features: FeatureSet):
    return dataclasses.replace(features.manifest.origin, model={"n_px": 4})


def test_another_model_is_refused(file: Path) -> None:
    loaded = load_probe(file)
    of = loaded.about
    for model_hash, palette_hash in (("x", of.palette_hash), (of.model_hash, "x")):
        with pytest.raises(ValueError, match=f"{file} was fitted on the features of another model"):
            loaded.check_model(model_hash, palette_hash, Path("models/s"), file)


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "model", "tensor", "shape", "dtype", "directory", "null"])
def test_other_files_are_one_line(kind: str, file: Path, model_dir: Path) -> None:
    content, good = file.read_bytes(), load_probe(file)
    if kind in ("missing", "directory"):
        file.unlink()
    if kind == "directory":
        file.mkdir()
    damaged = {
        "empty": b"",
        "text": b"hello, I am no probe",
        "model": (model_dir / "model.safetensors").read_bytes(),
        "tensor": content[:-1] + bytes([content[-1] ^ 1]),
        "shape": content.replace(b'"shape":[3,16]', b'"shape":[16,3]'),
    }
    if kind in damaged:
        assert damaged[kind] != content
        file.write_bytes(damaged[kind])
    if kind == "dtype":
        save_file({"weights": torch.from_numpy(good.weights).float()}, file, {"igpt_ds": "{}"})
    if kind == "null":
        header = b'{"__metadata__":null}'
        file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=str(file)) as found:
        load_probe(file)
    assert "\n" not in str(found.value)


def test_the_tool_saves_the_best_probe_of_a_trained_model(tool, features_dir: Path, pixels_dir: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "r.jsonl", tmp_path / "p.safetensors"
    words = ["--features", pixels_dir, features_dir, "--out", out, "--C_grid", 0.01, 1, "--save_probe"]
    status, said, _ = tool("linear_probe", *words, file)
    assert status == 0
    about = load_probe(file).about
    best = max((row for row in read_results(out) if row.weights == "trained"), key=lambda row: row.held_out_accuracy)
    assert (about.layers, about.kind, about.held_out_accuracy, about.accuracy, about.model_hash) == (
        [best.layer],
        best.features,
        best.held_out_accuracy,
        best.accuracy,
        best.model_hash,
    )
    assert f"{file}: the probe of {features_dir} layer {best.layer} {best.features}, held out " in said


@pytest.mark.parametrize(
    ("features", "more", "complaint"),
    [
        ("trained", ["--save_probe", "p.pt"], "use .safetensors"),
        ("trained", ["--save_probe", "p.safetensors", "--protocol", "low_data"], "not low_data"),
        ("pixels", ["--save_probe", "p.safetensors"], "needs features of a trained model"),
    ],
)
def test_the_tool_refuses_before_the_first_probe(features, more, complaint, tool, features_dir, pixels_dir, tmp_path) -> None:
    words = ["--features", {"trained": features_dir, "pixels": pixels_dir}[features], "--out", tmp_path / "r.jsonl"]
    status, _, said = tool("linear_probe", *words, *more)
    assert status == 2
    assert complaint in said
    assert not (tmp_path / "r.jsonl").exists()
