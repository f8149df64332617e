"""How long a SLURM job does not train after a rank or a node has failed.

    make test WORKERS=0 ARGS="tests/slurm/test_spare_nodes.py --basetemp runs/failures"
    python tools/bench/restart.py --runs runs/failures/*/run --out bench_restart.json
    python tools/bench/restart.py --show docs/bench_restart.json

The tests kill ranks and power nodes off, in a SLURM of three nodes on this machine, and note each fault and its time in
RUN_DIR/faults.jsonl. A row has the seconds from the fault to the next step of training, beside 30 s and the start-up of the run's
first start. So the time until somebody notices counts, and what a later start does beyond the first: it loads a state, or puts it
together. Restarts through the queue are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from harness import BenchRow

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines
from igpt_ds.schema import record_from
from igpt_ds.train.ledger.rows import TRAIN, read_rows
from igpt_ds.train.ledger.starts import StartRows, group

ALLOWED = 30.0  # seconds beyond a start


@dataclass(frozen=True)
class Fault:
    """A line of faults.jsonl."""

    what: str
    time: float  # seconds since 1970


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, prints the table, writes the JSON."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "--runs", type=Path, nargs="+", metavar="RUN_DIR", help="run directories; those without faults are left out"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the rows and the facts of the machine to (default: none)")
    parser.add_argument("--show", type=Path, help="JSON file of --out whose table is printed; nothing is read")
    args = parser.parse_args(argv)
    if args.show:
        print(harness.read_bench(args.show).table())
        return
    if not args.runs:
        raise InputError("--runs is missing; name run directories, or a file by --show")
    run_dirs = {run_dir.resolve() for run_dir in args.runs if (run_dir / "faults.jsonl").exists()}
    if not run_dirs:
        raise InputError(f"--runs {args.runs[0]} has no faults.jsonl; run tests/slurm/test_spare_nodes.py")
    harness.finish([row for run_dir in sorted(run_dirs) for row in rows(run_dir)], args.out, False, ("torch", "deepspeed"), 2)


def rows(run_dir: Path) -> Iterator[BenchRow]:
    """A row for each fault of a run.

    Raises:
        ValueError: the run did not train after a fault.
    """
    starts, path = group(read_rows(run_dir)), run_dir / "faults.jsonl"
    usual = _training_since(starts[0]) - starts[0].at
    for line in read_json_lines(path):
        fault = record_from(Fault, line, str(path), "remove the line")
        start = next((one for one in starts if one.trained and _training_since(one) > fault.time), None)
        if start is None:
            raise InputError(f"{path}: no step followed {fault.what}; the run must train to its end")
        if start.queued_at > fault.time and start.submitted:
            continue  # through the queue
        waited = _training_since(start) - fault.time
        note = f"{start.at - fault.time:.1f} s until the start"
        yield BenchRow(fault.what, "s", waited, ALLOWED + usual, f"30 s and a start of {usual:.1f} s", 1.0, True, note)


def _training_since(start: StartRows) -> float:
    return next(row.time for row in start.rows if row.event == TRAIN)


if __name__ == "__main__":
    cli.run(main)
