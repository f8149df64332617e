"""Figures 2, 3 and 4, and the confusion matrix: every point, chosen and labelled as it should be."""

from __future__ import annotations

import numpy as np
import pytest

from igpt_ds.evaluate.report import canvas
from igpt_ds.evaluate.report.figures_paper import (
    confusion_matrix,
    dataset_curves,
    loss_curves,
    loss_points,
    measured_bars,
    objective_bars,
)
from igpt_ds.evaluate.report.row_types import as_row

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_px": 4, "n_vocab": 8}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that is drawn."""
    caught = []
    save = canvas.save_png
    monkeypatch.setattr(canvas, "save_png", lambda figure, path: (caught.append(figure.axes[0]), save(figure, path)))
    return caught


def probe(layer, accuracy, **changes):
    about = {"kind": "probe", "protocol": "every_layer", "features": "normed", "weights": "trained", "model_hash": "m", "step": 9}
    seen = {"dataset": "cifar10", "dataset_hash": {}, "eval_split": "val", "seed": 0, "model": SHAPE, "model_objective": "ar"}
    return as_row(about | seen | {"layer": layer, "accuracy": accuracy, "held_out_accuracy": accuracy} | changes)


def curve(top, **changes):
    return [probe(layer, top - abs(layer - 2) / 10, **changes) for layer in range(5)]


