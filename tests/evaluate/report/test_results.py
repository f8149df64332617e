"""Result rows: written, replaced, read back, and made into tables."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from igpt_ds.evaluate.features.files import open_features
from igpt_ds.evaluate.likelihood import Likelihood, Summary
from igpt_ds.evaluate.probes.linear import ProbeSettings, linear_probe
from igpt_ds.evaluate.report import results
from igpt_ds.evaluate.report.results import (
    add_results,
    best_row,
    by_layer,
    experiment,
    finetune_row,
    likelihood_row,
    make_row,
    model_parameters,
    read_all,
    read_results,
    series,
)
from igpt_ds.evaluate.report.row_names import label, model_name
from igpt_ds.evaluate.report.row_types import MeanWithError, as_row
from igpt_ds.evaluate.report.tables import layer_table, markdown_table
from igpt_ds.json_files import json_line


@pytest.fixture(scope="module")
def row(features_dir):
    """The row of a real probe."""
    train, val = (open_features(features_dir, split) for split in ("train", "val"))
    return make_row(linear_probe(train, val, 1, "normed", ProbeSettings.of([0.01, 1.0, 100.0])), train, val)


@pytest.fixture(scope="module")
def rows(row):
    """Trained normed and raw, untrained and pixels, three layers each, with accuracies that are easy to read."""

    def made(weights, kind, layer, held_out, accuracy, **more):
        about = {"weights": weights, "features": kind, "layer": layer, "held_out_accuracy": held_out, "accuracy": accuracy}
        return row | about | {"model_hash": f"{weights}-hash", "n_train": 36, "n_eval": 12, "C": 0.1} | more

    return [
        made("pixels", "pixels", 0, 0.4, 0.41, model_hash=None, step=None, n_features=48),
        *(made("untrained", "normed", layer, 0.2, 0.5 + layer / 100, step=0) for layer in range(3)),
        *(made("trained", "raw", layer, 0.5 + layer / 10, 0.6) for layer in (2, 1, 0)),
        *(made("trained", "normed", layer, [0.5, 0.9, 0.8][layer], [0.99, 0.7, 0.8][layer]) for layer in range(3)),
    ]


def test_a_row_says_everything(row, features_dir):
    manifest = json.loads((features_dir / "manifest.json").read_text())
    assert as_row(json.loads(json.dumps(row.json))) == row
    assert (row["format"], row["version"], row["kind"], row["protocol"]) == ("igpt_ds.result", 3, "probe", "every_layer")
    assert row["model"] == {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_px": 4, "n_vocab": 8}
    assert (row["feature_precision"], row["feature_dtype"]) == ("fp32", "fp32")
    assert (row["features"], row["layer"], row["weights"], row["step"]) == ("normed", 1, "trained", 7)
    assert row["model_hash"] == manifest["model_hash"]
    assert row["dataset_hash"] == {split: manifest["splits"][split]["dataset_hash"] for split in ("train", "val")}
    assert (row["train_split"], row["eval_split"], row["n_features"]) == ("train", "val", 16)
    assert row["C"] in row["C_grid"]
    for name in ("held_out_accuracy", "accuracy", "objective", "grad_norm", "iterations", "converged", "seed", "git_commit"):
        assert name in row


def test_two_writers_lose_no_row(tmp_path, rows):
    path, values = tmp_path / "results.jsonl", json.dumps([row.json for row in rows[:1]])
    add = (
        "import json, pathlib, sys\nfrom igpt_ds.evaluate.report.results import add_results, as_row\n"
        f"row = json.loads({values!r})[0]\nprint(flush=True)\nsys.stdin.readline()\n"
        f"path = pathlib.Path({str(path)!r})\n"
        "for seed in range(int(sys.argv[1]), 40, 2):\n    add_results(path, [as_row(row | {'seed': seed})])\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writers = [subprocess.Popen([sys.executable, "-c", add, str(first)], **pipes) for first in range(2)]
    for writer in writers:
        writer.stdout.readline()
    for writer in writers:
        writer.communicate(b"go\n")
        assert writer.returncode == 0
    assert sorted(row.seed for row in read_results(path)) == list(range(40))
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_rerun_replaces_its_row(tmp_path, rows):
    path = tmp_path / "runs" / "results.jsonl"
    assert read_results(path) == []
    few = rows[1] | {"protocol": "low_data", "subset_accuracies": [0.1, 0.2]}
    add_results(path, [few])
    add_results(path, [few | {"n_subsets": 2, "accuracy": 0.9}])
    assert [row["accuracy"] for row in read_results(path)] == [0.9], "older rows did not say how many subsets"
    path.unlink()
    add_results(path, rows[:3])
    add_results(path, rows[3:])
    assert read_results(path) == rows
    again = rows[1] | {"accuracy": 0.123, "git_commit": "later"}
    add_results(path, [again])
    assert read_results(path) == [rows[0], *rows[2:], again]
    different = {
        "seed": 1,
        "n_train": 7,
        "dataset_hash": {"train": "x", "val": "y"},
        "model_hash": "z",
        "feature_precision": "bf16",
        "feature_dtype": "fp16",
        "C_grid": [1.0],
        "tol": 1e-3,
        "precision": "fp64",
        "protocol": "sgd",
        "layers": [0, 1],
        "n_labels": 40,
        "mask_draws": 5,
        "mask_seed": 1,
    }
    for name, value in different.items():
        assert again.get(name) != value
        add_results(path, [again | {name: value}])
    assert len(read_results(path)) == len(rows) + len(different)
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"], "nothing temporary may stay behind"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", r"results\.jsonl line 2 is not valid JSON: .*; remove the line"),
        (
            '{"format": "igpt_ds.result", "version": 9}',
            r"results\.jsonl line 2 is not igpt_ds\.result version 2 or 3: it is version 9",
        ),
        ("[1]", r"results\.jsonl line 2 is not valid JSON"),
        ('{"format": "igpt_ds.result", "version": 1}', r"results\.jsonl line 2 is not igpt_ds\.result version 2"),
        (
            '{"format": "igpt_ds.result", "version": 2, "kind": "guess"}',
            r"line 2 is of kind 'guess', not one of probe, finetune, likelihood; remove it",
        ),
        ('{"format": "igpt_ds.result", "version": 2, "kind": "probe"}', r"results\.jsonl line 2 has no 'weights'"),
        ('{"format": "igpt_ds.result", "version": 2, "kind": "likelihood"}', r"results\.jsonl line 2 has no 'weights'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, rows, line, complaint):
    path = tmp_path / "results.jsonl"
    text = json_line(rows[0].json) + line + "\n" + json_line(rows[1].json)
    path.write_text(text)
    for action in (lambda: read_results(path), lambda: add_results(path, rows)):
        with pytest.raises(ValueError, match=complaint):
            action()
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda shape: shape.pop("n_px"), "has no 'model.n_px'"),
        (lambda shape: shape.update(n_head=0), "field 'model' has n_head=0 must be a whole number"),
        (lambda shape: shape.update(depth=3), "field 'model' has an unknown field depth 3"),
        (dict.clear, "has no 'model.n_layer'"),
    ],
)
def test_a_row_of_a_model_without_a_shape_is_refused(tmp_path, rows, change, complaint):
    values = json.loads(json.dumps(rows[1].json))
    change(values["model"])
    path = tmp_path / "results.jsonl"
    path.write_text(json_line(values))
    with pytest.raises(ValueError, match=re.escape(f"{path} line 1 {complaint}")):
        read_results(path)


def test_series_and_their_best_layers(rows):
    found = series(list(reversed(rows)))
    assert [(one[0]["weights"], one[0]["features"]) for one in found] == [
        ("trained", "normed"),
        ("trained", "raw"),
        ("untrained", "normed"),
        ("pixels", "pixels"),
    ]
    assert all([row["layer"] for row in one] == sorted(row["layer"] for row in one) for one in found)
    assert [best_row(one)["layer"] for one in found] == [1, 2, 0, 0], "by the held-out images; of equals the lowest"


def test_tables(rows):
    assert markdown_table(list(reversed(rows))) == markdown_table(rows)
    assert markdown_table(rows).splitlines() == [
        "| images | features | best layer | width | C | held out | accuracy | minus pixels | minus untrained |",
        "|---|---|---|---|---|---|---|---|---|",
        "| shards: 36 train, 12 val | trained to step 7, normed | 1 of 0..2 | 16 | 0.1 | 90.0 | 70.0 | +29.0 | +20.0 |",
        "| shards: 36 train, 12 val | trained to step 7, raw | 2 of 0..2 | 16 | 0.1 | 70.0 | 60.0 | +19.0 | +10.0 |",
        "| shards: 36 train, 12 val | untrained, normed | 0 of 0..2 | 16 | 0.1 | 20.0 | 50.0 | +9.0 |  |",
        "| shards: 36 train, 12 val | raw pixels | - | 48 | 0.1 | 40.0 | 41.0 |  |  |",
    ]
    assert layer_table([row for row in rows if row["layer"] or row["features"] == "normed"]).splitlines() == [
        "| layer | trained to step 7, normed | trained to step 7, raw | untrained, normed |",
        "|---|---|---|---|",
        "| 0 | 99.0 | - | 50.0 |",
        "| 1 | 70.0 | 60.0 | 51.0 |",
        "| 2 | 80.0 | 60.0 | 52.0 |",
    ]


def test_a_table_says_where_pixels_win(rows):
    trained = [row for row in rows if row["weights"] == "trained"]
    better = rows[0] | {"accuracy": 0.65}
    others = [better | {"dataset_hash": {"train": "other"}}, better | {"n_train": 9}, better | {"n_labels": 4}]
    assert markdown_table(trained, [*trained, *others]).count("| not measured | not measured |") == 2, "other images and labels"
    table, _, said = markdown_table(trained, [*trained, better]).partition("\n\n")
    assert "| 70.0 | +5.0 | not measured |" in table
    assert "| 60.0 | -5.0 | not measured |" in table
    assert said == ("- Caution: raw pixels are better than trained to step 7, raw on shards by 5.0 points (65.0 against 60.0 %).")


def test_an_sgd_probe_shows_its_rate(rows):
    values = {name: value for name, value in rows[-1].json.items() if name != "C"}
    row = as_row(values | {"protocol": "sgd", "rate": 0.3})
    assert "| 16 | lr 0.3 | 80.0 | 80.0 | not measured | not measured |" in markdown_table([row])
    assert "| width | C or lr | held out |" in markdown_table([row])
    assert "| 16 | - | 80.0 | 80.0 | not measured |" in markdown_table(
        [as_row(values | {"protocol": "sgd"})]
    )  # any value can be missing


def test_settings_that_only_another_protocol_has_are_no_difference(rows):
    by_lbfgs = rows[-1] | {"tol": 1e-6, "steps": None, "batch_images": None, "C_grid": [0.1, 1.0]}
    by_sgd = by_lbfgs | {"protocol": "sgd", "tol": None, "steps": 40, "batch_images": 128, "C_grid": None}
    among = [by_lbfgs, by_sgd, by_sgd | {"steps": 80}]
    assert [label(one, among) for one in among] == [
        "trained to step 7, normed, protocol every_layer",
        "trained to step 7, normed, protocol sgd, steps 40",
        "trained to step 7, normed, protocol sgd, steps 80",
    ]


def test_what_looks_alike_is_told_apart(rows):
    trained = rows[-1]
    other = trained | {"model_hash": "another-model"}
    assert label(trained, rows) == "trained to step 7, normed"
    assert label(other, [*rows, other]) == "trained to step 7 another-, normed"
    assert label(trained | {"step": 9}, [*rows, other]) == "trained to step 9, normed"
    assert label(trained | {"mask_draws": 5}, rows) == "trained to step 7, normed of masked images"
    larger = other | {"model": trained["model"] | {"n_embd": 32}}
    assert label(larger, [*rows, larger]) == "2 x 32, trained to step 7, normed"
    bert = other | {"model_objective": "bert"}
    assert label(bert, [*rows, bert]) == "2 x 16 BERT, trained to step 7, normed of whole images"
    assert label(trained, [*rows, bert]) == "2 x 16, trained to step 7, normed"
    assert label(rows[0], [*rows, bert]) == "raw pixels"
    again = [*rows, *(row | {"seed": 1, "C_grid": [1.0, 2.0]} for row in rows if row["weights"] == "trained")]
    assert label(trained, again) == "trained to step 7, normed, seed 0, C grid 3 of 0.01..100"
    assert "trained to step 7, raw, seed 1, C grid 2 of 1..2 |" in markdown_table(again)
    assert label(rows[0], again) == "raw pixels"


def test_rows_of_one_experiment(rows):
    assert experiment(rows) == experiment(rows, "shards") == rows
    more = [*rows, rows[0] | {"dataset": "cifar10"}]
    assert experiment(more, "shards") == rows
    with pytest.raises(ValueError, match="several experiments: dataset is cifar10 and shards; choose one with --dataset"):
        experiment(more)
    with pytest.raises(ValueError, match=r"no rows of 'mnist'; they have \['cifar10', 'shards'\]"):
        experiment(more, "mnist")
    with pytest.raises(ValueError, match="no rows; probe first"):
        experiment([])
    with pytest.raises(ValueError, match="several experiments: n_train is 36 and 40; keep them in separate files"):
        experiment([*rows, rows[0] | {"n_train": 40}])


def test_rows_are_made_of_what_protocols_and_features_say(row, features_dir):
    """No field of a probe or of the features' origin is lost on the way, or overwritten by another of its name."""
    train, val = (open_features(features_dir, split) for split in ("train", "val"))
    probe = linear_probe(train, val, 1, "normed", ProbeSettings.of([0.01, 1.0, 100.0]))
    names = {field.name for field in dataclasses.fields(probe)} - {"kind", "fitted"}
    assert names <= set(row.json)
    assert set(results._REQUIRED["probe"]) | set(results.EXPERIMENT) <= set(row.json)
    for name in names:
        assert row[name] == getattr(probe, name)


