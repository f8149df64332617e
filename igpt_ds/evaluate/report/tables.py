"""The paper's Tables 1 to 5 as Markdown: the published rows (`paper/published.py`), our rows, and the difference.

In: result rows, recipes. Out: text. Our rows are of trained models, at the layer that held-out images chose, on the split that
the row names. The difference is to the paper's own model on the same images. That model can be larger and trained on other data,
so the table gives our size. Called by `tools/tables.py` and `tools/report.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from igpt_ds.config import Recipe, get_recipe
from igpt_ds.evaluate.features.manifest import span
from igpt_ds.evaluate.report.baselines import HEADER, beside, not_measured, pixels_win
from igpt_ds.evaluate.report.results import SERIES, best_row, by_layer, key, model_parameters, series
from igpt_ds.evaluate.report.row_names import differences, label, model_name, system_name
from igpt_ds.evaluate.report.row_types import FinetuneRow, ProbeRow, Row
from igpt_ds.markdown import as_table
from igpt_ds.paper.published import FIGURE_4, FINETUNED_ON_40, LABELS, TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, Accuracy

TITLES = {
    1: "Table 1: linear probes on CIFAR and STL-10",
    2: "Table 2: linear probes on ImageNet",
    3: "Table 3: fine-tuning",
    4: "Table 4: few labels on CIFAR-10, error in percent",
    5: "Table 5: learning rates",
}
_FINETUNED_40 = 100 - FINETUNED_ON_40
_CHOSEN = {"held-out tenth of all labels": ", chosen with all labels"}  # how a low_data probe got its layer
_KNOBS = ("dropout", "weight_decay", "head_std")  # of a fine-tuning; its row has those that are not 0
_SAME_TUNING = (  # of fine-tunings that differ only in the number of labels
    *("weights", "start_hash", "model", "model_objective", "dataset", "dataset_hash", "n_train", "eval_split", "n_subsets"),
    *("loss", "gen_scale", "lr", *_KNOBS, "head_layer", "augmentation", "batch_images", "precision", "seed", "subset_seed"),
    *("train_split", "held_out_split", "n_masks"),
)
_R = TypeVar("_R", ProbeRow, FinetuneRow)
_WORDS = {"unsupervised": "ImageNet, no labels", "supervised": "ImageNet, with labels", "": "none"}


def paper_table(number: int, rows: Sequence[Row], recipes: Iterable[Recipe] = ()) -> str:
    """A table of the paper with its title."""
    if number == 5:
        text = _rates(recipes)
    elif number == 4:
        text = _low_data(rows)
    else:
        text = {1: _probes, 2: _imagenet, 3: _finetunes}[number](rows)
    return f"### {TITLES[number]}\n\n{text}"


def markdown_table(rows: Sequence[ProbeRow], among: Sequence[Row] | None = None) -> str:
    """The best layer of each series as a Markdown table, accuracies in percent, then a line for each that raw pixels beat.

    Args:
        among: the rows in which pixels and untrained networks are looked for (default: `rows`).
    """
    among = rows if among is None else among
    penalty = "C or lr" if any(row.rate is not None for row in rows) else "C"
    lines = []
    for one in series(rows):
        row = best_row(one)
        images = f"{row.dataset}: {row.n_train} {row.train_split}, {row.n_eval} {row.eval_split}"
        layers = span(row.layers) if row.layers else f"{row.layer} of {span([other.layer for other in one])}"
        layers = "-" if row.weights == "pixels" else layers
        percent = [f"{100 * row.held_out_accuracy:.1f}", f"{100 * row.accuracy:.1f}"]
        unit, value = ("lr ", row.rate) if row.rate is not None else ("", row.C)
        chosen = "-" if value is None else f"{unit}{value:g}"
        lines.append([images, label(row, rows), layers, f"{row.n_features}", chosen, *percent, *beside(row, among)])
    table = as_table(["images", "features", "best layer", "width", penalty, "held out", "accuracy", *HEADER], lines)
    return _with_list(table, pixels_win([best_row(one) for one in series(rows)], among, lambda row: label(row, rows)))


def _with_list(table: str, sentences: Iterable[str]) -> str:
    lines = "\n".join(f"- {sentence}" for sentence in sentences)
    return f"{table}\n\n{lines}" if lines else table


def layer_table(rows: Sequence[ProbeRow]) -> str:
    """The accuracy of every layer as a Markdown table in percent, a column for each series; pixels have no layers."""
    columns = [one for one in series(rows) if one[0].weights != "pixels"]
    names = [label(one[0], rows) for one in columns]
    accuracies = [{row.layer: f"{100 * row.accuracy:.1f}" for row in one} for one in columns]
    layers = sorted(set().union(*accuracies))
    return as_table(["layer", *names], [[f"{layer}", *(column.get(layer, "-") for column in accuracies)] for layer in layers])


def _best_probes(rows: Sequence[Row], datasets: Iterable[str]) -> list[ProbeRow]:
    """The best layer of each series of each trained model, then probes of several layers and votes."""
    trained = [row for row in rows if isinstance(row, ProbeRow) and row.weights == "trained" and row.dataset in datasets]
    best = [best_row(one) for protocol in ("every_layer", "sgd") for one in series(by_layer(trained, [protocol]))]
    best += [row for row in trained if row.protocol in ("concat", "mask_vote")]
    return sorted(best, key=lambda row: (row.dataset, row.model_objective, model_parameters(row) or 0, row.step))


def _ours(row: ProbeRow | FinetuneRow) -> str:
    size = f", {_millions(row)}M" if row.model else ""
    objective = ", BERT" if row.model_objective == "bert" else ""
    pixels = "" if row.model is None else f" at {row.model['n_px']}x{row.model['n_px']}"
    return f"**ours: {model_name(row.model)}{size}{pixels}{objective}**"


def _millions(row: Row) -> str:
    count = model_parameters(row)
    return "-" if count is None else f"{count / 1e6:.{2 if count < 1e5 else 1 if count < 1e7 else 0}f}"


def _where(row: ProbeRow) -> str:
    """The layer and the kind of probe."""
    how = ", SGD" if row.rate is not None or row.protocol == "sgd" else ""
    seen = f", {_masks(row)}" if _masks(row) else ""
    labels = f", {row.n_labels} labels" if row.protocol == "low_data" else ""
    return f"{span(row.layers or [row.layer])} {row.features}{how}{seen}{labels}"


def _masks(row: ProbeRow) -> str:
    """How a bert model saw the images of a probe (paper 4.6); "" for other models, and where a row does not say it."""
    if row.n_masks:
        return f"{row.n_masks} masks vote"
    if row.model_objective != "bert" or row.mask_draws is None:
        return ""
    return "one mask" if row.mask_draws else "whole images"


def _difference(ours: float, paper: float | None) -> str:
    return "-" if paper is None else f"{ours - paper:+.1f}"


def _best(table: Iterable[Accuracy], dataset: str, row: Row | None = None) -> float | None:
    """The paper's accuracy to compare with: of the same size and input if it exists, else the best on these images. A model from
    scratch is compared with models from scratch."""
    if row is not None and row.model_objective == "bert":
        return None  # the models of the tables are auto-regressive
    scratch = row is not None and row.weights == "untrained"
    known = [one for one in table if one.ours and one.dataset == dataset and one.model.endswith("from scratch") == scratch]
    if row is not None and row.model is not None:
        shape = (model_name(row.model), row.model["n_px"])
        known = [one for one in known if (one.model, one.n_px) == shape] or known
        known = [one for one in known if one.features == (row.n_features if isinstance(row, ProbeRow) else None)] or known
    return max((one.accuracy for one in known), default=None)


def _best_finetuned(dataset: str, row: FinetuneRow) -> float | None:
    """The paper's accuracy to compare a fine-tuning with; for BERT it is in Figure 4."""
    if row.model_objective == "ar":
        return _best(TABLE_3, dataset, row)
    bert = [bar for bar in FIGURE_4 if (bar.dataset, bar.objective, bar.evaluation) == (dataset, "bert", "finetune")]
    return bert[0].accuracy if bert and row.weights == "trained" else None


