"""The paper's Figures 2, 3 and 4 from result rows, with the paper's numbers if it prints them; and a confusion matrix.

In: result rows (`results.py`), counts. Out: PNG files. Called by `tools/figures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from igpt_ds.errors import InputError
from igpt_ds.evaluate.report import canvas as canvas
from igpt_ds.evaluate.report.canvas import BLACK, COLORS, LINES
from igpt_ds.evaluate.report.results import best_row, by_layer, key, series
from igpt_ds.evaluate.report.row_names import system_name
from igpt_ds.evaluate.report.row_types import FinetuneRow, LikelihoodRow, ProbeRow, Row
from igpt_ds.paper.published import FIGURE_4, Bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHADES = {"probe": ("#0072B2", "#5AB4E5"), "finetune": ("#D55E00", "#F5A05A")}  # of one mask, and of the gain by a vote
_OBJECTIVES = {"ar": "AR", "bert": "BERT"}


def dataset_curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Accuracy against layer for several data sets (paper Figure 2): a line for each, a star at the best layer of each.

    Args:
        rows: of each shape and objective the longest trained model is drawn, with one kind of features, normed if they exist.

    Raises:
        ValueError: no probe by layer of a trained model.
    """
    lines = _last([one for one in _trained(rows) if len(one) > 1])
    if not lines:
        raise InputError("the results hold no probes of several layers of a trained model; run tools/linear_probe.py first")
    figure, axes = canvas.new_axes(title, "layer", "linear probe accuracy (%)")
    datasets, models = (list(dict.fromkeys(one[0][name] for one in lines)) for name in ("dataset", "model_hash"))
    for one in lines:
        best, model, dataset = best_row(one), models.index(one[0].model_hash), datasets.index(one[0].dataset)
        color = COLORS[(dataset if len(datasets) > 1 else model) % len(COLORS)]
        style = LINES[model % len(LINES)]
        name = f", {system_name(best)}" if len(models) > 1 else ""
        alike = {other[0].model_hash for other in lines if system_name(other[0]) == system_name(best)}
        name += f" to step {best.step}" if len(alike) > 1 else ""
        text = f"{best.dataset} {best.eval_split}{name} ({100 * best.accuracy:.1f} at {best.layer})"
        heights = [100 * row.accuracy for row in one]
        layers = [row.layer for row in one]
        axes.plot(layers, heights, color=color, linestyle=style, marker="o", markersize=4, label=text)
        star = ([best.layer], [100 * best.accuracy])
        axes.plot(*star, marker="*", markersize=15, color=color, markeredgecolor="white", zorder=4)
    last = max(row.layer for one in lines for row in one)
    axes.set_xticks(range(0, last + 1, max(1, math.ceil((last + 1) / 16))))
    canvas.save_with_legend(figure, axes, path)


def _trained(rows: Sequence[Row]) -> list[list[ProbeRow]]:
    """The series of trained models, one for each model and data set: normed features, masked images and L-BFGS are preferred.

    A BERT model is probed on masked images because it was trained on masked images (paper 4.6).
    """
    found: dict[tuple[str, str], list[ProbeRow]] = {}
    for one in sorted(series([row for row in by_layer(rows) if row.weights == "trained"]), key=_preferred):
        found[one[0].dataset, one[0].model_hash] = one
    return sorted(found.values(), key=lambda one: one[0].dataset)


def _last(lines: Sequence[list[ProbeRow]]) -> list[list[ProbeRow]]:
    """The longest trained model of each data set, shape and objective."""
    found: dict[tuple[str, ...], list[ProbeRow]] = {}
    for one in sorted(lines, key=lambda one: one[0].step):
        found[key(one[0], ("dataset", "model", "model_objective"))] = one
    return sorted(found.values(), key=lambda one: (one[0].dataset, one[0].model_objective, _shape(one[0])))


def _preferred(one: list[ProbeRow]) -> tuple[bool, bool, bool]:
    return one[0].features == "normed", bool(one[0].mask_draws), one[0].protocol != "sgd"


