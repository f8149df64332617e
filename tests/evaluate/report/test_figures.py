"""Figures: they are PNGs of the right size, the same from the same rows, and show every series."""

from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from igpt_ds.evaluate.report import canvas
from igpt_ds.evaluate.report.figures import heat_maps, layer_curve, plan_curve, rate_curve, score_histogram, training_curve
from igpt_ds.evaluate.report.row_types import as_row
from igpt_ds.evaluate.report.run_files import CurveRow, PlanRow


def made_rows(layers=9):
    """Rows with what a figure reads."""
    about = {"dataset": "digits", "eval_split": "val", "seed": 0, "n_train": 5, "dataset_hash": {}, "protocol": "linear_probe"}

    def made(weights, kind, layer, accuracy, model_hash="aaaa", step=100):
        own = {"weights": weights, "features": kind, "layer": layer, "model_hash": model_hash, "step": step}
        return as_row(about | own | {"kind": "probe", "accuracy": accuracy, "held_out_accuracy": accuracy})

    curve = [0.5 + 0.4 * (1 - abs(layer / (layers - 1) - 0.5)) for layer in range(layers)]
    return [
        *(made("trained", "normed", layer, value) for layer, value in enumerate(curve)),
        *(made("trained", "raw", layer, value - 0.03) for layer, value in enumerate(curve)),
        *(made("untrained", "normed", layer, value - 0.3, "bbbb", 0) for layer, value in enumerate(curve)),
        made("pixels", "pixels", 0, 0.6, None, None),
    ]


def png_size(path):
    """Width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that is drawn."""
    caught = []
    finish = canvas.save_with_legend
    monkeypatch.setattr(canvas, "save_with_legend", lambda figure, axes, path: (caught.append(axes), finish(figure, axes, path)))
    return caught


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_layer_curve(tmp_path, drawn):
    layer_curve(made_rows(), tmp_path / "a.png", "a title")
    layer_curve(list(reversed(made_rows())), tmp_path / "b.png", "a title")
    assert png_size(tmp_path / "a.png") == (1200, 600)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes = drawn[0]
    assert texts(axes) == [
        "trained to step 100, normed (90.0 at 4)",
        "trained to step 100, raw (87.0 at 4)",
        "untrained, normed (60.0 at 4)",
        "raw pixels (60.0)",
    ]
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("a title", "layer")
    assert axes.get_ylabel() == "linear probe accuracy on val (%)"
    normed, star, raw, *_ = axes.get_lines()
    assert list(normed.get_ydata()) == pytest.approx([50 + 40 * (1 - abs(layer / 8 - 0.5)) for layer in range(9)])
    assert (normed.get_linestyle(), raw.get_linestyle()) == ("-", "--")
    assert normed.get_color() == raw.get_color() == star.get_color()
    assert (star.get_marker(), list(star.get_xdata()), list(star.get_ydata())) == ("*", [4], [pytest.approx(90)])
    assert list(axes.get_xticks()) == list(range(9))


def test_many_layers_and_several_models(tmp_path, drawn):
    deep = made_rows(61)
    layer_curve(deep, tmp_path / "deep.png", "deep")
    assert list(drawn[0].get_xticks()) == list(range(0, 61, 4))
    later = [row | {"model_hash": "cccc", "step": 200} for row in deep if row["weights"] == "trained"]
    layer_curve(deep + later, tmp_path / "two.png", "two")
    assert len({line.get_color() for line in drawn[1].get_lines() if line.get_label().startswith("trained")}) == 2
    trained = [row for row in deep if row["weights"] == "trained"]
    halves = [row | {"feature_dtype": "fp16"} for row in trained]
    layer_curve([*trained, *halves], tmp_path / "halves.png", "halves")
    whole, _, half, _ = normed = drawn[2].get_lines()[:4]
    assert [line.get_label().split(" (")[0] for line in normed[::2]] == [
        "trained to step 100, normed, feature dtype None",
        "trained to step 100, normed, feature dtype fp16",
    ]
    assert whole.get_color() != half.get_color()
    many = [row | {"model_hash": f"{number:04}", "step": number} for number in range(1, 15) for row in trained]
    layer_curve(many, tmp_path / "many.png", "many")
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn[3].get_lines()]
    lines = [look for look in looks if look[1] != "*"]
    assert len(lines) == len(set(lines)), "no two lines may look the same"


def test_training_curve(tmp_path, drawn):
    rows = [CurveRow(step, 64 * step, loss=3 - step / 10) for step in range(1, 11)]
    rows = [CurveRow(0, 0, val_loss=2.8), *rows, CurveRow(10, 640, val_loss=2.1)]
    training_curve({"one": rows}, 16, tmp_path / "one.png", "losses")
    training_curve({"one": rows, "two": rows[-1:]}, 16, tmp_path / "two.png", "losses")
    assert png_size(tmp_path / "one.png") == (1200, 600)
    assert texts(drawn[0]) == ["uniform, ln 16 = 2.773", "training", "validation (2.100)"]
    assert texts(drawn[1])[1:] == ["one: training", "one: validation (2.100)", "two: validation (2.100)"]
    assert drawn[0].get_lines()[0].get_ydata()[0] == pytest.approx(2.7725887)
    assert drawn[0].get_xlabel() == "images seen"
    assert list(drawn[0].get_lines()[1].get_xdata()) == [64 * step for step in range(1, 11)]
    training_curve({str(number): rows for number in range(7)}, 16, tmp_path / "log.png", "losses", log=True)
    assert (drawn[2].get_xscale(), drawn[2].get_yscale()) == ("log", "log")
    validations = drawn[2].get_lines()[2::2]
    assert [len(line.get_xdata()) for line in validations] == [1] * 7  # without the one before the first image
    assert len({(line.get_color(), line.get_linestyle()) for line in validations}) == 7