def likelihood(model_hash, nats, step, **changes):
    about = {"kind": "likelihood", "weights": "trained", "model_hash": model_hash, "model": SHAPE, "model_objective": "ar"}
    seen = {"dataset": "cifar10", "dataset_hash": "d", "split": "val", "step": step}
    return as_row(about | seen | {"nats_per_token": {"mean": nats}} | changes)


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_2(tmp_path, drawn):
    rows = [
        *curve(0.8),
        *curve(0.7, dataset="stl10"),
        *curve(0.9, features="raw"),
        *curve(0.95, weights="untrained", model_hash="u"),
    ]
    dataset_curves(rows, tmp_path / "a.png", "a title")
    dataset_curves(rows[::-1], tmp_path / "b.png", "a title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes = drawn[0]
    assert texts(axes) == ["cifar10 val (80.0 at 2)", "stl10 val (70.0 at 2)"], "normed features of trained models"
    one, star, two, _ = axes.get_lines()
    assert list(one.get_ydata()) == pytest.approx([60, 70, 80, 70, 60])
    assert (list(star.get_xdata()), star.get_marker()) == ([2], "*")
    assert one.get_color() != two.get_color()
    early, wide = curve(0.6, model_hash="e", step=8), curve(0.5, model_hash="n", step=10, model=SHAPE | {"n_embd": 32})
    dataset_curves([*rows, *early, *wide], tmp_path / "c.png", "two models")
    assert texts(drawn[2]) == [
        "cifar10 val, 2 x 16 (80.0 at 2)",
        "cifar10 val, 2 x 32 (50.0 at 2)",
        "stl10 val, 2 x 16 (70.0 at 2)",
    ]
    dataset_curves([*curve(0.8), *early, *wide], tmp_path / "e.png", "one data set")
    dataset_curves([*curve(0.8), *curve(0.7, dataset="stl10", model_hash="e", step=8)], tmp_path / "f.png", "two stages")
    assert texts(drawn[4]) == ["cifar10 val, 2 x 16 to step 9 (80.0 at 2)", "stl10 val, 2 x 16 to step 8 (70.0 at 2)"]
    lines = [line for line in drawn[3].get_lines() if line.get_marker() == "o"]
    assert lines[0].get_color() != lines[1].get_color(), "where the data set is the same, colours tell the models apart"
    with pytest.raises(ValueError, match="hold no probes of several layers of a trained model"):
        dataset_curves(curve(0.5, weights="untrained"), tmp_path / "d.png", "none")


def test_figure_3(tmp_path, drawn):
    wide = SHAPE | {"n_embd": 32}
    rows = [
        *curve(0.6, model_hash="b", step=2),
        *curve(0.5, model_hash="a", step=1),
        *curve(0.8, model_hash="w", model=wide),
        *curve(0.9, model_hash="without a likelihood"),
        likelihood("w", 1.5, 2, model=wide),
        likelihood("b", 1.6, 2),
        likelihood("a", 1.9, 1),
        likelihood("without a probe", 1.0, 3),
    ]
    points = loss_points(rows)
    assert points == {
        "2 x 16": [(1.9, pytest.approx(50), 1), (1.6, pytest.approx(60), 2)],
        "2 x 32": [(1.5, pytest.approx(80), 2)],
    }
    loss_curves(rows, tmp_path / "a.png", "a title")
    axes = drawn[0]
    assert texts(axes) == ["2 x 16 (to step 2)", "2 x 32 (to step 2)"]
    assert axes.xaxis_inverted(), "a better model stands to the right"
    assert [text.get_text() for text in axes.texts] == ["1", "2", "2"]
    more = [*rows, *curve(0.4, model_hash="a", dataset="stl10")]
    assert loss_points(more, "cifar10") == points
    with pytest.raises(ValueError, match=r"probes are of several data sets \(cifar10, stl10\); choose one with --dataset"):
        loss_points(more)
    with pytest.raises(ValueError, match=r"likelihoods are of several sets of images .* do not compare"):
        loss_points([*rows, likelihood("a", 1.0, 1, split="test", dataset_hash="e")])
    with pytest.raises(ValueError, match=r"no model has both a probe and a likelihood; run tools/evaluate\.py --results"):
        loss_points(curve(0.5))


def test_figure_4(tmp_path, drawn):
    bert = {"model_objective": "bert", "model_hash": "b"}
    finetuned = {"kind": "finetune", "weights": "trained", "dataset": "cifar10", "loss": "joint", "model": SHAPE, "step": 9}
    finetuned = as_row(finetuned | {"n_train": 45_000})
    rows = [
        *curve(0.8),
        *curve(0.7, mask_draws=5, **bert),
        *curve(0.95, **bert),
        probe(2, 0.72, protocol="mask_vote", n_masks=5, single_accuracy=0.69, held_out_accuracy=0.7, **bert),
        finetuned | {"model_objective": "ar", "accuracy": 0.9, "held_out_accuracy": 0.9},
        finetuned | {"model_objective": "ar", "accuracy": 0.99, "held_out_accuracy": 0.5},
        finetuned
        | {"model_objective": "bert", "accuracy": 0.85, "held_out_accuracy": 0.9, "n_masks": 5, "single_accuracy": 0.86},
        finetuned | {"model_objective": "ar", "accuracy": 1.0, "held_out_accuracy": 1.0, "weights": "untrained"},
    ]
    assert measured_bars(rows) == {
        ("cifar10", "ar", "probe"): (pytest.approx(80), None),
        ("cifar10", "ar", "finetune"): (pytest.approx(90), None),
        ("cifar10", "bert", "probe"): (pytest.approx(69), pytest.approx(72)),
        ("cifar10", "bert", "finetune"): (pytest.approx(86), pytest.approx(85)),
    }, "chosen by held-out images; from scratch is none of the figure's"
    larger = [*rows, *curve(0.99, model=SHAPE | {"n_embd": 32}, model_hash="l"), *curve(0.98, step=3, model_hash="early")]
    assert measured_bars(larger) == measured_bars(rows), "models of one shape are compared, as far as they were trained"
    large = curve(0.6, model=SHAPE | {"n_embd": 32}, model_objective="bert", model_hash="large")
    assert measured_bars([*larger, *large]) == {
        ("cifar10", "ar", "probe"): (pytest.approx(99), None),
        ("cifar10", "ar", "finetune"): (pytest.approx(90), None),
        ("cifar10", "bert", "probe"): (pytest.approx(60), None),
        ("cifar10", "bert", "finetune"): (pytest.approx(86), pytest.approx(85)),
    }, "the largest that both have"
    few = finetuned | {"model_objective": "ar", "accuracy": 0.98, "held_out_accuracy": 0.98, "n_train": 4000}
    assert measured_bars([*rows, few]) == measured_bars(rows), "few labels are another experiment"
    subsets = finetuned | {"model_objective": "ar", "accuracy": 0.4, "held_out_accuracy": 0.95, "n_labels": 40}
    assert measured_bars([*rows, subsets]) == measured_bars(rows)
    assert measured_bars(curve(0.4, model=None)) == {("cifar10", "ar", "probe"): (pytest.approx(40), None)}
    without_vote = [row for row in rows if row.get("protocol") != "mask_vote"]
    assert measured_bars(without_vote)["cifar10", "bert", "probe"] == (pytest.approx(70), None), "of masked images"
    by_sgd = curve(0.85, protocol="sgd")
    assert measured_bars([*by_sgd, *rows]) == measured_bars([*rows, *by_sgd]) == measured_bars(rows), "L-BFGS, if there is one"
    assert measured_bars(by_sgd)["cifar10", "ar", "probe"] == (pytest.approx(85), None)
    objective_bars(rows, tmp_path / "a.png", "a title")
    axes = drawn[0]
    assert [text.get_text() for text in axes.texts] == ["80.0", "90.0", "69.0", "72.0", "86.0", "85.0"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cifar10\nAR", "cifar10\nBERT"]
    exact, rounded = axes.get_lines()
    assert list(exact.get_ydata()) == [96.3, 99.0, 98.6]
    assert list(rounded.get_ydata()) == [95.3]
    assert "linear probe: votes over masks" in texts(axes)
    objective_bars(curve(0.5, dataset="mnist"), tmp_path / "b.png", "not in the paper")
    assert texts(drawn[1]) == ["linear probe", "fine-tuning"]
    with pytest.raises(ValueError, match="hold no probe or fine-tuning of a trained model"):
        objective_bars([], tmp_path / "c.png", "none")


@pytest.mark.parametrize("K", [3, 30, 100])
def test_confusion_matrix(tmp_path, drawn, K):
    counts = np.diag(np.full(K, 3)) + np.eye(K, k=1, dtype=int)
    counts[-1] = 0  # a class that nobody asked for
    confusion_matrix(counts, [f"class {k}" for k in range(K)], tmp_path / "a.png", "a title")
    shown = drawn[0].images[0].get_array()
    assert shown[0, 0] == 75
    assert shown[0, 1] == 25
    assert shown[-1].max() == 0
    written = [text.get_text() for text in drawn[0].texts]
    assert written == (["75", "25", "75", "25"] if K == 3 else [])
    assert (len(drawn[0].get_xticklabels()) == K) == (K <= 40)
