"""Says how runs are doing, from outside: step, loss, speed, end, checkpoints, restarts, and each rank's last sign of life.

    python tools/status.py runs/s --watch 10
    python tools/status.py --json runs/s runs/m

needs neither a GPU nor torch, and may look at a run while it is written, from any machine that sees its disk. Several runs make
a table, a line each. With --json each run is one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igpt_ds import cli
from igpt_ds.ops.status import describe, duration, read_status

HEADS = ("run", "state", "step", "of", "loss", "val", "images/s", "MFU %", "left", "saved", "restarts")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads and prints, once or again and again."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="what train.py got as --run_dir")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each run")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look again after so many seconds, until interrupted")
    args = parser.parse_args(argv)
    if args.watch is not None and not args.watch > 0:
        raise ValueError(f"--watch {args.watch:g} must be more than 0 seconds")
    while True:
        found = [look(path, alone=len(args.run_dirs) == 1) for path in args.run_dirs]
        if args.json:
            print("\n".join(json.dumps(status) for status in found), flush=True)
        elif len(found) == 1:
            print(describe(found[0]), flush=True)
        else:
            print(table(found), flush=True)
        if args.watch is None:
            return
        if sys.stdout.isatty():
            print(flush=True)
        time.sleep(args.watch)


def look(path: Path, alone: bool) -> dict[str, Any]:
    """The status of a run; one of several that is no run says so in its line, and the others are shown."""
    try:
        return read_status(path, time.time())
    except ValueError as error:
        if alone:
            raise
        return {"run_dir": str(path), "state": "no run", "error": str(error)}


def table(found: list[dict[str, Any]]) -> str:
    """A line for each run."""
    rows = [HEADS, *(row(status) for status in found)]
    widths = [max(len(line[place]) for line in rows) for place in range(len(HEADS))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in rows)


def row(status: dict[str, Any]) -> tuple[str, ...]:
    """The words of one line."""
    if "error" in status:
        return (status["run_dir"], status["state"], *[""] * (len(HEADS) - 2))

    def number(name: str, text: str, factor: float = 1) -> str:
        return "-" if status[name] is None else text.format(factor * status[name])

    saved = status["checkpoint"]
    return (
        status["run_dir"],
        status["state"],
        f"{status['step']:,}",
        f"{status['steps']:,}",
        number("loss", "{:.4f}"),
        number("val_loss", "{:.4f}"),
        number("images_per_s", "{:.1f}"),
        number("mfu", "{:.1f}", 100),
        "-" if status["seconds_left"] is None else duration(status["seconds_left"]),
        f"{saved['step']:,}" if saved else "-",
        str(status["restarts"]),
    )


if __name__ == "__main__":
    cli.run(main)