def _datasets(table: Iterable[Accuracy], rows: Sequence[Row], kind: str) -> list[str]:
    """The data sets of a table, then those of our rows only. Probes on ImageNet have their own table."""
    others = sorted({row.dataset for row in rows if row.kind == kind and not row.get("n_labels")})
    ours = [dataset for dataset in others if kind == "finetune" or not dataset.startswith("imagenet")]
    return list(dict.fromkeys([*(one.dataset for one in table), *ours]))


def _words(row: ProbeRow | FinetuneRow) -> str:
    """A row of a table in a sentence."""
    where = _where(row) if isinstance(row, ProbeRow) else _tuned(row)
    return f"{system_name(row)} at step {row.step} ({where})"


def _tuned(row: FinetuneRow) -> str:
    """How a row was fine-tuned."""
    knobs = "".join(f", {name} {row.get(name):g}" for name in _KNOBS if row.get(name))
    return f"{row.loss}, lr {row.lr:g}{knobs}{f', {row.n_masks} masks vote' if row.n_masks else ''}"


def _probes(rows: Sequence[Row]) -> str:
    lines, ours = [], list[ProbeRow]()
    for dataset in _datasets(TABLE_1, rows, "probe"):
        paper = _best(TABLE_1, dataset)
        for one in (one for one in TABLE_1 if one.dataset == dataset):
            lines.append([dataset, one.model, _WORDS[one.pretraining], "", "test", f"{one.accuracy:.1f}", "", "", ""])
        for row in _best_probes(rows, [dataset]):
            percent = 100 * row.accuracy
            about = [dataset, _ours(row), f"no labels, step {row.step}", _where(row), row.eval_split]
            lines.append([*about, f"{percent:.1f}", _difference(percent, paper), *beside(row, rows)])
            ours.append(row)
    table = as_table(["images", "model", "pre-training", "layer", "split", "accuracy", "minus iGPT-L", *HEADER], lines)
    return _with_list(table, pixels_win(ours, rows, _words))