def test_rate_curve(tmp_path, drawn):
    results = [(0.01, None), (0.003, 2.6), (0.001, 2.5), (0.0003, 2.7)]
    rate_curve({"ar": results}, "loss", tmp_path / "a.png", "rates")
    rate_curve({"ar": results[:1]}, "loss", tmp_path / "lost.png", "rates")
    rate_curve({"ar": results, "bert": [(0.003, 0.5), (0.1, 0.6)]}, "loss", tmp_path / "two.png", "rates")
    assert png_size(tmp_path / "a.png") == (1200, 600)
    assert texts(drawn[0]) == ["ar", "ar: ended by a spike"]
    assert texts(drawn[1]) == ["ar: ended by a spike"]
    curve, star, crosses = drawn[0].get_lines()
    assert list(curve.get_xdata()) == [0.0003, 0.001, 0.003]
    assert (list(star.get_xdata()), list(crosses.get_xdata())) == ([0.001], [0.01])
    assert [text.get_text() for text in drawn[0].texts] == ["0.001: 2.5000"]
    assert drawn[0].get_xscale() == "log"
    assert drawn[0].get_ylabel() == "loss"
    assert texts(drawn[2]) == ["ar", "ar: ended by a spike", "bert"]
    assert list(drawn[2].get_xticks()) == [0.0003, 0.001, 0.003, 0.01, 0.1]


def test_a_run_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"run r has no rows in its train\.jsonl; train first"):
        training_curve({"r": [CurveRow(1, 64)]}, 16, tmp_path / "none.png", "losses")
    assert not list(tmp_path.iterdir())


def test_score_histogram(tmp_path, drawn):
    scores = {"candidates": np.repeat([-1.0, 0.5, 3.0], [2, 1, 1]), "reference": np.array([3.0, 2.5])}
    score_histogram(scores, 0.4, tmp_path / "a.png", "a title", bins=4)
    score_histogram(scores, 0.4, tmp_path / "b.png", "a title", bins=4)
    assert png_size(tmp_path / "a.png") == (1200, 600)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    axes = drawn[0]
    assert texts(axes) == ["candidates (4)", "reference (2)", "kept from 0.400"]
    candidates, reference = (patch.get_data() for patch in axes.patches)
    np.testing.assert_allclose(candidates.edges, [-1, 0, 1, 2, 3])
    np.testing.assert_allclose(candidates.values, [50, 25, 0, 25])  # per cent
    np.testing.assert_allclose(reference.values, [0, 0, 0, 100])


def test_scores_that_are_all_equal_are_drawn_too(tmp_path, drawn):
    score_histogram({"candidates": np.full(3, 2.0)}, 2.0, tmp_path / "a.png", "a title")
    assert sum(drawn[0].patches[0].get_data().values) == pytest.approx(100)


@pytest.mark.parametrize("n", [1, 3])
def test_heat_maps(tmp_path, monkeypatch, n):
    caught = []
    save = canvas.save_png
    monkeypatch.setattr(canvas, "save_png", lambda figure, path: (caught.append(figure), save(figure, path)))
    images = np.random.default_rng(0).integers(0, 255, (n, 4, 4, 3), dtype=np.uint8)
    nats = np.arange(n * 16.0).reshape(n, 4, 4)
    heat_maps(images, nats, [f"image {number}" for number in range(n)], tmp_path / "a.png")
    heat_maps(images, nats, [f"image {number}" for number in range(n)], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    *pairs, scale = caught[0].axes
    shown = [axes for axes in pairs if axes.images]
    assert len(shown) == 2 * n
    for number, (left, right) in enumerate(zip(shown[::2], shown[1::2], strict=True)):
        assert np.array_equal(left.images[0].get_array(), images[number])
        assert np.array_equal(right.images[0].get_array(), nats[number])
        assert right.images[0].get_clim() == (0, 16 * n - 1)  # one scale for all
        assert right.get_title() == f"{nats[number].mean():.3f} nats per token"
        assert left.get_title() == f"image {number}"
    assert scale.get_ylabel() == "nats per pixel"


def test_plan_curve_draws_what_fits_beside_the_ideal(drawn, tmp_path):
    rows = [PlanRow(N, fits=N > 8, days=80 / N, mfu=0.4) for N in (8, 16, 32)] + [PlanRow(64)]
    plan_curve({"xl": rows}, tmp_path / "plan.png", "Plan")
    (axes,) = drawn
    days, ideal = (line.get_xydata().tolist() for line in axes.lines)
    assert days == ideal == [[16, 5.0], [32, 2.5]]
    assert [text.get_text() for text in axes.texts] == ["40 %", "40 %"]
    with pytest.raises(ValueError, match=r"^xl has no number of GPUs on which the run fits; "):
        plan_curve({"xl": rows[:1]}, tmp_path / "none.png", "Plan")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_the_backend_of_a_notebook_does_not_matter(backend, tmp_path):
    program = (
        "from pathlib import Path\nfrom igpt_ds.evaluate.report import canvas\n"
        f"canvas.save_png(canvas.new_figure((1, 1)), Path({str(tmp_path / 'a.png')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"MPLBACKEND": backend})
    assert (tmp_path / "a.png").exists()


def test_names_that_are_no_words_are_drawn(tmp_path):
    names = ["a$_b", "\x1b[2J", os.fsdecode(b"gr\xf6n"), "$\\nonsense$"]
    training_curve(
        {name: [CurveRow(1, 8, loss=1.0), CurveRow(2, 16, loss=0.5)] for name in names}, 8, tmp_path / "a.png", names[0]
    )
    assert (tmp_path / "a.png").exists()