def loss_points(rows: Sequence[Row], dataset: str | None = None) -> dict[str, list[tuple[float, float, int]]]:
    """Figure 3's points: for each size of model (nats per token, best layer's accuracy in percent, step), by rising step.

    A point needs a probe and a likelihood of the same model. The held-out images choose the best layer.

    Args:
        dataset: the probed data set; required if there are several.

    Raises:
        ValueError: no model has both, or the likelihoods or the probes are of several data sets.
    """
    likelihoods = {row.model_hash: row for row in rows if isinstance(row, LikelihoodRow)}
    lines = [one for one in _trained(rows) if one[0].model_hash in likelihoods and dataset in (None, one[0].dataset)]
    if not lines:
        raise InputError("no model has both a probe and a likelihood; run tools/evaluate.py --results on the models probed")
    probed = sorted({one[0].dataset for one in lines})
    if len(probed) > 1:
        raise InputError(f"the probes are of several data sets ({', '.join(probed)}); choose one with --dataset")
    used = [likelihoods[one[0].model_hash] for one in lines]
    measured = sorted({f"{row.dataset} {row.split} ({row.dataset_hash[:8]})" for row in used})
    if len(measured) > 1:
        raise InputError(f"the likelihoods are of several sets of images ({', '.join(measured)}) and do not compare")
    found: dict[str, list[tuple[float, float, int]]] = {}
    for one, loss in sorted(zip(lines, used, strict=True), key=lambda pair: ((pair[1].model or {})["n_embd"], pair[1].step)):
        point = (loss.nats_per_token.mean, 100 * best_row(one).accuracy, loss.step)
        found.setdefault(system_name(loss), []).append(point)
    return found


def loss_curves(rows: Sequence[Row], path: Path, title: str, dataset: str | None = None) -> None:
    """Probe accuracy against validation loss over checkpoints and sizes (paper Figure 3); loss falls to the right.

    Raises:
        ValueError: as `loss_points`.
    """
    points = loss_points(rows, dataset)
    figure, axes = canvas.new_axes(title, "nats per token of held-out images (better to the right)", "linear probe accuracy (%)")
    for number, (name, line) in enumerate(points.items()):
        color = COLORS[number % len(COLORS)]
        nats, heights, steps = zip(*line, strict=True)
        axes.plot(nats, heights, color=color, marker="o", markersize=5, label=f"{name} (to step {steps[-1]})")
        for x, y, step in line:
            axes.annotate(f"{step}", (x, y), textcoords="offset points", xytext=(4, -11), fontsize="x-small", color=color)
    axes.invert_xaxis()
    axes.margins(0.08, 0.12)
    canvas.save_with_legend(figure, axes, path)