MEASURED = Likelihood(
    commit="abc",
    model_hash="h",
    objective="ar",
    step=5,
    dataset="cifar10",
    dataset_hash="d",
    palette_hash="p",
    split="val",
    n_px=32,
    n_images=10,
    precision="fp32",
    batch=32,
    masks=None,
    summary=Summary(MeanWithError(2.5, 0.01), MeanWithError(3.6, 0.02), MeanWithError(1.2, 0.01)),
    published=None,
    published_does_not_apply=["it is small"],
)
FINETUNED = {
    "weights": "trained",
    "model_hash": "h",
    "model": {"n_layer": 24, "n_head": 8, "n_embd": 512, "n_px": 32, "n_vocab": 512},
    "model_objective": "ar",
    "step": 5,
    "dataset": "cifar10",
    "dataset_hash": {"train": "a", "val": "b"},
    "n_train": 100,
    "seed": 0,
    "loss": "joint",
    "lr": 0.001,
    "accuracy": 0.9,
    "held_out_accuracy": 0.91,
    "eval_split": "val",
}


def test_rows_of_the_other_kinds(tmp_path, rows, tiny_config):
    likelihood, finetuned = likelihood_row(MEASURED, tiny_config), finetune_row(**FINETUNED)
    assert (likelihood["kind"], likelihood["version"], likelihood["model_objective"]) == ("likelihood", 3, "ar")
    assert likelihood["model"] == tiny_config.to_dict()
    assert (likelihood.nats_per_token.mean, likelihood["git_commit"]) == (2.5, "abc")
    path = tmp_path / "results.jsonl"
    add_results(path, [*rows, likelihood, finetuned])
    add_results(path, [likelihood, finetuned | {"accuracy": 0.95}, finetuned | {"loss": "clf"}, likelihood | {"split": "test"}])
    assert len(read_results(path)) == len(rows) + 4
    assert experiment(read_results(path)) == rows, "they are no probes"
    assert by_layer([*rows, rows[0] | {"protocol": "concat"}, finetuned]) == rows
    with pytest.raises(AssertionError, match=r"a fine-tuning's row needs \['lr'\]"):
        finetune_row(**{name: value for name, value in FINETUNED.items() if name != "lr"})