def _imagenet(rows: Sequence[Row]) -> str:
    header = ["method", "input", "parameters (M)", "features", "layer", "split", "accuracy", "minus the paper's", *HEADER]
    lines = []
    for one in TABLE_2:
        size = "orig." if one.n_px is None else f"{one.n_px}x{one.n_px}"
        lines.append([one.model, size, f"{one.parameters:g}", f"{one.features}", "", "test", f"{one.accuracy:.1f}", "", "", ""])
    ours = _best_probes(rows, sorted({row.dataset for row in rows if row.dataset.startswith("imagenet")}))
    for row in ours:
        percent, shape = 100 * row.accuracy, row.model
        about = [_ours(row), "-" if shape is None else f"{shape['n_px']}x{shape['n_px']}", _millions(row)]
        against = _difference(percent, _best(TABLE_2, "imagenet", row))
        lines.append([*about, f"{row.n_features}", _where(row), row.eval_split, f"{percent:.1f}", against, *beside(row, rows)])
    return _with_list(as_table(header, lines), pixels_win(ours, rows, _words))


def _finetunes(rows: Sequence[Row]) -> str:
    lines, shown = [], list[FinetuneRow]()
    for dataset in _datasets(TABLE_3, rows, "finetune"):
        for one in (one for one in TABLE_3 if one.dataset == dataset):
            name = one.model if one.n_px is None else f"{one.model}, {one.n_px}x{one.n_px}"
            lines.append([dataset, name, _WORDS[one.pretraining], "", "test", f"{one.accuracy:.1f}", "", "", ""])
        ours = [row for row in rows if isinstance(row, FinetuneRow) and row.dataset == dataset and row.n_labels is None]
        several = len({row.n_train for row in ours}) > 1
        for row in ours:
            percent = 100 * row.accuracy
            start = f"no labels, step {row.step}" if row.weights == "trained" else "none, from scratch"
            labels = f", {row.n_train} labels" if several else ""
            about = [dataset, _ours(row), start, f"{_tuned(row)}{labels}", row.eval_split]
            lines.append([*about, f"{percent:.1f}", _difference(percent, _best_finetuned(dataset, row)), *beside(row, rows)])
        shown += ours
    table = as_table(["images", "model", "pre-training", "loss", "split", "accuracy", "minus the paper's", *HEADER], lines)
    return _with_list(table, pixels_win(shown, rows, _words))


