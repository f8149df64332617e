"""Results: one JSON row for each result in a results.jsonl, which is written and read only here.

In: a probe and its features, a fine-tuning, a likelihood. Out: rows, and their series and labels for tables and figures.
There are three kinds of row, each with the names that identify a measurement (`IDENTITY`). Accuracies lie in 0..1:

    probe       accuracy on eval_split, held_out_accuracy on the images that chose the penalty, and where the features come from;
                protocol "every_layer" ("best_layer" in older files) or "sgd" (one row a layer), "concat" (layers), "low_data"
                (n_labels, n_subsets, subset_accuracies, accuracy their mean, the sample's deviation), "mask_vote" (n_masks,
                accuracy of the vote, single_accuracy of one mask)
    finetune    accuracy, held_out_accuracy, loss ("joint", "clf" or "gen"), lr, lrs (those tried), head_layer, best_step;
                n_masks and single_accuracy where masks vote; with few labels those of "low_data", and model_hash is one of all
    likelihood  what tools/evaluate.py measures

`model` is the shape of the transformer, if known: Figure 3 and Tables 1 to 4 need it. Called by `tools/linear_probe.py`,
`tools/sgd_probe.py`, `tools/evaluate.py`, `tools/evaluate_classifier.py`, `tools/figures.py`, `tools/tables.py`,
`tools/report.py` and `finetune.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpt_ds.config import ModelConfig
from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.report.row_types import FinetuneRow, LikelihoodRow, ProbeRow, Row, as_row, check_types
from igpt_ds.json_files import read_json_lines, seal, write_json_lines
from igpt_ds.locks import locked
from igpt_ds.plan.costs import parameters
from igpt_ds.provenance import git_commit
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

if TYPE_CHECKING:
    from igpt_ds.evaluate.likelihood import Likelihood
    from igpt_ds.evaluate.probes.linear import Probe
    from igpt_ds.evaluate.probes.sgd_records import SgdProbe
    from igpt_ds.evaluate.probes.variants import LowDataProbe

# A line of version 2 has no sha256, and stays as it is.
RESULT = Format("igpt_ds.result", "result", "remove the line and measure again, or name another file", 3, 3, 2)
_WRITE_SECONDS = 600.0  # to wait for other writers, which need milliseconds each

_SAME_MODEL = ("kind", "weights", "model_hash", "dataset", "dataset_hash", "precision")
# Rows of a kind with equal values of these are the same measurement. A missing value counts as None.
IDENTITY = {
    "probe": (
        *_SAME_MODEL,
        *("protocol", "features", "feature_precision", "feature_dtype", "layer", "layers", "n_train", "seed", "C_grid", "tol"),
        *(
            "n_labels",
            "n_masks",
            "mask_draws",
            "mask_prob",
            "mask_seed",
            "rates",
            "steps",
            "batch_images",
            "standardised",
            "views",
            "held_out",
            "n_subsets",
        ),
    ),
    "finetune": (*_SAME_MODEL, "loss", "lr", "head_layer", "augmentation", "n_train", "seed", "n_labels", "n_masks", "n_subsets"),
    "likelihood": (*_SAME_MODEL, "split", "n_images", "batch", "masks"),
}
_MEASURED = ("weights", "model_hash", "step", "dataset", "dataset_hash", "n_train", "seed", "accuracy")
_PROBED = (*_MEASURED, "held_out_accuracy")  # which a fine-tuning on train+val does not have
_REQUIRED = {
    "probe": (*_PROBED, "protocol", "features", "feature_precision", "feature_dtype", "layer", "train_split", "eval_split"),
    "finetune": (*_MEASURED, "model", "model_objective", "loss", "lr", "eval_split"),
    "likelihood": (*_SAME_MODEL, "model", "model_objective", "step", "split", "n_images", "nats_per_token"),
}
_CAN_BE_NONE = ("model_hash", "model", "model_objective", "step")  # of raw pixels, and in older files
# Rows with equal values of these differ only in the layer. The search of each layer decides how many learning rates it tries.
SERIES = tuple(name for name in IDENTITY["probe"] if name not in ("layer", "rates"))
# Rows with equal values of these are measured on the same images.
EXPERIMENT = ("protocol", "dataset", "dataset_hash", "n_train", "seed")
BY_LAYER = ("every_layer", "sgd")  # protocols with one row for each layer
_ORDER = ("trained", "untrained", "pixels")


def make_row(
    probe: Probe | LowDataProbe | SgdProbe, train: FeatureSet, evaluated: FeatureSet, protocol: str = "every_layer"
) -> ProbeRow:
    """The row of a probe: the origin of the features, then the fields of the probe."""
    origin = train.manifest.origin
    masked = train.mask_draws or evaluated.mask_draws  # other splits of the directory may be
    found = {name: value for name, value in vars(probe).items() if name != "fitted"}
    kind, layer = found.pop("kind"), found.pop("layer")
    values = {
        "format": RESULT.name,
        "version": RESULT.version,
        "kind": "probe",
        "protocol": protocol,
        "features": kind,
        "layer": layer,
        "weights": origin.weights,
        "weights_seed": origin.seed,
        "model_hash": origin.model_hash,
        "model_objective": origin.objective,
        "model": origin.model,
        "step": origin.step,
        "feature_precision": origin.precision,
        "feature_dtype": origin.dtype,
        "mask_draws": evaluated.mask_draws,
        "mask_prob": origin.mask_prob if masked else None,
        "mask_seed": origin.mask_seed if masked else None,
        "palette_hash": origin.palette_hash,
        "dataset": train.manifest.dataset,
        "dataset_hash": {probe.train_split: train.dataset_hash, probe.eval_split: evaluated.dataset_hash},
        **found,
        "git_commit": git_commit(),
    }
    row = as_row(values)
    assert isinstance(row, ProbeRow)
    return row


def likelihood_row(measured: Likelihood, model: ModelConfig) -> LikelihoodRow:
    """The row of a likelihood and the shape of its model."""
    left_out = ("commit", "objective", "published", "published_does_not_apply")
    about = {"format": RESULT.name, "version": RESULT.version, "kind": "likelihood", "weights": "trained"}
    facts = {name: value for name, value in measured.to_dict().items() if name not in left_out}
    shape = {"model_objective": measured.objective, "model": model.to_dict()}
    row = as_row(about | shape | facts | {"git_commit": measured.commit})
    assert isinstance(row, LikelihoodRow)
    return row


def finetune_row(**facts: Any) -> FinetuneRow:
    """The row of a fine-tuning from its facts, at least those of `_REQUIRED`."""
    values = {"format": RESULT.name, "version": RESULT.version, "kind": "finetune", **facts, "git_commit": git_commit()}
    missing = [name for name in _REQUIRED["finetune"] if name not in values]
    assert not missing, f"a fine-tuning's row needs {missing}"
    row = as_row(values)
    assert isinstance(row, FinetuneRow)
    return row


def read_results(path: Path) -> list[Row]:
    """The rows of a results.jsonl; a missing file has none.

    Raises:
        ValueError: a line is not JSON, not a row of this version, lacks a value, or has a value of another type.
    """
    return [
        _checked(f"{path} line {number}", values) for number, values in enumerate(read_json_lines(path, strict=True), start=1)
    ]


def _checked(line: str, values: Mapping[str, Any]) -> Row:
    """The record of a line's JSON, with the one check of its schema."""
    RESULT.opened(values, line)
    values = {name: value for name, value in values.items() if name != "sha256"}
    if not isinstance(values.get("kind"), str) or values["kind"] not in IDENTITY:
        raise InputError(f"{line} is of kind {values.get('kind')!r}, not one of {', '.join(IDENTITY)}; remove it")
    known = {name for name, value in values.items() if value is not None or name in _CAN_BE_NONE}
    if missing := [name for name in _REQUIRED[values["kind"]] if name not in known]:
        raise InputError(f"{line} has no {missing[0]!r}; remove the line and measure again")
    check_types(values, line)
    if values["weights"] not in _ORDER:
        raise InputError(f"{line} has weights {values['weights']!r}, not one of {', '.join(_ORDER)}; remove the line")
    return as_row(values)


