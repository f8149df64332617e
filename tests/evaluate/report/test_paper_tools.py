"""sgd_probe, tables, figures, report and evaluate as a user runs them; bad input is one line and exit status 2."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from igpt_ds.config import get_recipe, recipe_to_dict
from igpt_ds.evaluate.report import figures_paper
from igpt_ds.evaluate.report.results import read_results
from igpt_ds.json_files import seal
from igpt_ds.train.sweep import Result, read_sweep, write_sweep

QUICK = ["--steps", 40, "--batch_images", 8, "--held_out", 0.25]


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with a config, a few rows and a picture."""
    path = tmp_path / "run"
    path.mkdir()
    about = {"format": "igpt_ds.run", "version": 1, "world_size": 2, "precision": "fp32", "git_commit": "abcdef"}
    run = about | {"recipe": recipe_to_dict(get_recipe("cifar10_nano_ar_16"))}
    (path / "run.json").write_text(json.dumps(run))
    rows = [{"step": 1, "images_seen": 64, "loss": 3.0}, {"step": 1, "images_seen": 64, "val_loss": 2.5}]
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (4, 4)).save(path / "samples.png")
    Image.new("RGB", (4, 4)).save(path / "layers.png")
    return path


@pytest.fixture
def results(tool, features_dir, tmp_path):
    """Probes of the tiny model's every layer."""
    path = tmp_path / "results.jsonl"
    assert tool("linear_probe", "--features", features_dir, "--kinds", "normed", "--C_grid", 0.1, 10, "--out", path)[0] == 0
    return path


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_sgd_probes(tool, features_dir, tmp_path):
    out = tmp_path / "sgd.jsonl"
    flags = ["--features", features_dir, "--layers", 1, 2, "--kinds", "normed", "--out", out, "--seed", 3, *QUICK]
    status, said, warned = tool("sgd_probe", *flags, "--rates", 0.1, 0.01, "--together", 1, "--standardise")
    assert status == 0
    rows = read_results(out)
    assert [(row["protocol"], row["layer"], row["steps"], row["standardised"]) for row in rows] == [
        ("sgd", 1, 40, True),
        ("sgd", 2, 40, True),
    ]
    assert f"{features_dir} layer 1 normed: rate {rows[0]['rate']:g}, held out" in said
    assert "| lr 0." in said
    assert f"{out}: 2 rows" in said
    assert len([line for line in warned.splitlines() if line.startswith("warning")]) <= 2, "one for each end"
    assert "normed layer" in warned
    assert "; widen --rates" in warned
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sgd.jsonl"], "no state is left"
    more = [
        "--save_every",
        5,
        "--window_mib",
        1,
        "--views",
        1,
        "--device",
        "cpu",
        "--train_split",
        "train",
        "--eval_split",
        "val",
    ]
    status, said, _ = tool("sgd_probe", *flags, "--rates", 1e38, 0.01, *more)
    assert status == 0
    assert "diverged at 1e+38" in said
    assert len(read_results(out)) == 4
    assert tool("figures", "layers", "--results", out, "--out", tmp_path / "a.png")[0] == 0