def _low_data(rows: Sequence[Row]) -> str:
    paper = next(one for one in TABLE_4 if one.model == "iGPT-L")
    few = [row for row in rows if isinstance(row, ProbeRow | FinetuneRow) and row.n_labels]
    lines, counts = [], sorted({*LABELS, *(row.n_labels or 0 for row in few)})
    for one in TABLE_4:
        cells = ["{:.1f} ± {:.1f}".format(*one.errors[n]) if n in one.errors else "" for n in counts]
        lines.append([one.model, "", *cells])
        if one is paper:
            fine = [f"{_FINETUNED_40:.1f}" if n == 40 else "" for n in counts]
            lines.append(["iGPT-L, fine-tuned (4.7)", "", *fine])
    probes = [row for row in few if isinstance(row, ProbeRow) and row.protocol == "low_data"]
    same = [name for name in (*SERIES, "layer", "layer_chosen_by") if name != "n_labels"]
    of_paper = {n: paper.errors[n][0] for n in LABELS}
    for by_labels in _by_labels(probes, same):
        row = next(iter(by_labels.values()))
        name = {"trained": _ours(row), "untrained": "**ours: untrained**", "pixels": "**ours: raw pixels**"}[row.weights]
        apart = differences(row, probes, but=("n_labels",))
        chosen = "" if row.weights == "pixels" else _CHOSEN.get(str(row.get("layer_chosen_by")), "")
        lines.append([name, f"{_elsewhere(row)}{row.layer} {row.features}{chosen}, {row.eval_split}{apart}"])
        lines[-1] += _errors(by_labels, of_paper, counts)
    for of_tuned in _by_labels([row for row in few if isinstance(row, FinetuneRow)], _SAME_TUNING):
        tuning = next(iter(of_tuned.values()))
        start = "fine-tuned" if tuning.weights == "trained" else "from scratch"
        folded = tuning.held_out_split is None or tuning.held_out_split in str(tuning.train_split).split("+")
        step = "the last step" if folded else f"step chosen by all of {tuning.held_out_split}"
        about = f"{_elsewhere(tuning)}{tuning.head_layer}, {start}, {_tuned(tuning)}, {step}, {tuning.eval_split}"
        against = {40: _FINETUNED_40} if tuning.weights == "trained" and tuning.model_objective == "ar" else {}
        lines.append([_ours(tuning), about, *_errors(of_tuned, against, counts)])
    table = as_table(["model", "layer", *(f"{n} labels" for n in counts)], lines)
    return _with_list(table, [*pixels_win(probes, rows, _words), *not_measured(probes, rows)])


def _by_labels(rows: Sequence[_R], same: Iterable[str]) -> list[dict[int, _R]]:
    """The rows that differ only in the number of labels, by that number."""
    found: dict[tuple[str, ...], dict[int, _R]] = {}
    for row in rows:
        found.setdefault(key(row, list(same)), {})[row.n_labels or 0] = row
    return list(found.values())


def _elsewhere(row: ProbeRow | FinetuneRow) -> str:
    """The images, where they are not those of Table 4."""
    return "" if row.dataset == "cifar10" else f"{row.dataset}, "


def _errors(rows: Mapping[int, ProbeRow | FinetuneRow], paper: Mapping[int, float], counts: Iterable[int]) -> list[str]:
    """The error and its deviation for each number of labels, and on the paper's images the difference to the paper's error."""
    cells = []
    for n in counts:
        row = rows.get(n)
        if row is None:
            cells.append("")
            continue
        error = 100 * (1 - row.accuracy)
        spread = "" if row.deviation is None else f" ± {100 * row.deviation:.1f}"
        against = f" ({error - paper[n]:+.1f})" if row.dataset == "cifar10" and n in paper else ""
        cells.append(f"{error:.1f}{spread}{against}")
    return cells


def _rates(recipes: Iterable[Recipe]) -> str:
    lines = []
    for one in TABLE_5:
        name = f"igpt_{one.size.lower()}_{one.objective}_{one.n_px}"
        lr = get_recipe(name).lr
        about = [f"iGPT-{one.size}", {"ar": "auto-regressive", "bert": "BERT"}[one.objective], f"{one.n_px}x{one.n_px}"]
        lines.append([*about, f"{one.lr:g}", f"`{name}`: {lr:g}", f"{lr - one.lr:+g}" if lr != one.lr else "0"])
    for recipe in recipes:
        shape = {"n_layer": recipe.model.n_layer, "n_head": recipe.model.n_head, "n_embd": recipe.model.n_embd}
        about = [model_name(shape), {"ar": "auto-regressive", "bert": "BERT"}[recipe.objective]]
        lines.append([*about, f"{recipe.model.n_px}x{recipe.model.n_px}", "", f"`{recipe.name}`: {recipe.lr:g}", ""])
    return as_table(["model", "objective", "input", "paper", "ours", "difference"], lines)
