"""Searches the learning rate as the paper does: 0.01, 0.003, 0.001, ... until the final validation loss rises.

    python tools/sweep_lr.py --out runs/sweep -- deepspeed train.py --recipe cifar10_nano_ar_16 --data shards/cifar10

It trains one rate after the other with the command after `--`, and adds --lr, --run_dir and --resume auto to it. The same command
continues an interrupted search; finished rates are not trained again. A diverged run (exit status 2 and LOST.json) counts as the
worst. OUT/sweep.md is the table, sweep.json the same values as JSON, sweep.png the loss against the rate. The command
can also be one of finetune.py: its best validation accuracy counts, or with --loss gen its lowest validation loss.

To train all rates at once as tasks of a SLURM array, `--array_index $SLURM_ARRAY_TASK_ID` trains a single rate (0 is 0.01, 1 is
0.003). Then `--collect` writes the table without training.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.data.shards.index import folded
from igpt_ds.errors import InputError
from igpt_ds.evaluate.report.figures import rate_curve
from igpt_ds.files import atomic_file
from igpt_ds.ops.requeue import BAD_INPUT
from igpt_ds.train.sweep import (
    MAX_RATES,
    SWEEP_FILE,
    Result,
    best,
    finished,
    next_rate,
    points,
    rate,
    read_result,
    run_name,
    table,
    write_sweep,
)

OURS = ("--lr", "--run_dir", "--out", "--resume", "--on_spike")


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the missing rates, then writes table and figure."""
    args = parse(argv)
    if args.array_index is not None:
        print(describe(train(args, rate(args.array_index))))
        return
    results: list[Result] = []
    while (lr := next_rate(results, args.max_rates)) is not None:
        result = read_result(args.out / run_name(lr), lr)
        if result is None and args.collect:
            break
        results.append(result or train(args, lr))
        print(describe(results[-1]), flush=True)
    if not results:
        raise InputError(
            f"{args.out / run_name(rate(0))} is not finished, so there is nothing to collect; train it before --collect"
        )
    report(args.out, results, args.max_rates)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs, the table and the figure")
    parser.add_argument(
        "--array_index", type=int, help="train only the rate with this number; 0 is 0.01, 1 is 0.003 (default: all rates)"
    )
    most = "largest number of rates to try (default: down to the rate that is worse than the one before)"
    parser.add_argument("--max_rates", type=int, metavar="RATES", default=MAX_RATES, help=most)
    parser.add_argument("--collect", action="store_true", help="write table and figure of the finished runs and train nothing")
    parser.add_argument("command", nargs="*", help="after --: the training command, without --lr, --run_dir and --resume")
    args = parser.parse_args(argv)
    if args.collect and (args.array_index is not None or args.command):
        raise InputError("--collect does not train; omit --array_index and the command")
    if not args.collect and not any(word.endswith(("train.py", "finetune.py")) for word in args.command):
        raise InputError("no training command; after the flags write: -- deepspeed train.py --recipe NAME --data DIR ...")
    if any(word.split("=")[0] == "--results" for word in args.command):
        raise InputError("--results would read the test split at every rate; leave it out, and evaluate the best rate alone")
    if any(word.split("=")[0] == "--labels" for word in args.command):
        raise InputError("--labels trains a run for each subset, and the search compares single runs; search with all labels")
    check_splits(args.command)
    for word in args.command:
        if word.split("=")[0] in OURS:
            raise InputError(f"{word} is set by the search; leave it out of the training command")
    if args.array_index is not None and not 0 <= args.array_index < MAX_RATES:
        raise InputError(f"--array_index {args.array_index} must lie between 0 and {MAX_RATES - 1}")
    if not 1 <= args.max_rates <= MAX_RATES:
        raise InputError(f"--max_rates {args.max_rates} must lie between 1 and {MAX_RATES}")
    return args


def check_splits(words: Sequence[str]) -> None:
    """Refuses a training command that trains on the validation images, which compare the rates."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for split in ("train", "val"):
        parser.add_argument(f"--{split}_split", nargs="?", default=split, const=split)
    known, _ = parser.parse_known_args(words)
    if folded(known.val_split, known.train_split):
        fix = "search on train, and train with the best rate on both"
        raise InputError(f"--train_split {known.train_split} leaves no validation images to compare rates by; {fix}")


def train(args: argparse.Namespace, lr: float) -> Result:
    """Trains one rate to its end, or continues an interrupted run.

    Raises:
        SystemExit: the run was stopped, or failed; with its status, so that slurm/launch.sh sees what happened.
        ValueError: the run was refused, or ended before its last step without an error.
    """
    run_dir = args.out / run_name(lr)
    command = [*args.command, "--lr", f"{lr:g}", "--run_dir", str(run_dir), "--resume", "auto"]
    if (result := read_result(run_dir, lr)) is None:
        status = run_to_end(command)
        if status == cli.STOPPED:
            raise SystemExit(cli.STOPPED)
        result = read_result(run_dir, lr)
        if result is None:
            line = f"the run of {run_dir} ended with status {status} before its last step; the cause is above"
            if status in (0, BAD_INPUT):
                raise InputError(line)
            print(f"sweep_lr.py: error: {line}", file=sys.stderr, flush=True)
            raise SystemExit(status if status > 0 else 128 - status)
    return result


def run_to_end(command: Sequence[str]) -> int:
    """Runs a command; its exit status. A Ctrl-C stops the run, which also hears it: the run gets the time to save."""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return process.wait()


def describe(result: Result) -> str:
    """One line."""
    return f"lr {result.lr:g}: {'' if result.val_loss is None else f'{result.measured} '}{result}"


def report(out: Path, results: list[Result], most: int) -> None:
    """Writes sweep.md, sweep.json and sweep.png."""
    chosen = best(results)
    write_sweep(out / SWEEP_FILE, results, most)
    with atomic_file(out / "sweep.md", "w") as file:
        file.write(table(results))
    title = f"Learning rates: {out.resolve().name}" + ("" if finished(results, most) else " (not finished)")
    values, what = points(results)
    rate_curve({out.resolve().name: values}, what, out / "sweep.png", title)
    print(table(results), end="")
    print(f"best: {chosen.lr:g}" if chosen else "every rate diverged")


if __name__ == "__main__":
    cli.run(main)
