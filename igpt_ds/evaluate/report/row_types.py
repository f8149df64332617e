"""The records of results.jsonl: one frozen dataclass for each kind of row.

In: the JSON of a line. Out: a `ProbeRow`, a `FinetuneRow` or a `LikelihoodRow`. `results.py` reads and writes them; tables and
figures use their fields. Accuracies lie in 0..1. A field is None if the row does not have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from igpt_ds.config import SHAPE, ModelConfig
from igpt_ds.errors import InputError
from igpt_ds.schema import record_from

_OLD_PROTOCOLS = {"best_layer": "every_layer"}  # names in files of earlier versions
_R = TypeVar("_R", bound="ResultRow")


@dataclass(frozen=True)
class MeanWithError:
    """A mean over images and its standard error: the standard deviation of the images / sqrt(N); None for one image."""

    mean: float
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The fields of every kind of row. `json` is the line of the file, unchanged: a rewritten row keeps its bytes."""

    json: dict[str, object]
    kind: str  # "probe", "finetune" or "likelihood"
    weights: str  # "trained", "untrained" or "pixels"
    model_hash: str
    model: dict[str, int | bool] | None  # the shape of the transformer
    model_objective: str
    step: int  # of pre-training
    dataset: str

    def get(self, name: str) -> Any:
        """A value by its name in the file; None if the row does not have it."""
        return getattr(self, name) if name in type(self).__dataclass_fields__ else self.json.get(name)

    def __getitem__(self, name: str) -> Any:
        """A value by its name in the file.

        Raises:
            KeyError: the row does not have it.
        """
        if name not in self.json:
            raise KeyError(name)
        return self.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.json

    def __or__(self: _R, changes: Mapping[str, object]) -> _R:
        """The same row with other values."""
        row = as_row(self.json | dict(changes))
        assert isinstance(row, type(self)), "a row keeps its kind"
        return row


@dataclass(frozen=True, kw_only=True)
class ProbeRow(ResultRow):
    """A linear probe; the file has more values of the probe and of the features."""

    protocol: str  # "every_layer", "sgd", "concat", "low_data" or "mask_vote"
    features: str  # their kind
    layer: int
    layers: list[int] | None  # "concat": those side by side; `layer` is the one in the middle
    mask_draws: int | None
    dataset_hash: dict[str, str]  # by split
    train_split: str
    eval_split: str
    n_train: int
    n_eval: int
    n_features: int
    C: float | None  # the chosen penalty; None if the probe was fitted by SGD
    rate: float | None  # the chosen learning rate of SGD
    n_labels: int  # "low_data"
    n_subsets: int | None  # "low_data"
    deviation: float | None  # "low_data"
    n_masks: int | None  # "mask_vote"
    single_accuracy: float | None  # "mask_vote": the mean of one mask
    held_out_accuracy: float
    accuracy: float
    seed: int
    tol: float
    precision: str


@dataclass(frozen=True, kw_only=True)
class FinetuneRow(ResultRow):
    """A fine-tuned model."""

    dataset_hash: dict[str, str]  # by split
    eval_split: str
    n_train: int
    loss: str  # "joint", "clf" or "gen"
    lr: float
    head_layer: int | None  # whose features the class head reads
    start_hash: str | None  # of the pre-trained model; "" for fresh weights
    train_split: str | None
    held_out_split: str | None
    n_labels: int | None  # of each random subset of the n_train images; None: all
    n_subsets: int | None
    deviation: float | None  # of the sample of subsets
    n_masks: int | None  # that vote
    single_accuracy: float | None  # the mean of one mask
    held_out_accuracy: float | None  # None if the validation images were trained on
    accuracy: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class LikelihoodRow(ResultRow):
    """The likelihood of a model on a split."""

    dataset_hash: str
    split: str
    nats_per_token: MeanWithError


Row = ProbeRow | FinetuneRow | LikelihoodRow
KINDS: dict[str, type[ProbeRow] | type[FinetuneRow] | type[LikelihoodRow]] = {
    "probe": ProbeRow,
    "finetune": FinetuneRow,
    "likelihood": LikelihoodRow,
}


def as_row(values: Mapping[str, object]) -> Row:
    """The record of a row's values, whose kind must be known. Old names are replaced in the fields and stay in `json`."""
    kind = KINDS[str(values["kind"])]
    found = {field.name: values.get(field.name) for field in dataclasses.fields(kind) if field.name != "json"}
    if kind is ProbeRow:
        found["protocol"] = _OLD_PROTOCOLS.get(str(found["protocol"]), found["protocol"])
        if found["n_subsets"] is None and isinstance(accuracies := values.get("subset_accuracies"), list):
            found["n_subsets"] = len(accuracies)
    if isinstance(mean := found.get("nats_per_token"), dict):
        found["nats_per_token"] = MeanWithError(mean["mean"], mean.get("standard_error"))
    return kind(json=dict(values), **found)  # type: ignore[arg-type]  # `check_types` compares them with the fields


def check_types(values: Mapping[str, object], line: str) -> None:
    """Refuses a row of a file whose values have other types than the fields of its record. Any value can be None or missing.

    Raises:
        ValueError: it names the line, the field and the value.
    """
    fix = "remove the line and measure again"
    record_from(_schema(str(values["kind"])), values, line, fix)
    if isinstance(shape := values.get("model"), dict):
        if missing := [name for name in SHAPE if name not in shape and name != "tied_embeddings"]:  # left out where it is false
            raise InputError(f"{line} has no 'model.{missing[0]}'; {fix}")
        record_from(ModelConfig, shape, f"{line} field 'model'", fix, strict=True)


@cache
def _schema(kind: str) -> type:
    """A dataclass with the fields of a kind of row, each of which may be None."""
    hints = get_type_hints(KINDS[kind])
    return dataclasses.make_dataclass(kind, [(name, hint | None, None) for name, hint in hints.items() if name != "json"])
