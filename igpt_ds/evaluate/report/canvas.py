"""The common parts of all figures: size, colours, axes, and writing a PNG without a display and without global state.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Called by `figures.py` and `figures_paper.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from igpt_ds.cli import printable
from igpt_ds.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D")
GREY, BLACK = "#8C8C8C", "#333333"
SIZE, DPI = (8.0, 4.0), 150  # inches, dots an inch: 1200 pixels wide


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure; size in inches."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may be unknown here, and matplotlib refuses to be imported
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        os.environ.update({} if backend is None else {"MPLBACKEND": backend})

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, titled and labelled."""
    figure = new_figure(SIZE)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_with_legend(figure: Figure, axes: Axes, path: Path) -> None:
    """Adds a legend right of the axes and writes the figure."""
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_png(figure, path)


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, atomically. Names in it are shown as they are: "$" starts no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if "mathdefault" not in text.get_text():  # matplotlib's own labels of axes
            text.set_text(printable(text.get_text()))
            text.set_parse_math(False)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})  # so that the same rows give the same bytes