def objective_bars(rows: Sequence[Row], path: Path, title: str) -> None:
    """AR against BERT (paper Figure 4): probes and fine-tunings of each, with the gain by a vote over masks, and the paper's
    bars.

    Of several models the largest shape that both objectives have is drawn, each with its longest training. Of several
    measurements of one model, such as fine-tunings at several rates, the best by held-out accuracy is drawn.

    Raises:
        ValueError: no probe or fine-tuning of a trained model.
    """
    bars = measured_bars(rows)
    if not bars:
        raise InputError("the results hold no probe or fine-tuning of a trained model; run tools/linear_probe.py first")
    figure, axes = canvas.new_axes(title, "", "accuracy (%)")
    groups = list(dict.fromkeys((dataset, objective) for dataset, objective, _ in bars))
    for (dataset, objective, evaluation), (single, voted) in bars.items():
        x = groups.index((dataset, objective)) + (-0.2 if evaluation == "probe" else 0.2)
        bold, pale = _SHADES[evaluation]
        axes.bar(x, min(single, voted or single), 0.38, color=pale)
        if voted is not None:
            axes.bar(x, abs(voted - single), 0.38, bottom=min(single, voted), color=bold, hatch="" if voted > single else "//")
        note = partial(axes.annotate, textcoords="offset points", ha="center", fontsize="small")
        note(f"{single:.1f}", (x, min(single, voted or single)), xytext=(0, -3), va="top")
        if voted is not None:
            note(f"{voted:.1f}", (x, max(single, voted)), xytext=(0, 3), va="bottom")
    _paper_marks(axes, groups, [bar for bar in FIGURE_4 if (bar.dataset, bar.objective) in groups])
    for evaluation, words in (("probe", "linear probe"), ("finetune", "fine-tuning")):
        axes.bar(0, 0, color=_SHADES[evaluation][1], label=words)
        if any(kind == evaluation and voted is not None for (_, _, kind), (_, voted) in bars.items()):
            axes.bar(0, 0, color=_SHADES[evaluation][0], label=f"{words}: votes over masks")
    axes.set_xticks(range(len(groups)), [f"{dataset}\n{_OBJECTIVES[objective]}" for dataset, objective in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.margins(y=0.12)
    canvas.save_with_legend(figure, axes, path)


def _paper_marks(axes: Axes, groups: list[tuple[str, str]], paper: Sequence[Bar]) -> None:
    for exact in (True, False):
        chosen = [bar for bar in paper if bar.exact == exact]
        x = [groups.index((bar.dataset, bar.objective)) + (-0.2 if bar.evaluation == "probe" else 0.2) for bar in chosen]
        if chosen:
            text = "iGPT-L in the paper" if exact else "in the paper, approximately"
            fill = BLACK if exact else "white"
            axes.plot(x, [bar.accuracy for bar in chosen], "D", color=BLACK, markerfacecolor=fill, markersize=6, label=text)


def measured_bars(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[float, float | None]]:
    """Figure 4's bars: (data set, objective, "probe" or "finetune") -> accuracy in percent, and accuracy of the vote."""
    trained = [row for row in rows if isinstance(row, ProbeRow | FinetuneRow) and row.weights == "trained"]
    single: list[ProbeRow | FinetuneRow] = [
        *map(best_row, _trained(rows)),
        *(row for row in trained if isinstance(row, FinetuneRow) and row.n_labels is None),
    ]
    votes = [row for row in trained if isinstance(row, ProbeRow) and row.protocol == "mask_vote"]
    bars: dict[tuple[str, str, str], tuple[float, float | None]] = {}
    best: dict[tuple[str, str, str], tuple[int, int, float]] = {}
    for row in _of_one_shape([*single, *votes]):
        key = (row.dataset, row.model_objective, row.kind)
        labels = row.n_train if isinstance(row, FinetuneRow) else 0  # prefers the fine-tuning with most labels
        rank = (labels, row.step or 0, row.held_out_accuracy or 0.0)
        if rank >= best.get(key, (0, 0, -1.0)):  # equal if the vote is of the same probe, which came first
            best[key] = rank
            voted = 100 * row.accuracy if row.n_masks else None
            bars[key] = (100 * (row.accuracy if row.single_accuracy is None else row.single_accuracy), voted)
    return {key: bars[key] for key in sorted(bars, key=lambda key: (key[0], key[1], key[2] != "probe"))}


def _of_one_shape(rows: Sequence[ProbeRow | FinetuneRow]) -> list[ProbeRow | FinetuneRow]:
    """The probes and fine-tunings of the largest shape that both objectives have; else of the largest of each objective."""
    shapes: dict[tuple[str, str, str], set[tuple[int, str]]] = {}
    for row in rows:
        shapes.setdefault((row.dataset, row.kind, row.model_objective), set()).add(_shape(row))
    chosen = {}
    for dataset, kind, objective in shapes:
        common = set.intersection(*(shapes.get((dataset, kind, other), set()) for other in _OBJECTIVES))
        chosen[dataset, kind, objective] = max(common or shapes[dataset, kind, objective])
    return [row for row in rows if _shape(row) == chosen[row.dataset, row.kind, row.model_objective]]


def _shape(row: Row) -> tuple[int, str]:
    """A transformer's shape, comparable by size."""
    shape: dict[str, int] | None = row.model
    if shape is None:
        return 0, ""
    return shape["n_layer"] * shape["n_embd"] ** 2, repr(sorted(shape.items()))


def confusion_matrix(counts: np.ndarray, classes: Sequence[str], path: Path, title: str) -> None:
    """How often each class (row) is predicted as each other (column), in percent of the row, as a PNG.

    Args:
        counts: int [K, K], rows the true classes.
    """
    K = len(classes)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, max(5.0, 0.62 * K))
    figure = canvas.new_figure((side + 1.5, side))
    axes = figure.add_subplot()
    drawn = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if K <= 40:
        axes.set_xticks(range(K), classes, rotation=90)
        axes.set_yticks(range(K), classes)
    for (row, column), value in np.ndenumerate(share):
        if K <= 20 and round(value):
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else BLACK, fontsize="small"
            )
    figure.colorbar(drawn, ax=axes, label="% of the true class", shrink=0.8)
    canvas.save_png(figure, path)
