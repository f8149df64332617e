"""Warnings about many probes, one line for each kind of problem.

In: rows of probes. Out: lines that list the layers. Called by `tools/linear_probe.py` and `tools/sgd_probe.py` at their end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt_ds.data.shards.index import folded
from igpt_ds.evaluate.features.manifest import span
from igpt_ds.evaluate.report.row_types import ProbeRow

_FITTED = "images that the probe is fitted on; choose another --eval_split"


def cautions(found: Sequence[tuple[Path, ProbeRow]]) -> Iterator[str]:
    """The warnings about the rows of some feature directories: a choice at the end of its grid, an accuracy on training
    images, and fits that did not converge.

    Rows of SGD have learning rates and not penalties, and no test of convergence.
    """
    for end in ("low", "high"):
        for sgd, name, values, flag in ((False, "C", "C_grid", "--C_grid"), (True, "rate", "rates", "--rates")):
            at_end = [(path, row) for path, row in found if row["grid_edge"] == end and (row.rate is not None) == sgd]
            if at_end:
                rows = [row for _, row in at_end]
                # C rises along its grid, and rates fall.
                limits = sorted({(max if end == "high" else min)(row[values]) for row in rows})
                chosen = ", ".join(f"{limit:g}" for limit in limits)
                yield f"warning: the best {name} is the {end} end of the grid ({chosen}) for {_where(at_end)}; widen {flag}"
    seen = [(path, row) for path, row in found if folded(row.eval_split, row.train_split)]
    if seen:
        row = seen[0][1]
        yield f"warning: images of {row.eval_split} are among those of {row.train_split}: the accuracy is that of {_FITTED}"
    open_fits = [(path, row) for path, row in found if row.get("converged") is False]
    if open_fits:
        gradients = [row["grad_norm"] for _, row in open_fits if "grad_norm" in row]
        left = f" (gradients up to {max(gradients):.1e})" if gradients else ""
        yield f"warning: not converged{left}: {_where(open_fits)}; leave the largest values out of --C_grid"


def _where(found: Sequence[tuple[Path, ProbeRow]]) -> str:
    """Which probes: "features/s normed layers 0..4, 7; features/pixels pixels layer 0"."""
    groups: dict[str, set[int]] = {}
    for path, row in found:
        group = f"{path} {row.features}{' side by side' if row.layers else ''}"
        groups.setdefault(f"{group}, {row.n_labels} labels," if row.n_labels else group, set()).update(row.layers or [row.layer])
    return "; ".join(f"{group} layer{'s' * (len(layers) > 1)} {span(sorted(layers))}" for group, layers in groups.items())
