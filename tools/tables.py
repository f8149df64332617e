"""Prints result rows as Markdown: the accuracy of every layer, or the paper's tables with our rows.

    python tools/tables.py --results runs/demo/results/*.jsonl --run_dir runs/demo/runs/digits_nano_ar_8
    python tools/tables.py --results runs/s/results.jsonl runs/m/results.jsonl --paper 1 2 3 4 5

Without --paper it prints the loss of --run_dir, the best layers, and the accuracy of every layer. With --paper it
prints these tables of the paper with the published rows, our rows and the difference. --run_dir adds the learning rates of runs
to Table 5.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.results import best_row, by_layer, experiment, read_all, read_results
from igpt_ds.evaluate.report.row_types import FinetuneRow, Row
from igpt_ds.evaluate.report.run_files import ReportedRun, read_curve
from igpt_ds.evaluate.report.tables import TITLES, layer_table, markdown_table, paper_table
from igpt_ds.markdown import as_table
from igpt_ds.train.run_dir import read_recipe, read_run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    args = parse(argv)
    every = read_all(args.results)
    if args.paper:
        recipes = [read_recipe(run_dir / "run.json") for run_dir in args.run_dir]
        print("\n\n".join(paper_table(number, every, recipes) for number in args.paper))
        return
    if args.by_file:
        print(
            file_table([(path.parent.name if path.stem == "results" else path.stem, read_results(path)) for path in args.results])
        )
        return
    rows = experiment(every, args.dataset)
    for run_dir in args.run_dir:
        print((f"{run_dir}, " if len(args.run_dir) > 1 else "") + loss_line(run_dir) + "\n")
    print(markdown_table(rows, every))
    if any(row.weights != "pixels" for row in rows):
        print("\n" + layer_table(rows))


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
        help="run directories whose losses (or with --paper 5 whose learning rates) are printed",
    )
    parser.add_argument("--by_file", action="store_true", help="print one line for each file: its best probe or its fine-tuning")
    parser.add_argument("--dataset", help="data set to print, by its name in the results; required if they have several")
    args = parser.parse_args(argv)
    if args.paper and args.dataset:
        raise InputError(f"--dataset {args.dataset} has no meaning with --paper, whose tables have their own data sets; omit it")
    if args.paper and args.by_file:
        raise InputError("--by_file and --paper print different tables; leave out one of them")
    return args


def loss_line(run_dir: Path) -> str:
    """The last validation loss beside that of a uniform guess. A run on train+val has none, but a mean training loss."""
    curve = read_curve(run_dir)
    if not curve:
        raise InputError(f"{run_dir / 'train.jsonl'} holds no loss; train first")
    measured = [row for row in curve if row.val_loss is not None]
    if measured:
        found = f"validation: {measured[-1].val_loss:.4f} nats/token after {measured[-1].step} steps"
    else:
        last = curve[-1].step
        recent = mean(row.loss for row in curve if row.loss is not None and row.step > 0.9 * last)
        found = f"training: {recent:.4f} nats/token in the last tenth of {last} steps"
    n_vocab = ReportedRun.of(read_run(run_dir), run_dir / "run.json").recipe.model.n_vocab
    return f"{found}; ln {n_vocab} = {math.log(n_vocab):.4f} before the first"


def file_table(files: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """A Markdown table with a line for each named file: its best layer by the held-out images, or its last fine-tuning.

    Raises:
        ValueError: a file has neither.
    """
    lines = []
    for name, rows in files:
        probes, tuned = by_layer(rows), [row for row in rows if isinstance(row, FinetuneRow)]
        if not probes and not tuned:
            raise InputError(f"the results of {name} hold no probe by layer and no fine-tuning; leave them out")
        row = best_row(probes) if probes else tuned[-1]
        layer = row.get("layer" if probes else "head_layer")
        held_out = "-" if row.held_out_accuracy is None else f"{100 * row.held_out_accuracy:.1f}"
        lines.append(
            (
                name,
                "probe" if probes else "fine-tuning",
                "-" if layer is None else f"{layer}",
                held_out,
                f"{100 * row.accuracy:.1f}",
            )
        )
    return as_table(("results", "by", "layer", "held out", "accuracy"), lines)


if __name__ == "__main__":
    cli.run(main)