def read_all(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files, which must exist.

    Raises:
        ValueError: a file is missing or damaged.
    """
    rows = []
    for path in paths:
        if not path.is_file():
            raise InputError(f"--results {path} does not exist; make it with tools/linear_probe.py, or name another file")
        rows += read_results(path)
    return rows


def add_results(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a results.jsonl, which is rewritten under its lock. A row replaces an older row of the same identity.

    On a disk without locks only one process may write a file.

    Raises:
        ValueError: another process keeps the file locked, or a row of it is damaged.
    """
    with locked(path, wait=_WRITE_SECONDS):
        kept = {key(row, IDENTITY[row.kind]): row for row in read_results(path)}
        for row in rows:
            own = key(row, IDENTITY[row.kind])
            kept.pop(own, None)
            kept[own] = row
        versions = [seal(row.json) if row.json["version"] == RESULT.version else row.json for row in kept.values()]
        write_json_lines(path, versions)


def key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """The values of these names in a comparable form; a missing value counts as None."""
    return tuple(repr(row.get(name)) for name in names)


def by_layer(rows: Sequence[Row], protocols: Sequence[str] = BY_LAYER) -> list[ProbeRow]:
    """The probes with one row for each layer."""
    return [row for row in rows if isinstance(row, ProbeRow) and row.protocol in protocols]


def series(rows: Sequence[ProbeRow]) -> list[list[ProbeRow]]:
    """The rows grouped by weights, kind of features, objective, size and step; each group by rising layer."""
    found: dict[tuple[str, ...], list[ProbeRow]] = {}
    for row in sorted(rows, key=_place):
        found.setdefault(key(row, SERIES), []).append(row)
    return list(found.values())


def _place(row: ProbeRow) -> tuple[Any, ...]:
    size = (row.model_objective or "", model_parameters(row) or 0, row.step or 0)
    return row.dataset, _ORDER.index(row.weights), row.features, *size, row.layer


def best_row(rows: Sequence[ProbeRow]) -> ProbeRow:
    """The best layer of a series by the held-out images; of equal ones, the lowest."""
    return max(rows, key=lambda row: (row.held_out_accuracy, -row.layer))


def experiment(rows: Sequence[Row], dataset: str | None = None) -> list[ProbeRow]:
    """The probes by layer of a data set, checked to be measured on the same images.

    Raises:
        ValueError: no rows, none of that data set, or rows of several experiments.
    """
    probes = by_layer(rows)
    names = sorted({row.dataset for row in probes})
    if not probes or (dataset is not None and dataset not in names):
        raise InputError(f"the results hold no rows{f' of {dataset!r}; they have {names}' if names else '; probe first'}")
    chosen = [row for row in probes if dataset in (None, row.dataset)]
    different = [name for name in EXPERIMENT if len({repr(row.get(name)) for row in chosen}) > 1]
    if different:
        values = sorted({str(row.get(different[0])) for row in chosen})
        advice = "choose one with --dataset" if different[0] == "dataset" else "keep them in separate files"
        raise InputError(f"the results are of several experiments: {different[0]} is {' and '.join(values)}; {advice}")
    return chosen


def model_parameters(row: Row) -> int | None:
    """The number of parameters of a row's model, if its shape is known."""
    return None if row.model is None else parameters(record_from(ModelConfig, row.model, "row", ""), row.model_objective)
