"""Prints result rows as Markdown: the accuracy of every layer, or the paper's tables with our rows.

    python tools/tables.py --results runs/demo/results/*.jsonl --run_dir runs/demo/runs/digits_nano_ar_8
    python tools/tables.py --results runs/s/results.jsonl runs/m/results.jsonl --paper 1 2 3 4 5

Without --paper it prints the validation loss of --run_dir, the best layers, and the accuracy of every layer. With --paper it
prints these tables of the paper with the published rows, our rows and the difference. --run_dir adds the learning rates of runs
to Table 5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import experiment, read_all
from igpt_ds.evaluate.report.run_files import ReportedRun, read_curve
from igpt_ds.evaluate.report.tables import TITLES, layer_table, markdown_table, paper_table
from igpt_ds.train.run_dir import read_recipe, read_run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    args = parse(argv)
    every = read_all(args.results)
    if args.paper:
        recipes = [read_recipe(run_dir / "run.json") for run_dir in args.run_dir]
        print("\n\n".join(paper_table(number, every, recipes) for number in args.paper))
        return
    rows = experiment(every, args.dataset)
    for run_dir in args.run_dir:
        print((f"{run_dir}, " if len(args.run_dir) > 1 else "") + validation_line(run_dir) + "\n")
    print(markdown_table(rows, every) + "\n")
    print(layer_table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--results", type=Path, nargs="+", required=True, help="results.jsonl files")
    parser.add_argument(
        "--paper",
        type=int,
        nargs="+",
        choices=sorted(TITLES),
        help="numbers of the paper's tables to print instead of the best layers",
    )
    parser.add_argument(
        "--run_dir",
        type=Path,
        nargs="+",
        default=[],
        help="run directories whose validation losses (or with --paper 5 whose learning rates) are printed",
    )
    parser.add_argument("--dataset", help="data set to print, by its name in the results; required if they have several")
    args = parser.parse_args(argv)
    if args.paper and args.dataset:
        raise InputError(f"--dataset {args.dataset} has no meaning with --paper, whose tables have their own data sets; omit it")
    return args


def validation_line(run_dir: Path) -> str:
    """The last validation loss beside that of a uniform guess."""
    rows = [row for row in read_curve(run_dir) if row.val_loss is not None]
    if not rows:
        raise InputError(f"{run_dir / 'train.jsonl'} holds no validation loss; train first")
    n_vocab = ReportedRun.of(read_run(run_dir), run_dir / "run.json").recipe.model.n_vocab
    return (
        f"validation: {rows[-1].val_loss:.4f} nats/token after {rows[-1].step} steps; "
        f"ln {n_vocab} = {math.log(n_vocab):.4f} before the first"
    )


if __name__ == "__main__":
    cli.run(main)
