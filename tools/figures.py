"""Draws figures: accuracy by layer of probe results, or the loss of training runs.

    python tools/figures.py --out layers.png layers --results results.jsonl
    python tools/figures.py --out training.png training runs/a runs/b

`layers` reads --results, and --dataset where they are of several; `training` reads run directories.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.evaluate.figures import layer_curve, training_curve
from igpt_ds.evaluate.results import experiment, read_results
from igpt_ds.files import read_json_lines
from igpt_ds.train.run_dir import read_run


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the one that is asked for."""
    args = parse(argv)
    if args.figure == "layers":
        layers(args)
    else:
        training(args)
    print(args.out)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("figure", choices=("layers", "training"), help="which figure")
    parser.add_argument("runs", type=Path, nargs="*", help="training: run directories")
    parser.add_argument("--results", type=Path, help="layers: results.jsonl")
    parser.add_argument("--dataset", help="layers: the data set, by the name in the results")
    parser.add_argument("--title", help="above the figure; made from what is drawn when left out")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    if args.figure == "layers" and (args.results is None or args.runs):
        raise ValueError("layers reads --results FILE and no run directories")
    if args.figure == "training" and (not args.runs or args.results or args.dataset):
        raise ValueError("training reads run directories, and neither --results nor --dataset")
    return args


def layers(args: argparse.Namespace) -> None:
    """Accuracy by layer."""
    rows = experiment(read_results(args.results), args.dataset)
    row = rows[0]
    title = f"Linear probes on {row['dataset']}: {row['n_train']} training images, {row['n_eval']} evaluated"
    layer_curve(rows, args.out, args.title or title)


def training(args: argparse.Namespace) -> None:
    """Loss by step."""
    vocabularies = {run_dir: read_run(run_dir)["recipe"]["model"]["n_vocab"] for run_dir in args.runs}
    if len(set(vocabularies.values())) > 1:
        sizes = ", ".join(f"{run_dir} {n_vocab}" for run_dir, n_vocab in vocabularies.items())
        raise ValueError(f"losses over palettes of different sizes do not compare ({sizes}); draw them apart")
    runs = {str(run_dir): read_json_lines(run_dir / "train.jsonl") for run_dir in args.runs}
    title = args.title or f"Pre-training: {', '.join(run_dir.resolve().name for run_dir in args.runs)}"
    training_curve(runs, vocabularies[args.runs[0]], args.out, title)


if __name__ == "__main__":
    cli.run(main)