def test_older_files_call_the_protocol_best_layer(tmp_path, row):
    path = tmp_path / "results.jsonl"
    text = json.dumps(row.json | {"version": 2, "protocol": "best_layer"}) + "\n"
    path.write_text(text)
    (old,) = read_results(path)
    assert (old.protocol, old["protocol"]) == ("every_layer", "every_layer")
    assert by_layer([old]) == [old]
    add_results(path, [])
    assert path.read_text() == text, "a row stays as it was measured"
    add_results(path, [row])
    assert read_results(path) == [row], "the same measurement, made again"


def test_a_row_keeps_its_values(row):
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.accuracy = 1.0
    assert (row | {"accuracy": 0.5}).accuracy == (row | {"accuracy": 0.5}).json["accuracy"] == 0.5
    assert (row.get("rates"), "rates" in row) == (None, False)
    with pytest.raises(KeyError, match="rates"):
        row["rates"]


def test_rows_of_several_files(tmp_path, rows):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    add_results(one, rows[:2])
    add_results(two, rows[2:])
    assert read_all([one, two]) == rows
    with pytest.raises(ValueError, match=r"--results .*none\.jsonl does not exist; make it with tools/linear_probe\.py"):
        read_all([one, tmp_path / "none.jsonl"])


def test_names_and_sizes_of_models(row):
    assert model_name(FINETUNED["model"]) == "iGPT-S"
    assert model_name(row["model"]) == "2 x 16"
    assert model_name(None) == "model of unknown shape"
    assert model_name({"n_layer": 8, "n_head": 4, "n_embd": 128}) == "8 x 128", "nano is none of the paper's"
    assert model_parameters(finetune_row(**FINETUNED)) == 76_571_648
    assert model_parameters(row | {"model": None}) is None


