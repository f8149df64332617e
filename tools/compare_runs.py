"""Compares the training curves of two runs step by step and prints where they part.

    python tools/compare_runs.py runs/before runs/after
    python tools/compare_runs.py --tolerance 1e-4 runs/one_gpu runs/two_gpus

Compared are the rows of train.jsonl: loss, validation loss, learning rate, gradient norm and every other column except speed and
memory. Exit status: 0 if both runs have the same rows with the same values, 1 if not. It needs neither a GPU nor torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.ops.compare import Comparison, compare_runs

SHOWN = 5  # missing rows of a run


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and prints."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN_DIR", help="--run_dir of train.py or finetune.py")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest absolute difference that counts as equal; 0: bit-equal"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.tolerance < math.inf:
        raise InputError(f"--tolerance {args.tolerance} must be a number of at least 0")
    found = compare_runs(args.runs[0], args.runs[1], args.tolerance)
    print(comparison_text(found, args.runs, args.tolerance))
    if not found.equal:
        sys.exit(1)


def comparison_text(found: Comparison, runs: Sequence[Path], tolerance: float) -> str:
    """The comparison in a few lines."""
    lines = [f"rows in both runs: {found.rows}"]
    for run_dir, missing in zip(runs, found.missing, strict=True):
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            lines.append(f"only in {run_dir}: {', '.join(missing[:SHOWN])}{more}")
    if found.first:
        one, other = ("none" if value is None else repr(value) for value in found.first.values)
        lines.append(f"first difference: step {found.first.step}, {found.first.column}: {one} in {runs[0]}, {other} in {runs[1]}")
    elif found.rows:
        lines.append(f"no value differs by more than {tolerance:g}" if tolerance else "all values are bit-equal")
    apart = {column: gap for column, gap in found.largest.items() if gap}
    if apart:
        lines.append("largest difference: " + ", ".join(f"{column} {gap:.3g}" for column, gap in apart.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
