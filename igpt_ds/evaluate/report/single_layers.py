"""The held-out accuracies of single layers in earlier rows, from which a concatenation by SGD takes its best layer (paper 4.4).

In: result rows, a feature set. Out: accuracies by layer. Called by `tools/sgd_probe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from igpt_ds.evaluate.features.files import FeatureSet
from igpt_ds.evaluate.probes.settings import SgdSettings
from igpt_ds.evaluate.report.results import by_layer
from igpt_ds.evaluate.report.row_types import Row

_ORIGIN = {"feature_precision": "precision", "feature_dtype": "dtype"}
_ORIGIN |= {name: name for name in ("weights", "model_hash", "mask_prob", "mask_seed")}  # names in a row, and in the features


def held_out_by_layer(
    rows: Sequence[Row], train: FeatureSet, kind: str, settings: SgdSettings, held_out: float
) -> dict[int, float]:
    """The held-out accuracy of each layer that was probed by SGD on these training images with these settings."""
    wanted = {name: getattr(train.manifest.origin, own) for name, own in _ORIGIN.items()}
    wanted |= {name: getattr(settings, name) for name in ("steps", "batch_images", "views", "seed")}
    wanted |= {"features": kind, "standardised": settings.standardise, "held_out": held_out}
    return {
        row.layer: row.held_out_accuracy
        for row in by_layer(rows, ["sgd"])
        if all(row.get(name) == value for name, value in wanted.items())
        and row.dataset_hash.get(train.split) == train.dataset_hash
    }
