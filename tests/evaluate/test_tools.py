"""The three tools as a user runs them: shards to features to rows to figures; bad input is one line and exit status 2."""

from __future__ import annotations

import json
import runpy
import struct
import sys
from pathlib import Path

import pytest

from igpt_ds.evaluate.features import open_features
from igpt_ds.evaluate.results import read_results

TOOLS = Path(__file__).parents[2] / "tools"


def png_size(path):
    """Width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool("name", *arguments) -> (exit status, stdout, stderr), in this process, as `python tools/name.py` would."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


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
    assert open_features(directories[1], "val").manifest["seed"] == 3

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
    assert tool("linear_probe", "--features", directories[0], "--out", results, *again)[0] == 0
    assert len(read_results(results)) == 13
    assert read_results(results)[-1]["layer"] == 1

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
    assert (features.layers, features.kinds, features.manifest["precision"]) == ([0, 2], ["raw"], "bf16")
    assert list(features.manifest["splits"]) == ["val"]


def test_warnings_of_a_probe(tool, pixels_dir, tmp_path):
    status, _, said = tool(
        "linear_probe", "--features", pixels_dir, "--out", tmp_path / "r.jsonl", "--C_grid", 1e-9, 1e-8, "--tol", 1e-30
    )
    assert status == 0
    assert "warning" in said
    assert "end; widen --C_grid" in said
    assert "not converged, gradient" in said


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the files that the training figure reads: made(name, n_vocab)."""

    def make(name, n_vocab=16):
        path = tmp_path / name
        path.mkdir()
        run = {"format": "igpt_ds.run", "version": 1, "recipe": {"model": {"n_vocab": n_vocab}}}
        (path / "run.json").write_text(json.dumps(run))
        (path / "train.jsonl").write_text('{"step": 1, "loss": 2.7}\n{"step": 1, "val_loss": 2.6}\n{"step": 2, "lo')
        return path

    return make


def test_training_figure(tool, run_dir, tmp_path):
    one, two, other = run_dir("one"), run_dir("two"), run_dir("other", 512)
    assert tool("figures", "training", one, two, "--out", tmp_path / "t.png") == (0, f"{tmp_path}/t.png\n", "")
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
        ("extract_features", ["--model", "MODEL", "--data", "SHARDS", "--layers", 3, "--out", "OUT"], "--layers 3 is not there"),
        ("extract_features", ["--model", "MODEL", "--data", "SHARDS", "--out", "FEATURES"], "exists already"),
        ("linear_probe", ["--features", "none", "--out", "OUT"], "none is no feature directory"),
        ("linear_probe", ["--features", "FEATURES", "--eval_split", "test", "--out", "OUT"], "has no split 'test'"),
        ("linear_probe", ["--features", "FEATURES", "--layers", 9, "--out", "OUT"], "features hold layers 0..2, from"),
        ("linear_probe", ["--features", "FEATURES", "--device", "cuda", "--out", "OUT"], "torch sees no GPU"),
        ("linear_probe", ["--features", "FEATURES", "--C_grid", 0, "--out", "OUT"], "C_grid=[0.0] must hold positive numbers"),
        ("figures", ["layers", "--out", "OUT"], "layers reads --results FILE"),
        ("figures", ["layers", "RUN", "--results", "x", "--out", "OUT"], "layers reads --results FILE"),
        ("figures", ["layers", "--results", "none", "--out", "OUT"], "the results hold no rows; probe first"),
        ("figures", ["training", "--out", "OUT"], "training reads run directories"),
        ("figures", ["training", "none", "--results", "x", "--out", "OUT"], "training reads run directories"),
        ("figures", ["training", "none", "--out", "OUT"], "run config none/run.json does not exist"),
    ],
)
def test_bad_input(tool, model_dir, tiny_dataset, features_dir, tmp_path, name, arguments, complaint):
    real = {"SHARDS": tiny_dataset, "MODEL": model_dir, "FEATURES": features_dir, "OUT": tmp_path / "out"}
    status, _, said = tool(name, *(real.get(word, word) for word in arguments))
    assert status == 2
    last = said.splitlines()[-1]
    assert last.startswith(f"{name}.py: error: ")
    assert complaint in last
    assert not (tmp_path / "out").exists()
