"""Result rows as the measurements of a model card: the best layer of each series of probes, fine-tunings, likelihoods.

In: rows of one model. Out: `CardResult`s. Called by `tools/model_card.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from igpt_ds.evaluate.report.results import best_row, by_layer, series
from igpt_ds.evaluate.report.row_types import FinetuneRow, LikelihoodRow, ProbeRow, Row
from igpt_ds.model.card import CardResult


def card_results(rows: Sequence[Row]) -> list[CardResult]:
    """The measurements, in the order of the tables. The layer is the one that held-out images chose."""
    probes = [best_row(one) for one in series(by_layer(rows))]
    probes += [row for row in rows if isinstance(row, ProbeRow) and row.protocol not in ("every_layer", "sgd")]
    found = [
        CardResult("linear probe", row.dataset, row.eval_split, "accuracy", 100 * row.accuracy, _probe(row)) for row in probes
    ]
    for row in rows:
        if isinstance(row, FinetuneRow):
            few = "" if row.n_labels is None else f"{row.n_subsets} random subsets of {row.n_labels} of "
            how = f"loss {row.loss}, {few}{row.n_train} images"
            found.append(CardResult("fine-tuning", row.dataset, row.eval_split, "accuracy", 100 * row.accuracy, how))
        elif isinstance(row, LikelihoodRow):
            nats = row.nats_per_token.mean
            found.append(CardResult("likelihood", row.dataset, row.split, "nats per token", nats, f"step {row.step}"))
    return found


def _probe(row: ProbeRow) -> str:
    layers = "+".join(map(str, row.layers or [row.layer]))
    more = {"low_data": f", {row.n_labels} labels", "mask_vote": f", {row.n_masks} masks vote"}.get(row.protocol, "")
    return f"layer {layers}, {row.features}{more}, fitted on {row.n_train} images of {row.train_split}"
