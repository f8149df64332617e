"""Predicts the goodput of a run: the share of the wall clock that becomes training, and how often to save.

    python -m igpt_ds.plan goodput --gpus 512 --save_seconds 20
    python -m igpt_ds.plan goodput --gpus 512 --save_seconds 20 --fast_interval 60 --fast_save_seconds 1 --queue_seconds 1800
    python -m igpt_ds.plan goodput --fit measured.jsonl

--fit takes what `tools/status.py --goodput --json RUN_DIR...` printed: failures and costs are then those of the measured runs;
other flags replace single values. The prediction comes from simulated failures; the same --seed gives the same ones. Without
--interval the run saves as often as Daly's formula says.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from igpt_ds import cli
from igpt_ds.console import duration
from igpt_ds.errors import InputError
from igpt_ds.json_files import read_json_lines
from igpt_ds.plan.goodput import DAY, GPU_MTBF, HOUR, Measured, Prediction, Scenario, daly, expected, fit, simulate
from igpt_ds.plan.text import columns

RUNS = 20  # simulated ones, whose spread is printed
SHARES = ("requeued", "fast_share")
LEAST, MOST_FAILURES = 1e-3, 1e5  # seconds between two saves; failures of a simulated run
NAMES = {
    "interval": "time between two saves",
    "fast_interval": "time between two fast saves",
    "mtbf": "time between two failures",
}
# flag: the field of a Scenario, and its help
FLAGS = {
    "save_seconds": ("save", "seconds that training stands still for a save (default: 30)"),
    "interval": ("interval", "seconds of training between two saves (default: Daly's optimum)"),
    "startup_seconds": ("startup", "seconds from the start of a job to its first step (default: 300)"),
    "flush_seconds": ("flush", "seconds after the stall until an asynchronous save is complete (default: 0)"),
    "down_seconds": ("down", "seconds from a failure to the next start or submission (default: 0)"),
    "queue_seconds": ("queue", "mean seconds that a job waits in the queue (default: 0)"),
    "requeued": ("requeued", "share of failures after which the job waits in the queue (default: 1)"),
    "validation": ("validation", "seconds of validation for one second of training (default: 0)"),
    "fast_interval": ("fast_interval", "seconds of training between two saves to the fast tier (default: no fast tier)"),
    "fast_save_seconds": ("fast_save", "seconds that training stands still for one of them (default: 0)"),
    "fast_share": ("fast_share", "share of failures that leave the fast tier whole (default: 1)"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts and prints."""
    args = parse(argv)
    one = scenario(args)
    runs = [simulate(one, args.days * DAY, args.seed + number) for number in range(RUNS)]
    if args.json:
        values = {field.name: getattr(one, field.name) for field in fields(one)}
        mean = {name: statistics.mean(run.seconds[name] for run in runs) for name in runs[0].seconds}
        goodputs = [run.goodput for run in runs]
        print(json.dumps({"scenario": values, "goodput": statistics.mean(goodputs), "runs": goodputs, "seconds": mean}))
        return
    print("\n".join(describe(one, runs, args.days)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: 1)")
    hours = f"hours between the failures of one GPU (default: {GPU_MTBF / HOUR:,.0f}, as in Llama 3's training on 16,384)"
    parser.add_argument("--gpu_mtbf_hours", type=float, metavar="HOURS", help=hours)
    for flag, (_, text) in FLAGS.items():
        parser.add_argument(f"--{flag}", type=float, metavar="SHARE" if flag in SHARES else "SECONDS", help=text)
    parser.add_argument(
        "--fit", type=Path, nargs="+", metavar="FILE", help="output of tools/status.py --goodput --json (default: none)"
    )
    parser.add_argument("--days", type=float, default=30.0, help="length of a simulated run")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the failures")
    parser.add_argument("--json", action="store_true", help="print numbers as JSON instead of text")
    args = parser.parse_args(argv)
    if args.gpus is not None and args.gpus < 1:
        raise InputError(f"--gpus {args.gpus} must be at least 1")
    if args.gpus is not None and args.fit and args.gpu_mtbf_hours is None:
        raise InputError(f"--gpus {args.gpus} needs --gpu_mtbf_hours, for with --fit the failures are those of the measured runs")
    for flag in (*FLAGS, "gpu_mtbf_hours", "days"):
        value, least = getattr(args, flag), flag not in ("interval", "gpu_mtbf_hours", "days")
        if value is not None and not (0 <= value < math.inf if least else 0 < value < math.inf):
            raise InputError(f"--{flag} {value:g} must be a number {'of at least' if least else 'above'} 0")
        if flag in SHARES and value is not None and value > 1:
            raise InputError(f"--{flag} {value:g} must be at most 1")
    return args


def scenario(args: argparse.Namespace) -> Scenario:
    """The scenario of the flags."""
    given = {field: getattr(args, flag) for flag, (field, _) in FLAGS.items() if getattr(args, flag) is not None}
    gpus = args.gpus or 1
    one = fit(read_measured(args.fit)) if args.fit else Scenario(GPU_MTBF / gpus, 0.0, 30.0)
    if args.gpu_mtbf_hours is not None:
        one = replace(one, mtbf=args.gpu_mtbf_hours * HOUR / gpus)
    one = replace(one, **given)
    if not one.interval or (args.save_seconds is not None and args.interval is None):
        if not one.save:
            raise InputError("--save_seconds 0 leaves no best interval; give --interval")
        one = replace(one, interval=daly(one.save, one.mtbf))
    for field, least in (("mtbf", args.days * DAY / MOST_FAILURES), ("interval", LEAST), ("fast_interval", LEAST)):
        if (value := getattr(one, field)) < least and (value or field != "fast_interval"):
            raise InputError(
                f"the {NAMES[field]} is {value:.3g} s, and must be at least {least:.3g} s to simulate {args.days:g} days"
            )
    return one


def read_measured(paths: Sequence[Path]) -> list[Measured]:
    """The goodput of runs from files of `tools/status.py --goodput --json`.

    Raises:
        ValueError: a line is none.
    """
    fix = "write the file with `tools/status.py --goodput --json RUN_DIR...`"
    found = []
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}; {fix}")
        for number, row in enumerate(read_json_lines(path), start=1):
            found.append(Measured.of(row.get("goodput"), f"{path} line {number} field 'goodput'"))
    return found


def describe(one: Scenario, runs: Sequence[Prediction], days: float) -> list[str]:
    """The scenario, the prediction and where the rest of the time goes."""
    goodputs = sorted(run.goodput for run in runs)
    mean = {name: statistics.mean(run.seconds[name] for run in runs) for name in runs[0].seconds}
    wall = math.fsum(mean.values())
    range_ = f"{100 * goodputs[0]:.1f} to {100 * goodputs[-1]:.1f} in {RUNS} runs"
    best = daly(one.save, one.mtbf) if one.save else 0.0
    closed = "" if one.fast_interval else f"; {100 * expected(one):.1f} % in closed form"
    fast = f", to the fast tier every {_time(one.fast_interval)}" if one.fast_interval else ""
    rows = [("category", "% of the wall clock"), *((name, f"{100 * value / wall:.2f}") for name, value in mean.items())]
    return [
        f"failures   one in {_time(one.mtbf)}, {statistics.mean(run.failures for run in runs):.1f} in {days:g} days",
        f"saves      {one.save:g} s every {_time(one.interval)} of training (Daly's optimum: {_time(best)}){fast}",
        f"goodput    {100 * statistics.mean(goodputs):.1f} % ({range_}){closed}",
        "",
        *columns(rows),
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


if __name__ == "__main__":
    cli.run(main)
