"""Rows of results in words: what distinguishes a row from the others in a table or a figure.

In: result rows. Out: text. Called by tables and figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from igpt_ds.config import SIZES
from igpt_ds.evaluate.report.results import SERIES, key
from igpt_ds.evaluate.report.row_types import ProbeRow, Row

# Rows with equal values of these are of the same features, which can be made and probed differently.
_SAME_FEATURES = ("weights", "model_hash", "dataset", "features", "mask_draws")


def label(row: ProbeRow, among: Sequence[ProbeRow]) -> str:
    """A row in words: the model's shape and objective if they differ among the rows, its hash if nothing else differs, and the
    settings in which rows of the same features differ."""
    if row.weights == "pixels":
        return f"raw pixels{differences(row, among)}"
    step = f" to step {row.step}" if row.weights == "trained" else ""
    names = {system_name(other) for other in among if other.weights != "pixels"}
    name = f"{system_name(row)}, " if len(names) > 1 else ""
    about = ("weights", "step", "model", "model_objective")
    alike = {other.model_hash for other in among if key(other, about) == key(row, about)}
    model = f" {row.model_hash[:8]}" if len(alike) > 1 else ""
    masked = " of masked images" if row.mask_draws else ""
    if row.model_objective == "bert" and row.mask_draws == 0:
        masked = " of whole images"
    return f"{name}{row.weights}{step}{model}, {row.features}{masked}{differences(row, among)}"


def differences(row: ProbeRow, among: Sequence[ProbeRow], but: Sequence[str] = ()) -> str:
    """The settings in which a row differs from others of the same features, in words after commas, without the names in `but`.

    A setting that another protocol does not have, such as the steps of SGD, is no difference to that protocol.
    """
    same = [other for other in among if key(other, _SAME_FEATURES) == key(row, _SAME_FEATURES)]
    names = [name for name in SERIES if name not in ("dataset_hash", "layers", *but)]

    def values(name: str) -> set[str]:
        alike = [other for other in same if other.protocol == row.protocol or None not in (other.get(name), row.get(name))]
        return {repr(other.get(name)) for other in alike}

    differ = [name for name in names if len(values(name)) > 1]
    return "".join(f", {name.replace('_', ' ')} {_brief(row.get(name))}" for name in differ)


def _brief(value: Any) -> str:
    return f"{len(value)} of {min(value):g}..{max(value):g}" if isinstance(value, list) and value else str(value)


def system_name(row: Row) -> str:
    """The transformer of a row in words, with its objective if it is BERT."""
    name = model_name(row.model)
    return f"{name} BERT" if row.model_objective == "bert" else name


def model_name(shape: dict[str, int] | None) -> str:
    """A transformer in words: iGPT-S, M, L, XL for the paper's sizes (3.3), else layers x width."""
    if shape is None:
        return "model of unknown shape"
    own = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
    paper = [size for size, values in SIZES.items() if values == own and size != "nano"]
    return f"iGPT-{paper[0].upper()}" if paper else f"{shape['n_layer']} x {shape['n_embd']}"
