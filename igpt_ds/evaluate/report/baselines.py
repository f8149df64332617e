"""What a trained row is to be compared with: raw pixels and an untrained network, measured on the same images.

In: rows. Out: the cells "minus pixels" and "minus untrained", and a line where pixels win. Called by `tables.py` and `page.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from igpt_ds.evaluate.report.results import key
from igpt_ds.evaluate.report.row_types import FinetuneRow, ProbeRow, Row

BASELINES = ("pixels", "untrained")
HEADER = [f"minus {weights}" for weights in BASELINES]
_SAME_IMAGES = ("dataset", "eval_split", "n_train", "n_labels")
_SAME_NETWORK = ("model", "model_objective")


def baseline(row: ProbeRow | FinetuneRow, rows: Sequence[Row], weights: str) -> ProbeRow | FinetuneRow | None:
    """The row of raw pixels or of an untrained network on the same images and labels, or None if it was not measured.

    Of several it is the one that the held-out images chose. An untrained network has the shape and the objective of the row's;
    that of a fine-tuned row is fine-tuned too. Pixels are always probed. Beside a concatenation or a vote stands the best layer.
    """
    kind = "probe" if weights == "pixels" else row.kind
    same = [
        other
        for other in rows
        if isinstance(other, ProbeRow | FinetuneRow)
        and (other.kind, other.weights) == (kind, weights)
        and (key(other, _SAME_IMAGES), _hashes(other)) == (key(row, _SAME_IMAGES), _hashes(row))
        and (weights == "pixels" or key(other, _SAME_NETWORK) == key(row, _SAME_NETWORK))
    ]
    if isinstance(row, ProbeRow):  # prefer the same protocol and the same kind of features
        for name in ("protocol", "features"):
            same = [other for other in same if other.get(name) == row.get(name)] or same
    return max(same, key=lambda other: (other.held_out_accuracy or 0.0, -(other.get("layer") or 0)), default=None)


def _hashes(row: ProbeRow | FinetuneRow) -> dict[str, str]:
    """The hashes of the images that a row is fitted on and measured on, without those that chose the step of a fine-tuning."""
    chose = {row.held_out_split} - {row.train_split, row.eval_split} if isinstance(row, FinetuneRow) else set()
    return {split: found for split, found in row.dataset_hash.items() if split not in chose}


def beside(row: ProbeRow | FinetuneRow, rows: Sequence[Row]) -> list[str]:
    """The cells under `HEADER`: differences in points, "not measured", or "" where the row is a baseline itself."""
    first = BASELINES.index(row.weights) if row.weights in BASELINES else len(BASELINES)
    return [_minus(row, baseline(row, rows, weights)) if place < first else "" for place, weights in enumerate(BASELINES)]


def _minus(row: ProbeRow | FinetuneRow, other: ProbeRow | FinetuneRow | None) -> str:
    return "not measured" if other is None else f"{100 * (row.accuracy - other.accuracy):+.1f}"


def pixels_win(
    shown: Sequence[ProbeRow] | Sequence[FinetuneRow], rows: Sequence[Row], name: Callable[[Any], str]
) -> Iterator[str]:
    """A sentence for each shown row of a trained model that raw pixels beat; `name` names the row."""
    for row in shown:
        pixels = baseline(row, rows, "pixels") if row.weights == "trained" else None
        if pixels is not None and pixels.accuracy > row.accuracy:
            theirs, ours = 100 * pixels.accuracy, 100 * row.accuracy
            points = f"{theirs - ours:.1f} points ({theirs:.1f} against {ours:.1f} %)"
            yield f"Caution: raw pixels are better than {name(row)} on {row.dataset} by {points}."


def not_measured(shown: Sequence[ProbeRow], rows: Sequence[Row]) -> Iterator[str]:
    """A sentence if a shown row of a trained model has no baseline, for tables without the columns of `HEADER`."""
    trained = [row for row in shown if row.weights == "trained"]
    if absent := [weights for weights in BASELINES if any(baseline(row, rows, weights) is None for row in trained)]:
        yield f"Not measured on the same images and labels: {' and '.join(absent)}."
