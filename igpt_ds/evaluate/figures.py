"""Figures: result rows, training rows, scores and likelihoods enter, PNG files leave, without a display and any global state.

Called by `tools/figures.py`, `tools/filter_shards.py` and `tools/sample.py`. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; line styles and markers say the same again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from igpt_ds.evaluate.results import Row, best_row, label, series
from igpt_ds.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_GREY, _BLACK = "#8C8C8C", "#333333"
_SIZE, _DPI = (8.0, 4.0), 150  # inches, dots an inch: 1200 pixels wide


def layer_curve(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy against layer (paper Figure 2) as a PNG.

    A line for each series: trained ones coloured, untrained ones grey; normed features solid, raw ones dashed; raw pixels a
    level dotted line. A star stands at each trained series' best layer, chosen by the held-out images.

    Args:
        rows: of one experiment (`results.experiment`).
    """
    figure, axes = _new(title, "layer", f"{rows[0]['eval_split']} accuracy (%)")
    models = list(dict.fromkeys(row["model_hash"] for one in series(rows) for row in one if row["weights"] == "trained"))
    for one in series(rows):
        weights, accuracies = one[0]["weights"], [100 * row["accuracy"] for row in one]
        if weights == "pixels":
            axes.axhline(accuracies[0], color=_BLACK, linestyle=":", label=f"raw pixels ({accuracies[0]:.1f})")
            continue
        color = _COLORS[models.index(one[0]["model_hash"]) % len(_COLORS)] if weights == "trained" else _GREY
        marker, line = ("o", "-") if one[0]["features"] == "normed" else ("s", "--")
        best = best_row(one)
        text = f"{label(best, rows)} (chosen {100 * best['accuracy']:.1f})"
        layers = [row["layer"] for row in one]
        axes.plot(layers, accuracies, color=color, linestyle=line, marker=marker, markersize=4, label=text)
        if weights == "trained":
            height = 100 * best["accuracy"]
            axes.plot([best["layer"]], [height], marker="*", markersize=15, color=color, markeredgecolor="white", zorder=4)
    layers = sorted({row["layer"] for row in rows})
    axes.set_xticks([layer for layer in layers if layer % max(1, math.ceil((layers[-1] + 1) / 16)) == 0])
    _finish(figure, axes, path)


def training_curve(runs: dict[str, list[dict[str, Any]]], n_vocab: int, path: Path, title: str) -> None:
    """Training and validation loss against step as a PNG, with the loss of a model that knows nothing, ln V.

    Args:
        runs: for each run's name the rows of its train.jsonl; those with "loss" are training steps, those with "val_loss"
            validations, both in nats per token.
        n_vocab: V, the colours of the palette.

    Raises:
        ValueError: a run has no rows yet.
    """
    figure, axes = _new(title, "step", "nats per token")
    axes.axhline(math.log(n_vocab), color=_BLACK, linestyle=":", label=f"uniform, ln {n_vocab} = {math.log(n_vocab):.3f}")
    for number, (name, rows) in enumerate(runs.items()):
        color = _COLORS[number % len(_COLORS)]
        prefix = f"{name}: " if len(runs) > 1 else ""
        training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
        validation = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
        if not training and not validation:
            raise ValueError(f"run {name} has no rows in its train.jsonl; train first")
        if training:
            axes.plot(*zip(*training, strict=True), color=color, alpha=0.4, linewidth=1, label=f"{prefix}training")
        if validation:
            text = f"{prefix}validation ({validation[-1][1]:.3f})"
            axes.plot(*zip(*validation, strict=True), color=color, marker="o", markersize=4, label=text)
    _finish(figure, axes, path)


def score_histogram(scores: dict[str, np.ndarray], threshold: float, path: Path, title: str, bins: int = 100) -> None:
    """The distribution of each named set of scores as an outline, all of the same area, and the threshold, as a PNG.

    Args:
        scores: float [N] for each name; memory maps are read in pieces.
    """
    lowest, highest = (float(end([end(values) for values in scores.values()])) for end in (np.min, np.max))
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1, bins + 1)
    figure, axes = _new(title, "score: log odds of reference against candidate", "share of images a bin (%)")
    for number, (name, values) in enumerate(scores.items()):
        counts, _ = np.histogram(values, edges)
        line = ("-", "--", ":")[number % 3]
        text = f"{name} ({len(values)})"
        axes.stairs(100 * counts / len(values), edges, color=_COLORS[number % len(_COLORS)], linestyle=line, label=text)
    axes.axvline(threshold, color=_BLACK, linestyle=":", label=f"kept from {threshold:.3f}")
    _finish(figure, axes, path)


def heat_maps(images: np.ndarray, nats: np.ndarray, path: Path, columns: int = 2) -> None:
    """Each image beside the map of what its pixels cost the model, in nats, dark where little, on one scale, as a PNG.

    Args:
        images: uint8 [N, h, w, 3]
        nats: float [N, h, w], the negative log-likelihood of each pixel given those before it
        columns: pairs of an image and its map in a row
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.4 * columns + 1.2, 2.4 * rows + 0.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (image, cost) in enumerate(zip(images, nats, strict=True)):
        left, right = grid[number // columns, 2 * (number % columns) :][:2]
        left.imshow(image, interpolation="nearest")
        drawn = right.imshow(cost, cmap="magma", vmin=0.0, vmax=float(nats.max()), interpolation="nearest")
        right.set_title(f"{cost.mean():.3f} nats per token", fontsize="small")
    figure.colorbar(drawn, ax=grid, label="nats of a pixel given those before it", shrink=0.9)
    _save(figure, path)


def _new(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})  # the same bytes from the same rows
