"""Linear probes: how much a linear classifier reads out of each layer's features.

    python tools/linear_probe.py --features features/s features/untrained features/pixels --out results.jsonl

One row a layer goes to results.jsonl; a row that was measured before is replaced. Penalty and best layer are chosen on a
tenth of the training images; the accuracy is that on --eval_split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.evaluate.features import KINDS, FeatureSet, open_features, pick_device
from igpt_ds.evaluate.protocols import C_GRID, PRECISIONS, Probe, linear_probe
from igpt_ds.evaluate.results import add_results, make_row, markdown_table, read_results


def main(argv: Sequence[str] | None = None) -> None:
    """Opens everything, probes layer by layer, prints the table of best layers."""
    args = parse(argv)
    read_results(args.out)  # a damaged file is found now and not after the first probe
    sets = [(open_features(path, args.train_split), open_features(path, args.eval_split)) for path in args.features]
    work = [(train, evaluated, layer, kind) for train, evaluated in sets for layer, kind in asked(train, args)]
    rows = []
    progress = tqdm(work, unit="probe", desc="probes", disable=None)
    for train, evaluated, layer, kind in progress:
        probe = linear_probe(
            train,
            evaluated,
            layer,
            kind,
            C_grid=args.C_grid,
            tol=args.tol,
            seed=args.seed,
            max_train=args.max_train,
            device=pick_device(args.device),
            precision=args.precision,
        )
        rows.append(make_row(probe, train, evaluated))
        add_results(args.out, rows[-1:])
        report(probe, train, progress)
    print(markdown_table(rows))
    print(f"{args.out}: {len(rows)} rows")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--features", type=Path, nargs="+", required=True, help="feature directories")
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl to add to")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to probe; all when left out")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kinds to probe; all when left out")
    parser.add_argument("--train_split", default="train", help="split to fit on")
    parser.add_argument("--eval_split", default="val", help="split whose accuracy is reported")
    parser.add_argument("--C_grid", type=float, nargs="+", default=C_GRID, help="scikit-learn's C, inverse penalties to try")
    parser.add_argument("--tol", type=float, default=1e-6, help="largest entry of the gradient of objective / (C N) at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out tenth")
    parser.add_argument("--max_train", type=int, help="fit on that many images only, classes in proportion")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp64", help="of the matrix products")
    return parser.parse_args(argv)


def asked(features: FeatureSet, args: argparse.Namespace) -> list[tuple[int, str]]:
    """The layers and kinds to probe. Pixels stand outside: they have one layer of one kind, which is always probed."""
    if features.kinds == ["pixels"]:
        return [(layer, "pixels") for layer in features.layers]
    pairs = [(layer, kind) for kind in args.kinds or features.kinds for layer in args.layers or features.layers]
    for layer, kind in pairs:
        features.layer(layer, kind)  # whatever is missing or torn is found before the first probe
    return pairs


def report(probe: Probe, train: FeatureSet, progress: tqdm) -> None:
    """One line on a probe, and a warning where its result needs a second look."""
    what = f"{train.path} layer {probe.layer} {probe.kind}"
    found = f"C {probe.C:g}, held out {100 * probe.held_out_accuracy:.2f} %, {probe.eval_split} {100 * probe.accuracy:.2f} %"
    progress.write(f"{what}: {found}, {probe.iterations} iterations", file=sys.stdout)
    if probe.grid_edge:
        progress.write(f"warning: {what}: C {probe.C:g} is the grid's {probe.grid_edge} end; widen --C_grid", file=sys.stderr)
    if not probe.converged:
        left = f"gradient {probe.grad_norm:.1e} after {probe.iterations} iterations"
        progress.write(f"warning: {what}: not converged, {left}; leave the largest values out of --C_grid", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
