"""Results: one JSON row for each probe, in a results.jsonl that is written and read here alone, and the tables made of them.

In: a probe and the features it saw. Out: rows; the best layers, and every layer, as Markdown tables. Called by
`tools/linear_probe.py`, `tools/figures.py` and `tools/tables.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds.evaluate.features import FeatureSet, span
from igpt_ds.evaluate.protocols import Probe
from igpt_ds.files import read_json_lines, write_json_lines
from igpt_ds.provenance import git_commit

FORMAT, VERSION = "igpt_ds.result", 1

Row = dict[str, Any]

# A row with the same values of these is the same measurement, made again.
IDENTITY = ("protocol", "features", "layer", "weights", "model_hash", "dataset_hash", "n_train", "seed")
# Rows with the same values of these differ in the layer alone.
SERIES = tuple(name for name in IDENTITY if name != "layer")
# Rows with the same values of these are measured on the same images.
EXPERIMENT = ("protocol", "dataset", "dataset_hash", "n_train", "seed")
_ORDER = ("trained", "untrained", "pixels")


def make_row(probe: Probe, train: FeatureSet, evaluated: FeatureSet) -> Row:
    """The row of a probe: where the features come from, then what was found."""
    manifest = train.manifest
    found = dataclasses.asdict(probe)
    kind, layer = found.pop("kind"), found.pop("layer")
    return {
        "format": FORMAT,
        "version": VERSION,
        "protocol": "linear_probe",
        "features": kind,
        "layer": layer,
        "weights": manifest["weights"],
        "weights_seed": manifest["seed"],
        "model_hash": manifest["model_hash"],
        "model_objective": manifest["objective"],
        "step": manifest["step"],
        "palette_hash": manifest["palette_hash"],
        "dataset": manifest["dataset"],
        "dataset_hash": {probe.train_split: train.dataset_hash, probe.eval_split: evaluated.dataset_hash},
        **found,
        "git_commit": git_commit(),
    }


def read_results(path: Path) -> list[Row]:
    """The rows of a results.jsonl; a missing file has none.

    Raises:
        ValueError: a line that is not JSON, or not a row of this version.
    """
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or (row.get("format"), row.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} line {number} is not {FORMAT} version {VERSION}; remove the line, or name another file")
        missing = [name for name in (*IDENTITY, "accuracy", "held_out_accuracy") if name not in row]
        if missing:
            raise ValueError(f"{path} line {number} has no {missing[0]!r}; remove the line and probe again")
    return rows


def add_results(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a results.jsonl, which is replaced as a whole; a row takes the place of an older one of its identity.

    One writer at a time: probes that run side by side need a file each.
    """
    kept = {_key(row, IDENTITY): row for row in read_results(path)}
    for row in rows:
        kept.pop(_key(row, IDENTITY), None)
        kept[_key(row, IDENTITY)] = row
    write_json_lines(path, list(kept.values()))


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(row[name]) for name in names)


def series(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows by what they are of (trained, untrained, pixels; normed, raw), each series by rising layer."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["dataset"], _ORDER.index(row["weights"]), row["features"], row["layer"])):
        found.setdefault(_key(row, SERIES), []).append(row)
    return list(found.values())


def best_row(rows: Sequence[Row]) -> Row:
    """The best layer of a series by the held-out images; of equals, the lowest."""
    return max(rows, key=lambda row: (row["held_out_accuracy"], -row["layer"]))


def experiment(rows: Sequence[Row], dataset: str | None = None) -> list[Row]:
    """The rows of a data set, if they were all measured on the same images and can be compared.

    Raises:
        ValueError: no rows, none of that data set, or rows of several experiments.
    """
    names = sorted({row["dataset"] for row in rows})
    if not rows or (dataset is not None and dataset not in names):
        raise ValueError(f"the results hold no rows{f' of {dataset!r}; they have {names}' if names else '; probe first'}")
    chosen = [row for row in rows if dataset in (None, row["dataset"])]
    different = [name for name in EXPERIMENT if len({repr(row[name]) for row in chosen}) > 1]
    if different:
        values = sorted({str(row[different[0]]) for row in chosen})
        advice = "choose one with --dataset" if different[0] == "dataset" else "keep them in files of their own"
        raise ValueError(f"the results are of several experiments: {different[0]} is {' and '.join(values)}; {advice}")
    return chosen


def label(row: Row, among: Sequence[Row]) -> str:
    """What a row is of, in words; models of the same step, or several untrained ones, are told apart by their hash."""
    if row["weights"] == "pixels":
        return "raw pixels"
    alike = {other["model_hash"] for other in among if (other["weights"], other["step"]) == (row["weights"], row["step"])}
    step = f" to step {row['step']}" if row["weights"] == "trained" else ""
    model = f" {row['model_hash'][:8]}" if len(alike) > 1 else ""
    return f"{row['weights']}{step}{model}, {row['features']}"


def markdown_table(rows: Sequence[Row]) -> str:
    """The best layer of each series as a Markdown table, accuracies in percent."""
    lines = [
        "| images | features | best layer | width | C | held out | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in series(rows):
        row = best_row(one)
        images = f"{row['dataset']}: {row['n_train']} {row['train_split']}, {row['n_eval']} {row['eval_split']}"
        seed = f", seed {row['seed']}" if len({other["seed"] for other in rows}) > 1 else ""
        layers = "-" if row["weights"] == "pixels" else f"{row['layer']} of {span([other['layer'] for other in one])}"
        percent = f"{100 * row['held_out_accuracy']:.1f} | {100 * row['accuracy']:.1f}"
        lines.append(f"| {images} | {label(row, rows)}{seed} | {layers} | {row['n_features']} | {row['C']:g} | {percent} |")
    return "\n".join(lines)


def layer_table(rows: Sequence[Row]) -> str:
    """The accuracy of every layer as a Markdown table in percent, a column for each series; pixels have no layers."""
    columns = [one for one in series(rows) if one[0]["weights"] != "pixels"]
    names = [label(one[0], rows) for one in columns]
    lines = [f"| layer | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    accuracies = [{row["layer"]: f"{100 * row['accuracy']:.1f}" for row in one} for one in columns]
    for layer in sorted(set().union(*accuracies)):
        lines.append(f"| {layer} | {' | '.join(column.get(layer, '-') for column in accuracies)} |")
    return "\n".join(lines)
