"""How long a SLURM job does not train after a rank or a node has failed, by the ledgers of its runs.

    python -m pytest tests/slurm/test_spare_nodes.py --basetemp runs/failures
    python tools/bench/restart.py --runs runs/failures/*/run --out bench_restart.json
    python tools/bench/restart.py --show docs/bench_restart.json

The tests kill ranks and power nodes off, in a SLURM of three nodes on this machine. A row is a restart inside the job: the
seconds from the last sign of life to the next step, beside 30 s and the start-up of the run's first start. So the time that SLURM
takes to notice counts, and what a later start does beyond the first: it loads a state, or puts it together. Restarts through the
queue are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.train.ledger.goodput import DOWN, QUEUE, Goodput, read_goodput

ALLOWED = 30.0  # seconds beyond a start


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--runs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories whose starts failed")
    parser.add_argument("--out", type=Path, help="JSON file to write the rows and the facts of the machine to (default: none)")
    parser.add_argument("--show", type=Path, help="JSON file of --out whose table is printed; nothing is read")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    if not args.runs:
        raise InputError("--runs is missing; name run directories, or a file by --show")
    found = [row for run_dir in args.runs for row in rows(read_goodput(run_dir))]
    if not found:
        raise InputError(f"--runs {args.runs[0]}: no start followed a failure inside a job; run tests/slurm/test_spare_nodes.py")
    harness.finish(found, args.out, False, ("torch", "deepspeed"), 2)


def rows(run: Goodput) -> Iterator[BenchRow]:
    """A row for each restart without the queue. One that fails before its first step is part of the next one's."""
    usual, waited, fault = run.starts[0].startup, list[float](), ""
    for before, start in itertools.pairwise(run.starts):
        if not before.failed or start.seconds[QUEUE]:
            waited.clear()
            continue
        fault = fault if waited else before.how
        waited += start.seconds[DOWN], start.startup
        if start.trained:
            note = f"{sum(waited[::2]):.1f} s down, {sum(waited[1::2]):.1f} s start-up"
            yield BenchRow(fault, "s", sum(waited), ALLOWED + usual, f"30 s and a start of {usual:.1f} s", 1.0, True, note)
            waited.clear()


if __name__ == "__main__":
    cli.run(main)
