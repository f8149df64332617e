"""The three tools as a user runs them: shards to features to rows to figures; bad input is one line and exit status 2."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from igpt_ds.config import get_recipe, override, recipe_to_dict
from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.report.results import read_results


def png_size(path):
    """Width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


def test_the_way_from_shards_to_figures(launch, tool, model_dir, tiny_dataset, tmp_path):
    directories = [tmp_path / name for name in ("trained", "untrained", "pixels")]
    for out, more in zip(
        directories, (["--model", model_dir], ["--model", model_dir, "--untrained", 3], ["--pixels"]), strict=True
    ):
        status, said, _ = tool("extract_features", *more, "--data", tiny_dataset, "--out", out)
        assert status == 0
        assert f"{out}: 48 images, layers" in said
        assert "MiB" in said
        assert "images/s" in said
    assert open_features(directories[1], "val").manifest.origin.seed == 3

    results = tmp_path / "results.jsonl"
    done = launch(["tools/linear_probe.py", "--features", *directories, "--out", results, "--C_grid", "0.001", "0.1", "10"])
    assert done.returncode == 0, done.stderr
    rows = read_results(results)
    assert len(rows) == 2 * 2 * 3 + 1
    assert f"{directories[0]} layer 2 raw: C " in done.stdout
    assert "| raw pixels | - | 48 |" in done.stdout
    assert f"{results}: 13 rows" in done.stdout
    again = [
        "--layers",
        1,
        "--kinds",
        "raw",
        "--seed",
        0,
        "--device",
        "cpu",
        "--max_train",
        len(open_features(directories[0], "train").labels),
    ]
    again += ["--C_grid", 0.001, 0.1, 10]
    assert tool("linear_probe", "--features", directories[0], "--out", results, *again)[0] == 0
    assert len(read_results(results)) == 13
    assert read_results(results)[-1]["layer"] == 1
    for more in (["--tol", 1e-5], ["--C_grid", 0.1, 1], ["--precision", "fp64"]):
        other = tmp_path / "other.jsonl"
        assert tool("linear_probe", "--features", directories[0], "--out", other, *again, *more)[0] == 0
    assert len(read_results(other)) == 3, "probes of other settings are other results"

    assert tool("figures", "layers", "--results", results, "--out", tmp_path / "layers.png")[:2] == (
        0,
        f"{tmp_path}/layers.png\n",
    )
    assert png_size(tmp_path / "layers.png") == (1200, 600)


def test_flags_reach_their_place(tool, model_dir, tiny_dataset, tmp_path):
    more = ["--splits", "val", "--layers", 2, 0, "--kinds", "raw", "--batch", 5, "--device", "cpu", "--precision", "bf16"]
    status, said, _ = tool("extract_features", "--model", model_dir, "--data", tiny_dataset, "--out", tmp_path / "f", *more)
    assert status == 0
    assert "layers 0, 2, raw, 16 features" in said
    features = open_features(tmp_path / "f", "val")
    assert (features.layers, features.kinds, features.manifest.origin.precision) == ([0, 2], ["raw"], "bf16")
    assert list(features.manifest.splits) == ["val"]


def test_parts_and_streams_through_the_tool(tool, model_dir, tiny_dataset, tmp_path):
    common = ["--model", model_dir, "--data", tiny_dataset, "--batch", 4, "--dtype", "fp16", "--layers", 0, 2]
    for part in ("1/2", "0/2"):
        status, said, _ = tool("extract_features", *common, "--part", part, "--out", tmp_path / "parts")
        assert status == 0
        assert f"part {part[0]}: " in said
    status, said, _ = tool("extract_features", "--merge", 2, "--out", tmp_path / "parts")
    assert (status, said.splitlines()[0]) == (0, f"{tmp_path}/parts: 48 images of 2 parts")
    assert said.splitlines()[1].startswith(f"next: python tools/linear_probe.py --features {tmp_path}/parts ")
    assert tool("extract_features", *common, "--stream_layers", 8, "--out", tmp_path / "streamed")[0] == 0
    for path in ("parts", "streamed"):
        features = open_features(tmp_path / path, "train")
        assert (features.layers, features.layer(2, "raw").dtype) == ([0, 2], np.float16)
    one, other = (np.asarray(open_features(tmp_path / path, "val").layer(2, "raw")) for path in ("parts", "streamed"))
    assert np.array_equal(one, other)


