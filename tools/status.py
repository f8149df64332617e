"""Shows how runs are doing: step, loss, speed, end, checkpoints, restarts, and the time since each rank's last progress.

    python tools/status.py runs/s --watch 10
    python tools/status.py --json runs/s runs/m
    python tools/status.py --goodput runs/s

It needs neither a GPU nor torch. It reads a run while the run writes, from any machine that sees its disk. Several runs make a
table with one line each, and so does the directory of a fine-tuning on several subsets. With --json each run is one line of JSON.
--goodput shows where the wall clock of a run went, over all its starts: training that the run kept, start-up, verification,
compilation, validation, saves, lost work, waiting in the queue, down. Goodput is the first over the wall clock.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpt_ds import cli
from igpt_ds.console import duration
from igpt_ds.errors import InputError
from igpt_ds.ops.rank_status import WATCH_SECONDS
from igpt_ds.ops.status import Status, read_status
from igpt_ds.ops.status_text import goodput_text, status_text
from igpt_ds.train.ledger.goodput import Goodput, read_goodput

LIVE = ("running", "stopping", "hanging")  # states of a run that trains
HEADS = ("run", "state", "step", "of", "loss", "val", "images/s", "MFU %", "left", "saved", "restarts")


@dataclass(frozen=True)
class NoRun:
    """One of several directories that is not a run directory."""

    run_dir: str
    error: str

    def to_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {"run_dir": self.run_dir, "state": "no run", "error": self.error}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads and prints, once or every --watch seconds."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="--run_dir of train.py or finetune.py")
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each run")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again after this many seconds, until interrupted")
    parser.add_argument("--goodput", action="store_true", help="show where the wall clock of each run and each start went")
    args = parser.parse_args(argv)
    if args.watch is not None and not args.watch > 0:
        raise InputError(f"--watch {args.watch:g} must be more than 0 seconds")
    while True:
        run_dirs = [run_dir for path in args.run_dirs for run_dir in runs_of(path)]
        found = [look(path, alone=len(run_dirs) == 1) for path in run_dirs]
        if args.json:
            print("\n".join(json.dumps(values(status, args.goodput)) for status in found), flush=True)
        elif args.goodput:
            print("\n\n".join(goodput_of(status, alone=len(found) == 1) for status in found), flush=True)
        elif len(found) == 1 and isinstance(found[0], Status):
            print(status_text(found[0]), flush=True)
        else:
            print(runs_table(found), flush=True)
        if args.watch is None:
            return
        if sys.stdout.isatty():
            print(flush=True)
        time.sleep(args.watch)


def runs_of(path: Path) -> list[Path]:
    """The runs of a directory: of its subsets, as finetune.py --labels makes them, or its own."""
    return sorted(run.parent for run in path.glob("subset-*/run.json")) or [path]


def look(path: Path, alone: bool) -> Status | NoRun:
    """The status of a run. A directory that is not a run is an error if it is the only one, else a line in the table."""
    try:
        return read_status(path, time.time(), WATCH_SECONDS)
    except InputError as error:
        if alone:
            raise
        return NoRun(str(path), str(error))


def goodput_of(status: Status | NoRun, alone: bool) -> str:
    """Where the time of a run went, as text. A run without times is an error if it is the only one, else a line."""
    try:
        return f"{status.run_dir}: {status.error}" if isinstance(status, NoRun) else goodput_text(ledger(status))
    except InputError as error:
        if alone:
            raise
        return f"{status.run_dir}: {error}"


def values(status: Status | NoRun, goodput: bool) -> dict[str, object]:
    """The JSON of a run; its goodput is null if nothing tells it."""
    found: dict[str, object] = {**status.to_dict()}
    if goodput and isinstance(status, Status):
        try:
            found["goodput"] = ledger(status).to_dict()
        except InputError:
            found["goodput"] = None
    return found


def ledger(status: Status) -> Goodput:
    """Where the time of a run went."""
    return read_goodput(Path(status.run_dir), live=status.state in LIVE)


def runs_table(found: Sequence[Status | NoRun]) -> str:
    """One line for each run."""
    rows = [HEADS, *(row(status) for status in found)]
    widths = [max(len(line[place]) for line in rows) for place in range(len(HEADS))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in rows)


def row(status: Status | NoRun) -> tuple[str, ...]:
    """The cells of one line."""
    if isinstance(status, NoRun):
        return (status.run_dir, "no run", *[""] * (len(HEADS) - 2))

    def number(value: float | None, text: str, factor: float = 1) -> str:
        return "-" if value is None else text.format(factor * value)

    saved = status.checkpoint
    return (
        status.run_dir,
        status.state,
        f"{status.step:,}",
        f"{status.steps:,}",
        number(status.loss, "{:.4f}"),
        number(status.val_loss, "{:.4f}"),
        number(status.images_per_s, "{:.1f}"),
        number(status.mfu, "{:.1f}", 100),
        "-" if status.seconds_left is None else duration(status.seconds_left),
        f"{saved.step:,}" if saved else "-",
        str(status.restarts),
    )


if __name__ == "__main__":
    cli.run(main)
