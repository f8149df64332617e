"""The best layer by earlier rows: for a concatenation by SGD (paper 4.4), and for the class head of a fine-tuning (4.5).

In: result rows or their file, a feature set or a model. Out: accuracies by layer, or a layer. Called by `tools/sgd_probe.py` and
`finetune.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igpt_ds.errors import InputError
from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.settings import SgdSettings
from igpt_ds.evaluate.report.results import best_row, by_layer, read_results
from igpt_ds.evaluate.report.row_types import Row

_ORIGIN = {"feature_precision": "precision", "feature_dtype": "dtype"}
_ORIGIN |= {name: name for name in ("weights", "model_hash", "mask_prob", "mask_seed")}  # names in a row, and in the features


def held_out_by_layer(
    rows: Sequence[Row], train: FeatureSet, kind: str, settings: SgdSettings, held_out: float
) -> dict[int, float]:
    """The held-out accuracy of each layer that was probed by SGD on these training images with these settings."""
    wanted = {name: getattr(train.manifest.origin, own) for name, own in _ORIGIN.items()}
    wanted |= {} if train.mask_draws else {"mask_prob": None, "mask_seed": None}
    wanted |= {name: getattr(settings, name) for name in ("steps", "batch_images", "views", "seed")}
    wanted |= {"features": kind, "standardised": settings.standardise, "held_out": held_out}
    return {
        row.layer: row.held_out_accuracy
        for row in by_layer(rows, ["sgd"])
        if all(row.get(name) == value for name, value in wanted.items())
        and row.dataset_hash.get(train.split) == train.dataset_hash
    }


def best_layer(path: Path, model_hash: str) -> int:
    """The layer with the best probe of a model's normed features in a results file, by the held-out images.

    Raises:
        ValueError: there is no such file, or it has no probe of them.
    """
    if not path.is_file():
        raise InputError(f"--layer_from {path} does not exist; make it with tools/linear_probe.py, or give --layer")
    probes = by_layer(read_results(path))
    rows = [row for row in probes if row.model_hash == model_hash and row.weights == "trained" and row.features == "normed"]
    if not rows:
        fix = "probe normed features of the model that training starts from with tools/linear_probe.py, or give --layer"
        raise InputError(f"--layer_from {path} has no probes of these weights; {fix}")
    return best_row(rows).layer
