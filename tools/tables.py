"""Prints what a run reached as Markdown: its validation loss, the best layers, and the accuracy of every layer.

python tools/tables.py --results runs/demo/results.jsonl --run_dir runs/demo
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.evaluate.results import experiment, layer_table, markdown_table, read_results
from igpt_ds.files import read_json_lines
from igpt_ds.train.run_dir import read_run


def main(argv: Sequence[str] | None = None) -> None:
    """Reads rows, prints tables."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--results", type=Path, required=True, help="results.jsonl")
    parser.add_argument("--run_dir", type=Path, help="run whose validation loss is printed")
    parser.add_argument("--dataset", help="the data set, where the results are of several")
    args = parser.parse_args(argv)
    rows = experiment(read_results(args.results), args.dataset)
    if args.run_dir:
        print(validation_line(args.run_dir) + "\n")
    print(markdown_table(rows) + "\n")
    print(layer_table(rows))


def validation_line(run_dir: Path) -> str:
    """The last validation loss beside that of a model that knows nothing."""
    rows = [row for row in read_json_lines(run_dir / "train.jsonl") if "val_loss" in row]
    if not rows:
        raise ValueError(f"{run_dir / 'train.jsonl'} holds no validation loss; train first")
    n_vocab = read_run(run_dir)["recipe"]["model"]["n_vocab"]
    return (
        f"validation: {rows[-1]['val_loss']:.4f} nats/token after {rows[-1]['step']} steps; "
        f"ln {n_vocab} = {math.log(n_vocab):.4f} before the first"
    )


if __name__ == "__main__":
    cli.run(main)
