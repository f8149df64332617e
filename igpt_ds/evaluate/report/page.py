"""One run as one HTML page: pictures first, then tables of linear probes and the configuration.

In: a run's config, its training rows, result rows, PNG files. Out: one HTML file with pictures as data URIs, without scripts and
without requests to the network. Called by `tools/report.py`.
"""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds.config import Recipe
from igpt_ds.console import count
from igpt_ds.data.png import SIGNATURE
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import best_row, by_layer, series
from igpt_ds.evaluate.report.row_names import label, model_name
from igpt_ds.evaluate.report.row_types import ProbeRow, Row
from igpt_ds.evaluate.report.run_files import CurveRow, ReportedRun
from igpt_ds.evaluate.report.tables import layer_table, markdown_table, paper_table
from igpt_ds.markdown import as_table, read_cells
from igpt_ds.plain_files import check_file
from igpt_ds.plan.costs import parameters

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1.2rem }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem } p { margin: .4rem 0; overflow-wrap: anywhere } .quiet { color: #666 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .22rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top }
th { background: #f4f4f4 }
tr.ours td { background: #eef5fb; font-weight: 600 } figure { margin: 1.4rem 0 2rem; overflow-x: auto }
figcaption { color: #444; font-size: .95rem; position: sticky; left: 0 }
img { border: 1px solid #eee; display: block; margin-bottom: .4rem }
img.curve { width: 100%; min-width: 34rem; box-sizing: border-box } img.pixels { image-rendering: pixelated }
@media (min-width: 56rem) { img.pixels { max-width: 100% } }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.35 }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# What pictures show, by the name of their file without .png.
_CAPTIONS = {
    "samples": "Images that the model draws; with completions also the originals and the rows that were given",
    "confusion": "How often the best probe takes each class (row) for another (column), in percent of the row",
    "confusion_finetuned": "The same for the fine-tuned model",
    "neighbours": "Held-out images, each followed by the training images nearest to it in the features of the best layer",
    "datasets": "Linear probe accuracy by layer for each data set, as the paper's Figure 2",
    "loss": "Linear probe accuracy against validation loss, as the paper's Figure 3",
    "objectives": "Auto-regressive beside BERT, as the paper's Figure 4",
}


@dataclass(frozen=True)
class Picture:
    """A PNG file and its caption. A curve fills the page's width; other pictures keep their pixels."""

    path: Path
    caption: str
    curve: bool = False

    @staticmethod
    def of(path: Path) -> Picture:
        """A picture whose caption comes from the name of its file."""
        words = _CAPTIONS.get(path.stem)
        curve = words is not None and path.stem not in ("samples", "neighbours")
        return Picture(path, f"{words} ({path.name})" if words else path.name, curve)


def page(
    name: str,
    run: ReportedRun,
    training: Sequence[CurveRow],
    results: Sequence[Row],
    pictures: Sequence[Picture],
    tables: Iterable[int] = (),
    goodput: str = "",
) -> str:
    """The page.

    Args:
        training: training steps and validations.
        results: rows of any kind; may be empty.
        pictures: in the order of the page.
        tables: numbers of the paper's tables to show with our rows.
        goodput: where the wall clock went, a Markdown table and a line below it; "" leaves the section out.
    """
    probes = by_layer(results)
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="quiet">{_text(_headline(run))}</p>',
        *map(_figure, pictures),
        "<h2>In short</h2>",
        _short(run.recipe, training, probes),
    ]
    if probes:
        parts += [
            "<h2>Linear probes</h2>",
            "<h3>The best layer of each kind of features</h3>",
            _table_and_lines(markdown_table(probes, results)),
        ]
        if any(row.weights != "pixels" for row in probes):
            parts += ["<h3>Every layer</h3>", html_table(layer_table(probes))]
    numbers = list(tables)
    if numbers:
        parts.append("<h2>Beside the paper</h2>")
        for number in numbers:
            title, _, table = paper_table(number, results, [run.recipe]).partition("\n\n")
            parts += [f"<h3>{_text(title.lstrip('# '))}</h3>", _table_and_lines(table)]
    if goodput:
        parts += ["<h2>Goodput</h2>", _table_and_lines(goodput)]
    parts += ["<h2>Configuration</h2>", f"<pre>{_text(run.text)}</pre>"]
    fit = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = (
        f'<meta charset="utf-8">{fit}<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{_text(name)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _figure(picture: Picture) -> str:
    check_file(picture.path)
    content, caption, kind = picture.path.read_bytes(), picture.caption, "curve" if picture.curve else "pixels"
    if not content.startswith(SIGNATURE):
        raise InputError(f"{picture.path} is not a PNG file; name pictures with --pictures")
    data = base64.b64encode(content).decode()
    image = f'<img class="{kind}" alt="{_text(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def html_table(markdown: str) -> str:
    """An HTML table from a Markdown one; rows with a cell in bold are marked as ours."""
    lines = [read_cells(line) for line in markdown.splitlines()]
    header = "".join(f"<th>{_cell(cell)}</th>" for cell in lines[0])
    body = []
    for line in lines[2:]:
        ours = ' class="ours"' if any(cell.startswith("**") for cell in line) else ""
        body.append(f"<tr{ours}>" + "".join(f"<td>{_cell(cell)}</td>" for cell in line) + "</tr>")
    head = f"<thead><tr>{header}</tr></thead>" if any(lines[0]) else ""
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _table_and_lines(markdown: str) -> str:
    """A Markdown table, and the list below it if there is one."""
    table, _, lines = markdown.partition("\n\n")
    return html_table(table) + "".join(f"<p>{_text(line.removeprefix('- '))}</p>" for line in lines.splitlines())


def _cell(text: str) -> str:
    return _text(text.replace("**", "").replace("`", ""))


def _headline(run: ReportedRun) -> str:
    recipe, ranks = run.recipe, run.world_size
    commit = f", commit {run.git_commit[:12]}" if run.git_commit else ""
    how = f"{count(ranks, 'rank')}, {run.precision}"
    work = f"objective {recipe.objective}, {recipe.steps} steps of {recipe.batch_images} images"
    return f"recipe {recipe.name}: {work}; {how}{commit}"


def _short(recipe: Recipe, training: Sequence[CurveRow], probes: Sequence[ProbeRow]) -> str:
    """The summary as a table of two columns."""
    shape = {name: getattr(recipe.model, name) for name in ("n_layer", "n_head", "n_embd")}
    size = f"{model_name(shape)}, {parameters(recipe.model, recipe.objective):,} parameters, {recipe.model.n_layer} layers"
    facts = [("model", f"{size}, {recipe.model.n_px}x{recipe.model.n_px} pixels of {recipe.model.n_vocab} colours")]
    steps = [row for row in training if row.loss is not None]
    validations = [(row.val_loss, row.step) for row in training if row.val_loss is not None]
    if steps:
        facts.append(("trained", f"{steps[-1].step} of {recipe.steps} steps, {steps[-1].images_seen:,} images"))
    if validations:
        uniform = math.log(recipe.model.n_vocab)
        last = f"{validations[-1][0]:.4f} nats per token at step {validations[-1][1]}"
        facts.append(("validation loss", f"{last}; best {min(validations)[0]:.4f}; uniform {uniform:.4f}"))
    speeds = [row.images_per_s for row in steps if row.images_per_s]
    if speeds:
        mfu = [row.mfu for row in steps if row.mfu]
        share = f", {100 * statistics.median(mfu):.1f} % of the peak (MFU)" if mfu else ""
        facts.append(("speed", f"{statistics.median(speeds):.1f} images/s in the median{share}"))
    for one in series(probes):
        row = best_row(one)
        what = f"{100 * row.accuracy:.1f} % on {row.dataset} {row.eval_split}"
        layer = "" if row.weights == "pixels" else f", layer {row.layer}"
        facts.append((label(row, probes), f"{what}{layer}"))
    return html_table(as_table(["", ""], facts))