def test_protocols_through_the_tool(tool, make_model_dir, tiny_dataset, tmp_path):
    bert = make_model_dir(tmp_path / "bert", objective="bert", mask_prob=0.15, n_layer=4)
    masks = ["--mask_draws", 1, 5, "--mask_seed", 3]
    assert tool("extract_features", "--model", bert, "--data", tiny_dataset, *masks, "--out", tmp_path / "f")[0] == 0
    out, grid = tmp_path / "r.jsonl", ["--C_grid", 0.01, 0.1, 1]
    common = ["--features", tmp_path / "f", "--kinds", "normed", *grid, "--out", out, "--protocol"]
    status, said, _ = tool("linear_probe", *common, "concat")
    assert status == 0
    assert "layer 0+1+2+3+4 normed: C " in said
    assert tool("linear_probe", *common, "low_data", "--n_labels", 6, 15, "--subsets", 3)[0] == 0
    status, said, _ = tool("linear_probe", *common, "mask_vote", "--layers", 2, "--n_masks", 4)
    assert status == 0
    assert "one mask " in said
    rows = read_results(out)
    assert [row["protocol"] for row in rows] == ["concat", "low_data", "low_data", "mask_vote"]
    assert (rows[0]["layers"], rows[0]["n_features"]) == ([0, 1, 2, 3, 4], 80)
    assert [(row["n_labels"], len(row["subset_accuracies"])) for row in rows[1:3]] == [(6, 3), (15, 3)]
    assert rows[1]["layer_chosen_by"] == "held-out tenth of all labels"
    assert (rows[3]["layer"], rows[3]["n_masks"], rows[3]["mask_seed"]) == (2, 4, 3)
    assert tool("linear_probe", *common, "low_data", "--n_labels", 6, "--subsets", 3)[0] == 0
    assert len(read_results(out)) == 4, "measured again"
    one = ["--layers", 2, "--n_labels", 6, "--subsets", 1]
    _, said, _ = tool("linear_probe", *common[:-2], tmp_path / "one.jsonl", "--protocol", "low_data", *one)
    assert "% over one subset\n" in said
    status, said, _ = tool("linear_probe", *common[:-1], "--layers", "1,3")
    assert (status, "layer 1+3 normed: C " in said) == (0, True)
    assert [(row["protocol"], row["layers"]) for row in read_results(out)[-1:]] == [("concat", [1, 3])]
    concat_by_sgd(tool, tmp_path / "f", tmp_path)


def concat_by_sgd(tool, features, directory):
    """Five layers around the best one; a row of an earlier probe is not fitted again."""
    flags = ["--features", features, "--kinds", "normed", "--rates", 0.1, "--steps", 20, "--batch_images", 8]
    first, out = directory / "first.jsonl", directory / "sgd.jsonl"
    assert f"{first}: 2 rows\n" in tool("sgd_probe", *flags, "--layers", 1, "0,2", 1, "0,2", "--out", first)[1]
    assert [(row["protocol"], row["layer"], row.get("layers")) for row in read_results(first)] == [
        ("sgd", 1, None),
        ("concat", 2, [0, 2]),
    ]
    status, said, _ = tool("sgd_probe", *flags, "--protocol", "concat", "--results", first, "--out", out)
    assert status == 0
    assert f"{features} normed: rows of earlier probes give layers 1\n" in said
    rows = read_results(out)
    assert [(row["protocol"], row["layer"]) for row in rows[:-1]] == [("sgd", layer) for layer in (0, 2, 3, 4)]
    single = {row.layer: row.held_out_accuracy for row in (read_results(first)[0], *rows[:-1])}
    best = max(single, key=lambda layer: (single[layer], -layer))
    assert (rows[-1]["protocol"], rows[-1]["layer"], rows[-1]["layers"]) == ("concat", best, [0, 1, 2, 3, 4])
    assert (rows[-1]["n_features"], f"normed: the best layer is {best}, held out" in said) == (80, True)
    assert "| 0..4 | 80 | lr 0.1 |" in said


