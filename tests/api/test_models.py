"""`igpt_ds.load` and its Model: the numbers of the tools, from Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt_ds
from igpt_ds.api.found import model_dir
from igpt_ds.data.grids import Texts, _Layout
from igpt_ds.data.shards.dataset import ShardSet
from igpt_ds.evaluate.classification import predict
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.likelihood import LikelihoodSettings, shard_nats
from igpt_ds.evaluate.report.results import add_results, by_layer, read_results
from igpt_ds.model.interchange.hf import write_hf
from igpt_ds.model.store import load_classifier, load_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(model_dir):
    return igpt_ds.load(model_dir, device="cpu")


@pytest.fixture(scope="module")
def val(tiny_dataset):
    return igpt_ds.open_shards(tiny_dataset, "val")


@pytest.mark.parametrize(("objective", "dtype"), [("ar", "fp32"), ("ar", "bf16"), ("bert", "fp32")])
def test_features_are_those_of_the_tool(tool, tmp_path, tiny_dataset, model_dir, bert_dir, objective, dtype):
    path, out = {"ar": model_dir, "bert": bert_dir}[objective], tmp_path / "features"
    asked = ["--model", path, "--data", tiny_dataset, "--out", out, "--precision", dtype, "--device", "cpu", "--batch", 7]
    assert tool("extract_features", *asked)[0] == 0
    model = igpt_ds.load(path, device="cpu", dtype=dtype)
    shards, written = igpt_ds.open_shards(tiny_dataset, "train"), open_features(out, "train")
    for kind in ("normed", "raw"):
        found = model.features(shards, layer="all", kind=kind, batch=7)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, [written.layer(layer, kind) for layer in (0, 1, 2)])
        np.testing.assert_array_equal(model.features(shards, layer=1, kind=kind, batch=7), found[1])
        np.testing.assert_array_equal(model.features(shards, layer=[2, 0], kind=kind, batch=7), found[[2, 0]])


def test_the_same_images_from_files_have_the_same_features(model, tiny_images, val):
    files = sorted(tiny_images.rglob("*.png"))
    tokens = model.encode(files)
    assert tokens.shape == (48, 16)
    everything = {row.tobytes() for row in tokens}
    assert all(image.tokens.tobytes() in everything for image in val)
    np.testing.assert_array_equal(model.features(files, layer=1), model.features(tokens, layer=1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nats_are_those_of_the_tool(tool, tmp_path, tiny_dataset, model_dir, val, dtype):
    out = tmp_path / "nats.json"
    asked = ["--model", model_dir, "--data", tiny_dataset, "--precision", dtype, "--batch", 5, "--device", "cpu", "--out", out]
    assert tool("evaluate", *asked)[0] == 0
    nats = igpt_ds.load(model_dir, device="cpu", dtype=dtype).nats(val, batch=5)
    assert (nats.shape, nats.dtype) == ((len(val),), np.float64)
    assert nats.mean() == pytest.approx(json.loads(out.read_text())["nats_per_token"]["mean"], abs=1e-12)


def test_nats_of_a_bert_model_are_those_of_masked_tokens(bert_dir, tiny_dataset, val):
    settings = LikelihoodSettings(mask_draws=3, seed=4, mask_prob=0.4)
    ids = np.arange(len(val))
    expected = shard_nats(load_model(bert_dir)[0], ShardSet(tiny_dataset, "val"), ids, settings)
    np.testing.assert_array_equal(igpt_ds.load(bert_dir).nats(val, mask_draws=3, seed=4, batch=32), expected)


def _tiles(path: Path) -> np.ndarray:
    """The 4x4 images of the three columns that tools/sample.py wrote at scale 1."""
    labels = ["sample", "sample", "original", "given: 2 of 4 rows", "completion 1", "completion 2"]
    captions = ["below" if label == "original" else "" for label in labels for _ in range(3)]
    corners = _Layout((len(captions), 4, 4, 3), 3, 1, Texts(captions, labels)).corners
    grid = np.asarray(Image.open(path).convert("RGB"))
    return np.array([grid[top : top + 4, left : left + 4] for top, left in corners]).reshape(len(labels), 3, 4, 4, 3)


def test_samples_and_completions_are_those_of_the_tool(tool, tmp_path, tiny_dataset, model_dir, model, val):
    out = tmp_path / "samples.png"
    asked = ["--model", model_dir, "--data", tiny_dataset, "--ids", 0, 3, 5, "--rows", 2, "--columns", 3, "--completions", 2]
    status, _, stderr = tool("sample", *asked, "--scale", 1, "--seed", 9, "--out", out, "--device", "cpu")
    assert status == 0, stderr
    tiles = _tiles(out)
    drawn = model.sample(6, seed=9, batch=4)
    assert (drawn.shape, drawn.dtype) == ((6, 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(drawn, tiles[:2].reshape(6, 4, 4, 3))
    chosen = val.tokens()[[0, 3, 5]]
    completed = model.complete(chosen, keep=0.5, n=2, seed=9)
    np.testing.assert_array_equal(completed.reshape(3, 2, 4, 4, 3).swapaxes(0, 1), tiles[4:])
    np.testing.assert_array_equal(completed[::2, :2], model.decode(chosen)[:, :2])
    assert (model.complete(chosen[0], keep=0.75)[0, :3] == model.decode(chosen[:1])[0, :3]).all()
    assert len({model.sample(1, seed=seed).tobytes() for seed in range(4)}) > 1


def test_predictions_are_those_of_the_class_head(classifier_dir, tiny_dataset, val):
    model = igpt_ds.load(classifier_dir, device="cpu")
    found = model.predict(val, batch=5)
    network = load_classifier(classifier_dir)[0]
    expected = predict(network, ShardSet(tiny_dataset, "val"), len(val), "cpu", None, 1)[0]
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)
    with torch.no_grad():
        logits = network(torch.from_numpy(val.tokens()), with_pixels=False)[1]
    np.testing.assert_allclose(found.probabilities, logits.softmax(1).numpy(), atol=1e-6)
    assert (len(found), found.probabilities.shape, found.classes) == (len(val), (len(val), 3), ["blue", "green", "red"])
    assert found.names == [found.classes[label] for label in found.labels]
    plain = igpt_ds.load(classifier_dir)
    assert plain.nats(val).shape == (len(val),)
    assert plain.sample(1).shape == (1, 4, 4, 3)


def test_a_saved_probe_predicts_as_the_tool_does(tool, tmp_path, model_dir, model, tiny_dataset, tiny_images, val):
    features, probe = tmp_path / "features", tmp_path / "probe.safetensors"
    assert tool("extract_features", "--model", model_dir, "--data", tiny_dataset, "--out", features)[0] == 0
    asked = ["--features", features, "--eval_split", "val", "--out", tmp_path / "rows.jsonl", "--save_probe", probe]
    status, _, stderr = tool("linear_probe", *asked)
    assert status == 0, stderr
    status, printed, stderr = tool(
        "evaluate_classifier", "--model", model_dir, "--probe", probe, "--images", tiny_images, "--json"
    )
    assert status == 0, stderr
    found = model.predict(tiny_images, probe=probe)
    rows = json.loads(printed)["images"]
    assert [row["class"] for row in rows] == found.names
    assert (len(found), found.classes) == (48, ["blue", "green", "red"])
    assert repr(found).startswith(f"<igpt_ds.Prediction of 48 images, 3 classes: {found.names[0]}, ")
    assert found != model.predict(tiny_images, probe=probe)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)
    with pytest.raises(igpt_ds.InputError, match="fitted on features in fp32; load the model with dtype='fp32'"):
        igpt_ds.load(model_dir, dtype="bf16").predict(val, probe=probe)
    with pytest.raises(igpt_ds.InputError, match=r"none\.safetensors does not exist"):
        model.predict(val, probe="none.safetensors")


def test_features_of_a_bert_model_are_of_masked_images(tmp_path, tool, bert_dir, tiny_dataset, val):
    asked = ["--model", bert_dir, "--data", tiny_dataset, "--splits", "val", "--layers", 1, "--kinds", "raw", "--mask_draws"]
    model = igpt_ds.load(bert_dir, device="cpu")
    for draws in (2, 0):
        assert tool("extract_features", *asked, draws, "--mask_seed", 3, "--out", tmp_path / f"{draws}")[0] == 0
    stored, whole = (igpt_ds.open_features(tmp_path / name, "val") for name in ("2", "0"))
    masked = [stored.layer(1, mask=mask) for mask in (0, 1)]
    np.testing.assert_allclose(model.features(val, 1, "raw", 5, seed=3), masked[0], atol=1e-6)
    np.testing.assert_allclose(model.features(val, 1, "raw", mask_draws=2, seed=3), (masked[0] + masked[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(model.features(val, 1, "raw", mask_draws=0), whole.layer(1), atol=1e-6)


def test_a_saved_probe_of_masked_images_votes(tmp_path, tool, bert_dir, tiny_dataset, val):
    asked = ["--model", bert_dir, "--data", tiny_dataset]
    assert tool("extract_features", *asked, "--layers", 1, "--kinds", "raw", "--out", tmp_path / "f")[0] == 0
    probe, rows = tmp_path / "p.safetensors", tmp_path / "r.jsonl"
    one = ["--features", tmp_path / "f", "--layers", 1, "--C_grid", 1, "--out", rows]
    assert tool("linear_probe", *one, "--save_probe", probe)[0] == 0
    assert tool("linear_probe", *one, "--protocol", "mask_vote")[0] == 0
    single, voted = (100 * row.accuracy for row in read_results(rows))
    found = igpt_ds.load(bert_dir).predict(val, probe, batch=5)
    assert 100 * (found.labels == val.labels).mean() == pytest.approx(voted)
    split = ["--probe", probe, "--eval_split", "val"]
    assert tool("evaluate_classifier", *asked, *split)[1].startswith(f"val: {voted:.2f} % of ")
    assert tool("evaluate_classifier", *asked, *split, "--mask_draws", 1)[1].startswith(f"val: {single:.2f} % of ")


def test_a_bert_model_lets_masks_vote(tmp_path, make_model_dir, tiny_dataset, val):
    head = {"classes": ["blue", "green", "red"], "layer": 2, "loss": "clf"}
    path = make_model_dir(tmp_path / "fine", objective="bert", mask_prob=0.4, class_head=head)
    drawn = predict(load_classifier(path)[0], ShardSet(tiny_dataset, "val"), len(val), "cpu", 0.4, 3)
    found = igpt_ds.load(path).predict(val, mask_draws=3, batch=5)
    clear = (drawn == drawn[0]).all(axis=0)
    assert clear.any()
    np.testing.assert_array_equal(found.labels[clear], drawn[0][clear])


def test_a_hugging_face_directory(tmp_path, model_dir, model, val):
    network, info = load_model(model_dir)
    write_hf(tmp_path / "hf", info.config, network.state_dict(), model.palette)
    found = igpt_ds.load(str(tmp_path / "hf"))
    np.testing.assert_array_equal(found.nats(val), model.nats(val))
    assert found.info.model_hash == model.info.model_hash
    (tmp_path / "hf" / "preprocessor_config.json").unlink()
    with pytest.raises(igpt_ds.InputError, match=r"clusters.*tools/import_hf.py --palette"):
        igpt_ds.load(tmp_path / "hf")


def test_a_run_dir_with_a_model_and_a_directory_with_one_model(tmp_path, make_model_dir, model):
    make_model_dir(tmp_path / "run" / "model")
    assert igpt_ds.load(tmp_path / "run").info.model_hash == model.info.model_hash
    make_model_dir(tmp_path / "demo" / "models" / "one")
    assert igpt_ds.load(tmp_path / "demo").path == tmp_path / "demo" / "models" / "one"
    make_model_dir(tmp_path / "demo" / "models" / "two")
    for reads in (igpt_ds.load, model_dir):
        with pytest.raises(igpt_ds.InputError, match=r"holds 2 models; name one: .*one, .*two"):
            reads(tmp_path / "demo")


def test_the_best_layer_is_that_of_the_best_held_out_probe(tmp_path, make_model_dir, val, capsys):
    path = make_model_dir(tmp_path / "models" / "tiny")
    model = igpt_ds.load(path)
    np.testing.assert_array_equal(model.features(val), model.features(val, layer=1))
    assert capsys.readouterr().err.count("takes the middle layer, 1 of 0..2; name a layer") == 1
    assert model.best_layer() is None
    rows = by_layer(read_results(ROOT / "docs" / "cifar10" / "results.jsonl"))
    accuracies = {("normed", 0): 0.5, ("normed", 1): 0.3, ("normed", 2): 0.6, ("raw", 0): 0.7, ("raw", 1): 0.9}
    measured = [row for row in rows if row.weights == "trained" and (row.features, row.layer) in accuracies]
    own = {"model_hash": model.info.model_hash}
    told = [row | own | {"held_out_accuracy": accuracies[row.features, row.layer]} for row in measured]
    other = measured[0] | {"held_out_accuracy": 1.0}
    add_results(tmp_path / "results" / "tiny.jsonl", [*told, other])
    assert (model.best_layer(), model.best_layer("raw")) == (2, 1)
    np.testing.assert_array_equal(model.features(val, "best"), model.features(val, layer=2))
    assert not capsys.readouterr().err


def test_a_model_says_what_it_is(model, model_dir):
    assert re.fullmatch(
        r"<igpt_ds.Model tiny \S+model: ar, step 7; 4x4 pixels of 8 colours; 2 layers, 2 heads, width 16, 6,[0-9]{3} parameters; "
        "cpu, fp32>",
        repr(model),
    )
    assert model.network.training is False
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert model.palette.shape == (8, 3)


def test_tokens_and_images_are_inverse(model, val):
    tokens = val.tokens()
    images = model.decode(tokens)
    assert (images.shape, images.dtype) == ((len(val), 4, 4, 3), np.uint8)
    np.testing.assert_array_equal(images, val.pixels())
    np.testing.assert_array_equal(model.encode(images), tokens)
    for form in (val, val[:], tokens.tolist(), torch.from_numpy(tokens)):
        np.testing.assert_array_equal(model.decode(form), images)
    np.testing.assert_array_equal(model.decode(tokens.reshape(-1, 4, 4)), images)
    np.testing.assert_array_equal(model.decode(torch.from_numpy(tokens[0])), images[:1])


WRONG = {
    "layer 99": (lambda m, i: m.features(i, layer=99), r"layer=99 .*0\.\.2, 'best' or 'all'"),
    "layer -1": (lambda m, i: m.features(i, layer=-1), r"layer=-1"),
    "layer 1.5": (lambda m, i: m.features(i, layer=1.5), r"layer=1\.5"),
    "layer True": (lambda m, i: m.features(i, layer=True), r"layer=True"),
    "no layers": (lambda m, i: m.features(i, layer=[]), r"layer=\[\]"),
    "a word": (lambda m, i: m.features(i, layer="last"), r"layer='last'"),
    "masks": (lambda m, i: m.features(i, mask_draws=1), r"mask_draws=1: .* sees whole images, and only BERT models see masked"),
    "nats of masks": (lambda m, i: m.nats(i, mask_draws=3), r"mask_draws=3: .* sees whole images, .*; omit it"),
    "kind": (lambda m, i: m.features(i, kind="norm"), r"kind='norm' is unknown; known: normed, raw"),
    "batch": (lambda m, i: m.features(i, layer=1, batch=0), r"batch=0"),
    "keep 0": (lambda m, i: m.complete(i, keep=0), r"keep=0 must lie between 0 and 1"),
    "keep 1": (lambda m, i: m.complete(i, keep=1.0), r"keep=1\.0"),
    "keep 12": (lambda m, i: m.complete(i, keep=12), r"keep=12"),
    "keep a word": (lambda m, i: m.complete(i, keep="half"), r"keep='half'"),
    "less than a row": (lambda m, i: m.complete(i, keep=0.1), r"keep=0\.1 .*at least 0\.25"),
    "n 0": (lambda m, i: m.sample(0), r"n=0 must be a whole number of at least 1"),
    "n of completions": (lambda m, i: m.complete(i, n=0), r"n=0"),
    "temperature": (lambda m, i: m.sample(1, temperature=0), r"temperature=0 .*top_k=1"),
    "temperature a word": (lambda m, i: m.sample(1, temperature="hot"), r"temperature='hot' must be a number"),
    "top_k a fraction": (lambda m, i: m.sample(1, top_k=2.5), r"top_k=2\.5"),
    "kind of the best layer": (lambda m, i: m.best_layer("norm"), r"kind='norm'"),
    "tokens of different lengths": (lambda m, i: m.decode([[1, 2], [3]]), r"tokens holds rows of different lengths"),
    "tokens that are a word": (lambda m, i: m.decode("x"), r"tokens is of type str; give an array of tokens"),
    "top_k": (lambda m, i: m.sample(1, top_k=9), r"top_k=9 .*8"),
    "seed": (lambda m, i: m.sample(1, seed=None), r"seed=None"),
    "no class head": (lambda m, i: m.predict(i), r"has no class head; .*finetune.py, or give probe=FILE"),
    "a probe that is no path": (lambda m, i: m.predict(i, probe=5), r"probe=5 must be the path of a file"),
    "tokens of another palette": (lambda m, i: m.decode(np.full((1, 16), 8)), r"tokens holds 8; .*0\.\.7"),
    "tokens of another size": (lambda m, i: m.decode(np.zeros((1, 9), dtype=int)), r"shape \[1, 9\]; .*\[N, 16\]"),
    "tokens that are none": (lambda m, i: m.decode(np.zeros((1, 16))), r"holds float64; tokens are whole numbers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_is_named_in_one_line(model, val, what):
    call, pattern = WRONG[what]
    with pytest.raises(igpt_ds.InputError, match=pattern) as caught:
        call(model, val)
    assert "\n" not in str(caught.value)


def test_a_bert_model_cannot_sample(bert_dir, val):
    model = igpt_ds.load(bert_dir)
    for call in (lambda: model.sample(1), lambda: model.complete(val)):
        with pytest.raises(igpt_ds.InputError, match="'bert' model, which cannot sample; load an auto-regressive one"):
            call()


def test_a_path_that_is_no_model_is_named_with_what_it_is(tmp_path, tiny_dataset, model_dir):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "probes.jsonl").touch()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "images").mkdir()
    wrong = {
        tmp_path / "none": r"none does not exist; name a model dir",
        "openai/imagegpt-small": r"imagegpt-small does not exist; .*from disk, download it first",
        tmp_path: r"holds no complete checkpoint",  # of the only run in it
        tmp_path / "images": r"holds no model",
        None: r"path=None must be the path of a directory",
        tmp_path / "results": r"holds results and no model",
        tmp_path / "run": r"run/checkpoints holds no complete checkpoint",
        tiny_dataset: r"is a shard directory; open it with igpt_ds.open_shards",
        model_dir / "config.json": r"config.json is a file; name the directory",
    }
    for path, pattern in wrong.items():
        with pytest.raises(igpt_ds.InputError, match=pattern):
            igpt_ds.load(path)
    for arguments, pattern in (
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": 0}, "device='0'"),
        ({"dtype": "fp16"}, "dtype='fp16'"),
        ({"dtype": torch.half}, "use 'fp32' or 'bf16'"),
    ):
        with pytest.raises(igpt_ds.InputError, match=pattern):
            igpt_ds.load(model_dir, **arguments)
    if not torch.cuda.is_available():
        with pytest.raises(igpt_ds.InputError, match="torch sees 0 GPUs"):
            igpt_ds.load(model_dir, device="cuda")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="torch can use the GPU of this machine")
def test_gpus_that_torch_cannot_use_are_refused(model_dir, tiny_dataset, tool, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(igpt_ds.InputError, match=r"NVIDIA GPUs .*give device='cpu'"):
        igpt_ds.load(model_dir)
    status, _, stderr = tool("evaluate_classifier", "--model", model_dir, "--data", tiny_dataset)
    assert status == 2
    assert "give --device cpu" in stderr
    igpt_ds.load(model_dir, device="cpu")


def test_importing_the_package_loads_no_library(tmp_path):
    code = (
        "import sys, igpt_ds; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules], 'load' in dir(igpt_ds))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[] True\n"
    with pytest.raises(AttributeError, match="'igpt_ds' has no attribute 'lod'"):
        igpt_ds.lod  # noqa: B018