@pytest.mark.parametrize("kind", ["probe", "finetune", "likelihood"])
def test_every_field_of_a_line(tmp_path, row, tiny_config, kind):
    """A required field that is missing, and a value of another type: an error that names the line and the field."""
    made = {"probe": row, "finetune": finetune_row(**FINETUNED), "likelihood": likelihood_row(MEASURED, tiny_config)}[kind]
    path = tmp_path / "results.jsonl"
    for name in ("format", "version", "kind", *results._REQUIRED[kind]):
        path.write_text(json_line({key: value for key, value in made.json.items() if key != name}))
        with pytest.raises(ValueError, match=rf"^{path} line 1 (is not|is of kind|has no '{name}')"):
            read_results(path)
    for name in {field.name for field in dataclasses.fields(made)} - {"json"}:
        path.write_text(json_line(made.json | {name: [["x"]]}))
        with pytest.raises(ValueError, match=rf"^{path} line 1 (has|is of kind).*(remove|measure again)") as error:
            read_results(path)
        assert name in str(error.value)
    path.write_text(json_line(made.json | {"weights": "other"}))
    with pytest.raises(ValueError, match=r"line 1 has weights 'other', not one of trained, untrained, pixels; remove the line"):
        read_results(path)
    path.write_text(json_line(made.json))
    assert read_results(path) == [made]