def test_one_warning_for_many_layers(tool, features_dir, pixels_dir, tmp_path):
    words = ["--features", features_dir, pixels_dir, "--out", tmp_path / "r.jsonl", "--C_grid", 1e-9, "--tol", 1e-30]
    status, _, said = tool("linear_probe", *words, "--kinds", "normed")
    assert status == 0
    assert len([line for line in said.splitlines() if "not converged" in line]) == 1
    assert len([line for line in said.splitlines() if line.startswith("warning")]) <= 3
    line = next(line for line in said.splitlines() if "not converged" in line)
    assert f"{features_dir} normed layers 0..2" in line
    assert f"{pixels_dir} pixels layer 0" in line


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the files that the training figure reads: made(name, n_vocab)."""

    def make(name, n_vocab=16):
        path = tmp_path / name
        path.mkdir()
        recipe = recipe_to_dict(override(get_recipe("digits_nano_ar_8"), n_vocab=n_vocab))
        run = {"format": "igpt_ds.run", "version": 1, "recipe": recipe, "world_size": 1, "precision": "fp32"}
        (path / "run.json").write_text(json.dumps(run))
        (path / "train.jsonl").write_text(
            '{"step": 1, "images_seen": 8, "loss": 2.7}\n{"step": 1, "images_seen": 8, "val_loss": 2.6}\n{"step": 2, "lo'
        )
        return path

    return make


def test_training_figure(tool, run_dir, tmp_path):
    one, two, other = run_dir("one"), run_dir("two"), run_dir("other", 512)
    torn = "".join(f"{path}/train.jsonl line 3 is torn and was left out\n" for path in (one, two))
    assert tool("figures", "training", one, two, "--out", tmp_path / "t.png") == (0, f"{tmp_path}/t.png\n", torn)
    assert png_size(tmp_path / "t.png") == (1200, 600)
    status, _, said = tool("figures", "training", one, other, "--out", tmp_path / "u.png")
    assert status == 2
    assert f"palettes of different sizes do not compare ({one} 16, {other} 512)" in said
    assert not (tmp_path / "u.png").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("extract_features", ["--data", "SHARDS", "--out", "OUT"], "--model is missing; name a model dir, or give --pixels"),
        ("extract_features", ["--pixels", "--model", "MODEL", "--data", "SHARDS", "--out", "OUT"], "--pixels needs no model"),
        ("extract_features", ["--pixels", "--untrained", 0, "--data", "SHARDS", "--out", "OUT"], "--pixels needs no model"),
        (
            "extract_features",
            ["--model", "none", "--data", "SHARDS", "--out", "OUT"],
            "model config none/config.json does not exist",
        ),
        ("extract_features", ["--model", "MODEL", "--data", "none", "--out", "OUT"], "none is no shard directory"),
        ("extract_features", ["--model", "MODEL", "--data", "SHARDS", "--splits", "test", "--out", "OUT"], "has no split 'test'"),
        (
            "extract_features",
            ["--model", "MODEL", "--data", "SHARDS", "--layers", 3, "--out", "OUT"],
            "--layers 3 does not exist",
        ),
        ("extract_features", ["--model", "MODEL", "--data", "SHARDS", "--out", "FEATURES"], "exists already"),
        ("extract_features", ["--out", "OUT"], "--data is missing; name the shards, or give --images or --merge"),
        ("extract_features", ["--merge", 0, "--out", "OUT"], "--merge 0 must be at least 1"),
        ("extract_features", ["--merge", 2, "--out", "OUT"], "out.part-0-of-2 does not exist; extract it with --part"),
        ("extract_features", ["--pixels", "--part", "0/2", "--data", "SHARDS", "--out", "OUT"], "--pixels needs no model"),
        (
            "extract_features",
            ["--model", "MODEL", "--data", "SHARDS", "--stream_layers", 0, "--out", "OUT"],
            "--stream_layers 0: name at least 1 image",
        ),
        (
            "extract_features",
            ["--model", "MODEL", "--untrained", 1, "--data", "SHARDS", "--stream_layers", 8, "--out", "OUT"],
            "--stream_layers with --untrained: name at least 1 image, and a trained model",
        ),
        (
            "extract_features",
            ["--model", "MODEL", "--data", "SHARDS", "--mask_draws", 1, "--out", "OUT"],
            "only bert models see masked images",
        ),
        (
            "linear_probe",
            ["--features", "FEATURES", "--protocol", "concat", "--out", "OUT"],
            "concat needs 5 layers and the features hold 0..2",
        ),
        (
            "linear_probe",
            ["--features", "FEATURES", "--protocol", "concat", "--max_train", 9, "--out", "OUT"],
            "--max_train is only for --protocol every_layer, not concat; omit it",
        ),
        ("linear_probe", ["--features", "FEATURES", "--subsets", 0, "--out", "OUT"], "--subsets 0 must be at least 1"),
        ("linear_probe", ["--features", "FEATURES", "--n_masks", 0, "--out", "OUT"], "--n_masks 0 must be at least 1"),
        ("linear_probe", ["--features", "FEATURES", "--seed", -1, "--out", "OUT"], "error: --seed -1 must be at least 0"),
        ("sgd_probe", ["--features", "FEATURES", "--seed", -1, "--out", "OUT"], "error: --seed -1 must be at least 0"),
        ("sgd_probe", ["--features", "FEATURES", "--together", 0, "--out", "OUT"], "error: --together 0 must be at least 1"),
        ("sgd_probe", ["--features", "FEATURES", "--window_mib", 0, "--out", "OUT"], "error: --window_mib 0 must be at least 1"),
        (
            "extract_features",
            ["--model", "MODEL", "--data", "SHARDS", "--splits", "train", "train", "--out", "OUT"],
            "--splits train train names 'train' twice; name each once",
        ),
        (
            "extract_features",
            ["--model", "MODEL", "--data", "SHARDS", "--kinds", "raw", "raw", "--out", "OUT"],
            "--kinds raw raw names 'raw' twice; name each once",
        ),
        (
            "linear_probe",
            ["--features", "FEATURES", "--protocol", "low_data", "--out", "OUT"],
            "--n_labels 40 must be a multiple of the 3 classes",
        ),
        (
            "linear_probe",
            ["--features", "FEATURES", "--protocol", "mask_vote", "--out", "OUT"],
            "is of a model with objective 'ar'; only bert models see masks, which vote",
        ),
        ("linear_probe", ["--features", "none", "--out", "OUT"], "none is no feature directory"),
        ("linear_probe", ["--features", "FEATURES", "--eval_split", "test", "--out", "OUT"], "has no split 'test'"),
        ("linear_probe", ["--features", "FEATURES", "--layers", 9, "--out", "OUT"], "features hold layers 0..2, in"),
        ("linear_probe", ["--features", "FEATURES", "--device", "cuda", "--out", "OUT"], "torch sees no GPU"),
        ("linear_probe", ["--features", "FEATURES", "--C_grid", 0, "--out", "OUT"], "C_grid=0 must be greater than 0"),
        ("figures", ["layers", "--out", "OUT.png"], "layers reads --results FILE"),
        ("figures", ["layers", "RUN", "--results", "x", "--out", "OUT.png"], "layers reads --results FILE"),
        ("figures", ["layers", "--results", "none", "--out", "OUT.png"], "--results none does not exist; make it with"),
        ("figures", ["training", "--out", "OUT.png"], "training reads run directories"),
        ("figures", ["training", "none", "--results", "x", "--out", "OUT.png"], "training reads run directories"),
        ("figures", ["plan", "--out", "OUT.png"], "plan reads files of"),
        (
            "figures",
            ["plan", "none.json", "--log", "--out", "OUT.png"],
            "--log is only for the figure training; omit it for plan",
        ),
        ("figures", ["plan", "ds_configs/zero3_bf16.json", "--out", "OUT.png"], "ds_configs/zero3_bf16.json is no table of"),
        ("figures", ["training", "none", "--out", "OUT.png"], "run config none/run.json does not exist"),
    ],
)
def test_bad_input(tool, model_dir, tiny_dataset, features_dir, tmp_path, name, arguments, complaint):
    real = {
        "SHARDS": tiny_dataset,
        "MODEL": model_dir,
        "FEATURES": features_dir,
        "OUT": tmp_path / "out",
        "OUT.png": tmp_path / "out.png",
    }
    status, _, said = tool(name, *(real.get(word, word) for word in arguments))
    assert status == 2
    last = said.splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ")
    assert complaint in last
    assert not (tmp_path / "out").exists()
