"""Features: against hooks and plain means, from disk and back, and every way in which they do not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from igpt_ds.evaluate.features.extract import Extraction, extract, extract_pixels
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.features.manifest import span
from igpt_ds.evaluate.features.network import Network, check_layers, open_model, pick_device
from igpt_ds.files import sha256_file
from igpt_ds.json_files import seal
from igpt_ds.model.store import load_model


def made(path, shard_sets, model, origin, batch=32, precision="fp32", **more):
    """Extracts and returns the path."""
    extract(path, shard_sets, Network(model, precision=precision, batch=batch), origin, Extraction(**more))
    return path


def all_tokens(shards):
    return torch.from_numpy(shards.tokens(np.arange(shards.n_images)).reshape(shards.n_images, -1).astype(np.int64))


def test_equal_forward_hooks(features_dir, model_dir, both_splits):
    """Each layer again, caught by hooks on a plain forward pass, one image at a time and in float64."""
    check_against_hooks(features_dir, model_dir, both_splits)


def test_bert_features_of_whole_images(make_model_dir, both_splits, tmp_path):
    """Without masks every position sees all others: the last pixel moves the features at the first position too."""
    model_dir = make_model_dir(tmp_path / "model", objective="bert", mask_prob=0.15)
    model, origin = open_model(model_dir, both_splits[0])
    assert (origin.objective, hasattr(model, "sos")) == ("bert", False)
    made(tmp_path / "features", both_splits, model, origin, batch=7, mask_draws=[0])
    check_against_hooks(tmp_path / "features", model_dir, both_splits)
    tokens = all_tokens(both_splits[0])[:1]
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 8
    for layer, (one, changed) in enumerate(zip(model.residuals(tokens), model.residuals(other), strict=True)):
        assert torch.equal(one[0][0, 0], changed[0][0, 0]) == (layer == 0)
    untrained, origin = open_model(model_dir, both_splits[0], untrained=3)
    assert (origin.weights, origin.objective, untrained.objective) == ("untrained", "bert", "bert")


def check_against_hooks(features_dir, model_dir, both_splits):
    model, info = load_model(model_dir)
    model = model.double()
    caught: dict[tuple[int, str], torch.Tensor] = {}

    def watch(layer, norm):
        def hook(module, inputs, output):
            caught[layer, "raw"], caught[layer, "normed"] = inputs[0], output

        norm.register_forward_hook(hook)

    for layer, norm in enumerate([*(block.ln_1 for block in model.blocks), model.ln_f]):
        watch(layer, norm)
    for shards in both_splits:
        features = open_features(features_dir, shards.split)
        for i, tokens in enumerate(all_tokens(shards)):
            nothing = [torch.zeros_like(tokens[None], dtype=torch.bool)] if info.objective == "bert" else []
            with torch.inference_mode():
                model(tokens[None], *nothing)
            assert len(caught) == 2 * (info.config.n_layer + 1)
            for (layer, kind), activations in caught.items():
                expected = activations[0].mean(0)
                torch.testing.assert_close(
                    torch.from_numpy(np.array(features.layer(layer, kind)[i])).double(), expected, rtol=1e-5, atol=1e-6
                )


def test_what_is_written_says_what_it_is(features_dir, model_dir, both_splits, tiny_dataset):
    train, val = both_splits
    _, info = load_model(model_dir)
    features = open_features(features_dir, "val")
    assert (features.layers, features.kinds, features.classes) == ([0, 1, 2], ["normed", "raw"], train.classes)
    assert np.array_equal(features.labels, val.labels(np.arange(val.n_images)))
    assert features.layer(2, "raw").shape == (val.n_images, 16)
    assert features.layer(2, "raw").dtype == np.float32
    assert isinstance(features.layer(2, "raw"), np.memmap)
    assert not features.layer(2, "raw").flags.writeable
    expected = {
        "format": "igpt_ds.features",
        "version": 3,
        "dataset": tiny_dataset.name,
        "weights": "trained",
        "palette_hash": train.palette_hash,
        "pooling": "mean",
        "model_hash": info.model_hash,
        "objective": "ar",
        "step": 7,
        "seed": None,
        "precision": "fp32",
        "dtype": "fp32",
        "model": info.config.to_dict(),
        "mask_prob": None,
        "mask_seed": None,
        "layers": [0, 1, 2],
        "kinds": ["normed", "raw"],
        "n_features": 16,
        "splits": {
            shards.split: {"n_images": shards.n_images, "dataset_hash": shards.dataset_hash, "mask_draws": 0}
            for shards in both_splits
        },
        "classes": train.classes,
        "files": {
            f"{shards.split}/{name}.npy": {
                "bytes": 128 + size,
                "sha256": sha256_file(features_dir / shards.split / f"{name}.npy"),
            }
            for shards in both_splits
            for name, size in [
                ("labels", 8 * shards.n_images),
                *((f"layer_{layer:02d}_{kind}", 64 * shards.n_images) for layer in range(3) for kind in ("normed", "raw")),
            ]
        }
        | {
            f"{split}/keys.jsonl": {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            for split in ("train", "val")
            for file in [features_dir / split / "keys.jsonl"]
        },
    }
    assert (features_dir / "manifest.json").read_text() == json.dumps(seal(expected), indent=1) + "\n"
    files = sum(file.stat().st_size for file in features_dir.rglob("layer_*.npy"))
    headers = 128 * len(list(features_dir.rglob("layer_*.npy")))
    assert files - headers == features.manifest.array_bytes == (train.n_images + val.n_images) * 16 * 4 * 3 * 2


@pytest.mark.parametrize("batch", [1, 16, 1000])
def test_batch_size_changes_nothing(batch, features_dir, model_dir, both_splits, tmp_path):
    made(tmp_path / "out", both_splits, *open_model(model_dir, both_splits[0]), batch=batch)
    for kind in ("normed", "raw"):
        for layer in range(3):
            one, other = (open_features(path, "train").layer(layer, kind) for path in (features_dir, tmp_path / "out"))
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_some_layers_and_kinds(features_dir, model_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    upper = model.blocks[1]
    upper.register_forward_hook(lambda *_: pytest.fail("block 1 lies above the highest layer that was asked for"))
    made(tmp_path / "out", both_splits[:1], model, origin, layers=[1, 1], kinds=["raw"])
    features = open_features(tmp_path / "out", "train")
    assert (features.layers, features.kinds) == ([1], ["raw"])
    np.testing.assert_allclose(
        features.layer(1, "raw"), open_features(features_dir, "train").layer(1, "raw"), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"layer 9 does not exist; the features hold layers 1, in .*out"):
        features.layer(9, "raw")
    with pytest.raises(ValueError, match=r"kind 'normed' does not exist; the features hold raw, in .*out"):
        features.layer(1, "normed")
    with pytest.raises(ValueError, match=r"has no split 'val'; it has train"):
        open_features(tmp_path / "out", "val")
    with pytest.raises(ValueError, match="exists already"):
        made(tmp_path / "out", both_splits[:1], model, origin)


def test_untrained_is_the_shape_with_other_weights(features_dir, model_dir, both_splits, tmp_path):
    found = {}
    for name, seed in (("a", 5), ("again", 5), ("b", 6)):
        made(tmp_path / name, both_splits, *open_model(model_dir, both_splits[0], untrained=seed))
        found[name] = open_features(tmp_path / name, "train")
    a, again, b = (found[name].manifest.origin for name in ("a", "again", "b"))
    assert (a.weights, a.seed, a.step) == ("untrained", 5, 0)
    assert a == again
    assert len({a.model_hash, b.model_hash, open_features(features_dir, "train").manifest.origin.model_hash}) == 3
    assert np.array_equal(found["a"].layer(2, "normed"), found["again"].layer(2, "normed"))
    assert not np.allclose(found["a"].layer(2, "normed"), found["b"].layer(2, "normed"))


def test_pixels_are_the_palette_colours(pixels_dir, both_splits):
    features = open_features(pixels_dir, "train")
    assert (features.layers, features.kinds, features.manifest.n_features) == ([0], ["pixels"], 48)
    assert (features.manifest.origin.weights, features.manifest.origin.model_hash, features.manifest.origin.pooling) == (
        "pixels",
        None,
        "none",
    )
    pixels = features.layer(0, "pixels")
    shards = both_splits[0]
    colours = shards.palette.decode(shards.tokens(np.arange(shards.n_images))).reshape(len(pixels), -1)
    np.testing.assert_allclose(pixels, colours / 127.5 - 1, atol=0.5 / 127.5 + 1e-6)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_bf16_stays_close(features_dir, model_dir, both_splits, tmp_path):
    made(tmp_path / "out", both_splits, *open_model(model_dir, both_splits[0]), precision="bf16")
    rough = open_features(tmp_path / "out", "train")
    assert rough.manifest.origin.precision == "bf16"
    exact = open_features(features_dir, "train")
    np.testing.assert_allclose(rough.layer(0, "raw"), exact.layer(0, "raw"), atol=1e-6)  # the residual stream is not rounded
    np.testing.assert_allclose(rough.layer(2, "normed"), exact.layer(2, "normed"), atol=0.05)
    assert not np.array_equal(rough.layer(2, "normed"), exact.layer(2, "normed"))


def test_a_model_of_other_images_is_refused(tmp_path, make_model_dir, tiny_dataset, both_splits):
    larger = make_model_dir(tmp_path / "larger", n_px=5)
    with pytest.raises(ValueError, match=rf"{larger} reads 5x5 images, {tiny_dataset} holds 4x4; make shards with --n_px 5"):
        open_model(larger, both_splits[0])
    other = make_model_dir(tmp_path / "other", palette_hash="0" * 64)
    with pytest.raises(
        ValueError, match=rf"{other} .*palette 0{{12}}, {tiny_dataset} .*make the shards with {other}/palette.npy"
    ):
        open_model(other, both_splits[0])


def test_weights_gone_wrong_are_noticed(model_dir, both_splits, tmp_path):
    model, origin = open_model(model_dir, both_splits[0])
    with torch.no_grad():
        model.blocks[0].mlp.c_fc.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 1 is not finite for images of .*shards"):
        made(tmp_path / "out", both_splits, model, origin)
    assert not list(tmp_path.iterdir()), "nothing half-written may stay behind"


def test_arguments_that_make_no_sense(model_dir, both_splits, tmp_path):
    with pytest.raises(ValueError, match=r"--layers 3 -1 does not exist; the model has layers 0\.\.2"):
        check_layers([0, 3, -1], 2)
    with pytest.raises(ValueError, match=r"--layers  does not exist"):
        check_layers([], 2)
    with pytest.raises(ValueError, match="--batch 0 must be at least 1"):
        extract_pixels(tmp_path / "out", both_splits, batch=0)
    assert span([0, 1, 2, 3]) == "0..3"
    assert span([1, 3, 4]) == "1, 3, 4"
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU; use --device cpu"):
        pick_device("cuda")


@pytest.fixture
def damaged(features_dir, tmp_path):
    """A copy of the features that a test may damage."""
    return shutil.copytree(features_dir, tmp_path / "copy")


def change_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    kept = {name: value for name, value in (manifest | changes).items() if value is not None or manifest[name] is None}
    (path / "manifest.json").write_text(json.dumps(seal(kept)))


def test_no_feature_directory(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/none is no feature directory: .*make one with tools/extract_features.py"):
        open_features(tmp_path / "none", "train")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": 1}, r"manifest\.json is not igpt_ds\.features version 2 or 3: it is version 1"),
        ({"format": "other"}, r"manifest\.json is not igpt_ds\.features version 2 or 3: it is version 3 of 'other'"),
        ({"layers": None}, r"manifest\.json has no 'layers'"),
        ({"weights": None}, r"manifest\.json has no 'weights'"),
    ],
)
def test_manifest_of_another_kind(damaged, changes, complaint):
    change_manifest(damaged, **changes)
    with pytest.raises(ValueError, match=complaint):
        open_features(damaged, "train")


def test_a_flipped_byte_is_found_when_the_file_is_opened(damaged):
    for name, use in (
        ("layer_01_raw.npy", lambda: open_features(damaged, "train").layer(1, "raw")),
        ("layer_01_raw.npy", lambda: open_features(damaged, "train").check([0, 1], "raw")),
        ("labels.npy", lambda: open_features(damaged, "train")),
    ):
        file = damaged / "train" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{file} is damaged: its sha256 differs; make the features again"):
            use()
        file.write_bytes(content)
        use()


def test_torn_files(damaged):
    file = damaged / "train" / "layer_01_raw.npy"
    content = file.read_bytes()
    for broken in (content[:-4], content[:50], b"", b"not numpy"):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{file} is missing or torn: {len(broken)} bytes, .*make the features again"):
            open_features(damaged, "train").layer(1, "raw")
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing or torn"):
        open_features(damaged, "train").layer(1, "raw")
    change_manifest(damaged, version=2, files={})  # of older code
    for broken in (content[:-4], content[:50], b"", b"not numpy", content.replace(b"(37, 16)", b"(9**9,)")):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"features {file} (has|is not a \.npy file) .*make the features again"):
            open_features(damaged, "train").layer(1, "raw")
    np.save(file, np.zeros((3, 16), np.float32))
    with pytest.raises(ValueError, match=rf"{file} holds float32 \[3, 16\], the manifest says float32 \[\d+, 16\]"):
        open_features(damaged, "train").layer(1, "raw")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    open_features(damaged, "train").layer(1, "raw")  # which older code cannot know
    np.save(damaged / "train" / "labels.npy", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"labels\.npy holds float32 \[3\], the manifest says int64"):
        open_features(damaged, "train")
