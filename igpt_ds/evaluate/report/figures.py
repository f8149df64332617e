"""Figures. In: result rows, training rows, scores, likelihoods. Out: PNG files, without a display and without global state.

Called by `tools/figures.py`, `report.py`, `sweep_lr.py`, `filter_shards.py` and `sample.py`. Lines differ by colour and by style
or marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from igpt_ds.errors import InputError
from igpt_ds.evaluate.report import canvas as canvas
from igpt_ds.evaluate.report.canvas import BLACK, COLORS, GREY, LINES, MARKERS
from igpt_ds.evaluate.report.results import SERIES, best_row, key, series
from igpt_ds.evaluate.report.row_names import label
from igpt_ds.evaluate.report.row_types import ProbeRow
from igpt_ds.evaluate.report.run_files import CurveRow, PlanRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layer_curve(rows: Sequence[ProbeRow], path: Path, title: str) -> None:
    """Accuracy against layer (paper Figure 2) as a PNG.

    One line for each series: trained models in colours (with another marker when the colours repeat), untrained ones grey, normed
    features solid, raw features dashed, raw pixels a dotted level. A star marks the best layer of each trained series, which the
    held-out images choose.

    Args:
        rows: of one experiment (`results.experiment`).
    """
    figure, axes = canvas.new_axes(title, "layer", f"linear probe accuracy on {rows[0].eval_split} (%)")
    lines = series(rows)
    looks = [name for name in SERIES if name != "features"]  # normed and raw features of one model share a colour
    models = list(dict.fromkeys(key(one[0], looks) for one in lines if one[0].weights == "trained"))
    for one in lines:
        weights, accuracies = one[0].weights, [100 * row.accuracy for row in one]
        if weights == "pixels":
            axes.axhline(accuracies[0], color=BLACK, linestyle=":", label=f"raw pixels ({accuracies[0]:.1f})")
            continue
        turn, place = divmod(models.index(key(one[0], looks)), len(COLORS)) if weights == "trained" else (0, 0)
        color = COLORS[place] if weights == "trained" else GREY
        marker, line = MARKERS[turn % len(MARKERS)], "-" if one[0].features == "normed" else "--"
        best = best_row(one)
        text = f"{label(best, rows)} ({100 * best.accuracy:.1f} at {best.layer})"
        layers = [row.layer for row in one]
        axes.plot(layers, accuracies, color=color, linestyle=line, marker=marker, markersize=4, label=text)
        if weights == "trained":
            height = 100 * best.accuracy
            axes.plot([best.layer], [height], marker="*", markersize=15, color=color, markeredgecolor="white", zorder=4)
    layers = sorted({row.layer for row in rows})
    axes.set_xticks([layer for layer in layers if layer % max(1, math.ceil((layers[-1] + 1) / 16)) == 0])
    canvas.save_with_legend(figure, axes, path)


def training_curve(runs: Mapping[str, Sequence[CurveRow]], n_vocab: int, path: Path, title: str, log: bool = False) -> None:
    """Training and validation loss against images seen as a PNG, with the loss of a uniform guess, ln V.

    The axis has images and not steps, so that runs with different batches compare.

    Args:
        runs: for the name of each run the rows of its train.jsonl.
        n_vocab: V, the colours of the palette.
        log: both axes logarithmic, as scaling laws are drawn; leaves out rows before the first image.

    Raises:
        ValueError: a run has no rows yet.
    """
    figure, axes = canvas.new_axes(title, "images seen", "nats per token")
    axes.axhline(math.log(n_vocab), color=BLACK, linestyle=":", label=f"uniform, ln {n_vocab} = {math.log(n_vocab):.3f}")
    for number, (name, rows) in enumerate(runs.items()):
        color, line = COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]
        prefix = f"{name}: " if len(runs) > 1 else ""
        shown = [row for row in rows if row.images_seen or not log]
        training = [(row.images_seen, row.loss) for row in shown if row.loss is not None]
        validation = [(row.images_seen, row.val_loss) for row in shown if row.val_loss is not None]
        if not training and not validation:
            raise InputError(f"run {name} has no rows in its train.jsonl; train first")
        if training:
            axes.plot(
                *zip(*training, strict=True), color=color, linestyle=line, alpha=0.4, linewidth=1, label=f"{prefix}training"
            )
        if validation:
            text = f"{prefix}validation ({validation[-1][1]:.3f})"
            axes.plot(*zip(*validation, strict=True), color=color, linestyle=line, marker="o", markersize=4, label=text)
    _scale_images(axes, log)
    canvas.save_with_legend(figure, axes, path)


def _scale_images(axes: Axes, log: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M


def rate_curve(sweeps: Mapping[str, Sequence[tuple[float, float | None]]], measured: str, path: Path, title: str) -> None:
    """The result of each learning rate (lower is better) on a logarithmic axis as a PNG; a star marks the best of each sweep.

    Args:
        sweeps: for each name at least one (rate, value); None: the run ended by a spike, drawn as a cross at the top.
        measured: name and unit of the values.
    """
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    figure, axes = canvas.new_axes(title, "learning rate", measured)
    axes.set_xscale("log")
    for number, (name, results) in enumerate(sweeps.items()):
        color = COLORS[number % len(COLORS)]
        known = sorted((lr, value) for lr, value in results if value is not None)
        if known:
            axes.plot(*zip(*known, strict=True), color=color, marker="o", markersize=5, label=name)
            lr, least = min(known, key=lambda pair: pair[1])
            axes.plot([lr], [least], color=color, marker="*", markersize=15, markeredgecolor="white", zorder=4)
            text = f"{lr:g}: {least:.4f}"
            axes.annotate(text, (lr, least), textcoords="offset points", xytext=(0, -18), ha="center", color=color)
        spiked = [lr for lr, value in results if value is None]
        if spiked:
            over, text = axes.get_xaxis_transform(), f"{name}: ended by a spike"
            axes.plot(spiked, [1.0] * len(spiked), "x", color=color, transform=over, clip_on=False, label=text)
    rates = sorted({lr for results in sweeps.values() for lr, _ in results})
    axes.xaxis.set_major_locator(FixedLocator(rates))  # set_xticks would also set the limits, to one point where the rate is one
    axes.xaxis.set_major_formatter(FixedFormatter([f"{lr:g}" for lr in rates]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.1, 0.2)
    canvas.save_with_legend(figure, axes, path)


def plan_curve(tables: Mapping[str, Sequence[PlanRow]], path: Path, title: str) -> None:
    """Days against GPUs on logarithmic axes as a PNG, each point with its MFU; dotted lines show perfect scaling.

    Args:
        tables: for each name the rows of a plan; rows that do not fit are left out.

    Raises:
        ValueError: a table has no row that can be drawn.
    """
    figure, axes = canvas.new_axes(title, "GPUs", "days")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = set()
    for number, (name, rows) in enumerate(tables.items()):
        shown = [(row.gpus, row.days, row.mfu) for row in rows if row.fits and row.days is not None and row.mfu is not None]
        if not shown:
            raise InputError(f"{name} has no number of GPUs on which the run fits; plan it with --table --json on larger GPUs")
        color = COLORS[number % len(COLORS)]
        gpus, days, _ = zip(*shown, strict=True)
        axes.plot(gpus, days, color=color, marker="o", markersize=5, label=name)
        axes.plot(gpus, [days[0] * gpus[0] / N for N in gpus], color=color, linestyle=":", linewidth=1)
        offset, side = ((4, 6), "left") if number == 0 else ((-4, -4 - 11 * number), "right")
        for x, y, mfu in shown:
            text = f"{100 * mfu:.0f} %"
            axes.annotate(text, (x, y), textcoords="offset points", xytext=offset, ha=side, fontsize="small", color=color)
        ticks |= set(gpus)
    axes.set_xticks(sorted(ticks), [str(N) for N in sorted(ticks)])
    axes.yaxis.set_major_formatter("{x:g}")  # the default writes powers of ten as math, which the canvas does not parse
    canvas.save_with_legend(figure, axes, path)


def score_histogram(scores: dict[str, np.ndarray], threshold: float, path: Path, title: str, bins: int = 100) -> None:
    """The distribution of each named set of scores as an outline of equal area, and the threshold, as a PNG.

    Args:
        scores: float [N] for each name; memory maps are read in pieces.
    """
    lowest, highest = (float(end([end(values) for values in scores.values()])) for end in (np.min, np.max))
    edges = np.linspace(lowest, highest if highest > lowest else lowest + 1, bins + 1)
    figure, axes = canvas.new_axes(title, "score: log odds of reference against candidate", "share of images a bin (%)")
    for number, (name, values) in enumerate(scores.items()):
        counts, _ = np.histogram(values, edges)
        line = ("-", "--", ":")[number % 3]
        text = f"{name} ({len(values)})"
        axes.stairs(100 * counts / len(values), edges, color=COLORS[number % len(COLORS)], linestyle=line, label=text)
    axes.axvline(threshold, color=BLACK, linestyle=":", label=f"kept from {threshold:.3f}")
    canvas.save_with_legend(figure, axes, path)


def heat_maps(images: np.ndarray, nats: np.ndarray, names: Sequence[str], path: Path, columns: int = 2) -> None:
    """Each image beside the map of its nats per pixel, dark for few nats, on one scale, as a PNG.

    Args:
        images: uint8 [N, h, w, 3]
        nats: float [N, h, w], the negative log-likelihood of each pixel given those before it
        names: of the images
        columns: pairs of image and map per row
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = canvas.new_figure((4.4 * columns + 1.2, 2.4 * rows + 0.5))
    figure.suptitle("Images, and the nats of each pixel given those before it (bright: unexpected)", fontsize="medium")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (image, cost) in enumerate(zip(images, nats, strict=True)):
        left, right = grid[number // columns, 2 * (number % columns) :][:2]
        left.imshow(image, interpolation="nearest")
        left.set_title(_shortened(names[number]), fontsize="small")
        drawn = right.imshow(cost, cmap="magma", vmin=0.0, vmax=float(nats.max()), interpolation="nearest")
        right.set_title(f"{cost.mean():.3f} nats per token", fontsize="small")
    figure.colorbar(drawn, ax=grid, label="nats per pixel", shrink=0.9)
    canvas.save_png(figure, path)


def _shortened(name: str, most: int = 28) -> str:
    """The start and the end of a long name."""
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[-(most // 2) + 1 :]}"