def test_tables_of_the_paper(tool, results, run_dir):
    status, said, _ = tool("tables", "--results", results, results, "--paper", 1, 5, "--run_dir", run_dir)
    assert status == 0
    assert said.count("### Table") == 2
    assert "`cifar10_nano_ar_16`: 0.003" in said
    assert said.endswith("|\n")
    losses = [{"step": step, "images_seen": 8 * step, "loss": loss} for step, loss in ((90, 4.0), (95, 3.0), (100, 2.0))]
    (run_dir / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    status, said, _ = tool("tables", "--results", results, "--run_dir", run_dir)
    assert status == 0
    assert said.startswith("training: 2.5000 nats/token in the last tenth of 100 steps; ln"), "a run on train+val"


def test_figures_2_to_4(tool, results, model_dir, tiny_dataset, tmp_path):
    measured = ["--results", results, "--model", model_dir, "--data", tiny_dataset]
    assert tool("evaluate", *measured, "--split", "val")[0] == 0
    assert tool("evaluate", *measured, "--split", "val", "--out", tmp_path / "likelihood.json")[0] == 0
    likelihoods = [row for row in read_results(results) if row["kind"] == "likelihood"]
    assert len(likelihoods) == 1, "the same measurement, made again"
    written = json.loads((tmp_path / "likelihood.json").read_text())
    assert likelihoods[0].json["nats_per_token"] == written["nats_per_token"]
    for figure in ("datasets", "loss", "objectives"):
        out = tmp_path / f"{figure}.png"
        assert tool("figures", figure, "--results", results, "--out", out)[:2] == (0, f"{out}\n")
        assert size(out) == (1200, 600)


def test_a_look_into_the_best_probe(tool, results, features_dir, tiny_dataset, tmp_path):
    out = tmp_path / "a.png"
    look = ["--results", results, "--features", features_dir, "--out", out]
    assert tool("figures", "confusion", *look, "--kind", "normed", "--title", "mine")[0] == 0
    assert tool("figures", "neighbours", *look, "--data", tiny_dataset, "--queries", 2, "--neighbours", 3)[0] == 0
    width, height = size(out)
    assert 4 * 96 < width < 8 * 96, "labels, a query and three neighbours, 4 pixels as 96"
    assert height > 2 * 96
    assert tool("figures", "neighbours", *look, "--data", tiny_dataset)[0] == 0


def test_confusions_of_a_fine_tuned_model(tool, tmp_path, monkeypatch):
    counted = {
        "format": "igpt_ds.confusion",
        "version": 1,
        "model_hash": "h",
        "split": "val",
        "classes": ["a", "b"],
        "counts": [[3, 1], [0, 4]],
    }
    (tmp_path / "c.json").write_text(json.dumps(counted))
    out = tmp_path / "a.png"
    assert tool("figures", "confusion", "--counts", tmp_path / "c.json", "--out", out)[:2] == (0, f"{out}\n")
    titles = []
    monkeypatch.setattr(figures_paper, "confusion_matrix", lambda counts, classes, path, title: titles.append(title))
    for title in ([], ["--title", "a model"]):
        assert tool("figures", "confusion", "--counts", tmp_path / "c.json", "--out", out, *title)[0] == 0
    assert titles == ["c, val: 87.5 % right", "a model: 87.5 % right"]
    (tmp_path / "c.json").write_text(json.dumps(seal(counted | {"version": 3})))
    status, _, said = tool("figures", "confusion", "--counts", tmp_path / "c.json", "--out", out)
    assert status == 2
    assert "is not igpt_ds.confusion version 1 or 2: it is version 3 of 'igpt_ds.confusion'; make it with" in said


def test_rates_of_sweeps(tool, tmp_path, monkeypatch):
    paths = [tmp_path / "ar" / "sweep.json", tmp_path / "scratch.json", tmp_path / "loss.json"]
    paths[0].parent.mkdir()
    for path, accuracy in zip(paths, (0.4, 0.3, None), strict=True):
        write_sweep(path, [Result(0.01, None, 7), Result(0.003, 2.0, None, accuracy)])
    assert read_sweep(paths[0]) == ([(0.01, None), (0.003, 0.6)], "best validation error")
    assert read_sweep(paths[2]) == ([(0.01, None), (0.003, 2.0)], "final validation loss, nats per token")
    out = tmp_path / "rates.png"
    assert tool("figures", "rates", *paths[:2], "--out", out)[:2] == (0, f"{out}\n")
    assert size(out) == (1200, 600)
    same = tmp_path / "x" / "ar" / "sweep.json"
    same.parent.mkdir(parents=True)
    older = {name: value for name, value in json.loads(paths[1].read_text()).items() if name != "measured"}
    same.write_text(json.dumps(seal(older)))
    assert read_sweep(same) == read_sweep(paths[1])
    drawn = []
    monkeypatch.setattr("igpt_ds.evaluate.report.figures.canvas.save_with_legend", lambda figure, axes, path: drawn.append(axes))
    assert tool("figures", "rates", paths[0], same, "--out", out)[0] == 0
    assert len({line.get_label() for line in drawn[0].get_lines() if "sweep" in line.get_label()}) == 4, (
        "of one name: by their paths"
    )
    status, _, said = tool("figures", "rates", *paths, "--out", out)
    assert status == 2
    assert "sweeps of best validation error and final validation loss, nats per token do not share an axis" in said
    paths[0].write_text("{}")
    assert (
        "sweep.json is not igpt_ds.sweep version 1 or 2: it has no 'format'; make it with tools/sweep_lr.py"
        in tool("figures", "rates", paths[0], "--out", out)[2]
    )


def test_a_report_shows_no_file_outside_the_run(tool, run_dir, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (run_dir / "link.png").symlink_to(tmp_path / "secret")
    os.mkfifo(run_dir / "fifo.png")
    status, said, told = tool("report", "--run_dir", run_dir, "--out", tmp_path / "a.html")
    assert (status, "1 pictures" in said) == (0, True)
    assert [line.split()[2] for line in told.splitlines()] == [str(run_dir / "fifo.png"), str(run_dir / "link.png")]
    status, _, told = tool("report", "--run_dir", run_dir, "--pictures", tmp_path / "secret", "--out", tmp_path / "b.html")
    assert status == 2
    assert f"{tmp_path / 'secret'} is not a PNG file" in told


def test_a_report_shows_where_the_time_went(tool, run_dir, tmp_path):
    seconds = {"building": 3.0, "step": 6.0}
    row = {"event": "exit", "time": "2026-11-30T00:00:10", "step": 7, "seconds": seconds, "phase": "end"}
    begin = {"event": "begin", "began": "2026-11-30T00:00:00", "time": "2026-11-30T00:00:00", "step": 0, "seconds": {}}
    (run_dir / "restarts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (begin, row)))
    assert tool("report", "--run_dir", run_dir, "--out", tmp_path / "a.html")[0] == 0
    text = (tmp_path / "a.html").read_text()
    assert "<h2>Goodput</h2>" in text
    assert "goodput 60.0 %, 6 s of training kept in 10 s of wall clock, 1 start" in text
    assert "<td>unexplained</td><td>1.0</td><td>10.00</td>" in text


def test_a_report(tool, results, run_dir, tmp_path):
    out = tmp_path / "deep" / "report.html"
    status, said, _ = tool("report", "--run_dir", run_dir, "--results", results, "--paper", 5, "--title", "mine", "--out", out)
    assert (status, said.startswith(f"{out}: 2 curves, 3 results, 1 pictures, ")) == (0, True), said
    assert "<title>mine</title>" in out.read_text()
    shutil.copy(results, run_dir / "results.jsonl")
    status, said, _ = tool("report", "--run_dir", run_dir, "--pictures", "--out", out)
    assert (status, said.startswith(f"{out}: 2 curves, 3 results, 0 pictures, ")) == (0, True), said
    (run_dir / "results.jsonl").unlink()
    (run_dir / "train.jsonl").write_text("")
    assert tool("report", "--run_dir", run_dir, "--out", out)[1].startswith(f"{out}: 0 curves, 0 results, 1 pictures, ")


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("sgd_probe", ["--features", "FEATURES", "--layers", 9, "--out", "OUT"], "features hold layers 0..2, in"),
        ("sgd_probe", ["--features", "FEATURES", "--layers", "1,9", "--out", "OUT"], "features hold layers 0..2, in"),
        ("sgd_probe", ["--features", "FEATURES", "--layers", "2,1", "--out", "OUT"], "--layers: '2,1' is not a layer, as 20,"),
        ("sgd_probe", ["--features", "FEATURES", "--results", "x", "--out", "OUT"], "--results is for --protocol concat"),
        (
            "sgd_probe",
            ["--features", "FEATURES", "--protocol", "concat", "--layers", "1,2", "--out", "OUT"],
            "--layers 1,2 is for --protocol every_layer",
        ),
        ("sgd_probe", ["--features", "FEATURES", "--protocol", "concat", "--out", "OUT"], "concat needs 5 layers"),
        ("sgd_probe", ["--features", "FEATURES", "--save_every", 0, "--out", "OUT"], "--save_every 0 must be at least 1"),
        ("sgd_probe", ["--features", "FEATURES", "--rates", -1, "--out", "OUT"], "--rates -1 must be positive"),
        ("sgd_probe", ["--features", "FEATURES", "--views", 5, "--out", "OUT"], "--views 5 does not divide the 37 rows"),
        ("tables", ["--results", "none.jsonl"], "--results none.jsonl does not exist"),
        ("tables", ["--results", "RESULTS", "--paper", 1, "--dataset", "x"], "--dataset x has no meaning with --paper"),
        ("figures", ["datasets", "--out", "OUT.png"], "datasets reads --results FILES and nothing else"),
        ("figures", ["objectives", "--results", "x", "--dataset", "y", "--out", "OUT.png"], "objectives reads --results FILES"),
        ("figures", ["loss", "--results", "x", "--out", "figure.pdf"], "--out figure.pdf must end in .png"),
        ("figures", ["loss", "RUN", "--results", "x", "--out", "OUT.png"], "loss reads --results FILES, and --dataset"),
        ("figures", ["loss", "--results", "RESULTS", "--out", "OUT.png"], "no model has both a probe and a likelihood"),
        ("figures", ["confusion", "--results", "x", "--out", "OUT.png"], "confusion reads --results FILES and --features DIR"),
        (
            "figures",
            ["confusion", "--results", "RESULTS", "--features", "FEATURES", "--kind", "raw", "--out", "OUT.png"],
            "the results hold no probe of kind raw of the model of",
        ),
        (
            "figures",
            ["confusion", "--results", "RESULTS", "--features", "PIXELS", "--out", "OUT.png"],
            "the results hold no probe of the model of",
        ),
        (
            "figures",
            ["neighbours", "--results", "x", "--features", "y", "--data", "z", "--title", "t", "--out", "OUT.png"],
            "the figure neighbours has captions and no --title; omit it",
        ),
        ("report", ["--run_dir", "none", "--out", "OUT.html"], "run config none/run.json does not exist"),
        ("report", ["--run_dir", "none", "--out", "OUT"], "must end in .html or .htm"),
        ("report", ["--run_dir", "none", "--pictures", "no.png", "--out", "a.html"], "--pictures no.png does not exist"),
    ],
)
def test_bad_input(tool, results, features_dir, pixels_dir, tmp_path, name, arguments, complaint):
    real = {"FEATURES": features_dir, "PIXELS": pixels_dir, "RESULTS": results}
    real |= {"OUT": tmp_path / "out", "OUT.html": tmp_path / "out.html", "OUT.png": tmp_path / "out.png"}
    status, _, said = tool(name, *(real.get(word, word) for word in arguments))
    assert status == 2
    assert said.splitlines()[-1].startswith(f"{name}.py: error: ")
    assert complaint in said.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


def test_neighbours_want_the_shards_of_the_features(tool, results, features_dir, tiny_dataset, tmp_path):
    other = tmp_path / "shards"
    shutil.copytree(tiny_dataset, other)
    manifest = json.loads((Path(features_dir) / "manifest.json").read_text())
    manifest["splits"]["val"]["dataset_hash"] = "another"
    moved = tmp_path / "features"
    shutil.copytree(features_dir, moved)
    (moved / "manifest.json").write_text(json.dumps(seal(manifest)))
    flags = ["--results", results, "--features", moved, "--data", other, "--out", tmp_path / "a.png"]
    status, _, said = tool("figures", "neighbours", *flags)
    assert status == 2
    assert "does not hold features of the images in" in said
