"""Damages files of every format, kills tools at random calls and runs two writers at once, and counts what that leads to.

    python tools/torture.py --out torture.json
    python tools/torture.py --quick --seed 7

makes a tiny world in a temporary directory, in which every trial is one forked process. A damaged file must give one clear error
or the same result as before. A killed tool or training must reach the result of an uninterrupted one when it runs again. Two
writers must lose nothing. Where a byte of the newest state of a training is flipped, it is named and the next one is taken. The
table has one row for each format and tool. Exit status 1 if anything was silent, raised a traceback, hung, got stuck, lost rows,
or ran a command from a file. The same --seed makes the same trials.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from igpt_ds import cli
from igpt_ds.command_line import lazy
from igpt_ds.errors import InputError
from igpt_ds.ops.torture.trial import BARS, Figures, table, total
from igpt_ds.provenance import git_commit
from igpt_ds.schema import record_from
from igpt_ds.sealed import Format

with lazy.imports():
    import torch

    from igpt_ds.ops.torture import damages, kills, saves, writers
    from igpt_ds.ops.torture.world import make_world


FIGURES = Format("igpt_ds.torture", "figures of trials", "try again with tools/torture.py --out", 1, 1, 1)
QUICK = {"mutations": 200, "kills": 30, "pairs": 4, "trainings": 3, "flips": 30}  # about two minutes on two cores
WHOLE = {"mutations": 2000, "kills": 300, "pairs": 40, "trainings": 300, "flips": 1000}


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the world, runs the trials, prints and writes the table."""
    args = choose(argv)
    if args.show:
        saved = FIGURES.read(args.show)
        print(table([record_from(Figures, row, f"figures {args.show}", FIGURES.fix) for row in saved["rows"]]))
        return
    lazy.load()
    torch.set_num_threads(1)  # a forked process has only the thread that forked it
    tqdm.set_lock(threading.RLock())  # tqdm's own is one for all forks, and one that is killed would keep it for ever
    temporary = Path(tempfile.mkdtemp(prefix="igpt_ds-torture-"))
    try:
        make_world(temporary)
        rows, examples = run(args, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(table(rows))
    if args.out is not None:
        values = {"git_commit": git_commit(), "seed": args.seed, "rows": [asdict(row) for row in rows], "examples": examples}
        FIGURES.write(args.out, values)
    missed = [f"{name} {count}" for name in BARS if (count := getattr(total(rows), name))]
    for example in examples[: args.examples]:
        print(" ".join(example.split())[:300])
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}; each should be 0")


def choose(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; numbers that are not given follow --quick."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--seed", type=int, default=0, help="random seed of all trials")
    parser.add_argument("--quick", action="store_true", help=f"fewer trials: {QUICK}")
    parser.add_argument("--mutations", type=int, help=f"number of damaged files (default: {WHOLE['mutations']})")
    parser.add_argument("--kills", type=int, help=f"number of killed tools (default: {WHOLE['kills']})")
    parser.add_argument("--pairs", type=int, help=f"number of times that two or more write at once (default: {WHOLE['pairs']})")
    trainings = "number of trainings that are killed while they save, and started again"
    parser.add_argument("--trainings", type=int, help=f"{trainings} (default: {WHOLE['trainings']})")
    parser.add_argument("--flips", type=int, help=f"number of bytes flipped in the newest state (default: {WHOLE['flips']})")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="trials at the same time")
    parser.add_argument("--examples", type=int, default=20, help="failed trials to print")
    parser.add_argument("--out", type=Path, help="JSON file for the figures and all failed trials")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of such a file and do nothing else")
    args = parser.parse_args(argv)
    for name, number in (QUICK if args.quick else WHOLE).items():
        if getattr(args, name) is None:
            setattr(args, name, number)
    for name in (*WHOLE, "examples"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)} must be at least 0")
    if args.cores < 1:
        raise InputError(f"--cores {args.cores} must be at least 1")
    return args


def run(args: argparse.Namespace, world: Path) -> tuple[list[Figures], list[str]]:
    """All trials: a row for each format, tool and pair of writers, and each failed trial in words."""
    rows, examples = dict[str, Figures](), list[str]()
    for name, outcome, words in tqdm(trials(args, world), "trials", sum(getattr(args, name) for name in WHOLE), disable=None):
        rows.setdefault(name, Figures(name)).add(outcome)
        if outcome in BARS:
            examples.append(f"{name}: {outcome}: {words}")
    return [rows[name] for name in sorted(rows)], examples


def trials(args: argparse.Namespace, world: Path) -> Iterator[tuple[str, str, str]]:
    """(name of the row, outcome, what was done) of each trial."""
    yield from damages.trials(world, args.seed, args.mutations, args.cores)
    yield from kills.trials(world, args.seed, args.kills, args.cores)
    yield from writers.trials(world, args.seed, args.pairs)
    yield from saves.trials(world, args.seed, args.trainings, args.flips, args.cores)


if __name__ == "__main__":
    cli.run(main)
